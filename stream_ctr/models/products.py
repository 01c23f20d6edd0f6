"""Products of embeddings: the second-order term of a factorization machine, and those of PNN."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FieldSums:
    """Sums over the fields of `v` [B, F, K] that a step has already computed.

    `total` [B, K] is the sum of the embeddings, and `pairs` [B] is `pairwise_inner_products(v)`.
    A kernel that gathers `v` computes both while the rows pass through its registers.
    """

    total: Tensor
    pairs: Tensor


class _PairwiseInnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, total: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(v, total)
        return pairs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        v, total = ctx.saved_tensors
        # Each v_i meets the sum of all others.
        return (total.unsqueeze(1) - v).mul_(dy[:, None, None]), None, None


def pairwise_inner_products(v: Tensor, sums: FieldSums | None = None) -> Tensor:
    """Return the sum over field pairs i < j of <v_i, v_j>: `v` [B, F, K] -> [B].

    This is the second term of equation (2), in O(FK) rather than O(F^2 K) (Rendle 2010,
    Lemma 3.1): per coordinate, half of the square of the sum less the sum of the squares. `sums`,
    when given, must be those of `v`; nothing is summed then.

    >>> v = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]])
    >>> pairwise_inner_products(v)  # <v1,v2> + <v1,v3> + <v2,v3> = 1 + 8.5 - 2.5
    tensor([7.])
    """
    known = field_sums(v.detach()) if sums is None else sums
    if torch.is_inference_mode_enabled():
        return known.pairs
    return _PairwiseInnerProducts.apply(v, known.total, known.pairs)  # type: ignore[no-untyped-call]


def field_sums(v: Tensor) -> FieldSums:
    """Return the sums over the fields of `v` [B, F, K].

    >>> sums = field_sums(torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]]))
    >>> sums.total.tolist(), sums.pairs.tolist()
    ([[4.5, 5.0]], [7.0])
    """
    total = v.sum(dim=1)
    flat = v.flatten(1)
    pairs = 0.5 * (torch.linalg.vecdot(total, total) - torch.linalg.vecdot(flat, flat))
    return FieldSums(total, pairs)


@functools.cache
def _pair_indices(fields: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two index vectors for a flattened [F, F] matrix.

    The first holds the positions of the pairs i < j, in their order. The second holds, for each
    position, the number of its pair, and 0 on the diagonal.
    """
    i, j = torch.triu_indices(fields, fields, offset=1)
    pair_at = torch.zeros(fields, fields, dtype=torch.int64)
    pair_at[i, j] = pair_at[j, i] = torch.arange(len(i))
    return (i * fields + j).to(device), pair_at.flatten().to(device)


class _InnerProducts(torch.autograd.Function):
    """Both passes are a matrix product and a choice of columns.

    Autograd's own backward pass would add at indices, which is slow, and on a GPU gives different
    sums in different runs.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        positions, _ = _pair_indices(v.shape[1], v.device)
        return torch.bmm(v, v.transpose(1, 2)).flatten(1).index_select(1, positions)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        fields = v.shape[1]
        if fields < 2:
            return torch.zeros_like(v)
        _, pair_at = _pair_indices(fields, v.device)
        # [B, F, F], symmetric: d/d<v_i, v_j> at (i, j) and at (j, i).
        gradient = dy.index_select(1, pair_at).view(-1, fields, fields)
        gradient.diagonal(dim1=1, dim2=2).zero_()
        return torch.bmm(gradient, v)


def inner_products(v: Tensor) -> Tensor:
    """Return <v_i, v_j> of each field pair i < j: `v` [B, F, K] -> [B, F (F - 1) / 2].

    The order is (1,2), (1,3), ..., (2,3), ...

    >>> inner_products(torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]]))
    tensor([[ 1.0000,  8.5000, -2.5000]])
    """
    products: Tensor = _InnerProducts.apply(v)  # type: ignore[no-untyped-call]
    return products


def outer_product(f: Tensor) -> Tensor:
    """Return all products of two coordinates: `f` [B, K] -> [B, K * K].

    >>> outer_product(torch.tensor([[2.0, 3.0]]))
    tensor([[4., 6., 6., 9.]])
    """
    return (f.unsqueeze(2) * f.unsqueeze(1)).flatten(1)
