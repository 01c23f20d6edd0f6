"""Ours: the time for which a snapshot stops the learner, the longest in a run of `bench.pause`."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from answers import answer
from bench.pause import measure as run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table-bits", type=int, required=True)
    parser.add_argument("--impressions", type=int, required=True)
    parser.add_argument("--every", type=int, required=True, help="examples between two snapshots")
    arguments = parser.parse_args()

    def measure() -> dict[str, object]:
        with tempfile.TemporaryDirectory() as name:
            seconds = run(arguments.table_bits, arguments.impressions, arguments.every, Path(name))
        copies = [1000 * second for second in seconds["copy"]]
        batches = {
            name: statistics.median(seconds[name]) for name in ("beside", "alone") if seconds[name]
        }
        return {"value": max(copies), "copy_milliseconds": copies, "median_batch_seconds": batches}

    answer(measure, note=f"2^{arguments.table_bits} rows, the longest copy of each run")


if __name__ == "__main__":
    main()
