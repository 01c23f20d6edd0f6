"""Carry logistic regressions over to another run (see `transfer`): LR, and that of River."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from stream_ctr.events.field import Schema
from stream_ctr.events.field_changes import FieldChanges, Rows, compare_fields
from stream_ctr.learn.carried import Carried, ModelState, anew
from stream_ctr.learn.spec import FtrlRates, Pairs
from stream_ctr.learn.tensors import State, Tensors

Array = npt.NDArray[Any]


def carry_linear(old: ModelState, fresh: ModelState, changes: FieldChanges) -> Carried:
    said: list[str] = []
    if why := _pairs_differ(old, fresh, changes):
        return anew(fresh, why)
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
