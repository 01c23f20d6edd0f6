"""A snapshot that is worse than the published one is not published, and noise does not count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.gate import (
    Clicks,
    Gate,
    Judge,
    Measured,
    Other,
    RunningConstant,
    Verdict,
    measured,
)

MODELS = ("deepfm", "ftrl", "river_ftrl")
SEEN = Clicks(came=100, known=100, joined=100)


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


def unclicked(n: int) -> metrics.Scored:
    """Return n examples without a click, of which every model was sure."""
    logits = {name: np.full(n, -3.0) for name in MODELS}
    return metrics.Scored(np.arange(n), np.zeros(n, np.uint8), np.full(n, np.nan), logits, {})


def evidence(**shifts: Any) -> Measured:
    judge = Judge(Gate(clicks=1), MODELS)
    judge.add(scored(20_000, **shifts))
    judge.judge(lambda: None, SEEN)
    found = judge.verdict().evidence
    assert found
    return found


def alone(**shifts: Any) -> Measured:
    """Return the evidence of a run with no other model."""
    return replace(evidence(**shifts), others={})


def test_a_model_is_compared_on_the_examples_that_both_models_scored() -> None:
    tally = metrics.Tally(MODELS)
    batch = scored(20_000, share=0.5)
    tally.add(batch)
    chosen = batch.bin[2] >= 0
    assert 0 < chosen.sum() < 20_000
    found = measured(tally)
    baseline = found.others["river_ftrl"]
    assert baseline.logloss == pytest.approx(batch.loss[2, chosen].mean())
    assert baseline.difference == pytest.approx((batch.loss[0] - batch.loss[2])[chosen].mean())
    assert found.others["ftrl"].logloss == pytest.approx(batch.loss[1].mean())
    assert found.logloss == pytest.approx(batch.loss[0].mean())
    assert found.clicks == (batch.bin[0] >= metrics.BINS).sum()


def test_a_model_that_shares_no_example_is_no_reference() -> None:
    tally = metrics.Tally(MODELS)
    tally.add(scored(1000, share=0.0))
    assert measured(tally).others.keys() == {"ftrl"}


def test_a_model_that_predicted_other_examples_is_no_reference() -> None:
    batch = scored(1000, share=0.5)
    batch.bin[0, batch.bin[2] >= 0] = -1
    tally = metrics.Tally(MODELS)
    tally.add(batch)
    assert measured(tally).others.keys() == {"ftrl"}


def test_the_running_constant_of_a_verdict_is_measured_on_its_examples() -> None:
    judge = Judge(Gate(clicks=1), MODELS)
    constant = RunningConstant()
    for seed, rate in enumerate((0.2, 0.02)):
        batch = scored(5000, rate=rate, seed=seed)
        judge.add(batch)
        judge.judge(lambda: None, SEEN)
        found = judge.verdict().evidence
        assert found
        losses = constant.losses((batch.bin[0] >= metrics.BINS).astype(np.uint8))
        assert found.constant_logloss == pytest.approx(losses.mean())


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
        ({"model": 2.0}, "above that of river_ftrl"),
        ({"model": 2.0, "ftrl": 0.0, "baseline": 5.0}, "above that of ftrl"),
        ({"model": 2.0}, "above that of the published snapshot"),
        ({"model": -0.5}, "times the clicks that came, river_ftrl 1.0"),
        ({"model": 2.0, "baseline": 5.0}, "above that of the running constant"),
        ({"model": 2.0, "baseline": 5.0}, "its normalised entropy is 1."),
    ],
)
def test_a_worse_model_is_refused_with_a_reason(shifts: dict[str, float], reason: str) -> None:
    assert any(reason in refusal for refusal in Gate().refusals(evidence(**shifts), evidence()))


@pytest.mark.parametrize(("ne", "refused"), [(1.0, False), (1.001, True)])
def test_a_model_that_knows_less_than_a_constant_is_refused_at_any_bounds(
    ne: float, refused: bool
) -> None:
    lenient = Gate(logloss=100, calibration=100)
    assert bool(lenient.refusals(replace(alone(), ne=ne), None)) == refused
    with_constant = replace(alone(), logloss=0.4, constant_logloss=0.4 / ne)
    assert bool(lenient.refusals(with_constant, None)) == refused


def test_a_model_that_lost_its_lead_is_refused_although_it_equals_the_others() -> None:
    lead = evidence(baseline=1.5)
    assert Gate().refusals(evidence(), evidence()) == []
    refusals = Gate(calibration=9).refusals(evidence(ftrl=0.0), replace(lead))
    assert any("published" in refusal for refusal in refusals)


def test_another_model_that_became_better_is_not_held_against_the_model() -> None:
    before = evidence(baseline=0.0, ftrl=1.5)
    assert Gate(calibration=9).refusals(evidence(baseline=0.0, ftrl=0.0), before) == []


def test_without_other_models_a_model_is_compared_with_the_published_one() -> None:
    before, worse = alone(), alone(model=1.0)
    assert Gate().refusals(before, before) == Gate().refusals(before, None) == []
    reasons = Gate().refusals(worse, before)
    assert "the running constant" in reasons[0]
    assert reasons[1].startswith("its normalised entropy is 1")
    assert reasons[1].endswith("% above that of the published snapshot")
    assert "the published one 1.0" in reasons[2]


@pytest.mark.parametrize(("ratio", "refused"), [(1.099, False), (1.101, True)])
def test_the_bounds_on_logloss_are_shares(ratio: float, refused: bool) -> None:
    good = replace(alone(), calibration=1.0)

    def compared(ratio: float) -> Measured:
        other = Other(logloss=0.3, difference=0.3 * (ratio - 1), calibration=1.0)
        return replace(good, others={"ftrl": other})

    assert bool(Gate(logloss=0.1).refusals(compared(ratio), None)) == refused
    assert bool(Gate(logloss=0.1).refusals(compared(1.0), compared(1 / ratio))) == refused


@pytest.mark.parametrize("sign", [1, -1])
def test_the_bound_on_calibration_holds_in_both_directions(sign: int) -> None:
    def off(model: float, *others: float) -> Measured:
        return replace(
            alone(),
            calibration=float(np.exp(model)),
            others={
                f"m{i}": Other(logloss=0.4, difference=0.0, calibration=float(np.exp(other)))
                for i, other in enumerate(others)
            },
        )

    assert Gate(calibration=0.3).refusals(off(sign * 0.49, 0.2, 0.5), None) == []
    reasons = Gate(calibration=0.3).refusals(off(sign * 0.51, 0.2, 0.5), None)
    assert len(reasons) == 1
    assert reasons[0].endswith(", m0 1.22 times")


def test_figures_without_meaning_refuse_nothing() -> None:
    empty = measured(metrics.Tally(MODELS))
    assert (empty.count, empty.logloss, empty.calibration, empty.others) == (0, None, None, {})
    assert Gate().refusals(empty, evidence()) == []
    assert Gate().refusals(evidence(), empty) == []


def test_the_running_constant_predicts_each_example_before_it_counts_it() -> None:
    labels = (np.random.default_rng(0).random(1000) < 0.1).astype(np.uint8)
    constant = RunningConstant()
    losses = np.concatenate([constant.losses(part) for part in np.split(labels, [1, 17, 500])])
    clicks = 0
    for count, (label, loss) in enumerate(zip(labels.tolist(), losses.tolist(), strict=True)):
        p = (clicks + 0.5) / (count + 1)
        assert loss == pytest.approx(-np.log(p if label else 1 - p))
        clicks += label
    assert constant.clicks == clicks
    best = 1000 * metrics.entropy(clicks / 1000)
    assert losses.sum() - best <= np.log(1000) / 2 + np.log(2)


@pytest.mark.parametrize(
    ("clicks", "reason"),
    [
        (Clicks(), "it has seen no click"),
        (Clicks(8, 7, 0), "it has seen no click: 8 clicks came, and none found its impression"),
    ],
)
@pytest.mark.parametrize("gate", [Gate(), Gate(clicks=0)])
def test_a_model_that_saw_no_click_is_refused_with_and_without_a_gate(
    gate: Gate, clicks: Clicks, reason: str
) -> None:
    judge = Judge(gate, MODELS)
    judge.add(unclicked(1000))
    judge.judge(lambda: None, clicks)
    assert list(judge.verdict().reasons) == list(judge.refused) == [reason]
    judge.add(scored(100))
    judge.judge(lambda: None, clicks._replace(joined=1))
    assert list(judge.verdict().reasons) == list(judge.refused) == []


def test_a_model_is_refused_while_no_click_finds_its_impression_any_more() -> None:
    judge = Judge(Gate(clicks=1000), MODELS)
    judge.add(scored(10_000))
    judge.judge(lambda: None, Clicks(3000, 3000, 2000))
    judge.judge(lambda: None, Clicks(3049, 3049, 2000))
    assert list(judge.refused) == []
    judge.judge(lambda: None, Clicks(3050, 3050, 2000))
    assert list(judge.refused) == ["none of the last 50 clicks found its impression"]
    resumed = Judge(Gate(clicks=1000), MODELS)
    resumed.load_state_dict(judge.state_dict(), judge.verdict())
    assert resumed.refused == judge.refused
    for each in (judge, resumed):
        each.judge(lambda: None, Clicks(3059, 3059, 2000))
        assert list(each.refused) == ["none of the last 59 clicks found its impression"]
        each.judge(lambda: None, Clicks(3060, 3060, 2001))
        assert list(each.refused) == []


def test_a_verdict_waits_for_enough_clicks_and_then_the_evidence_begins_anew() -> None:
    judge = Judge(Gate(clicks=1000), MODELS)
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
    judge = Judge(Gate(clicks=0), MODELS)
    judge.add(scored(10_000, model=3.0))
    judge.judge(lambda: evidence())
    judge.begin_anew("it is another model")
    assert judge.verdict() == Verdict()
    judge.go_back(Verdict(refused=("an earlier run had a gate",)))
    assert judge.refused == ()


def test_snapshots_are_refused_while_another_model_has_no_verdict() -> None:
    judge = Judge(Gate(clicks=1000), MODELS)
    judge.add(scored(10_000, model=3.0))
    judge.begin_anew("it is another model")
    judge.judge(lambda: None)
    assert list(judge.refused) == ["it is another model"]
    judge.add(scored(10_000))
    judge.judge(lambda: None)
    assert list(judge.refused) == []


def test_a_restored_model_has_the_verdict_of_its_snapshot_and_new_evidence() -> None:
    judge = Judge(Gate(clicks=1000), MODELS)
    judge.add(scored(10_000))
    judge.begin_anew("it is another model")
    judge.add(scored(10_000, model=3.0))
    good = Verdict(evidence=evidence())
    judge.go_back(good)
    assert judge.verdict() == good
    judge.judge(lambda: None)
    assert judge.verdict() == good, "no evidence was collected yet"


def test_a_verdict_carries_the_last_step() -> None:
    judge = Judge(Gate(clicks=1000), MODELS)
    assert judge.verdict(last_step=["a logit was not finite"]).last_step == (
        "a logit was not finite",
    )


def test_a_judge_goes_on_from_its_state() -> None:
    first, second = (Judge(Gate(clicks=1000), MODELS) for _ in range(2))
    first.add(scored(2000, model=3.0))
    second.load_state_dict(first.state_dict(), first.verdict())
    for judge in (first, second):
        judge.add(scored(10_000, model=3.0))
        judge.judge(lambda: evidence())
    assert first.verdict() == second.verdict()
    assert first.refused


def test_the_state_of_a_judge_is_a_copy() -> None:
    judge = Judge(Gate(clicks=1000), MODELS)
    state = judge.state_dict()
    before = {name: array.copy() for name, array in state.items()}
    judge.add(scored(100))
    assert all(np.array_equal(state[name], before[name]) for name in before)
