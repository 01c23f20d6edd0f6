"""Pairs of fields as columns: which are taken, and their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.learners import learner, logloss

from stream_ctr.learn.pairs import MOST_PAIRS, PairHasher, choose_columns


def fmix64(x: int) -> int:
    """MurmurHash3's finaliser, in Python's integers."""
    bits = (1 << 64) - 1
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = ((x ^ (x >> 33)) * factor) & bits
    return x ^ (x >> 33)


def test_rows_are_those_of_the_published_formula() -> None:
    columns = choose_columns(5)
    ids = np.random.default_rng(0).integers(0, 1 << 31, (50, 5)).astype(np.int32)
    rows = PairHasher(columns, table_bits=22).rows(ids)
    for e, example in enumerate(ids.tolist()):
        for c, (i, j) in enumerate(columns):
            salt = (i * 65536 + j) * 0x9E3779B97F4A7C15 % (1 << 64)
            assert rows[e, c] == fmix64((example[i] * 2**32 + example[j]) ^ salt) % (1 << 22)


def test_all_pairs_are_taken_up_to_190_and_then_a_fixed_190() -> None:
    assert len(choose_columns(20)) == 20 + 190
    many = choose_columns(39)
    assert many[:39] == [(field, field) for field in range(39)]
    assert len(many) == 39 + MOST_PAIRS
    assert len(set(many)) == len(many)
    assert many == choose_columns(39)
    assert all(i < j for i, j in many[39:])
    assert choose_columns(1) == [(0, 0)]


def test_fields_with_a_value_are_in_no_pair() -> None:
    assert choose_columns(4, {1}) == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 2), (0, 3), (2, 3)]


def test_lr_over_pairs_learns_an_interaction_that_lr_over_fields_cannot() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (4000, 2))
    labels = (values[:, 0] ^ values[:, 1]).astype(np.uint8)
    ids = (values + 2 * np.arange(2)).astype(np.int32)
    options: dict[str, Any] = {"fields": 2, "table_bits": 4, "batch_size": 4000}
    alone = learner("lr", **options).learn(ids, labels)
    pairs = {"columns": choose_columns(2), "table_bits": 10}
    paired = learner("lr", pairs=pairs, **options).learn(ids, labels)
    assert alone is not None
    assert paired is not None
    assert logloss(alone.numpy(), labels) > 0.6
    assert logloss(paired.numpy(), labels) < 0.2
