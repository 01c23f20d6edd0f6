"""Stored record batches as columns, compared with kafka-python's own parser, and with damaged
bytes.
"""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sys
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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
from stream_ctr.connectors.records import Records

CODECS = codecs.CODECS
INT64_MAX = (1 << 63) - 1
HEADER_BYTES = DefaultRecordBatch.HEADER_STRUCT.size
LENGTH_OFFSET = 8
FORMAT_OFFSET = 16
FIRST_TIME_OFFSET = 27
LOG_APPEND_TIME = 0x08
TRANSACTIONAL = 0x10
CONTROL = 0x20

Row = tuple[int, int, bytes | None]  # offset, time, value
Headers = list[tuple[str, bytes | None]]


@dataclass(frozen=True)
class Batch:
    """A batch to write; each record is (offset delta, time, key, value, headers)."""

    records: list[tuple[int, int, bytes | None, bytes | None, Headers]]
    codec: int = 0
    last_offset_delta: int = 0  # or the delta of the last record, if that is greater
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
        header[0] = base_offset
        header[6] = self.offsets - 1
        if self.append_time is not None:
            header[5] |= LOG_APPEND_TIME
            header[8] = self.append_time
        DefaultRecordBatch.HEADER_STRUCT.pack_into(stored, 0, *header)
        return checked(stored)


def checked(stored: bytes | bytearray) -> bytes:
    """Return the batch with the checksum of its bytes."""
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
    """Return a batch with these bytes as its records and with a correct checksum."""
    length = HEADER_BYTES - DefaultRecordBatch.AFTER_LEN_OFFSET + len(body)
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
    """Return the control batch that commits or aborts a transaction."""
    body = bytearray([0, 0, 0, 8]) + struct.pack(">hh", 0, commits) + bytes([1, 0])
    return with_body(
        bytes([2 * len(body)]) + body,
        1,
        base_offset,
        attributes=CONTROL | TRANSACTIONAL,
        producer=producer,
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
    """Return (records, the position after them), read in pieces, with `fold` between the pieces."""
    columns = Columns(most, full_bytes=full_bytes, most_value_bytes=1 << 20)
    batches = StoredBatches(stored, position, aborted=aborted, codecs=CODECS)
    found: list[Row] = []
    while not batches.exhausted:
        batches.take(columns, 3, most)
        if folded:
            batches.fold()
        records = columns.hand_out()
        records.value.validate(full=True)
        assert set(records.partition.tolist()) <= {3}
        found += rows_of(records)
    return found, batches.position


@contextmanager
def read_in_pieces(piece_bytes: int) -> Iterator[None]:
    """Let every compressed batch be too large to be expanded at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "MAX_BATCH_BYTES", 0)
        patch.setattr(codecs, "_PIECE_BYTES", piece_bytes)
        yield


def rows_of(records: Records) -> list[Row]:
    columns = records.offset.tolist(), records.time.tolist(), records.value.to_pylist()
    return list(zip(*columns, strict=True))


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
    rows = [(record.offset, record.timestamp, record.value) for record in parsed.take()]
    return rows, parsed.next_fetch_offset


# -- compared with the client's own parser -------------------------------------------------------

sizes = st.sampled_from([0, 1, 63, 64, 127, 128, 8191, 8192, 70_000])
values = st.none() | st.binary(max_size=40) | sizes.map(bytes)
headers = st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5)), max_size=3)
times = st.integers(0, 1 << 41)


@st.composite
def a_batch(draw: st.DrawFn) -> Batch:
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


def write_log(
    parts: Sequence[Batch | tuple[int, bool]], gaps: Sequence[int]
) -> tuple[bytes, list[tuple[int, int]], int]:
    """Return (stored bytes, aborted transactions, end offset) of batches with gaps before them.

    A part that is not a batch ends a transaction: (producer, whether it commits).
    """
    stored = b""
    aborted: list[tuple[int, int]] = []
    offset = 0
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
    st.lists(a_batch() | st.tuples(st.sampled_from([5, 6]), st.booleans()), min_size=1, max_size=6),
    st.data(),
)
def test_batches_read_as_the_client_reads_them(
    parts: list[Batch | tuple[int, bool]], data: st.DataObject
) -> None:
    gaps = data.draw(
        st.lists(st.sampled_from([0, 0, 1, 1000]), min_size=len(parts), max_size=len(parts))
    )
    stored, aborted, end = write_log(parts, gaps)
    position = data.draw(st.integers(0, end - 1))
    expected = read_by_client(stored, position, aborted)
    assert read(stored, position, aborted) == expected
    most = data.draw(st.integers(1, 9))
    full_bytes = data.draw(st.sampled_from([1, 100, 1 << 20]))
    cut = data.draw(st.integers(0, HEADER_BYTES))
    folded = data.draw(st.booleans())
    cut_off = stored + numbered(1).stored(end)[:cut]
    assert read(cut_off, position, aborted, most, full_bytes, folded) == expected
    with read_in_pieces(data.draw(st.sampled_from([1, 7, 100, 10_000]))):
        assert read(cut_off, position, aborted, most, full_bytes, folded) == expected


def test_an_aborted_transaction_hides_no_other_batch_of_its_producer() -> None:
    plain = replace(numbered(2), producer=5)
    transactional = replace(plain, transactional=True)
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
    stored, aborted, end = write_log(parts, [0] * len(parts))
    found, position = read(stored, 0, aborted)
    assert ([offset for offset, _, _ in found], position) == ([2, 3, 5, 6], end)
    assert (found, position) == read_by_client(stored, 0, aborted)


def test_a_poll_is_bounded_in_records_and_in_bytes() -> None:
    stored = numbered(10, size=1000).stored(0) + numbered(10, size=1000).stored(10)
    for most, full_bytes, expected in ((7, 1 << 20, [7, 7, 6]), (100, 4500, [5, 5, 5, 5])):
        columns = Columns(most, full_bytes=full_bytes, most_value_bytes=2000)
        batches = StoredBatches(stored, 0, codecs=CODECS)
        counts = []
        while not batches.exhausted:
            counts.append(batches.take(columns, 0, 100))
            assert len(columns.hand_out()) == counts[-1]
        assert counts == expected


def test_records_that_were_handed_out_do_not_change() -> None:
    columns = Columns(8, full_bytes=1 << 20, most_value_bytes=100)
    values = [None if index % 2 else b"%d" % index for index in range(16)]
    stored = Batch([(index, 5, None, value, []) for index, value in enumerate(values)]).stored(0)
    batches = StoredBatches(stored, 0, codecs=CODECS)
    batches.take(columns, 1, 8)
    first = columns.hand_out()
    expected = [(index, 5, value) for index, value in enumerate(values[:8])]
    assert (first.partition.tolist(), rows_of(first)) == ([1] * 8, expected)
    batches.take(columns, 2, 8)
    assert columns.hand_out().value.to_pylist() == values[8:]
    assert (first.partition.tolist(), rows_of(first)) == ([1] * 8, expected)


def test_columns_grow_for_a_value_of_one_byte_too_many() -> None:
    for sizes_ in ([5], [4, 1], [1, 1, 1, 1, 1], [9]):
        columns = Columns(8, full_bytes=1 << 20, most_value_bytes=100)
        columns.data = np.empty(4, np.uint8)
        expected = [b"abcdefghi"[:size] for size in sizes_]
        stored = Batch(
            [(index, 0, None, value, []) for index, value in enumerate(expected)]
        ).stored(0)
        assert StoredBatches(stored, 0, codecs=CODECS).take(columns, 0, 8) == len(sizes_)
        assert columns.hand_out().value.to_pylist() == expected


# -- the client's poll ---------------------------------------------------------------------------


class Client:
    """The part of kafka-python's consumer that parses fetched bytes, for topic t, without a
    connection.
    """

    def __init__(self, partitions: int, most_records: int, full_bytes: int = 1 << 20) -> None:
        self.subscriptions = SubscriptionState()
        assigned = [TopicPartition("t", partition) for partition in range(partitions)]
        self.subscriptions.assign_from_user(assigned)
        for partition in assigned:
            self.subscriptions.seek(partition, 0)
        self._subscription = self.subscriptions
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
        transactions = [
            SimpleNamespace(first_offset=first, producer_id=producer) for first, producer in aborted
        ]
        data = SimpleNamespace(
            error_code=0,
            high_watermark=99,
            records=stored,
            diverging_epoch=None,
            preferred_read_replica=-1,
            aborted_transactions=transactions or None,
        )
        position = self.subscriptions.assignment[topic_partition].position.offset
        self._fetcher._completed_fetches.append(
            CompletedFetch(topic_partition, position, 12, data, None)
        )

    def poll(self) -> tuple[list[int], list[Row]]:
        polled, _ = self._fetcher.fetched_records(self.columns.most_records)
        records = self.columns.hand_out()
        assert bool(polled) == bool(len(records)), "the client waits for more after an empty result"
        return records.partition.tolist(), rows_of(records)

    def positions(self) -> list[int]:
        return [state.position.offset for _, state in sorted(self.subscriptions.assignment.items())]


def test_a_poll_reads_several_answers_and_leaves_the_rest() -> None:
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


def test_a_paused_partition_keeps_its_answer_until_it_is_resumed() -> None:
    client = Client(2, most_records=4)
    client.answer(0, numbered(10).stored(0))
    assert client.poll()[0] == [0] * 4
    client.subscriptions.pause(TopicPartition("t", 0))
    client.answer(1, numbered(2).stored(0))
    assert client.poll()[0] == [1] * 2
    paused = client._fetcher._paused_partition_records[TopicPartition("t", 0)]
    open_batch = paused._batches._open
    client.subscriptions.resume(TopicPartition("t", 0))
    inside.restore_set_aside(client)
    assert paused._batches._open is open_batch, (
        "the open batch is read on without a second expansion"
    )
    assert [client.poll()[0], client.poll()[0]] == [[0] * 4, [0] * 2]
    assert client.positions() == [10, 2]


def test_a_paused_partition_keeps_no_expanded_batch() -> None:
    client = Client(2, most_records=4)
    client.answer(0, numbered(3, codec=ZSTD).stored(0) + numbered(7, codec=ZSTD).stored(3))
    assert client.poll()[0] == [0] * 4
    client.subscriptions.pause(TopicPartition("t", 0))
    open_batch = weakref.ref(client._fetcher._next_partition_records._batches._open)
    for _ in range(2):
        inside.restore_set_aside(client)
        assert client.poll() == ([], [])
    assert open_batch() is None
    client.subscriptions.resume(TopicPartition("t", 0))
    inside.restore_set_aside(client)
    assert [offset for _ in range(2) for offset, _, _ in client.poll()[1]] == [*range(4, 10)]


def test_a_paused_batch_of_an_older_format_is_fetched_again() -> None:
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


def test_markers_and_aborted_records_alone_move_the_position() -> None:
    client = Client(1, most_records=4)
    aborted = replace(numbered(3), producer=5, transactional=True)
    client.answer(0, aborted.stored(0) + marker(3, 5, commits=False), aborted=[(0, 5)])
    assert client.poll() == ([], [])
    assert client.positions() == [4]


@pytest.mark.parametrize("old_format", [0, 1])
@pytest.mark.parametrize("codec", [0, GZIP, SNAPPY])
def test_older_formats_are_parsed_by_the_client_itself(old_format: int, codec: int) -> None:
    builder = LegacyRecordBatchBuilder(old_format, codec, 1 << 20)
    for index in range(10):
        builder.append(index, 1000 + index, None, None if index == 7 else b"%d" % index * 50)
    client = Client(1, most_records=6)
    client.answer(0, bytes(builder.build()) + numbered(3).stored(10))
    found = [row for _ in range(3) for row in client.poll()[1]]
    old = [
        (index, 1000 + index if old_format else -1, None if index == 7 else b"%d" % index * 50)
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
    """Return (the records before the damage, its message), and check that reading on repeats it."""
    columns = Columns(100, full_bytes=1 << 30, most_value_bytes=1 << 20)
    batches = StoredBatches(stored, position, codecs=CODECS, **options)
    found: list[Row] = []
    for _ in range(100):
        before = batches.position
        try:
            batches.take(columns, 0, 100)
        except DamagedBatch as error:
            assert (batches.position, columns.count) == (before, 0)
            with pytest.raises(DamagedBatch, match="offset"):
                batches.take(columns, 0, 100)
            return found, str(error)
        records = columns.hand_out()
        found += rows_of(records)
        assert not batches.exhausted
    raise AssertionError("the batches were neither read to their end nor refused")


@settings(deadline=None, max_examples=60)
@given(st.integers(DefaultRecordBatch.CRC_OFFSET), st.integers(0, 7), st.integers(0, ZSTD))
def test_a_flipped_bit_is_reported_and_none_of_its_batch_is_read(
    place: int, bit: int, codec: int
) -> None:
    good = numbered(5).stored(0)
    bad = bytearray(numbered(40, codec=codec, size=20).stored(5))
    checked_bytes = len(bad) - DefaultRecordBatch.CRC_OFFSET
    bad[DefaultRecordBatch.CRC_OFFSET + place % checked_bytes] ^= 1 << bit
    found, message = damage(good + bytes(bad) + numbered(5).stored(45))
    assert [offset for offset, _, _ in found] == [0, 1, 2, 3, 4]
    assert message == "the batch at offset 5 failed crc check"


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
    """Return a record with these sizes, right or wrong; `headers` is all that follows the value
    size.
    """
    body = b"\0" + varint(0) + varint(offset_delta) + varint(key) + varint(value) + headers
    return varint(len(body) if size is None else size) + body


MALFORMED = "has a malformed record, or fewer records than its header says"
NOT_IN_ORDER = "has records whose offsets do not increase or exceed its last offset"


@pytest.mark.parametrize(
    ("body", "count", "last", "message"),
    [
        (record(), 2, 0, MALFORMED),
        (record() + record(offset_delta=1), 1, 1, "has bytes after its last record"),
        (record(offset_delta=-1), 1, 0, NOT_IN_ORDER),
        (record(offset_delta=1), 1, 0, NOT_IN_ORDER),
        (record() + record(), 2, 5, NOT_IN_ORDER),
        (record(size=5), 1, 0, MALFORMED),
        (record(size=7), 1, 0, MALFORMED),
        (record(size=7) + b"\0", 1, 0, MALFORMED),
        (b"\x8c" + 9 * b"\x80" + record(size=0), 1, 0, MALFORMED),
        (record(size=0), 1, 0, MALFORMED),
        (record(size=-5), 1, 0, MALFORMED),
        (record(size=INT64_MAX), 1, 0, MALFORMED),
        (record(value=1), 1, 0, MALFORMED),
        (record(value=INT64_MAX), 1, 0, MALFORMED),
        (record(key=INT64_MAX, value=INT64_MAX), 1, 0, MALFORMED),
        (record(headers=varint(-1)), 1, 0, MALFORMED),
        (record(headers=varint(INT64_MAX)), 1, 0, MALFORMED),
        (record(headers=varint(1) + varint(-1) + varint(0)), 1, 0, MALFORMED),
        (record(headers=varint(1) + varint(INT64_MAX) + varint(INT64_MAX)), 1, 0, MALFORMED),
        (b"\xff" * 30, 1, 0, MALFORMED),
        (b"", 1, 0, MALFORMED),
        (record(), -1, 0, "has a negative number of records, -1"),
        (record(), 1, -1, "has an impossible last offset, 1"),
    ],
)
def test_a_batch_with_malformed_records_is_damaged(
    body: bytes, count: int, last: int, message: str
) -> None:
    found, error = damage(numbered(2).stored(0) + with_body(body, count, 2, last))
    assert len(found) == 2
    assert error == f"the batch at offset 2 {message}"
    if body and count > 0:
        compressed = with_body(gzip.compress(body), count, 2, last, attributes=GZIP)
        for piece_bytes in (1, 9, 1 << 10):
            with read_in_pieces(piece_bytes):
                assert damage(numbered(2).stored(0) + compressed) == (found, error)


def test_a_number_may_be_written_in_ten_bytes() -> None:
    assert read(with_body(b"\x8c" + 8 * b"\x80" + record(size=0), 1)) == ([(0, 0, None)], 1)


def test_bytes_that_are_no_batch_are_damaged() -> None:
    good = numbered(2).stored(0)
    for length in (-(1 << 31), -12, 0, 1, HEADER_BYTES - 13):
        wrong = bytearray(good)
        struct.pack_into(">i", wrong, LENGTH_OFFSET, length)
        assert damage(bytes(wrong)) == ([], "the batch at offset 0 is shorter than its own header")
    unknown = bytearray(good)
    unknown[FORMAT_OFFSET] = 3
    assert damage(bytes(unknown)) == ([], "the batch at offset 0 has the unknown format 3")
    assert "an impossible last offset" in damage(with_body(record(), 1, INT64_MAX))[1]
    assert damage(good, 5) == (
        [],
        "offset 5 was fetched, but all returned batches end before it",
    )
    assert damage(good, 2, aborted=[(0, 5)])[0] == []
    assert [offset for offset, _, _ in read(good + numbered(3).stored(2), 3)[0]] == [3, 4]
    assert "unknown codec, 6" in damage(with_body(record(), 1, attributes=6))[1]
    no_marker = with_body(record(), 1, attributes=CONTROL, producer=5)
    assert "malformed transaction marker" in damage(no_marker)[1]


COMPRESS: dict[int, Callable[[bytes], bytes]] = {
    GZIP: kafka.codec.gzip_encode,
    SNAPPY: kafka.codec.snappy_encode,
    LZ4: kafka.codec.lz4_encode,
    ZSTD: kafka.codec.zstd_encode,
}


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_payload_that_does_not_decompress_is_damaged(codec: int) -> None:
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
        with read_in_pieces(100):
            assert damage(with_body(payload, 400, 0, 399, attributes=codec))[0] == []


@pytest.mark.parametrize("codec", COMPRESS)
def test_no_more_than_the_limit_is_expanded_at_once(
    codec: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "MAX_BATCH_BYTES", 1 << 20)
    streamed: list[record_batches.BatchHeader] = []
    make = record_batches.StreamedBatch

    def note(header: record_batches.BatchHeader, pieces: Any) -> record_batches.StreamedBatch:
        streamed.append(header)
        return make(header, pieces)

    monkeypatch.setattr(record_batches, "StreamedBatch", note)
    head = len(with_value(1 << 19)) - (1 << 19)
    for size, in_pieces in ((1 << 20, False), ((1 << 20) + 1, True)):
        stored = with_body(COMPRESS[codec](with_value(size - head)), 1, attributes=codec)
        assert read(stored) == ([(0, 0, bytes(size - head))], 1)
        assert bool(streamed) == in_pieces


def with_value(size: int) -> bytes:
    return record(value=size, headers=bytes(size) + b"\0", size=None)


def test_the_declared_size_of_a_snappy_block_is_checked_first() -> None:
    says_3_gib = b"\x80\x80\x80\x80\x0c" + b"\0a"
    found = damage(with_body(says_3_gib, 1, attributes=SNAPPY))[1]
    assert "a snappy block of 7 bytes says that it has 3221225472" in found


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_large_batch_is_read_in_little_memory(codec: int) -> None:
    size = 64 << 20
    values = [b"first", bytes(size), b"last"]
    body = b"".join(
        record(offset_delta=index, value=len(value), headers=value + b"\0")
        for index, value in enumerate(values)
    )
    stored = with_body(COMPRESS[codec](body), 3, last_offset_delta=2, attributes=codec)
    del body, values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "MAX_BATCH_BYTES", 1 << 20)
        tracemalloc.start()
        found, position = read(stored)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert [(offset, len(value or b"")) for offset, _, value in found] == [
        (0, 5),
        (1, 1 << 20),
        (2, 4),
    ]
    assert position == 3
    assert peak < 16 << 20


def test_the_time_of_a_record_in_a_large_batch_wraps_as_in_a_small_one() -> None:
    far = b"\0" + varint(INT64_MAX) + varint(0) + varint(-1) + varint(-1) + b"\0"
    header = bytearray(with_body(gzip.compress(varint(len(far)) + far), 1, attributes=GZIP))
    struct.pack_into(">q", header, FIRST_TIME_OFFSET, 5)
    small = read(checked(header))
    with read_in_pieces(3):
        assert read(checked(header)) == small
    assert small[0][0][1] == 5 + INT64_MAX - (1 << 64)


def test_concatenated_payloads_and_unframed_snappy_are_read() -> None:
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


def test_running_out_of_memory_is_not_reported_as_damage() -> None:
    def lack(payload: memoryview) -> bytes:
        raise MemoryError

    codecs = Codecs(CODECS.crc32c, {GZIP: lack})
    batches = StoredBatches(numbered(50, codec=GZIP).stored(0), 0, codecs=codecs)
    with pytest.raises(MemoryError):
        batches.take(Columns(5, full_bytes=5, most_value_bytes=5), 0, 5)


# -- no index out of bounds ----------------------------------------------------------------------


class Fenced(np.ndarray[Any, Any]):
    """An array that refuses every index at which compiled code would leave its memory."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(self._checked(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(self._checked(index), value)

    def _checked(self, index: Any) -> Any:
        if isinstance(index, slice):
            assert 0 <= index.start <= index.stop <= len(self)
        else:
            assert 0 <= index < len(self)
        return index


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The module without Numba: its compiled functions run as plain Python."""
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
    """Replace bytes of the body: at a fraction of its length, so many bytes, by others."""
    for fraction, dropped, junk in steps:
        position = int(fraction * len(body))
        body = body[:position] + junk + body[position + dropped :]
    return body


edges = st.sampled_from([0, 1, -1, 63, 64, -64, -65, 300, 1 << 31, INT64_MAX, -INT64_MAX - 1]).map(
    varint
)
spoils = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 3), edges | st.binary(max_size=3)), max_size=3
)


@settings(deadline=None, max_examples=100)
@given(
    a_batch(),
    spoils,
    st.integers(-1, 9),
    st.integers(0, 400),
    st.integers(1, 9),
    st.sampled_from([1, 5, 100]),
)
@pytest.mark.slow
def test_no_batch_makes_compiled_code_index_out_of_bounds(
    interpreted: ModuleType,
    batch: Batch,
    steps: list[tuple[float, int, bytes]],
    more: int,
    last: int,
    most: int,
    value_bytes: int,
) -> None:
    body = spoiled(replace(batch, codec=0).stored(0)[HEADER_BYTES:], steps)[: 1 << 10]
    count = max(len(batch.records) + more - 4, 0)
    fenced = np.frombuffer(body, np.uint8).view(Fenced)
    with np.errstate(over="ignore"):
        found = interpreted._validate(fenced, count, last)
        assert found == record_batches._validate(np.frombuffer(body, np.uint8), count, last)
        whole = interpreted._whole_records(fenced, count, -1, last)
        assert (found == record_batches._SOUND) == (whole[:2] == (len(body), count))
        if found != record_batches._SOUND:
            return
        columns = Columns(most, full_bytes=1 << 20, most_value_bytes=value_bytes)
        arguments = np.zeros(1, record_batches._APPEND_ARGUMENTS)
        arguments["position"] = 2
        arguments["limit"] = most
        arguments["full_bytes"] = columns.full_bytes
        arguments["most_value_bytes"] = value_bytes
        rows = columns.rows.view(Fenced)
        data = np.empty(8, np.uint8).view(Fenced)
        interpreted._append(fenced, 0, arguments, rows, data, 0)


COMPACTED = Batch(
    records=[(0, 0, None, None, [])],
    codec=0,
    last_offset_delta=1,
    append_time=None,
    producer=-1,
    transactional=False,
)
EMPTY = replace(COMPACTED, records=[], last_offset_delta=0)


@settings(deadline=None, max_examples=50)
@example([COMPACTED, EMPTY, EMPTY], [(0.5, 0, b"\x00")], 1, False)  # nothing to read, then damage
@given(st.lists(a_batch(), max_size=3), spoils, st.integers(0, 400), st.booleans())
@pytest.mark.slow
def test_no_bytes_crash_or_hang_the_reader(
    parts: list[Batch], steps: list[tuple[float, int, bytes]], position: int, right_checksum: bool
) -> None:
    stored, _, _ = write_log(parts, [0] * len(parts))
    stored = spoiled(stored, steps)
    if right_checksum and len(stored) > HEADER_BYTES:
        fitting = bytearray(stored)
        length = len(stored) - DefaultRecordBatch.AFTER_LEN_OFFSET
        struct.pack_into(">i", fitting, LENGTH_OFFSET, length)
        fitting[FORMAT_OFFSET] = FORMAT
        stored = checked(fitting)
    columns = Columns(5, full_bytes=1 << 20, most_value_bytes=1 << 10)
    batches = StoredBatches(stored, position, codecs=CODECS)
    last = position
    try:
        while not batches.exhausted:
            batches.take(columns, 0, 5)
            records = columns.hand_out()
            records.value.validate(full=True)
            # Without records, the position moves past those that compaction removed.
            assert len(records) or batches.exhausted or batches.position > last
            assert all(last <= offset < batches.position for offset in records.offset.tolist())
            last = batches.position
    except DamagedBatch:
        assert batches.position >= last


# -- a compacted topic ---------------------------------------------------------------------------


COMPACTION = {
    "cleanup.policy": "compact",
    "segment.ms": "200",
    "min.cleanable.dirty.ratio": "0.01",
    "delete.retention.ms": "0",
}


@pytest.mark.slow
def test_a_compacted_topic_is_read_with_its_gaps(tmp_path: Path, topic: str) -> None:
    try:
        installation = find_kafka()
    except KafkaMissing as error:
        pytest.skip(str(error))
    with ApacheBroker(installation, tmp_path, settings={"log.cleaner.backoff.ms": 100}) as broker:
        client = client_options(broker.bootstrap_servers, {})
        with closing(KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)) as admin:
            topic_settings = {"num_partitions": 1, "configs": COMPACTION}
            admin.create_topics({topic: topic_settings}, wait_for_metadata=True)
        assert not ensure_topic(client, topic)
        written, offsets, values = write_until_compacted(client, topic)
        expected = offsets_read_by_client(broker.bootstrap_servers, topic, written - 1)
    assert values == [b"%d" % offset for offset in offsets]
    assert set(offsets) >= expected, "compaction may have continued in between"
    assert np.diff(offsets).max() > 1


def write_until_compacted(
    client: dict[str, object], topic: str
) -> tuple[int, list[int], list[bytes | None]]:
    """Write until records are missing; return (records written, offsets, values as read last)."""
    written = 0
    deadline = time.monotonic() + PATIENCE_SECONDS
    with closing(KafkaSink(client)) as sink:
        while True:
            for index in range(100):
                sink.send(topic, b"%d" % written, key=b"%d" % (index % (30 + written % 7)))
                written += 1
            sink.flush(PATIENCE_SECONDS)
            offsets, values = read_to_end(client, topic, written)
            if len(offsets) < written - 150:
                return written, offsets, values
            assert time.monotonic() < deadline, "nothing was compacted"
            time.sleep(0.3)


def read_to_end(
    client: dict[str, object], topic: str, end: int
) -> tuple[list[int], list[bytes | None]]:
    offsets: list[int] = []
    values: list[bytes | None] = []
    with closing(KafkaSource([topic], client=client, group="g", until_end=True)) as source:
        while not source.finished:
            records = source.poll(1.0)
            offsets += records.offset.tolist()
            values += records.value.to_pylist()
        assert source.positions() == {0: end}
    return offsets, values


def offsets_read_by_client(servers: str, topic: str, last: int) -> set[int]:
    """Return the offsets that a plain consumer reads, up to the last."""
    offsets: set[int] = set()
    consumer = KafkaConsumer(topic, bootstrap_servers=servers, auto_offset_reset="earliest")
    with closing(consumer):
        while last not in offsets:
            for records in consumer.poll(timeout_ms=1000).values():
                offsets |= {record.offset for record in records}
    return offsets
