"""Digests of arrays do not depend on layout, threads, or on who took those of the slices."""

from __future__ import annotations

import json
import math
import struct
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.learn import array_digests
from stream_ctr.learn.array_digests import ArrayDigest, digest_of, slice_sha256, tensors_sha256


def by_hand(tensors: dict[str, Any]) -> str:
    """Return the digest by another way: every value is packed on its own."""
    whole = b""
    for name, array in sorted(tensors.items()):
        slices = math.gcd(len(array), 64) if array.ndim == 2 and len(array) else 1
        rows = array.shape[0] // slices if slices > 1 else 0
        parts = [array[i * rows : i * rows + rows] for i in range(slices)] if rows else [array]
        code = {"float32": "f", "float64": "d", "uint32": "I"}[array.dtype.name]
        whole += json.dumps([name, "<" + array.dtype.str[1:], list(array.shape)]).encode() + b"\n"
        for part in parts:
            values = part.ravel().tolist()
            whole += sha256(struct.pack(f"<{len(values)}{code}", *values)).digest()
    return sha256(whole).hexdigest()


shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)


@given(shape=shapes, dtype=st.sampled_from(["f4", "f8", "u4"]), seed=st.integers(0, 9))
def test_the_digest_is_that_of_the_slices_of_each_array(
    shape: tuple[int, ...], dtype: str, seed: int
) -> None:
    array = np.random.default_rng(seed).integers(0, 99, shape).astype(dtype)
    tensors = {"b": array, "a": np.arange(6, dtype=np.float32)}
    assert tensors_sha256(tensors) == by_hand(tensors)
    assert tensors_sha256({**tensors, "b": digest_of(array)}) == by_hand(tensors)


@pytest.mark.parametrize("rows", [1 << 15, 3 << 14])
def test_threads_and_views_give_the_same_digest(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(0).normal(size=(rows, 16)).astype(np.float32)
    view = table[:, :11]
    assert view.nbytes > array_digests._FOR_THREADS_BYTES
    found = {name: digest_of(array) for name, array in {"t": table, "v": view}.items()}
    monkeypatch.setattr(array_digests, "_FOR_THREADS_BYTES", 1 << 40)
    assert digest_of(np.asfortranarray(table)) == digest_of(table.astype(">f4")) == found["t"]
    assert digest_of(view.copy()) == digest_of(view) == found["v"]
    monkeypatch.setattr(array_digests, "_BLOCK_BYTES", 1000)
    assert digest_of(view) == found["v"]


def test_the_digests_of_shards_are_those_of_the_slices_of_the_table() -> None:
    table = np.arange(128 * 16, dtype=np.float32).reshape(128, 16)
    shards = [slice_sha256(table[first : first + 2]) for first in range(0, 128, 2)]
    assert ArrayDigest("<f4", (128, 16), tuple(shards)) == digest_of(table)


def test_every_bit_of_every_slice_counts() -> None:
    table = np.zeros((64, 2), np.float32)
    digest = tensors_sha256({"table": table})
    for row in range(64):
        other = table.copy()
        other[row].view(np.uint8)[row % 8] = 1
        assert tensors_sha256({"table": other}) != digest
    swapped = np.arange(128, dtype=np.float32).reshape(64, 2)
    assert tensors_sha256({"t": swapped}) != tensors_sha256({"t": swapped[::-1]})
