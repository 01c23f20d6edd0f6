"""Ids by the published formula, computed with another MurmurHash3 library."""

from __future__ import annotations

from collections.abc import Sequence

import mmh3


def published_id(field: str, value: bytes, *, hash_seed: int = 0, bits: int = 20) -> int:
    """The README's recipe, with another implementation of the hash."""
    field_seed = mmh3.hash64(field.encode(), hash_seed, signed=False)[0] & 0xFFFFFFFF
    return mmh3.hash64(value, field_seed, signed=False)[0] & ((1 << bits) - 1)


def published_cross(
    members: Sequence[tuple[str, bytes]], *, hash_seed: int = 0, bits: int = 20
) -> int:
    """The recipe for a cross product: of fields, and of the bytes that each hashes."""
    cross_seed = (
        mmh3.hash64(b"\xff".join(field.encode() for field, _ in members), hash_seed, signed=False)[
            0
        ]
        & 0xFFFFFFFF
    )
    hashes = [
        published_id(field, value, hash_seed=hash_seed, bits=64).to_bytes(8, "little")
        for field, value in members
    ]
    return mmh3.hash64(b"".join(hashes), cross_seed, signed=False)[0] & ((1 << bits) - 1)
