"""Wide & Deep in the DeepFM paper's two forms: LR & DNN and FM & DNN.

Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016:

    LR & DNN    y = <w, x> + <w_c, phi(x)> + MLP([e_1, ..., e_F])    phi: the cross products, if any
    FM & DNN    y = y_FM(w, U) + MLP([e_1, ..., e_F]),  e_i = V_i x_i

The first is the model of Cheng et al., the second the DeepFM paper's extension of it (section 2.2),
in which U and V are separate embeddings. phi is the cross-product transformation, hashed like a
field: each combination of values that occurs has a weight of its own, and no embedding. The last
bias of the deep side is the constant of both.

Cheng et al. train the wide side by FTRL with L1 and the deep side by AdaGrad. Here all rows are
updated by the table's optimiser and the network by Adam, as for the other systems: the paper's
table compares models, and it too has one optimiser for both sides (its footnote 6). Common
implementations of FM & DNN feed both sides one embedding, which is DeepFM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Generator, Tensor, nn

from stream_ctr.models.layers import MLP, Tape
from stream_ctr.models.products import FieldSums, pairwise_inner_products
from stream_ctr.models.terms import Terms


class LRDNN(nn.Module):
    """`w` [B, F + C] and `v` [B, F + C, K], for F fields and C cross products -> logits [B].

    The network reads the embeddings of the fields alone.

    >>> import torch
    >>> model = LRDNN(fields=3, embedding_dim=4, hidden=[8])
    >>> model(torch.zeros(2, 5), torch.zeros(2, 5, 4)).shape  # two crosses
    torch.Size([2])
    """

    crosses: ClassVar[bool] = True
    terms: ClassVar[Terms] = Terms(linear=True)

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
        self._fields = fields
        self.deep = MLP(fields * embedding_dim, hidden, activation=activation, dropout=dropout)

    def forward(
        self,
        w: Tensor,
        v: Tensor,
        *,
        sums: FieldSums | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        return w.sum(dim=1) + self.deep_logits(w, v, generator=generator)

    def deep_logits(
        self, w: Tensor, v: Tensor, *, generator: Generator | None = None, tape: Tape | None = None
    ) -> Tensor:
        y_dnn: Tensor = self.deep(v[:, : self._fields].flatten(1), generator, tape)
        return y_dnn


class FMDNN(nn.Module):
    """`w` [B, F] and `v` [B, F, 2 K] -> logits [B].

    The first K coordinates of `v` are the FM's and the others the network's. `sums`, which are over
    all 2 K, are not used.

    >>> import torch
    >>> model = FMDNN(fields=3, embedding_dim=4, hidden=[8])
    >>> model(torch.zeros(2, 3), torch.zeros(2, 3, 8)).shape
    torch.Size([2])
    """

    embeddings: ClassVar[int] = 2
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
        u, _ = v.chunk(2, dim=2)  # [B, F, K] each
        y_fm: Tensor = w.sum(dim=1) + pairwise_inner_products(u)
        return y_fm + self.deep_logits(w, v, generator=generator)

    def deep_logits(
        self, w: Tensor, v: Tensor, *, generator: Generator | None = None, tape: Tape | None = None
    ) -> Tensor:
        _, e = v.chunk(2, dim=2)
        y_dnn: Tensor = self.deep(e.flatten(1), generator, tape)
        return y_dnn
