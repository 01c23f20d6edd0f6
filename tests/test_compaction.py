"""A compacted snapshot serves what its base and the deltas after it serve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from support.commands import command, succeed
from support.delta_runs import DeltaRun, blend_manifest, network_manifest, served
from support.finished_runs import TINY, write_log
from support.keys import write_keys
from support.manifests import LEARNER
from support.snapshots import flip_bit

from stream_ctr.errors import SnapshotError
from stream_ctr.learn.onnx_graph import build_graph
from stream_ctr.learn.spec import Pairs
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.compaction import compact
from stream_ctr.snapshots.delta import DeltaPosition
from stream_ctr.snapshots.delta_store import DeltaStore, payload_name
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import pointer_for, write_pointer
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.snapshots.subscriber import Subscriber


def pairs_manifest(**changes: Any) -> Manifest:
    """Return the manifest of a run with an LR of pairs beside its DeepFM."""
    pairs = Pairs(columns=((0, 0), (0, 1), (1, 2)), table_bits=6)
    described = network_manifest(**changes)
    beside = {"ftrl_pairs": structs.replace(LEARNER, model="lr", pairs=pairs)}
    return structs.replace(described, beside=beside, guards_beside={})


def run_of(state: Path, described: Callable[..., Manifest] = network_manifest) -> DeltaRun:
    """Return a run that has published a snapshot and written four deltas."""
    run = DeltaRun(state, described=described)
    run.learn(2)
    run.snapshot()
    for _ in range(4):
        run.learn()
        run.delta()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("described", [network_manifest, blend_manifest, pairs_manifest])
def test_a_compacted_snapshot_serves_what_base_and_deltas_serve(
    tmp_path: Path, described: Callable[..., Manifest]
) -> None:
    run = run_of(tmp_path / "state", described)
    done = compact(run.state, tmp_path / "served", build_graph)
    assert (done.deltas, done.left_out) == (4, ())
    manifest = snapshot.verify(done.path, any_name=True)
    last = run.deltas[-1]
    assert manifest.delta == done.position == DeltaPosition(last.header.rank, last.sha256)
    assert manifest.serving_sha256 == run.digests()
    assert (manifest.examples, manifest.positions) == (last.header.examples, last.header.positions)
    scorer = Scorer(done.path)
    assert served(scorer) == run.truths[3, 4]
    assert scorer.serving_sha256().items() <= run.digests().items()
    assert served(Scorer(done.path, runtime="onnx")) == pytest.approx(run.truths[3, 4], abs=1e-6)
    run.learn()
    exact = run.state / "snapshots" / run.snapshot().snapshot
    again = compact(run.state, tmp_path / "again", build_graph)
    assert again.deltas == 0
    for name in manifest.beside:
        assert served(Scorer(again.path, model=name)) == served(Scorer(exact, model=name))


def test_the_chain_goes_on_from_a_compacted_snapshot(tmp_path: Path) -> None:
    run = run_of(tmp_path / "state")
    out = tmp_path / "other" / "snapshots" / run.described(sequence=1).snapshot
    done = compact(run.state, out, build_graph)
    shutil.copytree(run.state / "deltas", tmp_path / "other" / "deltas")
    pointer = pointer_for(done.path, snapshot.read_manifest(done.path))
    other = DeltaRun(tmp_path / "other")
    other.publish(pointer)
    subscriber = Subscriber(other.state)
    assert subscriber.next(0.0)
    assert served(subscriber) == run.truths[3, 4]
    run.learn()
    run.delta()
    shutil.copytree(run.state / "deltas", tmp_path / "other" / "deltas", dirs_exist_ok=True)
    subscriber.next(0.5)
    assert served(subscriber) == run.truths[3, 5]
    assert not subscriber.failures


def test_what_cannot_be_applied_is_named_and_ends_the_chain(tmp_path: Path) -> None:
    run = run_of(tmp_path / "state")
    third = run.deltas[2].header.rank
    flip_bit(run.state / "deltas" / payload_name(third), -1)
    done = compact(run.state, tmp_path / "served", build_graph)
    assert served(Scorer(done.path)) == run.truths[3, 2]
    damaged, gap = done.left_out
    assert third.name in damaged
    assert run.deltas[3].header.rank.name in gap
    assert "does not follow" in gap


def test_nothing_is_compacted_without_a_published_snapshot_or_its_signature(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "trainer")
    with pytest.raises(SnapshotError, match="nothing was published there"):
        compact(tmp_path, tmp_path / "served", build_graph)
    state = run_of(tmp_path / "state").state
    refused = command("compact", "--state", state, "--out", tmp_path / "x", "--public-key", public)
    assert refused.exit_code == 6
    assert "is not signed" in refused.output
    signed = DeltaRun(tmp_path / "signed", sign=SigningKey(private).sign)
    signed.learn()
    signed.snapshot()
    signed.learn()
    signed.delta()
    arguments = ["--state", signed.state, "--out", tmp_path / "served", "--public-key", public]
    done = command("compact", *arguments, "--signing-key", private)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'served'}\n"
    assert "with 1 deltas, to 00000003-00000001" in done.output
    again = command("export", tmp_path / "served", tmp_path / "again", "--public-key", public)
    assert again.exit_code == 0, again.output
    there = command("compact", *arguments)
    assert there.exit_code == 6
    assert "exists already" in there.output


def test_nothing_that_only_learning_reads_is_in_a_compacted_snapshot(tmp_path: Path) -> None:
    run = run_of(tmp_path / "state")
    done = compact(run.state, tmp_path / "served", build_graph)
    manifest, tensors = snapshot.load(done.path, any_name=True)
    assert set(manifest.files) == {"model.safetensors", "model.onnx", "ftrl.model.safetensors"}
    width = LEARNER.embedding_dim + 1
    assert tensors["model"]["table"][:, :width].any()
    assert not tensors["model"]["table"][:, width:].any()
    assert tensors["model"]["intercept"][0]
    assert not tensors["model"]["intercept"][1]
    assert set(tensors["ftrl.model"]) == {"rows", "values", "intercept"}


def test_a_compacted_snapshot_is_shown_and_exported_like_any_other(tmp_path: Path) -> None:
    run = run_of(tmp_path / "state")
    done = compact(run.state, tmp_path / "served", build_graph)
    shown = command("snapshots", "verify", done.path)
    assert shown.exit_code == 0, shown.output
    assert command("export", done.path, tmp_path / "again", "--model", "ftrl").exit_code == 0
    expected = served(Scorer(done.path, model="ftrl"))
    assert served(Scorer(tmp_path / "again", model="ftrl")) == expected
    assert json.loads((done.path / "manifest.json").read_text())["delta"]["rank"]["sequence"] == 4


@pytest.mark.slow
def test_a_run_and_its_subscribers_agree_in_every_bit_and_none_resumes_from_what_only_serves(
    tmp_path: Path,
) -> None:
    log, state = write_log(tmp_path), tmp_path / "state"
    arguments = ["--source", log, *TINY, "-X", "baseline.enabled=false"]
    deltas = ["-X", "snapshots.delta_every=100ms"]
    succeed("run", *arguments, "--state", state, *deltas)
    newest = snapshot.read_manifest(state / "snapshots" / snapshot_names(state)[-1])
    ranks = {entry.rank for entry in DeltaStore(state).index.deltas}  # type: ignore[union-attr]
    assert newest.delta
    assert newest.delta.rank in ranks
    # A server that has only an earlier snapshot comes to the last one by deltas.
    bases = [
        name
        for name in snapshot_names(state)
        if (position := snapshot.read_manifest(state / "snapshots" / name).delta)
        and structs.replace(position.rank, sequence=position.rank.sequence + 1) in ranks
    ]
    assert bases
    for name in bases:
        path = state / "snapshots" / name
        write_pointer(state / "latest.json", pointer_for(path, snapshot.read_manifest(path)))
        subscriber = Subscriber(state)
        assert subscriber.next(0.0)
        subscriber.next(0.3)
        assert subscriber.deltas.rank == newest.delta.rank
        digests = subscriber.scorer.serving_sha256()
        assert digests.items() <= newest.serving_sha256.items()
        assert not subscriber.failures
    # The compacted snapshot is that of the run, but for what only learning reads.
    other = tmp_path / "other"
    done = compact(state, other / "snapshots" / bases[0], build_graph)
    assert snapshot.read_manifest(done.path).serving_sha256 == newest.serving_sha256
    shutil.copy(state / "run.json", other)
    refused = command("run", *arguments, "--state", other)
    assert refused.exit_code == 3, refused.output
    message = " ".join(refused.output.split())
    assert "holds what serving needs and no more" in message
    begun = command("run", *arguments, "--state", tmp_path / "begun", "--from", done.path)
    assert begun.exit_code != 0
    assert "--from takes the snapshot that it was made of" in " ".join(begun.output.split())


def snapshot_names(state: Path) -> list[str]:
    """Return the names of the snapshots of a state directory, oldest first."""
    return snapshot.snapshot_ids(state / "snapshots")
