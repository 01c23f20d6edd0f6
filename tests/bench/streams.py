"""Topics of impressions and clicks, each on its own broker, for the cases that read Kafka."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
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
_CLICK_LOGIT = -3.0
_CLICK_EFFECT = 0.25
_CLICK_MEDIAN_SECONDS = 20.0
_CLICK_SIGMA = 1.462
_MOST_TEXTS = 1 << 18  # distinct values of a field
_KNUTH = 2654435761  # scatters ranks over the 32-bit numbers
_MASK32 = 0xFFFFFFFF
_EVENTS_PER_IMPRESSION = 1.07


class WideLog(Log):
    """Simulated impressions with 13 numbers and 26 short texts, about 620 bytes of JSON each.

    The fields have the cardinalities of `zipf`. There are `rate` impressions a second of event
    time. About one in twenty is clicked, after 20 s in the median. Which ones depends on their
    categories, so that there is something to learn.
    """

    format = "wide"

    def __init__(self, impressions: int, *, seed: int = 0, rate: float = 1000.0) -> None:
        numeric = [Field(f"I{i + 1}", "numeric") for i in range(len(zipf.NUMERIC))]
        categorical = [Field(f"C{i + 1}", "categorical") for i in range(len(zipf.CATEGORICAL))]
        super().__init__(None, (*categorical, *numeric), name=f"wide-{seed}")
        self.impressions = impressions
        self.seed = seed
        self.rate = rate

    def _read(self) -> Iterator[LogBatch]:
        return merge_clicks(self._impressions())

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        rng = np.random.default_rng(self.seed)
        delays = ClickDelays(rng, _CLICK_MEDIAN_SECONDS, _CLICK_SIGMA)
        for first in range(0, self.impressions, _BLOCK):
            row = np.arange(first, min(first + _BLOCK, self.impressions))
            time = DEFAULT_START_MS + (row * (1000 / self.rate)).astype(np.int64)
            number = pa.array(row).cast(pa.string())
            identity = pc.binary_join_element_wise(f"wide{self.seed}-", number, "")
            features, odd = self._features(rng, len(row))
            click_time = delays.click_time(time, rng.random(len(row)) < _click_shares(odd))
            yield impression_batch(identity, time, click_time, features)

    def _features(
        self, rng: np.random.Generator, n: int
    ) -> tuple[dict[str, pa.Array], npt.NDArray[np.int64]]:
        """Return the fields of `n` impressions, and how many of their categories are odd."""
        features: dict[str, pa.Array] = {}
        odd = np.zeros(n, np.int64)
        for i, size in enumerate(zipf.CATEGORICAL):
            ranks = zipf.ranks(rng, min(size, _MOST_TEXTS), n)
            odd += ranks % 2
            texts = [f"{(rank * _KNUTH + i) & _MASK32:08x}" for rank in ranks.tolist()]
            features[f"C{i + 1}"] = pa.array(texts)
        for i in range(len(zipf.NUMERIC)):
            numbers = np.floor(np.exp(3 * rng.random(n) ** 2 * (1 + i % 3)))
            features[f"I{i + 1}"] = pa.array(numbers, pa.int64())
        return features, odd


def _click_shares(odd: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return click probabilities: each odd category multiplies the odds by the same factor."""
    return 1 / (1 + np.exp(-(_CLICK_LOGIT + _CLICK_EFFECT * (odd - len(zipf.CATEGORICAL) / 2))))


STREAMS: dict[str, Callable[[int], Log]] = {"simulated": Simulation, "wide": WideLog}


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic with `events` JSON events on `PARTITIONS` partitions, by impression id.

    `log` is the file that was replayed to it.
    """

    servers: str
    broker: str
    name: str
    events: int
    fields: tuple[Field, ...]
    log: Path

    @property
    def options(self) -> list[str]:
        """The options that tell a contender the broker and the topic."""
        return ["--servers", self.servers, "--topic", self.name]

    @property
    def run_options(self) -> list[str]:
        """The options that tell `stream-ctr run` the fields."""
        options: list[str] = []
        for kind in ("categorical", "numeric"):
            names = ",".join(field.name for field in self.fields if field.kind == kind)
            options += ["-X", f"features.{kind}={names}"]
        return options

    @property
    def event_bytes(self) -> int:
        """The mean size of an event in JSON."""
        return round(self.log.stat().st_size / self.events)

    def replay(self, topic: str, *options: str) -> None:
        """Replay the same events to another topic of the broker."""
        replay(self.log, self.servers, topic, "--partitions", str(PARTITIONS), *options)


@contextmanager
def filled_topic(
    stream: str, events: int, directory: Path, *, embedded: bool = False
) -> Iterator[Topic]:
    """Yield a topic with about so many events of the stream.

    The broker runs as long as the context. It is Apache Kafka if one is installed and `embedded` is
    false.
    """
    with broker(directory / "kafka", embedded=embedded) as (servers, described):
        log = STREAMS[stream](round(events / _EVENTS_PER_IMPRESSION))
        path = directory / f"{stream}.jsonl"
        count = log.write_jsonl(path)
        assert log.fields is not None
        topic = Topic(servers, described, "events", count, log.fields, path)
        topic.replay(topic.name)
        yield topic


def replay(log: Path, servers: str, topic: str, *options: str) -> None:
    stream_ctr("replay", str(log), "--topic", topic, "--bootstrap-servers", servers, *options)


def stream_ctr(*arguments: str) -> None:
    """Run a command of stream-ctr. Raises `NotRun` with its last message when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "stream_ctr", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        messages = done.stderr.strip().splitlines() or ["no message"]
        raise NotRun(
            f"stream-ctr {arguments[0]} ended with status {done.returncode}: {messages[-1]}"
        )


@contextmanager
def broker(directory: Path, *, embedded: bool) -> Iterator[tuple[str, str]]:
    """Run a broker and yield (bootstrap servers, its name and version)."""
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
