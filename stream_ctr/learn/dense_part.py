"""The dense parts of the eight systems with a module, described without torch.

The dense part of a model maps the rows that were gathered, w [B, F + C] and v [B, F + C, width], to
logits [B]. A system's logit is a sum of terms (see `models.terms`) and, in most, a network over
some of its inputs. This is all that a server needs to know besides the weights; `tests` compare it
with the modules.

>>> PARTS["ipnn"].inner, PARTS["ipnn"].activation, PARTS["fm"].network
(True, 'tanh', False)
>>> from stream_ctr.learn.spec import LearnerSpec
>>> expected_shapes(LearnerSpec(model="fm", fields=2, table_bits=8, table_optimizer="adagrad"))
{'table': (256, 16), 'dense.bias': ()}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stream_ctr.errors import ConfigError
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.table_kernels import row_floats
from stream_ctr.learn.tensors import Tensors

DENSE = "dense."
"""The prefix of the parameters of the dense part among the weights."""
PHASE = "dense.network"
"""1 once the network of an FNN has begun, 0 while it is an FM."""


@dataclass(frozen=True, slots=True)
class DensePart:
    """The terms of a system's logit, and the inputs of its network.

    `linear` sums w, and `pairs` the products of pairs of embeddings. The network reads the
    embeddings of the fields, and with `network_w`, `inner` and `outer` also w, the inner products
    of pairs and the outer product of the sum. A feature has `embeddings` embeddings; the FM's are
    the first and the network's the last. With `crosses`, cross products follow the fields.
    `bias` names the constant of an FM, "" without one. A model with a network and such a constant
    starts as that FM.
    """

    linear: bool = False
    pairs: bool = False
    network: bool = True
    network_w: bool = False
    inner: bool = False
    outer: bool = False
    embeddings: int = 1
    crosses: bool = False
    activation: str = "relu"
    bias: str = ""

    def width(self, spec: LearnerSpec) -> int:
        """Return the number of coordinates of a feature, in all of its embeddings."""
        return self.embeddings * spec.embedding_dim

    def columns(self, spec: LearnerSpec) -> int:
        """Return the number of ids of an example that the model reads."""
        return spec.fields + (spec.crosses if self.crosses else 0)

    def network_inputs(self, spec: LearnerSpec) -> int:
        """Return the number of inputs of the network."""
        f, k = spec.fields, spec.embedding_dim
        return f * (k + self.network_w) + self.inner * (f * (f - 1) // 2) + self.outer * k * k

    def activation_of(self, spec: LearnerSpec) -> str:
        """Return the activation of the hidden layers."""
        return self.activation if spec.activation == "paper" else spec.activation


PARTS: Mapping[str, DensePart] = {
    "fm": DensePart(linear=True, pairs=True, network=False, bias="dense.bias"),
    "fnn": DensePart(network_w=True, bias="dense.fm.bias"),
    "ipnn": DensePart(inner=True, activation="tanh"),
    "opnn": DensePart(outer=True),
    "pnn": DensePart(inner=True, outer=True),
    "lr_dnn": DensePart(linear=True, crosses=True),
    "fm_dnn": DensePart(linear=True, pairs=True, embeddings=2),
    "deepfm": DensePart(linear=True, pairs=True),
}
"""The systems by name. LR has no dense part."""

_STARTS_AS_FM = DensePart(linear=True, pairs=True, network=False, bias="dense.fm.bias")


def find_part(spec: LearnerSpec) -> DensePart:
    """Return the dense part of the model that `spec` names.

    Raises `ConfigError` for a model of another package, whose module only torch can run.
    """
    if spec.model not in PARTS:
        raise ConfigError(
            f"the model {spec.model!r:.80} has no ONNX graph: only the paper's systems have one; "
            "serve it with torch"
        )
    return PARTS[spec.model]


def part_of(spec: LearnerSpec, weights: Tensors) -> DensePart:
    """Return the dense part of a model with these weights; an FNN starts as an FM.

    Raises `ConfigError` as `find_part` does.
    """
    part = find_part(spec)
    return _STARTS_AS_FM if PHASE in weights and not weights[PHASE] else part


def layers(spec: LearnerSpec) -> list[tuple[str, int, int]]:
    """Return the prefix, the inputs and the outputs of each layer of the network, from below.

    >>> layers(LearnerSpec(fields=2, embedding_dim=3, hidden=(4,)))
    [('dense.deep.layers.0', 6, 4), ('dense.deep.layers.2', 4, 1)]
    """
    inputs = [PARTS[spec.model].network_inputs(spec), *spec.hidden]
    outputs = [*spec.hidden, 1]
    # Dropout stands behind each hidden layer.
    return [
        (f"dense.deep.layers.{2 * index}", each, outputs[index])
        for index, each in enumerate(inputs)
    ]


def expected_shapes(spec: LearnerSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that `spec` describes, by name.

    Raises `ConfigError` as `find_part` does.
    """
    part = find_part(spec)
    floats = row_floats(
        spec.embedding_dim, embeddings=part.embeddings, optimizer=spec.table_optimizer
    )
    shapes: dict[str, tuple[int, ...]] = {"table": (1 << spec.table_bits, floats)}
    if part.bias:
        shapes[part.bias] = ()
    if part.bias and part.network:
        shapes[PHASE] = ()
    for name, inputs, outputs in layers(spec) if part.network else ():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    if spec.table_optimizer == "online":
        shapes["intercept"] = (2,)
    return shapes
