"""Seconds an example of each stage of a step by the online rule, on one core.

One learner in one thread, batches of ids in memory. `sub-batches` is the part in which ranks take
turns; `network` and `layers` are those that they share.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from support.record import formatted

from bench import zipf
from bench.rank_runs import Result
from bench.step import Timed
from stream_ctr.learn.device import choose_device, choose_precision
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.thread_pool import set_up_process

STAGES = {
    "_run_network": "network",
    "_group": "sort and group",
    "_step_sub_batches": "sub-batches",
    "_layer_gradients": "layers",
}
WHOLE = "a step"
_WARM_UP = 5


def measure(options: argparse.Namespace) -> Result:
    """Return the median seconds an example of each stage over the rounds."""
    set_up_process()
    rows = 1 << options.train_bits
    precision: Any = choose_precision("auto", choose_device("cpu"))
    spec = LearnerSpec(
        fields=zipf.FIELDS,
        hidden=tuple(options.hidden),
        table_bits=options.train_bits,
        batch_size=options.batch,
        precision=precision,
    )
    learner = NetworkLearner(spec, device="cpu", threads=1)
    with tempfile.TemporaryDirectory() as name:
        data = zipf.write(Path(name), rows=rows, examples=16 * options.batch)
        ids, labels = np.load(data / "ids.npy"), np.load(data / "labels.npy")
    starts = itertools.cycle(range(0, len(ids), options.batch))
    found: list[dict[str, float]] = []
    for number in range(_WARM_UP + options.rounds * options.steps):
        first = next(starts)
        part = slice(first, first + options.batch)
        timed = Timed()
        with_stages(timed, learner)
        learner.learn(ids[part], labels[part])
        without_stages(learner)
        if number >= _WARM_UP:
            found.append(timed.seconds)
    seconds = {
        name: statistics.median(each[name] for each in found) / options.batch for name in found[0]
    }
    return {"precision": precision, "rows": rows, "batch": options.batch, "seconds": seconds}


def with_stages(timed: Timed, learner: NetworkLearner) -> None:
    timed.watch(learner, "learn", WHOLE)
    for method, name in STAGES.items():
        timed.watch(learner._step, method, name)


def without_stages(learner: NetworkLearner) -> None:
    del learner.learn
    for method in STAGES:
        delattr(learner._step, method)


def table(results: Result) -> str:
    seconds = results["seconds"]
    rows: list[list[object]] = [
        [name, f"{1e6 * each:.2f}", f"{1 / each:,.0f}"] for name, each in seconds.items()
    ]
    rest = seconds[WHOLE] - sum(each for name, each in seconds.items() if name != WHOLE)
    rows.append(["what is between", f"{1e6 * rest:.2f}", ""])
    header = ["stage, one core", "microseconds an example", "examples/s of it alone"]
    return (
        f"DeepFM, {results['precision']}, batches of {results['batch']:,}, "
        f"{results['rows']:,} rows:\n\n{formatted(header, rows)}"
    )
