"""What commands say on standard error: text or JSON, and what of libraries."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import click
import numba
import pytest
from support.commands import command, succeed
from support.lineage import QUICK, reports

from stream_ctr.cli import voice
from stream_ctr.cli.compiling import announcing_compilation
from stream_ctr.cli.main import main


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    succeed("simulate", "--impressions", 3000, "--seed", 5, "--out", path)
    return path


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_whose_standard_error_is_no_terminal_writes_a_line_for_each_report(
    log: Path, tmp_path: Path
) -> None:
    every = ("-X", "schedule.report_every=1ms")
    result = succeed("run", "--source", log, "--state", tmp_path, *QUICK, *every)
    lines = [line for line in result.stderr.splitlines() if line.startswith("report: ")]
    written = [found for found in reports(tmp_path) if found["kind"] == "report"]
    assert len(lines) == len(written) > 1
    learning = re.fullmatch(
        r"report: ([\d,]+) examples, [\d,]+ events/s, lag \d+, event time 2025-[\dT:-]+Z; "
        r"logloss of the (?:rolling window|run): blend (0\.\d{5}), deepfm .*",
        lines[-1],
    )
    assert learning
    assert int(learning[1].replace(",", "")) == written[-1]["examples"]
    scores = written[-1]["rolling" if "rolling window" in lines[-1] else "models"]
    assert f"{scores.get('models', scores)['blend']['logloss']:.5f}" == learning[2]


def test_with_json_every_line_is_an_object(log: Path, tmp_path: Path) -> None:
    every = ("-X", "schedule.report_every=1ms")
    arguments = ("run", "--source", log, "--state", tmp_path, *QUICK, *every)
    found = objects(succeed("--log-format", "json", "-v", *arguments).stderr)
    assert {each["kind"] for each in found} == {"log", "note", "report"}
    assert all({"time", "level", "message"} <= each.keys() for each in found)
    final = found[-1]
    last = reports(tmp_path)[-1]
    assert (final["report"], final["examples"]) == ("final", last["examples"])
    assert final["logloss"]["blend"] == last["rolling"]["models"]["blend"]["logloss"]
    assert final["snapshot"] == last["snapshot"]
    assert all(each["logger"].startswith("stream_ctr") for each in found if "logger" in each)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "--sorce", "x"), 2, "No such option '--sorce'"),
        (("config", "-X", "learn.seed=x"), 3, "learn.seed: must be a whole number, got 'x'"),
    ],
)
def test_an_error_is_an_object_too(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = command("--log-format", "json", *arguments)
    assert result.exit_code == code
    (error,) = objects(result.stderr)
    assert (error["kind"], error["level"]) == ("error", "error")
    assert error["message"].startswith(message)


NASTY = 'x\x1b[31m\n{"a": "\u202e"}\r'


@pytest.mark.parametrize("format", ["text", "json"])
def test_no_input_steers_a_terminal_or_adds_an_object(
    format: voice.Format, capsys: pytest.CaptureFixture[str]
) -> None:
    with voice.speaking(format):
        logging.getLogger("stream_ctr.test").warning("%s", NASTY)
        voice.say_report("report", {"snapshot": NASTY}) if format == "json" else None
    text = capsys.readouterr().err
    assert text.replace("\n", "").isprintable()
    if format == "json":
        first, second = objects(text)
        assert first["message"] == second["snapshot"] == NASTY
    else:
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_libraries_are_heard_at_vv_only(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["kafka.net.manager", "apscheduler.scheduler", "urllib3.pool", "stream_ctr.train"]
    with voice.speaking("text", verbose=verbose):
        for name in names:
            logging.getLogger(name).error("heard")
    heard = [line.split()[-2].rstrip(":") for line in capsys.readouterr().err.splitlines()]
    assert heard == (names if verbose == 2 else names[-1:])


def test_speaking_leaves_logging_as_it_was() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with voice.speaking("json", verbose=2):
        assert voice.speaks_json()
    assert (root.level, list(root.handlers)) == before
    assert not voice.speaks_json()


@pytest.mark.parametrize(
    ("said", "level", "message"),
    [
        ("note: a", "info", "a"),
        ("warning: a: b", "warning", "a: b"),
        ("resumed: a", "info", "resumed: a"),
    ],
)
def test_the_opening_of_a_line_is_its_level(
    said: str, level: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with voice.speaking("json"):
        voice.say(said)
    (found,) = objects(capsys.readouterr().err)
    assert (found["level"], found["message"], found["kind"]) == (level, message, "note")


def test_compilation_is_announced_once_and_only_if_something_is_compiled() -> None:
    said: list[str] = []
    now = iter(range(0, 1000, 4))
    with announcing_compilation(said.append, clock=lambda: next(now)):
        assert said == []
        for _ in range(3):
            numba.njit(lambda x: x + 1)(1)
    assert said == [
        "note: compiling the loops for this machine, once; it takes about 20 s",
        "note: 2 loops compiled in 8 s",
    ]
    numba.njit(lambda x: x + 1)(1)
    assert len(said) == 2  # nobody listens any more


def test_commands_say_everything_through_the_voice() -> None:
    folder = Path(voice.__file__).parent
    silent = [
        path.name
        for path in folder.glob("*.py")
        if re.search(r"\berr=True|file=sys\.stderr", path.read_text()) and path.name != "voice.py"
    ]
    assert silent == []
    assert isinstance(main, click.Group)
