"""The checks of an ONNX graph that may come from a stranger, before onnxruntime sees it.

A graph can name files of the machine it is loaded on (external data), operators of other libraries
(domains), loops, and numbers of any size. The graph of a dense part needs none of that, so
whatever it does not need is refused.

>>> from stream_ctr.learn.onnx_graph import build_graph
>>> spec = LearnerSpec(model="fm", fields=2, embedding_dim=4, table_bits=4)
>>> weights = {"dense.bias": np.zeros((), np.float32), "intercept": np.zeros(2)}
>>> graph = build_graph(spec, weights)
>>> require_graph(graph, spec, weights)
>>> require_graph(graph[:-4], spec, weights)
Traceback (most recent call last):
ValueError: the graph cannot be read: it is cut short, or is not ONNX
>>> require_graph(graph, spec, {**weights, "dense.bias": np.ones((), np.float32)})
Traceback (most recent call last):
ValueError: initializer 'dense.bias' of the graph is not the tensor of that name
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper, shape_inference

from stream_ctr.learn.dense_part import DENSE, PARTS
from stream_ctr.learn.onnx_graph import BATCH, IR_VERSION, LOGITS, OPSET, inputs_of
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import Tensors
from stream_ctr.messages import one_line

_OPERATORS = frozenset(
    {
        *("Add", "Cast", "Concat", "Flatten", "Gather", "Gemm", "Identity", "MatMul", "Mul"),
        *("ReduceSum", "ReduceSumSquare", "Relu", "Sigmoid", "Slice", "Squeeze", "Sub", "Tanh"),
        *("Transpose", "Unsqueeze"),
    }
)
_ATTRIBUTES = frozenset({onnx.AttributeProto.INT, onnx.AttributeProto.INTS})
_NUMBERS = frozenset({TensorProto.FLOAT, TensorProto.INT64})
_MOST_NODES = 1024
_DEFAULT_DOMAINS = ("", "ai.onnx")


def require_graph(data: bytes, spec: LearnerSpec, weights: Tensors) -> None:
    """Raise `ValueError` unless `data` is a graph of the dense part that `spec` describes.

    It has the inputs and the output of `onnx_graph`, operators that such graphs need, initializers
    that are the tensors of their names in `weights`, and takes no more memory than such graphs do.
    """
    largest = _largest_values(spec, weights)
    if len(data) > 8 * sum(array.nbytes for array in _dense(weights)) + 16 * largest + (1 << 20):
        raise ValueError(f"the graph has {len(data):,} bytes, more than its weights account for")
    try:
        model = onnx.load_model_from_string(data)
    except Exception:  # noqa: BLE001 - that of the library which onnx is generated with
        raise ValueError("the graph cannot be read: it is cut short, or is not ONNX") from None
    if not all(isinstance(text, str) for text in _texts(model)):
        raise ValueError("the graph has names that are not UTF-8")
    _require_version(model)
    _require_nodes(model.graph.node)
    _require_initializers(model.graph, weights, largest)
    _require_interface(model.graph, spec)
    _require_sizes(model, largest)


def _dense(weights: Tensors) -> Iterable[npt.NDArray[np.generic]]:
    return (array for name, array in weights.items() if name.startswith(DENSE))


def _largest_values(spec: LearnerSpec, weights: Tensors) -> int:
    """Return the largest number of values of an example, or of an initializer, in such a graph."""
    part = PARTS[spec.model]
    columns = part.columns(spec)
    inputs = part.network_inputs(spec) if part.network else 0
    sizes = [columns * max(columns, part.width(spec) + 1), inputs, *spec.hidden]
    return max(*sizes, *(array.size for array in _dense(weights)))


def _texts(message: Any) -> Iterator[str | bytes]:
    """Yield every text of a message; one that is not UTF-8 is bytes."""
    for field, value in message.ListFields():
        single = isinstance(value, str | bytes) or hasattr(value, "ListFields")
        values = [value] if single else value
        if field.type == field.TYPE_STRING:
            yield from values
        elif field.type == field.TYPE_MESSAGE:
            for each in values:
                yield from _texts(each)


def _require_version(model: onnx.ModelProto) -> None:
    domains = {each.domain: each.version for each in model.opset_import}
    if other := sorted(set(domains) - set(_DEFAULT_DOMAINS)):
        raise ValueError(f"the graph uses operators of the domain {one_line(other[0], 80)!r}")
    if len(model.opset_import) != 1 or not 1 <= max(domains.values()) <= OPSET:
        raise ValueError(f"the graph is not of one opset up to {OPSET}")
    if not 1 <= model.ir_version <= IR_VERSION:
        raise ValueError(
            f"the graph has version {model.ir_version} of the format, above {IR_VERSION}"
        )
    if model.functions or model.training_info or model.graph.sparse_initializer:
        raise ValueError("the graph has functions, training or sparse initializers")


def _require_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for count, node in enumerate(nodes):
        if count == _MOST_NODES:
            raise ValueError(f"the graph has more than {_MOST_NODES:,} operators")
        if node.domain not in _DEFAULT_DOMAINS:
            raise ValueError(
                f"the graph uses an operator of the domain {one_line(node.domain, 80)!r}"
            )
        if node.op_type not in _OPERATORS:
            raise ValueError(
                f"the graph uses the operator {one_line(node.op_type, 80)!r}, "
                "which no dense part needs"
            )
        if any(each.type not in _ATTRIBUTES for each in node.attribute):
            raise ValueError(f"an operator {node.op_type!r} of the graph has an odd attribute")


def _require_initializers(graph: onnx.GraphProto, weights: Tensors, largest: int) -> None:
    for tensor in graph.initializer:
        name = one_line(tensor.name, 80)
        if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
            raise ValueError(f"initializer {name!r} of the graph is in another file")
        if tensor.data_type not in _NUMBERS:
            raise ValueError(f"initializer {name!r} of the graph is not of float32 or int64")
        # A claimed shape takes no memory before it is compared.
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > largest:
            raise ValueError(f"initializer {name!r} of the graph has an odd shape")
        try:
            found = numpy_helper.to_array(tensor)
        except ValueError:
            raise ValueError(f"initializer {name!r} of the graph has an odd shape") from None
        if tensor.name.startswith(DENSE) and not _is_equal(found, weights.get(tensor.name)):
            raise ValueError(f"initializer {name!r} of the graph is not the tensor of that name")


def _is_equal(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic] | None) -> bool:
    if expected is None or found.dtype != expected.dtype:
        return False
    return np.array_equal(found, expected)


def _require_interface(graph: onnx.GraphProto, spec: LearnerSpec) -> None:
    expected = {each.name: _shape(each) for each in inputs_of(spec)}
    found = {each.name: _shape(each) for each in graph.input}
    if found != expected:
        raise ValueError(f"the graph has the inputs {_shown(found)}, expected {_shown(expected)}")
    if {each.name: _shape(each) for each in graph.output} != {LOGITS: [BATCH]}:
        raise ValueError(f"the graph does not have the one output {LOGITS!r} [{BATCH}]")
    if any(_type(each) != TensorProto.FLOAT for each in (*graph.input, *graph.output)):
        raise ValueError("the graph has an input or an output that is not float32")


def _require_sizes(model: onnx.ModelProto, largest: int) -> None:
    """Refuse a graph whose shapes contradict each other, or of which one is too large."""
    del model.graph.value_info[:]  # what a stranger says of shapes in between
    try:
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # noqa: BLE001 - its errors have no base of their own
        raise ValueError(f"the shapes of the graph do not fit: {one_line(error)}") from None
    known = {each.name: each for each in (*inferred.graph.value_info, *inferred.graph.output)}
    for node in inferred.graph.node:
        for name in node.output:
            shown = one_line(name, 80)
            size = _values_of_an_example(known[name]) if name in known else None
            if size is None:
                raise ValueError(f"the shape of {shown!r} of the graph is not known")
            if size > largest:
                raise ValueError(f"{shown!r} of the graph has {size:,} values for an example")


def _values_of_an_example(value: onnx.ValueInfoProto) -> int | None:
    """Return the number of values for an example, or None if it is not known.

    Only the first dimension may be open, and then it is the number of examples.
    """
    dims = value.type.tensor_type.shape.dim
    sizes = [each.dim_value for each in dims]
    if dims and dims[0].dim_param == BATCH:
        sizes[0] = 1
    return math.prod(sizes) if all(size > 0 for size in sizes) else None


def _shape(value: onnx.ValueInfoProto) -> list[str | int]:
    """Return the shape of a value, with the names of dimensions that are open."""
    return [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]


def _type(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def _shown(shapes: dict[str, list[str | int]]) -> str:
    return one_line(", ".join(f"{name} {shape}" for name, shape in shapes.items()))
