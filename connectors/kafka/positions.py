"""Positions in the logs of partitions: the bookkeeping of every Kafka client.

Nothing here knows a client or asks a broker. Answers of brokers are handed in.

Arrays are [P]: one entry for each partition that a source reads, in the order of its `partitions`.
An offset is the offset of a record, a position the offset of the record that comes next. A log
begins at the first offset that retention has left and ends one offset after its last record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stream_ctr.connectors.errors import LogTruncated, PositionLost
from stream_ctr.connectors.records import Records

Offsets = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

UNKNOWN = -1  # an end that no broker has reported yet

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogBounds:
    """The first offset that each log holds [P] and the offset after its last record [P].

    The beginnings must be older than the ends: retention may otherwise move one past the other.
    """

    beginning: Offsets
    end: Offsets


class Positions:
    """The positions of a source in its P partitions, with their ends, pauses and lost offsets.

    `recorded_end` [P] makes it a source that ends: it reads up to these offsets and no further.

    >>> clicks = [("clicks", 0), ("clicks", 1)]
    >>> positions = Positions(clicks, np.array([0, 5]), recorded_end=np.array([3, 9]))
    >>> positions.advance(np.array([3, 7]))
    >>> positions.caught_up().tolist(), positions.wanted().tolist(), positions.finished
    ([True, False], [False, True], False)
    >>> positions.pause({1})
    >>> positions.wanted().tolist()
    [False, False]
    """

    def __init__(
        self,
        partitions: Sequence[tuple[str, int]],
        next_offset: Offsets,
        *,
        recorded_end: Offsets | None = None,
    ) -> None:
        self.partitions = tuple(partitions)
        self.next_offset = next_offset
        self.recorded_end = recorded_end
        self._reported_end = np.zeros(len(self.partitions), np.int64)
        self._paused: frozenset[int] = frozenset()
        self.own = np.ones(len(self.partitions), np.bool_)
        """The partitions [P] that this process reads; others read the others."""
        self._lost = np.zeros(len(self.partitions), np.int64)

    def read(self) -> dict[int, int]:
        """Return each partition's position, which is never beyond its recorded end."""
        read = self.next_offset
        if self.recorded_end is not None:
            read = np.minimum(read, self.recorded_end)
        return dict(enumerate(read.tolist()))

    def lost(self) -> dict[int, int]:
        """Return how many offsets of each own partition were skipped: deleted or damaged."""
        lost = self._lost.tolist()
        return {index: lost[index] for index in np.flatnonzero(self.own).tolist()}

    def advance(self, next_offset: Offsets) -> None:
        """Take over the positions [P] after a read."""
        self.next_offset = next_offset

    def within_end(self, records: Records) -> Records:
        """Return the records before the recorded ends; all of them where there are none."""
        return records if self.recorded_end is None else records.before(self.recorded_end)

    def report_ends(self, ends: Offsets) -> None:
        """Take over the ends [P] that brokers reported; `UNKNOWN` keeps the one before."""
        self._reported_end = np.where(ends >= 0, ends, self._reported_end)

    def ends(self, listed: Offsets) -> Offsets:
        """Return the ends of the logs [P]: the listed or the reported one, whichever is later.

        Brokers exist whose list of ends runs behind.
        """
        return np.maximum(listed, self._reported_end)

    def divide(self, own: Collection[int]) -> None:
        """Leave all partitions but these to others.

        >>> positions = Positions([("clicks", 0), ("clicks", 1)], np.array([0, 0]))
        >>> positions.divide({1})
        >>> positions.wanted().tolist(), positions.lost()
        ([False, True], {1: 0})
        """
        self.own[:] = False
        self.own[list(own)] = True

    def pause(self, partitions: Collection[int]) -> None:
        """Pause exactly these partitions."""
        self._paused = frozenset(partitions)

    def wanted(self) -> Mask:
        """Return which own partitions [P] are neither paused nor at their recorded end."""
        wanted = self.own.copy()
        if self.recorded_end is not None:
            wanted &= self.next_offset < self.recorded_end
        wanted[list(self._paused)] = False
        return wanted

    def caught_up(self) -> Mask:
        """Return which partitions [P] are read up to their recorded end, or else reported end.

        Those of others are.
        """
        ends = self._reported_end if self.recorded_end is None else self.recorded_end
        return (self.next_offset >= ends) | ~self.own

    def lag(self) -> int:
        """Return how many offsets lie between the own positions and the reported ends."""
        return int(np.maximum(self._reported_end - self.next_offset, 0)[self.own].sum())

    @property
    def finished(self) -> bool:
        """True once all recorded ends are reached; never where there are none."""
        return self.recorded_end is not None and bool(self.caught_up().all())

    def seek(
        self, positions: Mapping[int, int], bounds: LogBounds, *, skip_deleted: bool
    ) -> frozenset[int]:
        """Move to the given positions and return the partitions that must be fetched anew.

        Positions of partitions of others are passed over.

        Where records were deleted, `skip_deleted` moves to the first that is left and counts the
        offsets in between as lost. Raises `PositionLost` otherwise, and always for a position
        beyond the end of its log: that is not the log that was read. Nothing changes then.

        >>> positions = Positions([("clicks", 0)], np.array([0]))
        >>> bounds = LogBounds(beginning=np.array([5]), end=np.array([9]))
        >>> positions.seek({0: 3}, bounds, skip_deleted=True), positions.read(), positions.lost()
        (frozenset({0}), {0: 5}, {0: 2})
        >>> positions.seek({0: 3}, bounds, skip_deleted=False)
        Traceback (most recent call last):
        stream_ctr.connectors.errors.PositionLost: partition 0 of \
topic 'clicks' begins at offset 5, but 3 comes next: 2 were deleted
        """
        own = {index: at for index, at in positions.items() if self.own[index]}
        wanted = self.next_offset.copy()
        wanted[list(own)] = list(own.values())
        moved = self._move(wanted, bounds, skip_deleted=skip_deleted)
        return moved | frozenset(own)

    def settle(self, doubt: Doubt, bounds: LogBounds, *, now: float, skip_deleted: bool) -> bool:
        """Move past what retention deleted; return whether the doubt is settled by that.

        False asks for another call later: nothing explains the refused position yet. Raises
        `PositionLost` when the records that come next are gone, or when the doubt has lasted
        too long.
        """
        position = np.where(self.own, self.next_offset, bounds.end)
        explained = doubt.explained(position, bounds, now=now)
        if not explained and not doubt.over:
            return False
        moved = self._move(self.next_offset, bounds, skip_deleted=explained and skip_deleted)
        if not moved:
            raise doubt.error
        return True

    def skip_damage(self, index: int, next_offset: int) -> None:
        """Move a partition to the offset after damaged records, and count them as lost."""
        self._lost[index] += next_offset - self.next_offset[index]
        self.next_offset = self.next_offset.copy()
        self.next_offset[index] = next_offset

    def name(self, index: int) -> str:
        """Return the words for a partition in messages."""
        topic, partition = self.partitions[index]
        return f"partition {partition} of topic {topic!r}"

    def _move(self, wanted: Offsets, bounds: LogBounds, *, skip_deleted: bool) -> frozenset[int]:
        """Move to the wanted positions [P] and return the partitions that moved."""
        wanted = np.where(self.own, wanted, bounds.end)  # others mind theirs
        deleted = np.maximum(bounds.beginning - wanted, 0) if skip_deleted else 0 * wanted
        wanted = wanted + deleted
        if reasons := self._unreadable(wanted, bounds):
            raise PositionLost("; ".join(reasons))
        for index in np.flatnonzero(deleted).tolist():
            topic, partition = self.partitions[index]
            log.warning(
                "%d records of partition %d of topic %r were deleted before they were read",
                deleted[index],
                partition,
                topic,
            )
        moved = np.flatnonzero(wanted != self.next_offset).tolist()
        self._lost += deleted
        self.next_offset = wanted
        return frozenset(moved)

    def _unreadable(self, wanted: Offsets, bounds: LogBounds) -> list[str]:
        """Return why partitions cannot be read at the wanted positions [P]."""
        reasons = []
        for index in np.flatnonzero((wanted < bounds.beginning) | (wanted > bounds.end)).tolist():
            name = self.name(index)
            offset = int(wanted[index])
            beginning = int(bounds.beginning[index])
            end = int(bounds.end[index])
            if offset < beginning:
                deleted = beginning - offset
                reasons.append(
                    f"{name} begins at offset {beginning}, but {offset} comes next: "
                    f"{deleted} were deleted"
                )
            else:
                reasons.append(
                    f"{name} ends at offset {end}, but {offset} comes next: "
                    "was the topic created again?"
                )
        return reasons


class Doubt:
    """A position that a broker refused, as long as nothing explains the refusal.

    Retention explains it when a position lies before the beginning of its log and none lies beyond
    an end. Otherwise the topic may have been deleted and created again. News of that reaches the
    brokers one after the other and is the better explanation, so a source waits `seconds` for it.
    It must not read meanwhile: the log may grow past the position and be another log.

    >>> doubt = Doubt("offset 7 is out of range", seconds=2.0)
    >>> position = np.array([7, 3])
    >>> deleted = LogBounds(beginning=np.array([9, 0]), end=np.array([12, 3]))
    >>> unexplained = LogBounds(beginning=np.array([0, 0]), end=np.array([12, 3]))
    >>> doubt.explained(position, deleted, now=0.0)
    True
    >>> doubt.explained(position, unexplained, now=0.0), doubt.over
    (False, False)
    >>> doubt.explained(position, unexplained, now=2.0), doubt.over
    (False, True)
    """

    def __init__(self, reason: str, *, seconds: float, retention: bool = True) -> None:
        self.reason = reason
        self.over = False
        self._retention = retention  # whether retention may explain the refusal
        self._seconds = seconds
        self._since: float | None = None

    @property
    def error(self) -> PositionLost:
        """The error to raise when the doubt is over."""
        return PositionLost(self.reason) if self._retention else LogTruncated(self.reason)

    def explained(self, position: Offsets, bounds: LogBounds, *, now: float) -> bool:
        """Return whether retention explains the refusal of these positions [P].

        After `seconds` without an explanation the doubt is `over`.
        """
        deleted = bool((position < bounds.beginning).any())
        within_ends = bool((position <= bounds.end).all())
        if self._retention and deleted and within_ends:
            return True
        self._since = now if self._since is None else self._since
        self.over = now - self._since >= self._seconds
        return False


def end_of_run(first: int, within: Callable[[int], bool]) -> int:
    """Return the first offset after `first` that is not `within`.

    `within` must hold for a run of offsets that begins at `first`. It is called about twice for
    each doubling of the length of the run.

    >>> end_of_run(10, lambda offset: 10 <= offset < 25)
    25
    """
    step = 1
    while within(first + step):
        step *= 2
    inside = first + step // 2
    outside = first + step
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if within(middle):
            inside = middle
        else:
            outside = middle
    return outside
