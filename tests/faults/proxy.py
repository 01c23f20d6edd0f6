"""A TCP proxy on the loopback interface that can cut, reset and slow down connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self

_LINGER_OFF = struct.pack("ii", 1, 0)  # linger for 0 s: closing the socket sends a reset
_CHUNK_BYTES = 16 << 10
_CALL_SECONDS = 10.0


class Proxy:
    """A context manager that listens on `port` and passes bytes to and from the port `target`.

    `carried` counts the bytes that it has passed on.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self.target = target
        self.carried = 0
        self._bytes_per_second = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.restore()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        self._run(self._cut())

    def reset(self) -> None:
        """Reset all connections, and accept new ones."""
        self._run(self._end_all(reset=True))

    def slow(self, bytes_per_second: float) -> None:
        """Limit each direction of each connection to this rate."""
        self._bytes_per_second = bytes_per_second

    def restore(self) -> None:
        """End all faults: accept connections and pass bytes at full speed."""
        self._bytes_per_second = 0.0
        self._run(self._listen())

    def _run(self, work: Awaitable[None]) -> None:
        asyncio.run_coroutine_threadsafe(_as_coroutine(work), self._loop).result(_CALL_SECONDS)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._end_all(reset=False)

    async def _end_all(self, *, reset: bool) -> None:
        for writer in list(self._writers):
            if reset:
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF
                )
            writer.transport.abort()
        await asyncio.sleep(0.01)  # the tasks that carry bytes see the closed transports

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server_writer}
        await asyncio.gather(self._carry(reader, server_writer), self._carry(server_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                if self._bytes_per_second:
                    await asyncio.sleep(len(chunk) / self._bytes_per_second)
                writer.write(chunk)
                await writer.drain()
                self.carried += len(chunk)
        self._writers.discard(writer)
        writer.transport.abort()


async def _as_coroutine(work: Awaitable[None]) -> Any:
    return await work
