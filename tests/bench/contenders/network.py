"""DeepFM above the embeddings in plain PyTorch, for peers that have only an embedding table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


def mlp(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Return an MLP with a ReLU after each hidden layer and one output neuron."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


class Head(nn.Module):
    """The mean logloss of labels [B], given rows [B, F, >= K + 1] that begin with [ V x K | w ]."""

    def __init__(self, fields: int, embedding_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.deep = mlp(fields * embedding_dim, hidden)

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        v = rows[..., : self.embedding_dim]  # [B, F, K]
        w = rows[..., self.embedding_dim]  # [B, F]
        pairs = 0.5 * (v.sum(dim=1).square() - v.square().sum(dim=1)).sum(dim=1)
        logits = w.sum(dim=1) + pairs + self.deep(v.flatten(1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
