"""The prediction server: a subscriber, the thread that predicts, and uvicorn in the main thread.

    network -> event loop -> waiting requests -> scoring thread -> event loop -> network
                                                      |
               subscriber's thread: verify, load, swap the model

uvicorn, because it is small and ends gracefully: when it stops, it closes the listening socket and
idle connections, and the requests that it has read are answered first.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from stream_ctr.http.access import Token, protect
from stream_ctr.http.address import Address
from stream_ctr.http.server import bind
from stream_ctr.serve.app import Paths, Predict, make_app
from stream_ctr.serve.bodies import Limits
from stream_ctr.serve.metrics import Metrics
from stream_ctr.serve.protocol import BoundedHeadProtocol
from stream_ctr.serve.scoring import Scoring
from stream_ctr.serve.waiting import WaitingRequests
from stream_ctr.snapshots.subscriber import Subscriber

_GRACE_SECONDS = 5.0  # beside the longest that a request may wait
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Policy:
    """What the server accepts.

    `limits` bound a request. `waiting` requests may wait for the model, each for `timeout_seconds`
    at most, and `connections` may be open. Up to `together` requests are predicted at once.
    """

    limits: Limits = Limits()
    waiting: int = 128
    timeout_seconds: float = 1.0
    connections: int = 1000
    together: int = 64


class PredictionServer:
    """Serve the model of `subscriber` at an address.

    `model` is the name of an additional model, if the subscriber serves one. `address` has the port
    that is bound. Raises `ConfigError` if it cannot be bound, or if it can be reached from other
    machines and there is no token.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        address: Address,
        *,
        token: Token | None = None,
        model: str | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> None:
        self._subscriber = subscriber
        self.waiting = WaitingRequests(policy.waiting, together=policy.together)
        """The requests that wait for the model."""
        metrics = Metrics(subscriber, self.waiting, lambda: self._scoring.ready)
        predict = Predict(self.waiting, policy.limits, policy.timeout_seconds, metrics.answered)
        self._scoring = Scoring(
            self.waiting,
            lambda: subscriber.scorer if subscriber.pointer else None,
            predict.deliver,
            model=model,
            limits=policy.limits,
            observe=metrics.predicted,
        )
        app = make_app(predict, Paths(subscriber, self._scoring, metrics, model))
        guarded = protect(app, address, token)
        self._server = _Server(_config(guarded, policy))
        self._socket = bind(address)
        self.address = Address(address.host, self._socket.getsockname()[1])

    def run(self) -> None:
        """Answer requests until `stop` is called, and those that came before it."""
        gc.freeze()  # what was imported need not be looked through again
        with self._subscriber, self._scoring, contextlib.closing(self._socket):
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Refuse new requests, and let `run` return when the others are answered."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn, which leaves signals to whoever calls it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(app: Any, policy: Policy) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedHeadProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="error",  # not what strangers send
        server_header=False,
        limit_concurrency=policy.connections,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(policy.timeout_seconds + _GRACE_SECONDS),
    )
