"""The systemd units are valid, hardened, and start commands that exist."""

from __future__ import annotations

import configparser
import re
import shlex
import sys
from pathlib import Path

import pytest
from support.deployment import (
    DEPLOY,
    checked,
    parsed,
    require_tool,
    seconds_for_a_snapshot,
)

from stream_ctr import errors

UNITS = ("stream-ctr.service", "stream-ctr-serve.service")
PROGRAM = "/opt/stream-ctr/bin/stream-ctr"
MOST_EXPOSED = 2.0
"""The largest exposure level of `systemd-analyze security`, from 0 (none) to 10."""


def service(name: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / name)
    return parser["Service"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a folder with the units, whose program is one that exists here."""
    require_tool("systemd-analyze", "it comes with systemd")
    for name in UNITS:
        text = (DEPLOY / name).read_text()
        (tmp_path / name).write_text(text.replace(PROGRAM, sys.executable))
    return tmp_path


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong(installed: Path, name: str) -> None:
    analyze = require_tool("systemd-analyze", "it comes with systemd")
    output = checked(analyze, "verify", "--man=no", installed / name)
    assert [line for line in output.splitlines() if name in line] == []


def test_the_check_finds_a_mistake(installed: Path) -> None:
    analyze = require_tool("systemd-analyze", "it comes with systemd")
    unit = installed / UNITS[0]
    unit.write_text(unit.read_text().replace("TimeoutStopSec=300", "TimeoutStop=300"))
    assert "TimeoutStop" in checked(analyze, "verify", "--man=no", unit)


@pytest.mark.parametrize("name", UNITS)
def test_the_units_are_hardened(installed: Path, name: str) -> None:
    analyze = require_tool("systemd-analyze", "it comes with systemd")
    limit = f"--threshold={int(MOST_EXPOSED * 10)}"
    output = checked(analyze, "security", "--offline=yes", limit, installed / name)
    [level] = re.findall(r"exposure level for \S+: (\d+\.\d)", output)
    assert float(level) <= MOST_EXPOSED


@pytest.mark.parametrize("name", UNITS)
def test_the_command_has_options_that_exist_and_listens_on_loopback(name: str) -> None:
    program, *words = shlex.split(service(name)["ExecStart"])
    assert program == PROGRAM
    options = parsed(words)
    assert str(options["http"]).startswith("127.0.0.1:")
    credential, _, path = service(name)["LoadCredential"].partition(":")
    assert str(options["http_token_file"]) == f"${{CREDENTIALS_DIRECTORY}}/{credential}"
    assert path == "/etc/stream-ctr/http-token"


def test_both_units_use_one_state_and_the_server_only_reads_it() -> None:
    states = {parsed(shlex.split(service(name)["ExecStart"])[1:])["state"] for name in UNITS}
    [state] = states
    trainer, server = (service(name) for name in UNITS)
    assert state.parent == Path("/var/lib") / trainer["StateDirectory"]
    assert server["ReadOnlyPaths"] == f"-{state.parent}"
    assert trainer["User"] == server["User"]


@pytest.mark.parametrize("name", UNITS)
def test_compiled_loops_are_cached_where_the_unit_may_write(name: str) -> None:
    folder = f"/var/cache/{service(name)['CacheDirectory']}/"
    [path] = re.findall(r"NUMBA_CACHE_DIR=(\S+)", service(name)["Environment"])
    assert path.startswith(folder)


def test_a_lost_broker_is_tried_again_and_what_needs_a_person_is_not() -> None:
    trainer = service(UNITS[0])
    final = {int(code) for code in trainer["RestartPreventExitStatus"].split()}
    assert trainer["Restart"] == "on-failure"
    assert errors.BrokerError.exit_code not in final
    assert {errors.ConfigError.exit_code, errors.SnapshotError.exit_code} <= final
    assert final == {2, 3, 5, 6}


def test_a_trainer_has_time_for_its_last_snapshot_on_a_slow_disk() -> None:
    seconds = int(service(UNITS[0])["TimeoutStopSec"])
    assert seconds > seconds_for_a_snapshot()
