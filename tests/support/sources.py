"""Reading from sources until something holds, and topics with known records to read from."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from typing import NoReturn, Protocol

from stream_ctr.connectors.kafka import KafkaSink, client_options, ensure_topic
from stream_ctr.connectors.kafka.topic_source import TopicSource
from stream_ctr.connectors.memory import BatchSource
from support.patience import PATIENCE_SECONDS

Row = tuple[int, int, bytes | None]  # offset, time, value


class OpenSource(Protocol):
    """Opens a source on topics of a broker, and closes it at the end of the `with` block."""

    def __call__(
        self,
        servers: str,
        *topics: str,
        until_end: bool = True,
        options: dict[str, str] | None = None,
        **arguments: object,
    ) -> AbstractContextManager[TopicSource]: ...


def rows(source: TopicSource | BatchSource, until: Callable[[], bool]) -> dict[int, list[Row]]:
    """Return what the source yields in each partition until the condition holds."""
    found: dict[int, list[Row]] = defaultdict(list)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not until():
        assert time.monotonic() < deadline, f"still waiting at {source.positions()}"
        records = source.poll(0.2)
        columns = (records.offset.tolist(), records.time.tolist(), records.value.to_pylist())
        for partition, *row in zip(records.partition.tolist(), *columns, strict=True):
            offset, time_, value = row
            found[partition].append((offset, time_, value))
    return found


def all_rows(source: TopicSource | BatchSource) -> dict[int, list[Row]]:
    """Return what the source yields in each partition until it has finished."""
    return rows(source, lambda: source.finished)


def offsets(found: dict[int, list[Row]], partition: int = 0) -> list[int]:
    """Return the offsets that were found in a partition."""
    return [offset for offset, _, _ in found.get(partition, [])]


def values(found: dict[int, list[Row]], partition: int = 0) -> list[bytes | None]:
    """Return the values that were found in a partition."""
    return [value for _, _, value in found.get(partition, [])]


def count(found: dict[int, list[Row]]) -> int:
    """Return how many records were found in all partitions."""
    return sum(map(len, found.values()))


def poll_until(source: TopicSource, condition: Callable[[], bool]) -> None:
    """Poll, and drop what comes, until the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still waiting at {source.positions()}"
        source.poll(0.1)


def poll_forever(source: TopicSource) -> NoReturn:
    """Poll, and drop what comes, until the source raises."""
    poll_until(source, lambda: False)
    raise AssertionError("the condition never holds")


def poll_nothing(source: TopicSource) -> NoReturn:
    """Poll until the source raises; no record may come before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert not len(source.poll(0.1))
    raise AssertionError("the source raises nothing")


def write(servers: str, topic: str, values_: Sequence[Sequence[bytes]]) -> None:
    """Create a topic and write a list of values to each partition, record i at time 1000 + i."""
    client = client_options(servers, {})
    ensure_topic(client, topic, partitions=len(values_))
    with closing(KafkaSink(client)) as sink:
        for partition, written in enumerate(values_):
            for index, value in enumerate(written):
                sink.send(topic, value, partition=partition, time=1000 + index)


def numbered(*counts: int) -> list[list[bytes]]:
    """Return the values 0, 1, ... for each partition, so many as are asked for."""
    return [[b"%d" % index for index in range(size)] for size in counts]
