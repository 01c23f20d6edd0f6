"""Begin a run with the weights of another run's snapshot, under another configuration.

Models are matched by their names; the logistic regression is `lr` or `ftrl`. What they carry over
is decided in `learn.transfer`. Everything else begins anew: positions, pending impressions,
metrics, verdicts and the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_ctr.errors import ConfigError
from stream_ctr.events.field_changes import compare_fields, crosses_said
from stream_ctr.learn.carried import Carried, ModelState
from stream_ctr.learn.learner import Learner
from stream_ctr.learn.transfer import carry_over
from stream_ctr.learn.transfer_blend import BlendState, carry_blend
from stream_ctr.learn.transfer_linear import carry_river
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest, RunIdentity
from stream_ctr.train.sampled_baseline import SampledBaseline
from stream_ctr.train.state import TrainingState

_TWINS = {"lr": "ftrl", "ftrl": "lr"}
_RIVER_RATES = ("alpha", "beta", "l1", "l2", "intercept_learning_rate")
_SHOWN_VALUE = 60


def stems(manifest: Manifest) -> list[str]:
    """Return the stems of the files that `begin_from` reads, of those that the snapshot has."""
    names = [None, *manifest.beside]
    wanted = [*(stem for name in names for stem in snapshot.stems(name)), "baseline"]
    return [stem for stem in wanted if snapshot.file_name(stem) in manifest.files]


def begin_from(
    manifest: Manifest,
    tensors: snapshot.Tensors,
    identity: RunIdentity,
    state: TrainingState,
    baseline: SampledBaseline | None = None,
) -> list[str]:
    """Give the models of a new run what they know from a snapshot; return what was carried over.

    Raises `ConfigError` if no model carries over.
    """
    said = [*_configuration_said(manifest.config, identity.config)]
    changes = compare_fields(manifest.schema, identity.schema)
    said += changes.sentences
    said += crosses_said(manifest.schema, identity.schema, changes)
    known: dict[str, str] = {}
    for name, learner in state.learners.items():
        former = _former(name, manifest)
        carried = _carry_model(manifest, tensors, former, identity, name, learner)
        said += [f"{name}: {sentence}" for sentence in carried.sentences]
        if carried.knows:
            assert former
            known[name] = former
            learner.load_weights(carried.weights)
            learner.load_optimizer_state(carried.optimizer)
    said += [
        f"{name}: gone, this run has no such model"
        for name in manifest.specs
        if name not in known.values() and name not in state.learners
    ]
    if not known:
        raise ConfigError(
            f"nothing of snapshot {manifest.snapshot} carries over: {'; '.join(said)}"
        )
    if state.blend:
        said += _carry_blend(manifest, tensors, state, known)
    if baseline:
        said += _carry_river(manifest, tensors, identity, baseline)
    return said


def _former(name: str, manifest: Manifest) -> str | None:
    """Return the name that a model had in the run of a snapshot, None if it is new."""
    names = (name, _TWINS.get(name, name))
    return next((each for each in names if each in manifest.specs), None)


def _carry_model(
    manifest: Manifest,
    tensors: snapshot.Tensors,
    former: str | None,
    identity: RunIdentity,
    name: str,
    learner: Learner,
) -> Carried:
    if former is None:
        return Carried({}, {}, False, ["begins anew: the snapshot has no such model"])
    weights, optimizer = snapshot.stems(None if former == manifest.published else former)
    if weights not in tensors:
        return Carried({}, {}, False, ["begins anew: it was left out of the snapshot"])
    return carry_over(
        ModelState(manifest.schema, manifest.specs[former], tensors[weights], tensors[optimizer]),
        ModelState(
            identity.schema,
            identity.specs[name],
            learner.weights(reuse=True),
            learner.optimizer_state(),
        ),
    )


def _carry_blend(
    manifest: Manifest, tensors: snapshot.Tensors, state: TrainingState, known: Mapping[str, str]
) -> list[str]:
    assert state.blend
    old = None
    if manifest.blend:
        weights, optimizer = snapshot.stems()
        old = BlendState(manifest.blend, tensors[weights], tensors[optimizer])
        known = {name: former for name, former in known.items() if former in manifest.blend}
    fresh = BlendState(state.blend.members, state.blend.weights(), state.blend.optimizer_state())
    carried = carry_blend(old, fresh, known)
    state.blend.load_weights(carried.weights)
    state.blend.load_optimizer_state(carried.optimizer)
    return [f"blend: {sentence}" for sentence in carried.sentences]


def _carry_river(
    manifest: Manifest,
    tensors: snapshot.Tensors,
    identity: RunIdentity,
    baseline: SampledBaseline,
) -> list[str]:
    if "baseline" not in tensors:
        return [f"{baseline.name}: begins anew: the snapshot has none"]
    rates = [
        [getattr(each.baseline, name) for name in _RIVER_RATES] for each in (manifest, identity)
    ]
    carried, sentence = carry_river(
        tensors["baseline"], manifest.schema, identity.schema, same_rates=rates[0] == rates[1]
    )
    if carried:
        baseline.load_state_dict(carried)
    return [f"{baseline.name}: {sentence}"]


def _configuration_said(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return a sentence for each key of the configuration that has another value."""
    return [
        f"configuration: {section}.{key} was {before[section].get(key)!r:.{_SHOWN_VALUE}} "
        f"and is {value!r:.{_SHOWN_VALUE}}"
        for section, values in now.items()
        for key, value in values.items()
        if section in before and before[section].get(key) != value
    ]
