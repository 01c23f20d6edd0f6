"""The baseline: River's logistic regression with FTRL-Proximal, in a process of its own, on the very same examples.

Why River: it is the library that people who learn online already use; its figures are the ones to beat. It works one event at a time
in Python (tens of microseconds each), so it runs beside the trainer, never in its loop.

What River 0.26's FTRLProximal does differently from Algorithm 1 of McMahan et al. (2013), and why its figures are reported as "River FTRL":
a weight is refreshed before the new gradient is added to z, so a feature seen once still has weight zero; a weight is not zeroed
when |z| <= l1; the intercept is plain SGD.

This module is also the program of that process (`python -m stream_ctr.baseline`): frames of raw arrays on its standard input and output.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from river import linear_model, optim, utils

from stream_ctr.errors import StreamCtrError

DEVIATIONS = (
    "River refreshes a weight before it adds the new gradient to z, does not zero weights with |z| <= l1, and updates the intercept "
    "by plain SGD; so its FTRL differs from FTRL-Proximal as published."
)
State = dict[str, npt.NDArray[np.generic]]
_HEADER = struct.Struct("<cqqq")  # kind, three sizes
# What may wait in memory for the process before the trainer has to wait for it.
_MOST_WAITING_BYTES = 256 << 20


class RiverFTRL:
    """`LogisticRegression(optimizer=FTRLProximal(...))` over table rows as features, each with value 1 or its multiplier.

    >>> model = RiverFTRL(alpha=0.1)
    >>> ids = np.array([[1, 2], [1, 3]], np.int32)
    >>> model.learn(ids, np.empty((2, 0), np.float32), np.array([1, 0], np.uint8)).round(3).tolist()
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
        self._model = linear_model.LogisticRegression(optimizer=self._optimizer, intercept_lr=intercept_learning_rate)

    def learn(self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Predict each example, then learn it, in order: probabilities [n] from before each update."""
        predict, learn = self._model.predict_proba_one, self._model.learn_one
        multipliers = np.ones(ids.shape)
        multipliers[:, self._value_fields] = values
        probabilities = np.empty(len(ids))
        for row, (features, scales, label) in enumerate(zip(*(array.tolist() for array in (ids, multipliers, labels)), strict=True)):
            x = dict(zip(features, scales, strict=True))
            probabilities[row] = predict(x)[True]
            learn(x, label)
        return probabilities

    def state_dict(self) -> State:
        """As arrays. The order of the weights is kept: River sums a dot product in the order of its dict."""
        weights, z, n = self._model.weights, self._optimizer.z, self._optimizer.n
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


class BaselineFailed(StreamCtrError):
    """The baseline's process ended by itself."""


class Marker(NamedTuple):
    """The baseline's state at the point in the sequence where it was asked for."""

    state: State


class BaselineProcess:
    """`RiverFTRL` in a process of its own: batches go in, their probabilities come out later, in order.

    Two threads move bytes so that neither side ever waits for a full pipe. The trainer has to wait only when it is `full`: when more
    than a fixed number of bytes is queued.
    """

    name = "river_ftrl"

    def __init__(self, **options: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stream_ctr.baseline", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes this process
        )
        self._to_send: queue.SimpleQueue[tuple[bytes, ...] | None] = queue.SimpleQueue()
        self._received: queue.Queue[npt.NDArray[np.float64] | Marker | None] = queue.Queue()
        self.waiting_bytes = 0
        self._outstanding: list[int] = []
        for work in (self._send, self._receive):
            threading.Thread(target=work, daemon=True).start()

    def submit(self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8]) -> None:
        """Queue a batch: `ids` [n, F], `values` [n, V], `labels` [n]; n may be 0."""
        frame = (_HEADER.pack(b"B", *ids.shape, values.shape[1]), ids.tobytes(), values.tobytes(), labels.tobytes())
        self._enqueue(frame)

    def mark(self) -> None:
        """Ask for the state as it will be when everything submitted so far is learned."""
        self._enqueue((_HEADER.pack(b"S", 0, 0, 0),))

    def load_state_dict(self, state: State) -> None:
        text, body = _pack(state)
        self._to_send.put((_HEADER.pack(b"L", len(text), len(body), 0), text, body))

    @property
    def full(self) -> bool:
        return self.waiting_bytes > _MOST_WAITING_BYTES

    @property
    def outstanding(self) -> int:
        """Batches and markers not answered yet."""
        return len(self._outstanding)

    def take(self, *, wait: bool) -> npt.NDArray[np.float64] | Marker | None:
        """The next answer in order: probabilities [n] of a batch, or a `Marker`.

        None: nothing yet (never when `wait` and something is out). Raises `BaselineFailed` when the process has ended.
        """
        if not self._outstanding:
            return None
        try:
            answer = self._received.get(block=wait)
        except queue.Empty:
            return None
        if answer is None:
            raise BaselineFailed(f"the baseline's process ended with status {self._process.wait()}; see its message above")
        self.waiting_bytes -= self._outstanding.pop(0)
        return answer

    def close(self) -> None:
        self._to_send.put(None)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _enqueue(self, frame: tuple[bytes, ...]) -> None:
        size = sum(map(len, frame))
        self._outstanding.append(size)
        self.waiting_bytes += size
        self._to_send.put(frame)

    def _send(self) -> None:
        assert self._process.stdin
        try:
            while (frame := self._to_send.get()) is not None:
                for part in frame:
                    self._process.stdin.write(part)
                self._process.stdin.flush()
            self._process.stdin.close()
        except (BrokenPipeError, ValueError):
            return  # the process has ended; `take` tells

    def _receive(self) -> None:
        assert self._process.stdout
        while (header := _read_header(cast(BinaryIO, self._process.stdout))) is not None:
            kind, first, second, _ = header
            if kind == b"P":
                self._received.put(np.frombuffer(self._process.stdout.read(8 * first), np.float64))
            else:
                text, body = self._process.stdout.read(first), self._process.stdout.read(second)
                self._received.put(Marker(_unpack(text, body)))
        self._received.put(None)


def _pack(state: State) -> tuple[bytes, bytes]:
    text = json.dumps([[name, array.dtype.str, array.shape] for name, array in state.items()]).encode()
    return text, b"".join(array.tobytes() for array in state.values())


def _unpack(text: bytes, body: bytes) -> State:
    state: State = {}
    at = 0
    for name, dtype, shape in json.loads(text):
        array = np.frombuffer(body, np.dtype(dtype), int(np.prod(shape)), at).reshape(shape)
        state[name] = array
        at += array.nbytes
    return state


def _read_header(stream: BinaryIO) -> tuple[bytes, int, int, int] | None:
    header = stream.read(_HEADER.size)
    return _HEADER.unpack(header) if len(header) == _HEADER.size else None


def _serve(model: RiverFTRL, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer frames until the input ends."""
    while (header := _read_header(source)) is not None:
        kind, first, second, third = header
        if kind == b"B":
            ids = np.frombuffer(source.read(4 * first * second), np.int32).reshape(first, second)
            values = np.frombuffer(source.read(4 * first * third), np.float32).reshape(first, third)
            probabilities = model.learn(ids, values, np.frombuffer(source.read(first), np.uint8))
            sink.write(_HEADER.pack(b"P", first, 0, 0) + probabilities.tobytes())
        elif kind == b"S":
            text, body = _pack(model.state_dict())
            sink.write(_HEADER.pack(b"S", len(text), len(body), 0) + text + body)
        else:
            model.load_state_dict(_unpack(source.read(first), source.read(second)))
        sink.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between two frames
    with contextlib.suppress(BrokenPipeError):  # the trainer is gone: nobody waits for an answer
        _serve(RiverFTRL(**json.loads(sys.argv[1])), sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
