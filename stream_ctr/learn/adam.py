"""Adam for the dense part. The parameters lie in one vector, whose pieces threads can share.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1; the step itself
is torch's fused one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from stream_ctr.learn.table_kernels import BETA1, BETA2, EPSILON
from stream_ctr.models.layers import Dense

_BLOCK = 64  # floats; a piece is a whole number of blocks
_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatParameters:
    """The parameters of `model`, which become views of one float32 vector [P].

    With `low`, `Dense` layers except output neurons get copies of their parameters in bfloat16. The
    columns of these weights are filled up with zeros to a multiple of `align`: a GPU multiplies
    matrices faster whose rows begin at multiples of 16 bytes.

    >>> FlatParameters(nn.Linear(2, 1)).vector.shape
    torch.Size([3])
    """

    def __init__(self, model: nn.Module, *, low: bool = False, align: int = 1) -> None:
        named = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in named.items()}
        self.vector = (
            nn.utils.parameters_to_vector(model.parameters()).detach() if named else torch.empty(0)
        )
        for parameter, view in zip(named.values(), self.views(self.vector).values(), strict=True):
            parameter.data = view
        self.low = torch.empty_like(self.vector, dtype=torch.bfloat16) if low else None
        self._widened: list[tuple[Tensor, Tensor]] = []  # copy, original
        if self.low is not None:
            self._attach_copies(model, self.low, align)

    def _attach_copies(self, model: nn.Module, low: Tensor, align: int) -> None:
        copies: dict[Tensor, Tensor] = dict(
            zip(model.parameters(), self.views(low).values(), strict=True)
        )
        for layer in model.modules():
            # The sum of the output neuron is the logit, which stays float32.
            if isinstance(layer, Dense) and layer.out_features > 1:
                layer.low = self._copy_of(layer, copies[layer.weight], align), copies[layer.bias]
        self.refresh()

    def _copy_of(self, layer: Dense, copy: Tensor, align: int) -> Tensor:
        """Return the weight that products use: `copy`, or one whose columns are filled up."""
        inputs = layer.in_features
        if inputs % align == 0:
            return copy
        wide = copy.new_zeros(layer.out_features, -(-inputs // align) * align)
        self._widened.append((wide[:, :inputs], layer.weight.detach()))
        return wide

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parts of a vector [P] that belong to the parameters, in their shapes."""
        parts = torch.split(vector, [shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def refresh(self) -> None:
        """Renew the bfloat16 copies after the parameters were set from outside."""
        if self.low is not None:
            self.low.copy_(self.vector)
        self._renew_widened()

    def _renew_widened(self) -> None:
        for copy, original in self._widened:
            copy.copy_(original)


class FlatAdam(FlatParameters):
    """Adam over the parameters of `model`; every step renews the copies in bfloat16.

    Where a weight is filled up with zeros, a step must be made in one piece.

    >>> model = nn.Linear(2, 1)
    >>> FlatAdam(model, learning_rate=0.001).vector.shape
    torch.Size([3])
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, low: bool = False, align: int = 1
    ) -> None:
        super().__init__(model, low=low, align=align)
        self.learning_rate = learning_rate
        self.weight_decay = 0.0
        self.moments = [torch.zeros_like(self.vector), torch.zeros_like(self.vector)]

    def pieces(self, count: int) -> list[slice]:
        """Return `count` slices of the vector, see `pieces_of`."""
        return pieces_of(len(self.vector), count)

    def step(
        self,
        gradients: Tensor,
        steps: Tensor,
        piece: slice,
        *,
        rate_scale: float | Tensor = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        """Update a piece with the sum of `gradients` [parts, P], taken in the order of the parts.

        `steps` is the number of steps before this one, and `rate_scale` multiplies the rate. With a
        `skip` of 1.0, which lies on the device like the rest, nothing changes.
        """
        summed = sum_in_order([part[piece] for part in gradients])
        self.apply(summed, steps, piece, rate_scale=rate_scale, skip=skip)
        if self.low is not None:
            self.low[piece].copy_(self.vector[piece])
        self._renew_widened()

    def apply(
        self,
        gradient: Tensor,
        steps: Tensor,
        piece: slice,
        *,
        rate_scale: float | Tensor = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        """Update a piece of the float32 parameters with its `gradient`, as `step` does."""
        first, second = self.moments
        adam(
            [self.vector[piece]],
            [gradient],
            [first[piece]],
            [second[piece]],
            [],
            [steps],
            lr=self.learning_rate * rate_scale,
            weight_decay=self.weight_decay,
            beta1=BETA1,
            beta2=BETA2,
            eps=EPSILON,
            fused=True,
            found_inf=skip,
            amsgrad=False,
            maximize=False,
        )

    def reset(self) -> None:
        """Clear the moments and keep the parameters."""
        for moment in self.moments:
            moment.zero_()

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return the moments of each parameter by its name, copied to the host."""
        return {
            f"{name}.{key}": view.to("cpu", copy=True).numpy()
            for key, moment in zip(_MOMENTS, self.moments, strict=True)
            for name, view in self.views(moment).items()
        }

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Load the moments. Raises errors as `require_state_dict` does."""
        self.require_state_dict(state)
        for key, moment in zip(_MOMENTS, self.moments, strict=True):
            for name, view in self.views(moment).items():
                view.copy_(torch.from_numpy(state[f"{name}.{key}"]))

    def require_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Check the moments.

        Raises `KeyError` when a moment is missing and `ValueError` when one has another shape.
        """
        for key, moment in zip(_MOMENTS, self.moments, strict=True):
            for name, view in self.views(moment).items():
                found = state[f"{name}.{key}"]
                if found.shape != tuple(view.shape):
                    raise ValueError(
                        f"{name}.{key} has shape {found.shape}, "
                        f"its parameter has {tuple(view.shape)}"
                    )


def pieces_of(length: int, count: int) -> list[slice]:
    """Return `count` slices of a vector of parameters, of about one size.

    Any split gives the same step, because slices end where vector registers do.

    >>> pieces_of(150, 2), pieces_of(1, 2)
    ([slice(0, 64, None), slice(64, 150, None)], [slice(0, 0, None), slice(0, 1, None)])
    """
    blocks = np.linspace(0, -(-length // _BLOCK), count + 1).astype(int)
    edges = np.minimum(blocks * _BLOCK, length).tolist()
    return [slice(first, last) for first, last in pairwise(edges)]


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Add the other `parts` to the first, one after another, and return it.

    >>> sum_in_order([torch.tensor([1.0]), torch.tensor([2.0])])
    tensor([3.])
    """
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total
