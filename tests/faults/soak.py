"""Impressions that nobody clicks, at full speed, far more of them than the joiner may hold: does memory stay flat?

    python tests/faults/soak.py --seconds 600
    python tests/faults/soak.py --seconds 60 --over-bound evict --max-mib 64

Event time covers ten label windows; the second takes half of the run and holds far more than the bound. Resident memory is read from
/proc twice a second; it is flat when its greatest value in the last half of the run, a tenth for warming up left out, is at most 5 %
above that of the first half, and the joiner was within its bound whenever it was looked at. Exit status 1 when not. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from record import machine, print_table  # noqa: E402

from stream_ctr.features import mix64  # noqa: E402
from stream_ctr.join import Arrivals, LabelJoiner  # noqa: E402

FIELDS = 39
WINDOWS, DENSE = 10, 1
WARM_UP, TOLERANCE = 0.1, 1.05
SAMPLE_SECONDS, LINES = 0.5, 20


def impressions(
    seconds: float, *, window_ms: int, batch: int = 20_000, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Batches of (number, event time in ms) [batch] for so many seconds, as fast as they are taken. Numbers count from 0. Event time goes
    with the clock through ten label windows, of which the second takes half of the seconds."""
    share = np.full(WINDOWS, 0.5 / (WINDOWS - 1))
    share[DENSE] = 0.5
    ends = np.concatenate([[0.0], np.cumsum(share)]) * seconds
    begun, before = clock(), 0.0
    for number in itertools.count(0, batch):
        now = min(clock() - begun, seconds)
        came = np.interp(np.linspace(before, now, batch), ends, np.arange(WINDOWS + 1) * window_ms)
        yield np.arange(number, number + batch), came.astype(np.int64)
        if now >= seconds:
            return
        before = now


def resident_mib(pid: int | str = "self") -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    resident_mib: float


def judge(samples: list[Sample], seconds: float) -> tuple[bool, str]:
    """Whether memory was flat, and what that is said of."""
    kept = [sample for sample in samples if sample.seconds >= WARM_UP * seconds]
    middle = (1 + WARM_UP) / 2 * seconds
    first = max((s.resident_mib for s in kept if s.seconds < middle), default=0.0)
    last = max((s.resident_mib for s in kept if s.seconds >= middle), default=0.0)
    flat = 0.0 < last <= TOLERANCE * first
    return flat, f"memory {'was flat' if flat else 'GREW'}: at most {first:.0f} MiB in the first half, {last:.0f} MiB in the last"


class Soak:
    """The joiner alone, fed by itself."""

    def __init__(self, directory: Path, *, max_bytes: int, over_bound: str, window_ms: int) -> None:
        self.joiner = LabelJoiner(
            fields=FIELDS,
            label_window_ms=window_ms,
            max_bytes=max_bytes,
            over_bound="evict" if over_bound == "evict" else "spill",
            spill_directory=directory,
        )
        self.window_ms, self.examples, self.within = window_ms, 0, True
        self._ids = np.random.default_rng(0).integers(0, 1 << 22, (1 << 20, FIELDS)).astype(np.int32)

    def take(self, number: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> None:
        n = len(number)
        arrivals = Arrivals(mix64(number.astype(np.uint64)), at, np.zeros(n, np.int32), number, at)
        begin = int(number[0]) % (len(self._ids) - n)
        self.joiner.push_impressions(arrivals, self._ids[begin : begin + n])
        self.within &= self.joiner.nbytes <= self.joiner.max_bytes
        while n := len(self.joiner.advance(int(at[-1]))):
            self.examples += n
        self.within &= self.joiner.nbytes <= self.joiner.max_bytes

    def line(self, sample: Sample, at: int) -> list[object]:
        counts, disk = self.joiner.counts(), sum(size for _, _, size in self.joiner.segments().values())
        millions = [f"{n / 1e6:.2f}" for n in (counts["impressions"], self.joiner.pending, self.joiner.spilled)]
        gone = [f"{counts[name] / 1e6:.2f}" for name in ("impressions_evicted", "ids_forgotten_early")]
        sizes = [f"{size:.0f}" for size in (self.joiner.nbytes / 2**20, disk / 2**20, sample.resident_mib)]
        return [f"{sample.seconds:.0f}", f"{at / self.window_ms:.2f}", *millions, *gone, *sizes]


HEADER = [
    "seconds", "label windows", "M impressions", "M pending", "M on disk", "M evicted", "M ids forgotten early",
    "joiner MiB", "disk MiB", "resident MiB",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--max-mib", type=int, default=256, help="the joiner's bound")
    parser.add_argument("--over-bound", choices=["spill", "evict"], default="spill")
    parser.add_argument("--window-seconds", type=int, default=600, help="the label window, in event time")
    options = parser.parse_args()
    print(f"{machine()}: python tests/faults/soak.py {shlex.join(sys.argv[1:])}\n", flush=True)
    samples: list[Sample] = []
    lines: list[list[object]] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        soak = Soak(
            Path(directory), max_bytes=options.max_mib << 20, over_bound=options.over_bound, window_ms=options.window_seconds * 1000
        )
        for number, at in impressions(options.seconds, window_ms=soak.window_ms):
            soak.take(number, at)
            now = time.monotonic() - begun
            if now >= len(samples) * SAMPLE_SECONDS:
                samples.append(Sample(now, resident_mib()))
                if now >= len(lines) * options.seconds / LINES:
                    lines.append(soak.line(samples[-1], int(at[-1])))
    flat, said = judge(samples, options.seconds)
    print_table(HEADER, lines)
    rate = soak.joiner.counts()["impressions"] / samples[-1].seconds / 1e6
    kept = "always" if soak.within else "NOT ALWAYS"
    print(f"{said}; the bound of {options.max_mib} MiB was {kept} kept; {rate:.2f} M impressions a second")
    sys.exit(0 if flat and soak.within else 1)


if __name__ == "__main__":
    main()
