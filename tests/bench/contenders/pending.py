"""Resident memory of the joiner after so many impressions of 39 fields: all of them pending, or none, each forgotten as it leaves."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from answers import answer

from stream_ctr.events.features import mix64
from stream_ctr.join.joiner import Arrivals, LabelJoiner

_BLOCK = 8192
_START_MS = 1_735_689_600_000


def resident_megabytes() -> float:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impressions", type=int, required=True)
    parser.add_argument("--fields", type=int, default=39)
    parser.add_argument("--pending", choices=["all", "none"], required=True)
    arguments = parser.parse_args()
    window_ms = (
        arguments.impressions if arguments.pending == "all" else 1
    )  # one impression a millisecond
    joiner = LabelJoiner(
        fields=arguments.fields,
        id_bits=20,
        label_window_ms=window_ms,
        duplicate_horizon_ms=window_ms,
    )
    rng = np.random.default_rng(0)
    for first in range(0, arguments.impressions, _BLOCK):
        row = np.arange(first, min(first + _BLOCK, arguments.impressions))
        time = _START_MS + row
        arrivals = Arrivals(
            mix64(row.astype(np.uint64)), time, np.zeros(len(row), np.int32), row, time
        )
        joiner.push_impressions(
            arrivals, rng.integers(0, 1 << 20, (len(row), arguments.fields), dtype=np.int32)
        )
        while len(joiner.advance(int(time[-1]))):
            pass
    answer(
        lambda: {"value": resident_megabytes(), "pending": joiner.pending},
        note=f"{joiner.pending:,} pending",
    )


if __name__ == "__main__":
    main()
