"""A delta: the rows that learning has touched since the last one, on their way to servers.

    00000003-00000012.json          the header: what it is and what it follows, signed
    00000003-00000012.safetensors   the payload: rows and their values

A payload holds absolute values, so a delta that is applied twice does no harm. Its tensors are
named after the file stem of their model and what they are:

    deepfm.model/rows      uint32 [n], ascending
    deepfm.model/values    float32 [n, width + 1]: the embeddings of each row, then w
    deepfm.model/dense.*   float32: all parameters of the dense part
    deepfm.model/intercept float32 [1]: w_0 of the online rule
    ftrl.model/rows        uint32 [n], ascending
    ftrl.model/values      float32 [n]: the weights
    ftrl.model/intercept   float64 [1]: the weight of the intercept
    model/omega, model/u   float64 [M + 1]: the mixture of a blend

Where it takes fewer bytes, `rows` is replaced by a bitmap, whose i-th bit stands for row i:

    ftrl.model/bits        uint64 [row // 64 of the last one + 1], bit i % 64 of word i // 64

With the precision "bf16" the values of rows are the upper halves of float32 numbers, rounded to the
nearest, as uint16.

Deltas form a chain. `parent` is the SHA-256 of the header before it, or that of the manifest of the
snapshot with which the chain begins:

    snapshot A <- 1 <- 2 <- 3 <- 4 <- 5 ...
                       ^
                       snapshot B was taken here: its manifest has the rank and the digest of 2

A server that has loaded A and 1 to 5 need not load B, and one that begins with B goes on with 3. A
chain ends with its run's process, and when the weights of a model go back; the next snapshot that
is published begins another.

>>> payload = encode_payload({"model": {"omega": np.array([0.5, 0.5])}}, "fp32")
>>> decode_payload(payload, "fp32")["model"]["omega"].tolist()
[0.5, 0.5]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from msgspec import Meta, Struct
from msgspec.structs import replace
from safetensors import SafetensorError

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.gate import Verdict
from stream_ctr.evaluate.summary import Count
from stream_ctr.learn.bit_kernels import bitmap, count_bits, set_bits, take_bits
from stream_ctr.messages import one_line
from stream_ctr.snapshots.contract import Epoch, RunId, Sha256, Sign, Verify, decode, encode

FORMAT = 1
LARGEST_HEADER_BYTES = 1 << 19
"""A header is one record of a topic, with room to spare below the megabyte of brokers."""
LARGEST_PAYLOAD_BYTES = 1 << 30
"""The largest payload that is read: 22 million rows of an embedding of 10 numbers."""
MOST_CLOSED = 64
"""The most entries of `DeltaHeader.closed`."""
Precision = Literal["fp32", "bf16"]
Array: TypeAlias = npt.NDArray[Any]
Changes: TypeAlias = Mapping[str, Mapping[str, Array]]
"""File stem of a model -> name -> array, as a payload holds them, values as float32."""

ROWS = "rows"
BITS = "bits"
VALUES = "values"
# No manifest and no pointer begins like this, so no signature of one is that of a delta.
_SIGNED = b"stream-ctr delta\n"
_BETWEEN = "/"
_MOST_WORDS = 1 << 26  # row numbers have 32 bits
_NAN = 0x7FC0  # the quiet NaN of bfloat16


class DeltaRank(Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """The place of a delta among those of its run: by the epoch of the process, then in order."""

    epoch: Epoch
    sequence: Count

    @property
    def name(self) -> str:
        """The name of its files, without the suffix.

        >>> DeltaRank(3, 12).name
        '00000003-00000012'
        """
        return f"{self.epoch:08d}-{self.sequence:08d}"


class DeltaPosition(Struct, frozen=True, forbid_unknown_fields=True):
    """A link of a chain: the rank of a delta, and the SHA-256 of its header."""

    rank: DeltaRank
    sha256: Sha256


class Closed(Struct, frozen=True, forbid_unknown_fields=True):
    """So many examples whose label windows closed at this time of the trainer's clock."""

    at_ms: Count
    examples: Count


class DeltaHeader(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The header of a delta. Times are epoch milliseconds.

    `base` is the snapshot with which the chain begins, `parent` the SHA-256 of the header before
    this one, or of the base's manifest. `identity_sha256` is the digest of the fields and the
    models of the run (see `identity_sha256`). `examples` counts those that the run has learned,
    `newest_event_ms` and `oldest_event_ms` bound the event times of those that are new in this
    delta. `closed` says when their label windows closed, in `MOST_CLOSED` entries at most, and
    `learned_ms` when the last of them was learned; `created_ms` is the time of the copy. `rows`
    counts the rows of each model. `signature` is that of a pointer.
    """

    format: Count = FORMAT
    run: RunId
    model: str
    rank: DeltaRank
    base: str
    base_sha256: Sha256
    parent: Sha256
    identity_sha256: Sha256
    precision: Precision
    verdict: Verdict
    examples: Count
    oldest_event_ms: Count
    newest_event_ms: Count
    watermark_ms: int
    positions: dict[str, Count]
    closed: Annotated[tuple[Closed, ...], Meta(max_length=MOST_CLOSED)]
    learned_ms: Count
    created_ms: Count
    rows: dict[str, Count]
    payload_sha256: Sha256
    payload_bytes: Annotated[int, Meta(ge=0, le=LARGEST_PAYLOAD_BYTES)]
    signature: Annotated[str, Meta(pattern="^([0-9a-f]{128})?$", max_length=128)] = ""


class Unsigned(SnapshotError):
    """A header has no signature, or not that of the expected key."""


class Delta(NamedTuple):
    """A header, the SHA-256 of its bytes, and the payload whose digest it gives."""

    header: DeltaHeader
    sha256: str
    payload: bytes


def encode_header(header: DeltaHeader, sign: Sign | None = None) -> bytes:
    """Return the header as one line of JSON with its seal, signed if `sign` is given.

    Raises `SnapshotError` for a header that `decode_header` would refuse.
    """
    signature = sign(_signed_bytes(header)).hex() if sign else ""
    data = encode(replace(header, signature=signature), indent=None)
    decode_header(data)  # a frozen type does not check the values that it is made with
    return data


def decode_header(
    data: bytes, *, name: str = "delta", signature: Verify | None = None
) -> DeltaHeader:
    """Decode a header, and check its signature if `signature` is given.

    Raises `NewerFormat`, `OlderFormat`, `Unsigned`, or `SnapshotError` that names the delta.
    """
    if len(data) > LARGEST_HEADER_BYTES:
        raise SnapshotError(
            f"the header of {name} has {len(data):,} bytes, and the largest that is read has "
            f"{LARGEST_HEADER_BYTES:,}"
        )
    header = decode(data, DeltaHeader, newest=FORMAT, name=name)
    if signature is None:
        return header
    if not header.signature:
        raise Unsigned(f"{name} is not signed, and a signature is required")
    try:
        signature(_signed_bytes(header), bytes.fromhex(header.signature))
    except SnapshotError as reason:
        raise Unsigned(f"{name}: {reason}") from None
    return header


def _signed_bytes(header: DeltaHeader) -> bytes:
    # As the file has it: no two libraries write all numbers alike.
    return _SIGNED + encode(replace(header, signature=""), indent=None)


def verified(
    header: bytes, payload: bytes, *, name: str = "delta", signature: Verify | None = None
) -> Delta:
    """Return the delta of these bytes, with the checks of `decode_header`.

    Raises `SnapshotError` too if the payload is not the one that the header describes.
    """
    decoded = decode_header(header, name=name, signature=signature)
    if len(payload) != decoded.payload_bytes:
        raise SnapshotError(
            f"the payload of {name} has {len(payload):,} bytes, its header says "
            f"{decoded.payload_bytes:,}"
        )
    digest = hashlib.sha256(payload).hexdigest()
    if digest != decoded.payload_sha256:
        raise SnapshotError(
            f"the payload of {name} has SHA-256 {digest}, its header says {decoded.payload_sha256}"
        )
    return Delta(decoded, header_sha256(header), payload)


def header_sha256(data: bytes) -> str:
    """Return the digest of a header's bytes, which is the parent of the delta that follows."""
    return hashlib.sha256(data).hexdigest()


def identity_sha256(identity: Any) -> str:
    """Return the digest of the fields and the models of a run (see `manifest.RunIdentity`).

    Rows of one run fit the tables of another only if these are equal.
    """
    parts = ("schema", "learner", "blend", "beside")
    described = {
        name: value for name in parts if (value := getattr(identity, name)) is not msgspec.UNSET
    }
    return hashlib.sha256(msgspec.json.encode(described, order="deterministic")).hexdigest()


def encode_payload(changes: Changes, precision: Precision) -> bytes:
    """Return the payload of these changes, whose rows should ascend."""
    tensors = {}
    for stem, named in changes.items():
        for name, array in named.items():
            if name == ROWS and _bits_are_fewer(array):
                name, array = BITS, _bits_of(array)
            elif name == VALUES and precision == "bf16":
                array = rounded_bf16(array)
            tensors[f"{stem}{_BETWEEN}{name}"] = _stored(array)
    return safetensors.numpy.save(tensors)


def _bits_are_fewer(rows: Array) -> bool:
    """Return whether a bitmap of the rows is shorter; it can name ascending ones only."""
    if not len(rows) or 8 * (int(rows[-1]) // 64 + 1) >= 4 * len(rows):
        return False
    return bool((rows[1:] > rows[:-1]).all())


def _bits_of(rows: Array) -> npt.NDArray[np.uint64]:
    words = bitmap(int(rows[-1]) + 1)
    set_bits(words, rows)
    return words


def _rows_of(words: Array, values: Array | None, name: str) -> npt.NDArray[np.uint32]:
    """Return the rows whose bits are set, ascending. There must be as many as values.

    A bitmap of a few megabytes could otherwise stand for gigabytes of row numbers.
    """
    fits = words.dtype == np.uint64 and words.ndim == 1 and len(words) <= _MOST_WORDS
    count = count_bits(words) if fits else -1
    if values is None or values.shape[:1] != (count,):
        raise SnapshotError(f"{name}: its bitmap does not have a bit for each of its values")
    rows = np.empty(count, np.uint32)
    take_bits(words.copy(), rows)
    return rows


def decode_payload(data: bytes, precision: Precision, name: str = "delta") -> Changes:
    """Return the changes in a payload, whose digest was compared before.

    Raises `SnapshotError` if it is no payload. The model itself checks that the arrays fit it.
    """
    try:
        tensors = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError) as reason:
        raise SnapshotError(f"{name} is not a payload: {one_line(reason, 300)}") from None
    changes: dict[str, dict[str, Array]] = {}
    for full_name, array in tensors.items():
        stem, between, tensor = full_name.partition(_BETWEEN)
        if not (stem and between and tensor):
            raise SnapshotError(f"{name} holds a tensor {one_line(full_name, 80)!r} of no model")
        if tensor == VALUES and precision == "bf16":
            if array.dtype != np.uint16:
                raise SnapshotError(f"{name}: {one_line(full_name, 80)!r} does not hold bfloat16")
            array = widened_bf16(array)
        changes.setdefault(stem, {})[tensor] = array
    for named in changes.values():
        if BITS in named:
            if ROWS in named:
                raise SnapshotError(f"{name} names its rows twice, as numbers and by a bitmap")
            named[ROWS] = _rows_of(named.pop(BITS), named.get(VALUES), name)
    return changes


def rounded_bf16(values: Array) -> npt.NDArray[np.uint16]:
    """Return float32 values rounded to bfloat16, ties to even, as the upper halves of their bits.

    NaN stays NaN.

    >>> widened_bf16(rounded_bf16(np.array([1.0, 0.1, np.nan], np.float32))).tolist()
    [1.0, 0.10009765625, nan]
    """
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> 16) & 1
    halves = ((bits + np.uint32(0x7FFF) + odd) >> 16).astype(np.uint16)
    # The sum carries a NaN with few bits to infinity, and one with many to zero.
    halves[np.isnan(values)] = _NAN
    return halves


def widened_bf16(halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return bfloat16 numbers, the upper halves of float32 numbers, as float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _stored(array: Array) -> Array:
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
