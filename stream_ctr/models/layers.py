"""Layers of the networks: dense layers, dropout, and the multi-layer perceptron made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
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

# Dropout compares 16 random bits an element with a threshold.
_RANDOM_BITS = 16
_RANDOM_VALUES = 1 << _RANDOM_BITS
_RANDOM_PER_INT64 = 64 // _RANDOM_BITS
_INT64_MIN = -(1 << 63)


class Dropout(nn.Module):
    """Inverted dropout that draws from the generator it is given, and only then.

    The learner seeds that generator from (seed, step), so that a resumed run draws the numbers that
    an uninterrupted one would have drawn. The kept share is a multiple of 2^-16.

    >>> dropout, x = Dropout(0.5), torch.ones(4)
    >>> dropout(x).tolist()
    [1.0, 1.0, 1.0, 1.0]
    >>> sorted(set(dropout(torch.ones(100), torch.Generator().manual_seed(0)).tolist()))
    [0.0, 2.0]
    """

    def __init__(self, rate: float) -> None:
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {rate}")
        super().__init__()
        self.rate = rate
        kept = round((1.0 - rate) * _RANDOM_VALUES)
        self._kept = min(max(kept, 1), _RANDOM_VALUES - 1)  # of _RANDOM_VALUES

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        if generator is None or self.rate == 0.0:
            return x
        keep = self._draw(x.numel(), generator).view_as(x)
        return (x * keep.to(x.dtype)).mul_(_RANDOM_VALUES / self._kept)

    def _draw(self, count: int, generator: Generator) -> Tensor:
        """Return int16 [count] of 1 (keep) and 0.

        Drawing four elements with one 64-bit number takes an eighth of the time of `bernoulli_`.
        """
        numbers = torch.empty(
            -(-count // _RANDOM_PER_INT64), dtype=torch.int64, device=generator.device
        )
        numbers.random_(_INT64_MIN, None, generator=generator)
        return numbers.view(torch.int16)[:count].lt_(self._kept - _RANDOM_VALUES // 2)


# On a CPU, torch multiplies float32 matrices with MKL, which does not use AVX-512 on processors of
# other makers; oneDNN takes less than half the time there. This is the operation that torch's own
# compiler emits for a linear layer.
_ONEDNN = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)
_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
_FEW_ROWS = 32
# A model with bfloat16 weights may be served on a processor without bfloat16 products.
_ONEDNN_BFLOAT16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Return sigma(W x + b): `x` [B, inputs], `weight` [outputs, inputs] -> [B, outputs].

    Neither need be contiguous.
    """
    if torch.compiler.is_exporting():  # operators that every build of torch has
        return _ACTIVATE[activation](F.linear(x, weight, bias))
    if (
        _ONEDNN is not None
        and x.device.type == "cpu"
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _ONEDNN_BFLOAT16))
    ):
        y: Tensor = _ONEDNN(x, weight, bias, activation, [], "")
        return y
    if activation == "relu" and bias is not None:
        fused: Tensor = torch._addmm_activation(bias, x, weight.t())  # one kernel on a GPU
        return fused
    return _ACTIVATE[activation](F.linear(x, weight, bias))


def _predicted(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Return sigma(W x + b), of which no gradient is taken.

    For few rows oneDNN takes half of its time to reorder the weights, which MKL does not.
    """
    if x.dtype == torch.float32 and (len(x) <= _FEW_ROWS or not _AVX512):
        return _ACTIVATE[activation](F.linear(x, weight, bias))
    return _linear(x, weight, bias, activation)


class Tape:
    """The inputs of dense layers, and the gradients of the logits by their sums.

    A step that learns what each example's loss is only after the backward pass records them here,
    with an initial gradient of 1 for every example. Then `gradients` needs no second pass.
    """

    def __init__(self) -> None:
        self._layers: dict[Dense, tuple[Tensor, Tensor]] = {}

    @property
    def layers(self) -> tuple[Dense, ...]:
        """The layers that were recorded."""
        return tuple(self._layers)

    def record(self, layer: Dense, x: Tensor, dz: Tensor) -> None:
        """Keep the input `x` [B, inputs] of a layer and `dz` [B, outputs]."""
        # With its history, x would refer back to this tape, and the activations of many batches
        # would wait for the collector of such circles.
        self._layers[layer] = x.detach(), dz.detach()

    def gradients(
        self, rows: slice, grad_logit: Tensor
    ) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """Yield each layer with the gradients of its weight and bias.

        `grad_logit` [n] is dL/dlogit of the examples in `rows`.
        """
        for layer, (x, dz) in self._layers.items():
            scaled = dz[rows] * grad_logit.to(dz.dtype).unsqueeze(1)
            yield layer, _weight_gradient(scaled, x[rows], layer.in_features), scaled.sum(0)


def _weight_gradient(dz: Tensor, x: Tensor, inputs: int) -> Tensor:
    # Each of the two products is the faster one in its case.
    if _AVX512 and x.dtype == torch.float32:
        return _linear(dz.t(), x.t(), None)
    return torch.mm(dz.t(), x)[:, :inputs]


def _widened(a: Tensor, weight: Tensor) -> Tensor:
    """Return `a` [B, inputs] in the type of `weight`, with zeros up to its number of columns."""
    inputs = a.shape[1]
    columns = weight.shape[1]
    if inputs == columns:
        return a.to(weight.dtype)
    x = a.new_empty(len(a), columns, dtype=weight.dtype)
    x[:, :inputs] = a
    x[:, inputs:] = 0.0
    return x


class _Affine(torch.autograd.Function):
    """sigma(W a + b), with the products in the type of `low_weight`, whatever the type of `a`."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        weight: Tensor,
        bias: Tensor,
        low_weight: Tensor,
        low_bias: Tensor,
        layer: Dense,
        tape: Tape | None,
    ) -> Tensor:
        activation = layer.activation
        x = _widened(a, low_weight)
        y = _linear(x, low_weight, low_bias, activation)
        ctx.save_for_backward(x, low_weight, y)
        ctx.activation = activation
        ctx.input_dtype = a.dtype
        ctx.layer = layer
        ctx.tape = tape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        dz = _BACK[ctx.activation](dy, y)
        inputs = ctx.layer.in_features
        grad_input = _linear(dz, weight.t(), None)[:, :inputs].to(ctx.input_dtype)
        if ctx.tape is not None:
            ctx.tape.record(ctx.layer, x, dz)
            return grad_input, None, None, None, None, None, None
        return grad_input, _weight_gradient(dz, x, inputs), dz.sum(0), None, None, None, None


class Dense(nn.Linear):
    """Equation (4), a^(l+1) = sigma(W^(l) a^(l) + b^(l)): [B, inputs] -> [B, outputs].

    The activation "none" leaves sigma out. `low` may hold copies of weight and bias in bfloat16.
    Products then use the copies, in half the time, while the learner updates the float32 originals
    and renews the copies. The copy of the weight may have further columns, of zeros. The output has
    the type of the weights that were multiplied.

    >>> Dense(2, 3, "relu")(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, inputs: int, outputs: int, activation: str = "none") -> None:
        if activation not in _ACTIVATE:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        super().__init__(inputs, outputs)
        self.activation = activation
        self.low: tuple[Tensor, Tensor] | None = None

    def forward(self, a: Tensor, tape: Tape | None = None) -> Tensor:
        low_weight, low_bias = self.low or (self.weight.detach(), self.bias.detach())
        if torch.is_inference_mode_enabled():
            return _predicted(_widened(a, low_weight), low_weight, low_bias, self.activation)
        return _Affine.apply(a, self.weight, self.bias, low_weight, low_bias, self, tape)  # type: ignore[no-untyped-call]


class MLP(nn.Module):
    """Hidden layers with dropout, and the output neuron above them: [B, inputs] -> [B].

    >>> MLP(4, [8, 8])(torch.zeros(5, 4)).shape
    torch.Size([5])
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], *, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [Dense(inputs, width, activation), Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, Dense(inputs, 1))

    def forward(
        self, a: Tensor, generator: Generator | None = None, tape: Tape | None = None
    ) -> Tensor:
        """Return the logits; hidden units are dropped where a `generator` is given.

        With a `tape`, the gradients of the layers' parameters are left to it.
        """
        x = a
        for layer in self.layers:
            x = layer(x, generator) if isinstance(layer, Dropout) else layer(x, tape)
        return x.squeeze(1).to(a.dtype)  # [B, 1] -> [B]
