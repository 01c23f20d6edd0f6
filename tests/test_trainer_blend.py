"""Runs that publish a blend: what is learned, kept, resumed and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.trainers import (
    RIVER,
    SMALL,
    Partitions,
    Sections,
    final_state,
    finish,
    trainer,
)

from stream_ctr.errors import DataError
from stream_ctr.evaluate import metrics
from stream_ctr.learn.runtimes import RUNTIMES
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.train.trainer import Trainer

IMPRESSIONS = 6000
BLEND: Sections = {
    "model": {**SMALL["model"], "name": "blend"},
    "learn": {"batch_size": 512, "threads": 2},
}
PAIRS = ["ftrl_pairs", "ftrl_pairs_slow"]
MEMBERS = ["deepfm", "ftrl", "ftrl_scaled", *PAIRS]
ROWS: list[dict[str, object]] = [{"app_id": "a1"}, {"app_id": "a2", "hour": "20"}, {"os": "o1"}]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, stream: pa.LargeBinaryArray) -> Any:
    """A run to the end: its directory and its last report."""
    directory = tmp_path_factory.mktemp("straight")
    return directory, finish(trainer(directory, Partitions([stream]), **BLEND))


def test_the_blend_comes_first_and_reports_its_weights_and_regret(straight: Any) -> None:
    _, report = straight
    assert list(report["models"]) == ["blend", *MEMBERS]
    assert list(report["pairs"]) == MEMBERS
    assert report["models"]["blend"]["count"] == IMPRESSIONS
    assert list(report["blend"]["weights"]) == [*MEMBERS, "stack"]
    assert sum(report["blend"]["weights"].values()) == pytest.approx(1.0)
    logloss = {name: score["logloss"] for name, score in report["models"].items()}
    best = report["blend"]["best"]
    if best != "stack":
        regret = IMPRESSIONS * (logloss["blend"] - logloss[best])
        assert report["blend"]["regret_nats"] == pytest.approx(regret, abs=1e-6)
    assert logloss["blend"] < min(logloss[name] for name in MEMBERS) + 30 / IMPRESSIONS


def test_a_model_of_a_blend_learns_what_it_learns_alone(
    straight: Any, tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    alone = {**BLEND, "model": {**SMALL["model"], "name": "deepfm"}}
    finish(trainer(tmp_path, Partitions([stream]), **alone))
    one = final_state(straight[0])["deepfm.model"]
    other = final_state(tmp_path)["model"]
    assert one.keys() == other.keys()
    assert all(np.array_equal(array, other[name]) for name, array in one.items())


@pytest.mark.parametrize("records", [150, 1200, 5000])  # in the ramp of the batches and after it
def test_a_stopped_run_goes_on_to_the_same_state(
    straight: Any, tmp_path: Path, stream: pa.LargeBinaryArray, records: int
) -> None:
    finish(trainer(tmp_path, Partitions([stream], seed=1, stop_after=records), **BLEND))
    resumed = trainer(tmp_path, Partitions([stream], seed=2), **BLEND)
    newest = snapshot.newest(tmp_path / "snapshots")
    assert newest
    resumed.restore(newest)
    report = finish(resumed)
    assert report["blend"] == straight[1]["blend"]
    assert report["models"] == straight[1]["models"]
    wanted = final_state(straight[0])
    for stem, tensors in final_state(tmp_path).items():
        for name, array in tensors.items():
            # A stop publishes once more, so that something else is served.
            if not stem.startswith("served.") and not name.startswith("served."):
                assert np.array_equal(array, wanted[stem][name], equal_nan=True), (stem, name)


def test_a_scorer_serves_the_blend_of_the_last_state(straight: Any) -> None:
    newest = snapshot.newest(straight[0] / "snapshots")
    assert newest
    served = Scorer(newest)
    members = {name: Scorer(newest, model=name) for name in MEMBERS}
    omega = final_state(straight[0])["model"]["omega"]
    u = final_state(straight[0])["model"]["u"]
    p = np.array([scorer.predict(ROWS) for scorer in members.values()])
    z = np.clip(metrics.logits(p), -12, 12)
    q = metrics.probabilities(u[:-1] @ z + u[-1])
    assert np.allclose(served.predict(ROWS), omega[:-1] @ p + omega[-1] * q, rtol=1e-6)
    assert np.array_equal(Scorer(newest, model="blend").predict(ROWS), served.predict(ROWS))
    assert len(set(served.predict(ROWS).tolist())) == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_snapshots_with_graphs_serve_the_same_blend_without_torch(
    straight: Any, tmp_path: Path, stream: pa.LargeBinaryArray, precision: str
) -> None:
    sections = {**BLEND, "learn": {**BLEND["learn"], "precision": precision}}
    finish(trainer(tmp_path, Partitions([stream]), **sections, snapshots={"onnx": True}))
    newest = snapshot.newest(tmp_path / "snapshots")
    assert newest
    manifest = snapshot.verify(newest)
    assert [name for name in manifest.files if name.endswith(".onnx")] == ["deepfm.model.onnx"]
    for model in ("blend", *MEMBERS):
        there, here = (Scorer(newest, model=model, runtime=runtime) for runtime in RUNTIMES)
        bound = 1e-6 if precision == "fp32" else 2e-3
        assert np.abs(there.predict(ROWS) - here.predict(ROWS)).max() < bound
    if precision == "fp32":  # graphs change nothing else
        assert manifest.weights_sha256 == weights_sha256(straight[0])


def weights_sha256(directory: Path) -> str:
    newest = snapshot.newest(directory / "snapshots")
    assert newest
    return snapshot.read_manifest(newest).weights_sha256


def test_the_hash_of_the_published_weights_depends_on_each_member(straight: Any) -> None:
    newest = snapshot.newest(straight[0] / "snapshots")
    assert newest
    manifest, tensors = snapshot.load(newest)
    found = snapshot.published_weights(manifest, tensors)
    assert snapshot.weights_sha256(found) == manifest.weights_sha256
    for name in MEMBERS:
        assert any(tensor.startswith(f"{name}.") for tensor in found)


@pytest.mark.parametrize(
    ("sections", "members"),
    [
        ({"ftrl": {"enabled": False}}, ["deepfm", "ftrl_scaled", *PAIRS]),
        ({"ftrl": {"alpha": 3 / 14}}, ["deepfm", "ftrl", *PAIRS]),
        ({"model": {**BLEND["model"], "beside": ("fm", "lr")}}, ["fm", "lr", *MEMBERS[2:]]),
    ],
    ids=["without ftrl", "two of one rate", "other models"],
)
def test_members_are_those_of_the_configuration(
    tmp_path: Path, stream: pa.LargeBinaryArray, sections: Sections, members: list[str]
) -> None:
    report = finish(trainer(tmp_path, Partitions([stream.slice(0, 900)]), **{**BLEND, **sections}))
    assert list(report["models"]) == ["blend", *members]
    newest = snapshot.newest(tmp_path / "snapshots")
    assert newest
    assert np.isfinite(Scorer(newest).predict(ROWS)).all()


def test_fields_with_values_are_blended_too(tmp_path: Path, stream: pa.LargeBinaryArray) -> None:
    sections: Sections = {**BLEND, "features": {"numeric_encoding": "log_value"}, **RIVER}
    report = finish(trainer(tmp_path, Partitions([stream]), **sections))
    assert list(report["models"]) == ["blend", *MEMBERS, "river_ftrl"]
    assert report["models"]["blend"]["count"] == IMPRESSIONS
    newest = snapshot.newest(tmp_path / "snapshots")
    assert newest
    assert np.isfinite(Scorer(newest).predict([{"rating": 3.5}, {"os": "o1"}])).all()


def spoil(built: Trainer, *names: str, after: int) -> None:
    """Fill the tables of models with NaN before each step from step `after` on."""
    for name in names:
        learner: Any = built.state.learners[name]
        learn = learner.learn
        calls: list[int] = []

        def spoiled(
            *arguments: Any,
            learner: Any = learner,
            learn: Any = learn,
            calls: Any = calls,
            **more: Any,
        ) -> Any:
            calls.append(1)
            if len(calls) >= after:
                learner.table.rows.fill_(float("nan"))
            return learn(*arguments, **more)

        learner.learn = spoiled


def test_a_member_that_diverges_is_left_out_and_the_blend_goes_on(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    stopping = Partitions([stream], stop_after=len(stream) - 700)
    built = trainer(tmp_path, stopping, **BLEND)
    spoil(built, "deepfm", after=30)
    assert finish(built)["left_out"].keys() == {"deepfm"}
    newest = snapshot.newest(tmp_path / "snapshots")
    assert newest
    assert "deepfm.model.safetensors" not in snapshot.read_manifest(newest).files
    assert np.isfinite(Scorer(newest).predict(ROWS)).all()
    resumed = trainer(tmp_path, Partitions([stream]), **BLEND)
    resumed.restore(newest)
    report = finish(resumed)
    assert report["examples"] == report["models"]["blend"]["count"] == IMPRESSIONS
    assert report["models"]["deepfm"]["count"] < IMPRESSIONS // 2
    assert report["left_out"].keys() == {"deepfm"}


def test_a_run_ends_when_no_member_of_its_blend_is_left(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    sections: Sections = {**BLEND, "ftrl": {"enabled": False}}
    built = trainer(tmp_path, Partitions([stream]), **sections)
    for name in ("ftrl_scaled", *PAIRS):
        guard = built.state.guards[name]
        guard.leave_out(DataError("left out by a test"))
    spoil(built, "deepfm", after=10)
    with pytest.raises(DataError, match="no member of the blend is left"):
        finish(built)


def test_a_last_step_that_spoils_the_blend_keeps_its_snapshot_from_subscribers(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    built = trainer(tmp_path, Partitions([stream.slice(0, 900)]), **BLEND)
    built._read()
    built._drain()
    assert built.state.check_last_step() == ()
    assert built.state.blend
    built.state.blend._u[-1] = 50.0  # the stack is sure of a click
    built.state.blend._omega[:] = 0
    built.state.blend._omega[-1] = 1
    built._settle(wait=True)
    built.cut()
    built._settle(wait=True)
    built.snapshots.close()
    newest = snapshot.newest(tmp_path / "snapshots")
    assert newest
    (reason,) = snapshot.read_manifest(newest).gate.last_step
    assert reason.startswith("its last step took the logloss of its own examples from")
    assert not (tmp_path / "latest.json").exists()
    resumed = trainer(tmp_path, Partitions([stream.slice(0, 900)]), **BLEND)
    resumed.restore(newest)
    assert resumed.state.check_last_step() == (reason,)
