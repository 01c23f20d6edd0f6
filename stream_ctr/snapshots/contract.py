"""The JSON contracts, manifest, pointer and `run.json`: sealed bytes to frozen types and back.

A document ends with its seal, the SHA-256 of all bytes before it:

    {"format": 6, ..., "files": {}, "sha256": "<64 hexadecimal digits>"}
     `---------- digested ------'

    the document                                        is
    -------------------------------------------------   ------------------------------------
    has a seal that is not its own                      damage, whatever its format
    has no seal, and the format that is read or above   damage
    has a newer format                                  `NewerFormat`
    has an older format                                 `OlderFormat`
    does not decode into its type, key by key           damage

The seal comes first, because a single flipped bit turns one format into another. A run of an older
version stops with `NewerFormat`, and never falls back to an older snapshot in silence. This version
reads no format but its own. An unknown key is damage, and so is a missing one, even where the type
has a default: a server that guessed a hash seed would serve wrong probabilities. Every change of
the keys of a document therefore needs a new format, and every later format keeps the seal.

A seal detects damage, and no forgery: signatures do that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
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
Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes], None]
"""(data, signature): raises `SnapshotError` unless the signature is good."""
LARGEST_EPOCH = (1 << 48) - 1
Epoch = Annotated[int, Meta(ge=0, le=LARGEST_EPOCH)]
"""It grows by one with each start and each rollback, so no run ever reaches the largest one."""

_SEAL = re.compile(rb',[ \n]*"sha256": ?"([0-9a-f]{64})"[ \n]*\}[ \n]*\Z')
_SEAL_BYTES = 100


class NewerFormat(SnapshotError):
    """A manifest or pointer was written by a newer version of stream-ctr."""


class OlderFormat(SnapshotError):
    """A manifest or pointer was written by an earlier version of stream-ctr, and is not read."""


class _Format(msgspec.Struct):
    format: int


def encode(document: msgspec.Struct, *, indent: int | None = 1) -> bytes:
    """Encode a document as JSON with its seal. Without `indent` it is one line, for a topic.

    Raises `SnapshotError` for anything that JSON does not have, such as NaN.

    >>> class Point(msgspec.Struct):
    ...     format: int
    ...     x: int
    >>> encode(Point(1, 3), indent=None)[:32]
    b'{"format":1,"x":3,"sha256":"3572'
    """
    separators = None if indent else (",", ":")
    try:
        builtins = msgspec.to_builtins(document)
        text = json.dumps(builtins, indent=indent, separators=separators, allow_nan=False)
    except (TypeError, ValueError) as reason:
        raise SnapshotError(f"manifest or pointer is not JSON: {reason}") from reason
    return seal(text.encode())


def seal(document: bytes) -> bytes:
    """Return a JSON object with its seal, which is written as the other keys are."""
    body = document.rstrip()[:-1].rstrip()
    digest = hashlib.sha256(body).hexdigest().encode()
    template = b',\n "sha256": "%b"\n}\n' if b"\n" in body else b',"sha256":"%b"}'
    return body + template % digest


def decode(data: bytes, contract: type[Contract], *, newest: int, name: str) -> Contract:
    """Decode a sealed document into a frozen type; `newest` is the format that this version reads.

    Raises `NewerFormat`, `OlderFormat`, or `SnapshotError` that names the document and what is
    wrong with it.

    >>> class Point(msgspec.Struct, forbid_unknown_fields=True):
    ...     format: int
    ...     x: int
    >>> decode(seal(b'{"format": 1, "x": 3}'), Point, newest=1, name="point.json").x
    3
    >>> decode(b'{"format": 1, "x": 3}', Point, newest=1, name="point.json")
    Traceback (most recent call last):
    stream_ctr.errors.SnapshotError: point.json is damaged: it does not end with its own SHA-256
    >>> decode(seal(b'{"format": 2, "y": 3}'), Point, newest=1, name="point.json")
    Traceback (most recent call last):
    stream_ctr.snapshots.contract.NewerFormat: point.json has format 2, and this version of \
stream-ctr reads formats up to 1: install the version that wrote it
    >>> decode(seal(b'{"format": 1, "x": 3, "y": 4}'), Point, newest=1, name="point.json")
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
        body = _unsealed(data)
        if body is None and found >= newest:
            raise ValueError("it does not end with its own SHA-256")
        if found > newest:
            raise NewerFormat(
                f"{name} has format {one_line(found, 40)}, and this version of stream-ctr reads "
                f"formats up to {newest}: install the version that wrote it"
            )
        if found < 1:
            raise ValueError(f"there is no format {one_line(found, 40)}")
        if body is None or found < newest:
            raise OlderFormat(
                f"{name} has format {found}, which an earlier version of stream-ctr wrote, and "
                f"this version reads format {newest}: go on with that version, or begin anew with "
                "another state directory"
            )
        decoded = msgspec.json.decode(body, type=contract)
        _require_keys(msgspec.json.decode(body), msgspec.to_builtins(decoded))
        return decoded
    except (NewerFormat, OlderFormat):
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as reason:
        raise SnapshotError(f"{name} is damaged: {one_line(reason, 400)}") from None


def _unsealed(data: bytes) -> bytes | None:
    """Return the document without its seal, or None if it has none.

    Raises `ValueError` if the seal is that of other bytes.
    """
    start = max(0, len(data) - _SEAL_BYTES)
    found = _SEAL.search(data, start)
    if not found:
        return None
    body = data[: found.start()]
    digest = hashlib.sha256(body).hexdigest()
    if digest.encode() != found[1]:
        raise ValueError(f"its bytes have SHA-256 {digest}, and it says {found[1].decode()}")
    return body + b"}"


def _require_keys(found: Any, complete: Any, path: str = "$") -> None:
    """Raise `ValueError` if `found` lacks a key of `complete`, at any depth of objects."""
    if isinstance(complete, dict):
        for key, value in complete.items():
            if key not in found:
                raise ValueError(f"Object missing required field `{key}` - at `{path}`")
            _require_keys(found[key], value, f"{path}.{key}")
