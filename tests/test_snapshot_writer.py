"""Snapshots are written by a thread, one at a time, and without models that are not finite."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.manifests import manifest

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.learn.served_weights import served_weights, serving_sha256
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.delta import DeltaPosition, DeltaRank
from stream_ctr.snapshots.manifest import RunIdentity
from stream_ctr.snapshots.snapshot_writer import Cut, NotFinite, SnapshotWriter, Written

GOOD: dict[str, Any] = {"table": np.ones((3, 16), np.float32)}
GOOD_LINEAR: dict[str, Any] = {
    "rows": np.array([5], np.int32),
    "pairs": np.ones((1, 2)),
    "intercept": np.ones(2),
}
TENSORS = {"model": GOOD, "optimizer": GOOD, "ftrl.model": GOOD_LINEAR, "ftrl.optimizer": GOOD}
BAD = {"table": np.full((3, 16), np.nan, np.float32)}


def cut(sequence: int = 1, *, bad: str = "") -> Cut:
    """Return a cut of two models. The arrays of the file stem `bad` are not finite."""
    tensors: dict[str, dict[str, Any]] = {**TENSORS, **({bad: BAD} if bad else {})}
    return Cut(tensors, manifest(sequence=sequence, weights_sha256=""), {0: 1200}, {})


def wait(writer: SnapshotWriter) -> Written:
    written = writer.take(wait=True)
    assert written
    return written


def test_a_cut_becomes_a_snapshot_with_the_digest_of_the_weights(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path)
    assert not writer.busy
    assert writer.take(wait=True) is None
    writer.begin(cut())
    assert writer.busy
    written = wait(writer)
    assert not writer.busy
    assert (written.positions, written.not_finite) == ({0: 1200}, ())
    found = snapshot.verify(written.path)
    assert found.weights_sha256 == written.manifest.weights_sha256 == snapshot.weights_sha256(GOOD)
    writer.close()


def test_a_manifest_has_the_digest_of_what_serving_reads_of_each_model(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path)
    writer.begin(cut())
    found = wait(writer).manifest.serving_sha256
    learner, ftrl = manifest().specs.values()
    assert found == {
        "model": serving_sha256(served_weights(learner, GOOD)),
        "ftrl.model": serving_sha256(served_weights(ftrl, GOOD_LINEAR)),
    }
    # The last 11 numbers of a row are those of the optimizer.
    other = GOOD["table"].copy()
    other[:, 5:] = 7
    tensors = {**cut().tensors, "model": {"table": other}}
    writer.begin(replace(cut(2), tensors=tensors))
    assert wait(writer).manifest.serving_sha256 == found
    other[1, 4] = 7
    writer.begin(replace(cut(3), tensors=tensors))
    assert wait(writer).manifest.serving_sha256["model"] != found["model"]
    writer.close()


def test_a_snapshot_waits_for_the_delta_at_its_state(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path)
    written = threading.Event()
    position = DeltaPosition(DeltaRank(3, 7), "a" * 64)

    def delta() -> DeltaPosition:
        assert written.wait(60)
        return position

    writer.begin(replace(cut(), delta=delta))
    assert writer.take(wait=False) is None
    written.set()
    assert snapshot.verify(wait(writer).path).delta == position
    writer.begin(cut(2))
    assert wait(writer).manifest.delta is None
    writer.begin(replace(cut(3, bad="ftrl.model"), delta=lambda: position))
    assert wait(writer).manifest.delta is None
    writer.close()


def test_taking_without_waiting_returns_none_until_the_snapshot_is_on_disk(tmp_path: Path) -> None:
    on_disk = threading.Event()

    def check() -> None:
        assert on_disk.wait(60)

    writer = SnapshotWriter(tmp_path, check=check)
    writer.begin(cut())
    assert writer.take(wait=False) is None
    assert writer.busy
    on_disk.set()
    assert wait(writer).path.exists()
    writer.close()


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "snapshots")
    writer.begin(cut(bad="model"))
    with pytest.raises(NotFinite, match="not finite; no snapshot was written"):
        writer.take(wait=True)
    assert list(tmp_path.iterdir()) == []
    writer.begin(cut(2))
    assert wait(writer).path.name.startswith("00000002")
    writer.close()


def test_an_additional_model_that_is_not_finite_is_left_out_with_its_optimizer(
    tmp_path: Path,
) -> None:
    writer = SnapshotWriter(tmp_path)
    writer.begin(cut(bad="ftrl.model"))
    written = wait(writer)
    assert written.not_finite == ("ftrl",)
    assert set(snapshot.verify(written.path).files) == {
        "model.safetensors",
        "optimizer.safetensors",
    }
    writer.close()


def test_an_additional_model_that_the_cut_lacks_is_no_error(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path)
    without = cut()
    del without.tensors["ftrl.model"], without.tensors["ftrl.optimizer"]
    writer.begin(without)
    assert wait(writer).not_finite == ()
    writer.close()


def test_graphs_are_made_of_the_models_that_are_written(tmp_path: Path) -> None:
    made: list[set[str]] = []

    def graphs(identity: RunIdentity, tensors: Any) -> dict[str, bytes]:
        made.append({*tensors})
        return {"model": identity.published.encode()}

    writer = SnapshotWriter(tmp_path, graphs=graphs)
    writer.begin(cut(bad="ftrl.model"))
    path = wait(writer).path
    assert made == [{"model", "optimizer"}]
    assert (path / "model.onnx").read_bytes() == b"deepfm"
    assert snapshot.verify(path).files["model.onnx"].bytes == 6
    writer.close()


def test_a_snapshot_is_signed_and_checked_before_it_becomes_visible(tmp_path: Path) -> None:
    def refuse() -> None:
        assert list(tmp_path.glob("tmp-*/manifest.sig"))
        raise ConfigError("taken over")

    writer = SnapshotWriter(tmp_path, sign=lambda data: b"signature", check=refuse)
    writer.begin(cut())
    with pytest.raises(ConfigError, match="taken over"):
        writer.take(wait=True)
    assert list(tmp_path.iterdir()) == []
    writer.close()


def test_work_runs_after_the_snapshot_and_its_errors_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = SnapshotWriter(tmp_path)
    seen: list[list[str]] = []

    def fail() -> None:
        seen.append(snapshot.snapshot_ids(tmp_path))
        raise SnapshotError("cannot delete")

    writer.begin(cut())
    writer.after(fail)
    writer.close()
    assert seen == [[wait(writer).path.name]]
    assert "old snapshots are not removed: cannot delete" in caplog.text
