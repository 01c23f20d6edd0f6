"""A soak test: impressions without clicks at full speed, far more than the joiner may hold.

    python tests/faults/soak.py --seconds 600 --through trainer
    python tests/faults/soak.py --seconds 60 --over-bound evict --max-mib 64

The test passes if memory stays flat and the joiner stays within its bound. Event time covers ten
label windows. The second window takes half of the run and holds far more impressions than the
bound allows. Resident memory is read from /proc twice a second, and the first tenth of the run is
ignored. Memory is flat if its maximum in the second half of the rest is at most 5 % above that in
the first half. The joiner's size is checked after each step. The exit status is 1 on failure.
Linux only.
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
from stream_ctr.train.ingest import Ingest, Poll  # noqa: E402
from stream_ctr.train.schedule import Schedule  # noqa: E402
from stream_ctr.train.trainer import Surroundings  # noqa: E402

EPOCH_MS = 1_735_689_600_000

FIELDS = 39
WINDOWS = 10
DENSE_WINDOW = 1  # its impressions take half of the run
WARM_UP = 0.1  # share of the run
TOLERANCE = 1.05
SAMPLE_SECONDS = 0.5
LINES = 20
FEATURE_VALUES = 1 << 16
IDS = 1 << 20


def impressions(
    seconds: float,
    *,
    window_ms: int,
    batch: int = 20_000,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield batches of (impression number, event time in ms) [batch] as fast as they are consumed.

    Numbers count from 0. While the clock runs for `seconds`, event time passes through ten label
    windows, the second of which takes half of the seconds.
    """
    share = np.full(WINDOWS, 0.5 / (WINDOWS - 1))
    share[DENSE_WINDOW] = 0.5
    ends = np.concatenate([[0.0], np.cumsum(share)]) * seconds
    start = clock()
    before = 0.0
    for number in itertools.count(0, batch):
        now = min(clock() - start, seconds)
        moments = np.linspace(before, now, batch)
        event_time = np.interp(moments, ends, np.arange(WINDOWS + 1) * window_ms)
        yield np.arange(number, number + batch), event_time.astype(np.int64)
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
    """Return (whether memory was flat, a sentence with the figures)."""
    kept = [sample for sample in samples if sample.seconds >= WARM_UP * seconds]
    middle = (1 + WARM_UP) / 2 * seconds
    first = max((s.resident_mib for s in kept if s.seconds < middle), default=0.0)
    last = max((s.resident_mib for s in kept if s.seconds >= middle), default=0.0)
    flat = 0.0 < last <= TOLERANCE * first
    return flat, (
        f"memory {'was flat' if flat else 'GREW'}: "
        f"at most {first:.0f} MiB in the first half, {last:.0f} MiB in the last"
    )


class JoinerSoak:
    """Feeds columns to a joiner."""

    def __init__(self, directory: Path, *, max_mib: int, over_bound: str, window_ms: int) -> None:
        self.joiner = LabelJoiner(
            fields=FIELDS,
            label_window_ms=window_ms,
            max_bytes=max_mib << 20,
            over_bound="evict" if over_bound == "evict" else "spill",
            spill_directory=directory,
        )
        self.within = True
        rng = np.random.default_rng(0)
        self._ids = rng.integers(0, 1 << 22, (IDS, FIELDS)).astype(np.int32)

    def take(self, number: npt.NDArray[np.int64], event_time: npt.NDArray[np.int64]) -> None:
        n = len(number)
        arrivals = Arrivals(
            mix64(number.astype(np.uint64)), event_time, np.zeros(n, np.int32), number
        )
        begin = int(number[0]) % (len(self._ids) - n)
        self.joiner.push_impressions(arrivals, self._ids[begin : begin + n], limit=event_time)
        self.within &= self.joiner.nbytes <= self.joiner.max_bytes
        while len(self.joiner.advance(int(event_time[-1]))):
            pass
        self.within &= self.joiner.nbytes <= self.joiner.max_bytes

    def close(self) -> None:
        """Nothing to close."""


class TrainerSoak:
    """Feeds JSON to a trainer.

    The trainer decodes, hashes and joins the events, learns the paper's network, runs the baseline
    on a share of the examples, and takes snapshots.
    """

    def __init__(self, directory: Path, *, max_mib: int, over_bound: str, window_ms: int) -> None:
        names = [f"field_{number}" for number in range(FIELDS)]
        overrides = {
            "features": {"categorical": names},
            "join": {
                "label_window": f"{window_ms}ms",
                "max_memory": f"{max_mib}MiB",
                "over_memory": over_bound,
            },
            "input": {"read_ahead": 0},
            "baseline": {"sample_rate": 1 / 64},
            "snapshots": {"keep": 1},
        }
        config = load(environ={}, overrides=overrides)
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
        joiner = self._trainer.state.joiner
        assert isinstance(joiner, LabelJoiner)  # a run in one process
        self.joiner = joiner
        self.within = True
        values = pa.array([f"value-{number}" for number in range(FEATURE_VALUES)])
        draws = np.random.default_rng(0).integers(0, len(values), (FIELDS, 1 << 14))
        self._features = {
            name: values.take(pa.array(rows)) for name, rows in zip(names, draws, strict=True)
        }

    def take(self, number: npt.NDArray[np.int64], event_time: npt.NDArray[np.int64]) -> None:
        n = len(number)
        features = {name: column.slice(0, n) for name, column in self._features.items()}
        value = encode_impressions(
            pa.array(number).cast(pa.string()), EPOCH_MS + event_time, features
        )
        ingest = self._trainer.ingest
        assert isinstance(ingest, Ingest)  # read_ahead is 0
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


# The target and its number of impressions a batch.
THROUGH: dict[str, tuple[type[JoinerSoak] | type[TrainerSoak], int]] = {
    "joiner": (JoinerSoak, 20_000),
    "trainer": (TrainerSoak, 5_000),
}


def line(joiner: LabelJoiner, sample: Sample, windows: float) -> list[object]:
    """Return a row of the table."""
    counts = joiner.counts()
    disk = sum(size for _, _, size in joiner.segments().values())
    millions = [f"{n / 1e6:.2f}" for n in (counts["impressions"], joiner.pending, joiner.spilled)]
    gone = [f"{counts[name] / 1e6:.2f}" for name in ("impressions_evicted", "ids_forgotten_early")]
    sizes = [f"{size:.0f}" for size in (joiner.nbytes / 2**20, disk / 2**20, sample.resident_mib)]
    return [f"{sample.seconds:.0f}", f"{windows:.2f}", *millions, *gone, *sizes]


@dataclass(frozen=True, slots=True)
class Result:
    rows: list[list[object]]
    summary: str
    passed: bool


def soak(through: str, seconds: float, *, max_mib: int, over_bound: str, window_ms: int) -> Result:
    """Feed impressions for this long and return the table and the verdict."""
    make, batch = THROUGH[through]
    samples: list[Sample] = []
    rows: list[list[object]] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        target = make(Path(directory), max_mib=max_mib, over_bound=over_bound, window_ms=window_ms)
        for number, event_time in impressions(seconds, window_ms=window_ms, batch=batch):
            target.take(number, event_time)
            now = time.monotonic() - start
            if now >= len(samples) * SAMPLE_SECONDS:
                samples.append(Sample(now, resident_mib()))
                if now >= len(rows) * seconds / LINES:
                    rows.append(line(target.joiner, samples[-1], int(event_time[-1]) / window_ms))
        target.close()
    flat, verdict = judge(samples, seconds)
    rate = target.joiner.counts()["impressions"] / samples[-1].seconds
    kept = "always" if target.within else "NOT ALWAYS"
    summary = (
        f"{verdict}; the bound of {max_mib} MiB was {kept} kept; {rate:,.0f} impressions a second"
    )
    return Result(rows, summary, flat and target.within)


HEADER = [
    "seconds",
    "label windows",
    "M impressions",
    "M pending",
    "M on disk",
    "M evicted",
    "M ids forgotten early",
    "joiner MiB",
    "disk MiB",
    "resident MiB",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--through", choices=list(THROUGH), default="joiner")
    parser.add_argument("--max-mib", type=int, default=256, help="the joiner's bound")
    parser.add_argument("--over-bound", choices=["spill", "evict"], default="spill")
    parser.add_argument(
        "--window-seconds", type=int, default=600, help="the label window, in event time"
    )
    options = parser.parse_args()
    result = soak(
        options.through,
        options.seconds,
        max_mib=options.max_mib,
        over_bound=options.over_bound,
        window_ms=1000 * options.window_seconds,
    )
    print_table(HEADER, result.rows)
    print(
        f"{result.summary}\n\n{machine()}: python tests/faults/soak.py {shlex.join(sys.argv[1:])}"
    )
    sys.exit(0 if result.passed else 1)


if __name__ == "__main__":
    main()
