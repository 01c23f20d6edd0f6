"""Models as a user writes them, for tests that learn and serve them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from stream_ctr.models.layers import MLP, Tape
from stream_ctr.models.products import FieldSums, pairwise_inner_products
from stream_ctr.models.terms import Terms


class Gated(nn.Module):
    """First-order weights, and a gate over the embeddings."""

    def __init__(self, *, fields: int, embedding_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(fields * embedding_dim, 1)

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        logits: Tensor = w.sum(dim=1) + self.gate(v.flatten(1)).squeeze(1)
        return logits


class OwnDeepFM(nn.Module):
    """DeepFM written once more."""

    terms: ClassVar[Terms] = Terms(linear=True, pairs=True)

    def __init__(
        self, *, fields: int, embedding_dim: int, hidden: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.network = MLP(fields * embedding_dim, hidden, dropout=dropout)

    def deep_logits(
        self, w: Tensor, v: Tensor, *, generator: Generator | None = None, tape: Tape | None = None
    ) -> Tensor:
        logits: Tensor = self.network(v.flatten(1), generator, tape)
        return logits

    def forward(
        self,
        w: Tensor,
        v: Tensor,
        *,
        sums: FieldSums | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        deep = self.deep_logits(w, v, generator=generator)
        return w.sum(dim=1) + pairwise_inner_products(v, sums) + deep


class Linear(nn.Module):
    """The first-order weights alone, without a parameter."""

    terms: ClassVar[Terms] = Terms(linear=True, network=False)

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        return w.sum(dim=1)


class WrongShape(Gated):
    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        return super().forward(w, v).unsqueeze(1)


class Infinite(Gated):
    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        return super().forward(w, v) / 0.0


class Double(Gated):
    def __init__(self, *, fields: int, embedding_dim: int) -> None:
        super().__init__(fields=fields, embedding_dim=embedding_dim)
        self.double()


class Constant(nn.Module):
    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        return torch.zeros(len(w))


class Random(Gated):
    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        return super().forward(w, nn.functional.dropout(v, 0.5))


class Normed(Gated):
    def __init__(self, *, fields: int, embedding_dim: int) -> None:
        super().__init__(fields=fields, embedding_dim=embedding_dim)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        self.seen += 1.0
        return super().forward(w, v)


class Failing(Gated):
    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("out of ideas")


class Unbuilt(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        return w.sum(dim=1)


class WrongTerms(OwnDeepFM):
    terms: ClassVar[Terms] = Terms(linear=True)


class Untaped(OwnDeepFM):
    def __init__(
        self, *, fields: int, embedding_dim: int, hidden: Sequence[int], dropout: float
    ) -> None:
        super().__init__(fields=fields, embedding_dim=embedding_dim, hidden=hidden, dropout=dropout)
        self.scale = nn.Parameter(torch.ones(()))

    def deep_logits(
        self, w: Tensor, v: Tensor, *, generator: Generator | None = None, tape: Tape | None = None
    ) -> Tensor:
        return self.scale * super().deep_logits(w, v, generator=generator, tape=tape)


class NoNetwork(Gated):
    terms: ClassVar[Terms] = Terms(linear=True)


class NotAModel:
    """No module of torch."""
