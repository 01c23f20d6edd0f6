"""Web servers over the files of a directory: Python's own in a process, and one with faults."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from support.patience import started, wait_until


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextlib.contextmanager
def web_server(
    directory: Path, *, host: str = "127.0.0.1", prefix: Sequence[str] = ()
) -> Iterator[str]:
    """Serve a directory with `python -m http.server`, and yield its URL."""
    port = free_port()
    command = [*prefix, sys.executable, "-m", "http.server", str(port), "--bind", host]
    process = started(
        subprocess.Popen(
            [*command, "--directory", str(directory)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    )
    try:
        if not prefix:
            wait_until(lambda: _answers(host, port))
        yield f"http://{host}:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0):
        return True
    return False


_LINGER_SECONDS = 0.3


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that is gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class FaultyServer:
    """A web server of a directory that knows ranges, in a thread.

    Set `break_after` to close each connection after so many bytes of a body, `delay_seconds` to
    wait before each `delay_bytes`, `silent` to answer nothing, `status` to answer with an error,
    `changed` to send other bytes, and `no_length` to leave the length of a body out. Only paths
    with `only` in them are concerned. `sent` counts the bytes of bodies by path, `asked` requests.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ranges = True
        self.only = ""
        self.break_after: int | None = None
        self.delay_seconds = 0.0
        self.delay_bytes = 1
        self.silent = threading.Event()
        self.released = threading.Event()
        self.status = 0
        self.changed = False
        self.no_length = False
        self.sent: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        faults = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    faults.answer(self)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        return Handler

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.asked[path] += 1
        concerned = self.only in path
        file = self.directory / path.lstrip("/")
        if concerned and self.silent.is_set():
            self.released.wait()
            return
        if (concerned and self.status) or not file.is_file():
            request.send_response(self.status or 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = file.read_bytes()
        if concerned and self.changed:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = self._start(request, len(data))
        request.send_response(206 if start else 200)
        if concerned and self.no_length:
            request.send_header("Connection", "close")
        else:
            request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        self._send(request, path, data[start:], concerned=concerned)
        if concerned and (self.no_length or self.break_after is not None):
            if self.break_after:
                time.sleep(_LINGER_SECONDS)  # a client that is told of the end drops what it holds
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)

    def _start(self, request: http.server.BaseHTTPRequestHandler, size: int) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        return min(int(found[1]), size) if found and self.ranges else 0

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        path: str,
        data: bytes,
        *,
        concerned: bool,
    ) -> None:
        if concerned and self.break_after is not None:
            data = data[: self.break_after]
        if concerned and self.delay_seconds:
            for first in range(0, len(data), self.delay_bytes):
                if self.released.is_set():
                    return
                time.sleep(self.delay_seconds)
                request.wfile.write(data[first : first + self.delay_bytes])
                request.wfile.flush()
                self.sent[path] += self.delay_bytes
            return
        request.wfile.write(data)
        request.wfile.flush()
        self.sent[path] += len(data)


def url_with(url: str, userinfo: str, query: str) -> str:
    """Return the URL with a password and a query, as some stores have them."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{userinfo}@{rest}?{query}"
