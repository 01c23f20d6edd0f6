"""Adam over the dense part, whose parameters lie in one vector: a step is a few passes over that, which lanes can share.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1; the step itself is torch's fused one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from stream_ctr.learn.table_kernels import BETA1, BETA2, EPSILON
from stream_ctr.models.layers import Dense

_BLOCK = 64  # floats
_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdam:
    """Takes the parameters of `model` into one float32 vector [P], of which they are views from then on.

    With `low`, the `Dense` layers but output neurons get copies of theirs in bfloat16, made anew with each step.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, low: bool = False) -> None:
        self.learning_rate, self.weight_decay = learning_rate, 0.0
        named = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in named.items()}
        self.vector = (
            nn.utils.parameters_to_vector(model.parameters()).detach() if named else torch.empty(0)
        )
        for parameter, view in zip(named.values(), self.views(self.vector).values(), strict=True):
            parameter.data = view
        self.moments = [torch.zeros_like(self.vector), torch.zeros_like(self.vector)]
        self.low = torch.empty_like(self.vector, dtype=torch.bfloat16) if low else None
        if self.low is not None:
            copies: dict[Tensor, Tensor] = dict(
                zip(named.values(), self.views(self.low).values(), strict=True)
            )
            for layer in model.modules():
                if (
                    isinstance(layer, Dense) and layer.out_features > 1
                ):  # the output neuron's sum is the logit
                    layer.low = copies[layer.weight], copies[layer.bias]
            self.refresh()

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Of a vector [P], the parts that are the parameters, in their shapes."""
        parts = torch.split(vector, [shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def pieces(self, count: int) -> Iterator[slice]:
        """The vector in `count` parts of about one size. Any split gives the same step: they end where registers do."""
        blocks = np.linspace(0, -(-len(self.vector) // _BLOCK), count + 1).astype(int)
        edges = np.minimum(blocks * _BLOCK, len(self.vector)).tolist()
        return (slice(first, last) for first, last in zip(edges[:-1], edges[1:], strict=True))

    def step(
        self, gradients: Tensor, steps: Tensor, piece: slice, *, skip: Tensor | None = None
    ) -> None:
        """One step on a piece with the sum of `gradients` [parts, P], in the order of the parts. `steps` is how many there were before.
        When `skip`, on the device like the rest, is 1.0 it changes nothing."""
        gradient = gradients[0, piece]
        for part in gradients[1:]:
            gradient.add_(part[piece])
        adam(
            [self.vector[piece]], [gradient], [self.moments[0][piece]], [self.moments[1][piece]], [], [steps],
            lr=self.learning_rate, weight_decay=self.weight_decay, beta1=BETA1, beta2=BETA2, eps=EPSILON,
            fused=True, found_inf=skip, amsgrad=False, maximize=False,
        )  # fmt: skip
        if self.low is not None:
            self.low[piece].copy_(self.vector[piece])

    def forget(self) -> None:
        """Everything but the parameters: the optimiser begins anew."""
        for moment in self.moments:
            moment.zero_()

    def refresh(self) -> None:
        """After the parameters were set from outside."""
        if self.low is not None:
            self.low.copy_(self.vector)

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        """The moments of each parameter by its name, copied to the host."""
        return {
            f"{name}.{key}": view.to("cpu", copy=True).numpy()
            for key, moment in zip(_MOMENTS, self.moments, strict=True)
            for name, view in self.views(moment).items()
        }

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Raises KeyError for a moment that is missing and ValueError for one of another shape."""
        for key, moment in zip(_MOMENTS, self.moments, strict=True):
            for name, view in self.views(moment).items():
                found = state[f"{name}.{key}"]
                if found.shape != tuple(view.shape):
                    raise ValueError(
                        f"{name}.{key} is {found.shape}, its parameter {tuple(view.shape)}"
                    )
                view.copy_(torch.from_numpy(found))
