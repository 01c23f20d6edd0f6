"""Factorization machines (Rendle, "Factorization Machines", ICDM 2010), as the paper's equation (2) has them, and a constant.

    y_FM = b + <w, x> + sum_{j1 < j2} <V_j1, V_j2> x_j1 x_j2

The paper leaves the constant offset out of its equation "for simplicity"; Rendle's (1) has it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stream_ctr.models.layers import pairwise_inner_products


class FM(nn.Module):
    """`w` [B, F], `v` [B, F, K] -> logits [B].

    >>> w, v = torch.tensor([[0.5, 0.25]]), torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    >>> FM()(w, v)  # 0.5 + 0.25 + (1 * 3 - 2 * 1)
    tensor([1.7500], grad_fn=<AddBackward0>)
    """

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        y_fm: Tensor = self.bias + w.sum(dim=1) + pairwise_inner_products(v)
        return y_fm
