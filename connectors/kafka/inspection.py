"""A look at a cluster without changing it: brokers, topics, rights, and a sample of records.

Nothing here writes a record, creates a topic or commits an offset. The sample keeps keys and
codecs, which a source does not need, and makes an object of each record, so it is for a few
thousand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError, RetriableError

from stream_ctr.connectors.errors import KafkaReadFailed
from stream_ctr.connectors.kafka import inside, timeouts
from stream_ctr.connectors.kafka.client import open_admin, open_consumer
from stream_ctr.connectors.kafka.codecs import check_codecs
from stream_ctr.connectors.kafka.consumer_reader import assign_all, find_ends
from stream_ctr.connectors.kafka.record_batches import DamagedBatch

_POLL_MS = 250
_CODEC_NAMES = {0: "none", 1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """A topic: the number of its partitions, and those that no broker leads.

    `rights` are the names of the operations that this client may do, None where brokers do not
    say. `settings` are the configuration, empty where it may not be read.
    """

    partitions: int
    leaderless: tuple[int, ...]
    rights: frozenset[str] | None
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """A cluster: the number of its brokers, the release that they speak, and the time of an answer.

    `rights` are those on the cluster, None where brokers do not say. `topics` has those that exist
    and may be described.
    """

    brokers: int
    release: str
    seconds: float
    rights: frozenset[str] | None
    topics: Mapping[str, TopicFacts]


def survey(client: Mapping[str, object], topics: Sequence[str]) -> ClusterFacts:
    """Describe the cluster, and these topics as far as they exist.

    Raises `KafkaUnreachable` and `KafkaFailure`.
    """
    with open_admin(client) as admin:
        began = time.monotonic()
        # All topics: to ask for one by name creates it where brokers create topics by themselves.
        described = {topic["name"]: topic for topic in admin.describe_topics()}
        seconds = time.monotonic() - began
        cluster = admin.describe_cluster()
        brokers = [each["broker_id"] for each in cluster["brokers"]]
        return ClusterFacts(
            brokers=len(brokers),
            release=_release(admin, brokers),
            seconds=seconds,
            rights=_rights(cluster),
            topics={
                name: _topic_facts(admin, described[name])
                for name in dict.fromkeys(topics)
                if name in described
            },
        )


def _topic_facts(admin: Any, described: Mapping[str, Any]) -> TopicFacts:
    partitions = described["partitions"]
    return TopicFacts(
        partitions=len(partitions),
        leaderless=tuple(each["partition_index"] for each in partitions if each["leader_id"] < 0),
        rights=_rights(described),
        settings=_settings(admin, described["name"]),
    )


def _release(admin: Any, brokers: Sequence[int]) -> str:
    """Return the release whose protocol the brokers speak, "unknown" if they do not say."""
    try:
        version = admin.get_broker_version_data(brokers[0]).broker_version
    except (AttributeError, IndexError, KafkaError):
        return "unknown"
    return ".".join(map(str, version))


def _rights(described: Mapping[str, Any]) -> frozenset[str] | None:
    names = described.get("authorized_operations")
    return None if names is None else frozenset(names)


def _settings(admin: Any, topic: str) -> Mapping[str, str]:
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    try:
        found = admin.describe_configs([resource], config_filter="all")
    except (KafkaError, KeyError):  # a principal that may read need not describe the configuration
        return {}
    named = found.get("topic", {}).get(topic, {})
    return {key: str(entry["value"]) for key, entry in named.items() if "value" in entry}


@dataclass(slots=True)
class Sample:
    """n records of some topics, in order within each partition.

    `topic` names the topic of each, `time` is the broker's time in epoch milliseconds (-1 unknown).
    `codecs` has the names of the codecs of their batches, None if the client does not show them.
    """

    topic: list[str] = field(default_factory=list)
    partition: list[int] = field(default_factory=list)
    time: list[int] = field(default_factory=list)
    key: list[bytes | None] = field(default_factory=list)
    value: list[bytes | None] = field(default_factory=list)
    codecs: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self.value)

    @property
    def values(self) -> pa.LargeBinaryArray:
        return pa.array(self.value, pa.large_binary())

    @property
    def received(self) -> npt.NDArray[np.int64]:
        return np.array(self.time, np.int64)


def newest_records(
    client: Mapping[str, object], topics: Sequence[str], *, most: int, seconds: float = 10.0
) -> Sample:
    """Return the newest `most` records of the topics, shared among their partitions.

    It reads for at most `seconds`. Raises `KafkaUnreachable`, `KafkaTopicMissing`,
    `KafkaCodecMissing` and `KafkaReadFailed`.
    """
    check_codecs()
    sample = Sample()
    with closing(open_consumer(client, auto_offset_reset="earliest")) as consumer:
        noted: set[int] | None = None
        if not inside.why_not_bounded(consumer):
            noted = inside.note_codecs(consumer)
        assigned = assign_all(consumer, topics, client)
        ends = dict(zip(assigned, find_ends(consumer, assigned, client), strict=True))
        answer_ms = timeouts.milliseconds(timeouts.ANSWER_SECONDS)
        beginnings = consumer.beginning_offsets(assigned, timeout_ms=answer_ms)
        share = max(most // len(assigned), 1)
        for partition, end in ends.items():
            consumer.seek(partition, max(int(end) - share, beginnings[partition]))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            (consumer.position(partition, timeout_ms=0) or 0) < end
            for partition, end in ends.items()
        ):
            _add(sample, consumer)
    sample.codecs = None if noted is None else frozenset(_codec_name(codec) for codec in noted)
    return sample


def _codec_name(codec: int) -> str:
    return _CODEC_NAMES.get(codec, f"codec {codec}")


def _add(sample: Sample, consumer: Any) -> None:
    try:
        polled = consumer.poll(timeout_ms=_POLL_MS)
    except RetriableError:
        return
    except (KafkaError, DamagedBatch) as error:
        raise KafkaReadFailed(f"a sample cannot be read: {error}") from error
    for partition, records in polled.items():
        for record in records:
            sample.topic.append(partition.topic)
            sample.partition.append(partition.partition)
            sample.time.append(record.timestamp)
            sample.key.append(record.key)
            sample.value.append(record.value)
