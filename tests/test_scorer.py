"""A scorer predicts with a model of a snapshot, and refuses weights that do not fit it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from msgspec import structs
from safetensors.numpy import load, save
from support.manifests import LEARNER, MANIFEST, edit_manifest, manifest, replace_file
from support.served import write_served

from stream_ctr.errors import InvalidFeatures, SnapshotError
from stream_ctr.evaluate.metrics import probabilities
from stream_ctr.events.features import Hasher
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.manifest import FORMAT
from stream_ctr.snapshots.scorer import Scorer

ROWS: list[dict[str, object]] = [
    {"app": "maps", "age": 31, "os": "a"},
    {"app": "mail"},
    {"app": None, "age": 1.5},
    {"os": "b"},
]


@pytest.mark.parametrize("model", [None, "deepfm", "ftrl"])
def test_a_scorer_predicts_with_the_weights_of_its_model(served: Path, model: str | None) -> None:
    described, tensors = snapshot.load(served)
    learner = make_learner(described.specs[model or "deepfm"], device="cpu", serving=True)
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
    assert scorer.predict(ROWS).tolist() == expected.tolist()
    assert scorer.predict_columns(columns).tolist() == expected.tolist()
    assert scorer.predict([]).shape == (0,)
    assert scorer.predict(ROWS[0]) == expected[0]
    assert scorer.predict(pa.Table.from_pylist(ROWS)).tolist() == expected.tolist()
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
    assert predicted == ([] if device == "cpu" else [1])


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


def test_a_claimed_size_takes_no_memory_before_it_is_checked(tmp_path: Path) -> None:
    """A table of 2^31 rows would take a hundred gigabytes."""
    tensors = snapshot.load(write_served(tmp_path))[1]
    huge = {
        "schema": structs.replace(MANIFEST.schema, table_bits=31),
        "learner": structs.replace(LEARNER, table_bits=31, hidden=(16384,) * 64),
        "beside": {},
    }
    path = snapshot.write(tmp_path, tensors=tensors, manifest=manifest(sequence=2, **huge))
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
    for empty in ([], pa.table({})):
        ids, values = scorer.ids(empty)
        assert (ids.shape, values.shape) == ((0, 4), (0, 1))
        assert scorer.predict_ids(ids, values).shape == (0,)
    long = pa.table({"app": ["maps", "mail"] * 40_000})
    assert len(set(scorer.predict_ids(*scorer.ids(long)).tolist())) == 2
