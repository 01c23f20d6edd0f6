"""Product-based networks (Qu et al., "Product-based Neural Networks for User Response Prediction", ICDM 2016): IPNN, OPNN and PNN*.

    z   = [f_1, ..., f_F],  f_i = V_i x_i                       their linear signal
    p   = inner: p_ij = <f_i, f_j> for i < j                    IPNN
          outer: p = f f^T [K, K],  f = sum_i f_i               OPNN: the F^2 outer products f_i f_j^T, laid over each other
          both                                                  PNN*
    y   = MLP([z, p])                                           W_z and W_p are the two parts of its first layer

They approximate the weights that a neuron gives the inner products by a matrix of rank one, to save time and memory. Here each pair has a
weight of its own, as in most implementations: that is what the approximation stands for, and F (F - 1) / 2 inputs are few. Their p also
has the pairs i = j, the squared lengths, which are no interactions. Their linear signal keeps one weight for each coordinate and neuron, as
here; `w` has no part in it. The outer product is theirs, summed over the fields before it is multiplied, which the DeepFM paper says makes
it less reliable than the inner one (section 2.2). Many implementations instead put a kernel between each pair of fields, a model that came
later. The constant 1 among their signals is the bias.
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
        self,
        *,
        fields: int,
        embedding_dim: int,
        hidden: Sequence[int] = (400, 400, 400),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        products = self.inner * (fields * (fields - 1) // 2) + self.outer * embedding_dim**2
        self.deep = MLP(
            fields * embedding_dim + products, hidden, activation=activation, dropout=dropout
        )

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
