"""A served model after updates is the model that a snapshot at the same place would give."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import own_models
from support.dense import examples
from support.updates import first_weights, random_changes, served_spec

from stream_ctr import extensions
from stream_ctr.errors import ConfigError
from stream_ctr.learn.blend import Blend, BlendPredictor
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.runtimes import RUNTIMES, Runtime, make_predictor
from stream_ctr.learn.served_weights import served_weights, serving_sha256
from stream_ctr.learn.spec import SYSTEMS, LearnerSpec
from stream_ctr.learn.tensors import State
from stream_ctr.learn.torch_predictor import ServedLearner
from stream_ctr.models.registered import register_model

MODELS = (*SYSTEMS, "lr_pairs")
Floats = npt.NDArray[np.floating]


def logits(model: Any, spec: LearnerSpec, n: int = 75) -> Floats:
    """Return the logits of the same examples each time, more than a batch of them."""
    found: Floats = model.predict(*examples(spec, n))
    return found


def learn(learner: Any, spec: LearnerSpec, *, seed: int) -> None:
    ids, values = examples(spec, 30, seed=seed)
    assert learner.learn(ids, (np.arange(30) % 3 == 0).astype(np.uint8), values) is not None


# -- from the learner to the server ----------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("model", "options"),
    [
        *((model, {}) for model in MODELS),
        ("deepfm", {"table_optimizer": "adagrad"}),
        ("fm_dnn", {"table_optimizer": "adam"}),
        ("deepfm", {"precision": "bf16"}),
        ("fnn", {"pretrain_examples": 50}),
        ("pnn", {"value_fields": []}),
    ],
    ids=str,
)
def test_changes_of_a_learner_give_the_server_what_its_weights_would(
    model: str, options: dict[str, Any], runtime: Runtime
) -> None:
    spec = served_spec(model, **options)
    learner = make_learner(spec, device="cpu", threads=2)
    if "pretrain_examples" not in options:  # its phase is among its weights
        learner.load_weights(first_weights(spec))
    learner.track_touched()
    before = make_predictor(spec, learner.weights(), runtime=runtime)
    old = logits(before, spec)
    for seed in range(3):
        learn(learner, spec, seed=seed)
        after = before.updated(learner.take_changes())
        there = make_predictor(spec, learner.weights(), runtime=runtime)
        found, expected = logits(after, spec), logits(there, spec)
        assert found.tolist() == expected.tolist() != old.tolist()
        assert logits(before, spec).tolist() == old.tolist()
        assert not after.absorb()
        assert serving_sha256(after.served()) == serving_sha256(there.served())
        before, old = after, found
        del after
        assert before.absorb()
        assert logits(before, spec).tolist() == old.tolist()
        digest = serving_sha256(served_weights(spec, learner.weights()))
        assert serving_sha256(before.served()) == digest


def test_a_model_of_another_package_is_updated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_registered", {})
    for model in (own_models.Gated, own_models.OwnDeepFM):
        spec = served_spec(register_model(model), table_optimizer="adagrad", crosses=0)
        learner = make_learner(spec, device="cpu")
        learner.track_touched()
        before = make_predictor(spec, learner.weights(), runtime="torch")
        old = logits(before, spec).tolist()
        learn(learner, spec, seed=0)
        after = before.updated(learner.take_changes())
        there = make_predictor(spec, learner.weights(), runtime="torch")
        assert logits(after, spec).tolist() == logits(there, spec).tolist() != old
        assert logits(before, spec).tolist() == old


# -- any order of updates --------------------------------------------------------------------------

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["update", "update", "absorb", "drop"]), st.integers(0, 999)),
    max_size=8,
)


def require_equal_to_new_ones(
    weights: Any,
    actions: list[tuple[str, int]],
    change: Callable[[Any, int], tuple[Any, Any]],
    build: Callable[[Any], Any],
    spec: LearnerSpec,
) -> None:
    """Compare each model that is alive with one that is built of its weights, after each action."""
    alive = [(build(weights), weights)]
    for action, number in actions:
        index = number % len(alive)
        if action == "update":
            changes, after = change(alive[index][1], number)
            alive.append((alive[index][0].updated(changes), after))
        elif action == "absorb":
            assert alive[index][0].absorb() or len(alive) > 1
        elif len(alive) > 1:
            del alive[index]
        for each, expected in alive:
            assert logits(each, spec).tolist() == logits(build(expected), spec).tolist()
        del each  # a model that is held cannot be absorbed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "runtime"),
    [
        *((model, runtime) for model in ("deepfm", "fnn") for runtime in RUNTIMES),
        ("lr", "torch"),
        ("lr_pairs", "torch"),
    ],
)
@settings(max_examples=15)
@given(actions=ACTIONS)
def test_any_updates_and_absorptions_equal_a_model_that_is_built_anew(
    model: str, runtime: Runtime, actions: list[tuple[str, int]]
) -> None:
    spec = served_spec(model)
    weights = first_weights(spec)
    require_equal_to_new_ones(
        weights,
        actions,
        lambda weights, seed: random_changes(spec, weights, seed=seed),
        lambda weights: make_predictor(spec, weights, runtime=runtime),
        spec,
    )


MEMBERS = {name: served_spec(name) for name in ("deepfm", "lr", "lr_pairs")}
MIXTURE = {"omega": np.array([0.4, 0.3, 0.2, 0.1]), "u": np.array([0.5, 0.3, 0.1, -0.5])}


def blend_of(weights: dict[str, State], runtime: Runtime) -> BlendPredictor:
    blend = Blend(list(MEMBERS))
    blend.load_weights(weights[""])
    members = {
        name: make_predictor(spec, weights[name], runtime=runtime)
        for name, spec in MEMBERS.items()
        if name in weights
    }
    return BlendPredictor(blend, members)


def blend_weights() -> dict[str, State]:
    return {"": MIXTURE, **{name: first_weights(spec) for name, spec in MEMBERS.items()}}


def change_blend(weights: dict[str, State], seed: int) -> tuple[dict[str, State], dict[str, State]]:
    """Change some of the members, and the mixture of every other blend."""
    rng = np.random.default_rng(seed)
    names = [name for name in MEMBERS if name in weights and rng.random() < 0.6]
    made = {
        name: random_changes(MEMBERS[name], weights[name], seed=seed + at)
        for at, name in enumerate(names)
    }
    changes = {name: each[0] for name, each in made.items()}
    after = {**weights, **{name: each[1] for name, each in made.items()}}
    if seed % 2:
        omega = rng.dirichlet(np.ones(4))
        changes[""] = after[""] = {"omega": omega, "u": rng.normal(size=4)}
    return changes, after


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=12)
@given(actions=ACTIONS)
def test_any_updates_of_a_blend_equal_a_blend_that_is_built_anew(
    runtime: Runtime, actions: list[tuple[str, int]]
) -> None:
    weights = blend_weights()
    require_equal_to_new_ones(
        weights,
        actions,
        change_blend,
        lambda weights: blend_of(weights, runtime),
        MEMBERS["deepfm"],
    )


def test_a_member_without_changes_stays_and_one_that_was_absent_stays_absent() -> None:
    weights = blend_weights()
    del weights["lr"]
    blend = blend_of(weights, "torch")
    changes, after = random_changes(MEMBERS["deepfm"], weights["deepfm"], seed=0)
    updated = blend.updated({"deepfm": changes})
    assert updated.members.keys() == blend.members.keys() == {"deepfm", "lr_pairs"}
    assert updated.members["lr_pairs"] is blend.members["lr_pairs"]
    expected = blend_of({**weights, "deepfm": after}, "torch")
    assert (
        logits(updated, MEMBERS["deepfm"]).tolist() == logits(expected, MEMBERS["deepfm"]).tolist()
    )
    absent = random_changes(MEMBERS["lr"], first_weights(MEMBERS["lr"]), seed=0)[0]
    for odd in ("lr", "fm"):
        with pytest.raises(ValueError, match=f"the blend has no member '{odd}' that serves"):
            updated.updated({"deepfm": changes, odd: absent})
    assert updated.served().keys() == {"omega", "u"}


def test_a_blend_changes_all_of_its_members_or_none() -> None:
    weights = blend_weights()
    blend = blend_of(weights, "torch")
    before = logits(blend, MEMBERS["deepfm"]).tolist()
    good = random_changes(MEMBERS["deepfm"], weights["deepfm"], seed=0)[0]
    odd_ones: list[dict[str, State]] = [{"lr": {}}, {"": {**MIXTURE, "omega": np.ones(4)}}]
    for odd in odd_ones:
        with pytest.raises(ValueError, match="is missing|sum to 1"):
            blend.updated({"deepfm": good, **odd})
    assert logits(blend, MEMBERS["deepfm"]).tolist() == before
    assert blend.absorb()


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("model", ["deepfm", "lr"])
def test_changes_that_do_not_fit_change_nothing(model: str, runtime: Runtime) -> None:
    spec = served_spec(model)
    weights = first_weights(spec)
    predictor = make_predictor(spec, weights, runtime=runtime)
    before = logits(predictor, spec).tolist()
    changes = random_changes(spec, weights, seed=0)[0]
    odd = {**changes, "values": np.full_like(changes["values"], np.nan)}
    with pytest.raises(ValueError, match="not finite"):
        predictor.updated(odd)
    assert logits(predictor, spec).tolist() == before
    assert predictor.absorb()


def test_no_rows_change_the_rest() -> None:
    spec = served_spec("deepfm")
    weights = first_weights(spec)
    changes, after = random_changes(spec, weights, seed=0, share=0.0)
    assert len(changes["rows"]) == 0
    updated = make_predictor(spec, weights, runtime="torch").updated(changes)
    assert updated.absorb()
    expected = make_predictor(spec, after, runtime="torch")
    assert logits(updated, spec).tolist() == logits(expected, spec).tolist()


# -- while predictions go on -----------------------------------------------------------------------

UPDATES = 200


class Watched:
    """A model that is replaced while a thread predicts with it without a pause."""

    def __init__(self, model: Any, ids: npt.NDArray[np.int32], values: Any) -> None:
        self.model = model
        self._ids = ids
        self._values = values
        self.seen: list[set[float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._predict)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _predict(self) -> None:
        while not self._stop.is_set():
            self.seen.append({*self.model.predict(self._ids, self._values).tolist()})


def all_of_version(spec: LearnerSpec, weights: State, version: int) -> Iterator[State]:
    """Yield changes to every row, then to half of the rows, by which a logit tells the version.

    The changes to half of the rows hold what these rows have already.
    """
    if spec.model == "lr":
        rest: State = {"intercept": np.array([1000.0 * version])}
        values = np.full(1 << spec.table_bits, version, np.float32)
    else:
        rest = {
            name: np.zeros_like(array) for name, array in weights.items() if name[:5] == "dense"
        }
        rest["intercept"] = np.array([1000.0 * version], np.float32)
        values = np.zeros((1 << spec.table_bits, 6), np.float32)
        values[:, -1] = version
    rows = np.arange(len(values), dtype=np.uint32)
    yield {"rows": rows, "values": values, **rest}
    yield {"rows": rows[::2], "values": values[::2], **rest}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "runtime"), [("deepfm", "torch"), ("deepfm", "onnx"), ("lr", "torch")]
)
def test_a_prediction_during_updates_sees_one_version(model: str, runtime: Runtime) -> None:
    spec = served_spec(model, value_fields=[], table_bits=12, batch_size=256)
    weights = first_weights(spec)
    start = next(all_of_version(spec, weights, 0))
    ids, values = examples(spec, 5000)
    model_now = make_predictor(spec, weights, runtime=runtime).updated(start)
    assert model_now.absorb()
    with Watched(model_now, ids, values) as watched:
        del model_now
        for version in range(1, UPDATES // 2 + 1):
            for changes in all_of_version(spec, weights, version):
                watched.model = watched.model.updated(changes)
            while version % 2 and not watched.model.absorb():
                time.sleep(0.001)  # an older version predicts
    whole = {float((spec.fields + 1000) * version) for version in range(UPDATES // 2 + 1)}
    assert all(len(seen) == 1 for seen in watched.seen)
    assert {logit for seen in watched.seen for logit in seen} <= whole
    assert len({logit for seen in watched.seen for logit in seen}) > 5


def test_a_gpu_does_not_follow_deltas() -> None:
    spec = served_spec("fm")
    weights = first_weights(spec)
    served = ServedLearner(spec, weights, device="cpu")
    assert logits(served, spec) == pytest.approx(
        logits(make_predictor(spec, weights, runtime="torch"), spec), abs=1e-5
    )
    with pytest.raises(ConfigError, match="a model on a GPU does not follow deltas: serve on the"):
        served.updated(random_changes(spec, weights, seed=0)[0])
    assert served.absorb()
    digest = serving_sha256(served_weights(spec, weights))
    assert serving_sha256(served.served()) == digest
