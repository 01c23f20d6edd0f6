"""The choice of the library that computes a network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.dense import dense_spec, examples, learned

from stream_ctr.errors import ConfigError
from stream_ctr.learn import runtimes
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.onnx_predictor import OnnxEngine
from stream_ctr.learn.runtimes import choose_runtime, graph_builder, make_predictor
from stream_ctr.learn.served_network import ServedNetwork
from stream_ctr.learn.torch_predictor import TorchEngine

Without = Callable[..., None]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Without:
    """Make packages look as if they were not installed."""
    find = importlib.util.find_spec

    def hide(*names: str) -> None:
        def found(name: str) -> Any:
            return None if name in names else find(name)

        monkeypatch.setattr(importlib.util, "find_spec", found)

    return hide


def test_torch_is_the_default_where_it_is_installed(without: Without) -> None:
    assert choose_runtime() == "torch"
    without("onnx", "onnxruntime")
    assert choose_runtime() == "torch"
    without("torch")
    assert choose_runtime() == "onnx"


@pytest.mark.parametrize(
    ("missing", "name", "message"),
    [
        (["torch"], "torch", "needs torch, .*pip install torch, or use the runtime onnx"),
        (["onnx"], "onnx", r"needs onnx, .*pip install 'stream-ctr\[onnx\]', or use .* torch"),
        (["onnxruntime"], "onnx", "needs onnxruntime, which is not installed here"),
        (["torch", "onnxruntime"], None, "neither is installed here: pip install 'stream-ctr"),
        ([], "onnix", "a runtime is torch or onnx, got 'onnix'; did you mean 'onnx'"),
    ],
)
def test_a_runtime_that_cannot_be_had_is_an_error_with_the_ways_out(
    without: Without, missing: list[str], name: str | None, message: str
) -> None:
    without(*missing)
    with pytest.raises(ConfigError, match=message):
        choose_runtime(name)


def test_onnx_is_for_the_cpu() -> None:
    assert choose_runtime("onnx", device="auto") == "onnx"
    with pytest.raises(ConfigError, match="predicts on the CPU, got device 'cuda'.*torch"):
        choose_runtime("onnx", device="cuda")


def test_a_graph_needs_onnx(without: Without) -> None:
    without("onnx")
    with pytest.raises(ConfigError, match="an ONNX graph needs onnx, .*pip install"):
        graph_builder()


def test_each_runtime_makes_its_own_predictor() -> None:
    spec = dense_spec("deepfm")
    learner, weights = learned(spec)
    ids, values = examples(spec, 40)
    torch = make_predictor(spec, weights, runtime="torch")
    onnx = make_predictor(spec, weights, runtime="onnx")
    assert isinstance(torch, ServedNetwork)
    assert isinstance(torch._engine, TorchEngine)
    assert isinstance(onnx, ServedNetwork)
    assert isinstance(onnx._engine, OnnxEngine)
    assert torch.predict(ids, values) == pytest.approx(learner.predict(ids, values), abs=4e-6)
    assert onnx.predict(ids, values) == pytest.approx(torch.predict(ids, values), abs=4e-6)


def test_lr_is_the_same_in_both() -> None:
    spec = dense_spec("lr")
    learner = make_learner(spec)
    ids, values = examples(spec, 40)
    learner.learn(ids, np.arange(40).astype(np.uint8) % 2, values)
    torch, onnx = (
        make_predictor(spec, learner.weights(), runtime=runtime).predict(ids, values)
        for runtime in runtimes.RUNTIMES
    )
    assert torch.tolist() == onnx.tolist()
    assert torch == pytest.approx(learner.predict(ids, values), abs=1e-6)


def test_a_model_of_another_package_is_refused_by_onnx() -> None:
    with pytest.raises(ConfigError, match="no ONNX graph.* serve it with torch"):
        make_predictor(dense_spec("acme.nets:Wide"), {}, runtime="onnx")
