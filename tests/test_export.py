"""Exported snapshots serve without their run, and programs of torch run without our code."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from support.dense import dense_spec, examples, learned
from support.keys import write_keys
from support.manifests import manifest
from support.served import ROWS, write_blend, write_served

from stream_ctr.cli.main import main
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.learn.dense_part import PARTS
from stream_ctr.learn.onnx_graph import build_graph
from stream_ctr.learn.torch_program import build_program
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.export import export_programs, export_snapshot
from stream_ctr.snapshots.scorer import Scorer


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.parametrize("model", [None, "deepfm", "ftrl", "fm"])
def test_an_exported_blend_serves_the_same_probabilities(tmp_path: Path, model: str | None) -> None:
    path = write_blend(tmp_path / "snapshots")
    out = export_snapshot(path, tmp_path / "served", build_graph, model=model)
    there, here = Scorer(path, model=model), Scorer(out, model=model, runtime="onnx")
    assert np.abs(there.predict(ROWS) - here.predict(ROWS)).max() < 1e-6
    assert Scorer(out, model=model, runtime="torch").predict(ROWS).tolist() == (
        there.predict(ROWS).tolist()
    )
    assert here.manifest.weights_sha256 == there.manifest.weights_sha256
    assert "joiner.safetensors" not in snapshot.verify(out, any_name=True).files


def test_an_export_has_the_weights_and_a_graph_of_each_network(tmp_path: Path) -> None:
    out = export_snapshot(write_blend(tmp_path / "snapshots"), tmp_path / "served", build_graph)
    networks = {
        f"{name}.model{suffix}"
        for name in ("deepfm", "fnn")
        for suffix in (".safetensors", ".onnx")
    }
    expected = {*networks, "ftrl.model.safetensors", "model.safetensors", "manifest.json"}
    assert {each.name for each in out.iterdir()} == expected


def test_the_exported_folder_must_be_new(tmp_path: Path) -> None:
    path = write_served(tmp_path / "snapshots")
    (tmp_path / "served").mkdir()
    for write in (export_snapshot, export_programs):
        with pytest.raises(SnapshotError, match="served.* exists"):
            write(path, tmp_path / "served", build_graph)
    assert not [*(tmp_path / "served").iterdir()]


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("dense.deep.layers.0.weight"),
        lambda weights: weights.update({"dense.deep.layers.0.weight": np.ones((2, 2), np.float32)}),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_do_not_fit_are_not_exported(
    tmp_path: Path, change: Callable[[Any], object]
) -> None:
    path = write_served(tmp_path / "snapshots")
    tensors = snapshot.load(path)[1]
    change(tensors["model"])
    other = snapshot.write(tmp_path, tensors=tensors, manifest=manifest(sequence=2))
    for write, build in ((export_snapshot, build_graph), (export_programs, build_program)):
        with pytest.raises(SnapshotError, match="does not describe a model .*layers.0.weight"):
            write(other, tmp_path / "served", build)
    assert not (tmp_path / "served").exists()


# -- torch.export --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", PARTS)
def test_a_program_computes_what_the_model_does_for_any_number_of_rows(
    model: str, precision: str
) -> None:
    spec = dense_spec(model, precision=precision, value_fields=[])
    learner, weights = learned(spec)
    program = torch.export.load(io.BytesIO(build_program(spec, weights))).module()
    for n in (1, 2, 700):
        ids = examples(spec, n)[0]
        part = PARTS[model]
        rows = torch.from_numpy(weights["table"][ids[:, : part.columns(spec)]])
        width = part.width(spec)
        logits = program(rows[:, :, width].clone(), rows[:, :, :width].clone())
        bound = 4e-6 if precision == "fp32" else 8e-3
        assert logits.detach().numpy() == pytest.approx(learner.predict(ids), abs=bound)


@pytest.mark.slow
def test_a_file_of_torch_export_is_written_for_each_network(tmp_path: Path) -> None:
    path = write_blend(tmp_path / "snapshots")
    written = export_programs(path, tmp_path / "programs", build_program)
    assert [each.name for each in written] == ["deepfm.model.pt2", "fnn.model.pt2"]
    for each in written:
        logits = torch.export.load(each).module()(torch.ones(3, 3), torch.ones(3, 3, 4))
        assert logits.shape == (3,)
    with pytest.raises(SnapshotError, match="is LR, which has no network to export"):
        export_programs(path, tmp_path / "lr", build_program, model="ftrl")


def test_a_model_that_torch_cannot_trace_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def untraceable(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent\nbranch")

    monkeypatch.setattr(torch.export, "export", untraceable)
    spec = dense_spec("fm")
    with pytest.raises(ConfigError, match=r"cannot trace the model 'fm': data-dependent\\n"):
        build_program(spec, learned(spec)[1])


# -- the command ---------------------------------------------------------------------------------


def test_the_command_exports_the_newest_snapshot_of_a_state_directory(tmp_path: Path) -> None:
    write_served(tmp_path / "snapshots")
    path = write_served(tmp_path / "snapshots", sequence=2, seed=7)
    done = command("export", tmp_path, tmp_path / "served")
    assert done.exit_code == 0, done.output
    assert done.output == f"{tmp_path / 'served'}\n"
    there, here = Scorer(path), Scorer(tmp_path / "served", runtime="onnx")
    assert here.predict(ROWS) == pytest.approx(there.predict(ROWS), abs=1e-6)
    again = command("export", tmp_path, tmp_path / "served")
    assert again.exit_code == 6
    assert "exists already" in again.output


def test_the_command_exports_one_model(tmp_path: Path) -> None:
    path = write_blend(tmp_path / "snapshots")
    assert command("export", path, tmp_path / "fm", "--model", "fm").exit_code == 0
    assert Scorer(tmp_path / "fm", model="fm", runtime="onnx").predict(ROWS).shape == (4,)
    with pytest.raises(SnapshotError, match="has no file model.safetensors"):
        Scorer(tmp_path / "fm", runtime="onnx")
    wrong = command("export", path, tmp_path / "x", "--model", "fnm")
    assert (wrong.exit_code, "has no model 'fnm'" in wrong.output) == (6, True)


def test_a_signature_is_required_and_given(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "a")
    other, other_public = write_keys(tmp_path, "b")
    unsigned = write_served(tmp_path / "snapshots")
    refused = command("export", unsigned, tmp_path / "x", "--public-key", public)
    assert (refused.exit_code, "is not signed" in refused.output) == (6, True)
    signed = command("export", unsigned, tmp_path / "served", "--signing-key", private)
    assert signed.exit_code == 0, signed.output
    again = command("export", tmp_path / "served", tmp_path / "again", "--public-key", public)
    assert again.exit_code == 0, again.output
    wrong = command("export", tmp_path / "served", tmp_path / "y", "--public-key", other_public)
    assert (wrong.exit_code, "not that of the expected key" in wrong.output) == (6, True)
    both = command("export", unsigned, tmp_path / "z", "--format", "torch", "--signing-key", other)
    assert both.exit_code == 2


def test_the_command_writes_programs_of_torch(tmp_path: Path) -> None:
    path = write_served(tmp_path / "snapshots")
    done = command("export", path, tmp_path / "programs", "--format", "torch")
    assert done.exit_code == 0, done.output
    assert done.output == f"{tmp_path / 'programs' / 'model.pt2'}\n"
