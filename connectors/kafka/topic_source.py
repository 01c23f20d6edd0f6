"""A source of records from Kafka topics, whichever client reads them."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import Literal

from stream_ctr.connectors.errors import KafkaReadFailed, KafkaUnreachable
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.positions import UNKNOWN, Doubt, LogBounds, Mask, Positions
from stream_ctr.connectors.kafka.reader import Failure, FailureKind, Reader
from stream_ctr.connectors.kafka.topics import TopicWatch
from stream_ctr.connectors.records import Records

log = logging.getLogger(__name__)

OnLost = Literal["stop", "skip"]

_BETWEEN_QUESTIONS_SECONDS = 0.05


class TopicSource:
    """All partitions of some topics as columns of records, read through a `Reader`.

    The source keeps the positions, decides what follows from a failure, and watches whether its
    topics stay what they were. It is a state machine of one doubt and of failures by partition:

    | state | next poll |
    |---|---|
    | reading | returns records; a failure that comes with them is kept |
    | failed | raises or skips the damage, once its partition is wanted and still at that position |
    | in doubt | reads nothing; asks brokers until retention or a new topic explains the refusal |
    | finished | returns nothing: all partitions are at their recorded ends |

    `seek` leads back to reading from every state.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        until_end: bool,
        on_lost: OnLost,
        topic_check_seconds: float,
    ) -> None:
        self._reader = reader
        self._skip_lost = on_lost == "skip"
        self._doubt: Doubt | None = None
        self._failures: dict[int | None, Failure] = {}
        try:
            self._positions = Positions(
                reader.partitions,
                reader.beginning(),
                recorded_end=reader.end if until_end else None,
            )
            self._topics = TopicWatch(reader.news, check_seconds=topic_check_seconds)
            self._restart(range(len(reader.partitions)))
        except BaseException:
            reader.close()
            raise

    @property
    def partitions(self) -> tuple[tuple[str, int], ...]:
        """(topic, partition) of all partitions; other methods name them by their index here."""
        return self._positions.partitions

    @property
    def until_end(self) -> bool:
        """True if the source ends where the logs ended when it was opened."""
        return self._positions.recorded_end is not None

    @property
    def finished(self) -> bool:
        """True once a source that ends has read everything."""
        return self._positions.finished

    def poll(self, timeout_seconds: float) -> Records:
        """Return the next records, in order within each partition; none when none came in time.

        Raises `PositionLost` when retention removed the records that come next, `TopicChanged` when
        a topic is no longer the one that reading began with, and `KafkaReadFailed` for failures
        that trying again does not cure, such as a damaged batch.
        """
        if self.finished:
            return Records.empty()
        self._topics.look()
        if failure := self._due_failure():
            self._recover(failure)
            return Records.empty()
        if self._doubt:
            self._settle(self._doubt)
            return Records.empty()
        epochs_before = self._reader.leader_epoch.copy()
        polled = self._reader.poll(self._positions.next_offset, timeout_seconds)
        if len(polled.records) and not self._topics.confirm():
            # Brokers are silent. What was read may be of another topic of the same name.
            self._reader.leader_epoch[:] = epochs_before
            self._restart(range(len(self.partitions)))
            return Records.empty()
        self._positions.advance(polled.next_offset)
        if polled.failure:
            self._failures[polled.failure.partition] = polled.failure
            if not len(polled.records) and (failure := self._due_failure()):
                self._recover(failure)
        if not self.until_end:
            return polled.records
        self._read_on()
        return self._positions.within_end(polled.records)

    def positions(self) -> dict[int, int]:
        """Return the next offset to read of each partition, after what `poll` has returned."""
        return self._positions.read()

    def seek(self, positions: Mapping[int, int], skip_lost: bool | None = None) -> None:
        """Read on at these offsets; partitions not named stay where they are.

        Where records were deleted, `skip_lost` goes on at the first that is left; its default is
        the source's `on_lost`. Raises `PositionLost` otherwise, and always when the log ends before
        such a position: that is not the log that was read.
        """
        skip_deleted = self._skip_lost if skip_lost is None else skip_lost
        moved = self._positions.seek(positions, self._bounds(), skip_deleted=skip_deleted)
        self._failures.clear()
        self._forget_epochs(moved)
        self._restart(moved)

    def leader_epochs(self) -> dict[int, int]:
        """Return the leader epoch of the last record before each position, where it is known.

        An epoch begins when a partition gets another leader. Brokers can tell by it whether their
        log still holds that record.
        """
        epochs = enumerate(self._reader.leader_epoch.tolist())
        return {index: epoch for index, epoch in epochs if epoch != UNKNOWN}

    def expect_epochs(self, leader_epochs: Mapping[int, int]) -> None:
        """Let the next poll raise `PositionLost` if the log lost the record before a position.

        The epochs are those of `leader_epochs` at that position; `seek` forgets them.
        """
        own = {index: at for index, at in leader_epochs.items() if self._positions.own[index]}
        self._reader.leader_epoch[list(own)] = list(own.values())
        self._restart(list(own))

    def lost(self) -> dict[int, int]:
        """Return how many offsets of each partition were skipped: deleted or damaged.

        They stay 0 unless `on_lost` or `seek` says to skip.
        """
        return self._positions.lost()

    def topic_ids(self) -> dict[str, str | None]:
        """Return the id of each topic when the source was opened.

        A topic that is created again under the same name has another id. Brokers without ids give
        None.
        """
        return self._topics.ids

    def silent_seconds(self) -> float:
        """Return for how long the brokers have not answered for a partition that is being read.

        It is 0 while they answer, also when they have no records. A partition without a leader is
        silent too. A source that is not polled does not ask, so silence begins with a poll.
        """
        return self._reader.silent_seconds(self._positions.wanted())

    def beginning(self) -> dict[int, int]:
        """Return the first offset that each partition's log still holds; asks the brokers."""
        return dict(enumerate(self._reader.beginning().tolist()))

    def ends(self) -> dict[int, int]:
        """Return the offset after the last record of each partition's log; asks the brokers."""
        self._report_ends()
        return dict(enumerate(self._positions.ends(self._reader.listed_end()).tolist()))

    def divide(self, own: Collection[int]) -> None:
        """Read only these partitions; other processes read the others.

        The others count as read to their end, and positions and epochs that are given for them are
        passed over, except by `commit`.
        """
        self._positions.divide(own)
        self._read_on()

    def pause(self, partitions: Collection[int]) -> None:
        """Pause exactly these partitions: they yield nothing from now on, all others flow."""
        self._positions.pause(partitions)
        self._read_on()

    def caught_up(self) -> Mask:
        """Return which partitions [P] are read up to the recorded end, or else the reported one.

        It asks no broker: the reported end is the end that came with the last fetched records. An
        open transaction at the end of a partition keeps it false, because its records may not be
        read yet.
        """
        self._report_ends()
        return self._positions.caught_up()

    def lag(self) -> int:
        """Return how many offsets of all partitions are not read yet, by the reported ends."""
        self._report_ends()
        return self._positions.lag()

    def commit(self, positions: Mapping[int, int]) -> None:
        """Write the group's committed offsets, for tools that show lag.

        They are advisory: a failure is a warning in the log.
        """
        self._reader.commit(positions)

    def close(self) -> None:
        """Close all connections."""
        self._reader.close()

    def _bounds(self) -> LogBounds:
        beginning = self._reader.beginning()  # before the ends, as `LogBounds` wants it
        self._report_ends()
        return LogBounds(beginning, self._positions.ends(self._reader.listed_end()))

    def _report_ends(self) -> None:
        self._positions.report_ends(self._reader.reported_end())

    def _read_on(self, again: Collection[int] = ()) -> None:
        self._reader.read_on(self._positions.next_offset, self._positions.wanted(), again)

    def _forget_epochs(self, partitions: Collection[int]) -> None:
        """Forget the epochs of partitions whose positions moved to other records."""
        self._reader.leader_epoch[list(partitions)] = UNKNOWN

    def _restart(self, partitions: Collection[int]) -> None:
        """Fetch these partitions anew from their positions."""
        self._doubt = None
        self._read_on(again=partitions)

    def _due_failure(self) -> Failure | None:
        """Take a failure whose partition is to be read; drop those whose partition has moved."""
        if not self._failures:
            return None
        wanted = self._positions.wanted()
        for index, failure in list(self._failures.items()):
            if index is not None and failure.position != self._positions.next_offset[index]:
                del self._failures[index]
            elif index is None or wanted[index]:
                return self._failures.pop(index)
        return None

    def _recover(self, failure: Failure) -> None:
        """Go on after a failure where that is wanted and possible; raise its error otherwise."""
        match failure.kind:
            case FailureKind.POSITION_REFUSED | FailureKind.LOG_TRUNCATED:
                refused = failure.kind is FailureKind.POSITION_REFUSED
                self._doubt = Doubt(
                    failure.reason + (": was the topic created again?" if refused else ""),
                    seconds=timeouts.TOPIC_NEWS_SECONDS,
                    retention=refused,
                )
                self._settle(self._doubt)
            case FailureKind.DAMAGED:
                self._skip_damage(failure)
            case FailureKind.REFUSED:
                topics = dict.fromkeys(topic for topic, _ in self.partitions)
                names = ", ".join(f"topic {topic!r}" for topic in topics)
                raise KafkaReadFailed(
                    f"reading {names} failed: {failure.reason}"
                ) from failure.cause
            case FailureKind.UNEXPECTED:
                assert failure.cause is not None, "an unexpected failure has a cause"
                raise failure.cause

    def _settle(self, doubt: Doubt) -> None:
        """Go on after deleted records where that is wanted, or wait for an explanation."""
        self._topics.wait_for_news()
        try:
            bounds = self._bounds()
        except KafkaUnreachable:
            return
        now = time.monotonic()
        if self._positions.settle(doubt, bounds, now=now, skip_deleted=self._skip_lost):
            self._forget_epochs(range(len(self.partitions)))
            self._restart(range(len(self.partitions)))
        else:
            time.sleep(_BETWEEN_QUESTIONS_SECONDS)

    def _skip_damage(self, failure: Failure) -> None:
        """Skip a damaged batch where that is wanted; raise `KafkaReadFailed` otherwise."""
        index = failure.partition
        assert index is not None, "damage is somewhere"
        name = self._positions.name(index)
        after = None
        if self._skip_lost:
            after = self._reader.end_of_damage(failure)
            self._read_on(again=[index])
        if after is None:
            raise KafkaReadFailed(
                f"{name} cannot be read on at offset {failure.position}: {failure.reason}"
            ) from failure.cause
        log.warning(
            "%s is damaged: offsets %d to %d are left out (%s)",
            name,
            failure.position,
            after - 1,
            failure.reason,
        )
        self._positions.skip_damage(index, after)
        self._forget_epochs([index])
        self._restart([index])
