"""A network that serves: rows are gathered here, and a library computes its dense part.

    ids [n, F + C] -> gather, times the values -> w [n, F + C], v [n, F + C, width] -> dense part

The gather is the compiled loop that training uses, so its numbers are the same. Nothing here needs
torch.

A row of the table is V and w alone: 44 bytes for K = 10, where learning takes 64. Six in ten of
these rows lie in two cache lines, which are next to each other, and a gather of random rows takes
no longer than from rows of 64 bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, cast

import numpy as np

from stream_ctr.learn import served_kernels
from stream_ctr.learn.bit_kernels import Rows
from stream_ctr.learn.dense_part import expected_shapes
from stream_ctr.learn.large_arrays import zeros
from stream_ctr.learn.network_shape import network_shape
from stream_ctr.learn.served_weights import (
    INTERCEPT,
    ROWS,
    VALUES,
    require_changes,
    served_parameters,
)
from stream_ctr.learn.shared_rows import Floats, Overlay, Version
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Ids, Values
from stream_ctr.learn.table_kernels import LINE
from stream_ctr.learn.tensors import State, Tensors, require_names, require_tensor

Dense: TypeAlias = Callable[[Floats, Floats], Floats]
"""(w [B, F + C], v [B, F + C, width]) -> logits [B]. Several threads may call it."""


class Part(NamedTuple):
    """The examples from `start` to before `stop`, computed as `rows` examples, some of zeros."""

    start: int
    stop: int
    rows: int


class Engine(Protocol):
    """A library that computes dense parts. Several threads may use it."""

    def dense(self, parameters: Tensors) -> Dense:
        """Return the dense part with these parameters (see `served_parameters`)."""
        ...

    def parts(self, n: int) -> Sequence[Part]:
        """Return the parts in which `n` examples are computed."""
        ...

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Run the tasks, one for each part."""
        ...


class ServedNetwork:
    """Predicts with the table among `weights`, and a dense part that `engine` computes.

    The weights must be those of the model that `spec` describes (see `require_weights`). `dense` is
    the dense part, if it was made already. A model never changes: `updated` returns another one,
    with which it shares its table (see `shared_rows`).
    """

    def __init__(
        self, spec: LearnerSpec, weights: Tensors, engine: Engine, *, dense: Dense | None = None
    ) -> None:
        shape = network_shape(spec)
        self._spec = spec
        self._columns = shape.columns
        self._width = shape.width
        self._value_fields = list(spec.value_fields)
        self._engine = engine
        self._parameters = _copies(served_parameters(weights))
        self._dense = dense or engine.dense(self._parameters)
        self._rows = Version(_first_columns(cast(Floats, weights["table"]), self._width + 1))
        self._gather = served_kernels.gather(self._width)

    def predict(self, ids: Ids, values: Values | None = None) -> Floats:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V].

        Several threads may call it.
        """
        if self._value_fields and values is None:
            raise ValueError(f"the values of {len(self._value_fields)} fields are missing")
        ids = np.ascontiguousarray(ids[:, : self._columns])
        rows = self._rows.read()  # once, so that all parts read the same
        logits = np.empty(len(ids), np.float32)
        self._engine.run(
            [
                partial(self._predict_part, part, ids, values, rows, logits)
                for part in self._engine.parts(len(ids))
            ]
        )
        return logits

    def updated(self, changes: Tensors) -> ServedNetwork:
        """Return this model after `changes` (see `Predictor.updated`)."""
        require_changes(self._spec, changes)
        made = copy.copy(self)
        made._parameters = _copies(
            {name: changes[name] for name in changes if name not in (ROWS, VALUES)}
        )
        made._dense = self._engine.dense(made._parameters)
        made._rows = self._rows.updated(cast(Rows, changes[ROWS]), cast(Floats, changes[VALUES]))
        made._predict_once()
        return made

    def absorb(self) -> bool:
        """Write the rows that changed into the table, unless an older version is alive."""
        return self._rows.absorb()

    def served(self) -> State:
        """Return the served weights, copied (see `served_weights`)."""
        return {VALUES: self._rows.values(), **_copies(self._parameters)}

    def _predict_once(self) -> None:
        """Predict an example: what is compiled and prepared then, no request waits for."""
        ids = np.zeros((1, self._columns), np.int32)
        self.predict(ids, np.zeros((1, len(self._value_fields)), np.float32))

    def _predict_part(
        self,
        part: Part,
        ids: Ids,
        values: Values | None,
        rows: tuple[Floats, Overlay],
        logits: Floats,
    ) -> None:
        taken = slice(part.start, part.stop)
        part_values = None if values is None else values[taken]
        w, v = self._gathered(part.rows, ids[taken], part_values, *rows)
        logits[taken] = self._dense(w, v)[: part.stop - part.start]

    def _gathered(
        self, size: int, ids: Ids, values: Values | None, table: Floats, overlay: Overlay
    ) -> tuple[Floats, Floats]:
        """Return `size` examples: the rows of those with `ids`, times their values, then zeros."""
        n = len(ids)
        w = _aligned(size, self._columns)
        v = _aligned(size, self._columns, self._width)
        w[n:] = 0.0
        v[n:] = 0.0
        scale = np.ones((n, self._columns) if self._value_fields else (0, 0), np.float32)
        if self._value_fields:
            scale[:, self._value_fields] = values
        changed = overlay.values, overlay.words, overlay.ranks
        self._gather(table, *changed, ids, scale, w[:n], v[:n])
        return w, v


def _first_columns(table: Floats, count: int) -> Floats:
    columns = zeros(len(table), count)
    columns[:] = table[:, :count]
    return columns


def _aligned(*shape: int) -> Floats:
    """Return memory for float32 numbers at the start of a cache line, as torch gives it.

    Where an array begins may decide how a library adds up, and so the last bits of a logit.
    """
    size = int(np.prod(shape))
    memory = np.empty(size + LINE, np.float32)
    start = -(memory.ctypes.data // memory.itemsize) % LINE
    return memory[start : start + size].reshape(shape)


def _copies(arrays: Tensors) -> State:
    return {name: array.copy() for name, array in arrays.items()}


def require_weights(spec: LearnerSpec, weights: Tensors) -> None:
    """Raise `ValueError` unless `weights` are the tensors that `spec` describes, all finite.

    It takes no memory for a model, and raises `ConfigError` for a model of another package.

    >>> spec = LearnerSpec(model="fm", fields=2, table_bits=8)
    >>> require_weights(spec, {"table": np.zeros((16, 16), np.float32)})
    Traceback (most recent call last):
    ValueError: tensor 'dense.bias' is missing
    """
    require_network(expected_shapes(spec), weights)


def require_network(shapes: Mapping[str, tuple[int, ...]], weights: Tensors) -> None:
    """Raise `ValueError` unless `weights` are those of a network with these shapes, all finite."""
    require_names(weights, shapes)
    for name, shape in shapes.items():
        dtype = np.float64 if name == INTERCEPT else np.float32
        require_tensor(name, weights[name], dtype, shape)
