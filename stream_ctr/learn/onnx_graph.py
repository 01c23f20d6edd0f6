"""The ONNX graph of a model's dense part, made from its weights; torch is not needed.

    inputs    w [B, F + C] float32, v [B, F + C, width] float32: the rows of the table that an
              example hashes to, multiplied by their values
    output    logits [B] float32, with the constant of the online rule

Initializers have the names of the weights in `*.safetensors`. Operators are those of ONNX's default
domain, in opset 17, which onnxruntime has had since 1.12.

A model that was trained with bfloat16 products multiplies numbers that were rounded to bfloat16,
and its graph rounds where the trainer does: the inputs, the weights and the outputs of the hidden
layers. Without that, probabilities differ several times as much.

ONNX builds and reads the graphs, because it is the library of the format itself.

>>> spec = LearnerSpec(model="fm", fields=2, embedding_dim=4, table_bits=4)
>>> weights = {"dense.bias": np.zeros((), np.float32), "intercept": np.zeros(2)}
>>> graph = onnx.load_model_from_string(build_graph(spec, weights)).graph
>>> [node.op_type for node in graph.node][:3]
['ReduceSum', 'ReduceSum', 'ReduceSumSquare']
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from stream_ctr.learn.dense_part import PARTS, DensePart, layers, part_of
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import Tensors

OPSET = 17
IR_VERSION = 8
LOGITS = "logits"
BATCH = "B"

_ACTIVATION = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}


def build_graph(spec: LearnerSpec, weights: Tensors) -> bytes:
    """Return the graph of the dense part of the model that `spec` describes, serialised.

    Raises `ConfigError` for a model of another package, whose module only torch can run, and
    `KeyError` if a weight is missing.
    """
    graph = _Graph(spec, weights, part_of(spec, weights))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            spec.model,
            inputs_of(spec),
            [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [BATCH])],
            graph.initializers,
        ),
        producer_name="stream-ctr",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    return bytes(model.SerializeToString(deterministic=True))


def inputs_of(spec: LearnerSpec) -> list[onnx.ValueInfoProto]:
    """Return the descriptions of the inputs `w` and `v`."""
    part = PARTS[spec.model]
    columns = part.columns(spec)
    shapes = {"w": [BATCH, columns], "v": [BATCH, columns, part.width(spec)]}
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]


class _Graph:
    """The nodes of a graph in their order, and its initializers. Each method returns a name."""

    def __init__(self, spec: LearnerSpec, weights: Tensors, part: DensePart) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._spec = spec
        self._weights = weights
        self._part = part
        self._known: set[str] = set()
        terms = [*self._sums(), *([self._network()] if part.network else [])]
        if "intercept" in weights:
            constant = np.asarray(weights["intercept"][0], np.float32)
            terms.append(self._constant("intercept", constant))
        total = terms[0]
        for term in terms[1:]:
            total = self._op("Add", [total, term])
        self._op("Identity", [total], name=LOGITS)

    def _sums(self) -> list[str]:
        """Return the terms of the logit besides the network: [] or [B] each."""
        part = self._part
        terms = [self._weight(part.bias)] if part.bias and not part.network else []
        if part.linear:
            terms.append(self._sum("w"))
        if part.pairs:
            terms.append(self._pairs(self._embedding(0)))
        return terms

    def _pairs(self, v: str) -> str:
        """Return the sum over field pairs i < j of <v_i, v_j>: [B, F, K] -> [B] (Lemma 3.1)."""
        total = self._op("ReduceSumSquare", [self._sum(v)], axes=[1], keepdims=0)
        each = self._op("ReduceSumSquare", [v], axes=[1, 2], keepdims=0)
        half = self._constant("half", np.asarray(0.5, np.float32))
        return self._op("Mul", [half, self._op("Sub", [total, each])])

    def _network(self) -> str:
        """Return the logits [B] of the network."""
        x = self._signals()
        *hidden, last = layers(self._spec)
        low = self._spec.precision == "bf16"
        for name, _, outputs in hidden:
            # The output neuron, and a layer as narrow, multiply in float32.
            x = self._layer(name, x, low=low and outputs > 1)
            x = self._op(_ACTIVATION[PARTS[self._spec.model].activation_of(self._spec)], [x])
            if low and outputs > 1:
                x = self._rounded(x)
        logits = self._layer(last[0], x, low=False)
        return self._op("Squeeze", [logits, self._axes(1)])  # [B, 1] -> [B]

    def _signals(self) -> str:
        """Return the inputs of the network, [B, inputs]."""
        part = self._part
        fields = self._spec.fields
        e = self._embedding(part.embeddings - 1)
        if part.crosses:
            e = self._slice(e, 0, fields, axis=1)
        if part.network_w:
            e = self._op("Concat", [self._op("Unsqueeze", ["w", self._axes(2)]), e], axis=2)
        signals = [self._op("Flatten", [e], axis=1)]
        if part.inner and fields > 1:
            signals.append(self._inner_products(e, fields))
        if part.outer:
            signals.append(self._outer_product(self._sum(e)))
        return self._op("Concat", signals, axis=1) if len(signals) > 1 else signals[0]

    def _inner_products(self, v: str, fields: int) -> str:
        """Return <v_i, v_j> of each field pair i < j: [B, F, K] -> [B, F (F - 1) / 2]."""
        products = self._op("MatMul", [v, self._op("Transpose", [v], perm=[0, 2, 1])])
        i, j = np.triu_indices(fields, 1)
        positions = self._constant("pairs", (i * fields + j).astype(np.int64))
        return self._op("Gather", [self._op("Flatten", [products], axis=1), positions], axis=1)

    def _outer_product(self, total: str) -> str:
        """Return all products of two coordinates: [B, K] -> [B, K * K]."""
        column = self._op("Unsqueeze", [total, self._axes(2)])
        row = self._op("Unsqueeze", [total, self._axes(1)])
        return self._op("Flatten", [self._op("Mul", [column, row])], axis=1)

    def _embedding(self, index: int) -> str:
        """Return one embedding of each feature, [B, F + C, K]."""
        if self._part.embeddings == 1:
            return "v"
        k = self._spec.embedding_dim
        return self._slice("v", index * k, (index + 1) * k, axis=2)

    def _layer(self, name: str, x: str, *, low: bool) -> str:
        """Return W x + b: [B, inputs] -> [B, outputs]."""
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        if low:
            x, weight, bias = (self._rounded(each) for each in (x, weight, bias))
        return self._op("Gemm", [x, weight, bias], transB=1)

    def _rounded(self, x: str) -> str:
        """Return `x` rounded to bfloat16, as float32."""
        low = self._op("Cast", [x], to=TensorProto.BFLOAT16)
        return self._op("Cast", [low], to=TensorProto.FLOAT)

    def _sum(self, x: str) -> str:
        return self._op("ReduceSum", [x, self._axes(1)], keepdims=0)

    def _slice(self, x: str, start: int, end: int, *, axis: int) -> str:
        ends = [
            self._constant(f"at_{number}", np.array([number], np.int64))
            for number in (start, end, axis)
        ]
        return self._op("Slice", [x, *ends])

    def _axes(self, axis: int) -> str:
        return self._constant(f"at_{axis}", np.array([axis], np.int64))

    def _weight(self, name: str) -> str:
        return self._constant(name, np.asarray(self._weights[name], np.float32))

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if name not in self._known:
            self._known.add(name)
            self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def _op(self, op: str, inputs: list[str], *, name: str = "", **attributes: Any) -> str:
        output = name or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output
