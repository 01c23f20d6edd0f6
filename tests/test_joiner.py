"""The joiner against a brute-force reading of its definition, whatever the order in which partitions are polled; and within its bound."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_ctr.events.features import mix64
from stream_ctr.join import spill
from stream_ctr.join.join_state import Index
from stream_ctr.join.joiner import Arrivals, Examples, LabelJoiner, Ledger, Shares
from stream_ctr.join.watermark import NOT_YET, Watermarks

WINDOW, EARLY, LATENESS = 100, 20, 30
FIELDS = 39


@dataclass(frozen=True)
class Event:
    kind: str
    id: int
    time: int


Log = Sequence[Sequence[Event]]  # by partition, in offset order


def limits(partition: Sequence[Event]) -> list[int]:
    return [max(e.time for e in partition[: at + 1]) - LATENESS for at in range(len(partition))]


def expected(log: Log) -> list[tuple[int, int, int, int, int]]:
    """(time, partition, offset, id, label) by the definition alone."""
    rows = [
        (e, p, o, limit)
        for p, events in enumerate(log)
        for o, (e, limit) in enumerate(zip(events, limits(events), strict=True))
    ]
    impressions: dict[int, tuple[int, int, int]] = {}
    for e, p, o, limit in rows:
        if e.kind == "impression" and limit <= e.time + WINDOW:
            impressions[e.id] = min(impressions.get(e.id, (1 << 60, 0, 0)), (e.time, p, o))
    examples = []
    for name, (t, p, o) in impressions.items():
        label = any(
            e.kind == "click"
            and e.id == name
            and t - EARLY <= e.time <= t + WINDOW
            and limit <= t + WINDOW
            for e, _, _, limit in rows
        )
        examples.append((t, p, o, name, int(label)))
    return sorted(examples)


def joiner(directory: Path | None = None) -> LabelJoiner:
    return LabelJoiner(
        fields=FIELDS,
        value_fields=1,
        id_bits=24,
        label_window_ms=WINDOW,
        early_click_wait_ms=EARLY,
        duplicate_horizon_ms=10_000,
        spill_directory=directory,
    )


def features(record: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`ids`, `values` and `true_probability` that tell which record they are of."""
    ids = (record[:, None] * 100 + np.arange(FIELDS)).astype(np.int32)
    return ids, (record[:, None] / 2).astype(np.float32), record / 1e6


def push(target: LabelJoiner, marks: Watermarks, chunk: Sequence[tuple[int, int, Event]]) -> None:
    """A poll: (partition, offset, event) in order of arrival."""
    partition = np.array([p for p, _, _ in chunk], np.int32)
    offset = np.array([o for _, o, _ in chunk], np.int64)
    time = np.array([e.time for _, _, e in chunk], np.int64)
    limit = marks.observe(partition, time)
    ids = np.array([e.id for _, _, e in chunk], np.uint64)
    impression = np.array([e.kind == "impression" for _, _, e in chunk])

    def some(rows: np.ndarray) -> Arrivals:
        return Arrivals(ids[rows], time[rows], partition[rows], offset[rows], limit[rows])

    target.push_impressions(some(impression), *features((partition * 1000 + offset)[impression]))
    target.push_clicks(some(~impression))


def leave(
    close: Callable[..., Examples], *arguments: int, at_most: int = 1 << 16
) -> list[Examples]:
    """All parts of what leaves, the empty one that ends them included."""
    parts = [close(*arguments, at_most=at_most)]
    while len(parts[-1]):
        parts.append(close(*arguments, at_most=at_most))
    assert max(map(len, parts)) <= at_most
    return parts


def restarted(target: LabelJoiner, fresh: LabelJoiner) -> LabelJoiner:
    """`fresh` with the state of `target`, which goes to disk and is gone."""
    fresh.load_state_dict(
        target.state_dict(),
        {name: (path, sha256) for name, (path, sha256, _) in target.segments().items()},
    )
    return fresh


def run(
    log: Log,
    polls: Iterator[list[tuple[int, int, Event]]],
    *,
    restart: bool = False,
    make: Callable[[], LabelJoiner] = joiner,
    at_most: int = 1 << 16,
) -> tuple[list[Examples], LabelJoiner, list[dict[str, int]]]:
    """What left, the joiner after it, and its counters and pending impressions after each poll."""
    target, marks = make(), Watermarks(partitions=len(log), lateness_ms=LATENESS)
    left = np.array([len(events) for events in log])
    out, seen = [], []
    for chunk in polls:
        push(target, marks, chunk)
        for p, _, _ in chunk:
            left[p] -= 1
        out += leave(target.advance, marks.overall(excused=left == 0), at_most=at_most)
        seen.append({**target.counts(), "pending": target.pending})
        if restart:
            target = restarted(target, make())
    out += leave(target.drain, at_most=at_most)
    return out, target, seen


def rows_of(parts: Sequence[Examples]) -> list[tuple[int, int, int, int]]:
    """(time, record, id, label), the record as the features tell it."""
    whole = Examples.concat(parts)
    record = whole.ids[:, 0] // 100
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            features(record), (whole.ids, whole.values, whole.true_probability), strict=True
        )
    )
    return list(
        zip(
            whole.time.tolist(),
            record.tolist(),
            whole.id_hash.tolist(),
            whole.label.tolist(),
            strict=True,
        )
    )


@st.composite
def logs(draw: st.DrawFn) -> Log:
    event = st.builds(
        Event, st.sampled_from(["impression", "click"]), st.integers(1, 12), st.integers(0, 600)
    )
    partitions = draw(st.lists(st.lists(event, max_size=25), min_size=1, max_size=3))
    ordered = draw(st.booleans())
    return [
        sorted(events, key=lambda e: e.time + e.id % 7 * 8) if ordered else events
        for events in partitions
    ]


@st.composite
def logs_with_polls(draw: st.DrawFn) -> tuple[Log, list[list[tuple[int, int, Event]]]]:
    """A log and one way to poll it: partitions interleaved at random, in chunks of random sizes."""
    log = draw(logs())
    turns = draw(st.permutations([p for p, events in enumerate(log) for _ in events]))
    at = [0] * len(log)
    arrivals = []
    for p in turns:
        arrivals.append((p, at[p], log[p][at[p]]))
        at[p] += 1
    size = draw(st.integers(1, 9))
    return log, [arrivals[start : start + size] for start in range(0, len(arrivals), size)]


@pytest.mark.fault(
    13,
    injected="every disorder, interleaving and repetition that hypothesis finds, against a reading of the definition",
)
@settings(max_examples=400, deadline=None)
@given(logs_with_polls())
def test_examples_are_what_the_definition_says_for_every_interleaving_of_polls(case):
    log, polls = case
    parts, target, _ = run(log, iter(polls))
    assert rows_of(parts) == [
        (t, p * 1000 + o, name, label) for t, p, o, name, label in expected(log)
    ]
    counts = target.counts()
    assert counts["clicks"] == sum(e.kind == "click" for events in log for e in events)
    assert counts["clicks"] == sum(
        counts[f"clicks_{fate}"] for fate in ("joined", "duplicate", "late", "unmatched")
    )
    assert counts["impressions"] == sum(
        counts[f"impressions_{fate}"] for fate in ("late", "duplicate")
    ) + len(rows_of(parts))
    assert counts["clicks_joined"] == sum(label for *_, label in rows_of(parts))


@settings(max_examples=150, deadline=None)
@given(logs_with_polls())
def test_a_restart_from_the_state_after_any_poll_changes_nothing(case):
    log, polls = case
    straight, a, _ = run(log, iter(polls))
    resumed, b, _ = run(log, iter(polls), restart=True)
    assert rows_of(straight) == rows_of(resumed)
    assert a.counts() == b.counts()
    assert np.array_equal(a.delays, b.delays)


@pytest.mark.fault(14, injected="a click at each end of the window, and 1 ms within and beyond it")
@pytest.mark.parametrize(
    ("delay", "label", "late"),
    [
        (-EARLY - 1, 0, 0),
        (-EARLY, 1, 0),
        (0, 1, 0),
        (WINDOW - 1, 1, 0),
        (WINDOW, 1, 0),
        (WINDOW + 1, 0, 1),
    ],
)
def test_both_ends_of_the_window_belong_to_it(delay, label, late, outcome):
    target = LabelJoiner(fields=1, label_window_ms=WINDOW, early_click_wait_ms=EARLY)
    never_late = np.array([NOT_YET])
    time = np.array([1000])
    one = np.array([7], np.uint64)
    target.push_impressions(
        Arrivals(one, time, np.zeros(1, np.int32), np.zeros(1, np.int64), never_late),
        np.zeros((1, 1), np.int32),
    )
    target.push_clicks(
        Arrivals(one, time + delay, np.zeros(1, np.int32), np.ones(1, np.int64), never_late)
    )
    assert (
        target.advance(1000 + WINDOW).label.tolist() == []
    )  # a click at the very end may still come
    assert target.advance(1000 + WINDOW + 1).label.tolist() == [label]
    assert target.counts()["clicks_late"] == late
    outcome("both ends belong to the window; beyond it the click is counted as late")


def test_click_before_its_impression_still_counts():
    target = LabelJoiner(fields=1, label_window_ms=WINDOW, early_click_wait_ms=EARLY)
    target.push_clicks(Arrivals.of([7], [990]))
    target.push_impressions(Arrivals.of([7], [1000]), np.zeros((1, 1), np.int32))
    assert target.drain().label.tolist() == [1]
    assert target.counts()["clicks_early"] == 1


def test_of_several_waiting_clicks_the_earliest_is_the_one_that_joins_whatever_order_a_restart_put_them_in():
    target = joiner()
    target.push_clicks(Arrivals.of([7, 7], [990, 1005]))
    for one in (restarted(target, joiner()), target):
        one.push_impressions(Arrivals.of([7], [1000]), *features(np.zeros(1, np.int64)))
        counts = one.counts()
        assert (counts["clicks_joined"], counts["clicks_early"], counts["clicks_duplicate"]) == (
            1,
            1,
            1,
        )


def test_a_second_click_and_a_second_impression_are_dropped_and_counted():
    target = LabelJoiner(fields=1, label_window_ms=WINDOW)
    target.push_impressions(Arrivals.of([7, 7], [0, 5]), np.array([[1], [2]], np.int32))
    target.push_clicks(Arrivals.of([7, 7], [6, 8]))
    examples = target.drain()
    assert (examples.label.tolist(), examples.ids.tolist()) == ([1], [[1]])
    counts = target.counts()
    assert (
        counts["impressions_duplicate"],
        counts["clicks_duplicate"],
        counts["clicks_joined"],
    ) == (1, 1, 1)


def test_an_impression_repeated_after_it_left_is_not_trained_twice():
    target = LabelJoiner(fields=1, label_window_ms=WINDOW)
    target.push_impressions(Arrivals.of([7], [0]), np.zeros((1, 1), np.int32))
    assert len(target.advance(WINDOW + 1)) == 1
    again = Arrivals(
        np.array([7], np.uint64),
        np.array([200]),
        np.zeros(1, np.int32),
        np.array([9]),
        np.array([200]),
    )
    target.push_impressions(again, np.zeros((1, 1), np.int32))
    assert len(target.drain()) == 0
    assert target.counts()["impressions_duplicate"] == 1


def test_an_id_comes_free_after_the_duplicate_horizon_and_its_memory_too():
    target = LabelJoiner(fields=1, label_window_ms=10, duplicate_horizon_ms=1000)
    for start in range(0, 200_000, 1000):
        ids = np.arange(start, start + 1000)
        target.push_impressions(
            Arrivals.of(ids.tolist(), ids.tolist()), np.zeros((1000, 1), np.int32)
        )
        target.advance(start + 1000)
    assert target.nbytes < 1_000_000
    reused = Arrivals.of([5], [200_001])
    target.push_impressions(reused, np.zeros((1, 1), np.int32))
    assert target.counts()["impressions_duplicate"] == 0


def test_the_window_curve_says_what_each_window_would_lose():
    target = LabelJoiner(fields=1, label_window_ms=20_000, duplicate_horizon_ms=10**7)
    n = 100
    target.push_impressions(Arrivals.of(list(range(1, n + 1)), [0] * n), np.zeros((n, 1), np.int32))
    delays = np.arange(1, n + 1) * 300  # 0.3 s to 30 s: those over 20 s are late
    clicks = Arrivals(
        np.arange(1, n + 1).astype(np.uint64),
        delays,
        np.zeros(n, np.int32),
        np.arange(n),
        np.zeros(n, np.int64),
    )
    target.push_clicks(clicks)
    curve = {point["window_seconds"]: point["lost_share"] for point in target.window_curve()}
    for window in (1, 2, 5, 10, 20, 30):
        assert curve[window] == pytest.approx((delays > window * 1000).mean())
    assert target.click_coverage == pytest.approx((delays <= 20_000).mean())


def test_a_pending_impression_of_39_fields_costs_about_200_bytes():
    target = LabelJoiner(fields=39, label_window_ms=10**9, duplicate_horizon_ms=10**9)
    n = 100_000
    target.push_impressions(
        Arrivals.of(list(range(1, n + 1)), list(range(n))), np.zeros((n, 39), np.int32)
    )
    rows = sum(
        array[:1].nbytes for part in (target._pending, target._features) for array in part.arrays()
    )
    assert rows <= 210
    assert target.pending == n
    assert target.nbytes / n < 300  # with the index and room to grow


def test_a_watermark_never_goes_back():
    target = joiner()
    target.advance(500)
    target.advance(100)
    assert target.watermark == 500


def test_the_ledger_is_free_of_order_and_tells_labels_apart():
    ids = np.arange(100, dtype=np.uint64)
    label = (ids % 3 == 0).astype(np.uint8)
    order = np.random.default_rng(0).permutation(100)
    parts = Ledger()
    for some in np.array_split(order, 7):
        parts = parts.add(ids[some], label[some])
    assert parts == Ledger().add(ids, label)
    assert parts.sum != Ledger().add(ids, 1 - label).sum
    assert parts.count == 100


def test_idle_partitions_do_not_hold_the_watermark_but_silent_ones_do():
    marks = Watermarks(partitions=3, lateness_ms=10)
    marks.observe(np.array([0, 1]), np.array([100, 500]))
    nobody = np.zeros(3, np.bool_)
    assert marks.overall(excused=nobody) <= NOT_YET
    assert marks.overall(excused=np.array([False, False, True])) == 90
    assert marks.overall(excused=np.array([True, False, True])) == 490
    assert marks.ahead(90, 300) == frozenset({1})


def test_a_click_waits_for_an_impression_that_is_out_of_order_but_not_late():
    target, marks = joiner(), Watermarks(partitions=1, lateness_ms=LATENESS)
    push(
        target,
        marks,
        [(0, 0, Event("click", 7, 1000)), (0, 1, Event("click", 8, 1000 + LATENESS + EARLY + 20))],
    )
    target.advance(
        marks.overall(excused=np.array([False]))
    )  # past click 7 and its early wait, not past the window of an impression at 990
    push(target, marks, [(0, 2, Event("impression", 7, 990))])
    assert target.drain().label.tolist() == [1]


# -- the bound -----------------------------------------------------------------------------------


@contextmanager
def room_for(segment_rows: int = 1 << 16, **shares: int) -> Iterator[None]:
    """Joiners made here have room for so many rows, whatever the bound in bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Shares,
            "of",
            classmethod(
                lambda cls, *_, **__: Shares(
                    **{"index": 256, "pending": 128, "clicks": 100, **shares}
                )
            ),
        )
        patch.setattr(spill, "SEGMENT_ROWS", segment_rows)
        yield


def without_spilling(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name != "impressions_spilled"}


@settings(max_examples=250, deadline=None)
@given(logs_with_polls(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans())
@pytest.mark.slow
def test_spilling_changes_no_example_no_label_no_order_and_no_counter_at_any_moment(
    case, in_memory, segment_rows, at_most, restart
):
    log, polls = case
    parts, free, seen = run(log, iter(polls))
    with tempfile.TemporaryDirectory() as root, room_for(segment_rows, features=in_memory):
        spilled_parts, bound, spilled_seen = run(
            log,
            iter(polls),
            restart=restart,
            make=lambda: joiner(Path(tempfile.mkdtemp(dir=root))),
            at_most=at_most,
        )
        assert rows_of(spilled_parts) == rows_of(parts)
        assert list(map(without_spilling, spilled_seen)) == list(map(without_spilling, seen))
        assert np.array_equal(bound.delays, free.delays)
        assert bound.segments() == {}
        assert (bound.counts()["impressions_spilled"] > 0) >= (
            max((poll["pending"] for poll in seen), default=0) > in_memory
        )


class Stream:
    """Random impressions, a millisecond apart, of which a sixth are repeated; a fifth are clicked, some clicks early, late or twice. One
    partition, out of order by less than its lateness."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._marks = Watermarks(partitions=1, lateness_ms=200)
        self._offset = self._seen = 0
        self._later = np.empty(0, np.uint64), np.empty(0, np.int64)

    def poll(self, target: LabelJoiner, n: int) -> int:
        """Push n impressions and some clicks; the watermark after them."""
        rng, new = self._rng, np.arange(self._seen, self._seen + n)
        self._seen += n
        ids = mix64(
            np.where(rng.random(n) < 1 / 6, rng.integers(0, self._seen, n), new).astype(np.uint64)
        )
        time = new - rng.integers(0, 150, n)
        target.push_impressions(
            self._arrivals(ids, time), *features(np.arange(self._offset - n, self._offset))
        )
        clicked = rng.integers(0, n, n // 5)
        due = np.concatenate(
            [time[clicked] + rng.integers(-2 * EARLY, 2500, n // 5), self._later[1]]
        )
        ids = np.concatenate([ids[clicked], self._later[0]])
        now = due <= self._seen
        self._later = ids[~now], due[~now]
        target.push_clicks(self._arrivals(ids[now], due[now]))
        return self._marks.overall(excused=np.array([False]))

    def _arrivals(self, ids: np.ndarray, time: np.ndarray) -> Arrivals:
        self._offset += len(ids)
        offset = np.arange(self._offset - len(ids), self._offset)
        partition = np.zeros(len(ids), np.int32)
        return Arrivals(ids, time, partition, offset, self._marks.observe(partition, time))


@pytest.mark.parametrize("id_bits", [1, 24, 25, 31])
def test_ids_come_out_as_they_went_in(id_bits):
    target = LabelJoiner(fields=3, label_window_ms=1, id_bits=id_bits)
    most = (1 << id_bits) - 1
    ids = np.array([[0, 1, most], [most, most // 3, most // 2]], np.int32)
    time = np.array([1, 2])
    target.push_impressions(
        Arrivals(time.astype(np.uint64), time, np.zeros(2, np.int32), time, time), ids
    )
    assert np.array_equal(target.drain().ids, ids)


def bounded(max_bytes: int, directory: Path | None = None, **options: Any) -> LabelJoiner:
    window = {"label_window_ms": 2000, "early_click_wait_ms": EARLY, "duplicate_horizon_ms": 10_000}
    return LabelJoiner(
        fields=FIELDS,
        value_fields=1,
        **{**window, "max_bytes": max_bytes, "spill_directory": directory, **options},
    )


def settled(target: LabelJoiner, parts: Sequence[Examples]) -> dict[str, int]:
    """The counters of a joiner that was drained, after every impression and every click was found to have one fate."""
    counts, label = target.counts(), Examples.concat(parts).label
    assert counts["impressions"] == len(label) + sum(
        counts[f"impressions_{fate}"] for fate in ("late", "duplicate", "evicted")
    )
    assert counts["clicks"] == sum(
        counts[f"clicks_{fate}"] for fate in ("joined", "duplicate", "late", "unmatched", "evicted")
    )
    assert counts["clicks_joined"] == int(label.sum())
    return counts


def impressions(target: LabelJoiner, ids: np.ndarray, time: np.ndarray | int) -> None:
    """One of each id, by a partition that is never late."""
    n = len(ids)
    at = np.broadcast_to(time, n).astype(np.int64)
    arrivals = Arrivals(
        ids.astype(np.uint64), at, np.zeros(n, np.int32), np.arange(n), np.full(n, NOT_YET)
    )
    target.push_impressions(arrivals, *features(np.arange(n)))


def clicks(target: LabelJoiner, ids: np.ndarray, time: np.ndarray | int) -> None:
    n = len(ids)
    at = np.broadcast_to(time, n).astype(np.int64)
    target.push_clicks(
        Arrivals(
            ids.astype(np.uint64), at, np.zeros(n, np.int32), np.arange(n), np.full(n, NOT_YET)
        )
    )


def test_a_joiner_of_one_megabyte_spills_and_gives_what_one_without_a_bound_gives(tmp_path):
    results = []
    for name, shares in (("free", {"features": 10**6}), ("bound", {"features": 700})):
        with room_for(index=1 << 16, pending=1 << 15, clicks=10_000, segment_rows=500, **shares):
            target, stream, parts = bounded(1 << 20, tmp_path / name), Stream(seed=5), []
            for step in range(40):
                parts += leave(target.advance, stream.poll(target, 500), at_most=333)
                if step % 10 == 9:
                    target = restarted(target, bounded(1 << 20, tmp_path / f"{name}{step}"))
            parts += leave(target.drain)
            results.append((rows_of(parts), settled(target, parts)))
    (free, free_counts), (bound, bound_counts) = results
    assert bound == free
    assert bound_counts["impressions_spilled"] > 5000
    assert without_spilling(bound_counts) == without_spilling(free_counts)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    polls=st.lists(st.sampled_from([0, 1, 100, 2000, 6000]), min_size=6, max_size=12),
    max_bytes=st.integers(1 << 20, 3 << 20),
    over_bound=st.sampled_from(["spill", "evict"]),
    window=st.sampled_from([500, 2000, 100_000]),
    horizon=st.sampled_from([0, 100_000]),
    restart=st.booleans(),
)
@pytest.mark.slow
def test_the_bound_holds_after_every_call_and_every_event_is_accounted_for(
    seed, polls, max_bytes, over_bound, window, horizon, restart
):
    with tempfile.TemporaryDirectory() as root:

        def make() -> LabelJoiner:
            directory = Path(tempfile.mkdtemp(dir=root))
            return bounded(
                max_bytes,
                directory,
                over_bound=over_bound,
                label_window_ms=window,
                duplicate_horizon_ms=horizon,
            )

        target, stream, parts = make(), Stream(seed), []
        for n in polls:
            watermark = stream.poll(target, n)
            assert target.nbytes <= max_bytes
            parts += leave(target.advance, watermark, at_most=2000)
            assert target.nbytes <= max_bytes
            if restart:
                target = restarted(target, make())
                assert target.nbytes <= max_bytes
        parts += leave(target.drain)
        counts = settled(target, parts)
        assert target.segments() == {}
        assert counts["impressions_spilled"] == 0 or over_bound == "spill"
        rows = rows_of(parts)
        assert rows == sorted(rows, key=lambda row: row[0])


def test_a_jump_of_the_watermark_lets_examples_go_a_part_at_a_time_and_in_order():
    target, n = bounded(1 << 28, label_window_ms=1000), 200_000
    time = np.random.default_rng(0).permutation(n)
    impressions(target, np.arange(n), time)
    parts = leave(target.advance, n + 2000, at_most=3000)
    assert np.array_equal(Examples.concat(parts).time, np.arange(n))
    assert sorted(map(len, parts))[3] > 1000  # and not in crumbs


def test_a_click_between_two_parts_of_a_jump_is_late():
    target = joiner()
    impressions(target, np.array([7, 8]), 0)
    assert len(target.advance(WINDOW + 1, at_most=1)) == 1
    target.push_clicks(Arrivals.of([8], [WINDOW + 1]))
    assert target.advance(WINDOW + 1, at_most=1).label.tolist() == [0]
    assert target.counts()["clicks_late"] == 1


@pytest.mark.parametrize("over_bound", ["spill", "evict"])
def test_who_is_given_up_depends_on_neither_label_nor_time_nor_what_the_baseline_sees(
    over_bound, tmp_path
):
    """Clicks first: a choice that knew of them could prefer either label."""
    n = 30_000
    target = bounded(1 << 20, tmp_path, over_bound=over_bound, label_window_ms=10 * n)
    ids = mix64(np.arange(n, dtype=np.uint64))
    for some in np.array_split(np.arange(n), 30):
        impressions(target, ids[some], some)
        clicks(target, ids[some[some % 4 == 0]], some[some % 4 == 0] + 1)
    parts = leave(target.drain)
    counts, kept = settled(target, parts), Examples.concat(parts)
    assert counts["impressions_evicted"] == n - len(kept) > n / 4
    assert np.array_equal(kept.label, kept.time % 4 == 0)
    assert counts["clicks_evicted"] == n / 4 - kept.label.sum()
    three_sigma = 1.5 / np.sqrt(len(kept))
    assert abs(kept.label.mean() - 1 / 4) < three_sigma
    assert abs((mix64(kept.id_hash) < 1 << 63).mean() - 1 / 2) < three_sigma
    assert kept.time[0] < n / 10
    assert kept.time[-1] > n * 9 / 10


def test_a_click_of_an_impression_that_was_given_up_is_no_late_click_after_a_restart_either(
    tmp_path,
):
    with room_for(features=10, pending=16):
        target = bounded(1 << 20, over_bound="evict")
        impressions(target, np.arange(30), 0)
        fresh = restarted(target, bounded(1 << 20, over_bound="evict"))
    for one in (target, fresh):
        evicted = one.counts()["impressions_evicted"]
        assert evicted == 30 - one.pending > 0
        clicks(one, np.arange(30), 5)
        assert (
            one.counts()["clicks_evicted"],
            one.counts()["clicks_joined"],
            one.counts()["clicks_late"],
        ) == (evicted, 30 - evicted, 0)
        impressions(one, np.arange(30), 6)
        assert one.counts()["impressions_duplicate"] == 30


def test_the_registry_forgets_the_oldest_ids_first_and_counts_them():
    with room_for(features=100, index=256):  # room for 170 ids
        target = bounded(
            1 << 20, label_window_ms=10, early_click_wait_ms=0, duplicate_horizon_ms=10**6
        )
        for start in range(0, 400, 20):
            impressions(target, np.arange(start, start + 20), np.arange(start, start + 20))
            target.advance(start + 31)
    forgotten = target.counts()["ids_forgotten_early"]
    assert 400 - 170 <= forgotten <= 400 - 140
    impressions(target, np.arange(forgotten, 400), 420)
    assert target.counts()["impressions_duplicate"] == 400 - forgotten
    impressions(target, np.arange(forgotten - 20, forgotten), 420)
    assert target.counts()["impressions_duplicate"] == 400 - forgotten


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 300), min_size=1, max_size=60), st.integers(0, 100)),
        max_size=8,
    ),
    st.integers(0, 9),
    st.integers(0, 100),
)
@pytest.mark.slow
def test_the_index_finds_every_id_however_it_grew_and_was_purged(steps, near_the_end, before):
    """Ids that all want the last places of the table, so that they run past its end, against a dictionary."""
    index, truth = Index(1 << 16), {}
    index._clear(8)
    for ids, time in steps:
        keys = {key * 1024 + 1023 - key % (near_the_end + 1) for key in ids} - truth.keys()
        truth |= dict.fromkeys(keys, time)
        index.fill(
            np.array(sorted(keys), np.uint64),
            np.full(len(keys), time),
            np.full(len(keys), -2, np.int32),
        )
    index._purge(before)
    truth = {key: time for key, time in truth.items() if time >= before}
    left = index.left(0)
    assert dict(zip(left["key"].tolist(), left["time"].tolist(), strict=True)) == truth
    assert index.entries == len(truth)
    index.fill(
        np.array(sorted(truth), np.uint64), np.full(len(truth), 7), np.zeros(len(truth), np.int32)
    )
    assert index.entries == len(truth)  # each was found, none stands there twice


def test_of_too_many_waiting_clicks_the_oldest_go():
    with room_for(features=100, clicks=40):
        target = bounded(1 << 20)
        clicks(target, np.arange(100), np.arange(100))
        impressions(target, np.arange(100), np.arange(100))
    gone = target.counts()["clicks_evicted"]
    assert 60 <= gone < 80
    assert target.drain().label.tolist() == [0] * gone + [1] * (100 - gone)


def test_the_bound_holds_when_everything_is_full_and_clicks_wait_as_well(tmp_path):
    bound = 1 << 20
    target = bounded(bound, tmp_path, label_window_ms=10**9)
    for start in range(0, 20_000, 100):
        impressions(target, np.arange(start, start + 100), start)
        clicks(target, np.arange(start, start + 100) + 10**6, start)
        assert target.nbytes <= bound
    assert target.nbytes > 0.97 * bound
    assert len(target._clicks.key) <= target._shares.clicks


def test_an_earlier_impression_takes_the_place_of_one_on_disk(tmp_path):
    with room_for(features=1):
        target = joiner(tmp_path)
        impressions(target, np.array([1, 2, 3]), np.array([10, 20, 30]))
        clicks(target, np.array([2]), 25)
        assert target.spilled == 2
        earlier = Arrivals(
            np.array([3], np.uint64),
            np.array([5]),
            np.zeros(1, np.int32),
            np.array([9]),
            np.array([NOT_YET]),
        )
        target.push_impressions(earlier, *features(np.array([77])))
        parts = leave(target.drain)
    assert rows_of(parts) == [(5, 77, 3, 0), (10, 0, 1, 0), (20, 1, 2, 1)]
    assert target.counts()["impressions_duplicate"] == 1


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """What a disk quota does: a write past it fails half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_gives_up_impressions_and_nothing_else_and_spilling_goes_on_when_there_is_room(
    tmp_path, caplog
):
    target = bounded(1 << 20, tmp_path, label_window_ms=10**6)
    with no_file_longer_than(4096):
        for start in range(0, 40_000, 1000):
            impressions(target, np.arange(start, start + 1000), np.arange(start, start + 1000))
        assert list(tmp_path.glob("*/*")) == []
    counts = target.counts()
    assert counts["impressions_spilled"] == 0
    assert counts["impressions_evicted"] == 40_000 - target.pending > 0
    assert sum("cannot be put on disk" in record.message for record in caplog.records) == 1
    impressions(target, np.arange(40_000, 60_000), np.arange(40_000, 60_000))
    assert target.counts()["impressions_spilled"] > 0
    settled(target, leave(target.drain))


@pytest.mark.slow
def test_the_disk_does_not_fill_with_those_that_were_given_up(tmp_path):
    target, most = bounded(1 << 20, tmp_path, label_window_ms=10**9), 0
    for start in range(0, 100_000, 1000):
        impressions(target, np.arange(start, start + 1000), np.arange(start, start + 1000))
        most = max(most, sum(size for _, _, size in target.segments().values()))
    assert target.counts()["impressions_evicted"] > 80_000
    assert most < 3 << 20  # twice the 8192 that can be pending, and what has just been spilled
    assert {path.name for path in tmp_path.glob("*/*")} == set(target.segments())


def test_state_saved_under_a_wide_bound_loads_under_a_narrow_one(tmp_path):
    wide = bounded(1 << 28, tmp_path / "wide", label_window_ms=10**6)
    impressions(wide, np.arange(50_000), np.arange(50_000))
    left = leave(wide.advance, 10**6 + 20_000)
    clicks(wide, np.arange(100_000, 110_000), np.arange(10_000) + 50_000)
    for over_bound in ("spill", "evict"):
        narrow = restarted(
            wide,
            bounded(1 << 20, tmp_path / over_bound, label_window_ms=10**6, over_bound=over_bound),
        )
        assert narrow.nbytes <= 1 << 20
        assert narrow.pending + narrow.counts()["impressions_evicted"] == wide.pending
        assert (narrow.spilled > 0) == (over_bound == "spill")
        assert narrow.counts()["ids_forgotten_early"] > 0
        assert narrow.counts()["clicks_evicted"] > 0
        settled(narrow, left + leave(narrow.drain))


@pytest.mark.parametrize(("over_bound", "bytes_each"), [("spill", 175), ("evict", 500)])
def test_the_room_there_is_is_used(over_bound, bytes_each, tmp_path):
    """Without a disk an impression of 40 columns is 220 bytes, and up to 60 in the index; with one most are 110."""
    bound = 1 << 20
    target = bounded(bound, tmp_path, over_bound=over_bound, label_window_ms=10**9)
    impressions(target, mix64(np.arange(50_000, dtype=np.uint64)), 0)
    assert target.pending > bound / bytes_each


def test_a_bound_too_small_to_work_in_is_refused():
    with pytest.raises(ValueError, match="at least 1 MiB are needed for 40 columns"):
        bounded(1000)
    with pytest.raises(ValueError, match="at least 10.4 MiB are needed for 2000 columns"):
        LabelJoiner(fields=2000, label_window_ms=1, max_bytes=1 << 20)


def test_a_state_without_spilling_names_no_files():
    target = joiner()
    impressions(target, np.array([1, 2]), 0)
    assert target.segments() == {}
    assert not [
        name
        for name in target.state_dict()
        if "place" in name or "segments" in name or "evicted" in name
    ]


@pytest.mark.fault(
    25, injected="impressions only, ten label windows, one of them 16 times the bound of 1 MiB"
)
@pytest.mark.parametrize("over_bound", ["spill", "evict"])
def test_impressions_only_far_over_the_bound_stay_within_it_and_all_are_counted(
    over_bound, tmp_path, outcome
):
    window, bound = 60_000, 1 << 20
    target, parts = (
        bounded(
            bound, tmp_path, label_window_ms=window, over_bound=over_bound, duplicate_horizon_ms=0
        ),
        0,
    )
    rng, at = np.random.default_rng(0), 0
    for number in range(10):
        n = 100_000 if number == 4 else 3000
        for some in np.array_split(
            np.sort(rng.integers(number * window, (number + 1) * window, n)), n // 1500
        ):
            impressions(target, mix64(np.arange(at, at + len(some), dtype=np.uint64)), some)
            assert target.nbytes <= bound
            at += len(some)
            parts += sum(map(len, leave(target.advance, int(some[-1]))))
    parts += sum(map(len, leave(target.drain)))
    counts = target.counts()
    assert counts["impressions"] == at == parts + counts["impressions_evicted"]
    assert (counts["impressions_spilled"] > 0) == (over_bound == "spill")
    assert list(tmp_path.glob("*/*")) == []
    outcome(f"{over_bound}: never over the bound; each impression trained or counted as given up")


def test_a_state_saved_before_the_bound_had_counters_loads():
    target = joiner()
    impressions(target, np.array([1, 2]), 0)
    state = target.state_dict()
    older = joiner()
    older.load_state_dict({**state, "counters": state["counters"][:9]})
    assert older.counts() == target.counts()
    assert rows_of(leave(older.drain)) == [(0, 0, 1, 0), (0, 1, 2, 0)]
