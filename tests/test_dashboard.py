"""`stream-ctr dashboard` shows a finished run, and follows one that goes on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.commands import command
from support.observed import last_of, observed_run  # noqa: F401 - a fixture
from support.patience import PATIENCE_SECONDS, wait_until

from stream_ctr.snapshots.report_log import read_reports


@pytest.fixture
def state(observed_run: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(observed_run, tmp_path / "state"))


@pytest.fixture
def dashboard(state: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the address that it says it listens on."""
    words = [sys.executable, "-m", "stream_ctr", "dashboard", "--state", str(state)]
    with subprocess.Popen(
        [*words, "--http", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr
            said = re.search(r"reports at (http://\S+)", process.stderr.readline())
            assert said
            yield process, said[1]
        finally:
            process.kill()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_a_finished_run_is_shown_and_followed_and_nothing_is_changed(
    dashboard: tuple[subprocess.Popen[str], str], state: Path
) -> None:
    process, url = dashboard
    before = files(state)
    found = httpx.get(f"{url}/reports").json()
    assert found["reports"] == [each for each in read_reports(state) if each["kind"] != "window"]
    assert found["ended"] is True
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert f"stream_ctr_examples_total {last_of(state)['examples']}.0" in (
        httpx.get(f"{url}/metrics").text
    )
    assert files(state) == before
    with (state / "reports.jsonl").open("a") as file:
        file.write(json.dumps({**last_of(state), "kind": "report", "examples": 123_456}) + "\n")
    wait_until(lambda: httpx.get(f"{url}/reports").json()["reports"][-1]["examples"] == 123_456)
    assert httpx.get(f"{url}/reports").json()["ended"] is False
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 0


def test_a_directory_that_no_run_has_used_is_refused(tmp_path: Path) -> None:
    result = command("dashboard", "--state", tmp_path)
    assert result.exit_code == 3
    assert f"{tmp_path} is no state directory" in result.stderr


def test_an_address_that_others_reach_needs_a_token(state: Path) -> None:
    result = command("dashboard", "--state", state, "--http", "0.0.0.0:0")
    assert result.exit_code == 3
    assert "--http-token-file" in result.stderr
