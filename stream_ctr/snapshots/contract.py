"""Decoding of the JSON contracts, manifest and pointer, into frozen types.

A document with a newer `format` raises `NewerFormat`: a run of an older version stops with that
message, and never falls back to an older snapshot in silence. One with an older `format` raises
`OlderFormat`: this version reads none but its own. Everything else that does not decode is damage.
An unknown key is damage too, and so is a missing one, even where the type has a default:
a server that guessed a hash seed would serve wrong probabilities. Every change of the keys of a
document therefore needs a new format.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from stream_ctr.errors import SnapshotError
from stream_ctr.messages import one_line

Contract = TypeVar("Contract", bound=msgspec.Struct)
# Python's `$` allows a line feed at the end, unlike that of JSON Schema. The length forbids it.
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
RunId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$", max_length=32)]
"""128 random bits in hexadecimal digits, see `lineage`."""


class NewerFormat(SnapshotError):
    """A manifest or pointer was written by a newer version of stream-ctr."""


class OlderFormat(SnapshotError):
    """A manifest or pointer was written by an earlier version of stream-ctr, and is not read."""


class _Format(msgspec.Struct):
    format: int


def decode(data: bytes, contract: type[Contract], *, newest: int, name: str) -> Contract:
    """Decode JSON into a frozen type; `newest` is the format that this version reads.

    Raises `NewerFormat`, `OlderFormat`, or `SnapshotError` that names the document and what is
    wrong with it.

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
    >>> decode(b'{"format": 1, "x": 3}', Point, newest=2, name="point.json")
    Traceback (most recent call last):
    stream_ctr.snapshots.contract.OlderFormat: point.json has format 1, which an earlier version \
of stream-ctr wrote, and this version reads format 2: go on with that version, or begin anew with \
another state directory
    """
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found > newest:
            raise NewerFormat(
                f"{name} has format {one_line(found, 40)}, and this version of stream-ctr reads "
                f"formats up to {newest}: install the version that wrote it"
            )
        if found < 1:
            raise ValueError(f"there is no format {one_line(found, 40)}")
        if found < newest:
            raise OlderFormat(
                f"{name} has format {found}, which an earlier version of stream-ctr wrote, and "
                f"this version reads format {newest}: go on with that version, or begin anew with "
                "another state directory"
            )
        decoded = msgspec.json.decode(data, type=contract)
        _require_keys(msgspec.json.decode(data), msgspec.to_builtins(decoded))
        return decoded
    except (NewerFormat, OlderFormat):
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as reason:
        raise SnapshotError(f"{name} is damaged: {one_line(reason, 400)}") from None


def _require_keys(found: Any, complete: Any, path: str = "$") -> None:
    """Raise `ValueError` if `found` lacks a key of `complete`, at any depth of objects."""
    if isinstance(complete, dict):
        for key, value in complete.items():
            if key not in found:
                raise ValueError(f"Object missing required field `{key}` - at `{path}`")
            _require_keys(found[key], value, f"{path}.{key}")
