"""`stream-ctr run --from`: where a new state begins, and what its second start does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import Result
from support.commands import command, succeed
from support.keys import write_keys
from support.lineage import QUICK, SMALL, fingerprint

from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest, Origin
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.train.trainer import Trainer

IMPRESSIONS = 2000
NEW = ["-X", "learn.batch_size=64", "-X", "join.label_window=30s", "-X", "model.table_bits=15"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    Simulation(IMPRESSIONS, seed=3).write_jsonl(path)
    return path


@pytest.fixture(scope="module")
def old(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of a finished run of DeepFM."""
    state = tmp_path_factory.mktemp("old") / "state"
    succeed("run", "--source", log, "--state", state, "--model", "deepfm", *QUICK)
    return state


def begin(log: Path, state: Path, origin: Path, *options: object) -> Result:
    return command("run", "--source", log, "--state", state, "--from", origin, *options)


def newest(state: Path) -> Path:
    found = snapshot.newest(state / "snapshots")
    assert found
    return found


def manifest(state: Path) -> Manifest:
    return snapshot.verify(newest(state))


def test_a_run_begins_with_a_snapshot_and_says_what_was_carried_over(
    log: Path, old: Path, tmp_path: Path
) -> None:
    result = begin(log, tmp_path / "new", old, *NEW)
    assert result.exit_code == 0, result.output
    name = newest(old).name
    for line in (
        "configuration: model.table_bits was 14 and is 15",
        "configuration: learn.batch_size was 128 and is 64",
        "fields: 14 of 14 carry over",
        "deepfm: the table carries over from 2^14 rows to 2^15: each row stands at all new rows "
        "with its low bits",
    ):
        assert f"from {name}: {line}\n" in result.output
    made = manifest(tmp_path / "new")
    assert isinstance(made.origin, Origin)
    assert (made.origin.snapshot, made.origin.examples) == (name, manifest(old).examples)
    assert made.examples == IMPRESSIONS
    assert made.schema.bucket_edges == manifest(old).schema.bucket_edges
    assert manifest(old).origin is msgspec.UNSET


def test_the_same_command_resumes_quietly_and_another_origin_is_refused(
    log: Path, old: Path, tmp_path: Path
) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(old, origin)
    state = tmp_path / "state"
    by_name = newest(origin)
    assert begin(log, state, by_name).exit_code == 0
    began = manifest(state).origin
    assert isinstance(began, Origin)
    for same in (by_name, origin, origin / "snapshots", newest(old)):  # the last one by its bytes
        again = begin(log, state, same)
        assert again.exit_code == 0, again.output
        assert "resumed from snapshot" in again.output
        assert "from 0" not in again.output
        assert manifest(state).origin == began
    other = tmp_path / "other"
    succeed("run", "--source", log, "--state", other, *QUICK, "-X", "learn.seed=1")
    refused = begin(log, state, other)
    assert refused.exit_code == 3
    assert f"began with snapshot {by_name.name} of 2,000 examples, not with" in refused.output
    shutil.rmtree(origin)
    assert begin(log, state, by_name).exit_code == 0
    assert begin(log, state, origin).exit_code == 0
    resumed = command("run", "--source", log, "--state", state)
    assert resumed.exit_code == 0, resumed.output
    assert manifest(state).origin == began
    unrelated = begin(log, other, old)
    assert unrelated.exit_code == 3
    assert "has snapshots of a run that began without --from" in unrelated.output


def test_a_crash_before_the_first_snapshot_changes_nothing(
    log: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    crashed, straight = tmp_path / "crashed", tmp_path / "straight"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "cut", crash)
        assert begin(log, crashed, old, *NEW).exit_code != 0
    assert not snapshot.snapshot_ids(crashed / "snapshots")
    for state in (crashed, straight):
        result = begin(log, state, old, *NEW)
        assert result.exit_code == 0, result.output
    assert fingerprint(newest(crashed)) == fingerprint(newest(straight))


def test_a_run_that_goes_on_learning_keeps_its_origin(
    log: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_drain", crash)
        often = ("-X", "schedule.snapshot_examples=500")
        assert begin(log, tmp_path / "new", old, *often).exit_code != 0
    first = manifest(tmp_path / "new")
    assert begin(log, tmp_path / "new", old).exit_code == 0
    last = manifest(tmp_path / "new")
    assert last.sequence > first.sequence
    assert last.origin == first.origin != msgspec.UNSET


def test_only_new_fields_are_fitted_to_the_first_records(
    log: Path, old: Path, tmp_path: Path
) -> None:
    config = manifest(old).config
    numeric = config["features"]["numeric"]
    categorical = [name for name in config["features"]["categorical"] if name != "user_id"]
    richer = tmp_path / "richer.jsonl"
    rng = np.random.default_rng(0)
    with richer.open("w") as out:
        for line in log.read_text().splitlines():
            event = json.loads(line)
            if "features" in event:
                event["features"]["share"] = rng.random()
                event["features"]["rating"] = 1000 * rng.random()
            out.write(json.dumps(event) + "\n")
    fields = [
        *("-X", f"features.numeric={','.join([*numeric, 'share'])}"),
        *("-X", f"features.categorical={','.join(categorical)}"),
    ]
    result = begin(richer, tmp_path / "new", old, *fields)
    assert result.exit_code == 0, result.output
    assert "note: buckets fitted to the numbers of share\n" in result.output
    assert "fields: 13 of 14 carry over" in result.output
    assert "fields: new, they begin as in a fresh table: share" in result.output
    assert "fields: gone, nothing reads their weights: user_id" in result.output
    before, after = (manifest(state).schema.bucket_edges for state in (old, tmp_path / "new"))
    assert before["rating"] == after["rating"]
    assert {*after} == {*before, "share"}
    again = begin(richer, tmp_path / "new", old, *fields)
    assert again.exit_code == 0, again.output
    assert Scorer(newest(tmp_path / "new")).predict([{"share": 0.5}]).shape == (1,)


def test_pairs_of_fields_keep_their_numbers_when_the_run_resumes(log: Path, tmp_path: Path) -> None:
    old, state = tmp_path / "old", tmp_path / "new"
    features = ["-X", "features.categorical=app_id,hour,category", "-X", "features.numeric=rating"]
    succeed("run", "--source", log, "--state", old, *QUICK, *features)
    fewer = ["-X", "features.categorical=category,os,app_id", "-X", "features.numeric="]
    first = begin(log, state, old, *fewer)
    assert first.exit_code == 0, first.output
    assert "ftrl_pairs: 3 of 6 fields and pairs carry over" in first.output
    pairs = manifest(state).beside["ftrl_pairs"].pairs
    assert pairs
    assert pairs.numbers == (2, 4, 0)
    assert begin(log, state, old, *fewer).exit_code == 0
    assert manifest(state).beside["ftrl_pairs"].pairs == pairs


@pytest.mark.parametrize("kind", ["absent", "empty", "damaged"])
def test_without_a_valid_snapshot_nothing_begins(
    log: Path, old: Path, tmp_path: Path, kind: str
) -> None:
    origin = tmp_path / "origin"
    if kind == "empty":
        origin.mkdir()
    elif kind == "damaged":
        shutil.copytree(newest(old), origin)
        data = bytearray((origin / "model.safetensors").read_bytes())
        data[-9] ^= 1
        (origin / "model.safetensors").write_bytes(data)
    result = begin(log, tmp_path / "state", origin)
    assert result.exit_code == 6
    expected = "has SHA-256" if kind == "damaged" else f"there is no snapshot in {origin}"
    assert expected in result.output
    assert not (tmp_path / "state").exists()


def test_nothing_begins_with_what_was_exported_for_serving(
    log: Path, old: Path, tmp_path: Path
) -> None:
    succeed("export", old, tmp_path / "served")
    result = begin(log, tmp_path / "new", tmp_path / "served")
    assert result.exit_code == 6
    assert "served was exported for serving and has no optimizer" in result.output


def test_the_signature_is_verified_first(log: Path, old: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path, "own")
    other, _ = write_keys(tmp_path, "other")
    signed = tmp_path / "signed"
    key = ["-X", f"snapshots.signing_key={private}"]
    model = ["--model", "lr", *SMALL, "-X", "baseline.enabled=false"]
    succeed("run", "--source", log, "--state", signed, *model, *key)
    assert "is not signed" in begin(log, tmp_path / "a", newest(old), *key).output
    wrong = begin(log, tmp_path / "b", signed, "-X", f"snapshots.signing_key={other}")
    assert wrong.exit_code == 6
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    assert begin(log, tmp_path / "c", signed, *key).exit_code == 0
