"""Ids by the published formula, computed with another implementation of MurmurHash3."""

from __future__ import annotations

from collections.abc import Sequence

import mmh3

_LOW_32_BITS = 0xFFFFFFFF


def published_id(field: str, value: bytes, *, hash_seed: int = 0, bits: int = 20) -> int:
    """Return the id of a value of this field. A missing value is the byte 0xff."""
    field_seed = _h1(field.encode(), hash_seed) & _LOW_32_BITS
    return _h1(value, field_seed) & ((1 << bits) - 1)


def published_cross(
    members: Sequence[tuple[str, bytes]], *, hash_seed: int = 0, bits: int = 20
) -> int:
    """Return the id of a cross product, whose members are pairs of a field and a value."""
    names = b"\xff".join(field.encode() for field, _ in members)
    cross_seed = _h1(names, hash_seed) & _LOW_32_BITS
    hashes = [
        published_id(field, value, hash_seed=hash_seed, bits=64).to_bytes(8, "little")
        for field, value in members
    ]
    return _h1(b"".join(hashes), cross_seed) & ((1 << bits) - 1)


def _h1(data: bytes, seed: int) -> int:
    """Return the first 64 bits of MurmurHash3 x64 128."""
    return mmh3.hash64(data, seed, signed=False)[0]
