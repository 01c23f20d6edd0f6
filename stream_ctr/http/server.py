"""A server in a thread of a command that has other work.

uvicorn, because it is small, has no dependency but h11 and click, and leaves signals to the command
when it runs outside the main thread.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from types import TracebackType

import uvicorn
from starlette.types import ASGIApp

from stream_ctr.errors import ConfigError
from stream_ctr.http.address import Address

_START_SECONDS = 10.0
_STOP_SECONDS = 1  # for answers in progress
_LOOK_SECONDS = 0.005
_REASONS = {
    errno.EADDRINUSE: "another process listens there; end it, or give another port",
    errno.EADDRNOTAVAIL: "no network interface of this machine has this address",
    errno.EACCES: "this user may not listen there; ports below 1024 need a privilege",
}


class HttpServer:
    """Answer HTTP requests at an address, in a daemon thread, until the block is left.

    `app` runs in that thread alone. `connections` is the number of connections that are answered at
    a time; others get 503. `address` has the port that is bound, which the system chooses for 0.
    Raises `ConfigError` if the address cannot be bound.

    >>> from starlette.responses import PlainTextResponse
    >>> with HttpServer(PlainTextResponse("hello"), Address.parse("127.0.0.1:0")) as server:
    ...     server.address.port > 0
    True
    """

    def __init__(self, app: ASGIApp, address: Address, *, connections: int = 100) -> None:
        self._socket = bind(address)
        self.address = Address(address.host, self._socket.getsockname()[1])
        self._failure: BaseException | None = None
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                access_log=False,
                lifespan="auto",
                limit_concurrency=connections,
                log_config=None,
                log_level="error",  # not what strangers send
                server_header=False,
                timeout_graceful_shutdown=_STOP_SECONDS,
                ws="none",
            )
        )
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)

    def start(self) -> None:
        """Return when requests are answered."""
        self._thread.start()
        latest = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > latest:
                self._socket.close()
                raise ConfigError(f"the server at {self.address} does not start: {self._failure}")
            time.sleep(_LOOK_SECONDS)

    def stop(self) -> None:
        """Refuse new connections, finish answers that take a second at most, and return."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(_STOP_SECONDS + 2.0)
        self._socket.close()

    def __enter__(self) -> HttpServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except (Exception, SystemExit) as error:  # noqa: BLE001 - start() reports it
            self._failure = error


def bind(address: Address) -> socket.socket:
    """Return a socket that listens at the address. Raises `ConfigError` if it cannot be bound."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
    family, kind, protocol, _, name = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(name)
        bound.listen(socket.SOMAXCONN)
    except OSError as error:
        bound.close()
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise ConfigError(f"cannot listen on {address}: {reason}") from None
    return bound
