"""Drift: quiet on stationary series, quick after a change of level, exact after a restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trainers import Partitions, finish, trainer

from stream_ctr.evaluate.drift import Drift, DriftWatch, Kind
from stream_ctr.evaluate.summary import WindowSummary
from stream_ctr.logs.simulate import START_MS, Simulation
from stream_ctr.logs.simulate import Drift as Drifting

KINDS = {"rate": Kind(unit=0.01), "risen": Kind(unit=0.01, rises_only=True)}
MINUTE = 60_000


def play(watch: DriftWatch, name: str, values: list[float], first: int = 0) -> list[list[Drift]]:
    """Return what is found after each minute."""
    found = []
    for minute, value in enumerate(values, first):
        watch.add(name, minute * MINUTE, value)
        found.append(watch.found)
    return found


def noise(seed: int, n: int, *, level: float = 0.3, scale: float = 0.02) -> list[float]:
    return (level + np.random.default_rng(seed).normal(0, scale, n)).tolist()


def test_a_hundred_stationary_series_of_five_hundred_windows_raise_fewer_than_two_alarms() -> None:
    raised = 0
    for seed in range(100):
        found = play(DriftWatch(KINDS, hold=1), "rate", noise(seed, 500))
        raised += sum(map(bool, found))
    assert raised < 2


@pytest.mark.parametrize("deviations", [4, 8, 20])
def test_a_change_is_found_within_a_few_windows_with_both_levels(deviations: int) -> None:
    late = []
    for seed in range(20):
        values = noise(seed, 60) + noise(1000 + seed, 12, level=0.3 + 0.02 * deviations)
        found = play(DriftWatch(KINDS, hold=12), "rate", values)
        assert not any(found[:60])
        after = [minute for minute, drifts in enumerate(found) if drifts]
        assert after, seed
        late.append(after[0] - 60)
        drift = found[-1][0]
        assert drift.since_ms == pytest.approx(60 * MINUTE, abs=2 * MINUTE)
        assert drift.before == pytest.approx(0.3, abs=0.02)
        assert drift.after == pytest.approx(0.3 + 0.02 * deviations, abs=0.04)
    assert np.median(late) <= (6 if deviations == 4 else 3)


def test_an_alarm_holds_for_some_windows() -> None:
    found = play(DriftWatch(KINDS, hold=5), "rate", noise(1, 50) + noise(2, 30, level=0.6))
    assert sum(map(bool, found)) == 5


def test_a_second_change_far_from_the_first_values_is_found_too() -> None:
    values = [*noise(1, 40), *noise(2, 40, level=5.0), *noise(3, 10, level=9.0)]
    found = play(DriftWatch(KINDS, hold=10), "rate", values)
    assert any(found[40:50])
    assert found[-1]
    assert found[-1][0].since_ms == 80 * MINUTE
    assert found[-1][0].after == pytest.approx(9.0, abs=0.1)


def test_a_fall_is_no_alarm_where_only_a_rise_is() -> None:
    fall = noise(1, 50) + noise(2, 20, level=0.1)
    rise = noise(1, 50) + noise(2, 20, level=0.5)
    assert not any(play(DriftWatch(KINDS, hold=5), "risen", fall))
    assert any(play(DriftWatch(KINDS, hold=5), "rate", fall))
    assert any(play(DriftWatch(KINDS, hold=5), "risen", rise))


def test_a_change_that_is_too_small_to_matter_is_no_alarm() -> None:
    values = noise(1, 50, scale=1e-5) + noise(2, 50, level=0.305, scale=1e-5)
    assert not any(play(DriftWatch(KINDS, hold=5), "rate", values))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 80), st.sampled_from([0.1, 0.3, 0.9])), min_size=1, max_size=6
    ),
    st.integers(0, 480),
    st.integers(0, 9),
)
def test_a_watch_goes_on_from_its_state_as_if_it_had_never_stopped(
    levels: list[tuple[int, float]], stop: int, seed: int
) -> None:
    values = [
        value
        for index, (n, level) in enumerate(levels)
        for value in noise(seed + index, n, level=level)
    ]
    whole, first, second = (DriftWatch(KINDS, hold=6) for _ in range(3))
    play(whole, "rate", values)
    play(first, "rate", values[:stop])
    second.load_state_dict(first.state_dict())
    assert second.found == first.found
    play(second, "rate", values[stop:], stop)
    assert second.found == whole.found
    for name, array in whole.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], array)


def test_the_state_is_bounded_and_exact_where_it_is_cut() -> None:
    values = noise(3, 1500)
    whole, second = DriftWatch(KINDS, hold=6), DriftWatch(KINDS, hold=6)
    play(whole, "rate", values)
    play(second, "rate", values[:700])
    resumed = DriftWatch(KINDS, hold=6)
    resumed.load_state_dict(second.state_dict())
    play(resumed, "rate", values[700:], 700)
    assert whole.state_dict()["lengths"].max() < 512
    for name, array in whole.state_dict().items():
        np.testing.assert_array_equal(resumed.state_dict()[name], array)


# -- in a run --------------------------------------------------------------------------------------


def drifts_of_a_run(directory: Path, seed: int, drift: Drifting) -> list[tuple[int, Drift]]:
    """Return each drift that a run finds, with the seconds of event time at which it does."""
    simulation = Simulation(250_000, seed=seed, drift=drift)
    stream = pa.concat_arrays([batch.value for batch in simulation.batches()])
    built = trainer(
        directory,
        Partitions([stream], largest=4000),
        model={"name": "lr", "table_bits": 16},
        learn={"batch_size": 512, "threads": 1},
        ftrl={"enabled": False, "alpha": 0.2},
        metrics={"window": "300s", "field_share": 1.0},
    )
    board, fields = built.state.scoreboard, built.state.fields
    assert fields
    found: dict[str, tuple[int, Drift]] = {}
    close = board.close_windows

    def watched(before_ms: int) -> list[WindowSummary]:
        closed = close(before_ms)
        for each in (*board.drifts, *fields.drifts):
            found.setdefault(each.name, ((before_ms - START_MS) // 1000, each))
        return closed

    board.close_windows = watched  # type: ignore[method-assign]
    finish(built)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, pytest.param(1, marks=pytest.mark.long)])
def test_a_stream_whose_click_probabilities_change_raises_the_entropy(
    tmp_path: Path, seed: int
) -> None:
    ((at, drift),) = drifts_of_a_run(tmp_path, seed, "weights")
    assert drift.name == "normalised entropy of lr"
    assert drift.after > drift.before + 0.02
    middle = 10_800  # seconds, about
    assert middle < at < middle + 10 * 300
    assert abs(drift.since_ms - START_MS - 1000 * middle) < 4 * 300_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_a_stream_without_a_drift_raises_nothing(tmp_path: Path, seed: int) -> None:
    assert drifts_of_a_run(tmp_path, seed, "none") == []
