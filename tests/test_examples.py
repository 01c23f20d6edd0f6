"""Examples as columns, and the ledger of those that were trained."""

from __future__ import annotations

import numpy as np

from stream_ctr.join.examples import Examples, Ledger


def examples(n: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples(
        id_hash=rng.integers(0, 1 << 60, n).astype(np.uint64),
        time=np.arange(n),
        ids=rng.integers(0, 100, (n, 3)).astype(np.int32),
        values=rng.random((n, 2)).astype(np.float32),
        label=(rng.random(n) < 0.5).astype(np.uint8),
        true_probability=rng.random(n),
        closed_ms=np.arange(n),
    )


def same(one: Examples, other: Examples) -> bool:
    pairs = zip(one.arrays().values(), other.arrays().values(), strict=True)
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_parts_in_order_concatenate_to_the_whole() -> None:
    whole = examples(10)
    assert same(Examples.concat([whole[:3], whole[3:3], whole[3:]]), whole)


def test_a_mask_selects_whole_rows() -> None:
    whole = examples(10)
    clicked = whole[whole.label == 1]
    assert 0 < len(clicked) < 10
    assert (clicked.label == 1).all()
    assert np.array_equal(clicked.ids, whole.ids[clicked.time])


def test_the_ledger_does_not_depend_on_the_order_and_does_on_the_labels() -> None:
    ids = np.arange(100, dtype=np.uint64)
    label = (ids % 3 == 0).astype(np.uint8)
    order = np.random.default_rng(0).permutation(100)
    parts = Ledger()
    for rows in np.array_split(order, 7):
        parts = parts.add(ids[rows], label[rows])
    assert parts == Ledger().add(ids, label)
    assert parts.sum != Ledger().add(ids, 1 - label).sum
    assert parts.count == 100
