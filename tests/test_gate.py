"""A snapshot that is worse than the published one is not published, and noise does not count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.gate import Gate, Judge, Measured, Verdict, measured

MODELS = ("deepfm", "ftrl", "river_ftrl")
BASELINE = "river_ftrl"


def scored(
    n: int,
    *,
    model: float = 0.0,
    baseline: float = 0.0,
    ftrl: float = 5.0,
    rate: float = 0.2,
    seed: int = 0,
    share: float = 1.0,
) -> metrics.Scored:
    """Return n examples with the true logits, plus `model`, `baseline` and `ftrl` for each model.

    The baseline predicts a `share` of the examples.
    """
    rng = np.random.default_rng(seed)
    true = rng.normal(np.log(rate / (1 - rate)), 1.0, n)
    labels = (rng.random(n) < metrics.probabilities(true)).astype(np.uint8)
    chosen = rng.random(n) < share
    logits = {"deepfm": true + model, "ftrl": true + ftrl, "river_ftrl": (true + baseline)[chosen]}
    return metrics.Scored(np.arange(n), labels, np.full(n, np.nan), logits, {"river_ftrl": chosen})


def evidence(**shifts: Any) -> Measured:
    tally = metrics.Tally(MODELS)
    tally.add(scored(20_000, **shifts))
    return measured(tally, BASELINE)


def test_the_evidence_is_measured_on_the_examples_that_both_models_scored() -> None:
    tally = metrics.Tally(MODELS)
    batch = scored(20_000, share=0.5)
    tally.add(batch)
    chosen = batch.bin[2] >= 0
    assert 0 < chosen.sum() < 20_000
    found = measured(tally, BASELINE)
    assert found.logloss == pytest.approx(batch.loss[0, chosen].mean())
    assert found.baseline_logloss == pytest.approx(batch.loss[2, chosen].mean())
    assert found.clicks == (batch.bin[0] >= metrics.BINS).sum()
    alone = measured(tally, None)
    assert alone.logloss == pytest.approx(batch.loss[0].mean())
    assert (alone.baseline_logloss, alone.baseline_calibration) == (None, None)


def test_a_model_as_good_as_before_passes_even_if_traffic_becomes_harder() -> None:
    before = evidence()
    harder = evidence(rate=0.45, seed=1)
    assert before.logloss
    assert harder.logloss
    assert harder.logloss > 1.2 * before.logloss
    assert Gate().refusals(harder, before) == []


@pytest.mark.parametrize(
    ("shifts", "reason"),
    [
        ({"model": 2.0}, "above the baseline's"),
        ({"model": 2.0}, "above that of the published"),
        ({"model": -0.5}, "times the clicks that came"),
    ],
)
def test_a_worse_model_is_refused_with_a_reason(shifts: dict[str, float], reason: str) -> None:
    assert any(reason in refusal for refusal in Gate().refusals(evidence(**shifts), evidence()))


def test_a_model_that_lost_its_lead_is_refused_although_it_equals_the_baseline() -> None:
    lead = evidence(baseline=1.5)
    assert Gate().refusals(evidence(), evidence()) == []
    refusals = Gate(calibration=9).refusals(evidence(), lead)
    assert any("published" in refusal for refusal in refusals)


def test_without_a_baseline_a_model_is_compared_with_the_published_one() -> None:
    before = replace(evidence(), baseline_logloss=None, baseline_calibration=None)
    worse = replace(evidence(model=1.0), baseline_logloss=None, baseline_calibration=None)
    assert Gate().refusals(before, before) == Gate().refusals(before, None) == []
    reasons = Gate().refusals(worse, before)
    assert "normalised entropy" in reasons[0]
    assert "the published one 1.0" in reasons[1]


@pytest.mark.parametrize(("ratio", "refused"), [(1.099, False), (1.101, True)])
def test_the_bounds_on_logloss_are_shares(ratio: float, refused: bool) -> None:
    good = replace(evidence(), calibration=1.0, baseline_calibration=1.0)
    assert good.baseline_logloss
    worse = replace(good, logloss=good.baseline_logloss * ratio)
    assert bool(Gate(logloss=0.1).refusals(worse, None)) == refused
    equal = replace(good, logloss=good.baseline_logloss)
    assert bool(Gate(logloss=0.1).refusals(worse, equal)) == refused


@pytest.mark.parametrize("sign", [1, -1])
def test_the_bound_on_calibration_holds_in_both_directions(sign: int) -> None:
    good = replace(evidence(), calibration=1.0, baseline_calibration=float(np.exp(0.2)))
    within = replace(good, calibration=float(np.exp(sign * 0.49)))
    beyond = replace(good, calibration=float(np.exp(sign * 0.51)))
    assert Gate(calibration=0.3).refusals(within, None) == []
    assert len(Gate(calibration=0.3).refusals(beyond, None)) == 1


def test_figures_without_meaning_refuse_nothing() -> None:
    empty = measured(metrics.Tally(MODELS), BASELINE)
    assert (empty.count, empty.logloss, empty.calibration) == (0, None, None)
    assert Gate().refusals(empty, evidence()) == []
    assert Gate().refusals(evidence(), empty) == []


def test_a_verdict_waits_for_enough_clicks_and_then_the_evidence_begins_anew() -> None:
    judge = Judge(Gate(clicks=1000), MODELS, BASELINE)
    judge.add(scored(1000, model=3.0))
    judge.judge(lambda: None)
    assert judge.refused == ()
    judge.add(scored(10_000, model=3.0))
    judge.judge(lambda: None)
    assert judge.refused
    judge.add(scored(1000))
    judge.judge(lambda: None)
    assert judge.refused, "there is no evidence against the verdict yet"
    judge.add(scored(10_000))
    judge.judge(lambda: None)
    assert judge.refused == ()


def test_no_verdict_is_passed_without_a_gate() -> None:
    judge = Judge(Gate(clicks=0), MODELS, BASELINE)
    judge.add(scored(10_000, model=3.0))
    judge.judge(lambda: evidence())
    judge.begin_anew("it is another model")
    assert judge.verdict() == Verdict()
    judge.go_back(Verdict(refused=("an earlier run had a gate",)))
    assert judge.refused == ()


def test_snapshots_are_refused_while_another_model_has_no_verdict() -> None:
    judge = Judge(Gate(clicks=1000), MODELS, BASELINE)
    judge.add(scored(10_000, model=3.0))
    judge.begin_anew("it is another model")
    judge.judge(lambda: None)
    assert list(judge.refused) == ["it is another model"]
    judge.add(scored(10_000))
    judge.judge(lambda: None)
    assert list(judge.refused) == []


def test_a_restored_model_has_the_verdict_of_its_snapshot_and_new_evidence() -> None:
    judge = Judge(Gate(clicks=1000), MODELS, BASELINE)
    judge.add(scored(10_000))
    judge.begin_anew("it is another model")
    judge.add(scored(10_000, model=3.0))
    good = Verdict(evidence=evidence())
    judge.go_back(good)
    assert judge.verdict() == good
    judge.judge(lambda: None)
    assert judge.verdict() == good, "no evidence was collected yet"


def test_a_verdict_carries_the_last_step() -> None:
    judge = Judge(Gate(clicks=1000), MODELS, BASELINE)
    assert judge.verdict(last_step=["a logit was not finite"]).last_step == (
        "a logit was not finite",
    )


def test_a_judge_goes_on_from_its_state() -> None:
    first, second = (Judge(Gate(clicks=1000), MODELS, BASELINE) for _ in range(2))
    first.add(scored(2000, model=3.0))
    second.load_state_dict(first.state_dict(), first.verdict())
    for judge in (first, second):
        judge.add(scored(10_000, model=3.0))
        judge.judge(lambda: evidence())
    assert first.verdict() == second.verdict()
    assert first.refused


def test_the_state_of_a_judge_is_a_copy() -> None:
    judge = Judge(Gate(clicks=1000), MODELS, BASELINE)
    state = judge.state_dict()
    before = {name: array.copy() for name, array in state.items()}
    judge.add(scored(100))
    assert all(np.array_equal(state[name], before[name]) for name in before)
