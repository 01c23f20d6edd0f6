"""The join on several ranks against that of one process: the same examples, counters and state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.joins import (
    EARLY,
    FIELDS,
    LATENESS,
    WINDOW,
    Log,
    Poll,
    features,
    interleaved,
    logs,
)
from support.thread_ranks import on_threads

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.events.batch import Arrivals, EventBatch, LabelledArrivals, Rejected
from stream_ctr.join.examples import Examples
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


def joiner(size: int = 1, rank: int = 0, directory: Path | None = None) -> LabelJoiner:
    return LabelJoiner(
        fields=FIELDS,
        value_fields=1,
        id_bits=24,
        label_window_ms=WINDOW,
        early_click_wait_ms=EARLY,
        duplicate_horizon_ms=300,
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


def excused(log: Log, polled: Sequence[Poll]) -> np.ndarray:
    read = [sum(p == each[0] for poll in polled for each in poll) for p in range(len(log))]
    return np.array([n == len(events) for n, events in zip(read, log, strict=True)])


def alone(log: Log, polls: Sequence[Poll], size: int, *, at_most: int = 1 << 16) -> Seen:
    """Join in one process, in polls whose events come in the order of `size` ranks."""
    seen = Seen()
    target = joiner()
    watermarks = marks(len(log))
    for at, poll in enumerate(polls):
        ordered = [each for part in dealt(poll, size) for each in part]
        if events := batch(ordered):
            target.push(events, watermarks)
        watermark = watermarks.overall(excused=excused(log, polls[: at + 1]))
        while len(part := target.advance(watermark, at_most=at_most)):
            seen.parts.append(part)
        seen.states.append({**target.state_dict(), **watermarks.state_dict()})
    while True:
        seen.parts.append(target.drain(at_most=at_most))
        if not len(seen.parts[-1]):
            return seen


def together(
    log: Log, polls: Sequence[Poll], size: int, *, at_most: int = 1 << 16, restart: bool = False
) -> Seen:
    """Join on ranks; with `restart`, from new joiners after each poll."""

    def work(ranks: Ranks) -> Seen:
        seen = Seen()
        target = shared(ranks, len(log), joiner(size, ranks.rank))
        for at, poll in enumerate(polls):
            present = range(len(log)) if restart or not at else None
            target.push(batch(dealt(poll, size)[ranks.rank]), present=present)
            watermark = target.watermarks.overall(excused=excused(log, polls[: at + 1]))
            seen.parts += _released(target, watermark, at_most)
            state = target.state_dict()
            seen.states.append({**state, **target.watermarks.state_dict()})
            if restart:
                target = shared(ranks, len(log), joiner(size, ranks.rank))
                target.load_state_dict(state if ranks.rank == 0 else None)
                if ranks.rank == 0:
                    target.watermarks.load_state_dict(seen.states[-1])
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


@settings(max_examples=60, deadline=None)
@given(logs(KINDS), st.integers(0, 1 << 32), st.integers(1, 3), st.sampled_from([3, 7, 1 << 16]))
def test_ranks_have_the_examples_counters_and_state_of_one_process_after_every_poll(
    log: Log, seed: int, size: int, at_most: int
) -> None:
    polls = interleaved(log, np.random.default_rng(seed))
    wanted = alone(log, polls, size, at_most=at_most)
    found = together(log, polls, size, at_most=at_most)
    assert_same_examples(found.examples, wanted.examples)
    for after, before in zip(found.states, wanted.states, strict=True):
        assert_same_state(after, before)
