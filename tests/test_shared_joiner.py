"""The join on several ranks against that of one process: the same examples, counters and state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.joins import (
    EARLY,
    FIELDS,
    LATENESS,
    WINDOW,
    Event,
    Log,
    Poll,
    capacity,
    features,
    interleaved,
    logs,
)
from support.thread_ranks import on_threads

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.events.batch import Arrivals, EventBatch, LabelledArrivals, Rejected
from stream_ctr.join.examples import Examples
from stream_ctr.join.join_state import COUNTERS
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.shared_joiner import SharedJoiner
from stream_ctr.join.watermark import Watermarks

State: TypeAlias = dict[str, Any]
KINDS = ("impression", "click", "example")
NOTHING = Rejected(np.empty(0, np.int32), np.empty(0, np.int64), [], [], [], [])
STALL_CLICKS = 3.0


def batch(poll: Poll) -> EventBatch | None:
    """Return the events of a poll, None without any."""
    if not poll:
        return None
    columns = Arrivals(
        np.array([event.id for _, _, event in poll], np.uint64),
        np.array([event.time for _, _, event in poll], np.int64),
        np.array([partition for partition, _, _ in poll], np.int32),
        np.array([offset for _, offset, _ in poll], np.int64),
    )
    kind = np.array([KINDS.index(event.kind) for _, _, event in poll])
    label = np.array([event.label for _, _, event in poll], np.uint8)
    record = columns.partition * 1000 + columns.place
    by_kind = np.argsort(kind, kind="stable")
    arrival = np.empty(len(poll), np.int64)
    arrival[by_kind] = np.arange(len(poll))
    ids, values, truth = features(record[kind == 0])
    return EventBatch(
        records=len(poll),
        impressions=columns[kind == 0],
        ids=ids,
        values=values,
        true_probability=truth,
        clicks=columns[kind == 1],
        arrival=arrival,
        rejected=NOTHING,
        with_fields=frozenset(),
        with_unknown_fields=0,
        bad_shares=None,
        examples=LabelledArrivals(
            columns[kind == 2], label[kind == 2], *features(record[kind == 2])
        ),
    )


def joiner(
    size: int = 1,
    rank: int = 0,
    directory: Path | None = None,
    *,
    duplicate_horizon_ms: int = 10_000,
) -> LabelJoiner:
    return LabelJoiner(
        fields=FIELDS,
        value_fields=1,
        id_bits=24,
        label_window_ms=WINDOW,
        early_click_wait_ms=EARLY,
        duplicate_horizon_ms=duplicate_horizon_ms,
        spill_directory=directory and directory / f"{rank}",
        segment_numbers=(rank, size),
    )


def shared(ranks: Ranks, partitions: int, target: LabelJoiner) -> SharedJoiner:
    return SharedJoiner(
        ranks,
        target,
        marks(partitions),
        partitions=range(partitions),
        columns=FIELDS,
        value_fields=1,
        id_bits=24,
    )


def marks(partitions: int) -> Watermarks:
    return Watermarks(partitions=partitions, lateness_ms=LATENESS, stall_clicks=STALL_CLICKS)


def dealt(poll: Poll, size: int) -> list[Poll]:
    """Return the part of a poll that each rank reads."""
    return [[each for each in poll if each[0] % size == rank] for rank in range(size)]


class Seen:
    """What a run has shown: the examples, and the state after each poll."""

    def __init__(self) -> None:
        self.parts: list[Examples] = []
        self.states: list[State] = []

    @property
    def examples(self) -> Examples:
        return Examples.concat(self.parts)


def excused(log: Log, polled: Sequence[Poll], *, seed: int | None = None) -> np.ndarray:
    """Return which partitions are read to their end; with a seed, some others are idle too."""
    read = [sum(p == each[0] for poll in polled for each in poll) for p in range(len(log))]
    ended = np.array([n == len(events) for n, events in zip(read, log, strict=True)])
    if seed is None:
        return ended
    idle: np.ndarray = np.random.default_rng([seed, len(polled)]).random(len(log)) < 1 / 3
    return ended | idle


def alone(
    log: Log,
    polls: Sequence[Poll],
    size: int,
    *,
    at_most: int = 1 << 16,
    horizon: int = 10_000,
    idle: int | None = None,
) -> Seen:
    """Join in one process, in polls whose events come in the order of `size` ranks."""
    seen = Seen()
    target = joiner(duplicate_horizon_ms=horizon)
    watermarks = marks(len(log))
    for at, poll in enumerate(polls):
        ordered = [each for part in dealt(poll, size) for each in part]
        if events := batch(ordered):
            target.push(events, watermarks)
        watermark = watermarks.overall(excused=excused(log, polls[: at + 1], seed=idle))
        while len(part := target.advance(watermark, at_most=at_most)):
            seen.parts.append(part)
        seen.states.append({**target.state_dict(), **watermarks.state_dict()})
    while True:
        seen.parts.append(target.drain(at_most=at_most))
        if not len(seen.parts[-1]):
            return seen


def together(
    log: Log,
    polls: Sequence[Poll],
    size: int,
    *,
    at_most: int = 1 << 16,
    horizon: int = 10_000,
    idle: int | None = None,
) -> Seen:
    """Join on ranks."""

    def work(ranks: Ranks) -> Seen:
        seen = Seen()
        own = joiner(size, ranks.rank, duplicate_horizon_ms=horizon)
        target = shared(ranks, len(log), own)
        for at, poll in enumerate(polls):
            present = None if at else range(len(log))
            target.push(batch(dealt(poll, size)[ranks.rank]), present=present)
            read = excused(log, polls[: at + 1], seed=idle)
            watermark = target.watermarks.overall(excused=read)
            seen.parts += _released(target, watermark, at_most)
            seen.states.append({**target.state_dict(), **target.watermarks.state_dict()})
        seen.parts += _released(target, None, at_most)
        return seen

    found: Seen = on_threads(size, work)[0]
    return found


def _released(target: SharedJoiner, watermark: int | None, at_most: int) -> list[Examples]:
    parts = []
    more = True
    while more:
        examples, more = target.release(watermark, at_most)
        # Only rank 0 knows the examples, and every rank whether there are more.
        assert len(examples) <= max(at_most, target._ranks.size)
        parts.append(examples)
    return parts


def assert_same_examples(found: Examples, wanted: Examples) -> None:
    for name, column in wanted.arrays().items():
        assert np.array_equal(found.arrays()[name], column), name


def assert_same_state(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, column in wanted.items():
        assert np.array_equal(found[name], column), name


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    logs(KINDS),
    st.integers(0, 1 << 32),
    st.integers(1, 3),
    st.sampled_from([3, 7, 1 << 16]),
    st.sampled_from([WINDOW + EARLY, 300, 10_000]),
)
def test_ranks_have_the_examples_counters_and_state_of_one_process_after_every_poll(
    log: Log, seed: int, size: int, at_most: int, horizon: int
) -> None:
    """Some partitions are excused as idle for a while, and come back behind the watermark."""
    polls = interleaved(log, np.random.default_rng(seed))
    assert_same_runs(log, polls, size, at_most=at_most, horizon=horizon, idle=seed)


def assert_same_runs(log: Log, polls: Sequence[Poll], size: int, **options: Any) -> Seen:
    wanted = alone(log, polls, size, **options)
    found = together(log, polls, size, **options)
    assert_same_examples(found.examples, wanted.examples)
    for after, before in zip(found.states, wanted.states, strict=True):
        assert_same_state(after, before)
    return found


def test_a_partition_of_another_rank_whose_clicks_are_overdue_stalls_all() -> None:
    """Its clicks stop for a while, and so do those of a partition that has nothing else."""
    shown = [Event("impression", n, 10 * n) for n in range(1, 400)]
    clicks = [Event("click", n, 10 * n + 5) for n in range(1, 400) if not 200 < n < 300]
    mixed = sorted([*shown[1::2], *clicks[1::2]], key=lambda event: event.time)
    log = [shown[0::2], mixed, clicks[0::2]]
    merged = sorted(
        ((p, at, event) for p, part in enumerate(log) for at, event in enumerate(part)),
        key=lambda each: each[2].time,
    )
    polls = [merged[start : start + 50] for start in range(0, len(merged), 50)]
    seen = assert_same_runs(log, polls, 2)
    assert seen.states[-1]["stalls"].tolist() == [1]
    assert max(state["all_since_click"][2] for state in seen.states) > 90


def _after_poll(
    ranks: Ranks, log: Log, poll: Poll, state: State, excused: np.ndarray
) -> tuple[State, list[Examples]]:
    """Go on from a state, and return the state and the examples after one poll."""
    target = shared(ranks, len(log), joiner(ranks.size, ranks.rank))
    if state:
        target.load_state_dict(state if ranks.rank == 0 else None)
        if ranks.rank == 0:
            target.watermarks.load_state_dict(state)
    target.push(batch(dealt(poll, ranks.size)[ranks.rank]), present=range(len(log)))
    # All ranks have the watermarks of all partitions.
    found = _released(target, target.watermarks.overall(excused=excused), 1 << 16)
    return {**target.state_dict(), **target.watermarks.state_dict()}, found


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(logs(KINDS), st.integers(0, 1 << 32), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_state_goes_on_with_another_number_of_ranks_after_every_poll(
    log: Log, seed: int, sizes: list[int]
) -> None:
    polls = interleaved(log, np.random.default_rng(seed))
    wanted = alone(log, polls, 1)
    state: State = {}
    parts: list[Examples] = []
    for at, poll in enumerate(polls):
        size = sizes[at % len(sizes)]
        read = excused(log, polls[: at + 1])
        state, found = on_threads(size, _after_poll, log, poll, state, read)[0]
        parts += found
    last = joiner()
    last.load_state_dict(state or last.state_dict())
    parts.append(last.drain())
    assert_same_examples(Examples.concat(parts), wanted.examples)


def test_what_is_spilled_is_shared_out_and_read_back_on_any_number_of_ranks(
    tmp_path: Path,
) -> None:
    """Segments keep their numbers, and the rows of one may then belong to several ranks."""
    events = [Event("impression", n, 1000 + n) for n in range(1, 61)]
    log = [events[0::2], events[1::2]]
    poll = [(p, offset, event) for p, part in enumerate(log) for offset, event in enumerate(part)]
    wanted = alone(log, [poll], 2).examples

    def run(ranks: Ranks, saved: Path, state: State, files: Any) -> Any:
        target = shared(ranks, 2, joiner(ranks.size, ranks.rank, saved))
        if state:
            target.load_state_dict(*((state, files) if ranks.rank == 0 else ()))
        else:
            target.push(batch(dealt(poll, 2)[ranks.rank]), present=range(2))
        kept = (target.state_dict(), _linked(target, saved / "kept"))
        return target.figures.pending, kept, target.waiting(), target

    def _linked(target: SharedJoiner, folder: Path) -> dict[str, tuple[Path, str]]:
        folder.mkdir(parents=True, exist_ok=True)
        linked = {}
        for name, (path, sha256, _) in target.segments().items():
            (folder / name).hardlink_to(path)
            linked[name] = (folder / name, sha256)
        return linked

    state: State = {}
    files: dict[str, tuple[Path, str]] = {}
    with capacity(segment_rows=4, features=8):
        for size in (2, 3, 1, 2):
            folder = tmp_path / f"{size}-{len(list(tmp_path.iterdir()))}"
            first = on_threads(size, run, folder, state, files)[0]
            pending, (state, files), oldest, _ = first
            assert (pending, oldest) == (60, (1001,))
            assert len(files) == len(state["segments.number"]) > 4
        last = joiner(directory=tmp_path / "last")
        last.load_state_dict(state, files)
        parts = [last.drain()]
        while len(parts[-1]):
            parts.append(last.drain())
    assert_same_examples(Examples.concat(parts), wanted)
    missing = {name: found for name, found in files.items() if name != min(files)}
    with pytest.raises(ValueError, match=f"segment {min(files)} is missing"):
        on_threads(2, run, tmp_path / "missing", state, missing)


def test_the_figures_of_rank_0_are_those_of_all_ranks() -> None:
    events = [Event("impression", n, 1000 + n) for n in range(1, 30)]
    events += [Event("click", 3, 1004), Event("click", 99, 1010)]
    events += [Event("example", 5, 1005 + WINDOW, label=1)]
    log = [events[0::2], events[1::2]]
    poll = [(p, offset, event) for p, part in enumerate(log) for offset, event in enumerate(part)]

    def work(ranks: Ranks) -> Any:
        target = shared(ranks, 2, joiner(2, ranks.rank))
        assert target.waiting().oldest_ms is None
        target.push(batch(dealt(poll, 2)[ranks.rank]), present=range(2))
        figures = target.figures
        oldest = target.waiting()
        target.release(1000 + WINDOW + 10, 1 << 16)
        return figures, oldest, target.figures, target.waiting(), target.joiner.nbytes

    (before, oldest, after, oldest_after, own), (*_, other) = on_threads(2, work)
    assert (before.pending, oldest) == (30, (1001,))
    assert (after.pending, oldest_after) == (20, (1010,))
    counts = dict(zip(COUNTERS, after.counters.tolist(), strict=True))
    assert (counts["impressions"], counts["clicks"], counts["clicks_joined"]) == (29, 2, 1)
    assert after.delays.sum() == 1
    assert after.nbytes == own + other
    assert 0 < after.filled < 1e-3
