"""Impressions that nobody clicks, at full speed, far more of them than the joiner may hold: does memory stay flat?

    python tests/faults/soak.py --seconds 600 --through trainer
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
import pyarrow as pa

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import machine, print_table  # noqa: E402

from stream_ctr.cli.assembly import build_trainer  # noqa: E402
from stream_ctr.config import load  # noqa: E402
from stream_ctr.connectors import Records  # noqa: E402
from stream_ctr.connectors.memory import BatchSource  # noqa: E402
from stream_ctr.events.batch import Arrivals  # noqa: E402
from stream_ctr.events.features import mix64  # noqa: E402
from stream_ctr.events.json_events import encode_impressions  # noqa: E402
from stream_ctr.join.joiner import LabelJoiner  # noqa: E402
from stream_ctr.snapshots.publisher import Publisher  # noqa: E402
from stream_ctr.train.ingest import Poll  # noqa: E402
from stream_ctr.train.schedule import Schedule  # noqa: E402
from stream_ctr.train.trainer import Surroundings  # noqa: E402

EPOCH_MS = 1_735_689_600_000

FIELDS = 39
WINDOWS, DENSE = 10, 1
WARM_UP, TOLERANCE = 0.1, 1.05
SAMPLE_SECONDS, LINES = 0.5, 20


def impressions(
    seconds: float,
    *,
    window_ms: int,
    batch: int = 20_000,
    clock: Callable[[], float] = time.monotonic,
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
    return (
        flat,
        f"memory {'was flat' if flat else 'GREW'}: at most {first:.0f} MiB in the first half, {last:.0f} MiB in the last",
    )


class JoinerSoak:
    """The joiner alone, fed with columns."""

    def __init__(self, directory: Path, *, max_mib: int, over_bound: str, window_ms: int) -> None:
        self.joiner = LabelJoiner(
            fields=FIELDS,
            label_window_ms=window_ms,
            max_bytes=max_mib << 20,
            over_bound="evict" if over_bound == "evict" else "spill",
            spill_directory=directory,
        )
        self.within = True
        self._ids = (
            np.random.default_rng(0).integers(0, 1 << 22, (1 << 20, FIELDS)).astype(np.int32)
        )

    def take(self, number: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> None:
        n = len(number)
        arrivals = Arrivals(mix64(number.astype(np.uint64)), at, np.zeros(n, np.int32), number)
        begin = int(number[0]) % (len(self._ids) - n)
        self.joiner.push_impressions(arrivals, self._ids[begin : begin + n], limit=at)
        self.within &= self.joiner.nbytes <= self.joiner.max_bytes
        while len(self.joiner.advance(int(at[-1]))):
            pass
        self.within &= self.joiner.nbytes <= self.joiner.max_bytes

    def close(self) -> None:
        """Nothing to close."""


class TrainerSoak:
    """The whole trainer - decoding, hashing, joining, the paper's network, the baseline on a share, snapshots - fed with JSON."""

    def __init__(self, directory: Path, *, max_mib: int, over_bound: str, window_ms: int) -> None:
        names = [f"field_{number}" for number in range(FIELDS)]
        config = load(
            environ={},
            overrides={
                "features": {"categorical": names},
                "join": {
                    "label_window": f"{window_ms}ms",
                    "max_memory": f"{max_mib}MiB",
                    "over_memory": over_bound,
                },
                "input": {"read_ahead": 0},
                "baseline": {"sample_rate": 1 / 64},
                "snapshots": {"keep": 1},
            },
        )
        self.source = BatchSource(lambda: iter(()))
        schedule = Schedule({"report": 10.0, "snapshot": 60.0})
        schedule.start()
        self._schedule = schedule
        fields = config.features.fields()
        self._trainer = build_trainer(
            config,
            fields=fields,
            source=self.source,
            publisher=Publisher(directory),
            directory=directory,
            surroundings=Surroundings(flags=schedule),
        )
        self.joiner, self.within = self._trainer.state.joiner, True
        values = pa.array([f"value-{number}" for number in range(1 << 16)])
        draws = np.random.default_rng(0).integers(0, len(values), (FIELDS, 1 << 14))
        self._features = {
            name: values.take(pa.array(rows)) for name, rows in zip(names, draws, strict=True)
        }

    def take(self, number: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> None:
        n = len(number)
        features = {name: column.slice(0, n) for name, column in self._features.items()}
        value = encode_impressions(pa.array(number).cast(pa.string()), EPOCH_MS + at, features)
        ingest = self._trainer.ingest
        self._trainer._handle(
            Poll(
                ingest.events(Records(np.zeros(n, np.int32), number, np.full(n, -1), value)),
                ingest.status(),
            )
        )
        self.within &= self.joiner.nbytes <= self.joiner.max_bytes

    def close(self) -> None:
        self._schedule.stop()
        self._trainer._settle(wait=True)
        self._trainer.snapshots.close()
        if self._trainer.baseline:
            self._trainer.baseline.close()


FED = {"joiner": (JoinerSoak, 20_000), "trainer": (TrainerSoak, 5_000)}


def line(joiner: LabelJoiner, sample: Sample, windows: float) -> list[object]:
    counts, disk = joiner.counts(), sum(size for _, _, size in joiner.segments().values())
    millions = [f"{n / 1e6:.2f}" for n in (counts["impressions"], joiner.pending, joiner.spilled)]
    gone = [f"{counts[name] / 1e6:.2f}" for name in ("impressions_evicted", "ids_forgotten_early")]
    sizes = [f"{size:.0f}" for size in (joiner.nbytes / 2**20, disk / 2**20, sample.resident_mib)]
    return [f"{sample.seconds:.0f}", f"{windows:.2f}", *millions, *gone, *sizes]


@dataclass(frozen=True, slots=True)
class Result:
    rows: list[list[object]]
    said: str
    passed: bool


def soak(through: str, seconds: float, *, max_mib: int, over_bound: str, window_ms: int) -> Result:
    """Feed for so many seconds; a table of how it went, and whether memory was flat and the bound kept."""
    make, batch = FED[through]
    samples: list[Sample] = []
    rows: list[list[object]] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        fed = make(Path(directory), max_mib=max_mib, over_bound=over_bound, window_ms=window_ms)
        for number, at in impressions(seconds, window_ms=window_ms, batch=batch):
            fed.take(number, at)
            now = time.monotonic() - begun
            if now >= len(samples) * SAMPLE_SECONDS:
                samples.append(Sample(now, resident_mib()))
                if now >= len(rows) * seconds / LINES:
                    rows.append(line(fed.joiner, samples[-1], int(at[-1]) / window_ms))
        fed.close()
    flat, said = judge(samples, seconds)
    rate = fed.joiner.counts()["impressions"] / samples[-1].seconds
    kept = "always" if fed.within else "NOT ALWAYS"
    return Result(
        rows,
        f"{said}; the bound of {max_mib} MiB was {kept} kept; {rate:,.0f} impressions a second",
        flat and fed.within,
    )


HEADER = [
    "seconds", "label windows", "M impressions", "M pending", "M on disk", "M evicted", "M ids forgotten early",
    "joiner MiB", "disk MiB", "resident MiB",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--through", choices=list(FED), default="joiner")
    parser.add_argument("--max-mib", type=int, default=256, help="the joiner's bound")
    parser.add_argument("--over-bound", choices=["spill", "evict"], default="spill")
    parser.add_argument(
        "--window-seconds", type=int, default=600, help="the label window, in event time"
    )
    options = parser.parse_args()
    done = soak(
        options.through,
        options.seconds,
        max_mib=options.max_mib,
        over_bound=options.over_bound,
        window_ms=1000 * options.window_seconds,
    )
    print_table(HEADER, done.rows)
    print(f"{done.said}\n\n{machine()}: python tests/faults/soak.py {shlex.join(sys.argv[1:])}")
    sys.exit(0 if done.passed else 1)


if __name__ == "__main__":
    main()
