"""A closed loop of HTTP requests; run by serve.py as a process of its own.

    python tests/bench/serve_load.py 127.0.0.1:9200 requests.msgpack --connections 8 --seconds 10

Each connection sends a request, reads the answer, and sends the next. The requests are ready as
bytes, and answers are parsed only as far as their length, so that this process is not what limits
the server. It ends after --seconds or --requests, or on SIGTERM, and prints a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import signal
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_SNAPSHOT = re.compile(rb'"snapshot":"([^"]+)"')
_RECONNECT_SECONDS = 0.05


class Load:
    """The answers of all connections."""

    def __init__(self, requests: list[bytes], most: int) -> None:
        self.requests: Iterator[bytes] = itertools.cycle(requests)
        self.most = most
        self.latencies = array("d")
        self.statuses: Counter[str] = Counter()
        self.snapshots: Counter[str] = Counter()
        self.done = asyncio.Event()

    def answered(self, status: str, body: bytes, seconds: float) -> None:
        self.latencies.append(seconds)
        self.statuses[status] += 1
        if found := _SNAPSHOT.search(body):
            self.snapshots[found[1].decode()] += 1
        if self.most and len(self.latencies) >= self.most:
            self.done.set()

    def result(self, seconds: float) -> dict[str, Any]:
        milliseconds = np.array(self.latencies) * 1e3
        quantiles = {"p50": 50, "p90": 90, "p99": 99, "p99_9": 99.9, "max": 100}
        found = {
            f"{name}_ms": round(float(np.percentile(milliseconds, q)), 4)
            if len(milliseconds)
            else None
            for name, q in quantiles.items()
        }
        return {
            "requests": len(milliseconds),
            "seconds": round(seconds, 3),
            "requests_per_second": round(len(milliseconds) / seconds, 2),
            **found,
            "statuses": dict(self.statuses),
            "failed": sum(count for status, count in self.statuses.items() if status != "200"),
            "snapshots": dict(self.snapshots),
        }


class Connection(asyncio.Protocol):
    """One connection that asks without a pause."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._answer = bytearray()
        self._sent = 0.0
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        if self._load.done.is_set():
            self._transport.close()
            return
        self._answer.clear()
        self._sent = time.perf_counter()
        self._transport.write(next(self._load.requests))

    def data_received(self, data: bytes) -> None:
        self._answer += data
        end = self._answer.find(_END_OF_HEAD)
        if end < 0 or not (length := _LENGTH.search(self._answer, 0, end)):
            return
        begin = end + len(_END_OF_HEAD)
        if len(self._answer) - begin < int(length[1]):
            return
        seconds = time.perf_counter() - self._sent
        self._load.answered(self._answer[9:12].decode(), bytes(self._answer[begin:]), seconds)
        self._sent = 0.0
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if self._sent and not self._load.done.is_set():
            self._load.answered("lost", b"", time.perf_counter() - self._sent)
        self.lost.set_result(None)


async def keep_asking(load: Load, host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    while not load.done.is_set():
        try:
            _, connection = await loop.create_connection(lambda: Connection(load), host, port)
        except OSError:
            load.answered("refused", b"", 0.0)
            await asyncio.sleep(_RECONNECT_SECONDS)
        else:
            await connection.lost


async def run(options: argparse.Namespace) -> dict[str, Any]:
    host, _, port = options.address.rpartition(":")
    requests = msgspec.msgpack.decode(options.requests_file.read_bytes(), type=list[bytes])
    load = Load(requests, options.requests)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, load.done.set)
    if options.seconds:
        loop.call_later(options.seconds, load.done.set)
    started = time.perf_counter()
    asked = [
        asyncio.create_task(keep_asking(load, host, int(port))) for _ in range(options.connections)
    ]
    await load.done.wait()
    seconds = time.perf_counter() - started
    await asyncio.wait(asked, timeout=10)
    return load.result(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address")
    parser.add_argument("requests_file", type=Path)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=0)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
