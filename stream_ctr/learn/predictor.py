"""The interface of a model that predicts, whichever library computes it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from stream_ctr.learn.step import Ids, Values


class Predictor(Protocol):
    """A model that predicts."""

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V].

        Several threads may call it.
        """
        ...
