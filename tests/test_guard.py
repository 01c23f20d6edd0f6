"""The guard as a table: what a learner does with each batch, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.manifests import manifest

from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.evaluate.gate import Verdict
from stream_ctr.join.examples import Examples
from stream_ctr.learn.touched import Touched
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import AdditionalGuardState, GuardState
from stream_ctr.train.guard import Diverged, Guard, Learned, Skipped

SIZE = 4
BAD = 1  # an example with this label has no finite logit where a batch is "partly" good


class ScriptedLearner:
    """A learner that does with each batch what a script says, and keeps one weight.

    `good` learns all of a batch, `bad` nothing, `partly` the examples whose label is not BAD, as a
    network does; `each` learns these too but returns NaN for the others, as LR does.
    """

    batch_size = SIZE

    def __init__(self, script: Sequence[str] = ()) -> None:
        self.script = list(script)
        self.weight = 0.0
        self.steps = 0
        self.restored = 0
        self.touched: Touched | None = None
        self.pretraining = False
        self.ends_pretraining_at = -1
        self.after: float | None = None  # the logit of every example after the last step
        self._doing = ""

    def learn(
        self,
        ids: npt.NDArray[np.int32],
        labels: npt.NDArray[np.uint8],
        values: object = None,
        *,
        following: object = None,
    ) -> torch.Tensor | None:
        retry = self._doing == "partly"
        self._doing = "good" if retry else self.script.pop(0)
        if self._doing in ("bad", "partly"):
            return None
        self.steps += 1
        if self.steps == self.ends_pretraining_at:
            self.pretraining = False
        logits = np.full(len(ids), 0.5)
        if self._doing == "each":
            logits[labels == BAD] = np.nan
        return torch.from_numpy(logits)

    def predict(self, ids: npt.NDArray[np.int32], values: object = None) -> npt.NDArray[np.float64]:
        if self.after is not None:
            return np.full(len(ids), self.after)
        logits = np.full(len(ids), np.nan if self._doing == "bad" else 0.5)
        if self._doing == "partly":
            logits[ids[:, 0] == BAD] = np.nan
        return logits

    def weights(self, *, reuse: bool = False) -> dict[str, npt.NDArray[Any]]:
        return {"weight": np.array([self.weight])}

    def shards(self) -> None:
        return None

    def optimizer_state(self) -> dict[str, npt.NDArray[Any]]:
        return {"pretraining": np.array([self.pretraining])}

    def load_weights(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        if weights.keys() != {"weight"}:
            raise ValueError("tensor 'weight' is missing")
        self.weight = float(weights["weight"][0])

    def track_touched(self) -> None:
        raise AssertionError("a guard takes no changes")

    def take_changes(self) -> dict[str, npt.NDArray[Any]]:
        raise AssertionError("a guard takes no changes")

    def track_changes(self) -> None:
        raise AssertionError("a guard copies no weights")

    def copy_weights_to(self, other: Any) -> None:
        raise AssertionError("a guard copies no weights")

    def load_optimizer_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        self.pretraining = bool(state["pretraining"][0])


def batch(*labels: int) -> Examples:
    """Examples whose id is their label, so that `predict` sees it too."""
    label = np.array(labels or (0,) * SIZE, np.uint8)
    number = np.arange(len(label))
    return Examples(
        id_hash=number.astype(np.uint64),
        time=number,
        ids=label[:, None].astype(np.int32),
        values=np.zeros((len(label), 0), np.float32),
        label=label,
        true_probability=np.full(len(label), np.nan),
        closed_ms=number,
    )


def guard(
    script: Sequence[str] = (), *, skips: int = 3, additional: str | None = None
) -> tuple[Guard, ScriptedLearner, Counter[str]]:
    learner = ScriptedLearner(script)
    counters: Counter[str] = Counter()
    made = Guard(learner, counters, skips_before_rollback=skips, additional=additional)
    return made, learner, counters


def written(
    root: Path, *, weight: float, examples: int = 0, pretraining: bool = False, **changes: Any
) -> Path:
    """A snapshot of the published model and of an additional one, `fm`."""
    learner = ScriptedLearner()
    learner.weight = weight
    learner.pretraining = pretraining
    state = {"weights": learner.weights(), "optimizer": learner.optimizer_state()}
    return snapshot.write(
        root,
        tensors={
            "model": state["weights"],
            "optimizer": state["optimizer"],
            "fm.model": state["weights"],
            "fm.optimizer": state["optimizer"],
        },
        manifest=manifest(examples=examples, **changes),
    )


# -- the states ----------------------------------------------------------------------------------

G, B = "good", "bad"
TABLE = [
    # script, outcome of the last batch, batches skipped in all
    ([G], Learned, 0),
    ([B], Skipped, 1),
    ([B, B], Skipped, 2),
    ([B, B, B], Diverged, 3),  # the third in a row
    ([B, B, G], Learned, 2),
    ([B, B, G, B, B], Skipped, 4),  # a learned batch ends the row
    ([B, B, G, B, B, B], Diverged, 5),
    (["partly"], Learned, 0),
    ([B, B, "partly", B], Skipped, 3),  # part of a batch is enough to end the row
    (["each"], Learned, 0),
]


@pytest.mark.parametrize(("script", "outcome", "skipped"), TABLE)
def test_a_batch_is_learned_skipped_or_the_model_has_diverged(
    script: list[str], outcome: type, skipped: int
) -> None:
    made, _, counters = guard(script)
    for _ in script:
        last = made.learn(batch(0, BAD, 0, 0))
    assert isinstance(last, outcome)
    assert counters["batches_skipped"] == skipped


def test_examples_without_a_finite_logit_are_skipped_and_the_others_learned() -> None:
    for script in ("partly", "each"):
        made, _, counters = guard([script])
        learned = made.learn(batch(0, BAD, 0, BAD))
        assert isinstance(learned, Learned)
        assert learned.kept is not None
        assert learned.kept.tolist() == [True, False, True, False]
        assert learned.logits.tolist() == [0.5, 0.5]
        assert counters == {"examples_skipped": 2}


def test_a_batch_without_any_finite_example_is_skipped_whole() -> None:
    for script in ("partly", "each"):
        made, _, counters = guard([script])
        assert made.learn(batch(BAD, BAD)) == Skipped()
        assert counters == {"examples_skipped": 2, "batches_skipped": 1}


def test_a_bad_batch_whose_logits_are_finite_is_skipped_whole() -> None:
    """The gradient explodes: no part of the batch is known to be good."""
    made, learner, counters = guard(["partly"])
    assert made.learn(batch(0, 0)) == Skipped()
    assert counters == {"examples_skipped": 2, "batches_skipped": 1}
    assert learner.steps == 0


def test_diverged_says_how_many_batches_were_skipped() -> None:
    made, _, _ = guard([B, B], skips=2)
    made.learn(batch())
    assert made.learn(batch()) == Diverged("2 batches in a row had no finite loss and gradient")


def test_counters_of_an_additional_model_carry_its_name() -> None:
    made, _, counters = guard([B], additional="fm")
    made.learn(batch())
    assert counters == {"examples_skipped.fm": SIZE, "batches_skipped.fm": 1}


# -- going back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("additional", [None, "fm"])
def test_restore_gives_the_model_back_and_counts_what_is_unlearned(
    tmp_path: Path, additional: str | None
) -> None:
    made, learner, counters = guard([G], additional=additional)
    path = written(tmp_path, weight=7.0, examples=100)
    made.learn(batch())
    assert made.restore(path, "why", trained=130) is None
    assert learner.weight == 7.0
    suffix = f".{additional}" if additional else ""
    assert counters == {f"rollbacks{suffix}": 1, f"examples_unlearned{suffix}": 30}


def test_the_row_of_skipped_batches_begins_anew_after_a_restore(tmp_path: Path) -> None:
    path = written(tmp_path, weight=1.0)
    made, _, _ = guard([B, B, B, B, B])
    outcomes = [made.learn(batch()) for _ in range(3)]
    made.restore(path, "why", trained=0)
    outcomes += [made.learn(batch()) for _ in range(2)]
    assert list(map(type, outcomes)) == [Skipped, Skipped, Diverged, Skipped, Skipped]


def test_a_fourth_rollback_before_the_model_recovered_ends_the_run(tmp_path: Path) -> None:
    path = written(tmp_path, weight=1.0)
    made, _, _ = guard([G] * 400)
    for _ in range(3):
        made.restore(path, "why", trained=0)
        for _ in range(99):  # not recovered: that takes a hundred
            made.learn(batch())
    with pytest.raises(DataError, match=f"going back to {path.name} did not help 3 times"):
        made.restore(path, "why", trained=0)


def test_a_hundred_learned_batches_in_a_row_are_a_recovery(tmp_path: Path) -> None:
    path = written(tmp_path, weight=1.0)
    made, _, _ = guard([G] * 100 + [B] + [G] * 99)
    for _ in range(3):
        made.restore(path, "why", trained=0)
    for _ in range(100):
        made.learn(batch())
    for _ in range(3):  # as many as at first
        made.restore(path, "why", trained=0)
    with pytest.raises(DataError, match="did not help 3 times"):
        made.restore(path, "why", trained=0)


def test_batches_before_a_rollback_do_not_count_towards_recovery(tmp_path: Path) -> None:
    """A model that learns 60 batches, diverges and learns 60 more has not recovered."""
    path = written(tmp_path, weight=1.0)
    made, _, _ = guard([G] * 300)
    for _ in range(3):
        for _ in range(60):
            made.learn(batch())
        made.restore(path, "why", trained=0)
    with pytest.raises(DataError, match="did not help 3 times"):
        made.restore(path, "why", trained=0)


def test_without_a_snapshot_there_is_nothing_to_go_back_to() -> None:
    made, _, counters = guard()
    with pytest.raises(DataError, match=r"^the model diverged: why, and there is no snapshot"):
        made.restore(None, "why", trained=0)
    assert not counters


def test_a_snapshot_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = snapshot.write(
        tmp_path,
        tensors={"model": {"odd": np.zeros(1)}, "optimizer": {"pretraining": np.zeros(1)}},
        manifest=manifest(),
    )
    made, _, _ = guard()
    with pytest.raises(SnapshotError, match=f"{path.name} does not fit the model: .*missing"):
        made.restore(path, "why", trained=0)


def test_going_back_into_the_pre_training_returns_the_verdict_of_that_time(tmp_path: Path) -> None:
    verdict = Verdict(refused=("too bad",))
    path = written(tmp_path, weight=1.0, pretraining=True, gate=verdict)
    made, learner, _ = guard()
    assert made.restore(path, "why", trained=0) == verdict
    assert made.restore(path, "again", trained=0) is None  # it was in it already
    assert learner.pretraining


# -- the last step -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "reasons"),
    [
        (0.5, 0),
        (1.5, 0),  # worse, by less than twice the loss
        (4.0, 1),
        (np.nan, Diverged("after its last step it predicts values that are not finite")),
    ],
)
def test_the_last_step_is_checked_on_its_own_batch(after: float, reasons: int | Diverged) -> None:
    made, learner, _ = guard([G])
    made.learn(batch())
    learner.after = after
    found = made.check_last_step()
    if isinstance(reasons, Diverged):
        assert found == reasons
    else:
        assert len(found) == reasons


def test_a_last_step_that_worsened_says_from_where_to_where() -> None:
    made, learner, _ = guard([G])
    made.learn(batch())
    learner.after = 4.0
    (reason,) = made.check_last_step()
    assert reason == "its last step took the logloss of its own examples from 0.974 to 4.02"


def test_a_last_step_that_ended_the_pre_training_is_told_apart() -> None:
    made, learner, _ = guard([G])
    learner.pretraining = True
    learner.ends_pretraining_at = 1
    learned = made.learn(batch())
    assert isinstance(learned, Learned)
    assert learned.ends_pretraining
    learner.after = 4.0
    (reason,) = made.check_last_step()
    assert "its last step ended its pre-training" in reason


def test_a_step_after_the_pre_training_ends_nothing() -> None:
    made, learner, _ = guard([G, G])
    learner.pretraining = True
    learner.ends_pretraining_at = 1
    outcomes = [made.learn(batch()), made.learn(batch())]
    assert [isinstance(each, Learned) and each.ends_pretraining for each in outcomes] == [
        True,
        False,
    ]


def test_a_resumed_run_has_the_last_step_of_its_snapshot_until_it_takes_one(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, weight=1.0)
    _, tensors = snapshot.load(path)
    made, _, _ = guard([G])
    made.load_model(tensors, path, last_step=("it was bad",))
    assert made.check_last_step() == ("it was bad",)
    made.learn(batch())
    assert made.check_last_step() == ()


def test_after_a_restore_there_is_no_last_step(tmp_path: Path) -> None:
    path = written(tmp_path, weight=1.0)
    made, learner, _ = guard([G])
    made.learn(batch())
    learner.after = 4.0
    assert made.check_last_step()
    made.restore(path, "why", trained=0)
    assert made.check_last_step() == ()


# -- state ---------------------------------------------------------------------------------------


def test_the_counts_of_a_row_survive_a_snapshot() -> None:
    made, _, _ = guard([G, G, B, B])
    for _ in range(4):
        made.learn(batch())
    assert made.state() == GuardState(skipped=2, learned=2, rollbacks=0)
    resumed, _, _ = guard([B])
    resumed.load_state(made.state())
    assert isinstance(resumed.learn(batch()), Diverged)


def test_a_model_that_is_left_out_learns_nothing_and_stays_so() -> None:
    made, learner, counters = guard([G], additional="fm")
    made.leave_out(DataError("it diverged"))
    assert made.learn(batch()) == Skipped()
    assert made.check_last_step() == ()
    assert (learner.steps, counters) == (0, {"left_out.fm": 1})
    assert made.additional_state() == AdditionalGuardState(left_out="it diverged")
    resumed, _, _ = guard([G], additional="fm")
    resumed.load_state(made.additional_state())
    assert resumed.left_out == "it diverged"
