"""Layers that the paper's systems share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ACTIVATE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "none": lambda z: z,
}
# dL/dz from dL/dy and y = activation(z)
_BACK: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
    "tanh": torch.ops.aten.tanh_backward,
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "none": lambda dy, _: dy,
}
ACTIVATIONS = tuple(name for name in _ACTIVATE if name != "none")


class _PairwiseInnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, total: Tensor | None, y: Tensor | None) -> Tensor:
        if total is None or y is None:
            total, flat = v.sum(dim=1), v.flatten(1)
            y = 0.5 * (torch.linalg.vecdot(total, total) - torch.linalg.vecdot(flat, flat))
        ctx.save_for_backward(v, total)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        v, total = ctx.saved_tensors
        return (total.unsqueeze(1) - v).mul_(dy[:, None, None]), None, None  # each v_i meets the sum of all others


class _Gathered(threading.local):
    sums: tuple[Tensor, Tensor, Tensor] | None = None


_gathered = _Gathered()


@contextlib.contextmanager
def gathered_with(v: Tensor, total: Tensor, y: Tensor) -> Iterator[None]:
    """Within it, in this thread, `pairwise_inner_products(v)` is `y` [B] and the sum over the fields `total` [B, K]: who gathers `v` has
    them on the way."""
    _gathered.sums = v, total, y
    try:
        yield
    finally:
        _gathered.sums = None


def pairwise_inner_products(v: Tensor) -> Tensor:
    """Sum over field pairs i < j of <v_i, v_j>: `v` [B, F, K] -> [B], the second term of equation (2).

    In O(FK) rather than O(F^2 K) (Rendle 2010, Lemma 3.1): half of the square of the sum less the sum of the squares, per coordinate.

    >>> v = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]])
    >>> pairwise_inner_products(v)  # <v1,v2> + <v1,v3> + <v2,v3> = 1 + 8.5 - 2.5
    tensor([7.])
    """
    known = _gathered.sums
    total, y = known[1:] if known is not None and known[0] is v else (None, None)
    return _PairwiseInnerProducts.apply(v, total, y)  # type: ignore[no-untyped-call]


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        i, j = torch.triu_indices(v.shape[1], v.shape[1], offset=1, device=v.device)
        return torch.bmm(v, v.transpose(1, 2))[:, i, j]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        i, j = torch.triu_indices(v.shape[1], v.shape[1], offset=1, device=v.device)
        slope = v.new_zeros(len(v), v.shape[1], v.shape[1])  # symmetric, with nothing on the diagonal
        slope[:, i, j] = slope[:, j, i] = dy
        return torch.bmm(slope, v)


def inner_products(v: Tensor) -> Tensor:
    """<v_i, v_j> of each field pair i < j, in the order (1,2), (1,3), ...: `v` [B, F, K] -> [B, F (F - 1) / 2].

    >>> inner_products(torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]]))
    tensor([[ 1.0000,  8.5000, -2.5000]])
    """
    products: Tensor = _InnerProducts.apply(v)  # type: ignore[no-untyped-call]
    return products


def outer_product(f: Tensor) -> Tensor:
    """All products of two coordinates: `f` [B, K] -> [B, K * K].

    >>> outer_product(torch.tensor([[2.0, 3.0]]))
    tensor([[4., 6., 6., 9.]])
    """
    return (f.unsqueeze(2) * f.unsqueeze(1)).flatten(1)


class _Drawing(threading.local):
    generator: torch.Generator | None = None


_drawing = _Drawing()


@contextlib.contextmanager
def dropout_from(generator: torch.Generator | None) -> Iterator[None]:
    """Within it, in this thread, `Dropout` draws from `generator`; without one it lets everything through."""
    before, _drawing.generator = _drawing.generator, generator
    try:
        yield
    finally:
        _drawing.generator = before


class Dropout(nn.Module):
    """Inverted dropout that draws only where `dropout_from` gives it a generator, which the learner sets from (seed, step): a resumed run
    draws what an uninterrupted one would have drawn."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if _drawing.generator is None or self.rate == 0.0:
            return x
        keep = torch.empty_like(x, dtype=torch.float32).bernoulli_(1.0 - self.rate, generator=_drawing.generator)
        return x * keep.to(x.dtype) / (1.0 - self.rate)


# On a CPU torch has products of float32 from MKL, which has no AVX-512 for other makers' processors: oneDNN takes less than half the time
# there. This is the operation that torch's own compiler makes of a linear layer.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
_ONEDNN_BFLOAT16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()  # others' models may come to any processor


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """sigma(W x + b): `x` [B, inputs], `weight` [outputs, inputs] -> [B, outputs]. Neither need be contiguous."""
    if _ONEDNN is not None and x.device.type == "cpu" and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _ONEDNN_BFLOAT16)):
        y: Tensor = _ONEDNN(x, weight, bias, activation, [], "")
        return y
    return _ACTIVATE[activation](F.linear(x, weight, bias))


class _Affine(torch.autograd.Function):
    """sigma(W a + b), with the products in the type of `weight`, whatever that of `a` is."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor, low_weight: Tensor, low_bias: Tensor, activation: str) -> Tensor:
        x = a.to(low_weight.dtype)
        y = _linear(x, low_weight, low_bias, activation)
        ctx.save_for_backward(x, low_weight, y)
        ctx.activation, ctx.wants = activation, a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        dz = _BACK[ctx.activation](dy, y)
        # Of bfloat16, torch's product is the faster one here.
        slope = torch.mm(dz.t(), x) if x.dtype == torch.bfloat16 else _linear(dz.t(), x.t(), None)
        return _linear(dz, weight.t(), None).to(ctx.wants), slope, dz.sum(0), None, None, None


class Dense(nn.Linear):
    """Equation (4), a^(l+1) = sigma(W^(l) a^(l) + b^(l)): [B, inputs] -> [B, outputs]; "none" leaves sigma out.

    `low` may hold copies of weight and bias in bfloat16. Then the products are of those, in half the time, while the learner steps the
    float32 originals and makes the copies anew.
    """

    def __init__(self, inputs: int, outputs: int, activation: str = "none") -> None:
        super().__init__(inputs, outputs)
        self.activation = activation
        self.low: tuple[Tensor, Tensor] | None = None

    def forward(self, a: Tensor) -> Tensor:
        low_weight, low_bias = self.low or (self.weight.detach(), self.bias.detach())
        return _Affine.apply(a, self.weight, self.bias, low_weight, low_bias, self.activation)  # type: ignore[no-untyped-call]


class MLP(nn.Module):
    """Hidden layers with dropout, and the output neuron above them: [B, inputs] -> [B]."""

    def __init__(self, inputs: int, hidden: Sequence[int], *, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [Dense(inputs, width, activation), Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, Dense(inputs, 1))

    def forward(self, a: Tensor) -> Tensor:
        logits: Tensor = self.layers(a)  # [B, 1]
        return logits.squeeze(1).to(a.dtype)
