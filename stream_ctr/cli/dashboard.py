"""The command `dashboard`: the page, metrics and reports of a state directory."""

from __future__ import annotations

import threading
from pathlib import Path

import click

from stream_ctr.cli.options import GivenPath
from stream_ctr.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:9100"

HTTP_OPTION = click.option(
    "--http",
    "http_address",
    metavar="HOST:PORT",
    help="Answer HTTP requests there: the page, /metrics, /healthz, /readyz and /reports. :9100 is "
    "port 9100 of this machine only.",
)
TOKEN_OPTION = click.option(
    "--http-token-file",
    type=GivenPath(dir_okay=False),
    help="File of the token that requests must show. Needed where other machines can connect.",
)


@click.command()
@click.option(
    "--state",
    type=GivenPath(file_okay=False),
    default=Path("state"),
    show_default=True,
    help="The state directory of a run, finished or running.",
)
@click.option(
    "--http",
    "http_address",
    metavar="HOST:PORT",
    default=DEFAULT_ADDRESS,
    show_default=True,
    help="The address to listen on; port 0 is a free one.",
)
@TOKEN_OPTION
def dashboard(*, state: Path, http_address: str, http_token_file: Path | None) -> None:
    """Show a run in the browser from the files in its state directory, until Ctrl-C.

    The reports of a run that goes on appear as they are written. Nothing is changed.

    \b
    stream-ctr dashboard --state state
    stream-ctr dashboard --state state --http 0.0.0.0:9100 --http-token-file token
    """
    from stream_ctr.cli import port, runs
    from stream_ctr.monitor.followed_reports import FollowedReports
    from stream_ctr.monitor.recent_reports import RecentReports

    if not (state / "run.json").exists() and not (state / "reports.jsonl").exists():
        raise ConfigError(f"{state} is no state directory: a run leaves run.json in it")
    stop = threading.Event()
    followed = FollowedReports(state)
    recent = RecentReports()
    recent.add_all(followed.read())
    token_file = str(http_token_file) if http_token_file else ""
    with (
        runs.signals(stop.set),
        port.answering(state, recent, address=http_address, token_file=token_file),
    ):
        port.follow(followed, recent, stop)
