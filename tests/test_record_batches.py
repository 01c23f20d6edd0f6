"""Stored record batches as columns: what kafka-python's own parser reads of the same bytes, and no harm from bytes that are wrong."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import kafka.codec
import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import CompletedFetch, Fetcher
from kafka.consumer.subscription_state import SubscriptionState
from kafka.protocol.consumer import IsolationLevel
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from kafka.record.legacy_records import LegacyRecordBatchBuilder
from kafka.record.util import calc_crc32c, encode_varint
from support.brokers import ApacheBroker, KafkaMissing, find_kafka
from support.patience import PATIENCE_SECONDS

from stream_ctr.connectors.kafka import (
    KafkaSink,
    KafkaSource,
    client_options,
    codecs,
    ensure_topic,
    inside,
    record_batches,
)
from stream_ctr.connectors.kafka.record_batches import (
    FORMAT,
    GZIP,
    LZ4,
    SNAPPY,
    ZSTD,
    Codecs,
    Columns,
    DamagedBatch,
    StoredBatches,
)

CODECS = codecs.CODECS
GREATEST = (1 << 63) - 1
HEADER = DefaultRecordBatch.HEADER_STRUCT.size
LOG_APPEND_TIME, CONTROL = 0x08, 0x20

Row = tuple[int, int, bytes | None]  # offset, time, value
Headers = list[tuple[str, bytes | None]]


@dataclass(frozen=True)
class Batch:
    """What a batch holds: of each record its distance in offsets, time, key, value and headers."""

    records: list[tuple[int, int, bytes | None, bytes | None, Headers]]
    codec: int = 0
    last_offset_delta: int = 0  # or that of its last record
    append_time: int | None = None
    producer: int = -1
    transactional: bool = False

    @property
    def offsets(self) -> int:
        return 1 + max([self.last_offset_delta, *(delta for delta, *_ in self.records)])

    def stored(self, base_offset: int) -> bytes:
        builder = DefaultRecordBatchBuilder(
            FORMAT, self.codec, self.transactional, self.producer, 0, 0, 1 << 30
        )
        for record in self.records:
            builder.append(*record)
        stored = builder.build()
        header = list(DefaultRecordBatch.HEADER_STRUCT.unpack_from(stored))
        header[0], header[6] = base_offset, self.offsets - 1
        if self.append_time is not None:
            header[5] |= LOG_APPEND_TIME
            header[8] = self.append_time
        DefaultRecordBatch.HEADER_STRUCT.pack_into(stored, 0, *header)
        return checked(stored)


def checked(stored: bytes | bytearray) -> bytes:
    """The batch, with the checksum that its bytes have."""
    made = bytearray(stored)
    struct.pack_into(
        ">I",
        made,
        DefaultRecordBatch.CRC_OFFSET,
        calc_crc32c(memoryview(made)[DefaultRecordBatch.ATTRIBUTES_OFFSET :]),
    )
    return bytes(made)


def with_body(
    body: bytes,
    count: int,
    base_offset: int = 0,
    last_offset_delta: int = 0,
    attributes: int = 0,
    producer: int = -1,
) -> bytes:
    """A batch whose checksum is right, whatever is in it."""
    length = HEADER - DefaultRecordBatch.AFTER_LEN_OFFSET + len(body)
    fields = (
        base_offset,
        length,
        7,
        FORMAT,
        0,
        attributes,
        last_offset_delta,
        0,
        0,
        producer,
        0,
        0,
        count,
    )
    return checked(DefaultRecordBatch.HEADER_STRUCT.pack(*fields) + body)


def marker(base_offset: int, producer: int, *, commits: bool) -> bytes:
    """What ends a transaction."""
    body = bytearray([0, 0, 0, 8]) + struct.pack(">hh", 0, commits) + bytes([1, 0])
    return with_body(
        bytes([2 * len(body)]) + body, 1, base_offset, attributes=CONTROL | 0x10, producer=producer
    )


def numbered(count: int, *, codec: int = 0, size: int = 0) -> Batch:
    return Batch(
        [(index, 1000 + index, None, b"%d" % index + bytes(size), []) for index in range(count)],
        codec,
    )


def read(
    stored: bytes,
    position: int = 0,
    aborted: Sequence[tuple[int, int]] = (),
    most: int = 1 << 10,
    full_bytes: int = 1 << 30,
    folded: bool = False,
) -> tuple[list[Row], int]:
    """(records, the position after them), taken in pieces; `folded` between them."""
    columns, batches = (
        Columns(most, full_bytes=full_bytes, most_value_bytes=1 << 20),
        StoredBatches(stored, position, aborted=aborted, codecs=CODECS),
    )
    found: list[Row] = []
    while not batches.exhausted:
        batches.take(columns, 3, most)
        if folded:
            batches.fold()
        records = columns.hand_out()
        records.value.validate(full=True)
        assert set(records.partition.tolist()) <= {3}
        found += zip(
            records.offset.tolist(), records.time.tolist(), records.value.to_pylist(), strict=True
        )
    return found, batches.position


def read_by_client(
    stored: bytes, position: int, aborted: Sequence[tuple[int, int]]
) -> tuple[list[Row], int]:
    parsed = Fetcher.PartitionRecords(
        position,
        TopicPartition("t", 3),
        MemoryRecords(stored),
        isolation_level=IsolationLevel.READ_COMMITTED,
        aborted_transactions=[
            SimpleNamespace(first_offset=first, producer_id=producer) for first, producer in aborted
        ],
    )
    return [
        (record.offset, record.timestamp, record.value) for record in parsed.take()
    ], parsed.next_fetch_offset


# -- the same as the client's own parser ---------------------------------------------------------

sizes = st.sampled_from([0, 1, 63, 64, 127, 128, 8191, 8192, 70_000])
values = st.none() | st.binary(max_size=40) | sizes.map(bytes)
headers = st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5)), max_size=3)
times = st.integers(0, 1 << 41)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    deltas = sorted(draw(st.sets(st.integers(0, 300), max_size=8)))
    producer = draw(st.sampled_from([-1, -1, 5, 6]))
    return Batch(
        [
            (
                delta,
                draw(times),
                draw(st.none() | st.binary(max_size=9)),
                draw(values),
                draw(headers),
            )
            for delta in deltas
        ],
        draw(st.integers(0, ZSTD)),
        draw(st.integers(0, 310)),
        draw(st.none() | times),
        producer,
        producer > 0 and draw(st.booleans()),
    )


def write_down(
    parts: Sequence[Batch | tuple[int, bool]], gaps: Sequence[int]
) -> tuple[bytes, list[tuple[int, int]], int]:
    """(stored batches, what was aborted, the offset after the last): batches and ends of transactions (producer, whether committed)."""
    stored, aborted, offset = b"", [], 0
    first: dict[int, int] = {}
    for part, gap in zip(parts, gaps, strict=True):
        offset += gap
        if isinstance(part, Batch):
            stored += part.stored(offset)
            if part.transactional:
                first.setdefault(part.producer, offset)
            offset += part.offsets
        else:
            producer, commits = part
            stored += marker(offset, producer, commits=commits)
            if producer in first and not commits:
                aborted.append((first[producer], producer))
            first.pop(producer, None)
            offset += 1
    return stored, aborted, offset


@settings(deadline=None)
@given(
    st.lists(batches() | st.tuples(st.sampled_from([5, 6]), st.booleans()), min_size=1, max_size=6),
    st.data(),
)
def test_what_is_read_is_what_the_client_itself_reads(
    parts: list[Batch | tuple[int, bool]], data: st.DataObject
) -> None:
    gaps = data.draw(
        st.lists(st.sampled_from([0, 0, 1, 1000]), min_size=len(parts), max_size=len(parts))
    )
    stored, aborted, end = write_down(parts, gaps)
    position = data.draw(st.integers(0, end - 1))
    expected = read_by_client(stored, position, aborted)
    assert read(stored, position, aborted) == expected
    most, full_bytes = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 100, 1 << 20]))
    cut = data.draw(st.integers(0, HEADER))
    assert (
        read(
            stored + numbered(1).stored(end)[:cut],
            position,
            aborted,
            most,
            full_bytes,
            folded=data.draw(st.booleans()),
        )
        == expected
    )


def test_an_aborted_transaction_takes_nothing_else_of_its_producer_with_it() -> None:
    transactional, plain = (
        replace(numbered(2), producer=5, transactional=True),
        replace(numbered(2), producer=5),
    )
    parts: list[Batch | tuple[int, bool]] = [
        transactional,
        plain,
        (5, False),
        transactional,
        (5, True),
        transactional,
        (6, True),
        (5, False),
    ]
    stored, aborted, end = write_down(parts, [0] * len(parts))
    found, position = read(stored, 0, aborted)
    assert ([offset for offset, _, _ in found], position) == ([2, 3, 5, 6], end)
    assert (found, position) == read_by_client(stored, 0, aborted)


def test_a_poll_is_bounded_in_records_and_in_bytes() -> None:
    stored = numbered(10, size=1000).stored(0) + numbered(10, size=1000).stored(10)
    by_records, by_bytes = (
        Columns(most, full_bytes=full, most_value_bytes=2000)
        for most, full in ((7, 1 << 20), (100, 4500))
    )
    for columns, each in ((by_records, [7, 7, 6]), (by_bytes, [5, 5, 5, 5])):
        batches_, taken = StoredBatches(stored, 0, codecs=CODECS), []
        while not batches_.exhausted:
            taken.append(batches_.take(columns, 0, 100))
            assert len(columns.hand_out()) == taken[-1]
        assert taken == each


def test_what_is_handed_out_stays_as_it_is() -> None:
    columns = Columns(8, full_bytes=1 << 20, most_value_bytes=100)
    batches_ = StoredBatches(
        Batch(
            [(index, 5, None, None if index % 2 else b"%d" % index, []) for index in range(16)]
        ).stored(0),
        0,
        codecs=CODECS,
    )
    batches_.take(columns, 1, 8)
    first = columns.hand_out()
    before = (
        first.partition.tolist(),
        first.offset.tolist(),
        first.time.tolist(),
        first.value.to_pylist(),
    )
    batches_.take(columns, 2, 8)
    assert columns.hand_out().value.to_pylist() == [
        b"8",
        None,
        b"10",
        None,
        b"12",
        None,
        b"14",
        None,
    ]
    assert (
        first.partition.tolist(),
        first.offset.tolist(),
        first.time.tolist(),
        first.value.to_pylist(),
    ) == before


def test_values_that_are_one_byte_too_many_get_room() -> None:
    for sizes_ in ([5], [4, 1], [1, 1, 1, 1, 1], [9]):
        columns = Columns(8, full_bytes=1 << 20, most_value_bytes=100)
        columns.data = np.empty(4, np.uint8)
        expected = [b"abcdefghi"[:size] for size in sizes_]
        stored = Batch(
            [(index, 0, None, value, []) for index, value in enumerate(expected)]
        ).stored(0)
        assert StoredBatches(stored, 0, codecs=CODECS).take(columns, 0, 8) == len(sizes_)
        assert columns.hand_out().value.to_pylist() == expected


# -- between the client and the columns ----------------------------------------------------------


class Client:
    """The part of kafka-python's consumer that hands out what was fetched, of topic t; nothing is connected."""

    def __init__(self, partitions: int, most_records: int, full_bytes: int = 1 << 20) -> None:
        self.subscriptions = SubscriptionState()
        assigned = [TopicPartition("t", partition) for partition in range(partitions)]
        self.subscriptions.assign_from_user(assigned)
        for partition in assigned:
            self.subscriptions.seek(partition, 0)
        client: Any = SimpleNamespace(_manager=SimpleNamespace(_net=None))
        self._fetcher = Fetcher(client, self.subscriptions, isolation_level="read_committed")
        self.columns = Columns(most_records, full_bytes=full_bytes, most_value_bytes=1 << 20)
        inside.read_into(
            self.columns,
            self,
            {partition: index for index, partition in enumerate(assigned)},
            CODECS,
        )

    def answer(
        self, partition: int, stored: bytes, aborted: Sequence[tuple[int, int]] = ()
    ) -> None:
        topic_partition = TopicPartition("t", partition)
        data = SimpleNamespace(
            error_code=0, high_watermark=99, records=stored, diverging_epoch=None, preferred_read_replica=-1,
            aborted_transactions=[SimpleNamespace(first_offset=first, producer_id=producer) for first, producer in aborted] or None,
        )  # fmt: skip
        position = self.subscriptions.assignment[topic_partition].position.offset
        self._fetcher._completed_fetches.append(
            CompletedFetch(topic_partition, position, 12, data, None)
        )

    def poll(self) -> tuple[list[int], list[Row]]:
        polled, _ = self._fetcher.fetched_records(self.columns.most_records)
        records = self.columns.hand_out()
        assert bool(polled) == bool(len(records)), (
            "the client waits for more when it is told that there is nothing"
        )
        found = zip(
            records.offset.tolist(), records.time.tolist(), records.value.to_pylist(), strict=True
        )
        return records.partition.tolist(), list(found)

    def positions(self) -> list[int]:
        return [state.position.offset for _, state in sorted(self.subscriptions.assignment.items())]


def test_a_poll_takes_from_several_answers_and_leaves_what_is_too_much() -> None:
    client = Client(2, most_records=15)
    client.answer(0, numbered(10).stored(0))
    client.answer(1, numbered(10).stored(0))
    assert client.poll()[0] == [0] * 10 + [1] * 5
    assert client.positions() == [10, 5]
    assert client.poll() == (
        [1] * 5,
        [(index, 1000 + index, b"%d" % index) for index in range(5, 10)],
    )
    assert client.poll() == ([], [])


def test_a_poll_ends_when_its_values_have_many_bytes() -> None:
    client = Client(2, most_records=100, full_bytes=3000)
    for partition in range(2):
        client.answer(partition, numbered(5, size=1000).stored(0))
    assert [len(client.poll()[0]) for _ in range(5)] == [3, 3, 3, 1, 0]
    assert client.positions() == [5, 5]


def test_a_paused_partition_keeps_its_answer_until_it_flows() -> None:
    client = Client(2, most_records=4)
    client.answer(0, numbered(10).stored(0))
    assert client.poll()[0] == [0] * 4
    client.subscriptions.pause(TopicPartition("t", 0))
    client.answer(1, numbered(2).stored(0))
    assert client.poll()[0] == [1] * 2
    held = client._fetcher._paused_partition_records[TopicPartition("t", 0)]._batches._open
    client.subscriptions.resume(TopicPartition("t", 0))
    inside.restore_set_aside(client)
    assert (
        client._fetcher._paused_partition_records[TopicPartition("t", 0)]._batches._open is held
    ), "it flows again at once"
    assert [client.poll()[0], client.poll()[0]] == [[0] * 4, [0] * 2]
    assert client.positions() == [10, 2]


def test_a_paused_partition_keeps_no_expanded_batch() -> None:
    client = Client(2, most_records=4)
    client.answer(0, numbered(3, codec=ZSTD).stored(0) + numbered(7, codec=ZSTD).stored(3))
    assert client.poll()[0] == [0] * 4
    client.subscriptions.pause(TopicPartition("t", 0))
    held = weakref.ref(client._fetcher._next_partition_records._batches._open)
    for _ in range(2):
        inside.restore_set_aside(client)
        assert client.poll() == ([], [])
    assert held() is None
    client.subscriptions.resume(TopicPartition("t", 0))
    inside.restore_set_aside(client)
    assert [offset for _ in range(2) for offset, _, _ in client.poll()[1]] == [*range(4, 10)]


def test_a_paused_partition_keeps_no_batch_of_an_older_format_and_is_fetched_again() -> None:
    builder = LegacyRecordBatchBuilder(1, GZIP, 1 << 20)
    for index in range(6):
        builder.append(index, 1000 + index, None, b"%d" % index)
    stored = bytes(builder.build())
    client = Client(1, most_records=4)
    client.answer(0, stored)
    assert client.poll()[0] == [0] * 4
    client.subscriptions.pause(TopicPartition("t", 0))
    for _ in range(2):
        inside.restore_set_aside(client)
        assert client.poll() == ([], [])
    client.subscriptions.resume(TopicPartition("t", 0))
    inside.restore_set_aside(client)
    assert client.poll() == ([], [])
    assert client._fetcher._fetchable_partitions() == [TopicPartition("t", 0)]
    client.answer(0, stored)
    assert [offset for offset, _, _ in client.poll()[1]] == [4, 5]


def test_only_markers_and_aborted_records_move_the_position() -> None:
    client = Client(1, most_records=4)
    aborted = replace(numbered(3), producer=5, transactional=True)
    client.answer(0, aborted.stored(0) + marker(3, 5, commits=False), aborted=[(0, 5)])
    assert client.poll() == ([], [])
    assert client.positions() == [4]


@pytest.mark.parametrize("format_", [0, 1])
@pytest.mark.parametrize("codec", [0, GZIP, SNAPPY])
def test_older_formats_are_parsed_by_the_client_itself(format_: int, codec: int) -> None:
    builder = LegacyRecordBatchBuilder(format_, codec, 1 << 20)
    for index in range(10):
        builder.append(index, 1000 + index, None, None if index == 7 else b"%d" % index * 50)
    client = Client(1, most_records=6)
    client.answer(0, bytes(builder.build()) + numbered(3).stored(10))
    found = [row for _ in range(3) for row in client.poll()[1]]
    old = [
        (index, 1000 + index if format_ else -1, None if index == 7 else b"%d" % index * 50)
        for index in range(10)
    ]
    assert found == old + [(10 + index, 1000 + index, b"%d" % index) for index in range(3)]
    assert client.positions() == [13]


def test_a_poll_ends_after_an_older_format_with_many_bytes() -> None:
    client = Client(2, most_records=100, full_bytes=3000)
    for partition in range(2):
        builder = LegacyRecordBatchBuilder(1, 0, 1 << 20)
        for index in range(5):
            builder.append(index, 1000, None, bytes(1000))
        client.answer(partition, bytes(builder.build()))
    assert [client.poll()[0] for _ in range(3)] == [[0] * 5, [1] * 5, []]


def test_an_older_format_after_the_newer_one_is_left_to_the_next_answer() -> None:
    builder = LegacyRecordBatchBuilder(1, 0, 1 << 20)
    builder.append(3, 1003, None, b"old")
    old = bytes(builder.build())
    client = Client(1, most_records=10)
    client.answer(0, numbered(3).stored(0) + old)
    assert len(client.poll()[0]) == 3
    assert client.poll() == ([], [])
    client.answer(0, old)
    assert client.poll() == ([0], [(3, 1003, b"old")])


# -- damage --------------------------------------------------------------------------------------


def damage(stored: bytes, position: int = 0, **options: Any) -> tuple[list[Row], str]:
    """(what is read before it, what is told of it); it is told again when it is read again."""
    columns, batches_ = (
        Columns(100, full_bytes=1 << 30, most_value_bytes=1 << 20),
        StoredBatches(stored, position, codecs=CODECS, **options),
    )
    found: list[Row] = []
    for _ in range(100):
        before = batches_.position
        try:
            batches_.take(columns, 0, 100)
        except DamagedBatch as error:
            assert (batches_.position, columns.count) == (before, 0)
            with pytest.raises(DamagedBatch, match="offset"):
                batches_.take(columns, 0, 100)
            return found, str(error)
        records = columns.hand_out()
        found += zip(
            records.offset.tolist(), records.time.tolist(), records.value.to_pylist(), strict=True
        )
        assert not batches_.exhausted
    raise AssertionError("it is neither read to its end nor told")


@settings(deadline=None, max_examples=60)
@given(st.integers(DefaultRecordBatch.CRC_OFFSET), st.integers(0, 7), st.integers(0, ZSTD))
def test_a_flipped_bit_is_told_and_nothing_of_its_batch_is_read(
    place: int, bit: int, codec: int
) -> None:
    good, bad = numbered(5).stored(0), bytearray(numbered(40, codec=codec, size=20).stored(5))
    bad[DefaultRecordBatch.CRC_OFFSET + place % (len(bad) - DefaultRecordBatch.CRC_OFFSET)] ^= (
        1 << bit
    )
    found, told = damage(good + bytes(bad) + numbered(5).stored(45))
    assert [offset for offset, _, _ in found] == [0, 1, 2, 3, 4]
    assert told == "the batch at offset 5 failed crc check"


def varint(number: int) -> bytes:
    out = bytearray()
    encode_varint(number, out.append)
    return bytes(out)


def record(
    size: int | None = None,
    *,
    offset_delta: int = 0,
    key: int = -1,
    value: int = -1,
    headers: bytes = b"\0",
) -> bytes:
    """A record with the sizes that are told, whether they are right or not; `headers` is all that follows the value's size."""
    body = b"\0" + varint(0) + varint(offset_delta) + varint(key) + varint(value) + headers
    return varint(len(body) if size is None else size) + body


MALFORMED = "has a malformed record, or fewer than it says"


@pytest.mark.parametrize(
    ("body", "count", "last", "told"),
    [
        (record(), 2, 0, MALFORMED),
        (record() + record(offset_delta=1), 1, 1, "has more bytes than records"),
        (record(offset_delta=-1), 1, 0, "has records that are not in order"),
        (record(offset_delta=1), 1, 0, "has records that are not in order"),
        (record() + record(), 2, 5, "has records that are not in order"),
        (record(size=5), 1, 0, MALFORMED),
        (record(size=7), 1, 0, MALFORMED),
        (record(size=7) + b"\0", 1, 0, MALFORMED),
        (b"\x8c" + 9 * b"\x80" + record(size=0), 1, 0, MALFORMED),
        (record(size=0), 1, 0, MALFORMED),
        (record(size=-5), 1, 0, MALFORMED),
        (record(size=GREATEST), 1, 0, MALFORMED),
        (record(value=1), 1, 0, MALFORMED),
        (record(value=GREATEST), 1, 0, MALFORMED),
        (record(key=GREATEST, value=GREATEST), 1, 0, MALFORMED),
        (record(headers=varint(-1)), 1, 0, MALFORMED),
        (record(headers=varint(GREATEST)), 1, 0, MALFORMED),
        (record(headers=varint(1) + varint(-1) + varint(0)), 1, 0, MALFORMED),
        (record(headers=varint(1) + varint(GREATEST) + varint(GREATEST)), 1, 0, MALFORMED),
        (b"\xff" * 30, 1, 0, MALFORMED),
        (b"", 1, 0, MALFORMED),
        (record(), -1, 0, "says that it ends before it begins"),
        (record(), 1, -1, "says that it ends before it begins"),
    ],
)  # fmt: skip
def test_a_batch_whose_records_are_not_whole_is_damage(
    body: bytes, count: int, last: int, told: str
) -> None:
    found, error = damage(numbered(2).stored(0) + with_body(body, count, 2, last))
    assert len(found) == 2
    assert f"the batch at offset 2 {told}" in error


def test_a_number_may_be_written_in_ten_bytes() -> None:
    assert read(with_body(b"\x8c" + 8 * b"\x80" + record(size=0), 1)) == ([(0, 0, None)], 1)


def test_what_is_no_batch_is_damage() -> None:
    good = numbered(2).stored(0)
    for length in (-(1 << 31), -12, 0, 1, HEADER - 13):
        wrong = bytearray(good)
        struct.pack_into(">i", wrong, 8, length)
        assert damage(bytes(wrong)) == ([], "the batch at offset 0 is shorter than its own header")
    unknown = bytearray(good)
    unknown[16] = 3
    assert damage(bytes(unknown)) == ([], "the batch at offset 0 has format 3, which is not known")
    assert "no end" in damage(with_body(record(), 1, GREATEST))[1]
    assert damage(good, 5) == (
        [],
        "offset 5 was asked for, and there are only batches that end before it",
    )
    assert damage(good, 2, aborted=[(0, 5)])[0] == []
    assert [offset for offset, _, _ in read(good + numbered(3).stored(2), 3)[0]] == [3, 4]
    assert (
        "compressed in a way that is not known: 6"
        in damage(with_body(record(), 1, attributes=6))[1]
    )
    assert "malformed marker" in damage(with_body(record(), 1, attributes=CONTROL, producer=5))[1]


COMPRESS: dict[int, Callable[[bytes], bytes]] = {
    GZIP: kafka.codec.gzip_encode,
    SNAPPY: kafka.codec.snappy_encode,
    LZ4: kafka.codec.lz4_encode,
    ZSTD: kafka.codec.zstd_encode,
}


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_payload_that_is_cut_or_no_payload_is_damage(codec: int) -> None:
    whole = COMPRESS[codec](
        b"".join(record(offset_delta=index, value=300, headers=bytes(301)) for index in range(400))
    )
    for payload in (
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:20],
        whole[:3],
        b"",
        b"\xff" * 40,
        bytes(40),
    ):
        assert damage(with_body(payload, 400, 0, 399, attributes=codec))[0] == []


@pytest.mark.parametrize("codec", COMPRESS)
def test_what_a_batch_expands_to_is_bounded(codec: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MAX_BATCH_BYTES", 1 << 20)
    for size, told in (
        (1 << 20, "more bytes than records"),
        ((1 << 20) + 1, "expands to more than 1 MiB"),
    ):
        payload = COMPRESS[codec](record() + bytes(size - len(record())))
        assert told in damage(with_body(payload, 1, attributes=codec))[1]


def test_a_block_of_snappy_is_not_taken_at_its_word() -> None:
    says_3_gib = b"\x80\x80\x80\x80\x0c" + b"\0a"
    assert "expands to more than 512 MiB" in damage(with_body(says_3_gib, 1, attributes=SNAPPY))[1]


def test_payloads_in_several_pieces_and_snappy_without_a_frame_are_read() -> None:
    body = b"".join(record(offset_delta=index, value=2, headers=b"ab\0") for index in range(3))
    expected = [(index, 0, b"ab") for index in range(3)]
    payloads = [
        (GZIP, gzip.compress(body[:5]) + gzip.compress(body[5:])),
        (ZSTD, kafka.codec.zstd_encode(body[:5]) + kafka.codec.zstd_encode(body[5:])),
        (SNAPPY, kafka.codec.snappy_encode(body, xerial_compatible=False)),
        (SNAPPY, kafka.codec.snappy_encode(body, xerial_blocksize=4)),
    ]
    for codec, payload in payloads:
        assert read(with_body(payload, 3, last_offset_delta=2, attributes=codec))[0] == expected


def test_memory_that_is_lacking_is_no_damage() -> None:
    def lack(payload: memoryview) -> bytes:
        raise MemoryError

    batches_ = StoredBatches(
        numbered(50, codec=GZIP).stored(0), 0, codecs=Codecs(CODECS.crc32c, {GZIP: lack})
    )
    with pytest.raises(MemoryError):
        batches_.take(Columns(5, full_bytes=5, most_value_bytes=5), 0, 5)


# -- no place outside ----------------------------------------------------------------------------


class Fenced(np.ndarray[Any, Any]):
    """An array in which a negative or a later place is an error, where compiled code would look outside of it."""

    def __getitem__(self, at: Any) -> Any:
        return super().__getitem__(self._inside(at))

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(self._inside(at), value)

    def _inside(self, at: Any) -> Any:
        first, last = (at.start, at.stop - 1) if isinstance(at, slice) else (at, at)
        assert 0 <= first <= last + 1 <= len(self)
        assert isinstance(at, slice) or at < len(self)
        return at


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The module as Python runs it, without its compiler."""
    spec = importlib.util.spec_from_file_location(
        "interpreted_record_batches", record_batches.__file__
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "DISABLE_JIT", True)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def spoiled(body: bytes, steps: Sequence[tuple[float, int, bytes]]) -> bytes:
    for where, drop, junk in steps:
        at = int(where * len(body))
        body = body[:at] + junk + body[at + drop :]
    return body


edges = st.sampled_from([0, 1, -1, 63, 64, -64, -65, 300, 1 << 31, GREATEST, -GREATEST - 1]).map(
    varint
)
spoils = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 3), edges | st.binary(max_size=3)), max_size=3
)


@settings(deadline=None, max_examples=300)
@given(
    batches(),
    spoils,
    st.integers(-1, 9),
    st.integers(0, 400),
    st.integers(1, 9),
    st.sampled_from([1, 5, 100]),
)
@pytest.mark.slow
def test_no_byte_outside_is_looked_at_whatever_a_batch_holds(
    interpreted: ModuleType,
    batch: Batch,
    steps: list[tuple[float, int, bytes]],
    more: int,
    last: int,
    most: int,
    value_bytes: int,
) -> None:
    body = spoiled(replace(batch, codec=0).stored(0)[HEADER:], steps)[: 1 << 10]
    count = max(len(batch.records) + more - 4, 0)
    fenced = np.frombuffer(body, np.uint8).view(Fenced)
    with np.errstate(over="ignore"):
        found = interpreted._check(fenced, count, last)
        assert found == record_batches._check(np.frombuffer(body, np.uint8), count, last)
        if found != record_batches._WHOLE:
            return
        columns = Columns(most, full_bytes=1 << 20, most_value_bytes=value_bytes)
        columns.data = np.empty(8, np.uint8)
        fences = [
            array.view(Fenced)
            for array in (columns.offset, columns.time, columns.ends, columns.valid, columns.data)
        ]
        interpreted._append(fenced, 0, 0, 2, 0, False, value_bytes, 0, most, 1 << 20, *fences)


COMPACTED = Batch(
    records=[(0, 0, None, None, [])],
    codec=0,
    last_offset_delta=1,
    append_time=None,
    producer=-1,
    transactional=False,
)
EMPTY = replace(COMPACTED, records=[], last_offset_delta=0)


@settings(deadline=None, max_examples=100)
@example([COMPACTED, EMPTY, EMPTY], [(0.5, 0, b"\x00")], 1, False)  # nothing to read, then damage
@given(st.lists(batches(), max_size=3), spoils, st.integers(0, 400), st.booleans())
@pytest.mark.slow
def test_no_bytes_crash_or_hang_it(
    some: list[Batch], steps: list[tuple[float, int, bytes]], position: int, right_checksum: bool
) -> None:
    stored, _, _ = write_down(some, [0] * len(some))
    stored = spoiled(stored, steps)
    if right_checksum and len(stored) > HEADER:
        fitting = bytearray(stored)
        struct.pack_into(">i", fitting, 8, len(stored) - DefaultRecordBatch.AFTER_LEN_OFFSET)
        fitting[16] = FORMAT
        stored = checked(fitting)
    columns, batches_ = (
        Columns(5, full_bytes=1 << 20, most_value_bytes=1 << 10),
        StoredBatches(stored, position, codecs=CODECS),
    )
    last = position
    try:
        while not batches_.exhausted:
            batches_.take(columns, 0, 5)
            records = columns.hand_out()
            records.value.validate(full=True)
            assert (
                len(records) or batches_.exhausted or batches_.position > last
            )  # past records that are compacted away, say
            assert all(last <= offset < batches_.position for offset in records.offset.tolist())
            last = batches_.position
    except DamagedBatch:
        assert batches_.position >= last


# -- a log that was compacted --------------------------------------------------------------------


@pytest.mark.slow
def test_a_compacted_topic_is_read_with_its_gaps(tmp_path: Path, topic: str) -> None:
    try:
        kafka_ = find_kafka()
    except KafkaMissing as error:
        pytest.skip(str(error))
    with ApacheBroker(kafka_, tmp_path, settings={"log.cleaner.backoff.ms": 100}) as broker:
        client = client_options(broker.bootstrap_servers, {})
        with closing(KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)) as admin:
            configs = {
                "cleanup.policy": "compact",
                "segment.ms": "200",
                "min.cleanable.dirty.ratio": "0.01",
                "delete.retention.ms": "0",
            }
            admin.create_topics(
                {topic: {"num_partitions": 1, "configs": configs}}, wait_for_metadata=True
            )
        assert not ensure_topic(client, topic)
        written = 0
        deadline = time.monotonic() + PATIENCE_SECONDS
        with closing(KafkaSink(client)) as sink:
            while True:
                for index in range(100):
                    sink.send(topic, b"%d" % written, key=b"%d" % (index % (30 + written % 7)))
                    written += 1
                sink.flush(PATIENCE_SECONDS)
                with closing(
                    KafkaSource([topic], client=client, group="g", until_end=True)
                ) as source:
                    offsets: list[int] = []
                    contents: list[bytes | None] = []
                    while not source.finished:
                        records = source.poll(1.0)
                        offsets += records.offset.tolist()
                        contents += records.value.to_pylist()
                    assert source.positions() == {0: written}
                if len(offsets) < written - 150:
                    break
                assert time.monotonic() < deadline, "nothing was compacted"
                time.sleep(0.3)
        with closing(
            KafkaConsumer(
                topic, bootstrap_servers=broker.bootstrap_servers, auto_offset_reset="earliest"
            )
        ) as consumer:
            again: list[Any] = []
            while not again or again[-1].offset < written - 1:
                again += [
                    record for some in consumer.poll(timeout_ms=1000).values() for record in some
                ]
    assert contents == [b"%d" % offset for offset in offsets]
    assert set(offsets) >= {record.offset for record in again}, (
        "compaction may have gone on in between"
    )
    assert np.diff(offsets).max() > 1
