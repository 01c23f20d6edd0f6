"""Layers that the paper's systems share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def pairwise_inner_products(v: Tensor) -> Tensor:
    """Sum over field pairs i < j of <v_i, v_j>: `v` [B, F, K] -> [B], the second term of equation (2).

    In O(FK) rather than O(F^2 K) (Rendle 2010, Lemma 3.1): half of the square of the sum less the sum of the squares, per coordinate.

    >>> v = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]])
    >>> pairwise_inner_products(v)  # <v1,v2> + <v1,v3> + <v2,v3> = 1 + 8.5 - 2.5
    tensor([7.])
    """
    return 0.5 * (v.sum(dim=1).square() - v.square().sum(dim=1)).sum(dim=1)


class Dropout(nn.Module):
    """Inverted dropout that draws from a generator of its own, set by the learner from (seed, step): a resumed run draws what an
    uninterrupted one would have drawn."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.empty_like(x, dtype=torch.float32).bernoulli_(1.0 - self.rate, generator=self.generator)
        return x * keep.to(x.dtype) / (1.0 - self.rate)


class MLP(nn.Module):
    """Equation (4), a^(l+1) = sigma(W^(l) a^(l) + b^(l)), and the output neuron above it: [B, inputs] -> [B]."""

    def __init__(self, inputs: int, hidden: Sequence[int], *, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), ACTIVATIONS[activation](), Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 1))

    def forward(self, a: Tensor) -> Tensor:
        logits: Tensor = self.layers(a)  # [B, 1]
        return logits.squeeze(1)
