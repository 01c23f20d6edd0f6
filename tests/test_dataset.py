"""Tests of `stream_ctr.paper.dataset`: columns on disk, the split, and shuffled batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paper_data import read_dataset

from stream_ctr.errors import DataError
from stream_ctr.join.examples import Examples
from stream_ctr.logs.simulate import Simulation
from stream_ctr.paper import dataset
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, Split

# -- on disk -------------------------------------------------------------------------------------


def test_an_interrupted_reading_leaves_no_dataset(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Examples]:
        n = 10
        zeros = np.zeros(n, np.int64)
        yield Examples(
            zeros.astype(np.uint64),
            zeros,
            np.zeros((n, 2), np.int32),
            np.zeros((n, 0), np.float32),
            np.zeros(n, np.uint8),
            np.ones(n),
            zeros,
        )
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.write(tmp_path / "data", interrupted(), identity={})
    assert dataset.open_existing(tmp_path / "data") is None


def test_damaged_data_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    read_dataset(Simulation(300, seed=4), tmp_path / "data")
    (tmp_path / "data" / "ids.bin").write_bytes(b"cut short")
    with pytest.raises(DataError, match="data is damaged .*--restart reads the log again"):
        read_dataset(Simulation(300, seed=4), tmp_path / "data")


# -- split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["random", "time"])
def test_every_example_is_in_one_part_of_the_right_size(how: str) -> None:
    split = Split.of(50_000, how)
    rows = [split.rows(part) for part in (TRAINING, VALIDATION, TEST)]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(50_000))
    assert [len(part) / 50_000 for part in rows] == pytest.approx([0.81, 0.09, 0.1], abs=0.005)


def test_a_split_by_time_trains_on_the_past_and_tests_on_the_future() -> None:
    split = Split.of(1000, "time")
    validation = split.rows(VALIDATION)
    assert split.rows(TRAINING).max() < validation.min()
    assert validation.max() < split.rows(TEST).min()


def test_a_random_split_depends_on_the_seed_and_not_on_later_rows() -> None:
    first = Split.of(2000, "random")
    other_seed = Split.of(2000, "random", seed=1)
    longer = Split.of(3_000_000, "random")
    both = set(first.rows(TEST).tolist()) & set(other_seed.rows(TEST).tolist())
    assert len(both) < 50  # a tenth of a tenth by chance
    assert np.array_equal(first.part, longer.part[:2000])


def test_a_sample_is_uniform_over_time_and_the_same_in_every_call() -> None:
    split = Split.of(2_500_000, "time")
    rows = split.rows(TRAINING, share=0.04)
    count = split.count(TRAINING)
    assert len(rows) == split.count(TRAINING, 0.04) == pytest.approx(0.04 * count, rel=0.01)
    histogram = np.histogram(rows, 10, (0, count))[0].tolist()
    assert histogram == pytest.approx([len(rows) / 10] * 10, rel=0.05)
    inside = (rows >= 1_000_000) & (rows < 1_100_000)
    assert np.array_equal(split.rows(TRAINING, 1_000_000, 1_100_000, share=0.04), rows[inside])
    assert set(rows.tolist()) <= set(split.rows(TRAINING, share=0.05).tolist())


# -- batches -------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    chunk=st.integers(1, 300),
    seed=st.integers(0, 3),
    share=st.floats(0.1, 1),
)
def test_an_epoch_has_every_training_row_once_in_full_batches(
    rows: int, batch_size: int, chunk: int, seed: int, share: float
) -> None:
    split = Split.of(rows, "random")
    shuffled = dataset.shuffled(
        split,
        TRAINING,
        seed=(seed, 0),
        batch_size=batch_size,
        row_bytes=(512 << 20) // chunk,
        share=share,
    )
    batches = list(shuffled)
    found = np.concatenate([*batches, np.empty(0, np.int64)])
    assert sorted(found.tolist()) == split.rows(TRAINING, share=share).tolist()
    assert len(found) == split.count(TRAINING, share)
    assert share < 1 or len(found) == (split.part == TRAINING).sum()
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_epochs_differ_in_order_and_equal_seeds_agree() -> None:
    split = Split.of(500, "random")

    def order(*seed: int) -> list[int]:
        batches = dataset.shuffled(split, TRAINING, seed=seed, batch_size=64, row_bytes=100)
        found: list[int] = np.concatenate(list(batches)).tolist()
        return found

    assert order(0, 0) == order(0, 0) != order(0, 1) != order(1, 1)
