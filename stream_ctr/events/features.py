"""Hash features to table rows, by a stable and published formula.

A server in any language can reproduce a row:

    field_seed = low 32 bits of murmur3_x64_128(field name, hash_seed).h1
    row        = murmur3_x64_128(value as UTF-8, field_seed).h1 & (2 ** table_bits - 1)

MurmurHash3 x64 128 is Austin Appleby's, in the public domain; `h1` is its first 64 bits.

- A missing value hashes the single byte 0xff, which no UTF-8 text contains. So it has a row of its
  own.
- A number x hashes the decimal text of its bucket. By default it is logarithmic, with r buckets an
  octave: `sign(x) * floor(r * log2(1 + |x|))`.
- A field whose numbers that would not tell apart has edges e_1 < ... < e_m (see `fit`). Between
  them the bucket of x is the number of edges that are not above x. Beyond them it is logarithmic
  in units of w = e_m - e_1:

      x < e_1          -floor(r * log2(1 + (e_1 - x) / w))
      e_1 <= x < e_m   the number of edges <= x
      x >= e_m         m + floor(r * log2(1 + (x - e_m) / w))

- With the encodings `value` and `log_value` (the paper's alternative, "the value itself"), a
  numeric field has one row, that of the text "value". The field's embedding is multiplied by x or
  by `sign(x) * log(1 + |x|)`, divided by the field's scale s and cut to [-4, 4]. Without a scale
  the multiplier is cut to [-1e6, 1e6].

A cross product of two or more fields is one more column of ids, after those of the fields, with
rows in the same table. It hashes `hashes`: the h1 of each member's value, missing values included,
before the mask, as 8 bytes little-endian each.

    cross_seed = low 32 bits of murmur3_x64_128(field names joined by the byte 0xff, hash_seed).h1
    row        = murmur3_x64_128(hashes, cross_seed).h1 & (2 ** table_bits - 1)

>>> hasher = Hasher([Field("app", "categorical"), Field("age", "numeric")], table_bits=20)
>>> features = {"app": pa.array(["maps", None]), "age": pa.array([31.0, None])}
>>> ids, values = hasher.rows(features)
>>> ids.tolist(), values.shape
([[364942, 493789], [946155, 387895]], (2, 0))
>>> crossed = Hasher(hasher.fields, table_bits=20, crosses=[("app", "age")])
>>> crossed.rows(features)[0].tolist()
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

from stream_ctr.events.arrow_columns import StringBuffers, string_buffers
from stream_ctr.events.field import Field, require_fitted, require_members

LARGEST_MULTIPLIER = 4.0
"""The largest size of a multiplier that has a scale."""

LARGEST_UNSCALED_MULTIPLIER = 1e6
"""The largest size of any multiplier.

Models multiply features with each other: the products of five of this size are float32 numbers, and
so are the gradients.
"""

_MISSING = np.array([0xFF], np.uint8)
_ALL_BITS = np.uint64(0xFFFFFFFFFFFFFFFF)
_LARGEST = float(np.finfo(np.float64).max)
_LOW_32_BITS = 0xFFFFFFFF
_FREQUENT_BUCKETS = 64  # the hashes of buckets from -64 to 64 are kept
_DIGIT_0 = ord("0")
_MINUS = ord("-")
_MOST_INTEGER_CHARACTERS = 20

# The constants of MurmurHash3 x64 128.
_C1 = np.uint64(0x87C37B91114253D5)
_C2 = np.uint64(0x4CF5AD432745937F)
_H1_ADD = np.uint64(0x52DCE729)
_H2_ADD = np.uint64(0x38495AB5)
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_MIX_SHIFT = np.uint64(33)
_BLOCK = 16  # bytes
_WORD = 8  # bytes


class Hasher:
    """Hash feature columns to rows of the embedding table.

    There are F fields, C cross products (`crosses`, each the names of its fields) and V fields
    whose embedding is multiplied by a value (`value_fields` are their indices). `bucket_edges` and
    `value_scales` are those of a `Schema`. Raises `ValueError` when a cross product has a member
    that cannot be crossed, or when edges or scales do not fit the fields.
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
        bucket_edges: Mapping[str, Sequence[float]] | None = None,
        value_scales: Mapping[str, float] | None = None,
    ) -> None:
        require_members(crosses, fields, numeric_encoding)
        self.bucket_edges = {
            name: np.array(edges, np.float64) for name, edges in (bucket_edges or {}).items()
        }
        self.value_scales = dict(value_scales or {})
        require_fitted(
            bucket_edges or {}, self.value_scales, fields, buckets=numeric_encoding == "buckets"
        )
        self.fields = tuple(fields)
        self.table_bits = table_bits
        self.numeric_encoding = numeric_encoding
        self.buckets_per_octave = buckets_per_octave
        self.crosses = tuple(tuple(names) for names in crosses)
        self.value_fields = (
            []
            if numeric_encoding == "buckets"
            else [index for index, field in enumerate(self.fields) if field.kind == "numeric"]
        )
        self._mask = np.uint64((1 << table_bits) - 1)
        self._field_seeds = [_seed(field.name.encode(), hash_seed) for field in self.fields]
        self._cross_seeds = [
            _seed(b"\xff".join(name.encode() for name in names), hash_seed)
            for names in self.crosses
        ]
        index_of = {field.name: index for index, field in enumerate(self.fields)}
        crossed = sorted({index_of[name] for names in self.crosses for name in names})
        # The column of `hashes` of each field that is in a cross product, and those of each cross.
        self._hash_column = {field: column for column, field in enumerate(crossed)}
        self._cross_columns = [
            np.array([self._hash_column[index_of[name]] for name in names])
            for names in self.crosses
        ]

    def rows(
        self, features: Mapping[str, pa.Array]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return the `ids` int32 [n, F + C] and the `values` float32 [n, V] of n impressions.

        Features are columns by field name: strings or a dictionary of them for a categorical field,
        float64 for a numeric one. The last C ids are those of the cross products. `values` are the
        multipliers of the `value_fields`, 1 where a number is missing.
        """
        n = len(next(iter(features.values()))) if features else 0
        ids = np.empty((n, len(self.fields) + len(self.crosses)), np.int32)
        values = np.ones((n, len(self.value_fields)), np.float32)
        hashes = np.empty((n, len(self._hash_column)), np.uint64)
        for index, field in enumerate(self.fields):
            column = features[field.name]
            if index in self._hash_column:
                hash_column = self._hash_column[index]
                self._hash_field(column, index, _ALL_BITS, hashes, hash_column)
                ids[:, index] = hashes[:, hash_column] & self._mask
            elif index in self.value_fields:
                ids[:, index] = self._value_row(column, self._field_seeds[index])
                values[:, self.value_fields.index(index)] = self._multipliers(column, field.name)
            else:
                self._hash_field(column, index, self._mask, ids, index)
        crosses = zip(self._cross_columns, self._cross_seeds, strict=True)
        for index, (columns, seed) in enumerate(crosses, len(self.fields)):
            _hash_crosses(hashes, columns, seed, self._mask, ids, index)
        return ids, values

    def _hash_field(
        self, column: pa.Array, index: int, mask: np.uint64, out: npt.NDArray[Any], target: int
    ) -> None:
        """Write the masked hashes of a field into `out[:, target]`."""
        seed = self._field_seeds[index]
        if self.fields[index].kind == "numeric":
            x = column.to_numpy(zero_copy_only=False)  # null becomes NaN
            edges = self.bucket_edges.get(self.fields[index].name)
            _hash_buckets(_buckets(x, edges, self.buckets_per_octave), seed, mask, out, target)
        elif pa.types.is_dictionary(column.type):
            # Hash each word once. The last word is the missing one, at index -1.
            words = pa.concat_arrays([column.dictionary, pa.nulls(1, pa.string())])
            hashes = _hash_texts(words, seed, mask, out.dtype)
            out[:, target] = hashes[np.asarray(pc.fill_null(column.indices, -1))]
        else:
            _hash_texts_into(string_buffers(column), seed, mask, out, target)

    def _value_row(self, column: pa.Array, seed: np.uint64) -> npt.NDArray[np.int32]:
        """Return the row of the text "value", or that of a missing value [n]."""
        texts = pa.array(["value", None], pa.string())
        present, missing = _hash_texts(texts, seed, self._mask, np.int32)
        return np.where(np.asarray(column.is_valid()), present, missing).astype(np.int32)

    def _multipliers(self, column: pa.Array, name: str) -> npt.NDArray[np.float32]:
        x = column.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
        scaled = np.sign(x) * np.log1p(np.abs(x)) if self.numeric_encoding == "log_value" else x
        largest = LARGEST_UNSCALED_MULTIPLIER
        if name in self.value_scales:
            largest = LARGEST_MULTIPLIER
            with np.errstate(over="ignore"):
                scaled = scaled / self.value_scales[name]
        return np.where(np.isnan(x), 1.0, np.clip(scaled, -largest, largest)).astype(np.float32)


def _buckets(
    x: npt.NDArray[np.float64], edges: npt.NDArray[np.float64] | None, per_octave: float
) -> npt.NDArray[np.float64]:
    """Return the bucket of each number, NaN where it is missing [n]."""
    if edges is None:
        return np.sign(x) * np.floor(per_octave * np.log2(1.0 + np.abs(x)))
    bucket = np.searchsorted(edges, x, side="right").astype(np.float64)
    width = edges[-1] - edges[0]
    with np.errstate(over="ignore"):
        below = np.minimum((edges[0] - x) / width, _LARGEST)
        above = np.minimum((x - edges[-1]) / width, _LARGEST)
    low, high = below > 0, above >= 0
    bucket[low] = -np.floor(per_octave * np.log2(1.0 + below[low]))
    bucket[high] = len(edges) + np.floor(per_octave * np.log2(1.0 + above[high]))
    return np.where(np.isnan(x), np.nan, bucket)


def hash_ids(impression_id: pa.StringArray) -> npt.NDArray[np.uint64]:
    """Return 64-bit hashes of impression ids [n].

    Among a million ids, two have the same hash with a probability of 3e-8.

    >>> hash_ids(pa.array(["a1"])).tolist()
    [5693669818594506317]
    """
    out = np.empty(len(impression_id), np.uint64)
    _hash_all(string_buffers(impression_id), out)
    return out


def murmur3(value: bytes, seed: int = 0) -> int:
    """Return the first 64 bits of MurmurHash3 x64 128.

    >>> hex(murmur3(b"hello"))
    '0xcbd8a7b341bd9b02'
    """
    return int(_murmur3(np.frombuffer(value, np.uint8), 0, len(value), np.uint64(seed)))


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return MurmurHash3's 64-bit finaliser of each element: a bijection that spreads every bit.

    >>> mix64(np.array([0, 1], np.uint64)).tolist()
    [0, 12994781566227106604]
    """
    with np.errstate(over="ignore"):
        x = (x ^ (x >> _MIX_SHIFT)) * _MIX_1
        x = (x ^ (x >> _MIX_SHIFT)) * _MIX_2
    return x ^ (x >> _MIX_SHIFT)


def _seed(name: bytes, hash_seed: int) -> np.uint64:
    return np.uint64(murmur3(name, hash_seed) & _LOW_32_BITS)


def _hash_texts(
    texts: pa.StringArray, seed: np.uint64, mask: np.uint64, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Return the masked hashes of texts, missing ones included [n]."""
    out = np.empty((len(texts), 1), dtype)
    _hash_texts_into(string_buffers(texts), seed, mask, out, 0)
    return out[:, 0]


# -- compiled ------------------------------------------------------------------------------------


@numba.njit(cache=True, forceinline=True)
def _rotate(x: np.uint64, bits: int) -> np.uint64:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@numba.njit(cache=True, forceinline=True)
def _finalise(k: np.uint64) -> np.uint64:
    k = (k ^ (k >> _MIX_SHIFT)) * _MIX_1
    k = (k ^ (k >> _MIX_SHIFT)) * _MIX_2
    return k ^ (k >> _MIX_SHIFT)


@numba.njit(cache=True, forceinline=True)
def _load_word(data: npt.NDArray[np.uint8], start: int, size: int) -> np.uint64:
    """Return `size` bytes (at most 8) as a little-endian integer."""
    word = np.uint64(0)
    if start + _WORD > len(data):
        for i in range(size):
            word |= np.uint64(data[start + i]) << np.uint64(8 * i)
        return word
    unsigned_start = np.uint64(start)  # saves the check for a negative index
    for i in range(_WORD):  # unrolled, and compiled to one load
        word |= np.uint64(data[unsigned_start + np.uint64(i)]) << np.uint64(8 * i)
    return word & (_ALL_BITS >> np.uint64(64 - 8 * size))


@numba.njit(cache=True, forceinline=True)
def _murmur3(data: npt.NDArray[np.uint8], start: int, size: int, seed: np.uint64) -> np.uint64:
    """Return h1 of the `size` bytes from `start` on."""
    h1 = np.uint64(seed)
    h2 = np.uint64(seed)
    blocks = size // _BLOCK
    for block in range(blocks):
        position = start + _BLOCK * block
        h1 ^= _rotate(_load_word(data, position, _WORD) * _C1, 31) * _C2
        h1 = (_rotate(h1, 27) + h2) * np.uint64(5) + _H1_ADD
        h2 ^= _rotate(_load_word(data, position + _WORD, _WORD) * _C2, 33) * _C1
        h2 = (_rotate(h2, 31) + h1) * np.uint64(5) + _H2_ADD
    tail = start + _BLOCK * blocks
    tail_size = size - _BLOCK * blocks
    if tail_size > _WORD:
        h2 ^= _rotate(_load_word(data, tail + _WORD, tail_size - _WORD) * _C2, 33) * _C1
    if tail_size > 0:
        h1 ^= _rotate(_load_word(data, tail, min(tail_size, _WORD)) * _C1, 31) * _C2
    h1 ^= np.uint64(size)
    h2 ^= np.uint64(size)
    h1 += h2
    h2 += h1
    return _finalise(h1) + _finalise(h2)


@numba.njit(cache=True, nogil=True)
def _hash_texts_into(
    texts: StringBuffers, seed: np.uint64, mask: np.uint64, out: npt.NDArray[Any], target: int
) -> None:
    """Write the masked hashes of texts, missing ones included, into `out[:, target]`."""
    data, offsets, valid = texts
    missing = _murmur3(_MISSING, 0, 1, seed) & mask
    for i in range(len(valid)):
        if valid[i]:
            out[i, target] = _murmur3(data, offsets[i], offsets[i + 1] - offsets[i], seed) & mask
        else:
            out[i, target] = missing


@numba.njit(cache=True, nogil=True)
def _hash_all(texts: StringBuffers, out: npt.NDArray[np.uint64]) -> None:
    """Write the hashes of texts, none of them missing, into `out`."""
    data, offsets, _ = texts
    for i in range(len(out)):
        out[i] = _murmur3(data, offsets[i], offsets[i + 1] - offsets[i], np.uint64(0))


@numba.njit(cache=True, nogil=True)
def _hash_buckets(
    bucket: npt.NDArray[np.float64],
    seed: np.uint64,
    mask: np.uint64,
    out: npt.NDArray[Any],
    target: int,
) -> None:
    """Write the masked hashes of the decimal text of whole numbers into `out[:, target]`."""
    known_hash = np.empty(2 * _FREQUENT_BUCKETS + 1, np.uint64)
    is_known = np.zeros(2 * _FREQUENT_BUCKETS + 1, np.bool_)
    missing = _murmur3(_MISSING, 0, 1, seed) & mask
    text = np.empty(_MOST_INTEGER_CHARACTERS, np.uint8)
    for i in range(len(bucket)):
        if np.isnan(bucket[i]):
            out[i, target] = missing
            continue
        number = np.int64(bucket[i])
        is_frequent = -_FREQUENT_BUCKETS <= number <= _FREQUENT_BUCKETS
        if is_frequent and is_known[number + _FREQUENT_BUCKETS]:
            out[i, target] = known_hash[number + _FREQUENT_BUCKETS]
            continue
        first = len(text)
        rest = abs(number)
        while rest > 0 or first == len(text):
            first -= 1
            text[first] = _DIGIT_0 + rest % 10
            rest //= 10
        if number < 0:
            first -= 1
            text[first] = _MINUS
        hashed = _murmur3(text, first, len(text) - first, seed) & mask
        if is_frequent:
            known_hash[number + _FREQUENT_BUCKETS] = hashed
            is_known[number + _FREQUENT_BUCKETS] = True
        out[i, target] = hashed


@numba.njit(cache=True, nogil=True)
def _hash_crosses(
    hashes: npt.NDArray[np.uint64],
    columns: npt.NDArray[np.int64],
    seed: np.uint64,
    mask: np.uint64,
    out: npt.NDArray[np.int32],
    target: int,
) -> None:
    """Write the masked hash of these `columns` of each row of `hashes` into `out[:, target]`."""
    data = np.empty(_WORD * len(columns), np.uint8)
    for i in range(len(hashes)):
        for j in range(len(columns)):
            for byte in range(_WORD):
                data[_WORD * j + byte] = hashes[i, columns[j]] >> np.uint64(8 * byte)
        out[i, target] = _murmur3(data, 0, len(data), seed) & mask
