"""The health of fields is counted as a plain loop counts it, and goes on exactly from its state."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_ctr.evaluate.field_health import Columns, FieldHealth
from stream_ctr.evaluate.summary import FieldSummary
from stream_ctr.join.examples import Examples

MINUTE = 60_000
HOUR = 60 * MINUTE
BITS = 12
NAMES = ("app", "age", "app*age")
MISSING = (7, 9)


def health(*, share: float = 1.0, window_ms: int = MINUTE, bits: int = BITS) -> FieldHealth:
    columns = Columns(NAMES, np.array(MISSING, np.int32), np.array([-1, 0, -1]), table_bits=bits)
    return FieldHealth(columns, window_ms=window_ms, rolling=3, share=share)


def examples(
    n: int, *, seed: int = 0, from_ms: int = 0, to_ms: int = MINUTE, low: int = 10, high: int = 300
) -> Examples:
    """Return n examples in order: a third of the apps and a tenth of the ages are missing."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(low, high, (n, 3)).astype(np.int32)
    ids[:, 1] = 8
    for field, share in ((0, 1 / 3), (1, 0.1)):
        ids[rng.random(n) < share, field] = MISSING[field]
    time = from_ms + np.sort(rng.integers(0, to_ms - from_ms, n))
    values = rng.normal(0, 1, (n, 1)).astype(np.float32)
    id_hash = rng.integers(0, 1 << 63, n).astype(np.uint64)
    return Examples(id_hash, time, ids, values, np.zeros(n, np.uint8), np.full(n, np.nan), time)


def summary(measured: FieldHealth) -> FieldSummary:
    found = measured.summary()
    assert found
    return found


def play(measured: FieldHealth, stream: Examples, size: int) -> None:
    for first in range(0, len(stream), size):
        measured.add(stream[first : first + size])


def test_rates_are_those_of_a_plain_loop() -> None:
    stream = examples(2000, to_ms=2 * MINUTE)
    measured = health()
    learned: set[int] = set()
    unseen = [0, 0, 0]
    for first in range(0, 2000, 100):
        batch = stream[first : first + 100]
        measured.add(batch)
        for row in batch.ids.tolist():
            for column, found in enumerate(row):
                unseen[column] += found not in learned
        learned.update(batch.ids.ravel().tolist())
    found = summary(measured)
    assert (found.count, found.start_ms, found.end_ms) == (2000, 0, 2 * MINUTE)
    for column, name in enumerate(NAMES):
        figures = found.fields[name]
        assert figures.unseen_rate == unseen[column] / 2000
        if column < 2:
            assert figures.missing_rate == (stream.ids[:, column] == MISSING[column]).mean()
        values = {*stream.ids[:, column].tolist()} - {*MISSING[column : column + 1]}
        assert figures.distinct == pytest.approx(-4096 * math.log1p(-len(values) / 4096), rel=0.06)
        assert figures.occupancy == pytest.approx(len(values) / 4096, rel=0.06)
    assert found.fields["app*age"].missing_rate is None
    assert found.table.occupancy == len(learned) / 4096
    assert found.table.rows == 4096


def test_distinct_values_and_collisions_are_those_of_values_hashed_to_the_rows() -> None:
    rng = np.random.default_rng(5)
    values = 3000
    rows = rng.integers(10, 4096, values)  # a row for each of 3,000 values
    stream = examples(30_000)
    stream.ids[:, 2] = rows[rng.integers(0, values, 30_000)]
    measured = health()
    play(measured, stream, 500)
    figures = summary(measured).fields["app*age"]
    assert figures.distinct == pytest.approx(values, rel=0.08)
    _, at, shared = np.unique(rows, return_inverse=True, return_counts=True)
    assert figures.collision_rate == pytest.approx((shared[at] > 1).mean(), abs=0.05)


def test_only_the_newest_windows_are_recent() -> None:
    measured = health()
    for minute in range(6):
        stream = examples(600, seed=minute, from_ms=minute * MINUTE, to_ms=(minute + 1) * MINUTE)
        if minute < 3:
            stream.ids[:, 0] = MISSING[0]
        play(measured, stream, 100)
    found = summary(measured)
    assert (found.start_ms, found.end_ms, found.count) == (3 * MINUTE, 6 * MINUTE, 1800)
    assert found.fields["app"].missing_rate == pytest.approx(1 / 3, abs=0.05)


def test_psi_shows_a_field_that_shifted_against_the_windows_before_and_no_other() -> None:
    measured = health()
    for minute in range(12):
        stream = examples(800, seed=minute, from_ms=minute * MINUTE, to_ms=(minute + 1) * MINUTE)
        if minute == 0:
            play(measured, stream, 100)
            assert summary(measured).fields["app"].psi is None
            continue
        if minute >= 9:
            stream.ids[:, 0] = stream.ids[:, 0] % 40 + 10  # fewer apps, none missing
        play(measured, stream, 100)
        if minute == 8:
            for name in NAMES:
                assert abs(summary(measured).fields[name].psi or 9) < 0.05
    found = summary(measured).fields
    assert (found["app"].psi or 0) > 0.25
    assert abs(found["age"].psi or 9) < 0.05
    assert abs(found["app*age"].psi or 9) < 0.05


def test_a_shift_of_values_shows_in_a_field_that_has_one_row() -> None:
    measured = health()
    for minute in range(10):
        stream = examples(800, seed=minute, from_ms=minute * MINUTE, to_ms=(minute + 1) * MINUTE)
        if minute >= 7:
            stream.values[:] *= 30
        play(measured, stream, 100)
    assert (summary(measured).fields["age"].psi or 0) > 0.25


def test_a_field_that_ceases_is_found_as_drift_and_a_stationary_stream_is_not() -> None:
    calm, broken = health(), health()
    for minute in range(60):
        window = {"from_ms": minute * MINUTE, "to_ms": (minute + 1) * MINUTE}
        stream = examples(600, seed=minute, **window)
        play(calm, stream, 300)
        if minute >= 50:
            stream.ids[:, 0] = MISSING[0]
        play(broken, stream, 300)
        assert not calm.drifts, minute
        if minute == 54:
            found = {drift.name: drift for drift in broken.drifts}
    assert {"missing rate of app", "PSI of app"} <= found.keys()
    assert not any("age" in name for name in found)
    drift = found["missing rate of app"]
    assert drift.since_ms == 50 * MINUTE
    assert drift.before == pytest.approx(1 / 3, abs=0.03)
    assert drift.after == 1.0


def test_a_sample_is_chosen_by_the_id_and_distinct_rows_are_those_of_all() -> None:
    stream = examples(8000)
    whole, sampled = health(), health(share=0.25)
    play(whole, stream, 500)
    play(sampled, stream, 500)
    found = summary(sampled)
    assert found.count == pytest.approx(2000, rel=0.1)
    assert found.fields["app"].missing_rate == pytest.approx(1 / 3, abs=0.04)
    assert found.table == summary(whole).table
    for name in NAMES:
        assert found.fields[name].distinct == summary(whole).fields[name].distinct


def test_examples_that_came_with_their_label_close_no_window_too_early() -> None:
    stream = examples(1000, to_ms=3 * MINUTE)
    order = np.random.default_rng(0).permutation(1000)
    mixed = Examples(*(column[order] for column in stream.arrays().values()))
    one, other = health(), health()
    one.add(stream)
    other.add(mixed)
    assert one.summary() == other.summary()


def test_an_example_of_a_final_window_is_counted_as_learned_only() -> None:
    measured = health()
    play(measured, examples(500, to_ms=5 * MINUTE), 100)
    before = summary(measured)
    late = examples(50, low=1000, high=1010)
    measured.add(late)
    after = summary(measured)
    assert after.count == before.count
    assert after.table.occupancy > before.table.occupancy


@settings(max_examples=15, deadline=None)
@given(stop=st.integers(0, 40), seed=st.integers(0, 5), share=st.sampled_from([0.3, 1.0]))
def test_a_run_that_stopped_and_resumed_measures_what_one_that_went_through_does(
    stop: int, seed: int, share: float
) -> None:
    stream = examples(40 * 250, seed=seed, to_ms=30 * MINUTE)
    whole, first, second = (health(share=share) for _ in range(3))
    play(whole, stream, 250)
    play(first, stream[: 250 * stop], 250)
    second.load_state_dict(first.state_dict())
    assert second.summary() == first.summary()
    play(second, stream[250 * stop :], 250)
    assert second.summary() == whole.summary()
    assert second.drifts == whole.drifts
    for name, array in whole.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], array)


def test_a_state_is_not_changed_by_what_follows() -> None:
    measured = health()
    play(measured, examples(500), 100)
    state = measured.state_dict()
    kept = {name: array.copy() for name, array in state.items()}
    play(measured, examples(500, seed=1, from_ms=MINUTE, to_ms=9 * MINUTE, high=4000), 100)
    for name, array in kept.items():
        np.testing.assert_array_equal(state[name], array)


def test_with_windows_of_another_length_the_recent_ones_become_the_reference() -> None:
    measured = health()
    play(measured, examples(3000, to_ms=3 * MINUTE), 100)
    other = health(window_ms=2 * MINUTE)
    other.load_state_dict(measured.state_dict())
    play(other, examples(900, seed=1, from_ms=4 * MINUTE, to_ms=6 * MINUTE), 100)
    found = summary(other)
    assert (found.start_ms, found.end_ms) == (4 * MINUTE, 6 * MINUTE)
    assert abs(found.fields["app"].psi or 9) < 0.05


def test_memory_does_not_grow_with_the_stream() -> None:
    measured = health()
    sizes = []
    for minutes in (0, 200):
        for minute in range(minutes, minutes + 20):
            stream = examples(
                600, seed=minute, from_ms=minute * MINUTE, to_ms=minute * MINUTE + 999
            )
            play(measured, stream, 600)
        state = measured.state_dict()
        sizes.append(sum(a.nbytes for name, a in state.items() if not name.startswith("drift.")))
    assert sizes[0] == sizes[1]
