"""The baseline: River's FTRL-Proximal (see `river_ftrl`) in a process of its own.

It learns the same examples as the models. Frames of raw arrays go over the process's standard input
and output. A frame is a `HEADER` and its arrays:

    to the process      B  rows, fields, value fields    a batch: ids, values, labels
                        S  0, 0, 0                       a request for the state
                        L  text bytes, body bytes, 0     a state to load
    from the process    P  rows, 0, 0                    the probabilities of a batch
                        S  text bytes, body bytes, 0     the state
"""

from __future__ import annotations

import json
import logging
import queue
import signal
import struct
import sys
import threading
from subprocess import PIPE, Popen, TimeoutExpired
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import StreamCtrError

_log = logging.getLogger(__name__)
DEVIATIONS = (
    "River refreshes a weight before it adds the new gradient to z, does not zero weights with "
    "|z| <= l1, and updates the intercept by plain SGD; so its FTRL differs from FTRL-Proximal "
    "as published."
)
State = dict[str, npt.NDArray[np.generic]]
HEADER = struct.Struct("<cqqq")  # kind, three sizes
BATCH = b"B"
STATE = b"S"
LOAD = b"L"
PROBABILITIES = b"P"

# The bytes that may be queued for the process before the trainer has to wait for it.
_MAX_WAITING_BYTES = 256 << 20
_EXIT_SECONDS = 10
# A process without an answer for so many waits of a second was stopped, or hangs. Waits are counted
# rather than seconds: when all of a container was frozen, both processes have lost the same time.
_WAIT_SECONDS = 1.0
_WAITS_BEFORE_WAKING = 5
_WAITS_BEFORE_FAILING = 60


class BaselineFailed(StreamCtrError):
    """The process of the baseline has ended unexpectedly, or does not answer."""


class Marker(NamedTuple):
    """The state of the baseline after everything that was submitted before the request."""

    state: State


class BaselineProcess:
    """`river_ftrl.RiverFTRL` in a process of its own.

    Batches go in, and their probabilities come out later, in order. Two threads move bytes so that
    neither side ever waits for a full pipe. The trainer has to wait only when this object is
    `full`, that is, when more than a fixed number of bytes is queued. A process that was stopped is
    woken, and one that does not answer at all is killed, so that no wait lasts for ever. `options`
    are those of `RiverFTRL`.
    """

    name = "river_ftrl"

    def __init__(self, **options: object) -> None:
        self._process = Popen(
            [sys.executable, "-m", "stream_ctr.learn.river_ftrl", json.dumps(options)],
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,  # Ctrl-C reaches the trainer only, which closes the process
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
            HEADER.pack(BATCH, *ids.shape, values.shape[1]),
            ids.tobytes(),
            values.tobytes(),
            labels.tobytes(),
        )
        self._enqueue(frame)

    def mark(self) -> None:
        """Request the state as it is once everything submitted so far is learned."""
        self._enqueue((HEADER.pack(STATE, 0, 0, 0),))

    def load_state_dict(self, state: State) -> None:
        """Replace the state of the process, in the order of the sequence."""
        text, body = pack(state)
        self._to_send.put((HEADER.pack(LOAD, len(text), len(body), 0), text, body))

    @property
    def full(self) -> bool:
        """True if the trainer must wait for answers before it submits more."""
        return self.waiting_bytes > _MAX_WAITING_BYTES

    @property
    def outstanding(self) -> int:
        """The number of batches and markers that are not answered yet."""
        return len(self._outstanding)

    def take(self, *, wait: bool) -> npt.NDArray[np.float64] | Marker | None:
        """Return the next answer in order: the probabilities [n] of a batch, or a `Marker`.

        Returns None when there is no answer yet; with `wait` only when none is outstanding. Raises
        `BaselineFailed` when the process has ended, or has not answered for a minute.
        """
        if not self._outstanding:
            return None
        try:
            answer = self._await_answer() if wait else self._received.get_nowait()
        except queue.Empty:
            return None
        if answer is None:
            raise BaselineFailed(
                f"the baseline's process ended with status {self._process.wait()}; "
                "see its message above"
            )
        self.waiting_bytes -= self._outstanding.pop(0)
        return answer

    def close(self) -> None:
        """End the process, by force when it does not end by itself within seconds."""
        self._to_send.put(None)
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(timeout=_EXIT_SECONDS)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _await_answer(self) -> npt.NDArray[np.float64] | Marker | None:
        for waits in range(_WAITS_BEFORE_FAILING):
            if waits == _WAITS_BEFORE_WAKING:
                _log.warning(
                    "the baseline's process %d has not answered for %g s; it is woken, in case it "
                    "was stopped",
                    self._process.pid,
                    waits * _WAIT_SECONDS,
                )
                self._process.send_signal(signal.SIGCONT)
            try:
                return self._received.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                continue
        self._process.kill()
        raise BaselineFailed(
            f"the baseline's process {self._process.pid} has not answered for "
            f"{_WAITS_BEFORE_FAILING * _WAIT_SECONDS:g} s and was killed; the next run on the "
            "state directory goes on from its newest snapshot"
        )

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
            return  # the process has ended; `take` raises

    def _receive(self) -> None:
        assert self._process.stdout
        while (header := read_header(cast(BinaryIO, self._process.stdout))) is not None:
            kind, first, second, _ = header
            if kind == PROBABILITIES:
                self._received.put(np.frombuffer(self._process.stdout.read(8 * first), np.float64))
            else:
                text, body = self._process.stdout.read(first), self._process.stdout.read(second)
                self._received.put(Marker(unpack(text, body)))
        self._received.put(None)


def pack(state: State) -> tuple[bytes, bytes]:
    """Return the names, types and shapes of the arrays as JSON, and the arrays' bytes.

    >>> text, body = pack({"z": np.array([1.0])})
    >>> text, len(body)
    (b'[["z", "<f8", [1]]]', 8)
    >>> unpack(text, body)
    {'z': array([1.])}
    """
    text = json.dumps(
        [[name, array.dtype.str, array.shape] for name, array in state.items()]
    ).encode()
    return text, b"".join(array.tobytes() for array in state.values())


def unpack(text: bytes, body: bytes) -> State:
    """Return the arrays that `pack` turned into `text` and `body`."""
    state: State = {}
    offset = 0
    for name, dtype, shape in json.loads(text):
        array = np.frombuffer(body, np.dtype(dtype), int(np.prod(shape)), offset)
        state[name] = array.reshape(shape)
        offset += array.nbytes
    return state


def read_header(stream: BinaryIO) -> tuple[bytes, int, int, int] | None:
    """Return the kind and the sizes of the next frame, or None at the end of `stream`."""
    header = stream.read(HEADER.size)
    return HEADER.unpack(header) if len(header) == HEADER.size else None
