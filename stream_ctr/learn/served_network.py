"""A network that serves: rows are gathered here, and a library computes its dense part.

    ids [n, F + C] -> gather, times the values -> w [n, F + C], v [n, F + C, width] -> dense part

The gather is the compiled loop that training uses, so its numbers are the same. Nothing here needs
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from stream_ctr.learn import table_kernels
from stream_ctr.learn.dense_part import PARTS, expected_shapes
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Ids, Values
from stream_ctr.learn.tensors import Tensors, require_names, require_tensor

Floats: TypeAlias = npt.NDArray[np.float32]
Dense: TypeAlias = Callable[[Floats, Floats], Floats]
"""(w [n, F + C], v [n, F + C, width]) -> logits [n]. Several threads may call it."""

_ROWS = 1024
"""The rows that are computed at once, which bounds the memory of a large request."""


class ServedNetwork:
    """Predicts with the table among `weights` and a `dense` part.

    The weights must be those of the model that `spec` describes (see `require_weights`).
    """

    def __init__(self, spec: LearnerSpec, weights: Tensors, dense: Dense) -> None:
        part = PARTS[spec.model]
        self._columns = part.columns(spec)
        self._width = part.width(spec)
        self._value_fields = list(spec.value_fields)
        self._rows = np.ascontiguousarray(weights["table"], np.float32)
        self._gather = table_kernels.gather(self._width)
        self._dense = dense

    def predict(self, ids: Ids, values: Values | None = None) -> Floats:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V]."""
        if self._value_fields and values is None:
            raise ValueError(f"the values of {len(self._value_fields)} fields are missing")
        parts = [
            self._dense(*self._gathered(ids[rows], None if values is None else values[rows]))
            for rows in (slice(start, start + _ROWS) for start in range(0, len(ids), _ROWS))
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _gathered(self, ids: Ids, values: Values | None) -> tuple[Floats, Floats]:
        """Return the rows of up to 1,024 examples, multiplied by their values."""
        n = len(ids)
        w = np.empty((n, self._columns), np.float32)
        v = np.empty((n, self._columns, self._width), np.float32)
        scale = np.ones((n, self._columns) if self._value_fields else (0, 0), np.float32)
        if self._value_fields:
            scale[:, self._value_fields] = values
        self._gather(self._rows, np.ascontiguousarray(ids[:, : self._columns]), scale, w, v)
        return w, v


def require_weights(spec: LearnerSpec, weights: Tensors) -> None:
    """Raise `ValueError` unless `weights` are the tensors that `spec` describes, all finite.

    It takes no memory for a model, and raises `ConfigError` for a model of another package.

    >>> spec = LearnerSpec(model="fm", fields=2, table_bits=8)
    >>> require_weights(spec, {"table": np.zeros((16, 16), np.float32)})
    Traceback (most recent call last):
    ValueError: tensor 'dense.bias' is missing
    """
    expected = expected_shapes(spec)
    require_names(weights, expected)
    for name, shape in expected.items():
        dtype = np.float64 if name == "intercept" else np.float32
        require_tensor(name, weights[name], dtype, shape)
