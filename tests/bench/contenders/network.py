"""DeepFM above the embeddings, in plain PyTorch: the head that the peers which bring a table of their own are given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


def mlp(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """ReLU after each hidden layer, one output neuron."""
    widths = [inputs, *hidden]
    layers = [
        layer
        for one, next_one in itertools.pairwise(widths)
        for layer in (nn.Linear(one, next_one), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


class Head(nn.Module):
    """Rows that begin with [ V x K | w ], [B, F, >= K + 1], and labels [B] -> the mean logloss."""

    def __init__(self, fields: int, embedding_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.deep = mlp(fields * embedding_dim, hidden)

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        v, w = rows[..., : self.embedding_dim], rows[..., self.embedding_dim]
        pairs = 0.5 * (v.sum(dim=1).square() - v.square().sum(dim=1)).sum(dim=1)
        logits = w.sum(dim=1) + pairs + self.deep(v.flatten(1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
