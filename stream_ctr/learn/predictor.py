"""The interface of a model that predicts, whichever library computes it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from stream_ctr.learn.step import Ids, Values
from stream_ctr.learn.tensors import State, Tensors


class Predicts(Protocol):
    """A model that predicts, served or not."""

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V].

        Several threads may call it.
        """
        ...


class Predictor(Predicts, Protocol):
    """A model that predicts, and never changes."""

    def updated(self, changes: Tensors) -> Predictor:
        """Return the model after `changes`, as `Learner.take_changes` returns them.

        This model stays as it is, and both may predict at the same time. They share a table, and
        the arrays of `changes` may not be changed afterwards. Raises `ValueError` unless they fit
        (see `require_changes`), and `ConfigError` for a model on a GPU.
        """
        ...

    def absorb(self) -> bool:
        """Write what `updated` added into the table that models share, unless others need it.

        Others do while one that was made before or after this one is alive: somebody holds it, or
        predicts with it. Returns True once nothing is apart from the table. Predictions need not
        wait.
        """
        ...

    def served(self) -> State:
        """Return what serving reads of this model, copied (see `served_weights`)."""
        ...
