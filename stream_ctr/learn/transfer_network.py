"""Carry a table and a network over to another run (see `transfer`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import ConfigError
from stream_ctr.events.field_changes import FieldChanges
from stream_ctr.learn.carried import Carried, ModelState
from stream_ctr.learn.shard_files import StoredTable
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.models import MODELS

Array = npt.NDArray[Any]

_DENSE = "dense."
_LAYERS = "dense.deep.layers."
_FM_BIASES = ("dense.bias", "dense.fm.bias")
_PHASE = "dense.network"
_STEPS = "steps"
_SQUARES = ("online", "adagrad")  # the optimisers whose state is the sums of squared gradients
_MOMENTS = ("exp_avg", "exp_avg_sq")


def carry_network(old: ModelState, fresh: ModelState, changes: FieldChanges) -> Carried:
    """Return what a network, or an FM, begins with."""
    said: list[str] = []
    table = _carry_table(old, fresh, changes, said)
    dense, goes_on = _carry_dense(old, fresh, changes, said)
    weights: State = {"table": table, **dense.weights}
    _carry_intercept(old, fresh, weights)
    steps = _steps(old, fresh, weights, goes_on=goes_on)
    return Carried(weights, {_STEPS: steps, **dense.moments}, True, said)


# -- rows ----------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """The columns of a row of the table: V, w, and the state of each."""

    v: slice
    w: slice
    v_state: tuple[slice, ...]
    w_state: tuple[slice, ...]


def _layout(spec: LearnerSpec) -> _Layout:
    embeddings = MODELS[spec.model].embeddings
    width = embeddings * spec.embedding_dim
    v, w, state = slice(0, width), slice(width, width + 1), width + 1
    if spec.table_optimizer in _SQUARES:
        return _Layout(
            v,
            w,
            (slice(state, state + embeddings),),
            (slice(state + embeddings, state + embeddings + 1),),
        )
    starts = (state, state + width + 1)
    return _Layout(
        v,
        w,
        tuple(slice(start, start + width) for start in starts),
        tuple(slice(start + width, start + width + 1) for start in starts),
    )


def _carry_table(
    old: ModelState, fresh: ModelState, changes: FieldChanges, said: list[str]
) -> Array:
    """Return the rows [N, floats] of the table."""
    if isinstance(old.weights["table"], StoredTable):
        return _carry_stored(old, fresh, changes, said)
    before, now = _layout(old.spec), _layout(fresh.spec)
    rows, found = _in_table(old, fresh, said)
    if len(changes.rows):
        found[changes.rows] = False
        said.append(f"{len(changes.rows):,} rows of changed fields begin as in a fresh table")
    same_width = old.spec.embedding_dim == fresh.spec.embedding_dim
    if not same_width:
        said.append(
            f"embeddings begin anew: model.embedding_dim was {old.spec.embedding_dim} and is "
            f"{fresh.spec.embedding_dim}; first-order weights carry over"
        )
    optimizers = old.spec.table_optimizer, fresh.spec.table_optimizer
    same_state = len({*optimizers}) == 1 or {*optimizers} <= {*_SQUARES}
    if not same_state:
        said.append(
            "the optimiser's state of the rows begins anew: learn.table_optimizer was {} "
            "and is {}".format(*optimizers)
        )
    parts = [(before.w, now.w)]
    parts += [(before.v, now.v)] * same_width
    if same_state:
        parts += zip(before.w_state, now.w_state, strict=True)
        parts += [*zip(before.v_state, now.v_state, strict=True)] * same_width
    table = fresh.weights["table"]
    for source, target in parts:
        if found.all():  # the usual case, without an index of every row
            table[:, target] = rows[:, source]
        else:
            table[found, target] = rows[found, source]
    return table


def _carry_stored(
    old: ModelState, fresh: ModelState, changes: FieldChanges, said: list[str]
) -> Array:
    """Return a table of which each rank reads its rows. It carries over as it is, or not at all."""
    bits = old.spec.table_bits
    optimizers = {old.spec.table_optimizer, fresh.spec.table_optimizer}
    if (
        fresh.spec.table_bits != bits
        or _layout(old.spec) != _layout(fresh.spec)
        or not (len(optimizers) == 1 or optimizers <= {*_SQUARES})
        or len(changes.rows)
    ):
        raise ConfigError(
            f"the table of {old.spec.model} does not carry over as it is, and no rank has all of "
            "it: begin without torchrun, and go on with torchrun from the first snapshot"
        )
    said.append(f"the table carries over, 2^{bits} rows")
    return old.weights["table"]


def _in_table(
    old: ModelState, fresh: ModelState, said: list[str]
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the old rows [N, floats] by their places in the new table, and which there are [N]."""
    rows = old.weights["table"]
    was, now = old.spec.table_bits, fresh.spec.table_bits
    if now == was:
        said.append(f"the table carries over, 2^{now} rows")
        return rows, np.ones(1 << now, np.bool_)
    if now > was:
        said.append(
            f"the table carries over from 2^{was} rows to 2^{now}: each row stands at all new rows "
            "with its low bits"
        )
        return np.tile(rows, (1 << (now - was), 1)), np.ones(1 << now, np.bool_)
    candidates = rows.reshape(1 << (was - now), 1 << now, rows.shape[1])
    learned = (candidates[..., _layout(old.spec).w.start :] != 0).any(axis=2)  # w or a state
    chosen = candidates[learned.argmax(axis=0), np.arange(1 << now)]
    others = learned & (candidates != chosen).any(axis=2)
    found = learned.any(axis=0) & ~others.any(axis=0)
    lost = int(learned[:, ~found].sum())
    said.append(
        f"the table carries over from 2^{was} rows to 2^{now}: {int(learned.sum()) - lost:,} rows "
        f"that were learned stay, {lost:,} begin anew because others fall on the same row"
    )
    return chosen, found


# -- the dense part ------------------------------------------------------------------------------


class _Dense:
    """Dense parameters and their moments, those of a fresh model until they are copied."""

    def __init__(self, old: ModelState, fresh: ModelState) -> None:
        self._old = {**old.weights, **old.optimizer}
        self.weights = {name: a for name, a in fresh.weights.items() if name.startswith(_DENSE)}
        self.moments = {name: a for name, a in fresh.optimizer.items() if name != _STEPS}

    def copy(self, name: str) -> None:
        """Take a parameter and its moments from the old model."""
        for each, arrays in self._parts(name):
            arrays[each] = self._old[each]

    def copy_columns(self, name: str, source: npt.NDArray[np.int64]) -> None:
        """Take each column of a weight, and of its moments, from `source`; -1 stands for zeros."""
        known = source >= 0
        for each, arrays in self._parts(name):
            arrays[each] = np.zeros_like(arrays[each])
            arrays[each][:, known] = self._old[each][:, source[known]]

    def fits(self, name: str) -> bool:
        """Return whether the old parameter has the same shape."""
        return name in self._old and self._old[name].shape == self.weights[name].shape

    def _parts(self, name: str) -> Iterator[tuple[str, State]]:
        yield name, self.weights
        for moment in _MOMENTS:
            yield f"{name.removeprefix(_DENSE)}.{moment}", self.moments


def _carry_dense(
    old: ModelState, fresh: ModelState, changes: FieldChanges, said: list[str]
) -> tuple[_Dense, bool]:
    """Return the dense part, and whether its optimiser goes on."""
    dense = _Dense(old, fresh)
    for name in dense.weights:
        if name in _FM_BIASES:
            dense.copy(name)
    if not _layers(dense.weights):
        return dense, True
    if _pretraining(old.weights):
        dense.weights[_PHASE] = old.weights[_PHASE]
        said.append("its pre-training goes on")
        return dense, False
    kept = _carry_layers(old, fresh, changes, dense, said)
    if _PHASE in dense.weights and kept:
        dense.weights[_PHASE] = old.weights[_PHASE]
    elif _PHASE in dense.weights:
        said.append("its pre-training begins anew, because the network does")
    return dense, kept


def _carry_layers(
    old: ModelState, fresh: ModelState, changes: FieldChanges, dense: _Dense, said: list[str]
) -> bool:
    """Carry the layers of the network over, from the first one up; return whether any was."""
    if why := _why_not(old, fresh):
        said.append(f"the network begins anew: {why}")
        return False
    first, *others = _layers(dense.weights)
    source = _sources(old, fresh, changes)
    dense.copy_columns(f"{first}.weight", source)
    dense.copy(f"{first}.bias")
    columns = old.weights[f"{first}.weight"].shape[1]
    if not np.array_equal(source, np.arange(columns)):
        kept = int((source >= 0).sum())
        said.append(
            f"the first layer keeps {kept:,} of its {columns:,} columns; "
            f"{len(source) - kept:,} new ones are zero"
        )
    last = _layers(old.weights)[-1]
    for number, layer in enumerate(others, 2):
        same_place = (layer == last) == (layer == others[-1])
        if not (same_place and dense.fits(f"{layer}.weight")):
            said.append(
                f"the network begins anew from layer {number} on: model.hidden was "
                f"{list(old.spec.hidden)} and is {list(fresh.spec.hidden)}"
            )
            return True
        dense.copy(f"{layer}.weight")
        dense.copy(f"{layer}.bias")
    said.append("the network carries over")
    return True


def _why_not(old: ModelState, fresh: ModelState) -> str:
    """Return why the network cannot carry over, or ""."""
    was, now = (
        MODELS[spec.model].activation if spec.activation == "paper" else spec.activation
        for spec in (old.spec, fresh.spec)
    )
    if was != now:
        return f"model.activation was {was} and is {now}"
    if old.spec.embedding_dim != fresh.spec.embedding_dim:
        return "the embeddings that it reads do"
    if old.spec.hidden[:1] != fresh.spec.hidden[:1]:
        return (
            "its first layer has another width, model.hidden was "
            f"{list(old.spec.hidden)} and is {list(fresh.spec.hidden)}"
        )
    return ""


def _sources(old: ModelState, fresh: ModelState, changes: FieldChanges) -> npt.NDArray[np.int64]:
    """Return the column of the old first layer for each column of the new one, -1 for none."""
    stay = set(changes.stay)
    column = {key: at for at, key in enumerate(_inputs(old)) if key[0] <= stay}
    return np.array([column.get(key, -1) for key in _inputs(fresh)], np.int64)


def _inputs(model: ModelState) -> list[tuple[frozenset[str], int]]:
    """Return the fields that each input of the network comes from, and which of theirs it is."""
    names = [field.name for field in model.schema.fields]
    system = MODELS[model.spec.model]
    k = model.spec.embedding_dim
    each = k + 1 if system.pretraining else k  # FNN reads w too
    inputs = [(frozenset({name}), at) for name in names for at in range(each)]
    if getattr(system.module, "inner", False):
        inputs += [(frozenset(pair), 0) for pair in combinations(names, 2)]
    if getattr(system.module, "outer", False):
        inputs += [(frozenset(), at) for at in range(k * k)]
    return inputs


def _layers(weights: Tensors) -> list[str]:
    """Return the names of the layers of the network, from the first one up."""
    names = {name.rpartition(".")[0] for name in weights if name.startswith(_LAYERS)}
    return sorted(names, key=lambda name: int(name.removeprefix(_LAYERS)))


def _pretraining(weights: Tensors) -> bool:
    return _PHASE in weights and not weights[_PHASE]


# -- the constant of the logit, and the number of steps ------------------------------------------


def _carry_intercept(old: ModelState, fresh: ModelState, weights: State) -> None:
    """Set the constant of the logit, which the online rule keeps apart from the network's bias."""
    layers = _layers(weights)
    from_fm = not layers or _pretraining(weights)
    bias = next(name for name in _FM_BIASES if name in weights) if from_fm else f"{layers[-1]}.bias"
    known = old.weights.get("intercept", np.zeros(2))
    if "intercept" not in fresh.weights:
        weights[bias] = np.asarray(weights[bias] + known[0], np.float32)
        return
    weights["intercept"] = known
    if from_fm and "intercept" not in old.weights:  # the online rule does not read it there
        weights["intercept"] = np.array([float(weights[bias]), 0.0])
        weights[bias] = np.zeros_like(weights[bias])


def _steps(
    old: ModelState, fresh: ModelState, weights: State, *, goes_on: bool
) -> npt.NDArray[np.int64]:
    """Return the number of all steps, of those before the present optimisers, and of examples."""
    steps = old.optimizer[_STEPS]
    if _pretraining(weights) and _pretraining(old.weights):  # it ends after so many examples
        return steps
    lazy_adam = old.spec.table_optimizer == fresh.spec.table_optimizer == "adam"
    if _pretraining(weights) or not (goes_on or lazy_adam):
        return np.zeros_like(steps)
    return steps
