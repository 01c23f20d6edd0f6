"""Features to table rows: a stable, published hash that a server in any language can reproduce.

    field_seed = low 32 bits of murmur3_x64_128(field name, hash_seed).h1
    row        = murmur3_x64_128(value as UTF-8, field_seed).h1 & (2 ** table_bits - 1)

MurmurHash3 x64 128 is Austin Appleby's, public domain; `h1` is its first 64 bits. A missing value hashes the single byte 0xff, which
occurs in no UTF-8 text, so it has a row of its own. A number hashes the decimal text of its logarithmic bucket
`sign(x) * floor(r * log2(1 + |x|))` with r buckets an octave; with the encodings `value` and `log_value` (the paper's other way, "the
value itself") the field has one row, that of the text "value", and its embedding is multiplied by the number, cut to what a float32 holds.

A cross product of two or more fields is a column of ids behind theirs, with rows in the same table: it hashes the hashes of its members,
those of missing values too, before anything was cut off.

    cross_seed = low 32 bits of murmur3_x64_128(field names, joined by the byte 0xff, hash_seed).h1
    row        = murmur3_x64_128(h1 of each member's value, 8 bytes little-endian each, cross_seed).h1 & (2 ** table_bits - 1)

>>> hasher = Hasher([Field("app", "categorical"), Field("age", "numeric")], table_bits=20)
>>> ids, values = hasher.rows({"app": pa.array(["maps", None]), "age": pa.array([31.0, None])})
>>> ids.tolist(), values.shape
([[364942, 493789], [946155, 387895]], (2, 0))
>>> crossed = Hasher(hasher.fields, table_bits=20, crosses=[("app", "age")])
>>> crossed.rows({"app": pa.array(["maps", None]), "age": pa.array([31.0, None])})[0].tolist()
[[364942, 493789, 161404], [946155, 387895, 811682]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events.field import Field, require_members

_MISSING = np.array([0xFF], np.uint8)
_C1, _C2 = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)
_OFTEN = 64
_WHOLE = np.uint64(0xFFFFFFFFFFFFFFFF)
_M1, _M2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


class Hasher:
    """Feature columns (strings, or a dictionary of them; float64) -> `ids` int32 [n, F + C], rows of the embedding table, and `values`
    float32 [n, V], the multipliers of the V fields that have one (`value_fields` are their indices among the F).

    The last C ids are those of the `crosses`, each the names of its fields. Raises `ValueError` when one of them cannot be crossed.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        table_bits: int,
        hash_seed: int = 0,
        numeric_encoding: str = "buckets",
        buckets_per_octave: float = 2.0,
        crosses: Sequence[Sequence[str]] = (),
    ) -> None:
        require_members(crosses, fields, numeric_encoding)
        self.fields = tuple(fields)
        self.table_bits = table_bits
        self.numeric_encoding = numeric_encoding
        self.buckets_per_octave = buckets_per_octave
        self._mask = np.uint64((1 << table_bits) - 1)
        self._seeds = [_seed(field.name.encode(), hash_seed) for field in self.fields]
        self.value_fields = (
            []
            if numeric_encoding == "buckets"
            else [index for index, field in enumerate(self.fields) if field.kind == "numeric"]
        )

        self.crosses = tuple(tuple(names) for names in crosses)
        self._cross_seeds = [
            _seed(b"\xff".join(name.encode() for name in names), hash_seed)
            for names in self.crosses
        ]
        at = {field.name: index for index, field in enumerate(self.fields)}
        self._crossed = sorted({at[name] for names in self.crosses for name in names})
        self._members = [
            np.array([self._crossed.index(at[name]) for name in names]) for names in self.crosses
        ]

    def rows(
        self, features: Mapping[str, pa.Array]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        n = len(next(iter(features.values()))) if features else 0
        ids = np.empty((n, len(self.fields) + len(self.crosses)), np.int32)
        values = np.ones((n, len(self.value_fields)), np.float32)
        hashes = np.empty((n, len(self._crossed)), np.uint64)
        for index, field in enumerate(self.fields):
            column = features[field.name]
            if index in self._crossed:
                whole = self._crossed.index(index)
                self._hash_field(column, index, _WHOLE, hashes, whole)
                ids[:, index] = hashes[:, whole] & self._mask
            elif index not in self.value_fields:
                self._hash_field(column, index, self._mask, ids, index)
            else:
                ids[:, index] = self._one_row(column, self._seeds[index])
                values[:, self.value_fields.index(index)] = self._multipliers(column)
        for index, (members, seed) in enumerate(
            zip(self._members, self._cross_seeds, strict=True), len(self.fields)
        ):
            _cross(hashes, members, seed, self._mask, ids, index)
        return ids, values

    def _hash_field(
        self, column: pa.Array, index: int, mask: np.uint64, out: npt.NDArray[Any], at: int
    ) -> None:
        """The masked hashes of a column into `out[:, at]`."""
        seed = self._seeds[index]
        if self.fields[index].kind == "numeric":
            x = column.to_numpy(zero_copy_only=False)  # null becomes NaN
            bucket = np.sign(x) * np.floor(self.buckets_per_octave * np.log2(1.0 + np.abs(x)))
            _hash_buckets(bucket, seed, mask, out, at)
        elif not pa.types.is_dictionary(column.type):
            _hash_into(*string_buffers(column), seed, mask, out, at)
        else:  # each word once, and after the last what is missing
            words = _hash(
                pa.concat_arrays([column.dictionary, pa.nulls(1, pa.string())]),
                seed,
                mask,
                out.dtype,
            )
            out[:, at] = words[np.asarray(pc.fill_null(column.indices, -1))]

    def _one_row(self, column: pa.Array, seed: np.uint64) -> npt.NDArray[np.int32]:
        present, missing = _hash(pa.array(["value", None], pa.string()), seed, self._mask, np.int32)
        return np.where(np.asarray(column.is_valid()), present, missing).astype(np.int32)

    def _multipliers(self, column: pa.Array) -> npt.NDArray[np.float32]:
        x = column.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
        scaled = np.sign(x) * np.log1p(np.abs(x)) if self.numeric_encoding == "log_value" else x
        largest = np.finfo(np.float32).max
        return np.where(np.isnan(x), 1.0, np.clip(scaled, -largest, largest)).astype(np.float32)


def _seed(name: bytes, hash_seed: int) -> np.uint64:
    return np.uint64(murmur3(name, hash_seed) & 0xFFFFFFFF)


def _hash(
    texts: pa.StringArray, seed: np.uint64, mask: np.uint64, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    out = np.empty((len(texts), 1), dtype)
    _hash_into(*string_buffers(texts), seed, mask, out, 0)
    return out[:, 0]


def hash_ids(impression_id: pa.StringArray) -> npt.NDArray[np.uint64]:
    """64-bit hash [n] of impression ids; among a million ids two collide with probability 3e-8.

    >>> hash_ids(pa.array(["a1"])).tolist()
    [5693669818594506317]
    """
    out = np.empty(len(impression_id), np.uint64)
    _hash_all(*string_buffers(impression_id), out)
    return out


def murmur3(value: bytes, seed: int = 0) -> int:
    """The first 64 bits of MurmurHash3 x64 128.

    >>> hex(murmur3(b"hello"))
    '0xcbd8a7b341bd9b02'
    """
    return int(_murmur3(np.frombuffer(value, np.uint8), 0, len(value), np.uint64(seed)))


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """MurmurHash3's 64-bit finaliser, element by element: a bijection that spreads every bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(33))) * _M1
        x = (x ^ (x >> np.uint64(33))) * _M2
    return x ^ (x >> np.uint64(33))


def string_buffers(
    column: pa.StringArray,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """(data, offsets [n + 1], valid [n]) of a string array, without copying the text."""
    _, offsets, data = column.buffers()
    n = len(column)
    valid = np.asarray(column.is_valid()) if column.null_count else np.ones(n, np.bool_)
    at = (
        np.frombuffer(offsets, np.int32)[column.offset : column.offset + n + 1]
        if n
        else np.zeros(1, np.int32)
    )
    return np.frombuffer(data or b"", np.uint8), at, valid


@numba.njit(cache=True, forceinline=True)
def _rotate(x: np.uint64, bits: int) -> np.uint64:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@numba.njit(cache=True, forceinline=True)
def _finalise(k: np.uint64) -> np.uint64:
    k = (k ^ (k >> np.uint64(33))) * _M1
    k = (k ^ (k >> np.uint64(33))) * _M2
    return k ^ (k >> np.uint64(33))


@numba.njit(cache=True, forceinline=True)
def _word(data: npt.NDArray[np.uint8], start: int, size: int) -> np.uint64:
    """`size` (at most 8) bytes, little-endian."""
    k, at = np.uint64(0), np.uint64(start)  # an index without sign is taken as it is
    if start + 8 > len(data):
        for i in range(size):
            k |= np.uint64(data[start + i]) << np.uint64(8 * i)
        return k
    for i in range(8):  # one load, once unrolled
        k |= np.uint64(data[at + np.uint64(i)]) << np.uint64(8 * i)
    return k & (np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * size))


@numba.njit(cache=True, forceinline=True)
def _murmur3(data: npt.NDArray[np.uint8], start: int, size: int, seed: np.uint64) -> np.uint64:
    h1 = h2 = np.uint64(seed)
    blocks = size // 16
    for block in range(blocks):
        at = start + 16 * block
        h1 ^= _rotate(_word(data, at, 8) * _C1, 31) * _C2
        h1 = (_rotate(h1, 27) + h2) * np.uint64(5) + np.uint64(0x52DCE729)
        h2 ^= _rotate(_word(data, at + 8, 8) * _C2, 33) * _C1
        h2 = (_rotate(h2, 31) + h1) * np.uint64(5) + np.uint64(0x38495AB5)
    tail, rest = start + 16 * blocks, size - 16 * blocks
    if rest > 8:
        h2 ^= _rotate(_word(data, tail + 8, rest - 8) * _C2, 33) * _C1
    if rest > 0:
        h1 ^= _rotate(_word(data, tail, min(rest, 8)) * _C1, 31) * _C2
    h1 ^= np.uint64(size)
    h2 ^= np.uint64(size)
    h1 += h2
    h2 += h1
    return _finalise(h1) + _finalise(h2)


@numba.njit(cache=True, nogil=True)
def _hash_into(
    data: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int32],
    valid: npt.NDArray[np.bool_],
    seed: np.uint64,
    mask: np.uint64,
    out: npt.NDArray[Any],
    column: int,
) -> None:
    missing = _murmur3(_MISSING, 0, 1, seed) & mask
    for i in range(len(valid)):
        if valid[i]:
            out[i, column] = _murmur3(data, offsets[i], offsets[i + 1] - offsets[i], seed) & mask
        else:
            out[i, column] = missing


@numba.njit(cache=True, nogil=True)
def _hash_buckets(
    bucket: npt.NDArray[np.float64],
    seed: np.uint64,
    mask: np.uint64,
    out: npt.NDArray[Any],
    column: int,
) -> None:
    """Masked hashes of whole numbers by their decimal text. Those near 0 are remembered."""
    known, is_known = np.empty(2 * _OFTEN + 1, np.uint64), np.zeros(2 * _OFTEN + 1, np.bool_)
    missing = _murmur3(_MISSING, 0, 1, seed) & mask
    text = np.empty(20, np.uint8)
    for i in range(len(bucket)):
        if np.isnan(bucket[i]):
            out[i, column] = missing
            continue
        number = np.int64(bucket[i])
        often = -_OFTEN <= number <= _OFTEN
        if often and is_known[number + _OFTEN]:
            out[i, column] = known[number + _OFTEN]
        else:
            first, rest = len(text), abs(number)
            while rest > 0 or first == len(text):
                first -= 1
                text[first] = 48 + rest % 10
                rest //= 10
            if number < 0:
                first -= 1
                text[first] = 45  # -
            hashed = _murmur3(text, first, len(text) - first, seed) & mask
            if often:
                known[number + _OFTEN], is_known[number + _OFTEN] = hashed, True
            out[i, column] = hashed


@numba.njit(cache=True, nogil=True)
def _cross(
    hashes: npt.NDArray[np.uint64],
    members: npt.NDArray[np.int64],
    seed: np.uint64,
    mask: np.uint64,
    out: npt.NDArray[np.int32],
    column: int,
) -> None:
    """Of each row of `hashes` the masked hash of those of the `members`, as bytes one after the other."""
    data = np.empty(8 * len(members), np.uint8)
    for i in range(len(hashes)):
        for j in range(len(members)):
            for byte in range(8):
                data[8 * j + byte] = hashes[i, members[j]] >> np.uint64(8 * byte)
        out[i, column] = _murmur3(data, 0, len(data), seed) & mask


@numba.njit(cache=True, nogil=True)
def _hash_all(
    data: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int32],
    valid: npt.NDArray[np.bool_],
    out: npt.NDArray[np.uint64],
) -> None:
    for i in range(len(valid)):
        out[i] = _murmur3(data, offsets[i], offsets[i + 1] - offsets[i], np.uint64(0))
