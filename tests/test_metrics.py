"""Metrics against scikit-learn, and against counting by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.metrics import Score, Scored, Tally, WholeRun, Windows, paired_interval
from stream_ctr.evaluate.summary import Difference

MODELS = ("deepfm", "ftrl", "river_ftrl")

Array = npt.NDArray[Any]


@dataclass
class Stream:
    """The logits of three models, the second and the third each worse, and the true probability.

    The third model learns the `chosen` examples only.
    """

    time: Array
    labels: Array
    truth: Array
    logits: dict[str, Array]
    chosen: Array

    def __getitem__(self, rows: slice) -> Scored:
        logits = {model: logits[rows] for model, logits in self.logits.items()}
        logits["river_ftrl"] = logits["river_ftrl"][self.chosen[rows]]
        return Scored(
            self.time[rows],
            self.labels[rows],
            self.truth[rows],
            logits,
            {"river_ftrl": self.chosen[rows]},
        )

    def loss(self, model: str) -> Array:
        return metrics.losses(self.logits[model], self.labels)


def stream(
    n: int = 5000, *, seed: int = 0, start: int = 0, step: int = 100, share: float = 0.5
) -> Stream:
    rng = np.random.default_rng(seed)
    truth = rng.normal(-2, 1.5, n)
    labels = (rng.random(n) < metrics.probabilities(truth)).astype(np.uint8)
    logits = {
        model: truth + rng.normal(0, noise, n)
        for model, noise in zip(MODELS, (0.3, 0.6, 1.0), strict=True)
    }
    return Stream(
        time=start + step * np.arange(n),
        labels=labels,
        truth=metrics.probabilities(truth),
        logits=logits,
        chosen=rng.random(n) < share,
    )


def test_auc_and_logloss_agree_with_scikit_learn_within_the_stated_bound() -> None:
    for seed in range(5):
        data = stream(seed=seed)
        logits = data.logits["deepfm"]
        probability = metrics.probabilities(logits)
        score = Score()
        score.add(logits, data.labels)
        summary = score.summary()
        assert summary.auc is not None
        assert summary.auc_error_bound is not None
        exact = roc_auc_score(data.labels, logits)
        assert abs(summary.auc - exact) <= summary.auc_error_bound + 1e-12
        assert summary.auc_error_bound < 0.002
        assert summary.logloss == pytest.approx(log_loss(data.labels, probability), rel=1e-12)
        ctr = data.labels.mean()
        entropy = -(ctr * np.log(ctr) + (1 - ctr) * np.log(1 - ctr))
        assert summary.ne == pytest.approx(summary.logloss / entropy)
        assert summary.pred_over_actual == pytest.approx(probability.sum() / data.labels.sum())
        assert summary.count == 5000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-40, 40), st.booleans()), min_size=1, max_size=60))
def test_the_auc_error_bound_holds_by_counting_pairs(rows: list[tuple[float, bool]]) -> None:
    logits = np.array([s for s, _ in rows])
    labels = np.array([y for _, y in rows], np.uint8)
    score = Score()
    score.add(logits, labels)
    summary = score.summary()
    positive, negative = logits[labels == 1], logits[labels == 0]
    if not len(positive) or not len(negative):
        assert summary.auc is None
        return
    assert summary.auc is not None
    assert summary.auc_error_bound is not None
    pairs = positive[:, None] - negative[None, :]
    exact = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert abs(summary.auc - exact) <= summary.auc_error_bound + 1e-12


def test_extreme_logits_stay_finite() -> None:
    score = Score()
    score.add(np.array([-1e4, 1e4]), np.array([1, 0], np.uint8))
    assert score.summary().logloss == 1e4
    assert np.isfinite(metrics.logits(np.array([0.0, 1.0]))).all()
    logits = np.array([-30.0, 0.0, 12.0])
    assert np.allclose(metrics.logits(metrics.probabilities(logits)), logits)


def test_scores_of_parts_add_up_to_the_score_of_the_whole() -> None:
    data = stream()
    whole = Tally(MODELS)
    left = Tally(MODELS)
    right = Tally(MODELS)
    whole.add(data[:])
    left.add(data[:1234])
    right.add(data[1234:])
    left.merge(right)
    for name, array in whole.arrays().items():
        assert np.allclose(left.arrays()[name], array, rtol=1e-12), name
    assert whole.arrays()["histogram"].sum() == 2 * 5000 + data.chosen.sum()


def test_a_slice_of_a_batch_has_the_measures_of_its_examples() -> None:
    data = stream(700)
    batch = data[:]
    for rows in (slice(0, 700), slice(3, 50), slice(690, 700)):
        for name in ("time", "loss", "probability", "bin", "best_loss"):
            found = getattr(batch[rows], name)
            assert np.array_equal(found, getattr(data[rows], name)), name


def whole_run(data: Stream, *, batch: int) -> WholeRun:
    run = WholeRun(MODELS)
    for start in range(0, len(data.time), batch):
        run.add(data[start : start + batch])
    return run


def test_the_whole_run_and_its_tail_agree_with_a_list_of_all_examples() -> None:
    data = stream(300_000)  # enough for the blocks to double
    run = whole_run(data, batch=700)
    summary = run.summary()
    assert run.count == 300_000
    assert run.length > 64
    for model in ("deepfm", "ftrl"):
        logloss = summary.models[model].logloss
        assert logloss == pytest.approx(data.loss(model).mean(), rel=1e-12)
    assert summary.models["river_ftrl"].count == data.chosen.sum()
    best = log_loss(data.labels, data.truth)
    assert summary.best_possible_logloss == pytest.approx(best, rel=1e-9)
    assert summary.constant_logloss == pytest.approx(metrics.entropy(data.labels.mean()))
    half = run.summary(last=0.5)
    start = half.from_example
    assert abs(start - 150_000) <= run.length / 2
    logloss = half.models["deepfm"].logloss
    assert logloss == pytest.approx(data.loss("deepfm")[start:].mean(), rel=1e-12)
    assert half.pairs.keys() == {"ftrl", "river_ftrl"}
    assert msgspec.to_builtins(half.paired) == {
        "models": ["deepfm", "river_ftrl"],
        **msgspec.to_builtins(half.pairs["river_ftrl"]),
    }


def test_the_paired_difference_is_that_of_the_examples_both_models_scored() -> None:
    data = stream(300_000)
    half = whole_run(data, batch=700).summary(last=0.5)
    start = half.from_example
    for model, both in (("ftrl", np.ones(300_000, bool)), ("river_ftrl", data.chosen)):
        difference = (data.loss("deepfm") - data.loss(model))[start:][both[start:]]
        pair = half.pairs[model]
        assert pair.logloss_difference == pytest.approx(difference.mean(), rel=1e-9)
        assert pair.count == both[start:].sum()
        low, high = bounds(pair)
        error = difference.std() / np.sqrt(len(difference))
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.35)
        assert low < difference.mean() < high < 0


def bounds(difference: Difference) -> tuple[float, float]:
    assert difference.low is not None
    assert difference.high is not None
    return difference.low, difference.high


def test_a_single_model_is_compared_with_no_other() -> None:
    run = WholeRun(["deepfm"])
    data = stream(500)
    logits = {"deepfm": data.logits["deepfm"]}
    run.add(Scored(data.time, data.labels, data.truth, logits, {}))
    summary = run.summary()
    assert summary.paired.models == ["deepfm"]
    assert summary.paired.logloss_difference is None
    assert summary.pairs == {}


def test_the_paired_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        # Neighbours are alike: blocks differ more than their examples do.
        mean_of_block = rng.normal(0.01, 0.05, 40)
        blocks = np.stack([mean_of_block * 200 + rng.normal(0, 1, 40), np.full(40, 200.0)], axis=1)
        low, high = bounds(paired_interval(blocks))
        covered += low <= 0.01 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_few_blocks_give_no_interval() -> None:
    assert paired_interval(np.ones((9, 2))).low is None
    assert paired_interval(np.ones((10, 2))).low is not None
    assert paired_interval(np.empty((0, 2))).logloss_difference is None


def test_windows_are_provisional_until_closed_and_reported_once() -> None:
    data = stream(1000, start=0, step=100)  # 0 to 99.9 s
    windows = Windows(MODELS, window_ms=10_000, rolling=3)
    windows.add(data[0:350])
    rolling = windows.rolling_summary()
    assert rolling is not None
    assert rolling.provisional is True
    final = windows.close(before_ms=34_900)
    assert [(window.start_ms, window.end_ms, window.provisional) for window in final] == [
        (0, 10_000, False),
        (10_000, 20_000, False),
        (20_000, 30_000, False),
    ]
    logloss = final[1].models["deepfm"].logloss
    assert logloss == pytest.approx(data.loss("deepfm")[100:200].mean())
    assert final[1].pairs["ftrl"].count == 100
    assert windows.close(before_ms=35_000) == []
    windows.add(data[350:1000])
    rolling = windows.rolling_summary()
    assert rolling is not None
    assert (rolling.start_ms, rolling.end_ms) == (70_000, 100_000)
    assert rolling.models["deepfm"].count == 300
    assert len(windows.close(before_ms=100_000)) == 7


def test_the_memory_of_windows_does_not_grow_with_the_stream() -> None:
    windows = Windows(MODELS, window_ms=10_000, rolling=3)
    for start in range(0, 10_000_000, 100_000):
        windows.add(stream(100, start=start, step=1000)[:])
        windows.close(before_ms=start + 99_000)
    assert len(windows.tallies) <= 14
    assert len(windows.panes) <= 14 * 20


def test_windows_and_the_whole_run_go_on_from_their_state() -> None:
    def parts() -> list[WholeRun | Windows]:
        return [WholeRun(MODELS), Windows(MODELS, window_ms=10_000, rolling=2)]

    data = stream(3000, step=37)
    straight = parts()
    before = parts()
    after = parts()
    for part in straight:
        part.add(data[:])
    for part in before:
        part.add(data[0:1700])
    for resumed, old, wanted in zip(after, before, straight, strict=True):
        resumed.load_state_dict(old.state_dict())
        resumed.add(data[1700:3000])
        state = wanted.state_dict()
        for name, array in resumed.state_dict().items():
            assert np.allclose(array, state[name], rtol=1e-12), name
    # What was loaded is a copy.
    assert before[0].state_dict()["counts"].sum() == 1700


@pytest.mark.parametrize("other_ms", [1000, 3000, 7000, 10_000, 60_000, 86_400_000])
def test_a_state_goes_on_with_windows_of_another_length(other_ms: int) -> None:
    start = 1_735_689_600_000
    data = stream(3000, start=start, step=100)  # five minutes
    before = Windows(MODELS, window_ms=10_000, rolling=3)
    before.add(data[0:1234])
    reported = before.close(start + 98_000)
    after = Windows(MODELS, window_ms=other_ms, rolling=3)
    after.load_state_dict(before.state_dict())
    assert after.close(start + 98_000) == []  # nothing is reported twice
    after.add(data[1234:3000])
    rolling = after.rolling_summary()
    assert rolling is not None
    assert start - 3 * other_ms <= rolling.start_ms < rolling.end_ms <= start + 300_000 + other_ms
    reported += after.close(start + 300_000 + other_ms)
    # Each example is in one window that holds its time, and windows are in order.
    spans = [(window.start_ms, window.end_ms) for window in reported]
    ends = [end for _, end in spans]
    assert ends == sorted(ends)
    assert min(spans)[0] >= start - other_ms
    assert ends[-1] <= start + 300_000 + other_ms
    assert sum(window.models["ftrl"].count for window in reported) == 3000
    assert {end - begin for begin, end in spans} <= {10_000, other_ms}


def test_the_keys_of_a_summary_have_the_order_of_the_reports() -> None:
    data = stream(100)
    run = whole_run(data, batch=100)
    windows = Windows(MODELS, window_ms=10_000, rolling=2)
    windows.add(data[:])
    figures = ["models", "constant_logloss", "best_possible_logloss", "paired", "pairs"]
    summary = msgspec.to_builtins(run.summary())
    assert list(summary) == ["from_example", *figures]
    window = msgspec.to_builtins(windows.rolling_summary())
    assert list(window) == ["start_ms", "end_ms", *figures, "provisional"]
    score = ["auc", "auc_error_bound", "logloss", "ne", "pred_over_actual", "ctr", "count"]
    assert list(summary["models"]["ftrl"]) == score
    difference = ["logloss_difference", "low", "high", "count", "blocks"]
    assert list(summary["paired"]) == ["models", *difference]
    assert list(summary["pairs"]["ftrl"]) == difference
