"""A process that torchrun has started, and what it shows of errors that all have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import command
from support.rank_runs import launched_as

from stream_ctr.cli import launched
from stream_ctr.distributed import ranks


def test_the_variable_of_torchrun_is_the_one_that_the_ranks_look_at() -> None:
    assert launched.LAUNCHED == ranks.LAUNCHED


def test_the_cores_of_a_machine_are_shared_whatever_torchrun_says_to_openmp() -> None:
    environ = {**launched_as(3, 4, "1", hosts=2), "OMP_NUM_THREADS": "1"}
    assert launched.threads_of_a_rank(16, environ) == 8
    assert launched.threads_of_a_rank(1, environ) == 1
    assert launched.threads_of_a_rank(6, {"OMP_NUM_THREADS": "1"}) == 6


@pytest.mark.parametrize(
    ("address", "hosts", "private"),
    [
        ("localhost", 1, True),
        ("127.0.0.1", 2, True),
        ("trainer-0.trainers", 1, True),  # one host: its name, and no network
        ("trainer-0.trainers", 2, False),
        ("10.0.0.1", 2, False),
    ],
)
def test_ranks_on_one_host_meet_there(address: str, hosts: int, private: bool) -> None:
    environ = {**launched_as(0, 2, "1", hosts=hosts), "MASTER_ADDR": address}
    assert launched.private(environ) is private


def test_one_rank_of_each_host_shows_what_all_have() -> None:
    speakers = [launched.speaks(launched_as(rank, 4, "1", hosts=2)) for rank in range(4)]
    assert speakers == [True, False, True, False]


def _run_as(
    rank: int, monkeypatch: pytest.MonkeyPatch, error_file: Path, *arguments: str
) -> tuple[int, str]:
    for name, value in launched_as(rank, 2, "1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    result = command(*arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize("arguments", [("replay", "log.jsonl"), ("config",), ("demo",)])
def test_commands_that_share_no_work_are_refused(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exit_code, said = _run_as(0, monkeypatch, tmp_path / "error.json", *arguments)
    assert exit_code == 2
    assert f"2 processes of `stream-ctr {arguments[0]}`, and only `run` shares its work" in said
    shown = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "start it without torchrun" in shown["message"]
    assert int(shown["extraInfo"]["timestamp"]) > 0


def test_the_other_ranks_of_a_host_end_in_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for arguments in (("replay", "log.jsonl"), ("run", "--no-such-option")):
        assert _run_as(1, monkeypatch, tmp_path / "error.json", *arguments) == (2, "")
    assert not (tmp_path / "error.json").exists()


def test_a_process_that_torchrun_did_not_start_writes_no_error_file(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    launched.record_error("no", {"TORCHELASTIC_ERROR_FILE": str(path)})
    assert not path.exists()
