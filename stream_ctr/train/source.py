"""The interface of an input, which a Kafka topic and an in-memory log implement."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from stream_ctr.events.batch import RecordColumns


class Source(Protocol):
    """The records of P partitions, from given positions on.

    A class of one's own may inherit from it: what a log in one place has no use for (`lag`, `lost`,
    `silent_seconds`, `leader_epochs`, `topic_ids`, `commit`) then has an answer.

    One thread at a time calls the methods. While it polls, another may read what never changes
    (`partitions`, `until_end`, `topic_ids`) and call `commit`.
    """

    @property
    def partitions(self) -> Sequence[tuple[str, int]]:
        """(topic, partition) of each partition; everywhere else a partition is an index into it."""
        ...

    @property
    def finished(self) -> bool:
        """True once a source that ends was read to its end."""
        ...

    @property
    def until_end(self) -> bool:
        """True if the source ends at the end that the log had when it was opened."""
        ...

    def poll(self, timeout_seconds: float) -> RecordColumns:
        """Return the next records, or none if none arrived in time."""
        ...

    def positions(self) -> dict[int, int]:
        """Return the next offset to read of each partition."""
        ...

    def seek(self, positions: Mapping[int, int]) -> None:
        """Read on at these offsets."""
        ...

    def pause(self, partitions: frozenset[int]) -> None:
        """Return no records of exactly these partitions from now on."""
        ...

    def lag(self) -> int:
        """Return how many offsets of all partitions are not read yet, 0 if that is unknown."""
        return 0

    def caught_up(self) -> npt.NDArray[np.bool_]:
        """Return a mask [P] of the partitions that were read to their end."""
        ...

    def silent_seconds(self) -> float:
        """Return for how long no broker has answered; 0 while they do."""
        return 0.0

    def lost(self) -> dict[int, int]:
        """Return how many offsets of each partition were skipped because they are gone."""
        return {}

    def leader_epochs(self) -> dict[int, int]:
        """Return the leader epoch of the record before each position, where there is one."""
        return {}

    def expect_epochs(self, leader_epochs: Mapping[int, int]) -> None:
        """Fail with the next poll if the records of these epochs before the positions are gone."""

    def topic_ids(self) -> dict[str, str | None]:
        """Return the id of each topic, None where brokers give none."""
        return {}

    def commit(self, positions: Mapping[int, int]) -> None:
        """Commit offsets for tools that show lag. Nothing reads them back."""


@runtime_checkable
class DivisibleSource(Source, Protocol):
    """A source whose partitions several processes may divide among themselves."""

    def divide(self, own: Collection[int]) -> None:
        """Read the partitions `own` only; other processes read the others.

        Those count as read to their end, have no lag, and lose nothing here. Positions and epochs
        that are given for them are passed over, except by `commit`.
        """
        ...
