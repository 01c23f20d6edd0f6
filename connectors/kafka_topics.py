"""What topics were when reading began, and what that makes of what brokers tell later, in words. Knows no client, and asks nobody."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from connectors.errors import TopicChanged

log = logging.getLogger(__name__)

NEWS_SECONDS = 2.0  # that news of a topic may take to all brokers
Topics = Mapping[str, tuple[str | None, frozenset[int]]]  # name: (id, partitions); no id from brokers that give none


class KnownTopics:
    """Topics as they were when reading began.

    >>> known = KnownTopics({"clicks": ("a1", frozenset({0, 1}))}, missing_seconds=5.0)
    >>> known.compare({"clicks": ("a1", frozenset({0, 1}))}, now=0.0)
    >>> known.compare({"clicks": ("b2", frozenset({0, 1}))}, now=1.0)
    Traceback (most recent call last):
    connectors.errors.TopicChanged: topic 'clicks' was deleted and created again: its id was a1 and is b2
    """

    def __init__(self, topics: Topics, *, missing_seconds: float) -> None:
        self._topics = dict(topics)
        self._missing_seconds = missing_seconds
        self._missing_since: dict[str, float] = {}

    @property
    def ids(self) -> dict[str, str | None]:
        return {name: id_ for name, (id_, _) in self._topics.items()}

    def compare(self, told: Topics, *, now: float) -> None:
        """Raises `TopicChanged` when a topic is another one, has more partitions, or has been missing for `missing_seconds`."""
        for name, (id_, partitions) in self._topics.items():
            if name not in told:
                self._miss(name, now)
                continue
            self._missing_since.pop(name, None)
            id_now, partitions_now = told[name]
            if id_ and id_now and id_ != id_now:
                raise TopicChanged(f"topic {name!r} was deleted and created again: its id was {id_} and is {id_now}")
            if added := sorted(partitions_now - partitions):
                listed = ", ".join(map(str, added))
                were = f"partition {listed} was" if len(added) == 1 else f"partitions {listed} were"
                raise TopicChanged(f"{were} added to topic {name!r}, which had {len(partitions)}")

    def _miss(self, name: str, now: float) -> None:
        # A broker that has just started may not know it yet.
        if now - self._missing_since.setdefault(name, now) > self._missing_seconds:
            raise TopicChanged(f"topic {name!r} was deleted while it was read")


def what_is_lost(
    partitions: Sequence[tuple[str, int]], wanted: Sequence[int], beginning: Mapping[int, int], ends: Mapping[int, int]
) -> list[str]:
    """Why the (topic, partition) pairs cannot be read on at the wanted offsets, by the beginnings and ends of their logs.

    >>> what_is_lost([("clicks", 0), ("clicks", 1)], [7, 3], {0: 0, 1: 5}, {0: 7, 1: 9})
    ["partition 1 of topic 'clicks' begins at offset 5, but 3 comes next: 2 were deleted"]
    """
    lost = []
    for index, ((topic, partition), offset) in enumerate(zip(partitions, wanted, strict=True)):
        where = f"partition {partition} of topic {topic!r}"
        if offset < beginning[index]:
            gone = beginning[index] - offset
            lost.append(f"{where} begins at offset {beginning[index]}, but {offset} comes next: {gone} were deleted")
        elif offset > ends[index]:
            lost.append(f"{where} ends at offset {ends[index]}, but {offset} comes next: was the topic created again?")
    return lost


class BeyondTheEnd:
    """Whether to wait a moment when what comes next is beyond the end of a log: a topic that was created again has been told by another
    broker, or will be soon, and that is the better word for it. Each time that it comes to that, anew: a time is over when nobody has asked
    for ten times as long, which is longer than brokers take to answer.

    >>> beyond = BeyondTheEnd(seconds=2.0)
    >>> beyond.may_wait([7], {0: 3}, now=0.0), beyond.may_wait([7], {0: 3}, now=1.0), beyond.may_wait([7], {0: 3}, now=2.5)
    (True, True, False)
    >>> beyond.may_wait([7], {0: 9}, now=3.0)
    False
    >>> beyond.may_wait([7], {0: 3}, now=30.0), beyond.may_wait([7], {0: 3}, now=49.0), beyond.may_wait([7], {0: 3}, now=9000.0)
    (True, False, True)
    """

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._asked = 0.0

    def may_wait(self, wanted: Sequence[int], ends: Mapping[int, int], *, now: float) -> bool:
        if all(offset <= ends[index] for index, offset in enumerate(wanted)):
            self._since = None
            return False
        if self._since is None or now - self._asked > 10 * self._seconds:
            self._since = now
        self._asked = now
        return now - self._since < self._seconds


def deleted_before(
    partitions: Sequence[tuple[str, int]], wanted: npt.NDArray[np.int64], beginning: Mapping[int, int]
) -> npt.NDArray[np.int64]:
    """How many offsets from the wanted ones [P] on each log has lost [P], by its beginning; a warning for each (topic, partition).

    >>> deleted_before([("clicks", 0), ("clicks", 1)], np.array([7, 3]), {0: 0, 1: 5}).tolist()
    [0, 2]
    """
    gone = np.maximum(np.array([beginning[index] for index in range(len(partitions))], np.int64) - wanted, 0)
    for index in np.flatnonzero(gone).tolist():
        topic, partition = partitions[index]
        log.warning("%d records of partition %d of topic %r were deleted before they were read", gone[index], partition, topic)
    return gone
