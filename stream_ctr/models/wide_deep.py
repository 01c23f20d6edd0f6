"""Wide & Deep (Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016) in the paper's two forms: LR & DNN and FM & DNN.

    LR & DNN    y = <w, x> + <w_c, phi(x)> + MLP([e_1, ..., e_F])        phi: the configured cross products, if any
    FM & DNN    y = y_FM(w, U) + MLP([e_1, ..., e_F]),  e_i = V_i x_i    U and V are embeddings of their own

The first is Cheng et al.'s model, the second the DeepFM paper's extension of it (section 2.2). phi is their cross-product transformation,
hashed like a field: each combination of values that occurs has a weight of its own, and no embedding. The deep side's last bias is the
constant of both.

Cheng et al. have FTRL with L1 on the wide side and AdaGrad on the deep one. Here all rows step by the table's optimiser and the network by
Adam, as for the other systems: what the paper's table compares is models, and it too has one optimiser for both sides (its footnote 6).
Common implementations of FM & DNN feed both sides one embedding, which is DeepFM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from stream_ctr.models.layers import MLP, pairwise_inner_products


class LRDNN(nn.Module):
    """`w` [B, F + C], of the fields and of C cross products, and `v` [B, F + C, K], of which the network reads the fields' -> logits [B].

    >>> import torch
    >>> LRDNN(fields=3, embedding_dim=4, hidden=[8])(torch.zeros(2, 5), torch.zeros(2, 5, 4)).shape  # two crosses
    torch.Size([2])
    """

    crosses: ClassVar[bool] = True

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

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        y_dnn: Tensor = self.deep(v[:, : self._fields].flatten(1))
        return w.sum(dim=1) + y_dnn


class FMDNN(nn.Module):
    """`w` [B, F] and `v` [B, F, 2 K], the FM's K coordinates and then the network's -> logits [B].

    >>> import torch
    >>> FMDNN(fields=3, embedding_dim=4, hidden=[8])(torch.zeros(2, 3), torch.zeros(2, 3, 8)).shape
    torch.Size([2])
    """

    embeddings: ClassVar[int] = 2

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

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        u, e = v.chunk(2, dim=2)  # [B, F, K] each
        y_fm: Tensor = w.sum(dim=1) + pairwise_inner_products(u)
        y_dnn: Tensor = self.deep(e.flatten(1))
        return y_fm + y_dnn
