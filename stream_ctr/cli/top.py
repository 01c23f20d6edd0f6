"""The command `top`: a run on a full screen, as a person on call needs it.

    --state DIR   the reports and snapshots of a state directory, as they grow
    --url URL     the answer of a run's port

Both become an `Answer`. What comes from outside is escaped at the door, so that no name steers a
terminal.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from stream_ctr.cli.options import GivenPath
from stream_ctr.errors import ConfigError, StreamCtrError
from stream_ctr.messages import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

    from stream_ctr.cli.overview import Answer

_MOST_REPORTS = 200  # that tell since when something holds
_LONGEST_TEXT = 500  # characters of a name or a reason
_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0
_LARGEST_ANSWER = 64 << 20  # bytes
_SCHEMES = ("http", "https")


class Source(Protocol):
    """Where a run is seen."""

    name: str

    def read(self) -> Answer:
        """Return what is known now. Raises `NoAnswer` if nobody answers."""
        ...


class NoAnswer(StreamCtrError):
    """The run's port does not answer, or with something else than reports."""


@click.command()
@click.option(
    "--state",
    type=GivenPath(file_okay=False),
    help="The state directory of a run that is active or has ended.  [default: state]",
)
@click.option("--url", help="The port of a run instead, such as http://127.0.0.1:9100.")
@click.option(
    "--http-token-file",
    "token_file",
    type=GivenPath(dir_okay=False),
    help="With --url: the file that holds the token of the port.",
)
@click.option("--once", is_flag=True, help="Print one frame and end.")
def top(*, state: Path | None, url: str | None, token_file: Path | None, once: bool) -> None:
    """Watch a run on a full screen: state, alarms, lag and freshness first, then the models.

    Where standard output is no terminal, a frame is printed for each new report until the run has
    ended. Ctrl-C ends it.

    \b
    stream-ctr top --state state
    stream-ctr top --url http://127.0.0.1:9100
    stream-ctr top --state state --once
    """
    from rich.console import Console

    if state and url:
        raise click.UsageError("--state is a directory and --url is a port: give one of them")
    if token_file and not url:
        raise click.UsageError("--http-token-file is for --url")
    source = Port(url, _token(token_file)) if url else StateDirectory(state or Path("state"))
    console = Console()
    with contextlib.suppress(KeyboardInterrupt), _terminated_as_interrupted():
        if once:
            _print(source, console)
        elif console.is_terminal and not console.is_dumb_terminal:
            _watch(source, console)
        else:
            _follow(source, console)


# -- sources -------------------------------------------------------------------------------------


class StateDirectory:
    """The reports and snapshots of a state directory, as they grow.

    Raises `ConfigError` if there is no such directory.
    """

    def __init__(self, directory: Path) -> None:
        from stream_ctr.monitor.followed_reports import FollowedReports
        from stream_ctr.monitor.snapshot_list import SnapshotList

        if not directory.is_dir():
            raise ConfigError(
                f"there is no directory {one_line(directory)}; give the state directory of a run "
                "with --state, or its port with --url"
            )
        self.name = str(directory)
        self._followed = FollowedReports(directory)
        self._snapshots = SnapshotList(directory)
        self._reports: deque[Mapping[str, Any]] = deque(maxlen=_MOST_REPORTS)

    def read(self) -> Answer:
        """Return the newest reports and the snapshots."""
        self._reports.extend(each for each in self._followed.read() if each.get("kind") in _KINDS)
        newest = self._reports[-1] if self._reports else {}
        return _answer(
            newest.get("run"),
            next(iter(newest.get("models") or ()), None),
            list(self._reports),
            self._snapshots.read().to_json_objects(),
        )


class Port:
    """What a run answers at `/reports`. A `token` is sent where one is given."""

    def __init__(self, url: str, token: str | None = None) -> None:
        if url.partition("://")[0] not in _SCHEMES:
            raise ConfigError(
                f"--url {one_line(url)!r} must begin with http:// or https://, such as "
                "http://127.0.0.1:9100"
            )
        self.name = url
        self._url = f"{url.rstrip('/')}/reports"
        self._headers = {"Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._tag: str | None = None
        self._last: Answer | None = None

    def read(self) -> Answer:
        """Ask for the reports. An answer that is unchanged is not sent again."""
        headers = {**self._headers, **({"If-None-Match": self._tag} if self._tag else {})}
        try:
            request = urllib.request.Request(self._url, headers=headers)
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                known = json.loads(answer.read(_LARGEST_ANSWER))
                tag = answer.headers.get("ETag")
        except urllib.error.HTTPError as error:
            if error.code == 304 and self._last:
                return self._last
            raise NoAnswer(self._refusal(error.code)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise NoAnswer(f"{one_line(self.name)} does not answer: {one_line(reason)}") from None
        if not isinstance(known, dict) or not isinstance(known.get("reports"), list):
            raise NoAnswer(f"{one_line(self._url)} is not the port of a run")
        self._last = _answer(
            known.get("run"),
            known.get("model"),
            [each for each in known["reports"] if isinstance(each, dict)][-_MOST_REPORTS:],
            [each for each in known.get("snapshots") or () if isinstance(each, dict)],
        )
        self._tag = tag
        return self._last

    def _refusal(self, status: int) -> str:
        if status in (401, 403):
            return f"{one_line(self.name)} needs its token: give it with --http-token-file"
        return f"{one_line(self._url)} answers with status {status}; is it the port of a run?"


_KINDS = ("report", "final", "stopped")


def _answer(
    run: object,
    model: object,
    reports: Sequence[Mapping[str, Any]],
    snapshots: Sequence[Mapping[str, Any]],
) -> Answer:
    """Return an answer in which no text holds a control character."""
    from stream_ctr.cli.overview import Answer

    return Answer(
        run=printable(run) if isinstance(run, str) else None,
        model=printable(model) if isinstance(model, str) else None,
        reports=[*reports[:-1], *map(_printable, reports[-1:])],
        snapshots=[_printable(each) for each in snapshots],
    )


def _printable(value: Any) -> Any:
    """Return a value of JSON in which every text is printable."""
    if isinstance(value, str):
        return printable(value, _LONGEST_TEXT)
    if isinstance(value, Mapping):
        return {printable(str(key)): _printable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(each) for each in value]
    return value


def _token(path: Path | None) -> str | None:
    """Return the token in the first line of a file."""
    if path is None:
        return None
    try:
        lines = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {one_line(path)} cannot be read: {error}") from None
    if len(lines) != 1 or not lines[0].isascii():
        raise ConfigError(f"token file {one_line(path)} must hold one line, the token")
    return lines[0]


# -- drawing -------------------------------------------------------------------------------------


def _print(source: Source, console: Console) -> None:
    from stream_ctr.cli.on_call import OnCall

    console.print(OnCall(source.read(), source.name, now=datetime.now(UTC), fits=False))


def _follow(source: Source, console: Console) -> None:
    """Print a frame for each new report, until the run has ended."""
    from stream_ctr.cli.on_call import OnCall

    shown: object = None
    while True:
        answer = source.read()
        if answer.now.get("time") != shown:
            shown = answer.now.get("time")
            console.print(OnCall(answer, source.name, now=datetime.now(UTC), fits=False))
            console.print()
            sys.stdout.flush()
        if answer.ended:
            return
        time.sleep(_LOOK_SECONDS)


def _watch(source: Source, console: Console) -> None:
    """Draw a frame each second on the whole screen."""
    from rich.live import Live

    from stream_ctr.cli.on_call import OnCall
    from stream_ctr.cli.overview import Answer

    answer, answered_at = Answer(), None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            problem = None
            try:
                answer, answered_at = source.read(), datetime.now(UTC)
            except NoAnswer as error:
                problem = str(error)
            now = datetime.now(UTC)
            frame = OnCall(answer, source.name, now=now, problem=problem, answered_at=answered_at)
            live.update(frame, refresh=True)
            time.sleep(_LOOK_SECONDS)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that the terminal is put back."""
    before: Callable[..., object] | int | None
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
