"""DeepFM: a factorization machine and a deep network over the same embeddings.

Guo, Tang, Ye, Li, He, "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction",
IJCAI 2017:

    y     = sigmoid(y_FM + y_DNN)                                (1)
    y_FM  = <w, x> + sum_{j1 < j2} <V_j1, V_j2> x_j1 x_j2        (2)
    a^(0) = [e_1, ..., e_m],  e_i = V_i x_i                      (3)
    a^(l+1) = sigma(W^(l) a^(l) + b^(l))                         (4)

The paper omits the FM's constant offset; the bias of the output neuron takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Generator, Tensor, nn

from stream_ctr.models.layers import MLP, Tape
from stream_ctr.models.products import FieldSums, pairwise_inner_products
from stream_ctr.models.terms import Terms


class DeepFM(nn.Module):
    """`w` [B, F], `v` [B, F, K] -> logits [B].

    >>> import torch
    >>> model = DeepFM(fields=3, embedding_dim=4, hidden=[8])
    >>> model(torch.zeros(2, 3), torch.zeros(2, 3, 4)).shape
    torch.Size([2])
    """

    terms: ClassVar[Terms] = Terms(linear=True, pairs=True)

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
        self.deep = MLP(fields * embedding_dim, hidden, activation=activation, dropout=dropout)

    def forward(
        self,
        w: Tensor,
        v: Tensor,
        *,
        sums: FieldSums | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        y_fm: Tensor = w.sum(dim=1) + pairwise_inner_products(v, sums)
        return y_fm + self.deep_logits(w, v, generator=generator)

    def deep_logits(
        self, w: Tensor, v: Tensor, *, generator: Generator | None = None, tape: Tape | None = None
    ) -> Tensor:
        y_dnn: Tensor = self.deep(v.flatten(1), generator, tape)  # [B, F, K] -> [B, F * K]
        return y_dnn
