"""Predictions a second of `stream-ctr serve` while deltas of many rows are applied, against none.

The server has DeepFM (K=10, 400-400-400) with 2^--bits rows. The load is that of serve.py: a closed
loop of requests of one row, and of 32. In each of --rounds rounds it asks for --seconds seconds
while no delta comes, and for as long while every --every seconds one of --rows rows comes, which
lie anywhere in the table. Payloads are made beforehand, so that the machine bears the server, the
load, and the writing of files, but no trainer. The server must have applied every delta in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from support.record import formatted

from bench import serve
from bench.delta_base import STEM, publish, published_learner, random_rows
from bench.delta_chain_writer import ChainWriter
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots.delta import Changes, DeltaRank, encode_payload
from stream_ctr.snapshots.delta_store import DeltaStore

ROWS = (1, 32)
CONNECTIONS = 8
PAYLOADS = 3
APPLIED_SECONDS = 60.0
NONE, WITH = "no deltas", "deltas"
Result = dict[str, Any]


class Publishing:
    """A chain of deltas in a state directory, of payloads that are made beforehand."""

    def __init__(self, state: Path, *, bits: int, rows: int) -> None:
        learner = published_learner(state)
        assert learner.touched is not None
        rng = np.random.default_rng(0)
        self._payloads: list[tuple[Changes, bytes, str]] = []
        for _ in range(PAYLOADS):
            learner.touched.put_back(random_rows(rng, bits, rows))
            changes = {STEM: learner.take_changes()}
            payload = encode_payload(changes, "fp32")
            self._payloads.append((changes, payload, ChainWriter.sha256(payload)))
        self._chain = ChainWriter.on_published(state)
        self._store = DeltaStore(state)
        self.written = 0
        self.rank: DeltaRank | None = None

    def write(self) -> None:
        """Write the next delta."""
        changes, payload, sha256 = self._payloads[self.written % PAYLOADS]
        link = self._chain.link(changes, payload, sha256)
        self._store.write(link.data, link.header, payload)
        self.rank = link.header.rank
        self.written += 1

    @contextlib.contextmanager
    def every(self, seconds: float) -> Iterator[None]:
        """Write a delta now and every so many seconds, in a thread."""
        stopped = threading.Event()

        def run() -> None:
            due = time.monotonic()
            while not stopped.wait(max(0.0, due - time.monotonic())):
                self.write()
                due += seconds

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def measure(options: argparse.Namespace) -> Result:
    """Return the answers of all rounds, with and without deltas."""
    bits = options.bits[-1]
    with tempfile.TemporaryDirectory() as name:
        state = Path(name) / "state"
        log = Path(name) / "events.jsonl"
        Simulation(5_000 if options.quick else 50_000, seed=1).write_jsonl(log)
        publish(state, ["--source", str(log)], bits)
        publishing = Publishing(state, bits=bits, rows=options.rows)
        features = serve.features(log, 20_000)
        found: Result = {"bits": bits, "rows": options.rows, "every": options.every, "cases": {}}
        with serve.ours("deepfm", state) as server:
            for size in ROWS:
                requests = serve.write_requests(
                    Path(name) / f"{size}.msgpack", features, size, "JSON"
                )
                found["cases"][str(size)] = rounds(server, requests, publishing, options)
            wait_until_applied(server, publishing)
        found["deltas"] = publishing.written
        return found


def rounds(
    server: serve.Server, requests: Path, publishing: Publishing, options: argparse.Namespace
) -> Result:
    asks = ("--connections", CONNECTIONS, "--seconds")
    serve.ask(server, requests, *asks, min(options.seconds, 2.0))
    found: Result = {NONE: [], WITH: []}
    for _ in range(options.rounds):
        found[NONE].append(serve.ask(server, requests, *asks, options.seconds))
        with publishing.every(options.every):
            found[WITH].append(serve.ask(server, requests, *asks, options.seconds))
        wait_until_applied(server, publishing)
    return found


def wait_until_applied(server: serve.Server, publishing: Publishing) -> None:
    """Wait until the server serves the newest delta. Raises `RuntimeError` if it does not."""
    assert publishing.rank
    deadline = time.monotonic() + APPLIED_SECONDS
    while (served := served_delta(server)) != publishing.rank:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server serves {served}, and {publishing.rank} was written")
        time.sleep(0.05)


def served_delta(server: serve.Server) -> DeltaRank | None:
    with urllib.request.urlopen(f"http://{server.address}/model", timeout=60) as answer:
        found: Result = json.loads(answer.read())
    return None if found["delta"] is None else DeltaRank(found["epoch"], found["delta"])


def table(results: Result) -> str:
    """Return the medians over the rounds."""
    rows: list[list[object]] = []
    for size, cases in results["cases"].items():
        for name, repetitions in cases.items():
            rate = serve.median(repetitions, "requests_per_second")
            rows.append(
                [
                    *(size, name, f"{rate:,.0f}", f"{rate * int(size):,.0f}"),
                    *(f"{serve.median(repetitions, key):.2f}" for key in ("p50_ms", "p99_ms")),
                    f"{max(found['max_ms'] for found in repetitions):.0f}",
                    sum(found["failed"] for found in repetitions),
                ]
            )
        ratio = statistics.median(
            with_["requests_per_second"] / without["requests_per_second"]
            for without, with_ in zip(cases[NONE], cases[WITH], strict=True)
        )
        rows.append([size, "ratio", f"{ratio:.3f}", *[""] * 5])
    header = ["rows a request", "", "requests/s", "predictions/s", "p50, ms", "p99, ms"]
    return formatted([*header, "longest, ms", "failed"], rows)
