"""A thread that encodes, signs, writes and sends deltas, so that learning goes on meanwhile.

A delta is written once it is in the state directory. Each outlet, such as a topic, gets it then. An
outlet that fails gets it again before the next one, in order, as long as what it lacks is not too
large. Readers of an outlet that lacks deltas find the gap by the chain, and load a snapshot.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from msgspec.structs import replace

from stream_ctr.errors import SnapshotError, StreamCtrError
from stream_ctr.messages import one_line
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import Sign
from stream_ctr.snapshots.delta import (
    LARGEST_PAYLOAD_BYTES,
    Array,
    Changes,
    DeltaHeader,
    DeltaPosition,
    encode_header,
    encode_payload,
    header_sha256,
)
from stream_ctr.snapshots.delta_store import DeltaStore
from stream_ctr.snapshots.writing_thread import WritingThread

Outlet: TypeAlias = Callable[[bytes, DeltaHeader, bytes], None]
"""(bytes of the header, header, payload): raises `SnapshotError` if it does not take the delta."""

LACKING_BYTES = 256 << 20
"""The size of what an outlet may lack before it is given up."""
_log = logging.getLogger(__name__)


class TooLarge(SnapshotError):
    """The payload is larger than servers read, and later ones will be too."""


class WrittenDelta(NamedTuple):
    """A delta on disk. `at_ms` is when it was, and `unsent` counts the outlets that lack it."""

    header: DeltaHeader
    position: DeltaPosition
    at_ms: int
    unsent: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    header_bytes: bytes
    header: DeltaHeader
    payload: bytes


class DeltaWriter(WritingThread[WrittenDelta]):
    """Write one delta at a time, in a thread.

    `sign` signs headers, `check` is called before a delta becomes visible and may raise, and
    `now_ms` returns epoch milliseconds.
    """

    def __init__(
        self,
        store: DeltaStore,
        *,
        outlets: Sequence[Outlet] = (),
        sign: Sign | None = None,
        check: Callable[[], None] = lambda: None,
        now_ms: Callable[[], int],
    ) -> None:
        super().__init__("delta")
        self._store = store
        self._outlets = [_Backlog(outlet) for outlet in outlets]
        self._sign = sign
        self._check = check
        self._now_ms = now_ms

    def begin(self, changes: Changes, header: DeltaHeader) -> Callable[[], DeltaPosition | None]:
        """Begin to write a delta. The one before must have been taken.

        The digest and the size of the payload are filled in. Returns a function that waits for the
        delta, and returns its position, or None if it could not be written.
        """
        writing = self._begin(lambda: self._write(changes, header))
        return lambda: _position(writing)

    def _write(self, changes: Changes, header: DeltaHeader) -> WrittenDelta:
        _require_finite(changes, header)
        payload = encode_payload(changes, header.precision)
        if len(payload) > LARGEST_PAYLOAD_BYTES:
            raise TooLarge(
                f"delta {header.rank.name} is not written: it has {files.mebibytes(len(payload))}, "
                f"and at most {files.mebibytes(LARGEST_PAYLOAD_BYTES)} are read"
            )
        header = replace(
            header,
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            payload_bytes=len(payload),
        )
        data = encode_header(header, self._sign)
        self._store.write(data, header, payload, check=self._check)
        at_ms = self._now_ms()
        encoded = _Encoded(data, header, payload)
        unsent = sum(not outlet.send(encoded) for outlet in self._outlets)
        position = DeltaPosition(rank=header.rank, sha256=header_sha256(data))
        return WrittenDelta(header, position, at_ms, unsent)


class _Backlog:
    """An outlet, and the deltas that it did not take."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._failing = False
        self._lacking: deque[_Encoded] = deque()

    def send(self, encoded: _Encoded) -> bool:
        """Send what is lacking and then this delta; return whether nothing is lacking."""
        self._lacking.append(encoded)
        try:
            while self._lacking:
                first = self._lacking[0]
                self._outlet(first.header_bytes, first.header, first.payload)
                self._lacking.popleft()
            self._failing = False
        except SnapshotError as error:
            if not self._failing:  # deltas are frequent
                _log.error("deltas are written but not sent: %s", error)
            self._failing = True
            self._drop_old()
        return not self._lacking

    def _drop_old(self) -> None:
        while sum(len(each.payload) for each in self._lacking) > LACKING_BYTES:
            self._lacking.popleft()


def _require_finite(changes: Changes, header: DeltaHeader) -> None:
    for stem, named in changes.items():
        for name, array in named.items():
            if not _finite(array):
                raise SnapshotError(
                    f"delta {header.rank.name} is not written: {name!r} of {one_line(stem, 80)} "
                    "holds values that are not finite"
                )


def _finite(array: Array) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _position(writing: Future[WrittenDelta]) -> DeltaPosition | None:
    try:
        return writing.result().position
    except (StreamCtrError, OSError):  # whoever takes the delta gets the error
        return None
