"""Products of embeddings against loops over the field pairs, and their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from stream_ctr.models import FM
from stream_ctr.models.products import (
    FieldSums,
    field_sums,
    inner_products,
    outer_product,
    pairwise_inner_products,
)


def random_embeddings(examples: int, fields: int, k: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, fields, k, dtype=torch.float64, generator=generator)


def test_fm_is_the_sum_over_field_pairs_and_not_over_flattened_coordinates() -> None:
    v = [[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]
    by_pairs = (1 * 3 - 2 * 1) + (1 * 0.5 + 2 * 4) + (3 * 0.5 - 1 * 4)
    flat = [coordinate for embedding in v for coordinate in embedding]
    # As if each of the F * K numbers were a field of its own.
    over_coordinates = 0.5 * (sum(flat) ** 2 - sum(number * number for number in flat))
    assert (by_pairs, over_coordinates) == (7.0, 29.5)
    assert pairwise_inner_products(torch.tensor([v])).tolist() == [by_pairs]
    assert FM()(torch.zeros(1, 3), torch.tensor([v])).tolist() == [by_pairs]


@pytest.mark.parametrize("fields", [1, 2, 3, 7])
@pytest.mark.parametrize("k", [1, 4])
def test_products_are_those_of_each_pair_in_the_order_of_the_pairs(fields: int, k: int) -> None:
    v = random_embeddings(5, fields, k, seed=fields)
    pairs = list(itertools.combinations(range(fields), 2))
    expected = [[float(example[i] @ example[j]) for i, j in pairs] for example in v]
    found = inner_products(v).reshape(5, -1)
    assert np.allclose(found, np.array(expected).reshape(5, -1), atol=1e-12)
    assert np.allclose(pairwise_inner_products(v), [sum(row) for row in expected], atol=1e-12)


@pytest.mark.parametrize("fields", [1, 3])
def test_the_outer_product_of_the_sum_is_the_sum_of_all_outer_products(fields: int) -> None:
    v = random_embeddings(5, fields, 4)
    expected = [
        np.sum([np.outer(a, b).ravel() for a in example for b in example], axis=0)
        for example in v.numpy()
    ]
    assert np.allclose(outer_product(v.sum(dim=1)), expected, atol=1e-12)


@pytest.mark.parametrize("fields", [1, 2, 5])
@pytest.mark.parametrize(
    "layer",
    [
        inner_products,
        pairwise_inner_products,
        lambda v: pairwise_inner_products(v, field_sums(v.detach())),
        lambda v: outer_product(v.sum(dim=1)),
    ],
    ids=["inner", "pairwise", "pairwise with sums", "outer"],
)
def test_the_gradient_of_a_product_agrees_with_finite_differences(
    layer: Callable[[Tensor], Tensor], fields: int
) -> None:
    v = random_embeddings(3, fields, 2)
    assert gradcheck(layer, v.requires_grad_())
    strided = random_embeddings(3, fields, 4)[..., 2:]
    assert gradcheck(layer, strided.requires_grad_()), "where coordinates are not contiguous"


def test_given_sums_replace_the_sums_and_give_the_same_gradient() -> None:
    v = random_embeddings(5, 4, 3).requires_grad_()
    plain = pairwise_inner_products(v)
    sums = field_sums(v.detach())
    assert torch.equal(sums.pairs, plain)
    assert torch.equal(sums.total, v.detach().sum(dim=1))
    known = pairwise_inner_products(v, sums)
    assert torch.equal(known, plain)
    gradient = torch.randn(5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(plain, v, gradient)
    (found,) = torch.autograd.grad(known, v, gradient)
    assert torch.equal(found, expected)
    other = FieldSums(sums.total, sums.pairs + 1.0)
    assert torch.equal(pairwise_inner_products(v, other), plain + 1.0), "they are not summed anew"
