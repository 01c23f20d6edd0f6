"""The scoreboard gives every batch to all of its parts, and goes on from its state."""

from __future__ import annotations

import numpy as np
import pytest

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.drift import Drift
from stream_ctr.evaluate.gate import Gate
from stream_ctr.evaluate.scoreboard import MetricWindows, Scoreboard, part

MODELS = ("deepfm", "river_ftrl")


def scoreboard() -> Scoreboard:
    return Scoreboard(
        MODELS,
        windows=MetricWindows(window_ms=1000, rolling=2),
        gate=Gate(clicks=200),
    )


def batch(start_ms: int, seed: int) -> metrics.Scored:
    """Return 500 examples within two seconds of event time."""
    rng = np.random.default_rng(seed)
    n = 500
    true = rng.normal(0.0, 1.0, n)
    labels = (rng.random(n) < metrics.probabilities(true)).astype(np.uint8)
    logits = {"deepfm": true + 2.0, "river_ftrl": true}
    time = start_ms + np.sort(rng.integers(0, 2000, n))
    return metrics.Scored(time, labels, metrics.probabilities(true), logits, {})


def test_every_part_measures_every_batch() -> None:
    board = scoreboard()
    board.add(batch(0, seed=1))
    assert board.whole.summary().models["deepfm"].count == 500
    windows = list(board.windows.close(2000))
    assert [window.start_ms for window in windows] == [0, 1000]
    assert sum(window.models["deepfm"].count for window in windows) == 500
    board.judge.judge(lambda: None)
    assert board.judge.refused


def test_a_scoreboard_goes_on_from_its_state() -> None:
    first = scoreboard()
    first.add(batch(0, seed=1))
    first.judge.judge(lambda: None)
    second = scoreboard()
    second.load_state_dict(first.state_dict(), first.judge.verdict())
    assert second.judge.refused == first.judge.refused
    for board in (first, second):
        board.add(batch(2000, seed=2))
        board.judge.judge(lambda: None)
    assert second.whole.summary() == first.whole.summary()
    assert list(second.windows.close(4000)) == list(first.windows.close(4000))
    assert second.judge.verdict() == first.judge.verdict()
    assert second.state_dict().keys() == first.state_dict().keys()
    for name, array in first.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], array)


def test_a_calibration_that_jumps_is_found_as_drift_and_goes_on_from_the_state() -> None:
    board, resumed = scoreboard(), scoreboard()
    rng = np.random.default_rng(0)
    found: list[Drift] = []
    for second in range(40):
        true = rng.normal(-1.0, 1.0, 600)
        labels = (rng.random(600) < metrics.probabilities(true)).astype(np.uint8)
        shift = 0.0 if second < 34 else 0.8
        time = 1000 * second + np.sort(rng.integers(0, 1000, 600))
        logits = {"deepfm": true + shift, "river_ftrl": true}
        scored = metrics.Scored(time, labels, metrics.probabilities(true), logits, {})
        if second == 30:
            resumed.load_state_dict(board.state_dict(), board.judge.verdict())
        for each in (board, resumed) if second >= 30 else (board,):
            each.add(scored)
            each.close_windows(1000 * (second + 1))
        if second < 34:
            assert board.drifts == []
        else:
            found += [each for each in board.drifts if each.name == "calibration of deepfm"]
            assert resumed.drifts == board.drifts
    assert found[0].since_ms == 34_000
    assert found[0].before == pytest.approx(1.0, abs=0.1)
    assert found[0].after > 1.3


@pytest.mark.parametrize("name", ["whole", "windows", "judge"])
def test_the_state_of_each_part_is_needed(name: str) -> None:
    board = scoreboard()
    board.add(batch(0, seed=1))
    state = board.state_dict()
    mine = part(state, f"{name}.")
    assert mine
    assert {f"{name}.{key}" for key in mine} == {key for key in state if key.startswith(name)}
    rest = {key: array for key, array in state.items() if not key.startswith(name)}
    with pytest.raises(KeyError):
        scoreboard().load_state_dict(rest, board.judge.verdict())
