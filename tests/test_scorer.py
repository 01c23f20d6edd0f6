"""A scorer predicts with a model of a snapshot, and refuses weights that do not fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from msgspec import structs
from safetensors.numpy import load, save
from support.manifests import LEARNER, MANIFEST, edit_manifest, manifest, replace_file
from support.served import ROWS, write_served

from stream_ctr.errors import InvalidFeatures, SnapshotError
from stream_ctr.evaluate.metrics import probabilities
from stream_ctr.events.features import Hasher
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.onnx_graph import build_graph
from stream_ctr.learn.runtimes import RUNTIMES
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.manifest import FORMAT
from stream_ctr.snapshots.scorer import Scorer


@pytest.mark.parametrize("model", [None, "deepfm", "ftrl"])
def test_a_scorer_predicts_with_the_weights_of_its_model(served: Path, model: str | None) -> None:
    described, tensors = snapshot.load(served)
    learner = make_learner(described.specs[model or "deepfm"], device="cpu")
    learner.load_weights(tensors["ftrl.model" if model == "ftrl" else "model"])
    hasher = Hasher(**structs.asdict(described.schema))
    columns = {
        "app": pa.array(["maps", "mail", None, None]),
        "age": pa.array([31.0, None, 1.5, None]),
        "os": pa.array(["a", None, None, "b"]),
    }
    expected = probabilities(learner.predict(*hasher.rows(columns)).astype(np.float64))
    scorer = Scorer(served, model=model)
    assert scorer.manifest == described
    assert scorer.fields == described.schema.fields
    found = scorer.predict(ROWS)
    # A served LR has weights in single precision.
    assert found == pytest.approx(expected, abs=1e-7 if model == "ftrl" else 0)
    assert scorer.predict_columns(columns).tolist() == found.tolist()
    assert scorer.predict([]).shape == (0,)
    assert scorer.predict(ROWS[0]) == found[0]
    assert scorer.predict(pa.Table.from_pylist(ROWS)).tolist() == found.tolist()
    assert len(set(expected.tolist())) >= 3


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_on_a_gpu_a_scorer_has_made_its_first_prediction_when_it_is_ready(
    served: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    predicted: list[int] = []
    predict = NetworkLearner.predict

    def counted(learner: NetworkLearner, ids: Any, values: Any) -> Any:
        predicted.append(len(ids))
        return predict(learner, ids, values)

    monkeypatch.setattr(NetworkLearner, "predict", counted)
    Scorer(served, model="deepfm", device=device)
    assert predicted == ([1] if device == "auto" and torch.cuda.is_available() else [])


def test_features_that_the_model_does_not_know_are_an_error_or_are_counted(served: Path) -> None:
    given: list[dict[str, object]] = [{"app": "maps", "ap": 1}, {"app": "maps", "age": "31"}]
    scorer = Scorer(served)
    for row in given:
        with pytest.raises(InvalidFeatures, match="'ap'; did you mean 'app'|'age' must be a num"):
            scorer.predict(row)
    counted: Counter[str] = Counter()
    lenient = Scorer(served, on_invalid="score", invalid=counted)
    assert lenient.predict(given).tolist() == [scorer.predict({"app": "maps"})] * 2
    assert lenient.invalid is counted
    assert counted == {"unknown_field": 1, "wrong_type": 1}


def test_numbers_and_booleans_are_categories_in_the_form_of_json(served: Path) -> None:
    scorer = Scorer(served)
    typed: list[dict[str, object]] = [{"app": 7}, {"app": True}, {"app": False}]
    texts: list[dict[str, object]] = [{"app": "7"}, {"app": "true"}, {"app": "false"}]
    assert scorer.predict(typed).tolist() == scorer.predict(texts).tolist()


def test_a_model_that_the_snapshot_lacks_is_an_error_with_those_it_has(served: Path) -> None:
    with pytest.raises(SnapshotError, match="has no model 'fm'; it has deepfm, ftrl"):
        Scorer(served, model="fm")


def test_an_additional_model_that_had_diverged_is_an_error(tmp_path: Path) -> None:
    path = write_served(tmp_path)
    tensors = snapshot.load(path)[1]
    del tensors["ftrl.model"]
    other = snapshot.write(tmp_path, tensors=tensors, manifest=manifest(sequence=2))
    assert Scorer(other).predict(ROWS).shape == (4,)
    with pytest.raises(SnapshotError, match="taken without the model 'ftrl', which had diverged"):
        Scorer(other, model="ftrl")


def test_a_damaged_or_newer_snapshot_is_not_served(served: Path) -> None:
    with pytest.raises(SnapshotError, match="its pointer says"):
        Scorer(served, manifest_sha256="0" * 64)
    edit_manifest(served, lambda document: document.update(format=FORMAT + 1))
    with pytest.raises(NewerFormat):
        Scorer(served)


def change_tensors(path: Path, change: Any) -> None:
    tensors = load((path / "model.safetensors").read_bytes())
    replace_file(path, "model.safetensors", save(change(tensors)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: {"table": tensors["table"]}, "tensor 'dense.* is missing"),
        (lambda tensors: {**tensors, "table": tensors["table"][:-1]}, "tensor 'table'"),
        (lambda tensors: {**tensors, "table": tensors["table"] * np.nan}, "not finite"),
    ],
)
def test_tensors_that_contradict_the_manifest_are_refused(
    served: Path, change: Any, reason: str
) -> None:
    change_tensors(served, change)
    with pytest.raises(SnapshotError, match=f"does not describe a model .*{reason}"):
        Scorer(served)


def write_huge(root: Path, tensors: Any) -> Path:
    """Write a snapshot whose manifest claims a table of 2^31 rows, a hundred gigabytes."""
    huge = {
        "schema": structs.replace(MANIFEST.schema, table_bits=31),
        "learner": structs.replace(LEARNER, table_bits=31, hidden=(16384,) * 64),
        "beside": {},
    }
    return snapshot.write(root, tensors=tensors, manifest=manifest(sequence=2, **huge))


def test_a_claimed_size_takes_no_memory_before_it_is_checked(tmp_path: Path) -> None:
    tensors = snapshot.load(write_served(tmp_path))[1]
    path = write_huge(tmp_path, tensors)
    with pytest.raises(SnapshotError, match="does not describe a model"):
        Scorer(path)
    learner = structs.replace(LEARNER, batch_size=(1 << 20) + 1)
    path = snapshot.write(tmp_path, tensors=tensors, manifest=manifest(sequence=3, learner=learner))
    with pytest.raises(SnapshotError, match="does not describe .* a batch of 1048577"):
        Scorer(path)


def test_ids_and_predictions_of_them_are_the_two_halves_of_a_prediction(served: Path) -> None:
    scorer = Scorer(served)
    expected = scorer.predict(ROWS).tolist()
    for rows in (ROWS, pa.table({name: [row.get(name) for row in ROWS] for name in ROWS[0]})):
        ids, values = scorer.ids(rows)
        assert (ids.shape, values.shape) == ((4, 4), (4, 1))
        assert scorer.predict_ids(ids, values).tolist() == expected
    nothing: tuple[Any, ...] = ([], pa.table({}))
    for empty in nothing:
        ids, values = scorer.ids(empty)
        assert (ids.shape, values.shape) == ((0, 4), (0, 1))
        assert scorer.predict_ids(ids, values).shape == (0,)
    long = pa.table({"app": ["maps", "mail"] * 40_000})
    assert len(set(scorer.predict_ids(*scorer.ids(long)).tolist())) == 2


# -- runtimes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "ftrl"])
def test_onnx_serves_a_snapshot_without_graphs(served: Path, model: str | None) -> None:
    there, here = (Scorer(served, model=model, runtime=name) for name in RUNTIMES)
    assert (there.runtime, here.runtime, Scorer(served).runtime) == ("torch", "onnx", "torch")
    assert here.predict(ROWS) == pytest.approx(there.predict(ROWS), abs=1e-6)


def with_graph(path: Path, change: Callable[[Any], object] = lambda model: None) -> bytes:
    """Put the graph of the published model, changed, into the snapshot at `path`."""
    manifest, tensors = snapshot.load(path)
    model = onnx.load_model_from_string(build_graph(manifest.specs["deepfm"], tensors["model"]))
    change(model)
    graph = bytes(model.SerializeToString())
    replace_file(path, "model.onnx", graph)
    return graph


def external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def test_onnx_runs_the_graph_that_a_snapshot_holds(served: Path) -> None:
    def negate(model: Any) -> None:
        node = model.graph.node[-1]  # the output
        node.op_type = "Sub"
        node.input.append(node.input[0])

    expected = Scorer(served).predict(ROWS)
    with_graph(served)
    assert Scorer(served, runtime="onnx").predict(ROWS) == pytest.approx(expected, abs=1e-6)
    with_graph(served, negate)
    assert Scorer(served, runtime="onnx").predict(ROWS).tolist() == [0.5] * 4
    assert Scorer(served, runtime="torch").predict(ROWS).tolist() == expected.tolist()


@pytest.mark.security(
    "a graph of a stranger reads no file and runs no code",
    how="graphs with external data, other operators and domains, and damaged ones, in snapshots",
)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (external, "is in another file"),
        (lambda model: setattr(model.graph.node[0], "op_type", "Loop"), "the operator 'Loop'"),
        (lambda model: setattr(model.graph.node[0], "domain", "evil"), "of the domain 'evil'"),
        (lambda model: model.graph.output[0].ClearField("name"), "the one output 'logits'"),
    ],
)
def test_a_graph_that_is_not_that_of_the_model_is_refused(
    served: Path, change: Callable[[Any], object], reason: str
) -> None:
    with_graph(served, change)
    with pytest.raises(SnapshotError, match=f"does not describe a model .*{reason}"):
        Scorer(served, runtime="onnx")


def test_a_graph_whose_bytes_changed_is_refused_by_every_reader(served: Path) -> None:
    graph = with_graph(served)
    (served / "model.onnx").write_bytes(graph[:-1] + b"\0")
    with pytest.raises(SnapshotError, match=r"model\.onnx has SHA-256"):
        Scorer(served, runtime="onnx")
    with pytest.raises(SnapshotError, match=r"model\.onnx has SHA-256"):
        snapshot.verify(served)
    (served / "model.onnx").write_bytes(graph[:-1])
    with pytest.raises(SnapshotError, match=r"model\.onnx has \d+ bytes"):
        Scorer(served, runtime="torch")


def test_a_graph_that_cannot_be_read_is_refused(served: Path) -> None:
    replace_file(served, "model.onnx", b"\xff" * 100)
    with pytest.raises(SnapshotError, match="the graph cannot be read"):
        Scorer(served, runtime="onnx")


def test_a_claimed_size_takes_no_memory_with_onnx_either(tmp_path: Path) -> None:
    path = write_huge(tmp_path, snapshot.load(write_served(tmp_path))[1])
    with pytest.raises(SnapshotError, match="does not describe a model .*tensor"):
        Scorer(path, runtime="onnx")
