"""A TCP proxy on the loopback interface that can cut, reset and slow down what goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self

_AT_ONCE = struct.pack("ii", 1, 0)  # lingering for no time: closing sends a reset
_PIECE = 16 << 10


class Proxy:
    """Passes bytes between `port`, which it listens on, and the port `target`, as a context manager.

    `cut` closes all connections and refuses new ones, `reset` breaks all connections and takes new ones, `slow` lets so many bytes a second
    through on each connection and side; `restore` ends all that. `carried` is how many bytes went through.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port, self.target = port, target
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
        self._run(self._cut())

    def reset(self) -> None:
        self._run(self._end_all(reset=True))

    def slow(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second

    def restore(self) -> None:
        self._bytes_per_second = 0.0
        self._run(self._listen())

    def _run(self, work: Awaitable[None]) -> None:
        asyncio.run_coroutine_threadsafe(_as_coroutine(work), self._loop).result(10.0)

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
                    socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE
                )
            writer.transport.abort()
        await asyncio.sleep(0.01)  # those who carried notice

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
            while piece := await reader.read(_PIECE):
                if self._bytes_per_second:
                    await asyncio.sleep(len(piece) / self._bytes_per_second)
                writer.write(piece)
                await writer.drain()
                self.carried += len(piece)
        self._writers.discard(writer)
        writer.transport.abort()


async def _as_coroutine(work: Awaitable[None]) -> Any:
    return await work
