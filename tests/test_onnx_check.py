"""A graph of a stranger is refused unless it is that of a dense part, before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.dense import dense_spec, examples, learned

from stream_ctr.learn.dense_part import PARTS
from stream_ctr.learn.onnx_check import require_graph
from stream_ctr.learn.onnx_graph import build_graph
from stream_ctr.learn.onnx_predictor import onnx_predictor
from stream_ctr.learn.tensors import State

SPEC = dense_spec("deepfm")
WEIGHTS: State = learned(SPEC)[1]
GRAPH = build_graph(SPEC, WEIGHTS)
Change = Callable[[Any], object]


def changed(change: Change) -> bytes:
    model = onnx.load_model_from_string(GRAPH)
    change(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", PARTS)
def test_the_graph_of_every_system_is_accepted(model: str, precision: str) -> None:
    for pretrained in (0, 1000):
        spec = dense_spec(model, precision=precision, pretrain_examples=pretrained)
        weights = learned(spec)[1]
        require_graph(build_graph(spec, weights), spec, weights)


def external(model: Any) -> None:
    """Let a weight be the bytes of another file."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_file_without_the_mark(model: Any) -> None:
    model.graph.initializer[0].external_data.add(key="location", value="../model.safetensors")


def constant_in_an_attribute(model: Any) -> None:
    value = numpy_helper.from_array(np.zeros(3, np.float32))
    model.graph.node.insert(0, helper.make_node("Identity", ["w"], ["odd"], value=value))


def loop(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.insert(0, helper.make_node("Loop", ["", ""], ["odd"], body=body))


def subgraph(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.insert(0, helper.make_node("Identity", ["w"], ["odd"], body=body))


def node(op: str, inputs: list[str], **attributes: Any) -> Change:
    made = helper.make_node(op, inputs, ["odd"], **attributes)
    return lambda model: model.graph.node.insert(0, made)


def grow(name: str, axis: int) -> Change:
    """Double an input, or a weight, until it has a billion times its size."""

    def change(model: Any) -> None:
        last = name
        for index in range(30):
            doubled = helper.make_node("Concat", [last, last], [f"grown_{index}"], axis=axis)
            model.graph.node.insert(index, doubled)
            last = f"grown_{index}"

    return change


def claim_the_shape_of_what_grew(model: Any) -> None:
    grow("w", 0)(model)
    for index in range(30):
        name = f"grown_{index}"
        shape = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 6])
        model.graph.value_info.append(shape)


def fixed_batch(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3


def many(model: Any) -> None:
    model.graph.node.extend(helper.make_node("Identity", ["w"], [f"many_{i}"]) for i in range(2000))


def other_weight(model: Any) -> None:
    tensor = next(each for each in model.graph.initializer if each.name.endswith("0.weight"))
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] += 1.0
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def claimed(*dims: int) -> Change:
    def change(model: Any) -> None:
        model.graph.initializer[0].dims[:] = dims

    return change


def odd_type(model: Any) -> None:
    model.graph.initializer[0].data_type = TensorProto.STRING


def wide_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 99


def another_input(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B"]))


def integer_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def other_output(model: Any) -> None:
    model.graph.output[0].name = "odd"


def wrong_shape(model: Any) -> None:
    next(each for each in model.graph.node if each.op_type == "Gemm").attribute[0].i = 0


def function(model: Any) -> None:
    model.functions.add(name="odd", domain="")


REFUSED: list[tuple[Change, str]] = [
    (external, "'dense.* is in another file|'at_1' .* is in another file"),
    (external_file_without_the_mark, "is in another file"),
    (constant_in_an_attribute, "an operator 'Identity' of the graph has an odd attribute"),
    (loop, "the operator 'Loop', which no dense part needs"),
    (subgraph, "an operator 'Identity' of the graph has an odd attribute"),
    (node("ReadFile", ["w"]), "the operator 'ReadFile'"),
    (node("Add", ["w", "w"], domain="com.microsoft"), "an operator of the domain 'com.microsoft'"),
    (lambda model: model.opset_import.add(domain="evil\x1b", version=1), r"domain 'evil\\\\x1b'"),
    (lambda model: model.opset_import.add(domain="", version=9), "not of one opset"),
    (lambda model: setattr(model.opset_import[0], "version", 99), "not of one opset up to 17"),
    (lambda model: model.ClearField("opset_import"), "not of one opset"),
    (lambda model: setattr(model, "ir_version", 99), "version 99 of the format"),
    (function, "functions, training or sparse"),
    (lambda model: model.graph.sparse_initializer.add(), "functions, training or sparse"),
    (grow("w", 1), r"'grown_.*' of the graph has [\d,]+ values for an example"),
    (grow("w", 0), "the shape of 'grown_.*' of the graph is not known"),
    (claim_the_shape_of_what_grew, "the shape of 'grown_.*' of the graph is not known"),
    (fixed_batch, r"has the inputs w \[3, 6\], v .*, expected w \['B', 6\]"),
    (grow("dense.deep.layers.0.bias", 0), r"'grown_.*' of the graph has [\d,]+ values"),
    (many, "more than 1,024 operators"),
    (other_weight, r"'dense.deep.layers.0.weight' of the graph is not the tensor of that name"),
    (claimed(1 << 40, 1 << 20), "initializer 'at_1' of the graph has an odd shape"),
    (claimed(-1), "initializer 'at_1' of the graph has an odd shape"),
    (claimed(7), "initializer 'at_1' of the graph has an odd shape"),
    (odd_type, "is not of float32 or int64"),
    (wide_input, r"has the inputs w \['B', 99\].*, expected w \['B', 6\]"),
    (another_input, "has the inputs w .*x"),
    (integer_input, "an input or an output that is not float32"),
    (other_output, r"does not have the one output 'logits' \[B\]"),
    (wrong_shape, "the shapes of the graph do not fit"),
    (lambda model: model.ClearField("graph"), "has the inputs , expected"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_no_dense_part_needs_is_refused(change: Change, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        require_graph(changed(change), SPEC, WEIGHTS)


def test_a_graph_that_is_larger_than_its_weights_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="bytes, more than its weights account for"):
        require_graph(GRAPH + bytes(1 << 24), SPEC, WEIGHTS)


def test_the_graph_of_another_system_or_size_is_refused() -> None:
    for other in (dense_spec("pnn"), dense_spec("deepfm", hidden=[32, 16])):
        with pytest.raises(ValueError, match="is not the tensor of that name|has an odd shape"):
            require_graph(build_graph(other, learned(other)[1]), SPEC, WEIGHTS)


@pytest.mark.parametrize("data", [b"", b"\x00", b"PK\x03\x04", b"{}", GRAPH[:100], GRAPH[:-1]])
def test_bytes_that_are_no_graph_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="the graph"):
        require_graph(data, SPEC, WEIGHTS)


def test_names_that_are_not_text_are_refused() -> None:
    """The library returns such names as bytes."""
    damaged = GRAPH.replace(b"dense.deep.layers.0.weight", b"dense.deep.layers.0.weigh\xff")
    with pytest.raises(ValueError, match="names that are not UTF-8"):
        require_graph(damaged, SPEC, WEIGHTS)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(GRAPH) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_leaves_a_graph_that_runs(at: int, bit: int) -> None:
    damaged = bytearray(GRAPH)
    damaged[at] ^= 1 << bit
    try:
        network = onnx_predictor(SPEC, WEIGHTS, graph=bytes(damaged))
    except ValueError:
        return
    assert network.predict(*examples(SPEC, 5)).shape == (5,)


def test_a_graph_that_only_fails_when_it_runs_is_refused_too() -> None:
    def gather_beyond(model: Any) -> None:
        axes = next(each for each in model.graph.node if each.op_type == "ReduceSum")
        beyond = helper.make_node("Gather", ["w", "at_9"], ["odd"], axis=1)
        model.graph.initializer.append(numpy_helper.from_array(np.array([9]), "at_9"))
        model.graph.node.insert(0, beyond)
        axes.input[0] = "odd"

    graph = changed(gather_beyond)
    require_graph(graph, SPEC, WEIGHTS)
    with pytest.raises(ValueError, match="onnxruntime cannot run the graph"):
        onnx_predictor(SPEC, WEIGHTS, graph=graph)
