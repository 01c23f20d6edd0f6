"""The command `serve`: predictions over HTTP."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stream_ctr.cli.options import GivenPath, Settings, settings_options
from stream_ctr.cli.serving import Following, following_options

if TYPE_CHECKING:
    from stream_ctr.events.feature_rows import OnInvalid


@click.command()
@following_options
@click.option(
    "--http",
    "address",
    metavar="HOST:PORT",
    default="127.0.0.1:9200",
    show_default=True,
    help="The address to listen on. Any but a loopback address needs --http-token-file.",
)
@click.option(
    "--http-token-file",
    type=GivenPath(dir_okay=False),
    help="A file with the token that requests must show.",
)
@click.option(
    "--on-invalid",
    type=click.Choice(["error", "score"]),
    default="error",
    show_default=True,
    help="Refuse a request with features that the model does not know or training rejects, or "
    "score them as missing and count them.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.001, 3600),
    default=1.0,
    show_default=True,
    help="Seconds that a request may wait. The header X-Timeout-Ms asks for less.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Requests that may wait for the model; more are answered 503 at once.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=4 << 20,
    show_default=True,
    metavar="BYTES",
    help="The largest body of a request.",
)
@click.option(
    "--max-rows",
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    help="The most rows of a request.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Connections that may be open.",
)
@settings_options()
def serve(
    *,
    following: Following,
    address: str,
    http_token_file: Path | None,
    on_invalid: OnInvalid,
    timeout: float,
    max_waiting: int,
    max_body: int,
    max_rows: int,
    max_connections: int,
    settings: Settings,
) -> None:
    """Answer POST /predict with click probabilities, by the newest published snapshot.

    Snapshots are followed and verified as `subscribe` does. The address that is bound is printed.
    SIGTERM and Ctrl-C end the server when the requests that it has read are answered.

    \b
    stream-ctr serve --state state
    stream-ctr serve --bootstrap-servers localhost:9092 --run-file served.run
    stream-ctr serve --state state --http 0.0.0.0:9200 --http-token-file token
    curl -d '{"rows": [{"app": "maps"}]}' -H 'Content-Type: application/json' localhost:9200/predict
    """
    from stream_ctr.cli import runs
    from stream_ctr.http.access import read_token
    from stream_ctr.http.address import Address
    from stream_ctr.serve.bodies import Limits
    from stream_ctr.serve.server import Policy, PredictionServer

    following.require_one_source()
    at = Address.parse(address)
    token = read_token(at, http_token_file)
    policy = Policy(Limits(max_body, max_rows), max_waiting, timeout, max_connections)
    with contextlib.ExitStack() as stack:
        subscriber = following.subscriber(settings, stack, on_invalid=on_invalid)
        server = PredictionServer(subscriber, at, token=token, model=following.model, policy=policy)
        stack.enter_context(runs.signals(server.stop))
        click.echo(f"serving at http://{server.address}")
        sys.stdout.flush()
        server.run()
