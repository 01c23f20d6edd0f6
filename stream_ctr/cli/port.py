"""The port of a run: its page, metrics, probes and reports over HTTP.

A run without a port imports no web server.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from stream_ctr.cli.voice import say
from stream_ctr.errors import ConfigError
from stream_ctr.messages import one_line
from stream_ctr.monitor.followed_reports import FollowedReports
from stream_ctr.monitor.recent_reports import RecentReports

FOLLOW_SECONDS = 1.0


@contextlib.contextmanager
def observed(
    directory: Path, *, address: str, token_file: str, run: str = ""
) -> Iterator[RecentReports]:
    """Answer requests about the run in `directory`, and yield what its loop adds reports to.

    The reports that it wrote before it was resumed are there at once. Without an `address` nothing
    listens. Raises `ConfigError` if the address cannot be used, or needs a token that is not given.
    """
    recent = RecentReports(run)
    if not address:
        if token_file:
            raise ConfigError(
                f"http.token_file is {one_line(token_file)!r}, and no port is open; "
                "give an address with --http"
            )
        yield recent
        return
    recent.add_all(FollowedReports(directory).read())
    recent.go_on()
    with answering(directory, recent, address=address, token_file=token_file):
        yield recent


@contextlib.contextmanager
def answering(
    directory: Path, recent: RecentReports, *, address: str, token_file: str
) -> Iterator[None]:
    """Answer requests about `recent` and the snapshots in `directory` within the block."""
    from stream_ctr.http.access import protect, read_token
    from stream_ctr.http.address import Address
    from stream_ctr.http.server import HttpServer
    from stream_ctr.monitor.app import monitor_app

    where = Address.parse(address)
    token = read_token(where, Path(token_file) if token_file else None)
    app = protect(monitor_app(recent, directory), where, token)
    with HttpServer(app, where) as server:
        say(f"page, metrics and reports at {server.address.url}")
        yield


def follow(followed: FollowedReports, recent: RecentReports, stop: threading.Event) -> None:
    """Add the reports that are written into the files of a run, until `stop` is set."""
    while not stop.wait(FOLLOW_SECONDS):
        recent.add_all(followed.read())
        recent.beat()
