"""Layers that the paper's systems share."""

from __future__ import annotations

import contextlib
import functools
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
        return (
            (total.unsqueeze(1) - v).mul_(dy[:, None, None]),
            None,
            None,
        )  # each v_i meets the sum of all others


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


@functools.cache
def _pairs(fields: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a flattened [F, F]: at which places the pairs i < j are, in their order, and at each place the number of its pair, 0 on the
    diagonal."""
    i, j = torch.triu_indices(fields, fields, offset=1)
    pair_at = torch.zeros(fields, fields, dtype=torch.int64)
    pair_at[i, j] = pair_at[j, i] = torch.arange(len(i))
    return (i * fields + j).to(device), pair_at.flatten().to(device)


class _InnerProducts(torch.autograd.Function):
    """Both passes are a product of matrices and a choice of columns; autograd's own backward would add at indices, which is slow, and on a
    GPU not the same twice."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        places, _ = _pairs(v.shape[1], v.device)
        return torch.bmm(v, v.transpose(1, 2)).flatten(1).index_select(1, places)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        fields = v.shape[1]
        if fields < 2:
            return torch.zeros_like(v)
        _, pair_at = _pairs(fields, v.device)
        slope = dy.index_select(1, pair_at).view(
            -1, fields, fields
        )  # symmetric, d/d<v_i, v_j> at (i, j) and (j, i)
        slope.diagonal(dim1=1, dim2=2).zero_()
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


_DRAWS = 1 << 16  # that can be told from another


class Dropout(nn.Module):
    """Inverted dropout that draws only where `dropout_from` gives it a generator, which the learner sets from (seed, step): a resumed run
    draws what an uninterrupted one would have drawn. The share that is kept is a multiple of 2^-16.
    """

    def __init__(self, rate: float) -> None:
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {rate}")
        super().__init__()
        self.rate = rate
        self._kept = min(max(round((1.0 - rate) * _DRAWS), 1), _DRAWS - 1)  # of so many draws

    def forward(self, x: Tensor) -> Tensor:
        if _drawing.generator is None or self.rate == 0.0:
            return x
        keep = self._draw(x.numel(), _drawing.generator).view_as(x)
        return (x * keep.to(x.dtype)).mul_(_DRAWS / self._kept)

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        """int16 [count] of 1 (keep) and 0. A number of 64 bits is four draws: that takes an eighth of the time of `bernoulli_`."""
        drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device).random_(
            -(2**63), None, generator=generator
        )
        return drawn.view(torch.int16)[:count].lt_(self._kept - _DRAWS // 2)


# On a CPU torch has products of float32 from MKL, which has no AVX-512 for other makers' processors: oneDNN takes less than half the time
# there. This is the operation that torch's own compiler makes of a linear layer.
_ONEDNN = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)
_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
_ONEDNN_BFLOAT16 = getattr(
    torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False
)()  # others' models may come to any processor


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """sigma(W x + b): `x` [B, inputs], `weight` [outputs, inputs] -> [B, outputs]. Neither need be contiguous."""
    if (
        _ONEDNN is not None
        and x.device.type == "cpu"
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _ONEDNN_BFLOAT16))
    ):
        y: Tensor = _ONEDNN(x, weight, bias, activation, [], "")
        return y
    return _ACTIVATE[activation](F.linear(x, weight, bias))


class _Affine(torch.autograd.Function):
    """sigma(W a + b), with the products in the type of `weight`, whatever that of `a` is."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        weight: Tensor,
        bias: Tensor,
        low_weight: Tensor,
        low_bias: Tensor,
        activation: str,
    ) -> Tensor:
        x = a.to(low_weight.dtype)
        y = _linear(x, low_weight, low_bias, activation)
        ctx.save_for_backward(x, low_weight, y)
        ctx.activation, ctx.wants = activation, a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        dz = _BACK[ctx.activation](dy, y)
        slope = (
            _linear(dz.t(), x.t(), None)
            if _AVX512 and x.dtype == torch.float32
            else torch.mm(dz.t(), x)
        )  # the faster one of each
        return _linear(dz, weight.t(), None).to(ctx.wants), slope, dz.sum(0), None, None, None


class Dense(nn.Linear):
    """Equation (4), a^(l+1) = sigma(W^(l) a^(l) + b^(l)): [B, inputs] -> [B, outputs]; "none" leaves sigma out.

    `low` may hold copies of weight and bias in bfloat16. Then the products are of those, in half the time, while the learner steps the
    float32 originals and makes the copies anew.
    """

    def __init__(self, inputs: int, outputs: int, activation: str = "none") -> None:
        if activation not in _ACTIVATE:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        super().__init__(inputs, outputs)
        self.activation = activation
        self.low: tuple[Tensor, Tensor] | None = None

    def forward(self, a: Tensor) -> Tensor:
        low_weight, low_bias = self.low or (self.weight.detach(), self.bias.detach())
        return _Affine.apply(a, self.weight, self.bias, low_weight, low_bias, self.activation)  # type: ignore[no-untyped-call]


class MLP(nn.Module):
    """Hidden layers with dropout, and the output neuron above them: [B, inputs] -> [B]."""

    def __init__(
        self, inputs: int, hidden: Sequence[int], *, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [Dense(inputs, width, activation), Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, Dense(inputs, 1))

    def forward(self, a: Tensor) -> Tensor:
        logits: Tensor = self.layers(a)  # [B, 1]
        return logits.squeeze(1).to(a.dtype)
