"""`stream-ctr top`: on a state directory, on a port, piped, on a terminal, and when stopped."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from support.commands import command, succeed
from support.patience import started, wait_until

from stream_ctr.cli.top import Port
from stream_ctr.http.address import Address
from stream_ctr.http.server import HttpServer

SCORE = {"logloss": 0.24123, "auc": 0.7123, "pred_over_actual": 1.01, "count": 1200}


def report(**fields: Any) -> dict[str, Any]:
    return {
        "kind": "report",
        "run": "ab" * 16,
        "time": "2025-01-01T00:00:10.000Z",
        "examples": 1200,
        "models": {"deepfm": SCORE},
        **fields,
    }


def write(state: Path, *reports: dict[str, Any]) -> None:
    state.mkdir(exist_ok=True)
    with (state / "reports.jsonl").open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in reports)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of a run that is over."""
    state = tmp_path / "state"
    write(state, report(examples=600), report(kind="final"))
    return state


def test_one_frame_of_a_state_directory_is_plain_text(state: Path) -> None:
    printed = succeed("top", "--state", state, "--once").stdout
    assert printed.startswith("■ ended  all of the input is read, 1,200 examples learned\n")
    assert re.search(r"deepfm +0\.24123 +0\.7123", printed)
    assert "\x1b" not in printed


def test_a_frame_needs_none_of_the_libraries_that_learn(state: Path) -> None:
    program = (
        "import sys; from stream_ctr.cli.main import main\n"
        f"main(['top', '--once', '--state', {str(state)!r}], standalone_mode=False)\n"
        "print([name for name in ('torch', 'river', 'kafka', 'starlette') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_directory_without_reports_is_a_run_that_starts(tmp_path: Path) -> None:
    assert succeed("top", "--state", tmp_path, "--once").stdout.startswith("◐ starting")


def test_a_missing_directory_is_a_clear_error(tmp_path: Path) -> None:
    result = command("top", "--state", tmp_path / "none", "--once")
    assert result.exit_code == 3
    assert f"there is no directory {tmp_path / 'none'}; give the state directory" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--state", "a", "--url", "http://127.0.0.1:1"], "give one of them"),
        (["--http-token-file", "t"], "--http-token-file is for --url"),
    ],
)
def test_options_that_contradict_are_a_usage_error(arguments: list[str], words: str) -> None:
    result = command("top", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_url_without_a_scheme_is_a_clear_error() -> None:
    result = command("top", "--url", "127.0.0.1:9100", "--once")
    assert result.exit_code == 3
    assert "must begin with http:// or https://" in result.stderr


def test_text_from_a_report_steers_no_terminal(tmp_path: Path) -> None:
    hostile = {
        "name": "drift\x1b[2J",
        "since": "2025-01-01T00:00:00Z",
        "text": "\x1b]0;owned\x07 a\u202eb [red]markup[/red]",
    }
    write(tmp_path, report(models={"\x1b[31mm\nodel": SCORE}, alarms=[hostile]))
    printed = succeed("top", "--state", tmp_path, "--once").stdout
    assert not set(printed) & {"\x1b", "\x07", "\u202e"}
    assert "[red]markup[/red]" in printed
    assert "\\x1b[31mm\\nodel" in printed


# -- a port --------------------------------------------------------------------------------------


class FakePort:
    """Answers /reports as a run does, with an ETag, and notes what it was asked."""

    def __init__(self) -> None:
        self.status, self.tag = 200, '"1"'
        self.body: Any = {
            "format": 1,
            "run": "ab" * 16,
            "model": "deepfm",
            "reports": [report(lag=41)],
            "snapshots": [{"name": "one", "verdict": "refused", "reasons": ["worse"]}],
        }
        self.asked: list[dict[str, str]] = []
        self.app = Starlette(routes=[Route("/reports", self._answer)])

    async def _answer(self, request: Request) -> Response:
        self.asked.append(dict(request.headers))
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304)
        return JSONResponse(self.body, self.status, headers={"etag": self.tag})


@pytest.fixture
def port() -> FakePort:
    return FakePort()


@pytest.fixture
def url(port: FakePort) -> Iterator[str]:
    with HttpServer(port.app, Address.parse("127.0.0.1:0")) as server:
        yield server.address.url


def test_one_frame_of_a_port_has_its_reports_and_snapshots(url: str) -> None:
    printed = succeed("top", "--url", url, "--once").stdout
    assert printed.startswith("● learning  1,200 examples learned")
    assert "lag 41" in printed
    assert "newest one refused · worse" in printed
    assert url in printed


def test_an_answer_that_is_unchanged_is_not_sent_again(url: str, port: FakePort) -> None:
    source = Port(url)
    first = source.read()
    assert source.read() is first
    assert [each.get("if-none-match") for each in port.asked] == [None, '"1"']
    port.tag = '"2"'
    assert source.read() is not first


def test_the_token_of_the_file_is_sent(url: str, port: FakePort, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-secret-of-sixteen\n")
    printed = succeed("top", "--url", url, "--once", "--http-token-file", tmp_path / "token")
    assert port.asked[0]["authorization"] == "Bearer a-secret-of-sixteen"
    assert "a-secret" not in printed.output


@pytest.mark.parametrize("text", ["", "two lines\nof text", "caf\xe9"])
def test_a_token_file_without_a_token_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    arguments = ["--url", "http://127.0.0.1:1", "--once", "--http-token-file", tmp_path / "token"]
    result = command("top", *arguments)
    assert result.exit_code == 3
    assert "must hold one line, the token" in result.stderr


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {}, "needs its token: give it with --http-token-file"),
        (404, {}, "answers with status 404; is it the port of a run?"),
        (200, {"no": "reports"}, "is not the port of a run"),
        (200, [], "is not the port of a run"),
    ],
)
def test_an_answer_that_is_none_is_a_clear_error(
    url: str, port: FakePort, status: int, body: Any, words: str
) -> None:
    port.status, port.body = status, body
    result = command("top", "--url", url, "--once")
    assert result.exit_code == 1
    assert words in result.stderr


def test_a_port_where_nobody_listens_is_a_clear_error() -> None:
    result = command("top", "--url", "http://127.0.0.1:1", "--once")
    assert result.exit_code == 1
    assert "http://127.0.0.1:1 does not answer: " in result.stderr


# -- as it grows ---------------------------------------------------------------------------------


def test_piped_output_has_a_frame_for_each_report_and_ends_with_the_run(tmp_path: Path) -> None:
    write(tmp_path, report())
    more = [report(time="2025-01-01T00:00:20Z", examples=2400), report(kind="final", time="z")]

    def grow() -> None:
        for each in more:
            time.sleep(1.2)
            write(tmp_path, each)

    thread = threading.Thread(target=grow)
    thread.start()
    printed = succeed("top", "--state", tmp_path).stdout
    thread.join()
    assert re.findall(r"[●■] \w+  .*", printed) == [
        "● learning  1,200 examples learned, event time –",
        "● learning  2,400 examples learned, event time –",
        "■ ended  all of the input is read, 1,200 examples learned",
    ]


class Terminal:
    """`stream-ctr` on a terminal of 80 columns and 24 lines."""

    def __init__(self, *arguments: object, **environ: str) -> None:
        self._screen, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        words = [sys.executable, "-m", "stream_ctr", *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm-256color", **environ}
        self.process = started(
            subprocess.Popen(
                words, stdin=inside, stdout=inside, stderr=inside, env=environment, close_fds=True
            )
        )
        os.close(inside)
        self.written = ""

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self._read(), explain=lambda: self.written[-2000:])

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        # A terminal that nobody reads blocks the command in the middle of a frame.
        wait_until(lambda: self._read() is not None and self.process.poll() is not None)
        self._read()
        os.close(self._screen)
        return self.process.returncode

    def _read(self) -> str:
        while select.select([self._screen], [], [], 0.05)[0]:
            try:
                self.written += os.read(self._screen, 1 << 16).decode(errors="replace")
            except OSError:  # the other end is closed
                break
        return self.written


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal_reports_appear_and_a_signal_puts_the_screen_back(
    tmp_path: Path, number: signal.Signals
) -> None:
    write(tmp_path, report())
    terminal = Terminal("top", "--state", tmp_path)
    terminal.wait_for("1,200 examples learned")
    write(tmp_path, report(examples=7654321))
    terminal.wait_for("7,654,321 examples learned")
    assert "\x1b[?1049h" in terminal.written  # the alternate screen
    assert re.search(r"\x1b\[[\d;]*3[0-7]", terminal.written)
    assert terminal.end(number) == 0
    assert terminal.written.endswith("\x1b[?25h\x1b[?1049l")  # the cursor, the screen of before
    assert "Traceback" not in terminal.written


@pytest.mark.slow
def test_no_color_leaves_out_colours(tmp_path: Path) -> None:
    write(tmp_path, report())
    terminal = Terminal("top", "--state", tmp_path, NO_COLOR="1")
    terminal.wait_for("1,200 examples learned")
    assert terminal.end(signal.SIGINT) == 0
    assert not re.search(r"\x1b\[[\d;]*3[0-7]", terminal.written)


@pytest.mark.slow
def test_a_port_that_goes_away_and_comes_back_is_said_on_the_screen(port: FakePort) -> None:
    with HttpServer(port.app, Address.parse("127.0.0.1:0")) as server:
        terminal = Terminal("top", "--url", server.address.url)
        terminal.wait_for("lag")
    terminal.wait_for("does not answer")
    terminal.wait_for("the figures below are those of")
    port.body["reports"] = [report(examples=7654321)]
    port.tag = '"2"'
    with HttpServer(port.app, server.address):
        terminal.wait_for("7,654,321 examples learned")
        assert terminal.end(signal.SIGINT) == 0
