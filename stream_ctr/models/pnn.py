"""Product-based networks: IPNN, OPNN and PNN*.

Qu et al., "Product-based Neural Networks for User Response Prediction", ICDM 2016:

    z = [f_1, ..., f_F],  f_i = V_i x_i           the linear signal
    p = inner: p_ij = <f_i, f_j> for i < j        IPNN
        outer: p = f f^T [K, K],  f = sum_i f_i   OPNN: the sum of all F^2 products f_i f_j^T
        both                                      PNN*
    y = MLP([z, p])                               W_z and W_p are the parts of its first layer

The authors approximate a neuron's weights of the inner products by a matrix of rank one, to save
time and memory. Here each pair has a weight of its own, as in most implementations: this is what
the approximation stands for, and F (F - 1) / 2 inputs are few. Their p also has the pairs i = j,
the squared lengths, which are no interactions. Their linear signal has one weight for each
coordinate and neuron, as here; `w` is not used. The outer product is theirs: the fields are summed
before the product, which according to the DeepFM paper (section 2.2) makes it less reliable than
the inner product. Many implementations instead put a kernel between each pair of fields, which is a
later model. The constant 1 among their signals is the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from stream_ctr.models.layers import MLP, Tape
from stream_ctr.models.products import FieldSums, inner_products, outer_product
from stream_ctr.models.terms import Terms


class _PNN(nn.Module):
    """`w` [B, F], which is not used, and `v` [B, F, K] -> logits [B]."""

    terms: ClassVar[Terms] = Terms()
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

    def forward(
        self,
        w: Tensor,
        v: Tensor,
        *,
        sums: FieldSums | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        return self.deep_logits(w, v, generator=generator)

    def deep_logits(
        self, w: Tensor, v: Tensor, *, generator: Generator | None = None, tape: Tape | None = None
    ) -> Tensor:
        signals = [v.flatten(1)]  # [B, F * K]
        if self.inner:
            signals.append(inner_products(v))  # [B, F * (F - 1) / 2]
        if self.outer:
            signals.append(outer_product(v.sum(dim=1)))  # [B, K * K]
        logits: Tensor = self.deep(torch.cat(signals, dim=1), generator, tape)
        return logits


class IPNN(_PNN):
    """PNN with inner products. The paper gives it tanh, and relu to all other networks.

    >>> model = IPNN(fields=3, embedding_dim=4, hidden=[8])
    >>> model(torch.zeros(2, 3), torch.zeros(2, 3, 4)).shape
    torch.Size([2])
    """

    inner = True


class OPNN(_PNN):
    """PNN with the outer product.

    >>> model = OPNN(fields=3, embedding_dim=4, hidden=[8])
    >>> model(torch.zeros(2, 3), torch.zeros(2, 3, 4)).shape
    torch.Size([2])
    """

    outer = True


class PNN(_PNN):
    """PNN*, with both products.

    >>> model = PNN(fields=3, embedding_dim=4, hidden=[8])
    >>> model(torch.zeros(2, 3), torch.zeros(2, 3, 4)).shape
    torch.Size([2])
    """

    inner = outer = True
