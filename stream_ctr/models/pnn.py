"""Product-based networks (Qu et al., "Product-based Neural Networks for User Response Prediction", ICDM 2016): IPNN, OPNN and PNN*.

    z   = [f_1, ..., f_F],  f_i = V_i x_i                       their linear signal, (4) to (6)
    p   = inner: p_ij = <f_i, f_j> for i < j                    IPNN
          outer: p = f f^T [K, K],  f = sum_i f_i               OPNN, their (15): the F^2 outer products laid over each other
          both                                                  PNN*
    y   = MLP([z, p])                                           their (1) to (3): W_z and W_p are the two parts of its first layer

Of the inner products their (10) approximates the weights of each neuron by a matrix of rank one, to save memory. Here each pair has a weight
of its own, as in most implementations: that is what the approximation stands for, and the pairs are as many as F (F - 1) / 2 inputs only.
The outer product is theirs; the DeepFM paper finds it "less reliable" since it sums over the fields before it multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from stream_ctr.models.layers import MLP, inner_products, outer_product


class _PNN(nn.Module):
    """`w` [B, F], which it has no use for, and `v` [B, F, K] -> logits [B]."""

    inner: ClassVar[bool] = False
    outer: ClassVar[bool] = False

    def __init__(
        self, *, fields: int, embedding_dim: int, hidden: Sequence[int] = (400, 400, 400), activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        products = self.inner * (fields * (fields - 1) // 2) + self.outer * embedding_dim**2
        self.deep = MLP(fields * embedding_dim + products, hidden, activation=activation, dropout=dropout)

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        signals = [v.flatten(1)]  # [B, F * K]
        if self.inner:
            signals.append(inner_products(v))  # [B, F * (F - 1) / 2]
        if self.outer:
            signals.append(outer_product(v.sum(dim=1)))  # [B, K * K]
        logits: Tensor = self.deep(torch.cat(signals, dim=1))
        return logits


class IPNN(_PNN):
    """With inner products. The paper gives it tanh, and all others relu.

    >>> IPNN(fields=3, embedding_dim=4, hidden=[8])(torch.zeros(2, 3), torch.zeros(2, 3, 4)).shape
    torch.Size([2])
    """

    inner = True


class OPNN(_PNN):
    """With the outer product.

    >>> OPNN(fields=3, embedding_dim=4, hidden=[8])(torch.zeros(2, 3), torch.zeros(2, 3, 4)).shape
    torch.Size([2])
    """

    outer = True


class PNN(_PNN):
    """PNN*, with both.

    >>> PNN(fields=3, embedding_dim=4, hidden=[8])(torch.zeros(2, 3), torch.zeros(2, 3, 4)).shape
    torch.Size([2])
    """

    inner = outer = True
