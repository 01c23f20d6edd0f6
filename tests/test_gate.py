"""A snapshot that is worse than what subscribers have is not published, and noise is not taken for worse."""

from __future__ import annotations

import numpy as np
import pytest

from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.gate import Gate, Judge, evidence

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
    """n examples whose logits are known; `model`, `baseline` and `ftrl` are added to what each predicts."""
    rng = np.random.default_rng(seed)
    true = rng.normal(np.log(rate / (1 - rate)), 1.0, n)
    labels = (rng.random(n) < metrics.probabilities(true)).astype(np.uint8)
    chosen = rng.random(n) < share
    logits = {"deepfm": true + model, "ftrl": true + ftrl, "river_ftrl": (true + baseline)[chosen]}
    return metrics.Scored(np.arange(n), labels, np.full(n, np.nan), logits, {"river_ftrl": chosen})


def told(**shifts: float) -> dict[str, object]:
    tally = metrics.Tally(MODELS)
    tally.add(scored(20_000, **shifts))
    return evidence(tally, BASELINE)


def test_the_evidence_is_what_the_scores_say_on_the_examples_that_both_models_scored():
    tally, part = metrics.Tally(MODELS), scored(20_000, share=0.5)
    tally.add(part)
    chosen = part.bin[2] >= 0
    assert 0 < chosen.sum() < 20_000
    said = evidence(tally, BASELINE)
    assert said["logloss"] == pytest.approx(part.loss[0, chosen].mean())
    assert said["baseline_logloss"] == pytest.approx(part.loss[2, chosen].mean())
    assert said["clicks"] == (part.bin[0] >= metrics.BINS).sum()
    alone = evidence(tally, None)
    assert alone["logloss"] == pytest.approx(part.loss[0].mean())
    assert (alone["baseline_logloss"], alone["baseline_calibration"]) == (None, None)


def test_a_model_as_good_as_before_passes_also_when_traffic_becomes_harder_for_all():
    before, harder = told(), told(rate=0.45, seed=1)
    assert harder["logloss"] > 1.2 * before["logloss"]
    assert Gate().refusals(harder, before) == []


@pytest.mark.parametrize(
    ("shifts", "reason"),
    [
        ({"model": 2.0}, "above the baseline's"),
        ({"model": 2.0}, "above that of the published"),
        ({"model": -0.5}, "times the clicks that came"),
    ],
)
def test_a_model_that_is_worse_is_refused_and_told_why(shifts, reason):
    assert any(reason in refusal for refusal in Gate().refusals(told(**shifts), told()))


def test_a_model_that_lost_its_lead_is_refused_though_it_is_as_good_as_the_baseline():
    lead = told(baseline=1.5)
    assert Gate().refusals(told(), told()) == []
    assert any("published" in refusal for refusal in Gate(calibration=9).refusals(told(), lead))


def test_without_a_baseline_the_published_snapshot_is_the_measure():
    alone = {"baseline_logloss": None, "baseline_calibration": None}
    before, worse = {**told(), **alone}, {**told(model=1.0), **alone}
    assert Gate().refusals(before, before) == Gate().refusals(before, None) == []
    reasons = Gate().refusals(worse, before)
    assert "normalised entropy" in reasons[0]
    assert "the published one 1.0" in reasons[1]


def test_a_verdict_waits_for_clicks_enough_and_then_begins_anew():
    judge = Judge(Gate(clicks=1000), MODELS, BASELINE)
    judge.add(scored(1000, model=3.0))
    judge.judge(lambda: None)
    assert judge.refused == []
    judge.add(scored(10_000, model=3.0))
    judge.judge(lambda: None)
    assert judge.refused
    judge.add(scored(1000))
    judge.judge(lambda: None)
    assert judge.refused, "no evidence of the contrary yet"
    judge.add(scored(10_000))
    judge.judge(lambda: None)
    assert judge.refused == []


def test_a_judge_of_a_model_that_went_back_has_the_verdict_of_that_time_and_begins_anew():
    judge = Judge(Gate(clicks=1000), MODELS, BASELINE)
    judge.add(scored(10_000))
    judge.begin_anew("it is another model")
    judge.add(scored(10_000, model=3.0))
    good = {"evidence": {"logloss": 0.3}, "refused": []}
    judge.go_back(good)
    assert judge.told() == good
    judge.judge(lambda: None)
    assert judge.told() == good, "nothing is gathered yet"


def test_a_judge_goes_on_from_its_state():
    one, other = (Judge(Gate(clicks=1000), MODELS, BASELINE) for _ in range(2))
    one.add(scored(2000, model=3.0))
    other.load_state_dict(one.state_dict(), one.told())
    for judge in (one, other):
        judge.add(scored(10_000, model=3.0))
        judge.judge(told)
    assert one.told() == other.told()
    assert one.refused
