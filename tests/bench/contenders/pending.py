"""Resident memory of the joiner after many impressions: all of them pending, or none of them.

With none pending, the ids of the released impressions are forgotten at once too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from answers import answer

from stream_ctr.events.batch import Arrivals
from stream_ctr.events.features import mix64
from stream_ctr.join.joiner import LabelJoiner

_BLOCK = 8192
_START_MS = 1_735_689_600_000


def resident_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impressions", type=int, required=True)
    parser.add_argument("--fields", type=int, default=39)
    parser.add_argument("--pending", choices=["all", "none"], required=True)
    arguments = parser.parse_args()
    # One impression a millisecond.
    window_ms = arguments.impressions if arguments.pending == "all" else 1
    joiner = LabelJoiner(
        fields=arguments.fields,
        id_bits=20,
        label_window_ms=window_ms,
        duplicate_horizon_ms=window_ms,
    )
    rng = np.random.default_rng(0)
    for first in range(0, arguments.impressions, _BLOCK):
        number = np.arange(first, min(first + _BLOCK, arguments.impressions))
        n = len(number)
        time = _START_MS + number
        impressions = Arrivals(mix64(number.astype(np.uint64)), time, np.zeros(n, np.int32), number)
        ids = rng.integers(0, 1 << 20, (n, arguments.fields), dtype=np.int32)
        joiner.push_impressions(impressions, ids, limit=time)
        while len(joiner.advance(int(time[-1]))):
            pass
    answer(
        lambda: {"value": resident_megabytes(), "pending": joiner.pending},
        note=f"{joiner.pending:,} pending",
    )


if __name__ == "__main__":
    main()
