"""A snapshot topic in memory: an ordered log with producers and consumers, and its compaction."""

from __future__ import annotations

from collections.abc import Sequence

from stream_ctr.snapshots.pointer import Pointer, decode_pointer, encode_pointer
from stream_ctr.snapshots.snapshot_topic import Record


class Away(Exception):
    """The broker does not answer."""


class MemoryTopic:
    """A log of records, each with the offset that it keeps when the topic is compacted."""

    def __init__(self) -> None:
        self.records: list[tuple[int, Record]] = []
        self.end = 0
        self.away = False

    def append(self, key: str, value: bytes | None) -> None:
        self.records.append((self.end, (key, value)))
        self.end += 1

    def compact(self) -> None:
        """Keep the last record of each key, and no null."""
        last = {key: (offset, (key, value)) for offset, (key, value) in self.records}
        self.records = sorted(record for record in last.values() if record[1][1] is not None)

    def reader(self) -> MemoryReader:
        return MemoryReader(self)

    # -- as a sink, whatever the topic's name is ---------------------------------------------------

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        time: int | None = None,
    ) -> None:
        self.flush(0)
        self.append((key or b"").decode(), value)

    def flush(self, timeout_seconds: float) -> None:
        if self.away:
            raise Away("the broker does not answer")


class MemoryReader:
    """A consumer from the beginning of the topic."""

    def __init__(self, topic: MemoryTopic) -> None:
        self._topic = topic
        self._position = 0

    @property
    def caught_up(self) -> bool:
        return self._position >= self._topic.end

    def read_to_end(self) -> list[Record]:
        self._topic.flush(0)
        found = [record for offset, record in self._topic.records if offset >= self._position]
        self._position = self._topic.end
        return found

    def poll(self, timeout_seconds: float) -> list[Record]:
        return self.read_to_end()


def topic_of(*pointers: Pointer | bytes | None, name: str = "default") -> MemoryTopic:
    """Return a topic with these values under a name."""
    topic = MemoryTopic()
    for value in pointers:
        topic.append(name, encode_pointer(value) if isinstance(value, Pointer) else value)
    return topic


def pointers_on(topic: MemoryTopic, name: str = "default") -> list[Pointer | None]:
    """Return the pointers under a name, in their order; None stands for a withdrawal."""
    values = [value for _, (key, value) in topic.records if key == name]
    return [decode_pointer(value) if value is not None else None for value in values]
