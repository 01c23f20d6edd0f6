"""Carry the weights of one run over to a run with another configuration.

A weight means the same in both runs if it is read for the same values of the same fields:

    rows            A row is found by the hash of a field's name and value, cut to `table_bits`.
                    With the same hash seed it stays, whichever fields came or went. A larger table
                    has each old row at every new row with the same low bits. In a smaller one
                    several old rows meet; one carries over if no other was learned.
    first layer     Its columns are inputs: coordinates of the embedding of a field, products of
                    two fields, or outer products. Columns of fields that stay keep their weights.
                    Those of new fields are zero, so the network does not see them yet.
    other layers    The units of the layer below are their inputs. A layer stays if its shape does,
                    and all layers below it.
    FTRL            With other rates, z is chosen so that the weights are the same.
    blend           Members that stay keep their weights relative to each other. New ones begin
                    with the weight 0.

A field whose values are hashed in another way (another kind, encoding, or other edges) begins anew,
as a new field does: the rows that its old values share with new ones are those of a fresh table.
The state of an optimiser follows its weights.

Nothing here reads or writes a file. Every function returns new arrays and sentences that say what
was carried over and what was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from msgspec import UNSET

from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field, Schema, shown_cross
from stream_ctr.learn.spec import FtrlRates, LearnerSpec, Pairs
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.messages import one_line
from stream_ctr.models import MODELS

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

_LARGEST_EXPONENT = 64  # numbers beyond 2^64 are not looked for among the buckets of a field
_LAYERS = "dense.deep.layers."
_PHASE = "dense.network"
_SQUARES = ("online", "adagrad")  # the optimisers whose state is the sums of squared gradients
_MOMENTS = ("exp_avg", "exp_avg_sq")


# -- fields --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FieldChanges:
    """What became of the fields of one schema in another.

    `changed` maps fields that are in both, and whose values are hashed in another way, to the
    reason. `rows` are the rows of the new table that the old values of these fields share with new
    ones.
    """

    stay: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    changed: dict[str, str]
    rows: Rows

    @property
    def sentences(self) -> list[str]:
        """A sentence for each kind of change, first the number of fields that stay."""
        total = len(self.stay) + len(self.new) + len(self.changed)
        said = [f"fields: {len(self.stay)} of {total} carry over"]
        if self.new:
            said.append(f"fields: new, they begin as in a fresh table: {_names(self.new)}")
        if self.gone:
            said.append(f"fields: gone, nothing reads their weights: {_names(self.gone)}")
        return said + [
            f"fields: {one_line(name, 60)} begins anew: {reason}"
            for name, reason in self.changed.items()
        ]


def compare_fields(old: Schema, new: Schema) -> FieldChanges:
    """Return what became of the fields of `old` in `new`.

    >>> fields = Field("app", "categorical"), Field("age", "numeric")
    >>> now = fields[0], Field("age", "categorical")
    >>> changes = compare_fields(*(Schema(fields=each, table_bits=8) for each in (fields, now)))
    >>> changes.stay, changes.changed
    (('app',), {'age': 'it was numeric and is categorical'})
    """
    before = {field.name: field for field in old.fields}
    names = [field.name for field in new.fields]
    stay, changed, rows = [], {}, [np.empty(0, np.int64)]
    for field in new.fields:
        if field.name not in before:
            continue
        was, now = _encoding(old, before[field.name]), _encoding(new, field)
        if was == now:
            stay.append(field.name)
        else:
            changed[field.name] = _reason(was, now)
            rows.append(_rows_of(field.name, _shared_texts(was, now), new))
    return FieldChanges(
        stay=tuple(stay),
        new=tuple(name for name in names if name not in before),
        gone=tuple(name for name in before if name not in names),
        changed=changed,
        rows=np.unique(np.concatenate(rows)),
    )


class _Encoding(NamedTuple):
    """How the values of a field become texts that are hashed, and multipliers."""

    kind: str  # categorical, or the numeric encoding
    per_octave: float = 0.0
    edges: tuple[float, ...] = ()
    scale: float = 0.0


def _encoding(schema: Schema, field: Field) -> _Encoding:
    if field.kind == "categorical":
        return _Encoding("categorical")
    if schema.has_values:
        return _Encoding(schema.numeric_encoding, scale=schema.value_scales.get(field.name, 0.0))
    edges = schema.bucket_edges.get(field.name, ())
    return _Encoding("buckets", schema.buckets_per_octave, tuple(edges))


def _reason(was: _Encoding, now: _Encoding) -> str:
    if (was.kind == "categorical") != (now.kind == "categorical"):
        kinds = ("categorical" if each.kind == "categorical" else "numeric" for each in (was, now))
        return "it was {} and is {}".format(*kinds)
    if was.kind != now.kind:
        return f"its numeric_encoding was {was.kind} and is {now.kind}"
    if was.per_octave != now.per_octave:
        return f"its buckets_per_octave were {was.per_octave:g} and are {now.per_octave:g}"
    return "its bucket edges are others" if was.edges != now.edges else "its scale is another"


def _shared_texts(was: _Encoding, now: _Encoding) -> list[str | None]:
    """Return the texts that both encodings may hash; None is a missing value."""
    kinds = {was.kind, now.kind}
    if "buckets" in kinds and kinds <= {"buckets", "categorical"}:
        most = max(
            len(each.edges) + math.ceil(each.per_octave * _LARGEST_EXPONENT) for each in (was, now)
        )
        return [str(bucket) for bucket in range(-most, most + 1)] + [None]
    return [None] if "buckets" in kinds else ["value", None]


def _rows_of(name: str, texts: Sequence[str | None], schema: Schema) -> Rows:
    """Return the rows of a field's texts."""
    hasher = Hasher(
        [Field(name, "categorical")], table_bits=schema.table_bits, hash_seed=schema.hash_seed
    )
    ids, _ = hasher.rows({name: pa.array(texts, pa.string())})
    return ids[:, 0].astype(np.int64)


def crosses_said(old: Schema, new: Schema, changes: FieldChanges) -> list[str]:
    """Return a sentence for each cross product that does not carry over as it is."""
    said = []
    for members in new.crosses:
        name = shown_cross(members)
        if members not in old.crosses:
            said.append(f"cross product {name}: new, its rows begin as in a fresh table")
        elif odd := [each for each in members if each in changes.changed]:
            said.append(
                f"cross product {name}: its rows stay, although {_names(odd)} changed: "
                "they cannot be told from others"
            )
    said += [
        f"cross product {shown_cross(members)}: gone, nothing reads its weights"
        for members in old.crosses
        if members not in new.crosses
    ]
    return said


# -- models --------------------------------------------------------------------------------------


class ModelState(NamedTuple):
    """A model of a run: its specification, the fields it reads, weights and optimiser state."""

    schema: Schema
    spec: LearnerSpec
    weights: State
    optimizer: State


class Carried(NamedTuple):
    """What a model begins with, and what it says about it.

    `knows` is false if the model begins anew.
    """

    weights: State
    optimizer: State
    knows: bool
    sentences: list[str]


def carry_over(old: ModelState, fresh: ModelState) -> Carried:
    """Return what a model begins with that was `old`, and that would be `fresh` without it.

    Both have the same `spec.model`. Arrays of `fresh` may be changed and returned.
    """
    if old.schema.hash_seed != fresh.schema.hash_seed:
        return Carried(
            fresh.weights,
            fresh.optimizer,
            False,
            [
                f"begins anew: features.hash_seed was {old.schema.hash_seed} and is "
                f"{fresh.schema.hash_seed}, so every value has another row"
            ],
        )
    changes = compare_fields(old.schema, fresh.schema)
    if MODELS[fresh.spec.model].module is None:
        return _carry_linear(old, fresh, changes)
    return _carry_network(old, fresh, changes)


# -- rows ----------------------------------------------------------------------------------------


def _carry_network(old: ModelState, fresh: ModelState, changes: FieldChanges) -> Carried:
    said: list[str] = []
    weights = {"table": _carry_table(old, fresh, changes, said)}
    dense, moments, kept_layers = _carry_dense(old, fresh, changes, said)
    weights |= dense
    _carry_intercept(old, fresh, weights, moments, said)
    steps = _steps(old, fresh, weights, kept_layers=kept_layers)
    return Carried(weights, {"steps": steps, **moments}, True, said)


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
    before, now = _layout(old.spec), _layout(fresh.spec)
    rows, found = _in_table(
        old.weights["table"], old.spec.table_bits, fresh.spec.table_bits, before, said
    )
    table = fresh.weights["table"]
    same_width = old.spec.embedding_dim == fresh.spec.embedding_dim
    same_state = _same_state(old.spec, fresh.spec)
    copied = [(before.w, now.w)]
    if same_width:
        copied.append((before.v, now.v))
    if same_state:
        copied += zip(before.w_state, now.w_state, strict=True)
        if same_width:
            copied += zip(before.v_state, now.v_state, strict=True)
    found[changes.rows] = False
    for source, target in copied:
        if found.all():
            table[:, target] = rows[:, source]
        else:
            table[found, target] = rows[found, source]
    if len(changes.rows):
        said.append(f"{len(changes.rows):,} rows of changed fields begin as in a fresh table")
    if not same_width:
        said.append(
            f"embeddings begin anew: model.embedding_dim was {old.spec.embedding_dim} and is "
            f"{fresh.spec.embedding_dim}; first-order weights carry over"
        )
    if not same_state:
        said.append(
            "the optimiser's state of the rows begins anew: learn.table_optimizer was "
            f"{old.spec.table_optimizer} and is {fresh.spec.table_optimizer}"
        )
    return table


def _same_state(old: LearnerSpec, new: LearnerSpec) -> bool:
    both = {old.table_optimizer, new.table_optimizer}
    return len(both) == 1 or both <= set(_SQUARES)


def _in_table(
    rows: Array, old_bits: int, new_bits: int, layout: _Layout, said: list[str]
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the rows [N, floats] in a table of 2 ** `new_bits` rows, and which were found [N]."""
    if new_bits >= old_bits:
        if new_bits > old_bits:
            said.append(
                f"the table carries over from 2^{old_bits} rows to 2^{new_bits}: each row stands "
                "at all new rows with its low bits"
            )
        else:
            said.append(f"the table carries over, 2^{new_bits} rows")
        return np.tile(rows, (1 << (new_bits - old_bits), 1)), np.ones(1 << new_bits, np.bool_)
    candidates = rows.reshape(1 << (old_bits - new_bits), 1 << new_bits, rows.shape[1])
    learned = (candidates[..., layout.w.start :] != 0).any(axis=2)  # w or a state
    first = learned.argmax(axis=0)
    chosen = candidates[first, np.arange(1 << new_bits)]
    unequal = learned & (candidates != chosen).any(axis=2)
    found = learned.any(axis=0) & ~unequal.any(axis=0)
    lost = int(learned[:, ~found].sum())
    said.append(
        f"the table carries over from 2^{old_bits} rows to 2^{new_bits}: "
        f"{int(learned.sum()) - lost:,} rows that were learned stay, {lost:,} begin anew because "
        "others fall on the same row"
    )
    return chosen, found


# -- the dense part ------------------------------------------------------------------------------


def _carry_dense(
    old: ModelState, fresh: ModelState, changes: FieldChanges, said: list[str]
) -> tuple[State, State, bool]:
    """Return the dense parameters, their moments, and whether the network carries over."""
    dense = {name: array for name, array in fresh.weights.items() if name.startswith("dense.")}
    moments = {name: array for name, array in fresh.optimizer.items() if name != "steps"}
    for name in dense:
        if not name.startswith(_LAYERS) and name != _PHASE:  # the constant of an FM
            _copy_parameter(name, old, dense, moments)
    if not any(name.startswith(_LAYERS) for name in dense):
        return dense, moments, True
    if old.weights.get(_PHASE, np.ones(()))[()] == 0:
        dense[_PHASE] = old.weights[_PHASE]
        said.append("its pre-training goes on")
        return dense, moments, False
    kept = _carry_layers(old, fresh, changes, dense, moments, said)
    if kept and _PHASE in dense:
        dense[_PHASE] = old.weights[_PHASE]
    elif _PHASE in dense:
        said.append("its pre-training begins anew, because the network does")
    return dense, moments, kept


def _carry_layers(
    old: ModelState,
    fresh: ModelState,
    changes: FieldChanges,
    dense: State,
    moments: State,
    said: list[str],
) -> bool:
    """Carry the layers of the network over, from the first one up; return whether any did."""
    layers = sorted(
        {int(name.removeprefix(_LAYERS).split(".")[0]) for name in dense if _LAYERS in name}
    )
    why = _why_not(old, fresh)
    if not why:
        source = _sources(old, fresh, changes)
        if (source < 0).all():
            why = "none of its inputs carries over"
        elif old.weights[f"{_LAYERS}0.bias"].shape != dense[f"{_LAYERS}0.bias"].shape:
            why = "model.hidden gives its first layer another width"
    if why:
        said.append(f"the network begins anew: {why}")
        return False
    for name, kept in _parameters(f"{_LAYERS}0.weight", old, dense, moments):
        target = np.zeros_like(kept[name])
        columns = source >= 0
        target[:, columns] = _of(old, name)[:, source[columns]]
        kept[name] = target
    _copy_parameter(f"{_LAYERS}0.bias", old, dense, moments)
    if (added := int((source < 0).sum())) or len(source) != old.weights[f"{_LAYERS}0.weight"].shape[
        1
    ]:
        said.append(
            f"the first layer keeps {len(source) - added:,} of its columns; "
            f"{added:,} new ones begin at zero"
        )
    for number, layer in enumerate(layers[1:], 2):
        names = [f"{_LAYERS}{layer}.{part}" for part in ("weight", "bias")]
        if any(
            name not in old.weights or old.weights[name].shape != dense[name].shape
            for name in names
        ):
            said.append(
                f"layers {number} to {len(layers)} of the network begin anew: model.hidden was "
                f"{list(old.spec.hidden)} and is {list(fresh.spec.hidden)}"
            )
            break
        for name in names:
            _copy_parameter(name, old, dense, moments)
    else:
        said.append("the network carries over")
    return True


def _why_not(old: ModelState, fresh: ModelState) -> str:
    """Return why the network cannot carry over, or ""."""
    activations = [
        MODELS[spec.model].activation if spec.activation == "paper" else spec.activation
        for spec in (old.spec, fresh.spec)
    ]
    if activations[0] != activations[1] and (old.spec.hidden or fresh.spec.hidden):
        return "model.activation was {} and is {}".format(*activations)
    if old.spec.embedding_dim != fresh.spec.embedding_dim:
        return "the embeddings that it reads do"
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
        inputs += [
            (frozenset({first, second}), 0)
            for index, first in enumerate(names)
            for second in names[index + 1 :]
        ]
    if getattr(system.module, "outer", False):
        inputs += [(frozenset(), at) for at in range(k * k)]
    return inputs


def _parameters(
    name: str, old: ModelState, dense: State, moments: State
) -> Iterable[tuple[str, State]]:
    """Yield the name of a parameter and of each of its moments, with where they are kept."""
    yield name, dense
    for key in _MOMENTS:
        yield f"{name.removeprefix('dense.')}.{key}", moments


def _of(old: ModelState, name: str) -> Array:
    return old.weights[name] if name in old.weights else old.optimizer[name]


def _copy_parameter(name: str, old: ModelState, dense: State, moments: State) -> None:
    for each, kept in _parameters(name, old, dense, moments):
        kept[each] = _of(old, each)


def _carry_intercept(
    old: ModelState, fresh: ModelState, weights: State, moments: State, said: list[str]
) -> None:
    """Set the constant of the logit, which only the online rule keeps apart from the biases."""
    was_online, is_online = (each.spec.table_optimizer == "online" for each in (old, fresh))
    if was_online and is_online:
        weights["intercept"] = old.weights["intercept"]
    elif is_online:
        weights["intercept"] = np.zeros(2)
        if (bias := _fm_bias(weights)) and not _network_speaks(weights):
            weights["intercept"][0] = weights[bias]
            weights[bias] = np.zeros_like(weights[bias])
    elif was_online:
        bias = _fm_bias(weights) if not _network_speaks(weights) else _output_bias(weights)
        weights[bias] = np.asarray(weights[bias] + old.weights["intercept"][0], np.float32)


def _fm_bias(weights: Tensors) -> str:
    """Return the name of the constant of an FM, or ""."""
    return next((name for name in ("dense.bias", "dense.fm.bias") if name in weights), "")


def _output_bias(weights: Tensors) -> str:
    layers = [int(name.removeprefix(_LAYERS).split(".")[0]) for name in weights if _LAYERS in name]
    return f"{_LAYERS}{max(layers)}.bias"


def _network_speaks(weights: Tensors) -> bool:
    """Return whether the logit contains that of a network."""
    has_network = any(name.startswith(_LAYERS) for name in weights)
    return has_network and bool(weights.get(_PHASE, np.ones(()))[()])


def _steps(
    old: ModelState, fresh: ModelState, weights: State, *, kept_layers: bool
) -> npt.NDArray[np.int64]:
    """Return the numbers of steps: all, and those before the present optimisers."""
    was_pretraining, is_pretraining = (
        each.get(_PHASE, np.ones(()))[()] == 0 for each in (old.weights, weights)
    )
    steps = old.optimizer["steps"]
    if is_pretraining and not was_pretraining:
        return np.zeros_like(steps)
    if is_pretraining:  # it ends after a number of examples
        return steps * old.spec.batch_size // fresh.spec.batch_size
    adam = old.spec.table_optimizer == fresh.spec.table_optimizer == "adam"
    return steps if kept_layers or adam else np.zeros_like(steps)


# -- logistic regression -------------------------------------------------------------------------


def _carry_linear(old: ModelState, fresh: ModelState, changes: FieldChanges) -> Carried:
    said: list[str] = []
    if why := _pairs_differ(old, fresh, changes):
        said.append(f"begins anew: {why}")
        return Carried(fresh.weights, fresh.optimizer, False, said)
    rows, pairs = old.weights["rows"], old.weights["pairs"]
    if old.spec.pairs is UNSET or fresh.spec.pairs is UNSET:
        bits = old.spec.table_bits, fresh.spec.table_bits
        rows, pairs = _carry_sparse(rows, pairs, *bits, changes.rows, said)
    else:
        had, has = _columns(old, old.spec.pairs), _columns(fresh, fresh.spec.pairs)
        said.append(f"{len(had & has):,} of {len(has):,} fields and pairs carry over")
    before, now = (spec.ftrl or FtrlRates() for spec in (old.spec, fresh.spec))
    if before != now:
        said.append(f"its rates are others ({_rates_said(before, now)}); its weights are the same")
    weights = {
        "rows": rows,
        "pairs": with_rates(pairs, before, now),
        "intercept": with_rates(
            old.weights["intercept"][None], *(_without_penalty(each) for each in (before, now))
        )[0],
    }
    return Carried(weights, {"steps": old.optimizer["steps"]}, True, said)


def _pairs_differ(old: ModelState, fresh: ModelState, changes: FieldChanges) -> str:
    """Return why the rows of pairs of fields cannot carry over, or ""."""
    before, now = old.spec.pairs, fresh.spec.pairs
    if before is UNSET and now is UNSET:
        return ""
    if before is UNSET or now is UNSET:
        return "only one of the runs reads pairs of fields"
    if old.spec.table_bits != fresh.spec.table_bits:
        return (
            "the row of a pair is made from the rows of its fields, and model.table_bits was "
            f"{old.spec.table_bits} and is {fresh.spec.table_bits}"
        )
    had, has = _numbers(old, before), _numbers(fresh, now)
    if before.table_bits != now.table_bits or any(
        (had[name] == has[name]) != (name in changes.stay) for name in had.keys() & has.keys()
    ):
        return "its columns have other rows"
    return ""


def _numbers(model: ModelState, pairs: Pairs) -> dict[str, int]:
    """Return the number of each field in the salts of columns."""
    names = [field.name for field in model.schema.fields]
    return dict(zip(names, pairs.numbers or range(len(names)), strict=True))


def _columns(model: ModelState, pairs: Pairs) -> set[tuple[int, int]]:
    """Return the numbers of each column."""
    numbers = [*_numbers(model, pairs).values()]
    return {(numbers[i], numbers[j]) for i, j in pairs.columns}


def _carry_sparse(
    rows: Array, columns: Array, old_bits: int, new_bits: int, reset: Rows, said: list[str]
) -> tuple[Array, Array]:
    """Return the ascending `rows` [m] in another table, and the `columns` [m, n] of each."""
    count = len(rows)
    if new_bits >= old_bits:
        rows, columns = _at_all_rows(rows, columns, old_bits, new_bits)
        said.append(f"{count:,} rows carry over")
    else:
        rows, columns = _unambiguous(rows & ((1 << new_bits) - 1), columns)
        said.append(
            f"{len(rows):,} rows carry over to a table of 2^{new_bits}; those that others fall on "
            "begin anew"
        )
    kept = ~np.isin(rows, reset)
    return rows[kept], columns[kept]


def _at_all_rows(rows: Array, columns: Array, old_bits: int, new_bits: int) -> tuple[Array, Array]:
    """Return `rows` [m] and `columns` [m, n], each at all rows of a larger table."""
    copies = 1 << (new_bits - old_bits)
    moved = (np.arange(copies)[:, None] << old_bits) + rows.astype(np.int64)
    return moved.reshape(-1).astype(rows.dtype), np.concatenate([columns] * copies)


def _unambiguous(rows: Array, columns: Array) -> tuple[Array, Array]:
    """Return the distinct `rows` [m], ascending, on which only equal `columns` [m, n] fall."""
    order = np.argsort(rows, kind="stable")
    rows, columns = rows[order], columns[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    first = np.repeat(starts, np.diff(starts, append=len(rows)))
    equal = (columns == columns[first]).all(axis=1)
    kept = starts[np.logical_and.reduceat(equal, starts)] if len(starts) else starts
    return rows[kept], columns[kept]


def with_rates(pairs: Array, before: FtrlRates, now: FtrlRates) -> Array:
    """Return (z, n) [m, 2] whose weights with the rates `now` are those with the rates `before`.

    >>> pairs = np.array([[-3.0, 4.0]])  # w = 3 / ((1 + 2) / 0.1 + 1)
    >>> with_rates(pairs, FtrlRates(), FtrlRates(alpha=0.2)).round(4).tolist()
    [[-1.5484, 4.0]]
    """
    if before == now:
        return pairs
    z, n = pairs[:, 0], pairs[:, 1]
    root = np.sqrt(n)
    beyond = np.maximum(np.abs(z) - before.l1, 0.0)
    w = np.copysign(beyond, z) / ((before.beta + root) / before.alpha + before.l2)  # -w
    moved = w * ((now.beta + root) / now.alpha + now.l2) + np.copysign(now.l1, z)
    return np.column_stack([np.where(beyond > 0, moved, np.clip(z, -now.l1, now.l1)), n])


def _without_penalty(rates: FtrlRates) -> FtrlRates:
    return FtrlRates(alpha=rates.alpha, beta=rates.beta, l1=0.0, l2=0.0)


def _rates_said(before: FtrlRates, now: FtrlRates) -> str:
    return ", ".join(
        f"{name} {getattr(before, name):.3g} to {getattr(now, name):.3g}"
        for name in ("alpha", "beta", "l1", "l2")
        if getattr(before, name) != getattr(now, name)
    )


# -- River and the blend -------------------------------------------------------------------------


def carry_river(
    state: Tensors, old: Schema, new: Schema, *, same_rates: bool
) -> tuple[State | None, str]:
    """Return the state that River's regression begins with, None if it begins anew, and why."""
    if not same_rates:
        return None, "begins anew: its rates are others"
    if old.hash_seed != new.hash_seed:
        return None, "begins anew: features.hash_seed is another"
    if new.table_bits < old.table_bits:
        return None, "begins anew: several rows of the larger table would fall on one"
    reset = compare_fields(old, new).rows
    carried = dict(state)
    for names in (("weight_keys", "weights"), ("keys", "z", "n")):
        columns = np.column_stack([state[name] for name in names[1:]])
        keys, columns = _at_all_rows(state[names[0]], columns, old.table_bits, new.table_bits)
        kept = ~np.isin(keys, reset)
        carried |= zip(names, (keys[kept], *columns[kept].T), strict=True)
    return carried, f"{len(state['keys']):,} rows carry over"


class BlendState(NamedTuple):
    """The members of a blend, in their order, its weights and the state of its optimiser."""

    members: tuple[str, ...]
    weights: State
    optimizer: State


def carry_blend(old: BlendState | None, fresh: BlendState, known: Mapping[str, str]) -> Carried:
    """Return what a blend begins with.

    `known` maps each member of `fresh` that carries over to its name in `old`. The others have
    learned nothing: their weight is 0, and the first examples raise it if they deserve it. The
    stack without a member that is gone is the one that loses least, by its curvature H. Without an
    `old` blend, the members that carry over and the stack share the weight.
    """
    m = len(fresh.members)
    if not known:
        return Carried(
            fresh.weights, fresh.optimizer, False, ["begins anew: no member carries over"]
        )
    if old is None:
        carried = np.array([name in known for name in fresh.members])
        omega = np.append(carried, True) / (carried.sum() + 1)
        u = np.zeros(m + 1)
        u[carried.argmax()] = 1.0
        said = [f"is new, and begins with the weight on {_names(known)}"]
        return Carried({"omega": omega, "u": u}, fresh.optimizer, True, said)
    stays = {name: old.members.index(known[name]) for name in fresh.members if name in known}
    source = np.array([*stays.values(), len(old.members)])
    target = np.array([*(fresh.members.index(name) for name in stays), m])
    gone = np.setdiff1d(np.arange(len(old.members)), source)
    omega, u = np.zeros(m + 1), np.zeros(m + 1)
    kept = old.weights["omega"][source]
    omega[target] = kept / kept.sum() if len(gone) else kept
    u[target] = old.weights["u"][source]
    h_old = old.optimizer["h"]
    if len(gone):
        lost = h_old[np.ix_(source, gone)] @ old.weights["u"][gone]
        u[target] += np.linalg.solve(h_old[np.ix_(source, source)], lost)
    h = fresh.optimizer["h"].copy()
    h[np.ix_(target, target)] = h_old[np.ix_(source, source)]
    optimizer = {**fresh.optimizer, "h": h, "examples": old.optimizer["examples"]}
    said = [f"the weights of {_names(stays)} and of the stack carry over"]
    if new := [name for name in fresh.members if name not in known]:
        said.append(f"new, with the weight 0: {_names(new)}")
    if len(gone):
        said.append(f"gone, the others share its weight: {_names(old.members[at] for at in gone)}")
    return Carried({"omega": omega, "u": u}, optimizer, True, said)


def _names(names: Iterable[str]) -> str:
    return ", ".join(one_line(name, 60) for name in names)
