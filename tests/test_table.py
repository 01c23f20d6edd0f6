"""The layout of a row, the rates, and the table itself."""

from __future__ import annotations

import math
import mmap

import pytest
import torch

from stream_ctr.errors import ConfigError
from stream_ctr.learn.table import Rates, Table
from stream_ctr.learn.table_kernels import row_floats


def test_a_row_is_a_whole_number_of_cache_lines() -> None:
    assert row_floats(10) * 4 == row_floats(13) * 4 == 64
    assert row_floats(14) == row_floats(16) == 32
    assert row_floats(10, embeddings=2) == 32  # 20 + 1, three n
    assert row_floats(10, optimizer="adam") == 48  # three times 10 + 1
    assert row_floats(10, embeddings=2, optimizer="adam") == 64  # three times 20 + 1


def test_a_table_starts_with_normal_embeddings_and_zeros_elsewhere() -> None:
    table = Table(bits=12, embedding_dim=3, embeddings=2, initial_scale=0.5, seed=7)
    v = table.rows[:, : table.width]
    assert table.rows.shape == (4096, 16)
    assert float(v.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(v.std()) == pytest.approx(0.5, rel=0.03)
    assert not table.rows[:, table.width :].any()
    same = Table(bits=12, embedding_dim=3, embeddings=2, initial_scale=0.5, seed=7)
    other = Table(bits=12, embedding_dim=3, embeddings=2, initial_scale=0.5, seed=8)
    assert torch.equal(table.rows, same.rows)
    assert not torch.equal(table.rows, other.rows)


def test_resetting_the_optimiser_keeps_the_weights() -> None:
    table = Table(bits=4, embedding_dim=3, embeddings=2, rates=Rates("adam"))
    table.rows[:, 6] = 0.5  # w
    table.rows[:, 7:] = 1.0  # the state
    weights = table.rows[:, :7].clone()
    table.reset_optimizer()
    assert torch.equal(table.rows[:, :7], weights)
    assert not table.rows[:, 7:].any()


def test_a_table_without_memory_names_the_option_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(ConfigError, match=r"2\^31 rows of 64 bytes; lower model.table_bits"):
        Table(bits=31, embedding_dim=10)


@pytest.mark.parametrize("fields", [3, 30])
@pytest.mark.parametrize("optimizer", ["online", "adagrad", "adam"])
def test_a_rate_of_0_is_the_optimisers_own_divided_by_the_fields_except_with_adam(
    optimizer: str, fields: int
) -> None:
    rates = Rates.per_field(
        optimizer,
        fields=fields,
        learning_rate=0.0,
        beta=3.0,
        linear_learning_rate=0.0,
        linear_beta=1.0,
    )
    own = {"online": (1.0, 3.0), "adagrad": (1.0, 2.0), "adam": (0.001, 0.001)}[optimizer]
    divisor = 1 if optimizer == "adam" else fields
    assert rates.learning_rate == own[0] / divisor
    assert rates.linear_learning_rate == own[1] / divisor


@pytest.mark.parametrize(
    ("optimizer", "betas"),
    [("online", (1.0, 1.0 + 3 / 5)), ("adagrad", (3.0, 1.0)), ("adam", (1e-8, 1e-8))],
)
def test_a_beta_of_0_is_the_optimisers_own(optimizer: str, betas: tuple[float, float]) -> None:
    rates = Rates.per_field(
        optimizer,
        fields=4,
        columns=5,
        learning_rate=0.0,
        beta=0.0,
        linear_learning_rate=0.0,
        linear_beta=0.0,
    )
    assert (rates.beta, rates.linear_beta) == betas


def test_the_gradient_of_adagrad_is_that_of_the_summed_loss() -> None:
    rates = Rates("adagrad", 0.1, 2.0, 0.3, 4.0)
    assert [float(number) for number in rates.at_step(5, examples=96)] == pytest.approx(
        [96.0, 0.1, 2.0, 0.3, 4.0], rel=1e-6
    )


@pytest.mark.parametrize("steps", [0, 1, 1000])
def test_adam_takes_the_mean_loss_and_corrects_its_rates(steps: int) -> None:
    rates = Rates("adam", 0.1, 1e-8, 0.3, 1e-8)
    correction = math.sqrt(1 - 0.999 ** (steps + 1)) / (1 - 0.9 ** (steps + 1))
    assert [float(number) for number in rates.at_step(steps, examples=96)] == pytest.approx(
        [1.0, 0.1 * correction, 1e-8, 0.3 * correction, 1e-8], rel=1e-6
    )
