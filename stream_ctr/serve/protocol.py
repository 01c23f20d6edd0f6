"""HTTP/1.1 for the prediction server: uvicorn on httptools, with bounds for the head of a request.

httptools parses in C what h11, which uvicorn uses without it, parses in Python. But httptools
collects a request line and headers of any length, and uvicorn waits for them without end. So their
bytes and seconds are limited here.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST_HEAD = 1 << 16
"""The most bytes of a request line and its headers, counted in what arrives with them."""

HEAD_SECONDS = 20.0
"""The longest that a head takes, and that a new connection sends nothing."""


class BoundedHeadProtocol(HttpToolsProtocol):
    """Close a connection whose head does not end within `LONGEST_HEAD` and `HEAD_SECONDS`."""

    _head_bytes = 0
    _in_head = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if not self._in_head or not self._head_bytes or self.transport.is_closing():
            return
        if self._head_bytes > LONGEST_HEAD:
            self.send_400_response("The head of the request is too long.")
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        """Begin the request."""
        self._in_head = False
        self._head_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Wait for the next head."""
        self._in_head = True
        super().on_message_complete()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
