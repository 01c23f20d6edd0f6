"""The graph of every system gives the probabilities of its module, within the stated bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from support.dense import dense_spec, examples, learned

from stream_ctr.errors import ConfigError
from stream_ctr.evaluate.metrics import probabilities
from stream_ctr.learn.dense_part import PARTS
from stream_ctr.learn.onnx_graph import OPSET, build_graph
from stream_ctr.learn.onnx_predictor import onnx_predictor
from stream_ctr.learn.spec import LearnerSpec

FLOAT32_BOUND = 1e-6
BFLOAT16_BOUND = 2e-3
N = 1500  # more than are computed at once


def both(spec: LearnerSpec) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the probabilities of the learner and of the graph, for the same examples."""
    learner, weights = learned(spec)
    ids, values = examples(spec, N)
    logits = learner.predict(ids, values), onnx_predictor(spec, weights).predict(ids, values)
    there, here = (probabilities(each.astype(np.float64)) for each in logits)
    return there, here


@pytest.mark.parametrize("optimizer", ["online", "adagrad"])
@pytest.mark.parametrize("model", PARTS)
def test_every_system_has_the_probabilities_of_its_module(model: str, optimizer: str) -> None:
    there, here = both(dense_spec(model, table_optimizer=optimizer))
    assert np.abs(there - here).max() < FLOAT32_BOUND
    assert there.std() > 0.02


@pytest.mark.parametrize("model", PARTS)
def test_products_in_bfloat16_stay_within_the_wider_bound(model: str) -> None:
    there, here = both(dense_spec(model, precision="bf16"))
    assert np.abs(there - here).max() < BFLOAT16_BOUND
    # The graph rounds where the trainer does. Torch rounds before tanh too, on a processor that has
    # no products in bfloat16.
    if PARTS[model].network and PARTS[model].activation == "relu":
        assert np.abs(there - here).mean() < np.abs(there - unrounded(model)).mean() / 1.5


def unrounded(model: str) -> npt.NDArray[np.float64]:
    """Return the probabilities of a graph that multiplies the float32 weights."""
    _, weights = learned(dense_spec(model, precision="bf16"))
    spec = dense_spec(model)
    logits = onnx_predictor(spec, weights).predict(*examples(spec, N))
    return probabilities(logits.astype(np.float64))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "fnn", "pretrain_examples": 1000},
        {"model": "pnn", "fields": 1, "value_fields": []},
        {"model": "deepfm", "hidden": []},
        {"model": "deepfm", "hidden": [1], "precision": "bf16"},
        {"model": "lr_dnn", "crosses": 0},
        {"model": "deepfm", "activation": "sigmoid"},
        {"model": "ipnn", "activation": "relu", "table_optimizer": "adam"},
        {"model": "fm_dnn", "embedding_dim": 40},
    ],
    ids=str,
)
def test_other_options_give_the_same_probabilities_too(changes: dict[str, Any]) -> None:
    there, here = both(dense_spec(**changes))
    assert np.abs(there - here).max() < FLOAT32_BOUND
    assert len(set(there.tolist())) > N / 3


def test_one_row_has_the_probability_that_it_has_among_others() -> None:
    spec = dense_spec("deepfm")
    predictor = onnx_predictor(spec, learned(spec)[1])
    ids, values = examples(spec, 600)
    together = predictor.predict(ids, values)
    alone = np.concatenate([predictor.predict(ids[i : i + 1], values[i : i + 1]) for i in (0, 599)])
    assert alone == pytest.approx(together[[0, 599]], abs=4e-6)
    assert predictor.predict(ids[:0], values[:0]).shape == (0,)


def test_a_graph_is_valid_onnx_with_the_names_of_the_weights() -> None:
    spec = dense_spec("pnn")
    weights = learned(spec)[1]
    model = onnx.load_model_from_string(build_graph(spec, weights))
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", OPSET)]
    initializers = {each.name for each in model.graph.initializer}
    assert {name for name in weights if name.startswith("dense.")} <= initializers
    assert build_graph(spec, weights) == build_graph(spec, weights)


def test_a_model_of_another_package_has_no_graph() -> None:
    with pytest.raises(ConfigError, match="'acme.nets:Wide' has no ONNX graph.* with torch"):
        build_graph(dense_spec("acme.nets:Wide"), {})
