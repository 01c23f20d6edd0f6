"""The program of the baseline's process: River's logistic regression with FTRL-Proximal.

It runs as `python -m stream_ctr.learn.river_ftrl`.

River is the library that people who learn online already use, so its figures are the ones to beat.
It takes one event at a time in Python, tens of microseconds each. Therefore it runs in a process
beside the trainer's, never in its loop, and the trainer need not import it.

FTRLProximal of River 0.26 differs from Algorithm 1 of McMahan et al. (2013), so its figures are
reported as "River FTRL". A weight is refreshed before the new gradient is added to z, so a feature
seen once still has weight zero. A weight is not zeroed when |z| <= l1. The intercept is plain SGD.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from river import linear_model, optim, utils

from stream_ctr.learn.baseline import (
    BATCH,
    HEADER,
    PROBABILITIES,
    STATE,
    State,
    pack,
    read_header,
    unpack,
)


class RiverFTRL:
    """`LogisticRegression(optimizer=FTRLProximal(...))` over table rows as features.

    Each feature has value 1 or its multiplier.

    >>> model = RiverFTRL(alpha=0.1)
    >>> ids, labels = np.array([[1, 2], [1, 3]], np.int32), np.array([1, 0], np.uint8)
    >>> model.learn(ids, np.empty((2, 0), np.float32), labels).round(3).tolist()
    [0.5, 0.501]
    """

    def __init__(
        self,
        *,
        alpha: float = 0.05,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 1.0,
        intercept_learning_rate: float = 0.01,
        value_fields: tuple[int, ...] = (),
    ) -> None:
        self._value_fields = list(value_fields)
        self._optimizer = optim.FTRLProximal(alpha=alpha, beta=beta, l1=l1, l2=l2)
        self._model = linear_model.LogisticRegression(
            optimizer=self._optimizer, intercept_lr=intercept_learning_rate
        )

    def learn(
        self,
        ids: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
        labels: npt.NDArray[np.uint8],
    ) -> npt.NDArray[np.float64]:
        """Predict each example, then learn it; return the probabilities [n] from before."""
        predict = self._model.predict_proba_one
        learn = self._model.learn_one
        multipliers = np.ones(ids.shape)
        multipliers[:, self._value_fields] = values
        probabilities = np.empty(len(ids))
        for row, (features, scales, label) in enumerate(
            zip(*(array.tolist() for array in (ids, multipliers, labels)), strict=True)
        ):
            x = dict(zip(features, scales, strict=True))
            probabilities[row] = predict(x)[True]
            learn(x, label)
        return probabilities

    def state_dict(self) -> State:
        """Return the state as arrays.

        The order of the weights is kept, because River sums a dot product in the order of its dict.
        """
        weights = self._model.weights
        z = self._optimizer.z
        n = self._optimizer.n
        return {
            "weight_keys": np.fromiter(weights.keys(), np.int64, len(weights)),
            "weights": np.fromiter(weights.values(), np.float64, len(weights)),
            "keys": np.fromiter(z.keys(), np.int64, len(z)),
            "z": np.fromiter(z.values(), np.float64, len(z)),
            "n": np.array([n[key] for key in z], np.float64),
            "intercept": np.array([self._model.intercept], np.float64),
            "iterations": np.array([self._optimizer.n_iterations], np.int64),
        }

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        keys = state["keys"].tolist()
        weights = dict(zip(state["weight_keys"].tolist(), state["weights"].tolist(), strict=True))
        self._model._weights = utils.VectorDict(weights)  # River has no setter
        self._optimizer.z = defaultdict(float, zip(keys, state["z"].tolist(), strict=True))
        self._optimizer.n = defaultdict(float, zip(keys, state["n"].tolist(), strict=True))
        self._model.intercept = float(state["intercept"][0])
        self._optimizer.n_iterations = int(state["iterations"][0])


def _serve(model: RiverFTRL, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer the frames of `source`, which `baseline` lists, until it ends."""
    while (header := read_header(source)) is not None:
        kind, first, second, third = header
        if kind == BATCH:
            ids = np.frombuffer(source.read(4 * first * second), np.int32).reshape(first, second)
            values = np.frombuffer(source.read(4 * first * third), np.float32).reshape(first, third)
            probabilities = model.learn(ids, values, np.frombuffer(source.read(first), np.uint8))
            sink.write(HEADER.pack(PROBABILITIES, first, 0, 0) + probabilities.tobytes())
        elif kind == STATE:
            text, body = pack(model.state_dict())
            sink.write(HEADER.pack(STATE, len(text), len(body), 0) + text + body)
        else:
            model.load_state_dict(unpack(source.read(first), source.read(second)))
        sink.flush()


def main() -> None:
    """Serve standard input; the first argument holds the options of `RiverFTRL` as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write between two frames
    with contextlib.suppress(BrokenPipeError):  # the trainer has ended
        _serve(RiverFTRL(**json.loads(sys.argv[1])), sys.stdin.buffer, sink)
    # At exit the interpreter looks for cycles among all objects, while the trainer waits.
    gc.freeze()


if __name__ == "__main__":
    main()
