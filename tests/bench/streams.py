"""Topics of impressions and clicks for the cases that read Kafka, on a broker of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from support.brokers import ApacheBroker, KafkaMissing, find_kafka

from bench import zipf
from bench.environments import ROOT, NotRun
from stream_ctr.connectors.embedded import EmbeddedBroker, embedded_version
from stream_ctr.events.field import Field
from stream_ctr.logs.log import (
    DEFAULT_START_MS,
    ClickDelays,
    Log,
    LogBatch,
    impression_batch,
    merge_clicks,
)
from stream_ctr.logs.simulate import Simulation

PARTITIONS = 2
_BLOCK = 8192


class WideLog(Log):
    """Impressions of 13 numbers and 26 short texts, some 620 bytes of JSON, with the cardinalities of `zipf`: `rate` a second of event
    time, one in twenty clicked, after 20 s in the median."""

    format = "wide"

    def __init__(self, impressions: int, *, seed: int = 0, rate: float = 1000.0) -> None:
        numeric = [Field(f"I{i + 1}", "numeric") for i in range(len(zipf.NUMERIC))]
        categorical = [Field(f"C{i + 1}", "categorical") for i in range(len(zipf.CATEGORICAL))]
        super().__init__(None, (*categorical, *numeric), name=f"wide-{seed}")
        self.impressions, self.seed, self.rate = impressions, seed, rate

    def _read(self) -> Iterator[LogBatch]:
        return merge_clicks(self._impressions())

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        rng = np.random.default_rng(self.seed)
        delays = ClickDelays(rng, 20.0, 1.462)
        for first in range(0, self.impressions, _BLOCK):
            row = np.arange(first, min(first + _BLOCK, self.impressions))
            time = DEFAULT_START_MS + (row * (1000 / self.rate)).astype(np.int64)
            identity = pc.binary_join_element_wise(
                f"wide{self.seed}-", pa.array(row).cast(pa.string()), ""
            )
            yield impression_batch(
                identity,
                time,
                delays.click_time(time, rng.random(len(row)) < 0.05),
                self._features(rng, len(row)),
            )

    def _features(self, rng: np.random.Generator, n: int) -> dict[str, pa.Array]:
        features: dict[str, pa.Array] = {}
        for i, size in enumerate(zipf.CATEGORICAL):
            ranks = zipf.ranks(rng, min(size, 1 << 18), n)
            features[f"C{i + 1}"] = pa.array(
                [f"{(rank * 2654435761 + i) & 0xFFFFFFFF:08x}" for rank in ranks.tolist()]
            )
        for i in range(len(zipf.NUMERIC)):
            features[f"I{i + 1}"] = pa.array(
                np.floor(np.exp(3 * rng.random(n) ** 2 * (1 + i % 3))), pa.int64()
            )
        return features


STREAMS: dict[str, Callable[[int], Log]] = {"simulated": Simulation, "wide": WideLog}


@dataclass(frozen=True, slots=True)
class Topic:
    """`events` events, JSON, on `PARTITIONS` partitions by impression id; `log` is where they came from."""

    servers: str
    broker: str
    name: str
    events: int
    fields: tuple[Field, ...]
    log: Path

    @property
    def options(self) -> list[str]:
        """Where a contender finds it."""
        return ["--servers", self.servers, "--topic", self.name]

    @property
    def run_options(self) -> list[str]:
        """Of `stream-ctr run`: the fields."""
        kinds = {
            kind: ",".join(field.name for field in self.fields if field.kind == kind)
            for kind in ("categorical", "numeric")
        }
        return [
            word for kind, names in kinds.items() for word in ("-X", f"features.{kind}={names}")
        ]

    @property
    def event_bytes(self) -> int:
        """Of JSON, on average."""
        return round(self.log.stat().st_size / self.events)

    def replay(self, topic: str, *options: str) -> None:
        """The same events to another topic of the broker."""
        replay(self.log, self.servers, topic, "--partitions", str(PARTITIONS), *options)


@contextmanager
def filled_topic(
    stream: str, events: int, directory: Path, *, embedded: bool = False
) -> Iterator[Topic]:
    """About so many events of the stream on a broker that lives as long as the context: Apache Kafka where there is one."""
    with _broker(directory / "kafka", embedded=embedded) as (servers, broker):
        log = STREAMS[stream](round(events / 1.07))
        path = directory / f"{stream}.jsonl"
        count = log.write_jsonl(path)
        assert log.fields is not None
        topic = Topic(servers, broker, "events", count, log.fields, path)
        topic.replay(topic.name)
        yield topic


def replay(log: Path, servers: str, topic: str, *options: str) -> None:
    stream_ctr("replay", str(log), "--topic", topic, "--bootstrap-servers", servers, *options)


def stream_ctr(*arguments: str) -> None:
    """The command. Raises `NotRun`, with what it said last, when it does not end well."""
    done = subprocess.run(
        [sys.executable, "-m", "stream_ctr", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said: Sequence[str] = done.stderr.strip().splitlines() or ["nothing"]
        raise NotRun(
            f"stream-ctr {arguments[0]} ended with status {done.returncode} and said: {said[-1]}"
        )


@contextmanager
def _broker(directory: Path, *, embedded: bool) -> Iterator[tuple[str, str]]:
    """(bootstrap servers, what it is)."""
    try:
        installation = None if embedded else find_kafka()
    except KafkaMissing:
        installation = None
    if installation:
        with ApacheBroker(installation, directory) as apache:
            yield apache.bootstrap_servers, f"Apache Kafka {installation.version}"
    else:
        with EmbeddedBroker() as tansu:
            yield tansu.bootstrap_servers, f"embedded Tansu {embedded_version()}"
