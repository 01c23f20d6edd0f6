"""The dense part of a model as a program of `torch.export`, which a server loads without our code.

    inputs    w [B, F + C] float32, v [B, F + C, width] float32, for any number of rows B
    output    logits [B] float32, with the constant of the online rule

    program = torch.export.load("model.pt2").module()
    logits = program(w, v)

The program computes what the model does on a CPU, products in bfloat16 included.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from stream_ctr.errors import ConfigError
from stream_ctr.learn.learner import require_shapes
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import Tensors
from stream_ctr.messages import one_line
from stream_ctr.models.layers import Dense

_EXAMPLES = 2  # with one, torch would make a program for one


class _WithConstant(nn.Module):
    """A model and the constant of its logit."""

    def __init__(self, model: nn.Module, constant: float) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("constant", torch.tensor(constant))

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        logits: Tensor = self.model(w, v)
        return logits + self.get_buffer("constant")


def _detach(model: nn.Module) -> None:
    """Give each parameter memory of its own; they are parts of one vector while a model learns."""
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()
    for layer in model.modules():
        if isinstance(layer, Dense) and layer.low is not None:
            weight, bias = layer.low
            layer.low = weight.clone(), bias.clone()


def build_program(spec: LearnerSpec, weights: Tensors) -> bytes:
    """Return the program of the model that `spec` describes, as the bytes of a `.pt2` file.

    Raises `ValueError` if the weights are not those of the model, and `ConfigError` if torch cannot
    trace it, as may be for a model of another package.
    """
    require_shapes(weights, spec)
    learner = NetworkLearner(spec, device="cpu", threads=1)
    learner.load_weights(weights)
    _detach(learner.model)
    module = _WithConstant(learner.model, float(learner.intercept[0]))
    w = torch.zeros(_EXAMPLES, learner.columns)
    v = torch.zeros(_EXAMPLES, learner.columns, learner.table.width)
    rows = torch.export.Dim("B", min=1)
    with torch.no_grad():
        module(w, v)  # what the model keeps between calls is made before it is traced
        try:
            program = torch.export.export(
                module, (w, v), dynamic_shapes={"w": {0: rows}, "v": {0: rows}}
            )
        except Exception as error:  # noqa: BLE001 - whatever the code of the model does
            raise ConfigError(
                f"torch.export cannot trace the model {spec.model!r:.80}: {one_line(error)}"
            ) from error
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()
