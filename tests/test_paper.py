"""Tests of the command `stream-ctr paper`: what it writes, resuming, and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import forks
from support.long import only_long
from support.paper_data import write_criteo_log
from support.patience import PATIENCE_SECONDS, started
from support.sample_logs import shared_data

from stream_ctr.cli.main import main
from stream_ctr.models import MODELS
from stream_ctr.paper import work

SMALL_OPTIONS = (
    "-X",
    "model.table_bits=12",
    "-X",
    "model.embedding_dim=4",
    "-X",
    "model.hidden=8,8",
)
TINY = ("--simulate", 1000, "--seeds", 1, "--epochs", 1)
TABLE2 = (*TINY, "--only", "table2")
THREE = ("--model", "lr", "--model", "fm", "--model", "deepfm")
TIMES = (
    "seconds",
    "seconds_pretraining",
    "seconds_per_epoch",
    "examples_per_second",
    "seconds_whole",
)


def paper(*arguments: object) -> Result:
    """Run the command in this process."""
    command = ["paper", "--device", "cpu", *SMALL_OPTIONS, *map(str, arguments)]
    return CliRunner().invoke(main, command)


def load_report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def comparable(out: Path) -> dict[str, Any]:
    """Return the report without times, and without the command and its directory."""
    removed = {*TIMES, "made", "figure6", "figure6_seconds"}

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if k not in removed}
        return [without_times(v) for v in value] if isinstance(value, list) else value

    report: dict[str, Any] = without_times(load_report(out))
    return report


def modified(paths: Sequence[Path]) -> Mapping[Path, int]:
    return {path: path.stat().st_mtime_ns for path in paths}


# -- the report ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_has_nine_systems(tmp_path: Path) -> None:
    result = paper(*TABLE2, "--seeds", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = load_report(tmp_path)
    table2 = report["table2"]
    assert list(table2) == [system.title for system in MODELS.values()]
    outcomes = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    for name, system in MODELS.items():
        auc = [outcome["auc"] for outcome in outcomes if outcome["system"] == name]
        assert len(auc) == 2
        assert table2[system.title]["auc"] == pytest.approx(sum(auc) / 2)
        assert table2[system.title]["auc_std"] == pytest.approx(abs(auc[0] - auc[1]) / 2**0.5)
    for outcome in outcomes:
        assert outcome["machine"]["cores"] == os.cpu_count()
        assert outcome["torch"]
        assert outcome["version"]
    assert report["data"]["best_possible_logloss"] is not None
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_the_criteo_sample_in_quick_has_every_part(tmp_path: Path) -> None:
    log = shared_data("criteo/train.csv")
    quick = ("--quick", "--seeds", 1, "--study-seeds", 1, "--epochs", 1, "--out", tmp_path)
    for chosen in (("--only", "table2"), ("--model", "lr", "--model", "deepfm")):
        result = paper("--data", log, "--format", "criteo", *quick, *chosen)
        assert result.exit_code == 0, result.output
    report = load_report(tmp_path)
    assert set(report["table2"]) == {system.title for system in MODELS.values()}
    assert min(row["auc"] for row in report["table2"].values()) > 0.6
    assert "7,200 rows" in report["data"]["whole"]
    figures = [f"figure{number}" for number in range(6, 12)]
    assert all(report[part] for part in (*figures, "streaming"))
    assert not report["failed"]


# -- without matplotlib --------------------------------------------------------------------------

WITHOUT_MATPLOTLIB = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from stream_ctr.cli.main import main
"""


def run_without_matplotlib(statement: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a statement after `main` is imported, in a process that cannot import matplotlib."""
    command = [sys.executable, "-c", WITHOUT_MATPLOTLIB + statement, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


@pytest.mark.slow
def test_without_matplotlib_paper_fails_before_any_work_and_other_commands_work(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    done = run_without_matplotlib(
        """
from click.testing import CliRunner
helps = [[name, "--help"] for name in main.commands]
for arguments in (["--help"], *helps, ["models"], ["config"]):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (arguments, result.output)
assert "DeepFM" in CliRunner().invoke(main, ["models"]).output
main()
""",
        *("paper", "--device", "cpu", "--simulate", "1000", "--out", str(out)),
    )
    assert done.returncode == 3, done.stderr
    message = "stream-ctr paper draws figures with matplotlib: pip install 'stream-ctr[paper]'"
    assert done.stderr == f"error: {message}\n"
    assert not out.exists()


# -- resuming ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_command_repeats_nothing_and_restart_repeats_all(tmp_path: Path) -> None:
    arguments = (*TABLE2, *THREE, "--out", tmp_path)
    assert paper(*arguments).exit_code == 0
    before = modified([*(tmp_path / "runs").iterdir()])
    assert "3 runs, 3 of them done before" in paper(*arguments).output
    assert modified([*(tmp_path / "runs").iterdir()]) == before
    (tmp_path / "mine.txt").touch()
    assert "3 runs\n" in paper(*arguments, "--restart").output
    assert (tmp_path / "mine.txt").exists()
    assert not any(path.stat().st_mtime_ns == then for path, then in before.items())


@pytest.mark.slow
def test_a_command_for_one_part_adds_to_the_report(tmp_path: Path) -> None:
    assert paper(*TABLE2, *THREE, "--out", tmp_path).exit_code == 0
    first = load_report(tmp_path)
    streaming = ("--only", "streaming", "--model", "lr", "--model", "deepfm")
    assert "2 runs\n" in paper(*TINY, "--out", tmp_path, *streaming).output
    both = load_report(tmp_path)
    assert both["table2"] == first["table2"]
    scored = {title for title, row in both["streaming"].items() if row["auc"] is not None}
    assert scored == {"LR", "DeepFM"}


@pytest.mark.parametrize("kind", ["json", "npy"])
def test_a_damaged_outcome_is_named_and_repeated_once_deleted(kind: str, tmp_path: Path) -> None:
    arguments = (*TABLE2, "--out", tmp_path, "--model", "lr", "--model", "fm")
    paper(*arguments)
    first = comparable(tmp_path)
    (damaged,) = (tmp_path / "runs").glob(f"fm-*.{kind}")
    damaged.write_bytes(damaged.read_bytes()[:200])
    result = paper(*arguments)
    assert result.exit_code == 5
    assert f"{damaged} is damaged; delete " in result.output
    damaged.with_suffix(".json").unlink()
    assert "2 runs, 1 of them done before" in paper(*arguments).output
    assert comparable(tmp_path) == first


def begin(out: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    options = ("--device", "cpu", *SMALL_OPTIONS, "--out", out, *arguments)
    pipe = subprocess.PIPE
    return started(forks.start("paper", *options, stderr=pipe, stdout=pipe, text=True))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Eight runs.
WORK: tuple[object, ...] = (
    *(*THREE, "--model", "fnn", "--only", "table2,streaming"),
    *("--simulate", 2000, "--seeds", 1, "--epochs", 2),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert paper("--out", out, *WORK).exit_code == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("outcomes", [2, *only_long([0, 6])])
def test_a_killed_command_resumes_and_reports_what_an_undisturbed_one_does(
    outcomes: int, tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "out"
    process = begin(out, *WORK)
    runs = out / "runs"
    wait_for(lambda: out.exists() and len(list(runs.glob("*.json"))) >= outcomes, process)
    process.kill()
    process.communicate()
    done = modified([*runs.glob("*.json")])
    assert len(done) < 8

    assert paper("--out", out, *WORK).exit_code == 0

    assert modified([*done]) == done
    assert comparable(out) == comparable(undisturbed)


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = begin(tmp_path, *WORK, "--seeds", 50)  # too many to be done before the signal
    wait_for(lambda: list((tmp_path / "runs").glob("*.json")), process)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "the same command goes on" in output
    assert "Traceback" not in output
    table2 = load_report(tmp_path)["table2"]
    assert any(row["auc"] is not None for row in table2.values())
    assert {path.suffix for path in (tmp_path / "runs").iterdir()} <= {".json", ".npy"}


# -- other files and other commands --------------------------------------------------------------


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    arguments = (*TABLE2, "--out", tmp_path, "--model", "lr")
    assert paper(*arguments).exit_code == 0
    (tmp_path / "runs" / "mine.json").touch()
    (tmp_path / "figures" / "mine.svg").touch()
    assert paper(*arguments, "--restart").exit_code == 0
    assert (tmp_path / "runs" / "mine.json").exists()
    assert (tmp_path / "figures" / "mine.svg").exists()
    (tmp_path / "data" / "train.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    refused = paper(*arguments, "--restart")
    assert (refused.exit_code, sorted(tmp_path.rglob("*"))) == (5, before)
    assert "holds other files, such as train.txt" in refused.output


@pytest.mark.slow
def test_restart_removes_all_that_was_written(tmp_path: Path) -> None:
    parts = ("--only", "table2,streaming", "--model", "lr", "--model", "deepfm")
    assert paper(*TINY, *parts, "--out", tmp_path).exit_code == 0
    (tmp_path / "runs" / ".fm-0123456789abcdef.json.77").touch()  # left by a killed process
    work.remove(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("restart", [(), ("--restart",)])
def test_a_log_in_the_place_of_the_data_is_refused_before_it_is_read(
    restart: Sequence[str], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    path = write_criteo_log(tmp_path / "data" / "train.txt", 300)
    result = paper("--data", path, "--format", "criteo", "--out", tmp_path, *restart)
    assert result.exit_code == 5
    assert "holds other files, such as train.txt" in result.output
    assert path.exists()


def test_a_directory_serves_one_command_at_a_time(tmp_path: Path) -> None:
    with work.locked(tmp_path):
        result = paper("--simulate", 1000, "--out", tmp_path)
        assert result.exit_code == 5
        assert "in use by another stream-ctr paper" in result.output
    with work.locked(tmp_path):
        pass


def test_other_data_in_the_directory_is_an_error_that_names_restart(tmp_path: Path) -> None:
    work = ("--out", tmp_path, "--only", "streaming", "--model", "lr")
    assert paper("--simulate", 1000, *work).exit_code == 0
    result = paper("--simulate", 1001, *work)
    assert result.exit_code == 5
    assert "--restart" in result.output


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs", "report.html"])
def test_a_path_that_cannot_be_written_is_an_error_without_traceback(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "report.html":
        path.mkdir()
    else:
        path.touch()
    result = paper(*TABLE2, "--out", tmp_path, "--model", "lr")
    assert result.exit_code == 5
    assert f"{path}: " in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "--data LOG or --simulate N"),
        (("--simulate", 100), 5, "100 impressions are too few"),
        (("--data", "{dir}/none.tsv"), 2, "none.tsv"),
        (
            ("--data", "{dir}/log.tsv", "--format", "critoe"),
            3,
            "unknown log format 'critoe'; did you mean 'criteo'?",
        ),
        (("--simulate", 1000, "--only", "table3"), 2, "'table3' is none of table2"),
        (("--simulate", 1000, "-X", "model.hiden=3"), 3, "unknown key 'model.hiden'"),
        (("--simulate", 1000, "-X", "model.hidden="), 3, "model.hidden has no layer"),
        (
            ("--simulate", 1000, "-X", "join.max_memory=1KiB"),
            3,
            "join.max_memory = '1KiB': at least 1 MiB are needed",
        ),
        (
            ("--simulate", 1000, "--only", "figure7", "--model", "fm"),
            3,
            "nothing to do: Figures 7 to 11 are about networks",
        ),
        (
            ("--data", "{dir}/never.tsv", "--format", "criteo"),
            5,
            "no click among the 300 impressions of the log",
        ),
        (
            ("--data", "{dir}/shown.jsonl"),
            5,
            "A log of events must hold clicks as well as impressions",
        ),
        (
            ("--data", "{dir}/clicked.jsonl"),
            5,
            "nothing but clicks among the 300 impressions of the log",
        ),
        (
            ("--data", "{dir}/early.jsonl", "--split", "time"),
            5,
            "no click among the 27 impressions of the validation part",
        ),
        (("--data", "{dir}/log.tsv", "--format", "events"), 5, "record 1 is no event: "),
        (("--data", "{dir}/hours.jsonl"), 5, "300 records cannot be read as events (time_"),
        (
            ("--data", "{dir}/bare.jsonl"),
            5,
            "none of the first 300 records of the log is an impression with features\n",
        ),
    ],
)
def test_errors_name_their_cause(
    arguments: Sequence[object], code: int, message: str, tmp_path: Path
) -> None:
    write_logs(tmp_path)
    given = [str(argument).format(dir=tmp_path) for argument in arguments]
    result = paper(*given, "--out", tmp_path)
    assert result.exit_code == code
    assert message in result.output


def write_logs(directory: Path) -> None:
    """Write a good log and logs that nothing can be learned from."""
    write_criteo_log(directory / "log.tsv", 300)
    lines = (directory / "log.tsv").read_text().splitlines()
    (directory / "never.tsv").write_text("".join(f"0{line[1:]}\n" for line in lines))
    shown: list[dict[str, Any]] = [
        {
            "kind": "impression",
            "impression_id": str(i),
            "time": 1_700_000_000_000 + i,
            "features": {"a": str(i % 3)},
        }
        for i in range(300)
    ]
    clicks = [
        {"kind": "click", "impression_id": event["impression_id"], "time": event["time"]}
        for event in shown
    ]
    pairs = list(zip(shown, clicks, strict=True))
    early = [pair[: 2 if i < 200 and i % 2 else 1] for i, pair in enumerate(pairs)]
    logs: dict[str, list[dict[str, Any]]] = {
        "shown": shown,
        "clicked": [event for pair in pairs for event in pair],
        "early": [event for events in early for event in events],
        "bare": [{**event, "features": {}} for event in shown],
        "hours": [{**event, "time": event["time"] // 3_600_000} for event in shown],
    }
    for name, events in logs.items():
        text = "".join(f"{json.dumps(event)}\n" for event in events)
        (directory / f"{name}.jsonl").write_text(text)
