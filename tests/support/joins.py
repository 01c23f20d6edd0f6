"""Builders for tests of the joiner: logs, polls, joiners, and the examples that a log implies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st

from stream_ctr.events.batch import Arrivals, LabelledArrivals
from stream_ctr.events.features import mix64
from stream_ctr.join import spill
from stream_ctr.join.capacity import Capacity
from stream_ctr.join.examples import Examples
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks

WINDOW = 100
EARLY = 20
LATENESS = 30
FIELDS = 39

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Event:
    kind: str
    id: int
    time: int
    partition: int = 0
    label: int = 0  # of an example


# The events of each partition, in offset order.
Log: TypeAlias = Sequence[Sequence[Event]]
# (partition, offset, event) in order of arrival.
Poll: TypeAlias = list[tuple[int, int, Event]]


def limits(partition: Sequence[Event]) -> list[int]:
    """Return the watermark of a partition after each of its events."""
    return [max(e.time for e in partition[: end + 1]) - LATENESS for end in range(len(partition))]


def expected(log: Log) -> list[tuple[int, int, int, int, int]]:
    """Return (time, partition, offset, id, label) of each example, by the definition alone.

    They are in the order of release: an impression leaves when its window closes, an example that
    came with its label at its own time, or at the watermark that it was behind.
    """
    rows = [
        (event, partition, offset, limit)
        for partition, events in enumerate(log)
        for offset, (event, limit) in enumerate(zip(events, limits(events), strict=True))
    ]
    impressions: dict[int, tuple[int, int, int]] = {}
    for event, partition, offset, limit in rows:
        if event.kind == "impression" and limit <= event.time + WINDOW:
            earliest = impressions.get(event.id, (1 << 60, 0, 0))
            impressions[event.id] = min(earliest, (event.time, partition, offset))
    given: dict[int, tuple[int, int, int]] = {}
    for event, partition, offset, limit in rows:
        if event.kind == "example":
            earliest = given.get(event.id, (1 << 60, 0, 0))
            given[event.id] = min(earliest, (max(event.time, limit), partition, offset))
    examples = []
    for place in given.values():
        event = log[place[1]][place[2]]
        examples.append((place, (event.time, *place[1:], event.id, event.label)))
    for id_, (time, partition, offset) in impressions.items():
        label = any(
            click.kind == "click"
            and click.id == id_
            and time - EARLY <= click.time <= time + WINDOW
            and limit <= time + WINDOW
            for click, _, _, limit in rows
        )
        released = (time + WINDOW, partition, offset)
        examples.append((released, (time, partition, offset, id_, int(label))))
    return [example for _, example in sorted(examples)]


def joiner(directory: Path | None = None, *, duplicate_horizon_ms: int = 10_000) -> LabelJoiner:
    return LabelJoiner(
        fields=FIELDS,
        value_fields=1,
        id_bits=24,
        label_window_ms=WINDOW,
        early_click_wait_ms=EARLY,
        duplicate_horizon_ms=duplicate_horizon_ms,
        spill_directory=directory,
    )


def bounded(max_bytes: int, directory: Path | None = None, **options: Any) -> LabelJoiner:
    """Return a joiner with a memory bound and a label window of two seconds."""
    defaults = {
        "label_window_ms": 2000,
        "early_click_wait_ms": EARLY,
        "duplicate_horizon_ms": 10_000,
        "max_bytes": max_bytes,
        "spill_directory": directory,
    }
    return LabelJoiner(fields=FIELDS, value_fields=1, **{**defaults, **options})


@contextmanager
def capacity(segment_rows: int = 1 << 16, **rows: int) -> Iterator[None]:
    """Give the joiners made here room for so many rows, whatever the bound in bytes."""
    with pytest.MonkeyPatch.context() as patch:
        fixed = Capacity(**{"index": 256, "pending": 128, "clicks": 100, **rows})
        patch.setattr(Capacity, "of", classmethod(lambda cls, *_, **__: fixed))
        patch.setattr(spill, "SEGMENT_ROWS", segment_rows)
        yield


def features(record: Array) -> tuple[Array, Array, Array]:
    """Return `ids`, `values` and `true_probability` from which the record can be read back."""
    ids = (record[:, None] * 100 + np.arange(FIELDS)).astype(np.int32)
    return ids, (record[:, None] / 2).astype(np.float32), record / 1e6


def push(target: LabelJoiner, marks: Watermarks, poll: Poll) -> None:
    partition = np.array([p for p, _, _ in poll], np.int32)
    offset = np.array([o for _, o, _ in poll], np.int64)
    time = np.array([e.time for _, _, e in poll], np.int64)
    id_hash = np.array([e.id for _, _, e in poll], np.uint64)
    shown, click, given = (
        np.array([e.kind == kind for _, _, e in poll])
        for kind in ("impression", "click", "example")
    )
    limit = marks.observe(partition, time, click, given)
    arrivals = Arrivals(id_hash, time, partition, offset)
    record = partition * 1000 + offset
    target.push_impressions(arrivals[shown], *features(record[shown]), limit=limit[shown])
    target.push_clicks(arrivals[click], limit=limit[click])
    label = np.array([e.label for _, _, e in poll], np.uint8)
    labelled = LabelledArrivals(arrivals[given], label[given], *features(record[given]))
    target.push_labelled(labelled, limit=limit[given])


def push_impressions(target: LabelJoiner, ids: Array, time: Array | int) -> None:
    """Push an impression of each id, none of them late."""
    n = len(ids)
    target.push_impressions(_arrivals(ids, time), *features(np.arange(n)))


def push_clicks(target: LabelJoiner, ids: Array, time: Array | int) -> None:
    """Push a click of each id, none of them late on arrival."""
    target.push_clicks(_arrivals(ids, time))


def _arrivals(ids: Array, time: Array | int) -> Arrivals:
    n = len(ids)
    times = np.broadcast_to(time, n).astype(np.int64)
    return Arrivals(ids.astype(np.uint64), times, np.zeros(n, np.int32), np.arange(n))


def release(
    close: Callable[..., Examples], *arguments: int, at_most: int = 1 << 16
) -> list[Examples]:
    """Call `advance` or `drain` until nothing is left; return all parts, the last one empty."""
    parts = [close(*arguments, at_most=at_most)]
    while len(parts[-1]):
        parts.append(close(*arguments, at_most=at_most))
    assert max(map(len, parts)) <= at_most
    return parts


def restarted(target: LabelJoiner, fresh: LabelJoiner) -> LabelJoiner:
    """Return `fresh` with the state of `target`."""
    segments = {name: (path, sha256) for name, (path, sha256, _) in target.segments().items()}
    fresh.load_state_dict(target.state_dict(), segments)
    return fresh


def run(
    log: Log,
    polls: Sequence[Poll],
    *,
    restart: bool = False,
    make: Callable[[], LabelJoiner] = joiner,
    at_most: int = 1 << 16,
) -> tuple[list[Examples], LabelJoiner, list[dict[str, int]]]:
    """Join a log; with `restart`, from a new joiner after each poll.

    Return the examples, the joiner, and its counters and pending impressions after each poll.
    """
    target = make()
    marks = Watermarks(partitions=len(log), lateness_ms=LATENESS)
    unread = np.array([len(events) for events in log])
    parts = []
    seen = []
    for poll in polls:
        push(target, marks, poll)
        for partition, _, _ in poll:
            unread[partition] -= 1
        parts += release(target.advance, marks.overall(excused=unread == 0), at_most=at_most)
        seen.append({**target.counts(), "pending": target.pending})
        if restart:
            target = restarted(target, make())
    parts += release(target.drain, at_most=at_most)
    return parts, target, seen


def rows_of(parts: Sequence[Examples]) -> list[tuple[int, int, int, int]]:
    """Return (time, record, id, label) of each example; the record is read from the features."""
    examples = Examples.concat(parts)
    record = examples.ids[:, 0] // 100
    found: list[Array] = [examples.ids, examples.values, examples.true_probability]
    for column, wanted in zip(found, features(record), strict=True):
        assert np.array_equal(column, wanted)
    columns = (examples.time, record, examples.id_hash, examples.label)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def without_spilling(counts: dict[str, int]) -> dict[str, int]:
    """Return the counters that do not depend on where features are kept."""
    return {name: count for name, count in counts.items() if name != "impressions_spilled"}


def settled(target: LabelJoiner, parts: Sequence[Examples]) -> dict[str, int]:
    """Return the counters of a drained joiner, after checking that each event has one fate."""
    counts = target.counts()
    label = Examples.concat(parts).label
    assert counts["impressions"] == len(label) + sum(
        counts[f"impressions_{fate}"] for fate in ("late", "duplicate", "evicted")
    )
    assert counts["clicks"] == sum(
        counts[f"clicks_{fate}"] for fate in ("joined", "duplicate", "late", "unmatched", "evicted")
    )
    assert counts["clicks_joined"] == int(label.sum())
    return counts


@st.composite
def logs(draw: st.DrawFn, kinds: Sequence[str] = ("impression", "click")) -> Log:
    event = st.builds(
        Event,
        st.sampled_from(kinds),
        st.integers(1, 12),
        st.integers(0, 600),
        label=st.integers(0, 1) if "example" in kinds else st.just(0),
    )
    partitions = draw(st.lists(st.lists(event, max_size=25), min_size=1, max_size=3))
    if not draw(st.booleans()):
        return partitions
    return [sorted(events, key=lambda e: e.time + e.id % 7 * 8) for events in partitions]


@st.composite
def logs_with_polls(
    draw: st.DrawFn, kinds: Sequence[str] = ("impression", "click")
) -> tuple[Log, list[Poll]]:
    """Draw a log, and one way to poll it: partitions interleaved, in polls of random sizes."""
    log = draw(logs(kinds))
    turns = draw(st.permutations([p for p, events in enumerate(log) for _ in events]))
    return log, _polls(log, turns, draw(st.integers(1, 9)))


def interleaved(log: Log, rng: np.random.Generator) -> list[Poll]:
    """Return a random way to poll a log."""
    turns = rng.permutation([p for p, events in enumerate(log) for _ in events]).tolist()
    return _polls(log, turns, int(rng.choice([1, 3, 9, 100])))


def _polls(log: Log, turns: Sequence[int], size: int) -> list[Poll]:
    """Return polls of `size` events; `turns` names the partition of each."""
    next_offset = [0] * len(log)
    arrivals = []
    for p in turns:
        arrivals.append((p, next_offset[p], log[p][next_offset[p]]))
        next_offset[p] += 1
    return [arrivals[start : start + size] for start in range(0, len(arrivals), size)]


class Stream:
    """Random events of one partition, out of order by less than its lateness.

    There is an impression a millisecond; a sixth are repeated. A fifth are clicked; some clicks
    are early, late or repeated.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._marks = Watermarks(partitions=1, lateness_ms=200)
        self._offset = 0
        self._seen = 0
        # Clicks that are due in a later poll: (ids, times).
        self._later = np.empty(0, np.uint64), np.empty(0, np.int64)

    def poll(self, target: LabelJoiner, n: int) -> int:
        """Push n impressions and some clicks; return the watermark after them."""
        rng = self._rng
        new = np.arange(self._seen, self._seen + n)
        self._seen += n
        repeated = rng.random(n) < 1 / 6
        ids = mix64(np.where(repeated, rng.integers(0, self._seen, n), new).astype(np.uint64))
        time = new - rng.integers(0, 150, n)
        impressions, limit = self._arrivals(ids, time)
        record = np.arange(self._offset - n, self._offset)
        target.push_impressions(impressions, *features(record), limit=limit)
        clicked = rng.integers(0, n, n // 5)
        delay = rng.integers(-2 * EARLY, 2500, n // 5)
        due = np.concatenate([time[clicked] + delay, self._later[1]])
        ids = np.concatenate([ids[clicked], self._later[0]])
        now = due <= self._seen
        self._later = ids[~now], due[~now]
        clicks, limit = self._arrivals(ids[now], due[now])
        target.push_clicks(clicks, limit=limit)
        return self._marks.overall(excused=np.array([False]))

    def _arrivals(self, ids: Array, time: Array) -> tuple[Arrivals, Array]:
        offset = np.arange(self._offset, self._offset + len(ids))
        self._offset += len(ids)
        partition = np.zeros(len(ids), np.int32)
        return Arrivals(ids, time, partition, offset), self._marks.observe(partition, time)
