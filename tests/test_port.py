"""A run answers at its port while it learns, from what its loop hands over."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from support.commands import command, succeed
from support.finished_runs import TINY, write_log
from support.lineage import reports
from support.patience import PATIENCE_SECONDS
from support.trainers import SIMULATED_FIELDS, SMALL, Partitions

from stream_ctr import interface
from stream_ctr.connectors.records import Records

SECRET = "0123456789abcdef-the-token"
QUICK = (*TINY, "-X", "baseline.enabled=false")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def until(found: Callable[[], Any], run: threading.Thread) -> Any:
    """Return what `found` returns as soon as that is true, while the run goes on."""
    latest = time.monotonic() + PATIENCE_SECONDS
    while not (value := found()):
        assert run.is_alive()
        assert time.monotonic() < latest
        time.sleep(0.05)
    return value


class Held(Partitions):
    """A log that stays at its end until it is let go."""

    def __init__(self, values: pa.LargeBinaryArray) -> None:
        super().__init__([values])
        self.let_go = threading.Event()

    @property
    def finished(self) -> bool:
        return super().finished and self.let_go.is_set()

    def poll(self, timeout_seconds: float) -> Records:
        records = super().poll(timeout_seconds)
        if not len(records):
            self.let_go.wait(timeout_seconds)
        return records


@pytest.fixture
def url() -> str:
    """The address of a port that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"http://127.0.0.1:{found.getsockname()[1]}"


def answer(url: str, path: str, **headers: str) -> httpx.Response | None:
    """Return an answer, or None while nobody listens."""
    try:
        return httpx.get(f"{url}{path}", headers=headers)
    except httpx.TransportError:
        return None


def begin(source: Held, state: Path, url: str, **options: Any) -> threading.Thread:
    """Run in a thread, with a port."""
    small = {**SMALL, "schedule": {"report_every": "200ms", "snapshot_examples": 500}}
    small["features"] = {
        kind: [field.name for field in SIMULATED_FIELDS if field.kind == kind]
        for kind in ("categorical", "numeric")
    }
    run = threading.Thread(
        target=lambda: interface.run(
            small, source=source, state=state, http=url.removeprefix("http://"), **options
        )
    )
    run.start()
    return run


@pytest.mark.slow
def test_a_run_answers_while_it_learns(
    stream: pa.LargeBinaryArray,
    tmp_path: Path,
    url: str,
) -> None:
    source, state = Held(stream), tmp_path / "state"
    run = begin(source, state, url)
    try:
        until(lambda: (found := answer(url, "/readyz")) and found.status_code == 200, run)
        shown = until(lambda: httpx.get(f"{url}/reports").json()["reports"], run)
        assert httpx.get(f"{url}/reports").json()["windows"]
        assert httpx.get(f"{url}/healthz").json()["loop_beat_age_seconds"] < 60
        assert "stream_ctr_examples_total" in httpx.get(f"{url}/metrics").text
        written = [each for each in reports(state) if each["kind"] != "window"]
        assert shown == written[: len(shown)]
    finally:
        source.let_go.set()
        run.join(PATIENCE_SECONDS)
    assert not run.is_alive()
    assert answer(url, "/healthz") is None


@pytest.mark.slow
def test_a_resumed_run_shows_its_earlier_reports_and_is_ready_at_once(
    stream: pa.LargeBinaryArray,
    tmp_path: Path,
    url: str,
) -> None:
    state = tmp_path / "state"
    first = Held(stream[:3000])
    first.let_go.set()
    begin(first, state, url, keep_open=True).join(PATIENCE_SECONDS)
    before = [each for each in reports(state) if each["kind"] != "window"]
    source = Held(stream)
    run = begin(source, state, url)
    try:
        found = until(lambda: answer(url, "/reports"), run).json()
        assert found["reports"][: len(before)] == before
        assert found["ended"] is False
        assert httpx.get(f"{url}/readyz").status_code == 200
    finally:
        source.let_go.set()
        run.join(PATIENCE_SECONDS)


@pytest.mark.slow
def test_a_token_guards_the_port_of_a_run(
    stream: pa.LargeBinaryArray,
    tmp_path: Path,
    token_file: Path,
    url: str,
) -> None:
    source = Held(stream[:500])
    run = begin(source, tmp_path / "state", url, http_token_file=token_file)
    try:
        assert until(lambda: answer(url, "/healthz"), run).status_code == 200
        refused = answer(url, "/reports")
        allowed = answer(url, "/reports", authorization=f"Bearer {SECRET}")
        assert refused
        assert allowed
        assert (refused.status_code, allowed.status_code) == (401, 200)
    finally:
        source.let_go.set()
        run.join(PATIENCE_SECONDS)


# -- the command ---------------------------------------------------------------------------------


def test_the_command_says_where_it_listens(log: Path, tmp_path: Path) -> None:
    result = succeed(
        *("run", "--source", log, "--state", tmp_path / "state", *QUICK),
        *("--http", "127.0.0.1:0"),
    )
    assert re.search(r"page, metrics and reports at http://127\.0\.0\.1:[1-9]\d*\n", result.stderr)


def test_an_address_that_others_reach_is_refused_before_anything_is_written(
    log: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    result = command("run", "--source", log, "--state", state, *QUICK, "--http", "0.0.0.0:0")
    assert result.exit_code == 3
    assert "--http-token-file" in result.stderr
    assert not state.exists()


def test_a_port_in_use_is_refused_before_anything_is_written(log: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        result = command("run", "--source", log, "--state", state, *QUICK, "--http", address)
    assert result.exit_code == 3
    assert f"cannot listen on {address}: another process listens there" in result.stderr
    assert not state.exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--http", "9100"], "address '9100' has no port"),
        (["-X", "http.address=nowhere"], "address 'nowhere' has no port"),
        (["--http-token-file", "token"], "no port is open; give an address with --http"),
        (["--http", ":0", "--http-token-file", "none"], "token file none: No such file"),
    ],
)
def test_a_wrong_option_is_a_configuration_error(
    log: Path, tmp_path: Path, options: list[str], problem: str
) -> None:
    result = command("run", "--source", log, "--state", tmp_path / "state", *QUICK, *options)
    assert result.exit_code == 3
    assert problem in result.stderr


@pytest.mark.slow
def test_a_run_without_a_port_loads_no_web_server() -> None:
    code = "import sys, stream_ctr.cli.runs; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "stream_ctr.cli.port" in loaded
    assert not {"uvicorn", "starlette", "prometheus_client", "stream_ctr.monitor.app"} & {*loaded}


def test_a_state_directory_does_not_keep_its_port(log: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    succeed("run", "--source", log, "--state", state, *QUICK, "--http", "127.0.0.1:0")
    again = succeed("run", "--source", log, "--state", state, *QUICK)
    assert "page, metrics" not in again.stderr
