"""The tables of `join_state`: what each event does to an impression in each state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from support.joins import EARLY, Array, bounded

from stream_ctr.events.batch import Arrivals
from stream_ctr.join import join_state
from stream_ctr.join.join_state import (
    COUNTERS,
    CURVE_SECONDS,
    EMPTY,
    EVICTED,
    LEFT,
    NEVER,
    pack,
    unpack,
)
from stream_ctr.join.joiner import LabelJoiner

LABEL = 2000  # the label window of `bounded`
SHOWN = 100_000  # when the impression in question was shown
ID = 7

State = Literal["absent", "in memory", "on disk", "left", "evicted"]
STATES: tuple[State, ...] = ("absent", "in memory", "on disk", "left", "evicted")
PENDING: tuple[State, State] = ("in memory", "on disk")


@dataclass
class Case:
    target: LabelJoiner

    def click(self, time: int, limit: int = 0) -> dict[str, int]:
        """Push a click, and return the counters that it changed."""
        before = self.target.counts()
        self.target.push_clicks(Arrivals.of([ID], [time]), limit=np.array([limit]))
        return self._changes(before)

    def impression(self, time: int, limit: int = 0, place: int = 5) -> dict[str, int]:
        """Push an impression, and return the counters that it changed."""
        before = self.target.counts()
        arrival = Arrivals(*one(ID, np.uint64), *one(time), *one(0, np.int32), *one(place))
        features = np.full((1, 39), 9, np.int32), np.zeros((1, 1), np.float32)
        self.target.push_impressions(arrival, *features, limit=np.array([limit]))
        return self._changes(before)

    def state(self) -> State:
        index = self.target._index.arrays
        slot = index.slot[(index.key == ID) & (index.slot != EMPTY)]
        if not len(slot):
            return "absent"
        if slot[0] in (LEFT, EVICTED):
            return "left" if slot[0] == LEFT else "evicted"
        row = self.target._pending.rows.arrays.feature_row[slot[0]]
        return "in memory" if row >= 0 else "on disk"

    def drain(self) -> list[tuple[int, int]]:
        """Return the (time, label) of the examples of the id."""
        examples = self.target.drain()
        mine = examples[examples.id_hash == ID]
        return list(zip(mine.time.tolist(), mine.label.tolist(), strict=True))

    def _changes(self, before: dict[str, int]) -> dict[str, int]:
        after = self.target.counts()
        return {name: after[name] - n for name, n in before.items() if after[name] != n}


def one(value: int, dtype: type[np.generic] = np.int64) -> list[Array]:
    return [np.array([value], dtype)]


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """Return a joiner in which the impression of ID at SHOWN is in the state of the parameter."""
    state: State = request.param
    case = Case(bounded(1 << 20, tmp_path))
    if state != "absent":
        case.impression(SHOWN)
    if state == "on disk":
        case.target._pending.spill_newest(1)
    if state == "left":
        # Without a change of the overall watermark, which would decide the fate of other events.
        case.target._release(SHOWN + 1, at_most=10)
    if state == "evicted":
        case.target._evict(1)
    assert case.state() == state
    return case


def every(*states: State) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", states, indirect=True)


# -- clicks --------------------------------------------------------------------------------------


@every(*STATES)
def test_a_click_before_the_window_waits_in_every_state(case: Case) -> None:
    assert case.click(SHOWN - EARLY - 1) == {"clicks": 1}
    assert case.target._clicks.count == 1


@every(*PENDING)
@pytest.mark.parametrize("time", [SHOWN - EARLY, SHOWN - 1, SHOWN, SHOWN + LABEL])
def test_a_click_in_the_window_of_a_pending_impression_joins(case: Case, time: int) -> None:
    early = {"clicks_early": 1} if time < SHOWN else {}
    assert case.click(time, limit=SHOWN + LABEL) == {"clicks": 1, "clicks_joined": 1, **early}
    assert case.click(time) == {"clicks": 1, "clicks_duplicate": 1}
    assert case.drain() == [(SHOWN, 1)]


@every(*PENDING)
@pytest.mark.parametrize(
    ("time", "limit"), [(SHOWN + LABEL + 1, 0), (SHOWN, SHOWN + LABEL + 1)], ids=["made", "arrived"]
)
def test_a_click_after_the_window_of_a_pending_impression_is_late(
    case: Case, time: int, limit: int
) -> None:
    assert case.click(time, limit) == {"clicks": 1, "clicks_late": 1}
    assert case.drain() == [(SHOWN, 0)]


@every("left")
def test_a_click_of_a_released_impression_is_late_until_the_horizon(case: Case) -> None:
    for time in (SHOWN - EARLY, SHOWN, SHOWN + LABEL + 1, SHOWN + 10_000):
        assert case.click(time) == {"clicks": 1, "clicks_late": 1}
    assert case.click(SHOWN + 10_001) == {"clicks": 1}  # it waits for another impression
    assert case.click(SHOWN, limit=SHOWN + 10_001) == {"clicks": 1}


@every("evicted")
def test_a_click_of_an_evicted_impression_is_counted_as_evicted(case: Case) -> None:
    for time in (SHOWN - EARLY, SHOWN, SHOWN + LABEL + 1):
        assert case.click(time) == {"clicks": 1, "clicks_evicted": 1}


@every("absent")
def test_a_click_waits_for_its_impression_unless_none_can_want_it(case: Case) -> None:
    case.target.advance(SHOWN)
    oldest = SHOWN - LABEL - EARLY
    assert case.click(oldest - 1) == {"clicks": 1, "clicks_unmatched": 1}
    assert case.click(oldest) == {"clicks": 1}
    joined = case.impression(oldest + EARLY)
    assert joined == {"impressions": 1, "clicks_joined": 1, "clicks_early": 1}


@every("absent")
def test_waiting_clicks_join_are_late_or_go_on_waiting_when_the_impression_comes(
    case: Case,
) -> None:
    before = SHOWN - EARLY - 1
    for time, limit in (
        (before, 0),
        (SHOWN + LABEL + 1, 0),
        (SHOWN, SHOWN + LABEL + 1),
        (SHOWN + 3, 0),
        (SHOWN + 2, 0),
    ):
        assert case.click(time, limit) == {"clicks": 1}
    assert case.impression(SHOWN) == {
        "impressions": 1,
        "clicks_joined": 1,
        "clicks_duplicate": 1,
        "clicks_late": 2,
    }
    assert case.target._clicks.state_dict()["time"].tolist() == [before]
    assert case.target._pending.rows.arrays.click_end[0] == SHOWN + 2


# -- impressions ---------------------------------------------------------------------------------


@every(*STATES)
def test_an_impression_that_arrives_after_its_window_is_late_in_every_state(case: Case) -> None:
    before = case.state()
    late = {"impressions": 1, "impressions_late": 1}
    assert case.impression(SHOWN - 1, limit=SHOWN + LABEL) == late
    assert case.state() == before


@every(*STATES)
def test_an_impression_that_arrives_at_the_end_of_its_window_is_not_late(case: Case) -> None:
    absent = case.state() == "absent"
    changes = case.impression(SHOWN, limit=SHOWN + LABEL)
    again = {"impressions": 1, "impressions_duplicate": 1}
    assert changes == ({"impressions": 1} if absent else again)


@every("left", "evicted")
def test_a_second_impression_of_a_released_or_evicted_id_is_dropped(case: Case) -> None:
    before = case.state()
    for time in (SHOWN - 50, SHOWN, SHOWN + 10_000):
        again = {"impressions": 1, "impressions_duplicate": 1}
        assert case.impression(time) == again
    assert case.state() == before
    assert case.impression(SHOWN + 10_001) == {"impressions": 1}
    assert case.state() == "in memory"


@every(*PENDING)
@pytest.mark.parametrize(
    ("time", "place", "kept"),
    [
        (SHOWN + 1, 4, SHOWN),
        (SHOWN, 5, SHOWN),
        (SHOWN, 6, SHOWN),
        (SHOWN, 4, SHOWN),
        (SHOWN - 1, 6, SHOWN - 1),
    ],
)
def test_of_two_impressions_of_an_id_the_first_in_time_and_place_is_kept(
    case: Case, time: int, place: int, kept: int
) -> None:
    again = {"impressions": 1, "impressions_duplicate": 1}
    replaces = (time, place) < (SHOWN, 5)
    before = case.state()
    assert case.impression(time, place=place) == again
    assert case.state() == ("in memory" if replaces else before)
    rows = case.target._pending.rows.arrays
    slot = np.flatnonzero((rows.id_hash == ID) & (rows.time != NEVER))
    assert rows.place[slot].tolist() == [place if replaces else 5]
    assert case.drain() == [(kept, 0)]


@every(*PENDING)
@pytest.mark.parametrize(("moved", "label"), [(9, 1), (10, 1), (11, 0)])
def test_an_impression_that_replaces_keeps_a_click_of_its_own_window_only(
    case: Case, moved: int, label: int
) -> None:
    case.click(SHOWN + LABEL - 10)
    lost = {} if label else {"clicks_joined": -1, "clicks_late": 1}
    again = {"impressions": 1, "impressions_duplicate": 1}
    assert case.impression(SHOWN - moved) == {**again, **lost}
    assert case.drain() == [(SHOWN - moved, label)]


@every(*PENDING)
def test_the_click_that_an_impression_that_replaces_keeps_may_be_a_second_one(case: Case) -> None:
    case.click(SHOWN + LABEL)
    case.click(SHOWN + 1)
    again = {"impressions": 1, "impressions_duplicate": 1}
    assert case.impression(SHOWN - 10) == again
    assert case.drain() == [(SHOWN - 10, 1)]


@every("in memory")
def test_an_impression_beyond_the_horizon_of_a_pending_one_is_another_example(case: Case) -> None:
    assert case.impression(SHOWN + 10_001) == {"impressions": 1}
    assert case.drain() == [(SHOWN, 0), (SHOWN + 10_001, 0)]


# -- the tables and the packing ------------------------------------------------------------------


def test_the_documented_states_are_these() -> None:
    tables = (join_state.__doc__ or "").split("\n\n")
    first_table = next(part for part in tables if part.startswith("| state | entry"))
    rows = re.findall(r"^\| ([a-z ]+) \|", first_table, re.M)
    assert tuple(rows[1:]) == STATES


def test_every_counter_has_a_number_of_its_own() -> None:
    numbers = [getattr(join_state, name.upper(), None) for name in COUNTERS]
    assert numbers == list(range(len(COUNTERS)))


def test_a_delay_on_a_bound_of_the_curve_counts_within_it() -> None:
    target = LabelJoiner(fields=1, label_window_ms=10**8)
    for number, seconds in enumerate(CURVE_SECONDS):
        for extra in (0, 1):
            id_ = 2 * number + extra
            target.push_impressions(Arrivals.of([id_], [0]), np.zeros((1, 1), np.int32))
            target.push_clicks(Arrivals.of([id_], [seconds * 1000 + extra]))
    # The click on a bound falls before it, the click 1 ms later after it.
    assert target.delays[0].tolist() == [1] + [2] * (len(CURVE_SECONDS) - 1) + [1]


@pytest.mark.parametrize(("id_bytes", "greatest"), [(3, (1 << 24) - 1), (4, (1 << 31) - 1)])
def test_packed_ids_unpack_to_themselves(id_bytes: int, greatest: int) -> None:
    ids = np.random.default_rng(0).integers(0, greatest, (50, 7), dtype=np.int32)
    ids[0] = [0, 1, 255, 256, 65_535, 65_536, greatest]
    packed = pack(ids, id_bytes)
    assert packed.shape == (50, 7 * id_bytes)
    assert np.array_equal(unpack(packed, id_bytes), ids)
