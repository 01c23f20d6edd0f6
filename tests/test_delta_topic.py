"""Records of deltas in any order, more than once, damaged or missing: a delta is whole or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.deltas import HEADER, SMALL_PAYLOAD, Made, Stored, chain, large, made, stored
from support.keys import write_keys

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import delta_topic
from stream_ctr.snapshots.delta import LARGEST_HEADER_BYTES, Delta, DeltaRank
from stream_ctr.snapshots.delta_topic import CHUNK_BYTES, MOST_OPEN, Assembler, send
from stream_ctr.snapshots.signing import PublicKey, SigningKey

OTHER_RUN = "f" * 32
THREE_CHUNKS = large(3)


def assembled(records: Iterable[Stored], assembler: Assembler | None = None) -> list[Any]:
    """Return what the records become: deltas, and the texts of errors."""
    assembler = assembler or Assembler("default")
    found: list[Any] = []
    for record in records:
        found += [
            str(each) if isinstance(each, SnapshotError) else each
            for each in assembler.take(record)
        ]
    return found


def with_label(record: Stored, **changes: bytes | None) -> Stored:
    """Return the record with these headers changed, or left out."""
    headers = {name.rpartition(".")[2]: value for name, value in record.headers} | changes
    return replace(
        record,
        headers=tuple(
            (f"__stream_ctr.delta.{name}", value)
            for name, value in headers.items()
            if value is not None
        ),
    )


@pytest.fixture
def keys(tmp_path: Path) -> tuple[SigningKey, PublicKey]:
    private, public = write_keys(tmp_path, "trainer")
    return SigningKey(private), PublicKey(public)


# -- the records -----------------------------------------------------------------------------------


def test_a_delta_is_sent_as_chunks_that_brokers_take_and_its_header_last() -> None:
    link = made(THREE_CHUNKS)
    records = stored(link)
    sizes = [len(record.value or b"") for record in records]
    assert sizes == [CHUNK_BYTES, CHUNK_BYTES, 1000, len(link.header_bytes)]
    assert b"".join(record.value or b"" for record in records[:3]) == THREE_CHUNKS
    assert records[3].value == link.header_bytes
    assert dict(records[1].headers) == {
        "__stream_ctr.delta.run": link.header.run.encode(),
        "__stream_ctr.delta.epoch": b"3",
        "__stream_ctr.delta.sequence": b"1",
        "__stream_ctr.delta.payload_sha256": link.header.payload_sha256.encode(),
        "__stream_ctr.delta.payload_bytes": b"1801000",
        "__stream_ctr.delta.count": b"3",
        "__stream_ctr.delta.index": b"1",
    }


def test_all_records_have_the_key_and_are_waited_for() -> None:
    class Sink:
        def __init__(self) -> None:
            self.sent: list[tuple[str, bytes, bytes | None]] = []
            self.flushed: list[tuple[int, float]] = []

        def send(
            self,
            topic: str,
            value: bytes,
            *,
            key: bytes | None = None,
            headers: Sequence[tuple[str, bytes]] = (),
            time: int | None = None,
        ) -> None:
            self.sent.append((topic, value, key))

        def flush(self, timeout_seconds: float) -> None:
            self.flushed.append((len(self.sent), timeout_seconds))

    sink = Sink()
    link = made(THREE_CHUNKS)
    send(sink, "deltas", b"default", link.header_bytes, link.header, link.payload, flush_seconds=7)
    assert [(topic, key) for topic, _, key in sink.sent] == [("deltas", b"default")] * 4
    assert [value for _, value, _ in sink.sent] == [record.value for record in stored(link)]
    assert sink.flushed == [(4, 7)]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_payload_of_any_size_is_put_together_again(size: int) -> None:
    link = made(bytes(size))
    assert assembled(stored(link)) == [link.delta]


# -- order, repetition, loss -----------------------------------------------------------------------


def in_small_chunks(link: Made, key: bytes = b"default") -> list[Stored]:
    """Return the records of a delta whose chunks have 40 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_topic, "CHUNK_BYTES", 40)
        return stored(link, key)


def test_a_delta_is_none_before_its_last_record() -> None:
    link = made(bytes(100))
    records = in_small_chunks(link)
    assert len(records) == 4
    assembler = Assembler("default")
    assert assembled(records[:-1], assembler) == []
    assert assembled(records[-1:], assembler) == [link.delta]
    assert assembler.held_bytes == 0


@given(st.data())
def test_any_order_and_any_repetition_of_the_records_of_a_delta_make_it_once(
    data: st.DataObject,
) -> None:
    link = made(bytes(range(150)))
    records = in_small_chunks(link)
    order = data.draw(st.permutations(records))
    again = data.draw(st.lists(st.sampled_from(records), max_size=6))
    assembler = Assembler("default")
    assert assembled([*order, *again], assembler) == [link.delta]
    assert assembler.counts == Counter(repeated=len(again)) or not again
    assert assembler.held_bytes == 0


@given(st.data())
def test_the_records_of_several_writers_mixed_make_the_deltas_of_each(
    data: st.DataObject,
) -> None:
    """Two runs under one name, and another model in the same partition."""
    ours = chain(2, payloads=[bytes(80), bytes(100)])
    theirs = chain(2, payloads=[b"x" * 100, b"x" * 80], run=OTHER_RUN)
    other = made(bytes(60), model="other")
    queues = [
        [record for link in ours for record in in_small_chunks(link)],
        [record for link in theirs for record in in_small_chunks(link)],
        in_small_chunks(other, key=b"other"),
    ]
    mixed = []
    while any(queues):
        queue = data.draw(st.sampled_from([queue for queue in queues if queue]))
        mixed.append(queue.pop(0))
    assembler = Assembler("default")
    found = assembled(mixed, assembler)
    assert [each for each in found if each.header.run == OTHER_RUN] == [
        link.delta for link in theirs
    ]
    assert [each for each in found if each.header.run != OTHER_RUN] == [link.delta for link in ours]
    assert not assembler.counts
    assert assembled(mixed, Assembler("other")) == [other.delta]


@pytest.mark.parametrize(
    ("lost", "missing"),
    [
        ({0}, "1 of 3 chunks (0)"),
        ({0, 1, 2}, "3 of 3 chunks (0, 1, 2)"),
        ({1, 3}, "1 of 3 chunks (1) and its header"),
        ({3}, "its header"),
    ],
)
def test_a_delta_that_lacks_records_is_named_when_the_next_is_complete(
    lost: set[int], missing: str
) -> None:
    first, second = chain(2, payloads=[THREE_CHUNKS, SMALL_PAYLOAD])
    left = [record for index, record in enumerate(stored(first)) if index not in lost]
    assembler = Assembler("default")
    assert assembled([*left, *stored(second)], assembler) == [
        f"delta 00000003-00000001 cannot be put together: {missing} did not come",
        second.delta,
    ]
    assert assembler.counts == Counter(incomplete=1)
    assert assembler.held_bytes == 0
    assert assembled(stored(first), assembler) == [], "what comes later is passed over"
    assert assembler.counts["repeated"] == 4


def test_a_delta_of_which_nothing_came_is_not_known_here() -> None:
    """The chain finds it: the next one has another parent."""
    first, second = chain(2)
    assembler = Assembler("default")
    assert assembled(stored(second), assembler) == [second.delta]
    assert not assembler.counts
    assert second.header.parent == first.sha256


def test_a_delta_of_another_run_gives_up_none_of_this_one() -> None:
    ours = made(THREE_CHUNKS)
    theirs = made(run=OTHER_RUN, rank=DeltaRank(9, 9))
    records = stored(ours)
    assert assembled([*records[:2], *stored(theirs), *records[2:]]) == [theirs.delta, ours.delta]


def test_a_delta_that_is_sent_again_after_a_part_of_it_is_put_together() -> None:
    link = made(THREE_CHUNKS)
    assert assembled([*stored(link)[:2], *stored(link)]) == [link.delta]


def test_after_a_new_beginning_everything_comes_again_or_what_is_after_a_rank() -> None:
    links = chain(3)
    records = [record for link in links for record in stored(link)]
    assembler = Assembler("default")
    expected = [link.delta for link in links]
    assert assembled(records, assembler) == expected
    assembler.begin()
    assert assembled(records, assembler) == expected
    assembler.begin((links[0].header.run, links[1].header.rank))
    assert assembled(records, assembler) == expected[2:]
    assembler.begin((OTHER_RUN, links[1].header.rank))
    assert assembled(records, assembler) == expected
    assembled(stored(made(THREE_CHUNKS, rank=DeltaRank(3, 9)))[:2], assembler)
    assembler.begin()
    assert assembler.held_bytes == 0


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.fault(20, injected="a byte of each chunk of a delta on its topic flipped")
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("position", [0, -1])
def test_a_flipped_byte_of_any_chunk_refuses_the_delta(index: int, position: int) -> None:
    link = made(THREE_CHUNKS)
    records = stored(link)
    damaged = bytearray(records[index].value or b"")
    damaged[position] ^= 1
    records[index] = replace(records[index], value=bytes(damaged))
    assembler = Assembler("default")
    (error,) = assembled(records, assembler)
    assert error.startswith("the payload of delta 00000003-00000001 has SHA-256 ")
    assert error.endswith(f", its header says {link.header.payload_sha256}")
    assert assembler.counts == Counter(damaged=1)


def test_every_flipped_bit_of_the_header_record_refuses_the_delta() -> None:
    link = made()
    chunk, last = stored(link)
    for bit in range(0, 8 * len(link.header_bytes), 7):
        damaged = bytearray(link.header_bytes)
        damaged[bit // 8] ^= 1 << bit % 8
        (error,) = assembled([chunk, replace(last, value=bytes(damaged))])
        assert "00000003-00000001" in error


def test_a_shortened_chunk_refuses_the_delta() -> None:
    first, second, third, last = stored(made(THREE_CHUNKS))
    assert third.value
    (error,) = assembled([first, second, replace(third, value=third.value[:-1]), last])
    assert error == (
        "the payload of delta 00000003-00000001 has 1,800,999 bytes, its header says 1,801,000"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": None}, "Object missing required field `run`"),
        ({"run": b"x"}, "Expected `str` matching regex"),
        ({"epoch": b"-1"}, "Expected `int` >= 0"),
        ({"epoch": b"x"}, "Expected `int`"),
        ({"index": b"4"}, "there is no record 4 of 3 chunks and a header"),
        ({"count": b"99999999"}, "Expected `int` <= 16384"),
        ({"payload_sha256": b"\xff" * 64}, "Expected `str`"),
        ({"new": b"1"}, "Object contains unknown field `new`"),
    ],
)
def test_a_record_whose_headers_are_none_of_a_delta_is_named_by_its_place(
    changes: dict[str, bytes | None], reason: str
) -> None:
    record = replace(with_label(stored(made(THREE_CHUNKS))[0], **changes), partition=2, offset=70)
    assembler = Assembler("default")
    (error,) = assembled([record], assembler)
    assert error.startswith("the record at offset 70 of partition 2 is no part of a delta: ")
    assert reason in error
    assert assembler.counts == Counter(unreadable=1)


@pytest.mark.parametrize("value", [None, b""])
def test_an_empty_record_is_named(value: bytes | None) -> None:
    (error,) = assembled([replace(stored(made())[0], value=value)])
    assert error.endswith("is no part of a delta: it is empty")


def test_records_without_headers_and_without_a_key_are_no_danger() -> None:
    assert assembled([Stored(b"x", (), key=None)]) == []
    (error,) = assembled([Stored(b"x", ())])
    assert "missing required field" in error


def test_headers_that_claim_another_delta_than_the_header_are_damage() -> None:
    link = made()
    claimed = [with_label(record, sequence=b"9") for record in stored(link)]
    (error,) = assembled(claimed)
    assert error == (
        f"delta 00000003-00000009 of run {HEADER.run} has the header of delta 00000003-00000001 of "
        f"run {HEADER.run}"
    )


def test_a_delta_under_the_key_of_another_model_is_damage() -> None:
    (error,) = assembled(stored(made(model="other")))
    assert error == "delta 00000003-00000001 of model 'other' has the key of model 'default'"


def test_a_signature_is_required_if_there_is_a_key(keys: tuple[SigningKey, PublicKey]) -> None:
    signing, public = keys
    signed = made(sign=signing.sign)
    assembler = Assembler("default", signature=public.verify)
    assert assembled(stored(signed), assembler) == [signed.delta]
    unsigned = made(rank=DeltaRank(3, 2))
    (error,) = assembled(stored(unsigned), assembler)
    assert error == "delta 00000003-00000002 is not signed, and a signature is required"
    assert assembler.counts == Counter(damaged=1)


def test_a_delta_of_the_same_rank_with_another_payload_is_another_delta() -> None:
    """Of two processes that write the same rank, the chain takes the one that follows."""
    first, second = made(large(2)), made(large(2, seed=1))
    mixed = [record for pair in zip(stored(first), stored(second), strict=True) for record in pair]
    assert assembled(mixed) == [first.delta, second.delta]


# -- memory ----------------------------------------------------------------------------------------


def test_a_payload_that_is_too_large_is_refused_with_its_first_record_and_named_once() -> None:
    link = made(THREE_CHUNKS)
    assembler = Assembler("default", most_bytes=1_800_999)
    assert assembled(stored(link), assembler) == [
        "delta 00000003-00000001 cannot be put together: its payload has 1,801,000 bytes, and "
        "1,800,999 are read"
    ]
    assert assembler.counts == Counter(too_large=1, repeated=3)
    assert assembler.held_bytes == 0


def test_chunks_beyond_the_size_that_the_headers_claim_are_refused() -> None:
    records = [with_label(record, payload_bytes=b"900001") for record in stored(made(THREE_CHUNKS))]
    assembler = Assembler("default")
    assert assembled(records, assembler) == [
        "delta 00000003-00000001 cannot be put together: chunk 1 goes beyond its payload of "
        "900,001 bytes"
    ]
    assert assembler.held_bytes == 0


def test_a_header_that_is_too_large_is_refused() -> None:
    chunk, last = stored(made())
    (error,) = assembled([chunk, replace(last, value=bytes(LARGEST_HEADER_BYTES + 1))])
    assert error.endswith("its header has 524,289 bytes, and 524,288 are read")


def test_a_flood_of_unfinished_deltas_takes_a_bounded_number_of_bytes() -> None:
    assembler = Assembler("default", most_bytes=3 * CHUNK_BYTES)
    errors = []
    for sequence in range(40):
        link = made(THREE_CHUNKS, rank=DeltaRank(3, 40 - sequence))
        errors += assembled(stored(link)[:2], assembler)
        assert assembler.held_bytes <= 3 * CHUNK_BYTES + LARGEST_HEADER_BYTES
    assert assembler.counts["crowded"] == len(errors) == 39
    assert errors[0] == (
        "delta 00000003-00000040 cannot be put together: 1 of 3 chunks (2) and its header did not "
        "come before the records of others took its room"
    )


def test_a_flood_of_small_records_takes_a_bounded_number_of_deltas() -> None:
    assembler = Assembler("default")
    for sequence in range(100):
        link = made(THREE_CHUNKS, rank=DeltaRank(3, sequence))
        assembled([replace(stored(link)[0], value=b"x")], assembler)
        assert assembler.held_bytes <= MOST_OPEN
    assert assembler.counts["crowded"] == 100 - MOST_OPEN


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.binary(max_size=50))))
def test_any_records_leave_the_memory_bounded_and_no_wrong_delta(
    drawn: list[tuple[int, int, bytes]],
) -> None:
    """Records whose headers claim parts of true deltas, with any contents."""
    links = chain(3, payloads=[b"a" * 50, b"b" * 50, b"c" * 50])
    assembler = Assembler("default", most_bytes=120)
    true = [link.delta for link in links]
    for sequence, index, value in drawn:
        record = stored(links[sequence % 3])[index % 2]
        found = assembled([replace(record, value=value) if index > 1 else record], assembler)
        assert all(isinstance(each, str) or each in true for each in found)
        assert all(isinstance(each, str | Delta) for each in found)
        assert assembler.held_bytes <= 120 + LARGEST_HEADER_BYTES


def test_every_count_is_in_the_table_of_the_module() -> None:
    text = delta_topic.__doc__ or ""
    source = Path(delta_topic.__file__).read_text()
    for reason in ("unreadable", "repeated", "too_large", "damaged", "incomplete", "crowded"):
        assert f"`{reason}`" in text
        assert f'"{reason}"' in source
