"""From the closing of a label window to the row that serves it, through a real broker.

    real       `stream-ctr run` learns a topic in real time, at --rate impressions a second, with
               deltas every --every seconds, and `stream-ctr subscribe` follows its topics. Before
               that it learns as much as it can, until its first snapshot is published. Label
               windows are five seconds long, and batches have 512 examples at most, so that one is
               full within a fraction of a second.
    emulated   100,000 examples a second, which this machine cannot learn: a process that holds a
               learner of 2^--bits rows touches the rows that so many examples touch in --every
               seconds (see delta_sizes.py), and does with them all that a trainer does: gather,
               serialise, SHA-256, header, files, chunks on the topic. Windows close steadily
               through the interval. That nothing is learned beside it is the difference from a
               trainer that keeps up.

Every example counts once: its lag is the time at which the subscriber prints the delta that has it,
less the time at which its window closed. Both are times of one machine. Examples whose windows
closed before the stream came in real time are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from support.record import formatted

from bench import delta_sizes
from bench.delta_base import STEM, STREAM_CTR, now_ms, options_of, publish, published_learner
from bench.delta_chain_writer import ChainWriter
from bench.delta_cost import split
from bench.drifting import Change, DriftingStream
from bench.environments import ROOT
from bench.streams import broker, replay
from stream_ctr.connectors import kafka
from stream_ctr.learn.touched import Touched
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import delta_topic
from stream_ctr.snapshots.delta import (
    Closed,
    DeltaHeader,
    DeltaRank,
    decode_header,
    encode_payload,
)
from stream_ctr.snapshots.delta_store import FOLDER, DeltaStore

TOPIC = "clicks"
DELTA_TOPIC = "stream-ctr.deltas"
SNAPSHOT_TOPIC = "stream-ctr.snapshots"
LEAST_DELTAS = 3
GOAL_P50, GOAL_P99 = 6.0, 15.0
LIVE = (
    *("join.label_window=5s", "join.allowed_lateness=1s", "join.idle_timeout=2s"),
    *("learn.batch_size=512", "schedule.snapshot_every=15s"),
)
_CLOSINGS = 50  # of an interval that is emulated
_LAST_SECONDS = 60.0
LOAD_SECONDS = 600.0  # of a snapshot with a large table
Result = dict[str, Any]


# -- a subscriber --------------------------------------------------------------------------------


@dataclass
class Followed:
    """The deltas that a subscriber has printed, by name: when (epoch ms), and their headers.

    Headers are read from the state directory of the trainer.
    """

    process: subprocess.Popen[str]
    state: Path
    at_ms: dict[str, int] = field(default_factory=dict)
    headers: dict[str, DeltaHeader] = field(default_factory=dict)
    snapshots: int = 0

    def read(self) -> None:
        """Read the lines of the process until it ends."""
        assert self.process.stdout
        for line in self.process.stdout:
            now = now_ms()
            said = json.loads(line)
            if name := delta_of(said):
                data = (self.state / FOLDER / f"{name}.json").read_bytes()
                self.headers[name] = decode_header(data, name=name)
                self.at_ms[name] = now
            else:
                self.snapshots += 1

    def wait_for(self, name: str | None, seconds: float) -> None:
        """Wait for a delta of this name, or for the first snapshot. Raises `RuntimeError`."""
        deadline = time.monotonic() + seconds
        while not (self.snapshots if name is None else name in self.at_ms):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the subscriber has not loaded {name or 'a snapshot'}")
            time.sleep(0.02)


def delta_of(said: Mapping[str, Any]) -> str | None:
    """Return the name of the delta that a line of `subscribe --json` is about, or None.

    >>> delta_of({"kind": "delta", "rank": {"epoch": 3, "sequence": 12}})
    '00000003-00000012'
    """
    return DeltaRank(**said["rank"]).name if said["kind"] == "delta" else None


@contextlib.contextmanager
def subscribed(servers: str, state: Path) -> Iterator[Followed]:
    """Run `stream-ctr subscribe`, and read what it prints."""
    command = [*STREAM_CTR, "subscribe", "--topic", SNAPSHOT_TOPIC, "--json"]
    command += ["--bootstrap-servers", servers]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    followed = Followed(process, state)
    reader = threading.Thread(target=followed.read)
    reader.start()
    try:
        yield followed
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_LAST_SECONDS)
        reader.join()


# -- the two ways --------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Result:
    """Return the lags of the real run, and those of the emulated rate."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with broker(directory / "kafka", embedded=options.quick) as (servers, described):
            real = real_lag(servers, directory / "real", options)
        with broker(directory / "kafka-2", embedded=options.quick) as (servers, _):
            emulated = emulated_lag(servers, directory / "emulated", options)
    return {"broker": described, "every": options.every, "real": real, "emulated": emulated}


def real_lag(servers: str, directory: Path, options: argparse.Namespace) -> Result:
    """Return the lags of a run that learns in real time."""
    directory.mkdir()
    state = directory / "state"
    logs = [directory / name for name in ("first.jsonl", "second.jsonl")]
    split(
        DriftingStream(Change(), seconds=2 * options.live_seconds, rate=options.rate, seed=1), logs
    )
    run = [*STREAM_CTR, "run", "--topic", TOPIC, "--bootstrap-servers", servers]
    run += ["--state", str(state), *options_of([*LIVE, *options.extra])]
    run += ["-X", f"snapshots.delta_every={options.every}s"]
    make_topics(servers)
    with training(run, directory / "run.log"), subscribed(servers, state) as followed:
        replay(logs[0], servers, TOPIC)
        followed.wait_for(None, LOAD_SECONDS)
        began_ms = now_ms()
        replay(logs[1], servers, TOPIC, "--speed", "1")
        time.sleep(3 * options.every)
    if sum(bool(header.closed) for header in followed.headers.values()) < LEAST_DELTAS:
        said = (directory / "run.log").read_text().splitlines()[-10:]
        raise RuntimeError("\n".join(["too few deltas were loaded", *said]))
    return {"rate": options.rate, **lags(followed, began_ms)}


@contextlib.contextmanager
def training(command: Sequence[str], log: Path) -> Iterator[None]:
    """Run a trainer, which writes its messages to `log`, and stop it at the end."""
    with log.open("w") as messages:
        trainer = subprocess.Popen(command, cwd=ROOT, stdout=messages, stderr=messages)
        try:
            yield
        finally:
            trainer.terminate()
            trainer.wait(_LAST_SECONDS)


def emulated_lag(servers: str, directory: Path, options: argparse.Namespace) -> Result:
    """Return the lags at a rate that is simulated."""
    directory.mkdir()
    log, state = directory / "events.jsonl", directory / "state"
    bits, every = options.bits[-1], options.every
    Simulation(5_000, seed=1).write_jsonl(log)
    make_topics(servers)
    replay(log, servers, TOPIC)
    publish(state, ["--topic", TOPIC, "--bootstrap-servers", servers], bits)
    touched = rows_of_intervals(bits, round(every * options.emulated_rate), options.deltas)
    learner = published_learner(state)
    assert learner.touched is not None
    chain = ChainWriter.on_published(state)
    store = DeltaStore(state)
    sink = kafka.KafkaSink(kafka.client_options(servers, {}))
    with contextlib.closing(sink), subscribed(servers, state) as followed:
        followed.wait_for(None, LOAD_SECONDS)
        began = now_ms()
        for number, rows in enumerate(touched, 1):
            learner.touched.put_back(rows)
            due_ms = began + round(1000 * every * number)
            time.sleep(max(0.0, (due_ms - now_ms()) / 1000))
            changes = {STEM: learner.take_changes()}
            payload = encode_payload(changes, "fp32")
            link = chain.link(
                changes,
                payload,
                ChainWriter.sha256(payload),
                closings(due_ms, every, options.emulated_rate),
            )
            store.write(link.data, link.header, payload)
            delta_topic.send(sink, DELTA_TOPIC, b"default", link.data, link.header, payload)
        followed.wait_for(link.header.rank.name, 60.0)
    return {"rate": options.emulated_rate, "bits": bits, **lags(followed, began)}


def make_topics(servers: str) -> None:
    """Create what is followed: a subscriber that finds no topic of deltas follows none."""
    client = kafka.client_options(servers, {})
    kafka.ensure_topic(client, TOPIC)
    kafka.ensure_topic(client, DELTA_TOPIC)
    kafka.ensure_topic(client, SNAPSHOT_TOPIC, compacted=True)


def closings(due_ms: int, every: float, rate: int) -> tuple[Closed, ...]:
    """Return when the windows of an interval closed: steadily, up to its end.

    >>> found = closings(5000, 5.0, 1000)
    >>> found[0], found[-1], len(found)
    (Closed(at_ms=100, examples=100), Closed(at_ms=5000, examples=100), 50)
    """
    step = round(1000 * every / _CLOSINGS)
    examples = round(every * rate / _CLOSINGS)
    return tuple(
        Closed(due_ms - step * number, examples) for number in range(_CLOSINGS - 1, -1, -1)
    )


def rows_of_intervals(bits: int, examples: int, count: int) -> list[npt.NDArray[np.uint32]]:
    """Return the rows that so many examples touch, for each of `count` intervals."""
    law = delta_sizes.Law()
    touched = Touched(1 << bits)
    found = []
    for number in range(count):
        for ids in delta_sizes.chunks(law, rows=1 << bits, examples=examples, seed=number):
            touched.mark(ids)
        found.append(touched.take())
    return found


# -- percentiles ---------------------------------------------------------------------------------


def lags(followed: Followed, since_ms: int) -> Result:
    """Return the percentiles of the lags in seconds, and the sizes of the deltas.

    Those examples count whose windows closed after `since_ms`, of which there must be some.
    """
    at_ms, headers = followed.at_ms, followed.headers
    closed = {
        name: [each for each in header.closed if each.at_ms > since_ms]
        for name, header in headers.items()
    }
    names = sorted(name for name, found in closed.items() if found)
    pairs = [(at_ms[name] - each.at_ms, each.examples) for name in names for each in closed[name]]
    stages = {
        "created": [(at_ms[name] - headers[name].created_ms) / 1000 for name in names],
        "learned": [(at_ms[name] - headers[name].learned_ms) / 1000 for name in names],
    }
    return {
        "deltas": len(names),
        "examples": sum(count for _, count in pairs),
        "rows": float(np.mean([sum(headers[name].rows.values()) for name in names])),
        "bytes": float(np.mean([headers[name].payload_bytes for name in names])),
        **{f"p{share}": percentile(pairs, share / 100) for share in (50, 90, 99)},
        "longest": max(lag for lag, _ in pairs) / 1000,
        "since_created_p50": float(np.median(stages["created"])),
        "since_learned_p50": float(np.median(stages["learned"])),
    }


def percentile(pairs: Sequence[tuple[int, int]], share: float) -> float:
    """Return a percentile in seconds of lags in milliseconds, each with its number of examples.

    >>> percentile([(1000, 50), (2000, 49), (9000, 1)], 0.5)
    1.0
    >>> percentile([(1000, 50), (2000, 48), (9000, 2)], 0.99)
    9.0
    """
    ordered = sorted(pairs)
    reached = np.cumsum([count for _, count in ordered])
    index = int(np.searchsorted(reached, share * reached[-1]))
    return ordered[min(index, len(ordered) - 1)][0] / 1000


def table(results: Result) -> str:
    rows: list[list[object]] = []
    for name in ("real", "emulated"):
        found = results[name]
        goal = found["p50"] <= GOAL_P50 and found["p99"] <= GOAL_P99
        rows.append(
            [
                f"{name}, 2^{found['bits']} rows" if "bits" in found else name,
                *(f"{found['rate']:,.0f}", found["deltas"], f"{found['examples']:,}"),
                *(f"{found['rows']:,.0f}", f"{found['bytes'] / 1e6:.1f}"),
                *(f"{found[key]:.2f}" for key in ("p50", "p90", "p99", "longest")),
                f"{found['since_created_p50']:.2f}",
                "met" if goal else "missed",
            ]
        )
    header = ["", "examples/s", "deltas", "examples", "rows a delta", "MB", "p50, s", "p90", "p99"]
    return formatted(
        [
            *(*header, "longest", "of it since the copy, p50"),
            f"goal: p50 {GOAL_P50:g} s, p99 {GOAL_P99:g} s",
        ],
        rows,
    )
