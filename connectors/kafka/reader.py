"""The interface between a source, which keeps count of positions, and a client, which reads.

A `Reader` fetches from the positions that it is given and reports what it read and what it could
not read. `topic_source` decides what follows from a failure, once for all clients.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stream_ctr.connectors.errors import KafkaUnreachable
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.diagnosis import servers
from stream_ctr.connectors.kafka.positions import Mask, Offsets
from stream_ctr.connectors.kafka.topics import TopicNews
from stream_ctr.connectors.records import Records

ANSWER_DELAY_SECONDS = 1.0  # a broker may take that long for an answer without records


class FailureKind(enum.Enum):
    """The kinds of failures that trying again does not cure."""

    POSITION_REFUSED = enum.auto()  # the log does not hold the position
    LOG_TRUNCATED = enum.auto()  # the log does not hold the position, and retention is no reason
    DAMAGED = enum.auto()  # the records at the position cannot be decoded
    REFUSED = enum.auto()  # anything else that a broker or the client refuses
    UNEXPECTED = enum.auto()  # not an error of Kafka's


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure to read: its reason in words, with partition and position where they are known."""

    kind: FailureKind
    reason: str
    partition: int | None = None
    position: int = -1
    cause: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Polled:
    """Records, in order within each partition, with the positions [P] after them.

    The positions may lie further than the last record: control records and records of aborted
    transactions take offsets too. A failure comes after the records.
    """

    records: Records
    next_offset: Offsets
    failure: Failure | None = None


class Reader(Protocol):
    """A client that reads P partitions.

    All methods but `commit` are called by one thread at a time.
    """

    @property
    def partitions(self) -> tuple[tuple[str, int], ...]:
        """(topic, partition) of each partition."""

    @property
    def end(self) -> Offsets:
        """The end of each log [P] at the start: where fetching at the listed end led to."""

    @property
    def news(self) -> TopicNews:
        """News of the topics."""

    @property
    def leader_epoch(self) -> Offsets:
        """The leader epoch of the record before each position [P], or `UNKNOWN`.

        `poll` moves it on, and a source sets it where it moves a position. When `read_on` begins to
        fetch, the client asks brokers where their log of that epoch ends: a position beyond it is
        `LOG_TRUNCATED`.
        """

    def beginning(self) -> Offsets:
        """Return the first offset of each log [P]. Raises `KafkaUnreachable`."""

    def listed_end(self) -> Offsets:
        """Return the end of each log [P] as brokers list it. Raises `KafkaUnreachable`."""

    def reported_end(self) -> Offsets:
        """Return the ends [P] that came with fetched records, or `UNKNOWN`; asks no broker."""

    def read_on(self, next_offset: Offsets, wanted: Mask, again: Collection[int]) -> None:
        """Fetch the wanted partitions [P] and no others, from their positions [P] on.

        Partitions that are fetched already go on, except those in `again`, which start anew.
        """

    def poll(self, next_offset: Offsets, timeout_seconds: float) -> Polled:
        """Return the next records after the positions [P]; none when none came in time."""

    def end_of_damage(self, failure: Failure) -> int | None:
        """Return the first offset after a damaged batch; None when it cannot be found in time.

        It may stop fetching, which `read_on` begins again.
        """

    def silent_seconds(self, wanted: Mask) -> float:
        """Return for how long no broker has answered for one of the wanted partitions [P]."""

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Write the group's committed offsets; a failure is a warning in the log."""

    def close(self) -> None:
        """Close all connections."""


def log_truncated(partition: tuple[str, int], end: int, epoch: int) -> Failure:
    """Return the failure of a log that does not hold the records before the position any more.

    `end` is where the log of `epoch` ends, the newest that is not after the position's; -1 where
    the log knows no such epoch.
    """
    topic, number = partition
    ends = f"of leader epoch {epoch} it holds the offsets before {end} alone"
    reason = (
        f"partition {number} of topic {topic!r} lost records that were read already: by an unclean "
        "leader election, with a broker's disk, or because the topic was created again "
        f"({ends if end >= 0 else 'its log begins anew'})"
    )
    return Failure(FailureKind.LOG_TRUNCATED, reason)


def array_of(offsets: Mapping[int, int]) -> Offsets:
    """Return offsets by index as an array [P].

    >>> array_of({0: 7, 1: 9}).tolist()
    [7, 9]
    """
    return np.array([offsets[index] for index in range(len(offsets))], np.int64)


def brokers_silent(
    client: Mapping[str, object], advertised: str, reason: object
) -> KafkaUnreachable:
    """Return the error for brokers that answered once, by the addresses they advertise."""
    return KafkaUnreachable(
        f"the brokers of {servers(client)} ({advertised}) did not answer within "
        f"{timeouts.ANSWER_SECONDS:g} s: check that they run, that what they advertise can be "
        f"reached from here (advertised.listeners) and that every partition has a leader: {reason}"
    )


def news_seconds(client: Mapping[str, object], seconds: float) -> float:
    """Return how often to ask for news of topics: `seconds`, or the client's metadata.max.age.ms.

    >>> news_seconds({"metadata_max_age_ms": 1000}, 30.0)
    1.0
    """
    most_ms = client.get("metadata_max_age_ms")
    return seconds if most_ms is None else min(seconds, float(str(most_ms)) / 1000)
