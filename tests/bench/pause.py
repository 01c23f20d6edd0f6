"""The time for which a snapshot stops the learner; the figure of docs/reliability.md.

    python tests/bench/pause.py --table-bits 22

The trainer learns a simulated stream with the paper's network, takes a snapshot every --every
examples, and times each batch. *copy* is the time in which nothing is learned: all state is copied,
and once the baseline has answered, the scores that belong to it. *longest batch beside* is the
slowest batch while a snapshot is written in the background. *median batch alone* is the median of
the batches during which no snapshot is written.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import machine, print_table  # noqa: E402

from stream_ctr.cli.assembly import build_trainer  # noqa: E402
from stream_ctr.config import load  # noqa: E402
from stream_ctr.connectors.memory import BatchSource  # noqa: E402
from stream_ctr.logs.simulate import Simulation  # noqa: E402
from stream_ctr.snapshots.publisher import Publisher  # noqa: E402


def measure(
    table_bits: int, impressions: int, every: int, directory: Path
) -> dict[str, list[float]]:
    """Return lists of seconds: `copy` of each snapshot, `beside` and `alone` of batches.

    `beside` are the batches during which a snapshot is written, `alone` all others.
    """
    simulation = Simulation(impressions, seed=1)
    batches = [batch.value for batch in simulation.batches()]
    config = load(
        environ={},
        overrides={
            "model": {"table_bits": table_bits},
            "schedule": {"snapshot_examples": every},
            "snapshots": {"keep": 1},
            "baseline": {"sample_rate": 1 / 16},
            "join": {"label_window": "60s"},
        },
    )
    source = BatchSource(lambda: iter([pa.concat_arrays(batches)]))
    trainer = build_trainer(
        config,
        fields=simulation.fields or (),
        source=source,
        publisher=Publisher(directory),
        directory=directory,
    )
    seconds: dict[str, list[float]] = {"copy": [], "beside": [], "alone": []}
    cut = trainer.cut
    write = trainer._write
    learn = trainer._learn

    def timed_cut() -> None:
        # Waits for the snapshot before. At the speed of a real stream it would be done.
        trainer._settle(wait=True)
        began = time.perf_counter()
        cut()
        seconds["copy"].append(time.perf_counter() - began)

    def timed_write(*arguments: Any) -> None:
        began = time.perf_counter()
        write(*arguments)
        seconds["copy"][-1] += time.perf_counter() - began

    def timed_learn(batch: object) -> None:
        busy = trainer.snapshots.in_progress
        began = time.perf_counter()
        learn(batch)  # type: ignore[arg-type]
        seconds["beside" if busy else "alone"].append(time.perf_counter() - began)

    trainer.cut = timed_cut  # type: ignore[method-assign]
    trainer._write = timed_write  # type: ignore[method-assign, assignment]
    trainer._learn = timed_learn  # type: ignore[method-assign]
    try:
        trainer.run()
    finally:
        if trainer.baseline:
            trainer.baseline.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table-bits", type=int, nargs="+", default=[20, 22])
    parser.add_argument("--impressions", type=int, default=120_000)
    parser.add_argument("--every", type=int, default=25_000, help="examples between two snapshots")
    arguments = parser.parse_args()
    rows: list[list[object]] = []
    for bits in arguments.table_bits:
        with tempfile.TemporaryDirectory() as name:
            seconds = measure(bits, arguments.impressions, arguments.every, Path(name))
        copies = seconds["copy"]
        beside = seconds["beside"] or [0.0]
        figures = [
            statistics.median(copies),
            max(copies),
            max(beside),
            statistics.median(beside),
            statistics.median(seconds["alone"]),
        ]
        milliseconds = [f"{1000 * figure:.0f}" for figure in figures]
        rows.append([f"{2**bits:,}", len(copies), *milliseconds])
    header = [
        "table rows",
        "snapshots",
        "copy ms, median",
        "copy ms, longest",
        "longest batch beside, ms",
        "median batch beside",
        "median batch alone",
    ]
    print_table(header, rows)
    print(f"{machine()}: python tests/bench/pause.py {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
