"""Snapshots on disk are listed with their verdicts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.commands import succeed
from support.finished_runs import finished_run, write_log
from support.manifests import edit_manifest

from stream_ctr.monitor.snapshot_list import SnapshotList, Snapshots
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import read_pointer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return finished_run(write_log(folder), folder / "state")


@pytest.fixture
def state(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "state"))


def listed(state: Path) -> Snapshots:
    return SnapshotList(state).read()


def test_every_snapshot_is_listed_with_what_its_manifest_says(state: Path) -> None:
    names = snapshot.snapshot_ids(state / "snapshots")
    found = listed(state).listed
    assert [each.name for each in found] == names
    for each in found:
        manifest = snapshot.read_manifest(state / "snapshots" / each.name)
        assert (each.sequence, each.examples) == (manifest.sequence, manifest.examples)
        assert each.event_time is not None
        assert each.event_time[:19].replace("-", "").replace(":", "") in each.name


def test_only_the_published_one_is_loaded(state: Path) -> None:
    pointer = read_pointer(state / "latest.json")
    assert pointer
    found = listed(state)
    assert [each.name for each in found.listed if each.loaded] == [pointer.snapshot]
    assert {each.verdict for each in found.listed} == {"published"}
    assert found.pointer == pointer


def test_a_rollback_is_seen(state: Path) -> None:
    followed = SnapshotList(state, clock=iter(range(100)).__next__)
    oldest = followed.read().listed[0].name
    succeed("snapshots", "rollback", state, oldest)
    assert [each.name for each in followed.read().listed if each.loaded] == [oldest]
    assert {each.verdict for each in followed.read().listed} == {"published"}


def test_a_refused_snapshot_has_its_reasons(state: Path) -> None:
    newest = snapshot.snapshot_ids(state / "snapshots")[-1]

    def refuse(manifest: dict[str, object]) -> None:
        manifest["gate"] = {**manifest["gate"], "refused": ["worse\x1b[2J"]}  # type: ignore[dict-item]

    edit_manifest(state / "snapshots" / newest, refuse)
    found = listed(state).listed[-1]
    assert (found.verdict, found.reasons) == ("refused", ("worse\\x1b[2J",))


def test_a_snapshot_after_the_published_one_is_kept(state: Path) -> None:
    (state / "latest.json").unlink()
    found = listed(state)
    assert found.pointer is None
    assert {each.verdict for each in found.listed} == {"kept"}
    assert found.listed[0].reasons == ("it is written, and not published yet",)


def test_a_snapshot_that_was_removed_is_remembered(state: Path) -> None:
    followed = SnapshotList(state, clock=iter(range(100)).__next__)
    names = [each.name for each in followed.read().listed]
    shutil.rmtree(state / "snapshots" / names[0])
    found = followed.read().listed
    assert [each.name for each in found] == names
    assert [each.on_disk for each in found] == [False, *[True] * (len(names) - 1)]


def test_the_disk_is_looked_at_once_a_second_at_most(state: Path) -> None:
    now = 0.0
    followed = SnapshotList(state, clock=lambda: now)
    before = followed.read()
    (state / "latest.json").unlink()
    now = 0.9
    assert followed.read() is before
    now = 1.0
    assert followed.read().pointer is None


def test_nothing_that_is_damaged_ends_the_list(state: Path) -> None:
    names = snapshot.snapshot_ids(state / "snapshots")
    (state / "snapshots" / names[0] / "manifest.json").write_bytes(b"junk")
    (state / "latest.json").write_bytes(b"junk")
    found = listed(state)
    assert [each.name for each in found.listed] == names[1:]
    assert found.pointer is None


def test_a_missing_directory_has_no_snapshot(tmp_path: Path) -> None:
    assert listed(tmp_path / "none") == Snapshots()
