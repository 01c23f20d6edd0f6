"""Kafka as a source of records through librdkafka. The only file that imports its client; optional (`pip install 'stream-ctr[confluent]'`).

The client is confluent-kafka, because librdkafka fetches, verifies and unpacks in threads of its own that hold no lock of Python's. It
hands out an object for each record; what is done with them here is mapped in C. It has traps too, which is why this file

- reads without a group, though the client wants to be given one: partitions are assigned by hand, at offsets that the caller owns;
- has a partition that shall wait unassigned, and assigns it at its position when it flows again: so there is one truth about where
  reading goes on, and what had been fetched before is not handed out later. It is fetched again;
- asks for the event that a partition was read to its end: records alone do not tell of aborted ones and control records at the end;
- finds the end of a log by fetching at the listed one, since brokers exist that list one too low;
- lets it fetch again 10 ms after its queue was full. By itself it waits for a second;
- passes over a damaged batch by looking where it ends, since the client stays before it for good;
- tells from the client's statistics whether brokers are silent. It reports lost connections, but no broker that keeps one and is mute.

A batch of zstd expands to `MAX_BATCH_BYTES` at most, or it is damage; for the other codecs the client has no such limit.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.connectors.errors import (
    KafkaOptionError,
    KafkaReadFailed,
    KafkaUnreachable,
    PositionLost,
)
from stream_ctr.connectors.kafka_diagnosis import (
    explain_silence,
    servers,
    topic_missing,
    warn_of_plaintext,
)
from stream_ctr.connectors.kafka_options import librdkafka_options
from stream_ctr.connectors.kafka_topics import (
    Doubt,
    KnownTopics,
    Topics,
    deleted_before,
    what_is_lost,
)
from stream_ctr.connectors.records import POLL_BYTES, Records

__all__ = ["ConfluentSource"]

log = logging.getLogger(__name__)
log_of_client = logging.getLogger("kafka.librdkafka")

BOOTSTRAP_SECONDS = 5.0  # for the first answer of a broker
ANSWER_SECONDS = 5.0  # for what is asked of a broker that answered before
MAX_BATCH_BYTES = 512 << 20  # of what a batch of zstd may expand to

Message = Any  # confluent_kafka.Message


class ConfluentSource:
    """All partitions of the topics as columns, from the beginning unless told otherwise by `seek`: `KafkaSource` with another client.

    Its arguments, `client` too, and what every method does are as there. Raises `KafkaOptionError` also for options that librdkafka does
    not take, and when confluent-kafka is not installed.
    """

    def __init__(
        self,
        topics: Sequence[str],
        *,
        client: Mapping[str, object],
        group: str,
        until_end: bool = False,
        max_record_bytes: int = 1 << 20,
        on_lost: Literal["stop", "skip"] = "stop",
        topic_check_seconds: float = 30.0,
    ) -> None:
        self._library = _library()
        self.until_end = until_end
        self._max_record_bytes = max_record_bytes
        self._skip_lost = on_lost == "skip"
        self._group = group
        self._most_records = int(str(client.get("max_poll_records", _POLL_RECORDS)))
        self._paused: frozenset[int] = frozenset()
        self._reading: frozenset[int] = frozenset()
        self._failed: Message | None = None
        self._answers = _Answers()
        asked_every = float(str(client.get("metadata_max_age_ms", np.inf))) / 1000
        self._consumer = self._open(client)
        try:
            self._cluster = _Cluster(self._library, client)
            self.partitions = self._cluster.partitions(topics)
            self._index = {partition: index for index, partition in enumerate(self.partitions)}
            self._assigned = [
                self._library.TopicPartition(*partition) for partition in self.partitions
            ]
            self._doubt: Doubt | None = None
            self._lost = np.zeros(len(self.partitions), np.int64)
            self._highwater = np.zeros(len(self.partitions), np.int64)
            self._topics = _TopicWatch(self._cluster, topics, min(topic_check_seconds, asked_every))
            self._position = self._recorded_end = self._offsets(self.ends())
            self._recorded_end = self._find_ends()
            self._position = self._offsets(self.beginning())
            self._read_on(again=range(len(self.partitions)))
        except BaseException:
            self._consumer.close()
            raise

    def poll(self, timeout_seconds: float) -> Records:
        """The next records, in order within each partition; empty when none came in time.

        Raises `PositionLost` when retention removed what comes next, `TopicChanged` when the topic is no longer the one that reading began
        with, and `KafkaReadFailed` for what trying again does not cure, such as a damaged batch.
        """
        if self.finished:
            return Records.empty()
        self._topics.look()
        if self._failed:
            self._recover()
        if self._doubt:
            self._settle(self._doubt)
            return Records.empty()
        records = _joined([self._columns(messages) for messages in self._consume(timeout_seconds)])
        np.maximum.at(self._position, records.partition, records.offset + 1)
        if self._failed:
            # What the client has in hand after the failure is another matter; it comes again.
            self._read_on(again=range(len(self.partitions)))
        if self.until_end:
            self._read_on()
            records = records.before(self._recorded_end)
        return records

    def positions(self) -> dict[int, int]:
        """The next offset to read of each partition, after what `poll` has returned."""
        read = np.minimum(self._position, self._recorded_end) if self.until_end else self._position
        return dict(enumerate(read.tolist()))

    def seek(self, positions: Mapping[int, int], skip_lost: bool | None = None) -> None:
        """Read on at these offsets; partitions not named stay where they are.

        Where records were deleted, `skip_lost` goes on at the first that is left (as `on_lost` says unless given). Raises `PositionLost`
        otherwise, and always when the log ends before such a position: that is not the log that was read.
        """
        wanted = self._position.copy()
        wanted[list(positions)] = list(positions.values())
        if self._skip_lost if skip_lost is None else skip_lost:
            wanted = self._pass_over_deleted(wanted)
        if lost := self._what_is_lost(wanted):
            raise PositionLost("; ".join(lost))
        moved = np.flatnonzero(wanted != self._position).tolist()
        self._position = wanted
        self._failed = self._doubt = None
        self._read_on(again={*positions, *moved})

    def lost(self) -> dict[int, int]:
        """How many offsets of each partition were passed over because they were deleted or damaged; 0 unless told to skip them."""
        return dict(enumerate(self._lost.tolist()))

    def topic_ids(self) -> dict[str, str | None]:
        """The id of each topic when the source was opened: another one under the same name has another. None from brokers without ids."""
        return self._topics.ids

    def silent_seconds(self) -> float:
        """For how long the brokers have not answered for a partition that was asked for; 0 while they do, also when they have no records.

        A partition without a leader is silent too. What is not polled is not asked for.
        """
        return self._answers.silent_seconds(
            [self.partitions[index] for index in np.flatnonzero(~self._quiet()).tolist()]
        )

    def beginning(self) -> dict[int, int]:
        """The first offset that each partition's log still holds; asks the broker."""
        return self._cluster.offsets(self._assigned, self._library.admin.OffsetSpec.earliest())

    def ends(self) -> dict[int, int]:
        """The offset after the last record of each partition's log; asks the broker."""
        listed = self._cluster.offsets(self._assigned, self._library.admin.OffsetSpec.latest())
        return {
            index: max(end, told)
            for (index, end), told in zip(listed.items(), self._told_ends().tolist(), strict=True)
        }

    def pause(self, partitions: Collection[int]) -> None:
        """Exactly these partitions yield nothing from now on; all others flow."""
        self._paused = frozenset(partitions)
        self._read_on()

    def caught_up(self) -> npt.NDArray[np.bool_]:
        """Of each partition [P], whether all was read: up to the recorded end, or else up to the last end that the broker told.

        Asks nobody. An open transaction at the end of a partition keeps it false: there are records that may not be read yet.
        """
        return self._position >= (self._recorded_end if self.until_end else self._told_ends())

    def lag(self) -> int:
        """How many offsets of all partitions are not read yet, by the last ends that the broker told."""
        return int(np.maximum(self._told_ends() - self._position, 0).sum())

    @property
    def finished(self) -> bool:
        """Whether all was read of a source that ends."""
        return self.until_end and bool(self.caught_up().all())

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tell the group's committed offsets, for tools that show lag. Advisory: a failure is a warning in the log."""
        offsets = [self._at(index, offset) for index, offset in positions.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except self._library.KafkaException as error:
            self._committed(error.args[0], [])

    def close(self) -> None:
        self._consumer.close()

    # -- between librdkafka and columns -----------------------------------------------------------

    def _open(self, client: Mapping[str, object]) -> Any:
        callbacks = {
            "stats_cb": self._answers.note,
            "on_commit": self._committed,
            "error_cb": lambda error: None,
        }
        options = {
            **_DEFAULTS,
            **librdkafka_options(client),
            **_RULES,
            "group.id": self._group,
            **callbacks,
        }
        return _make(self._library, self._library.Consumer, options)

    def _committed(self, error: Any, partitions: Sequence[Any]) -> None:
        failed = error or next(
            (partition.error for partition in partitions if partition.error), None
        )
        if failed:
            log.warning(
                "the committed offsets of group %r are behind: %s", self._group, failed.str()
            )

    def _consume(self, timeout_seconds: float) -> Iterator[list[Message]]:
        """What is there, or else the first that comes in time; in pieces, and up to the first failure, which is kept.

        The piece that reaches `POLL_BYTES` is the last.
        """
        left, room = self._most_records, POLL_BYTES
        # Asked for many, the client waits for as many: so it is asked for what is there, and waits for one at most.
        messages = self._consumer.consume(min(left, _AT_ONCE), 0.0) or self._consumer.consume(
            1, timeout_seconds
        )
        while messages:
            left -= len(messages)
            room -= sum(map(len, messages))
            yield (
                self._heed(messages)
                if any(map(self._library.Message.error, messages))
                else messages
            )
            messages = (
                self._consumer.consume(min(left, _AT_ONCE), 0.0)
                if left and room > 0 and not self._failed
                else []
            )

    def _heed(self, messages: Sequence[Message]) -> list[Message]:
        """The records up to the first failure, which is kept; ends of partitions move their positions."""
        records = []
        for message in messages:
            error = message.error()
            if error is None:
                records.append(message)
            elif error.code() == self._library.KafkaError._PARTITION_EOF:
                index = self._index_of(message)
                self._position[index] = max(self._position[index], message.offset())
            elif not self._passes(error, message):
                self._failed = message
                break
        return records

    def _passes(self, error: Any, message: Message) -> bool:
        """Whether an error is over by itself; those of no partition are the group's, which is not read from, or a connection's."""
        if error.fatal():
            return False
        if error.name() in _TOPIC_UNKNOWN:
            self._topics.look_soon()
            return True
        return (
            error.retriable()
            or error.name() in _PASSING
            or (message.topic(), message.partition()) not in self._index
        )

    def _columns(self, messages: list[Message]) -> Records:
        kind, count = self._library.Message, len(messages)
        values = list(map(kind.value, messages))
        if max(map(len, messages), default=0) > self._max_record_bytes:
            values = [value and value[: self._max_record_bytes + 1] for value in values]
        whose = zip(map(kind.topic, messages), map(kind.partition, messages), strict=True)
        return Records(
            partition=np.fromiter(map(self._index.__getitem__, whose), np.int32, count),
            offset=np.fromiter(map(kind.offset, messages), np.int64, count),
            time=np.fromiter(map(itemgetter(1), map(kind.timestamp, messages)), np.int64, count),
            value=pa.array(values, pa.large_binary()),
        )

    def _read_on(self, *, again: Collection[int] = ()) -> None:
        """Fetch what is not quiet from its position on, and nothing else; `again` also where it is fetched already."""
        wanted = frozenset(np.flatnonzero(~self._quiet()).tolist())
        ended = self._reading & (frozenset(again) | (self._reading - wanted))
        if ended:
            self._consumer.incremental_unassign([self._assigned[index] for index in ended])
        if begun := wanted - (self._reading - ended):
            self._consumer.incremental_assign(
                [self._at(index, int(self._position[index])) for index in sorted(begun)]
            )
        self._reading = wanted

    def _quiet(self) -> npt.NDArray[np.bool_]:
        """The partitions [P] that are not read: told to wait, or at the end."""
        quiet = self.caught_up() if self.until_end else np.zeros(len(self.partitions), np.bool_)
        quiet[list(self._paused)] = True
        return quiet

    def _told_ends(self) -> npt.NDArray[np.int64]:
        """The end of each partition [P] as the last answer to a fetch told it, open transactions included."""
        for index, partition in enumerate(self._assigned):
            self._highwater[index] = max(
                self._highwater[index],
                self._consumer.get_watermark_offsets(partition, cached=True)[1],
            )
        return self._highwater

    def _find_ends(self) -> npt.NDArray[np.int64]:
        """The end of each partition's log [P]: where fetching at the listed end leads to."""
        ends = self._position.copy()
        self._consumer.assign([self._at(index, end) for index, end in enumerate(ends.tolist())])
        told: dict[
            int, int
        ] = {}  # by the first answer. Where a producer goes on, no answer tells that this was all
        deadline = time.monotonic() + ANSWER_SECONDS
        while any(
            index not in told or end < told[index] for index, end in enumerate(ends.tolist())
        ):
            if time.monotonic() > deadline:
                raise self._cluster.silent("no answer to fetching")
            for message in self._consumer.consume(_AT_ONCE, 0.02):
                if (index := self._index.get((message.topic(), message.partition()))) is None:
                    continue
                if not message.error():
                    ends[index] = max(ends[index], message.offset() + 1)
                    if index not in told:
                        told[index] = self._told_ends()[index]
                elif message.error().code() == self._library.KafkaError._PARTITION_EOF:
                    told[index] = ends[index] = max(ends[index], message.offset())
                elif not self._passes(message.error(), message):
                    raise KafkaReadFailed(
                        f"reading {self._names()} failed: {message.error().str()}"
                    )
        self._consumer.unassign()
        return ends

    # -- what cannot be read ----------------------------------------------------------------------

    def _recover(self) -> None:
        """Go past what cannot be read, where that is wanted and possible; raises what to tell otherwise."""
        message, self._failed = self._failed, None
        assert message is not None, "there was a failure"
        error, index = message.error(), self._index_of(message)
        if self._quiet()[index]:
            return  # it fails again when it is read on
        if error.name() in _POSITION_GONE:
            if 0 <= message.offset() != self._position[index]:
                return  # that it failed before it was sent elsewhere
            self._doubt = Doubt(error.str(), retention=error.name() != "_LOG_TRUNCATION")
        elif error.name() in _DAMAGE:
            self._recover_damage(index, message)
        else:
            raise KafkaReadFailed(f"reading {self._names()} failed: {error.str()}")

    def _settle(self, doubt: Doubt) -> None:
        """Go on after what retention deleted, where that is wanted; raises what is known, and waits for it until then."""
        self._topics.look(wait_for_it=True)
        try:
            explained = doubt.explained(
                self._position.tolist(), self.beginning(), self.ends(), now=time.monotonic()
            )
            if not explained and not doubt.over:
                time.sleep(_BETWEEN_SECONDS)
                return
            wanted = (
                self._pass_over_deleted(self._position)
                if explained and self._skip_lost
                else self._position
            )
            lost = self._what_is_lost(wanted)
        except KafkaUnreachable:
            return
        if lost or wanted is self._position:
            raise PositionLost("; ".join(lost) or f"{doubt.why}: was the topic created again?")
        self._doubt = None
        self._position = wanted
        self._read_on(again=range(len(self.partitions)))

    def _pass_over_deleted(self, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        self.ends()  # asked first: when that fails, nothing is counted twice
        gone = deleted_before(self.partitions, wanted, self.beginning())
        self._lost += gone
        return wanted + gone

    def _recover_damage(self, index: int, damaged: Message) -> None:
        topic, partition = self.partitions[index]
        where, offset = f"partition {partition} of topic {topic!r}", int(self._position[index])
        after = self._after_damage(index, damaged.offset()) if self._skip_lost else None
        if after is None:
            raise KafkaReadFailed(
                f"{where} cannot be read on at offset {offset}: {damaged.error().str()}"
            )
        log.warning(
            "%s is damaged: offsets %d to %d are left out (%s)",
            where,
            offset,
            after - 1,
            damaged.error().str(),
        )
        self._lost[index] += after - offset
        self._position[index] = after
        self._read_on(again=[index])

    def _after_damage(self, index: int, base: int) -> int | None:
        """The first offset after the damaged batch that begins at `base`; None when it is not found out in time.

        Whoever fetches at any offset within it is told of its beginning. So the end is where that is no longer told.
        """
        deadline = time.monotonic() + ANSWER_SECONDS

        def within(offset: int) -> bool:
            return self._damaged_at(index, offset, deadline) == base

        try:
            step = 1
            while within(base + step):
                step *= 2
            first, last = base + step // 2, base + step  # the one is within, the other is not
            while last - first > 1:
                middle = (first + last) // 2
                first, last = (middle, last) if within(middle) else (first, middle)
            return last
        except TimeoutError:
            return None
        finally:
            self._consumer.unassign()
            self._reading = frozenset()
            self._read_on()

    def _damaged_at(self, index: int, offset: int, deadline: float) -> int | None:
        """Where the damaged batch begins that fetching at this offset comes upon first; None when there is none."""
        self._consumer.assign([self._at(index, offset)])
        while time.monotonic() < deadline:
            for message in self._consumer.consume(1, 0.1):
                error = message.error()
                if not error or error.name() in {"_PARTITION_EOF", *_POSITION_GONE}:
                    return None
                if error.name() in _DAMAGE:
                    return int(message.offset())
        raise TimeoutError

    def _what_is_lost(self, wanted: npt.NDArray[np.int64]) -> list[str]:
        """Why partitions cannot be read on at the wanted offsets [P], in words."""
        return what_is_lost(self.partitions, wanted.tolist(), self.beginning(), self.ends())

    def _offsets(self, by_partition: Mapping[int, int]) -> npt.NDArray[np.int64]:
        return np.array([by_partition[index] for index in range(len(self.partitions))], np.int64)

    def _index_of(self, message: Message) -> int:
        return self._index[message.topic(), message.partition()]

    def _at(self, index: int, offset: int) -> Any:
        return self._library.TopicPartition(*self.partitions[index], offset)

    def _names(self) -> str:
        return ", ".join(
            f"topic {topic!r}" for topic in dict.fromkeys(topic for topic, _ in self.partitions)
        )


class _Cluster:
    """What the brokers tell of topics and of the ends of logs when they are asked. Raises `KafkaUnreachable` when they are silent."""

    def __init__(self, library: Any, client: Mapping[str, object]) -> None:
        self._library = library
        self._heard: dict[str, None] = {}
        self._client = client
        warn_of_plaintext(client)
        common = {
            name: value
            for name, value in librdkafka_options(client).items()
            if name not in _OF_CONSUMERS
        }
        self._admin = _make(
            library,
            library.admin.AdminClient,
            {"client.id": "stream-ctr", **common, "error_cb": self._hear},
        )
        self._brokers = ""

    def partitions(self, topics: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """(topic, partition) of all partitions, topics in the order given. Raises also `KafkaRefused` and `KafkaTopicMissing`."""
        # Asked for all topics: naming one would create it where the broker creates topics by itself.
        listed = self._ask_first(lambda: self._admin.list_topics(timeout=BOOTSTRAP_SECONDS))
        self._brokers = ", ".join(
            f"{broker.host}:{broker.port}" for broker in listed.brokers.values()
        )
        for topic in topics:
            if topic not in listed.topics:
                raise topic_missing(topic, listed.topics, self._client)
        return tuple(
            (topic, partition)
            for topic in dict.fromkeys(topics)
            for partition in sorted(listed.topics[topic].partitions)
        )

    def offsets(self, partitions: Sequence[Any], spec: Any) -> dict[int, int]:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            asked = self._admin.list_offsets(
                dict.fromkeys(partitions, spec),
                isolation_level=self._library.IsolationLevel.READ_COMMITTED,
                request_timeout=max(deadline - time.monotonic(), _BETWEEN_SECONDS),
            )
            try:
                return {
                    index: asked[partition].result().offset
                    for index, partition in enumerate(partitions)
                }
            except self._library.KafkaException as error:
                if error.args[0].name() not in _PASSING or time.monotonic() > deadline:
                    raise self.silent(error.args[0].str()) from error
                time.sleep(_BETWEEN_SECONDS)

    def describe(self, topics: Sequence[str]) -> dict[str, Future[Any]]:
        """Asks for the topics, and waits for nothing."""
        self._admin.poll(0)
        asked: dict[str, Future[Any]] = self._admin.describe_topics(
            self._library.TopicCollection(list(topics)), request_timeout=ANSWER_SECONDS
        )
        return asked

    def described(self, asked: Mapping[str, Future[Any]]) -> Topics | None:
        """Those of the topics that exist; None when the brokers did not answer for all."""
        told: dict[str, tuple[str | None, frozenset[int]]] = {}
        for name, future in asked.items():
            try:
                topic = future.result(0)
            except self._library.KafkaException as error:
                if error.args[0].name() not in _TOPIC_UNKNOWN:
                    return None
            else:
                told[name] = (
                    _uuid(topic.topic_id),
                    frozenset(partition.id for partition in topic.partitions),
                )
        return told

    def silent(self, reason: str) -> KafkaUnreachable:
        return KafkaUnreachable(
            f"the brokers of {servers(self._client)} ({self._brokers}) did not answer within {ANSWER_SECONDS:g} s: check that they run, "
            f"that what they advertise can be reached from here (advertised.listeners) and that every partition has a leader: {reason}"
        )

    def _ask_first(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._library.KafkaException as error:
            self._admin.poll(0)  # what it has to say comes with this
            raise explain_silence(self._client, list(self._heard), BOOTSTRAP_SECONDS) from error

    def _hear(self, error: Any) -> None:
        if error.name() != "_ALL_BROKERS_DOWN":
            self._heard[re.sub(r" \(after \d+ms in state \w+\)", "", error.str())] = None


class _TopicWatch:
    """Looks every `check_seconds` whether topics are still those that they were. Raises `TopicChanged`."""

    def __init__(self, cluster: _Cluster, names: Sequence[str], check_seconds: float) -> None:
        self._cluster = cluster
        self._names = tuple(dict.fromkeys(names))
        self._check_seconds = check_seconds
        self._looked = time.monotonic()
        self._asked: dict[str, Future[Any]] = cluster.describe(self._names)
        wait(self._asked.values(), ANSWER_SECONDS)
        told = self._told()
        if told is None:
            raise cluster.silent("no answer about topics")
        self._known = KnownTopics(told, missing_seconds=ANSWER_SECONDS)

    @property
    def ids(self) -> dict[str, str | None]:
        return self._known.ids

    def look_soon(self) -> None:
        self._looked = min(self._looked, time.monotonic() - self._check_seconds)

    def look(self, *, wait_for_it: bool = False) -> None:
        """Compare, when the brokers have told anything new. Silence of theirs says nothing."""
        now = time.monotonic()
        if wait_for_it or not self._asked and now - self._looked >= self._check_seconds:
            self._looked = now
            self._asked = self._cluster.describe(self._names)
        if wait_for_it:
            wait(self._asked.values(), ANSWER_SECONDS)
        if (told := self._told()) is not None:
            self._known.compare(told, now=now)

    def _told(self) -> Topics | None:
        if not self._asked or not all(future.done() for future in self._asked.values()):
            return None
        asked, self._asked = self._asked, {}
        return self._cluster.described(asked)


class _Answers:
    """When brokers last answered for each (topic, partition), from the statistics of librdkafka."""

    def __init__(self) -> None:
        self._begun = self._told = time.monotonic()
        self._answered: dict[tuple[str, int], float] = {}
        self._by_broker: dict[int, float] = {}

    def note(self, statistics: str) -> None:
        told = json.loads(statistics)
        self._told = time.monotonic()
        for broker in told["brokers"].values():
            if broker["state"] == "UP":
                # One that has nothing to answer is not silent. What was asked just now was not asked before the last time this was told.
                idle = broker["rxidle"] / 1e6 if broker["waitresp_cnt"] else 0.0
                self._by_broker[broker["nodeid"]] = max(
                    self._by_broker.get(broker["nodeid"], 0.0), self._told - idle
                )
        for topic in told["topics"].values():
            for partition in topic["partitions"].values():
                if partition["leader"] in self._by_broker:
                    self._answered[topic["topic"], partition["partition"]] = self._by_broker[
                        partition["leader"]
                    ]

    def silent_seconds(self, wanted: Sequence[tuple[str, int]]) -> float:
        """The longest of the wanted partitions; 0 when all had been answered when this was last told."""
        if not wanted:
            return 0.0
        oldest = min(self._answered.get(partition, self._begun) for partition in wanted)
        return time.monotonic() - oldest if self._told - oldest > _MAY_WAIT_SECONDS else 0.0


_BETWEEN_SECONDS = 0.05  # two questions, when a broker has no answer yet
_MAY_WAIT_SECONDS = 1.0  # that a broker takes for an answer without records
_POLL_RECORDS = 5000
_AT_ONCE = 500  # records; their objects should fit into the processor's cache. Ten times as many cost twice the time

# Tuned by measurement on two cores.
_DEFAULTS: dict[str, object] = {
    "client.id": "stream-ctr",
    "fetch.wait.max.ms": 100,
    "fetch.queue.backoff.ms": 10,
    "queued.max.messages.kbytes": 32 << 10,
    "reconnect.backoff.max.ms": 1000,
}

# What exactness rests on, and what this file hears: no option of the user reaches these.
_RULES: dict[str, object] = {
    "allow.auto.create.topics": False,
    "auto.offset.reset": "error",
    "check.crcs": True,
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    "receive.message.max.bytes": MAX_BATCH_BYTES,  # also what a batch of zstd may expand to
    "statistics.interval.ms": 500,
}

# Options that its admin client warns of.
_OF_CONSUMERS = {
    "client.rack",
    "fetch.max.bytes",
    "fetch.min.bytes",
    "fetch.wait.max.ms",
    "max.partition.fetch.bytes",
}

# By the names that librdkafka has for them.
_POSITION_GONE = {"_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE", "_LOG_TRUNCATION"}
_DAMAGE = {
    "_BAD_MSG",
    "_BAD_COMPRESSION",
    "_UNDERFLOW",
    "_NOT_IMPLEMENTED",
    "INVALID_MSG",
    "UNSUPPORTED_COMPRESSION_TYPE",
}
_TOPIC_UNKNOWN = {
    "UNKNOWN_TOPIC_OR_PART",
    "_UNKNOWN_TOPIC",
    "_UNKNOWN_PARTITION",
    "UNKNOWN_TOPIC_ID",
    "INCONSISTENT_TOPIC_ID",
}
_PASSING = {
    "_TRANSPORT", "_ALL_BROKERS_DOWN", "_TIMED_OUT", "_RESOLVE", "_MAX_POLL_EXCEEDED", "LEADER_NOT_AVAILABLE", "NOT_LEADER_FOR_PARTITION",
    "FENCED_LEADER_EPOCH", "UNKNOWN_LEADER_EPOCH", "OFFSET_NOT_AVAILABLE",
}  # fmt: skip


def _library() -> Any:
    try:
        importlib.import_module("confluent_kafka.admin")
        return importlib.import_module("confluent_kafka")
    except ImportError as error:
        raise KafkaOptionError(
            "the client confluent is not installed: pip install 'stream-ctr[confluent]'"
        ) from error


def _make(library: Any, kind: Any, options: Mapping[str, object]) -> Any:
    try:
        return kind(dict(options), logger=log_of_client)
    except library.KafkaException as error:
        raise KafkaOptionError(
            f"the Kafka client does not take its options: {error.args[0].str()}"
        ) from error


def _uuid(id_: Any) -> str | None:
    """The id of a topic as kafka-python writes it; None where the broker gives none."""
    number = (
        id_.get_most_significant_bits() % (1 << 64)
    ) << 64 | id_.get_least_significant_bits() % (1 << 64)
    return str(uuid.UUID(int=number)) if number else None


def _joined(pieces: Sequence[Records]) -> Records:
    if len(pieces) < 2:
        return pieces[0] if pieces else Records.empty()
    return Records(
        partition=np.concatenate([piece.partition for piece in pieces]),
        offset=np.concatenate([piece.offset for piece in pieces]),
        time=np.concatenate([piece.time for piece in pieces]),
        value=pa.concat_arrays([piece.value for piece in pieces]),
    )
