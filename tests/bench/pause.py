"""For how long a snapshot keeps the learner waiting; the figure of docs/reliability.md.

    python tests/bench/pause.py --table-bits 22

The trainer learns a simulated stream with the paper's network and takes a snapshot after every so many examples, while each batch is timed.
*copy* is the time in which nothing is learned: all state is copied, and when the baseline has answered the scores that belong to it.
*longest batch* is what a batch took at most while a snapshot was being written behind it, beside the median of those for which none was.
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
    """Seconds: `copy` of each snapshot, `beside` of each batch while a snapshot was written, `alone` of all others."""
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
        fields=simulation.fields,
        source=source,
        publisher=Publisher(directory),
        directory=directory,
    )
    seconds: dict[str, list[float]] = {"copy": [], "beside": [], "alone": []}
    cut, write, learn = trainer.cut, trainer._write, trainer._learn

    def timed_cut() -> None:
        trainer._settle(
            wait=True
        )  # the one before, which a stream of this speed would not have to wait for
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

    trainer.cut, trainer._write, trainer._learn = timed_cut, timed_write, timed_learn  # type: ignore[method-assign]
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
        copies, beside, alone = seconds["copy"], seconds["beside"], seconds["alone"]
        rows.append([f"{2**bits:,}", len(copies), *(f"{1000 * x:.0f}" for x in (
            statistics.median(copies), max(copies), max(beside, default=0.0), statistics.median(beside or [0.0]), statistics.median(alone)
        ))])  # fmt: skip
    head = [
        "table rows",
        "snapshots",
        "copy ms, median",
        "copy ms, longest",
        "longest batch beside, ms",
        "median batch beside",
        "median batch alone",
    ]
    print_table(head, rows)
    print(f"{machine()}: python tests/bench/pause.py {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
