"""Decoding of the JSON contracts: manifest and pointer, checked once at the door.

A document with a newer `format` raises `NewerFormat`, so that a run or a subscriber of an older
version stops with that message and never falls back to an older snapshot in silence. Everything
else that does not decode, an unknown key included, is damage.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from stream_ctr.errors import SnapshotError
from stream_ctr.messages import one_line

Contract = TypeVar("Contract", bound=msgspec.Struct)
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class NewerFormat(SnapshotError):
    """A manifest or pointer was written by a newer version of stream-ctr."""


class _Format(msgspec.Struct):
    format: int


def decode(data: bytes, contract: type[Contract], *, newest: int, name: str) -> Contract:
    """Decode JSON into a frozen type; `newest` is the newest format that this version reads.

    Raises `NewerFormat`, or `SnapshotError` that names the document and what is wrong with it.

    >>> class Point(msgspec.Struct, forbid_unknown_fields=True):
    ...     format: int
    ...     x: int
    >>> decode(b'{"format": 1, "x": 3}', Point, newest=1, name="point.json").x
    3
    >>> decode(b'{"format": 2, "y": 3}', Point, newest=1, name="point.json")
    Traceback (most recent call last):
    stream_ctr.snapshots.contract.NewerFormat: point.json has format 2, and this version of \
stream-ctr reads formats up to 1: install the version that wrote it
    >>> decode(b'{"format": 1, "x": 3, "y": 4}', Point, newest=1, name="point.json")
    Traceback (most recent call last):
    stream_ctr.errors.SnapshotError: point.json is damaged: Object contains unknown field `y`
    """
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found > newest:
            raise NewerFormat(
                f"{name} has format {one_line(found, 40)}, and this version of stream-ctr reads "
                f"formats up to {newest}: install the version that wrote it"
            )
        if found != newest:
            raise ValueError(f"format {found} was never written")
        return msgspec.json.decode(data, type=contract)
    except NewerFormat:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as reason:
        raise SnapshotError(f"{name} is damaged: {one_line(reason, 400)}") from None
