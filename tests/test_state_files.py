"""In a directory that others may write to, a run changes nothing but what is in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import command, succeed
from support.lineage import QUICK, newest
from support.reliability import Outcome

from stream_ctr import state_files
from stream_ctr.logs.simulate import Simulation

PROMISE = "a run changes nothing outside its state directory"
FILES = ("lock", "latest.lock", "reports.jsonl", "dead_letters.jsonl")
REPLACED = ("latest.json", "run.json", "tmp-latest.json", "tmp-run.json")
FOLDERS = ("snapshots", "deltas", "spill")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    Simulation(600, seed=0).write_jsonl(path)
    with path.open("a") as file:
        file.write("junk\n")
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that looks like what a run removes, and a file that looks like what it writes."""
    for name in ("tmp-1-x", "run-x"):
        (tmp_path / "outside" / name).mkdir(parents=True)
    (tmp_path / "outside" / "file").write_text("mine\n")
    return tmp_path / "outside"


def assert_untouched(outside: Path) -> None:
    found = {str(path.relative_to(outside)) for path in outside.rglob("*")}
    assert found == {"tmp-1-x", "run-x", "file"}
    assert (outside / "file").read_text() == "mine\n"


@pytest.mark.security(PROMISE, how="a symbolic link in place of each file that it writes to")
@pytest.mark.parametrize("name", FILES)
def test_a_link_to_a_file_outside_is_refused(
    log: Path, state: Path, outside: Path, name: str, outcome: Outcome
) -> None:
    (state / name).symlink_to(outside / "file")
    result = command("run", "--source", log, "--state", state, *QUICK)
    assert result.exit_code == 3, result.output
    message = " ".join(result.output.split())
    assert str(state / name) in message
    assert "it is a symbolic link, which a run does not follow" in message
    assert_untouched(outside)
    outcome("exit 3, the message names the link; the file that it leads to is as it was")


@pytest.mark.security(PROMISE, how="a symbolic link in place of each folder that it removes from")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_to_a_folder_outside_is_refused(
    log: Path, state: Path, outside: Path, name: str, outcome: Outcome
) -> None:
    (state / name).symlink_to(outside)
    result = command("run", "--source", log, "--state", state, *QUICK)
    assert result.exit_code == 3, result.output
    assert f"{state / name}: it is a symbolic link" in " ".join(result.output.split())
    assert_untouched(outside)
    outcome("exit 3, the message names the link; nothing is removed where it leads to")


@pytest.mark.security(PROMISE, how="a symbolic link in place of each file that it replaces")
def test_a_link_in_place_of_a_file_that_is_replaced_is_replaced(
    log: Path, state: Path, outside: Path, outcome: Outcome
) -> None:
    for name in REPLACED:
        (state / name).symlink_to(outside / "file")
    (state / "run.json").unlink()  # one that is no run's ends a start
    (state / "latest.json").unlink()
    (state / "latest.json").symlink_to(outside / "missing")
    succeed("run", "--source", log, "--state", state, *QUICK)
    assert_untouched(outside)
    assert not any((state / name).is_symlink() for name in REPLACED)
    assert newest(state)
    outcome("the link is replaced, and the file that it leads to is as it was")


@pytest.mark.security(PROMISE, how="a pipe without a reader in place of each file")
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_refused_and_not_waited_for(
    log: Path, state: Path, name: str, outcome: Outcome
) -> None:
    os.mkfifo(state / name)
    result = command("run", "--source", log, "--state", state, *QUICK)
    assert result.exit_code == 3, result.output
    message = " ".join(result.output.split())
    assert str(state / name) in message
    outcome("exit 3 at once, the message names it")


# -- one function after the other ----------------------------------------------------------------


def test_a_link_is_removed_and_not_what_it_leads_to(state: Path, outside: Path) -> None:
    (state / "tmp-link").symlink_to(outside)
    (state / "tmp-dangling").symlink_to(outside / "missing")
    (state / "tmp-file").touch()
    (state / "tmp-folder" / "below").mkdir(parents=True)
    (state / "tmp-folder" / "link").symlink_to(outside)
    (state / "other").mkdir()
    names = ["tmp-dangling", "tmp-file", "tmp-folder", "tmp-link"]
    assert state_files.remove_all(state, "tmp-") == names
    assert [path.name for path in state.iterdir()] == ["other"]
    assert_untouched(outside)
    assert state_files.remove_all(state / "missing", "tmp-") == []
    (state / "spill").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        state_files.remove_all(state / "spill", "tmp-")
    assert_untouched(outside)


@pytest.mark.parametrize(
    "meanwhile",
    [
        pytest.param(lambda path: path.rename(path.with_name("done")), id="it is finished"),
        pytest.param(shutil.rmtree, id="it is removed"),
    ],
)
def test_what_another_process_removes_meanwhile_is_no_error(
    state: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Path], object]
) -> None:
    def rename(source: str, target: str, **folders: int) -> None:
        monkeypatch.undo()
        meanwhile(state / source)
        os.rename(source, target, **folders)

    for name in ("tmp-1", "tmp-2"):
        (state / name).mkdir()
    monkeypatch.setattr(os, "rename", rename)
    state_files.remove_all(state, "tmp-")
    assert not list(state.glob("tmp-*"))


def test_a_process_that_still_writes_into_a_removed_folder_gets_an_error(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rmtree(*arguments: object, **options: object) -> None:
        monkeypatch.undo()
        with pytest.raises(FileNotFoundError):
            (state / "tmp-1" / "late").touch()
        shutil.rmtree(*arguments, **options)  # type: ignore[arg-type]

    (state / "tmp-1").mkdir()
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    state_files.remove_all(state, "tmp-")
    assert not list(state.iterdir())


def test_a_file_is_created_in_place_of_a_link(state: Path, outside: Path) -> None:
    (state / "new").symlink_to(outside / "file")
    with open(state_files.create_file(state / "new"), "w") as file:
        file.write("new")
    assert (state / "new").read_text() == "new"
    assert_untouched(outside)
