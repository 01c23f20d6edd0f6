"""The alarm that a model no longer beats its baseline is raised on evidence and kept until over."""

from __future__ import annotations

import numpy as np
import pytest

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.behind import Behind
from stream_ctr.evaluate.gate import Gate
from stream_ctr.evaluate.scoreboard import MetricWindows, Scoreboard, part

MODELS = ("deepfm", "fm", "ftrl", "river_ftrl")
BASELINES = ("ftrl", "river_ftrl")
MINUTE = 60_000
CLICKS = 300


def scoreboard() -> Scoreboard:
    board = Scoreboard(
        MODELS,
        windows=MetricWindows(window_ms=MINUTE, rolling=3),
        gate=Gate(clicks=0),
        baselines=BASELINES,
    )
    board.behind = Behind("deepfm", BASELINES, clicks=CLICKS)
    return board


def minute(number: int, *, noise: float, n: int = 1500) -> metrics.Scored:
    """Return a minute of examples on which deepfm has this noise, ftrl 0.5 and the others 1."""
    rng = np.random.default_rng(number)
    true = rng.normal(0.0, 1.0, n)
    labels = (rng.random(n) < metrics.probabilities(true)).astype(np.uint8)
    scales = {"deepfm": noise, "fm": 1.0, "ftrl": 0.5, "river_ftrl": 1.0}
    logits = {name: true + rng.normal(0.0, scale, n) for name, scale in scales.items()}
    time = number * MINUTE + np.sort(rng.integers(0, MINUTE, n))
    return metrics.Scored(time, labels, metrics.probabilities(true), logits, {})


def play(board: Scoreboard, first: int, noises: list[float], n: int = 1500) -> list[bool]:
    """Return whether the alarm holds after each minute."""
    holds = []
    for number, noise in enumerate(noises, first):
        board.add(minute(number, noise=noise, n=n))
        board.close_windows((number + 1) * MINUTE)
        holds.append(board.behind.found is not None)
    return holds


def test_a_model_that_beats_its_baselines_raises_nothing() -> None:
    assert not any(play(scoreboard(), 0, [0.1] * 12))


def test_a_model_that_falls_behind_is_named_with_the_best_baseline_and_the_figures() -> None:
    board = scoreboard()
    assert play(board, 0, [0.1] * 4 + [2.0] * 3)[-1]
    found = board.behind.found
    assert found
    assert (found.model, found.baseline) == ("deepfm", "ftrl")
    assert (found.start_ms, found.end_ms) == (4 * MINUTE, 7 * MINUTE)
    window = board.windows.final_summary()
    assert window
    assert found.difference == window.pairs["ftrl"].logloss_difference
    assert found.count == 4500
    assert found.clicks == round((window.models["ftrl"].ctr or 0) * 4500)
    assert f"deepfm no longer beats ftrl: its logloss is {found.difference:.4f} higher" in (
        found.words()
    )
    assert window.pairs["ftrl"].low == found.low is not None
    assert found.low > 0


def test_the_alarm_holds_until_the_model_is_no_worse_on_average() -> None:
    board = scoreboard()
    assert play(board, 0, [2.0] * 3)[-1]
    # The rolling window of three minutes still holds bad ones.
    assert play(board, 3, [0.1, 0.1, 0.1]) == [True, True, False]


def test_a_difference_that_chance_explains_keeps_the_state_that_stood() -> None:
    """At noise 0.56 the model is a little worse than ftrl, by less than the interval."""
    quiet, loud = scoreboard(), scoreboard()
    play(loud, 0, [2.0] * 3)
    noises = [0.56] * 5
    start = 20
    assert not any(play(quiet, start, noises))
    assert all(play(loud, start, noises))


def test_few_clicks_raise_nothing() -> None:
    board = scoreboard()
    holds = play(board, 0, [3.0] * 3, n=150)
    window = board.windows.final_summary()
    assert window
    pair = window.pairs["ftrl"]
    assert pair.low is not None
    assert pair.low > 0
    assert not any(holds)


def test_a_run_without_baselines_has_no_such_alarm() -> None:
    board = Scoreboard(
        MODELS, windows=MetricWindows(window_ms=MINUTE, rolling=3), gate=Gate(clicks=0)
    )
    assert not any(play(board, 0, [3.0] * 5))


@pytest.mark.parametrize("minutes", [2, 3, 4, 5])
def test_an_alarm_goes_on_from_its_state(minutes: int) -> None:
    noises = [2.0] * 3 + [0.56] * 2 + [0.1] * 3
    whole, first, second = scoreboard(), scoreboard(), scoreboard()
    play(first, 0, noises[:minutes])
    second.load_state_dict(first.state_dict(), first.judge.verdict())
    assert second.behind.found == first.behind.found
    after = play(second, minutes, noises[minutes:])
    assert play(whole, 0, noises)[minutes:] == after
    assert second.behind.found == whole.behind.found
    assert part(first.state_dict(), "behind.")["holds"].tolist() == [minutes >= 2]
