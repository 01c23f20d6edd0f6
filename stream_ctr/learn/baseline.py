"""The baseline: River's FTRL-Proximal (see `river_ftrl`) in a process of its own, on the very same examples.

Frames of raw arrays go over the process's standard input and output.
"""

from __future__ import annotations

import json
import queue
import struct
import subprocess
import sys
import threading
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import StreamCtrError

DEVIATIONS = (
    "River refreshes a weight before it adds the new gradient to z, does not zero weights with |z| <= l1, and updates the intercept "
    "by plain SGD; so its FTRL differs from FTRL-Proximal as published."
)
State = dict[str, npt.NDArray[np.generic]]
HEADER = struct.Struct("<cqqq")  # kind, three sizes
# What may wait in memory for the process before the trainer has to wait for it.
_MOST_WAITING_BYTES = 256 << 20


class BaselineFailed(StreamCtrError):
    """The baseline's process ended by itself."""


class Marker(NamedTuple):
    """The baseline's state at the point in the sequence where it was asked for."""

    state: State


class BaselineProcess:
    """`river_ftrl.RiverFTRL` in a process of its own: batches go in, their probabilities come out later, in order.

    Two threads move bytes so that neither side ever waits for a full pipe. The trainer has to wait only when it is `full`: when more
    than a fixed number of bytes is queued.
    """

    name = "river_ftrl"

    def __init__(self, **options: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stream_ctr.learn.river_ftrl", json.dumps(options)],
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

    def submit(
        self,
        ids: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
        labels: npt.NDArray[np.uint8],
    ) -> None:
        """Queue a batch: `ids` [n, F], `values` [n, V], `labels` [n]; n may be 0."""
        frame = (
            HEADER.pack(b"B", *ids.shape, values.shape[1]),
            ids.tobytes(),
            values.tobytes(),
            labels.tobytes(),
        )
        self._enqueue(frame)

    def mark(self) -> None:
        """Ask for the state as it will be when everything submitted so far is learned."""
        self._enqueue((HEADER.pack(b"S", 0, 0, 0),))

    def load_state_dict(self, state: State) -> None:
        text, body = pack(state)
        self._to_send.put((HEADER.pack(b"L", len(text), len(body), 0), text, body))

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
            raise BaselineFailed(
                f"the baseline's process ended with status {self._process.wait()}; see its message above"
            )
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
        while (header := read_header(cast(BinaryIO, self._process.stdout))) is not None:
            kind, first, second, _ = header
            if kind == b"P":
                self._received.put(np.frombuffer(self._process.stdout.read(8 * first), np.float64))
            else:
                text, body = self._process.stdout.read(first), self._process.stdout.read(second)
                self._received.put(Marker(unpack(text, body)))
        self._received.put(None)


def pack(state: State) -> tuple[bytes, bytes]:
    text = json.dumps(
        [[name, array.dtype.str, array.shape] for name, array in state.items()]
    ).encode()
    return text, b"".join(array.tobytes() for array in state.values())


def unpack(text: bytes, body: bytes) -> State:
    state: State = {}
    at = 0
    for name, dtype, shape in json.loads(text):
        array = np.frombuffer(body, np.dtype(dtype), int(np.prod(shape)), at).reshape(shape)
        state[name] = array
        at += array.nbytes
    return state


def read_header(stream: BinaryIO) -> tuple[bytes, int, int, int] | None:
    header = stream.read(HEADER.size)
    return HEADER.unpack(header) if len(header) == HEADER.size else None
