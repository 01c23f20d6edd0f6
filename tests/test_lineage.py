"""A state directory has one run, from its first moment, whatever is lost or damaged in it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from support.commands import command, own_topics, succeed
from support.lineage import QUICK, reports
from support.manifests import RUN, edit_json, edit_manifest, make_newer, write_snapshot
from support.snapshots import crash_at_each_step
from support.topics import produced

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import lineage, snapshot
from stream_ctr.snapshots.contract import NewerFormat, OlderFormat
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.lineage import new_run, require_run_id, run_of
from stream_ctr.snapshots.manifest import FORMAT
from stream_ctr.snapshots.pointer import read_pointer
from stream_ctr.train.resume import require_run

OTHER = "f" * 32


# -- run.json ------------------------------------------------------------------------------------


def test_a_run_is_begun_once_and_every_directory_has_another(tmp_path: Path) -> None:
    runs = set()
    for name in ("one", "two"):
        with Lease(tmp_path / name) as first:
            pass
        (tmp_path / name).rename(tmp_path / f"{name} moved")
        with Lease(tmp_path / f"{name} moved") as second:
            assert second.run == first.run == require_run_id(first.run)
        runs.add(first.run)
    assert len(runs) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"format": 1, "run": "f"}', None])
def test_a_run_that_is_lost_or_damaged_is_that_of_the_newest_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    write_snapshot(tmp_path / "snapshots", sequence=1, run=OTHER)
    write_snapshot(tmp_path / "snapshots", sequence=2)
    unreadable = write_snapshot(tmp_path / "snapshots", sequence=3, run=OTHER)
    (unreadable / "manifest.json").write_text("{}")
    if damage is not None:
        (tmp_path / "run.json").write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert run_of(tmp_path) == RUN
    assert (f"its snapshots are of run {RUN}, which goes on" in caplog.text) is (damage is not None)
    caplog.clear()
    assert run_of(tmp_path) == RUN
    assert not caplog.records


def test_a_run_that_is_lost_with_its_snapshots_is_an_error_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    run_file = tmp_path / "run.json"
    run_file.write_text("{")
    with pytest.raises(SnapshotError, match=r"run\.json is damaged: .*begin anew with another"):
        run_of(tmp_path)
    assert run_file.read_text() == "{"
    run_file.unlink()
    (write_snapshot(tmp_path / "snapshots") / "manifest.json").write_text("{}")
    with pytest.raises(SnapshotError, match=r"manifest\.json is damaged"):
        run_of(tmp_path)
    assert not run_file.exists()


def test_a_run_of_a_newer_version_is_not_replaced(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "snapshots")
    assert run_of(tmp_path) == RUN
    make_newer(tmp_path / "run.json")
    with pytest.raises(NewerFormat, match=rf"run\.json has format {lineage.FORMAT + 1}"):
        run_of(tmp_path)
    (tmp_path / "run.json").unlink()
    make_newer(path / "manifest.json")
    with pytest.raises(NewerFormat):
        run_of(tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_the_state_of_an_older_version_says_what_it_is(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "snapshots")
    edit_manifest(path, lambda manifest: [manifest.pop("run"), manifest.update(format=FORMAT - 1)])
    with pytest.raises(OlderFormat, match="which an earlier version of stream-ctr wrote"):
        run_of(tmp_path)
    log = tmp_path / "log.jsonl"
    Simulation(10, seed=0).write_jsonl(log)
    result = command("run", "--source", log, "--state", tmp_path)
    assert result.exit_code == 6
    assert f"has format {FORMAT - 1}, which an earlier version" in " ".join(result.output.split())
    assert not (tmp_path / "run.json").exists()


def test_a_crash_at_any_step_of_the_beginning_leaves_no_run_or_a_whole_one(tmp_path: Path) -> None:
    def begin() -> None:
        run_of(tmp_path)

    def inspect() -> None:
        if (tmp_path / "run.json").exists():
            require_run_id(run_of(tmp_path))
            (tmp_path / "run.json").unlink()

    assert crash_at_each_step(begin, inspect) == 4
    assert not (tmp_path / "run.json").exists() or run_of(tmp_path)


def test_snapshots_of_two_runs_in_one_directory_are_an_error(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, run=OTHER)
    manifest = snapshot.read_manifest(path)
    require_run(manifest, OTHER, path)
    with pytest.raises(ConfigError, match=f"is of run {OTHER}, and the state directory is that of"):
        require_run(manifest, RUN, path)


def test_ids_of_runs_are_random_and_have_one_form() -> None:
    assert len({new_run() for _ in range(100)}) == 100
    for text in ("", "f" * 31, "F" * 32, "f" * 32 + "\n", "g" * 32):
        with pytest.raises(ValueError, match="is not the id of a run"):
            require_run_id(text)


# -- runs ----------------------------------------------------------------------------------------


def test_everything_that_a_run_writes_has_its_id_and_a_mixed_directory_is_not_resumed(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log.jsonl"
    state = tmp_path / "state"
    Simulation(2000, seed=0).write_jsonl(log)
    arguments = ["run", "--source", log, "--state", state, *QUICK, "-X", "metrics.window=60s"]
    succeed(*arguments, "-X", "schedule.report_every=1ms")
    run = json.loads((state / "run.json").read_text())["run"]
    written = reports(state)
    assert {report["kind"] for report in written} >= {"window", "final"}
    assert {report["run"] for report in written} == {run}
    pointer = read_pointer(state / "latest.json")
    assert pointer
    assert pointer.run == snapshot.read_manifest(Path(pointer.path)).run == run
    edit_json(state / "run.json", lambda document: document.update(run=OTHER))
    result = command(*arguments)
    assert result.exit_code == 3
    assert f"is of run {run}, and the state directory is that of run {OTHER}" in result.output


@pytest.mark.slow
def test_a_second_run_on_a_topic_is_refused_until_it_is_told_to_replace_the_first(
    embedded_broker: str, topic: str, tmp_path: Path
) -> None:
    produced(embedded_broker, topic, slice(0, 2000))
    there = ["--bootstrap-servers", embedded_broker]
    snapshots = f"{topic}.snapshots"

    def run(state: str, *options: str) -> tuple[int, str]:
        arguments = ["run", "--topic", topic, *there, "--until-end", "--state", tmp_path / state]
        result = command(*arguments, *QUICK, *own_topics(topic), *options)
        return result.exit_code, " ".join(result.output.split())

    def served(*options: str) -> str:
        arguments = ["subscribe", "--topic", snapshots, *there, "--once", "--timeout", "5"]
        result = command(*arguments, "--json", *options)
        if result.exit_code == 6:
            return " ".join(result.output.split())
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["run"])

    assert run("first")[0] == 0
    first = run_of(tmp_path / "first")
    code, message = run("second")
    assert code == 3
    assert f"is run {first}, whose newest snapshot is 0000" in message
    assert f"--replace-run {first}" in message
    assert "-X snapshots.model_name=NAME" in message
    assert not (tmp_path / "second").exists()
    kept = str(tmp_path / "served.run")
    assert served("--run-file", kept) == served() == first

    assert run("second", "--replace-run", first)[0] == 0
    second = run_of(tmp_path / "second")
    assert served() == served("--run", second) == second
    refused = served("--run-file", kept, "--run", first)
    assert refused == first or f"is of run {second}, which replaces run {first}" in refused
    assert served("--run-file", kept, "--follow", "replace") == second
    assert Path(kept).read_text() == f"{second}\n"
    code, message = run("first", "--replace-run", second)
    assert code == 3
    assert f"this run, {first}, is not model 'default' on topic '{snapshots}' any more" in message
    assert run("first", "-X", "snapshots.model_name=other")[0] == 0
    assert served("--model-name", "other") == first


def test_replace_run_takes_the_id_of_a_run_and_no_log(tmp_path: Path) -> None:
    result = command("run", "--replace-run", "x", "--state", tmp_path / "state")
    assert result.exit_code == 2
    assert "'x' is not the id of a run" in result.output
    result = command("run", "--source", "x", "--replace-run", RUN, "--state", tmp_path / "state")
    assert result.exit_code == 2
    assert "--replace-run is for the snapshot topic" in result.output
    assert not (tmp_path / "state").exists()
