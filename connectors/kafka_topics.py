"""What topics were when reading began, and what that makes of what brokers tell later, in words. Knows no client, and asks nobody."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stream_ctr.connectors.errors import TopicChanged

log = logging.getLogger(__name__)

NEWS_SECONDS = 2.0  # that news of a topic may take to all brokers
Topics = Mapping[
    str, tuple[str | None, frozenset[int]]
]  # name: (id, partitions); no id from brokers that give none


class KnownTopics:
    """Topics as they were when reading began.

    >>> known = KnownTopics({"clicks": ("a1", frozenset({0, 1}))}, missing_seconds=5.0)
    >>> known.compare({"clicks": ("a1", frozenset({0, 1}))}, now=0.0)
    >>> known.compare({"clicks": ("b2", frozenset({0, 1}))}, now=1.0)
    Traceback (most recent call last):
    stream_ctr.connectors.errors.TopicChanged: topic 'clicks' was deleted and created again: its id was a1 and is b2
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
                raise TopicChanged(
                    f"topic {name!r} was deleted and created again: its id was {id_} and is {id_now}"
                )
            if added := sorted(partitions_now - partitions):
                listed = ", ".join(map(str, added))
                were = f"partition {listed} was" if len(added) == 1 else f"partitions {listed} were"
                raise TopicChanged(f"{were} added to topic {name!r}, which had {len(partitions)}")

    def _miss(self, name: str, now: float) -> None:
        # A broker that has just started may not know it yet.
        if now - self._missing_since.setdefault(name, now) > self._missing_seconds:
            raise TopicChanged(f"topic {name!r} was deleted while it was read")


def what_is_lost(
    partitions: Sequence[tuple[str, int]],
    wanted: Sequence[int],
    beginning: Mapping[int, int],
    ends: Mapping[int, int],
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
            lost.append(
                f"{where} begins at offset {beginning[index]}, but {offset} comes next: {gone} were deleted"
            )
        elif offset > ends[index]:
            lost.append(
                f"{where} ends at offset {ends[index]}, but {offset} comes next: was the topic created again?"
            )
    return lost


class Doubt:
    """Of a position that a broker does not find in its log, as long as nobody says why. Retention explains one before the beginning; else
    the topic may have been created again. That is told by another broker, or will be soon, and is the better word for it, so it is waited
    for. Nothing may be read meanwhile: the log may grow past the position, and be another one.

    >>> doubt = Doubt("offset 7 is out of range", seconds=2.0)
    >>> doubt.explained([7, 3], {0: 9, 1: 0}, {0: 12, 1: 3}, now=0.0)
    True
    >>> doubt.explained([7, 3], {0: 0, 1: 0}, {0: 12, 1: 3}, now=0.0)
    False
    >>> doubt.explained([7, 3], {0: 9, 1: 0}, {0: 12, 1: 2}, now=1.0), doubt.over
    (False, False)
    >>> doubt.explained([7, 3], {0: 0, 1: 0}, {0: 12, 1: 3}, now=2.0), doubt.over
    (False, True)
    """

    def __init__(self, why: str, *, retention: bool = True, seconds: float = NEWS_SECONDS) -> None:
        self.why = why
        self.over = False
        self._retention = retention  # whether it may explain it
        self._seconds = seconds
        self._since: float | None = None

    def explained(
        self,
        wanted: Sequence[int],
        beginning: Mapping[int, int],
        ends: Mapping[int, int],
        *,
        now: float,
    ) -> bool:
        """Whether retention explains it, by the beginnings and ends of the logs; if not for long, the doubt is `over` without that."""
        within_ends = all(offset <= ends[index] for index, offset in enumerate(wanted))
        if (
            self._retention
            and within_ends
            and any(offset < beginning[index] for index, offset in enumerate(wanted))
        ):
            return True
        self._since = now if self._since is None else self._since
        self.over = now - self._since >= self._seconds
        return False


def deleted_before(
    partitions: Sequence[tuple[str, int]],
    wanted: npt.NDArray[np.int64],
    beginning: Mapping[int, int],
) -> npt.NDArray[np.int64]:
    """How many offsets from the wanted ones [P] on each log has lost [P], by its beginning; a warning for each (topic, partition).

    >>> deleted_before([("clicks", 0), ("clicks", 1)], np.array([7, 3]), {0: 0, 1: 5}).tolist()
    [0, 2]
    """
    gone = np.maximum(
        np.array([beginning[index] for index in range(len(partitions))], np.int64) - wanted, 0
    )
    for index in np.flatnonzero(gone).tolist():
        topic, partition = partitions[index]
        log.warning(
            "%d records of partition %d of topic %r were deleted before they were read",
            gone[index],
            partition,
            topic,
        )
    return gone
