"""Factorization machine (Rendle, "Factorization Machines", ICDM 2010).

    y_FM = b + <w, x> + sum_{j1 < j2} <V_j1, V_j2> x_j1 x_j2

This is equation (2) of the DeepFM paper and a constant b. The DeepFM paper leaves it out "for
simplicity"; Rendle's equation (1) has it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from stream_ctr.models.products import FieldSums, pairwise_inner_products
from stream_ctr.models.terms import Terms


class FM(nn.Module):
    """`w` [B, F], `v` [B, F, K] -> logits [B].

    The constructor accepts the options of the other systems and needs none of them.

    >>> w, v = torch.tensor([[0.5, 0.25]]), torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    >>> FM()(w, v)  # 0.5 + 0.25 + (1 * 3 - 2 * 1)
    tensor([1.7500], grad_fn=<AddBackward0>)
    """

    terms: ClassVar[Terms] = Terms(linear=True, pairs=True, network=False)

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        w: Tensor,
        v: Tensor,
        *,
        sums: FieldSums | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        y_fm: Tensor = self.bias + w.sum(dim=1) + pairwise_inner_products(v, sums)
        return y_fm
