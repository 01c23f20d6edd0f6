"""Arrow records: the same events as in JSON, whatever columns hold them; what is bad is told apart, and strangers' streams harm nobody."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import strategies as st
from support.event_records import FIELDS, GOOD, T, features, record
from support.fuzzing import fuzz, mutated, told

from stream_ctr.events.arrow_events import MOST_EVENTS, pack
from stream_ctr.events.decoder import Decoder, infer_fields
from stream_ctr.events.features import Hasher, hash_ids
from stream_ctr.events.ipc_frames import MARKER, DamagedStream, Sizes, sizes
from stream_ctr.events.json_events import encode_clicks, encode_impressions

N = 6
COLUMNS: dict[str, Any] = {
    "kind": ["impression", "click", "impression", "impression", "click", "impression"],
    "impression_id": ["a", "a", "b", "caf\u00e9", "b", "d"],
    "time": [T + i for i in range(N)],
    "features": [
        {"app": "maps", "age": 31},
        None,
        {"app": None, "age": -1},
        {"app": "mail", "age": None},
        None,
        {"app": "maps", "age": 7},
    ],
    "true_probability": [0.5, None, 0.25, None, None, 1],
}


def stream(*batches: pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def batch(**changes: Any) -> pa.RecordBatch:
    """The good columns but for these; ...: without it."""
    return pa.RecordBatch.from_pydict(
        {name: column for name, column in {**COLUMNS, **changes}.items() if column is not ...}
    )


def members(column: Any, name: str = "app") -> pa.StructArray:
    """The good features, of which `name` is this column."""
    struct = pa.array(COLUMNS["features"])
    arrays = {"app": struct.field(0), "age": struct.field(1), name: column}
    return pa.StructArray.from_arrays(list(arrays.values()), list(arrays), mask=struct.is_null())


def decode(*records: bytes, **options: Any) -> dict[str, Any]:
    decoder = Decoder(FIELDS, **options)
    events, rejects = decoder.decode(pa.array(records, pa.large_binary()))
    where = {
        name: part.within.tolist()
        for name, part in (("i", events.impressions), ("c", events.clicks), ("r", rejects))
    }
    return {**told((events, rejects)), "within": where, "values": rejects.value}


def without_places(read: dict[str, Any]) -> dict[str, Any]:
    told = {
        name: [event[1:] for event in read[name]] for name in ("impressions", "clicks", "rejects")
    }
    return {
        **told,
        **{name: read[name] for name in ("features", "true_probability", "with_unknown_fields")},
    }


def as_json() -> list[bytes]:
    rows = [
        {name: value for name, value in row.items() if value is not None}
        for row in pa.RecordBatch.from_pydict(COLUMNS).to_pylist()
    ]
    return [json.dumps(row).encode() for row in rows]


# -- the same as JSON ----------------------------------------------------------------------------

APPS = pa.array(COLUMNS["features"]).flatten()[0]
TEXT = {"string": pa.string(), "large": pa.large_string(), "view": pa.string_view()}
NANOSECONDS = pa.array([1_000_000 * (T + i) + 999 for i in range(N)], pa.timestamp("ns"))
MICROSECONDS = pa.array(
    [1000 * (T + i) + 999 for i in range(N)], pa.timestamp("us", "Europe/Berlin")
)
AGES = [31, None, -1, None, None, 7]


def coded(type: pa.DataType, *others: Any) -> pa.DictionaryArray:
    """The apps as a dictionary; of two of them it says "missing" in another way when there are other words."""
    indices = [0, None, 2 if others else None, 1, None, 0]
    return pa.DictionaryArray.from_arrays(
        pa.array(indices, pa.int8()), pa.array(["maps", "mail", *others], type)
    )


def texts(type: pa.DataType, apps: pa.Array) -> bytes:
    return stream(
        batch(
            features=members(apps),
            **{name: pa.array(COLUMNS[name], type) for name in ("kind", "impression_id")},
        )
    )


WAYS: dict[str, Callable[[], bytes]] = {
    "plain": lambda: stream(batch()),
    "in batches": lambda: stream(
        batch().slice(0, 1), batch().slice(1, 4), batch().slice(5, 0), batch().slice(5, 1)
    ),
    "compressed with Zstandard": lambda: stream(batch(), compression="zstd"),
    "compressed with LZ4": lambda: stream(batch(), compression="lz4"),
    "nanoseconds": lambda: stream(batch(time=NANOSECONDS)),
    "microseconds of a zone": lambda: stream(batch(time=MICROSECONDS)),
    "small integers": lambda: stream(batch(features=members(pa.array(AGES, pa.int8()), "age"))),
    "decimals": lambda: stream(
        batch(features=members(pa.array(AGES).cast(pa.decimal128(22, 1)), "age"))
    ),
    "half floats, missing as NaN": lambda: stream(
        batch(features=members(pa.array(np.array(AGES, np.float16)), "age"))
    ),
    "coded ids and kinds": lambda: stream(
        batch(**{n: pa.array(COLUMNS[n]).dictionary_encode() for n in ("kind", "impression_id")})
    ),
    "coded with a missing word": lambda: stream(batch(features=members(coded(pa.string(), None)))),
    **{
        f"{name} plain": lambda type=type: texts(type, APPS.cast(type))
        for name, type in TEXT.items()
    },
    **{f"{name} coded": lambda type=type: texts(type, coded(type)) for name, type in TEXT.items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_events_in_columns_are_those_in_json_alone_and_among_records_of_both_kinds(way):
    expected = decode(*as_json())
    value = WAYS[way]()
    alone = decode(value)
    assert without_places(alone) == without_places(expected)
    assert alone["within"] == {"i": [0, 2, 3, 5], "c": [1, 4], "r": []}
    mixed = decode(GOOD, value, b"oops", WAYS["coded with a missing word"](), value)
    assert [row for row, *_ in mixed["impressions"]] == [0, *[1] * 4, *[3] * 4, *[4] * 4]
    assert mixed["within"] == {"i": [0, *[0, 2, 3, 5] * 3], "c": [1, 4] * 3, "r": [0]}
    assert mixed["features"]["app"] == ["maps", *expected["features"]["app"] * 3]
    assert (mixed["rejects"][0][:2], mixed["values"]) == ((2, "not_json"), [None])


def test_integers_and_booleans_are_categories_by_their_text():
    for column, texts in (
        (pa.array([1, 0, None, 2**64 - 1, 0, 7], pa.uint64()), ["1", None, str(2**64 - 1), "7"]),
        (pa.array([True, None, None, False, None, True]), ["true", None, "false", "true"]),
        (pa.array([5, 5, None, -6, 5, 5]).dictionary_encode(), ["5", None, "-6", "5"]),
        (pa.nulls(N), [None] * 4),
    ):
        assert decode(stream(batch(features=members(column))))["features"]["app"] == texts


def test_any_events_teach_the_same_in_both_wires(full):
    """Packed as `replay --wire arrow` packs them, with the JSON records that do not fit, they have the same ids in the same order."""
    apps = st.one_of(st.none(), st.text(max_size=4), st.integers(-9, 9), st.booleans())
    ages = st.one_of(
        st.none(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False)
    )
    shown = st.builds(
        lambda app, age, i: features(app=app, age=age, other=i), apps, ages, st.integers(0, 2)
    )
    events = st.lists(
        st.one_of(
            shown, st.just(record(kind="click", features=...)), st.just(b"oops"), st.just(b"")
        ),
        min_size=1,
        max_size=30,
    )
    hasher = Hasher(FIELDS, table_bits=20)

    def learned(values: pa.Array) -> tuple[Any, ...]:
        events, rejects = Decoder(FIELDS).decode(values)
        shown = events.impressions
        return (
            *(a.tolist() for a in hasher.rows(shown.features)),
            hash_ids(shown.impression_id).tolist(),
            len(events.clicks),
            rejects.reason,
        )

    @fuzz(full, 100, events, st.integers(1, 12))
    def check(lines: list[bytes], size: int) -> None:
        values = pa.array(lines, pa.large_binary())
        packed = pack(values, events_a_record=size)
        assert learned(packed) == learned(values)


def test_what_is_packed_is_full_and_what_does_not_fit_is_as_it_was():
    values = pa.concat_arrays(
        [
            encode_clicks(pa.array([f"i{i}" for i in range(2500)]), np.arange(2500) + T),
            pa.array([b"x"], pa.large_binary()),
        ]
    )
    packed = pack(values, events_a_record=1000)
    read = decode(*packed.to_pylist())
    assert read["within"]["c"][:2000] == [*range(1000)] * 2
    assert [identity for _, identity, _ in read["clicks"]] == [f"i{i}" for i in range(2500)]
    assert packed[-1].as_py() == b"x"
    long = pa.array([f"{i}" * 1000 for i in range(100, 500)])
    large = pack(encode_impressions(long, np.arange(400) + T, {}), events_a_record=1000)
    assert max(map(len, large.to_pylist())) < 1_000_000
    assert len(decode(*large.to_pylist())["impressions"]) == 400


def test_fields_are_inferred_from_columns_as_from_json():
    values = [
        stream(batch(features=[{"app": "x", "age": 1, "flag": True, "b": None}] * N)),
        GOOD,
        b"\xff\xff\xff\xff",
    ]
    fields = infer_fields(pa.array(values, pa.large_binary()))
    assert [(field.name, field.kind) for field in fields] == [
        ("app", "categorical"),
        ("flag", "categorical"),
        ("age", "numeric"),
    ]
    rare = [{"app": "x", "rare": 1 if i == 0 else None} for i in range(200)]
    many = pa.RecordBatch.from_pydict(
        {
            "kind": ["impression"] * 200,
            "impression_id": ["a"] * 200,
            "time": [T] * 200,
            "features": rare,
        }
    )
    assert [field.name for field in infer_fields(pa.array([stream(many)], pa.large_binary()))] == [
        "app"
    ]
    assert (
        infer_fields(pa.array([stream(many)], pa.large_binary()), max_record_bytes=100) == ()
    )  # as the decoder refuses it


def test_members_and_columns_that_nobody_reads_are_counted_and_of_two_the_last_wins():
    assert (
        decode(stream(batch(server=[None, "x", None, None, None, None])))["with_unknown_fields"]
        == 1
    )
    assert (
        decode(stream(batch(features=members(pa.array([1, 1, None, 2, 1, None]), "x"))))[
            "with_unknown_fields"
        ]
        == 2
    )  # not of the clicks
    good = batch()
    twice = pa.RecordBatch.from_arrays(
        [pa.array(["z"] * N), *good.columns], ["impression_id", *good.schema.names]
    )
    read = decode(stream(twice))
    assert [identity for _, identity, _ in read["clicks"]] == ["a", "b"]
    assert read["with_unknown_fields"] == N


# -- bad events, each a dead letter of its own ---------------------------------------------------

BAD_EVENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown_kind": ({"kind": ["impression", "view", "impression", None, "click", "impression"]}, "kind must be impression or click"),
    "missing_id": ({"impression_id": ["a", None, "b", "", "b", "d"]}, "impression_id is missing"),
    "missing_time": ({"time": [T, None, T, None, T, T]}, "time is missing"),
    "time_out_of_range": ({"time": [T, 5, T, -T, T, T]}, "ms is not between"),
    "missing_features": ({"features": [{"app": "maps"}, None, {"app": None}, None, None, {"app": "maps"}]}, "needs features"),
    "wrong_probability": ({"true_probability": [0.5, 1.5, None, -1.0, None, 1]}, "is not in"),
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD_EVENTS)
@pytest.mark.parametrize("coded", [False, True])
def test_a_bad_event_is_a_dead_letter_that_can_be_replayed_alone_and_its_neighbours_are_read(
    reason, coded
):
    changes, message = BAD_EVENTS[reason]
    columns = {name: pa.array(column) for name, column in {**COLUMNS, **changes}.items()}
    if coded:
        words = pa.array(["x" * 10_000, "maps"], pa.string_view())
        columns["features"] = pa.StructArray.from_arrays(
            [pa.DictionaryArray.from_arrays([1] * N, words), pa.array([1.5] * N)],
            ["app", "age"],
            mask=columns["features"].is_null(),
        )
        columns |= {name: columns[name].dictionary_encode() for name in ("kind", "impression_id")}
    read = decode(stream(pa.RecordBatch.from_pydict(columns)), GOOD)
    bad = [3] if reason == "missing_features" else [1, 3]
    assert [(row, code) for row, code, _ in read["rejects"]] == [(0, reason)] * len(bad)
    assert all(message in seen for _, _, seen in read["rejects"])
    assert read["within"]["r"] == bad
    assert sorted(read["within"]["i"][:-1] + read["within"]["c"]) == [
        i for i in range(N) if i not in bad
    ]
    for value in read["values"]:
        assert len(value) < 5000
        again = decode(value)
        assert [code for _, code, _ in again["rejects"]] == [reason]
        assert again["within"] == {"i": [], "c": [], "r": [0]}


def test_an_event_far_ahead_of_its_record_is_a_dead_letter_that_is_good_later():
    value = stream(batch(time=[T, T, T, T + 300_001, T, T]))
    events, rejects = Decoder(FIELDS).decode(
        pa.array([value, value], pa.large_binary()), np.array([T, -1])
    )
    assert (rejects.row.tolist(), rejects.within.tolist(), rejects.reason) == (
        [0],
        [3],
        ["time_in_future"],
    )
    assert (len(events.impressions), len(events.clicks)) == (7, 4)
    again = decode(rejects.value[0])
    assert (again["impressions"], again["features"]) == (
        [(0, "caf\u00e9", T + 300_001)],
        {"app": ["mail"], "age": [None]},
    )


# -- records that are refused --------------------------------------------------------------------


def shown_often(text: bytes, times: int) -> pa.StringViewArray:
    """Views of the same bytes."""
    view = struct.pack("<i4sii", len(text), text[:4], 0, 0)
    return pa.Array.from_buffers(
        pa.string_view(), times, [None, pa.py_buffer(view * times), pa.py_buffer(text)]
    )


def one_word(word: str, times: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int8)), pa.array([word]))


def many(events: int, **columns: Any) -> bytes:
    usual = {"kind": pa.nulls(events), "impression_id": pa.nulls(events), "time": pa.nulls(events)}
    return stream(pa.RecordBatch.from_pydict({**usual, **columns}))


def many_shown(events: int, **columns: Any) -> pa.RecordBatch:
    """Good impressions, but for these columns."""
    usual = {
        "kind": one_word("impression", events),
        "impression_id": one_word("a", events),
        "time": one_time(T, events),
        "features": pa.StructArray.from_arrays([one_word("maps", events)], ["app"]),
    }
    return pa.RecordBatch.from_pydict({**usual, **columns})


def one_time(time: int, times: int) -> pa.Int64Array:
    return pa.array(np.full(times, time, np.int64))


BAD_RECORDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "only the marker": (lambda: b"\xff\xff\xff\xff", "not_arrow"),
    "only an end": (lambda: b"\xff\xff\xff\xff\0\0\0\0", "not_arrow"),
    "cut off within a batch": (lambda: stream(batch())[:-200], "not_arrow"),
    "cut off before its end": (lambda: stream(batch())[:-8], "not_arrow"),
    "more after its end": (lambda: stream(batch()) + b"x", "not_arrow"),
    "two streams": (lambda: stream(batch()) * 2, "not_arrow"),
    "text that is no UTF-8": (lambda: stream(batch(impression_id=pa.array([b"\xff"] * N).view(pa.string()))), "not_arrow"),
    "an index beyond its dictionary": (
        lambda: stream(batch(features=members(pa.DictionaryArray.from_arrays([9] * N, pa.array(["x"]), safe=False)))), "not_arrow"),
    "no kind": (lambda: stream(batch(kind=...)), "missing_column"),
    "no id": (lambda: stream(batch(impression_id=...)), "missing_column"),
    "no time": (lambda: stream(batch(time=...)), "missing_column"),
    "kind a number": (lambda: stream(batch(kind=[1] * N)), "wrong_type"),
    "id a number": (lambda: stream(batch(impression_id=[1] * N)), "wrong_type"),
    "time a fraction": (lambda: stream(batch(time=[0.5] * N)), "wrong_type"),
    "time a text": (lambda: stream(batch(time=["2025-01-01T00:00:00Z"] * N)), "wrong_type"),
    "features a text": (lambda: stream(batch(features=["x"] * N)), "wrong_type"),
    "a category a fraction": (lambda: stream(batch(features=members(pa.array([0.5] * N)))), "wrong_type"),
    "a category a list": (lambda: stream(batch(features=members(pa.array([["x"]] * N)))), "wrong_type"),
    "a number a text": (lambda: stream(batch(features=members(pa.array(["1"] * N), "age"))), "wrong_type"),
    "a probability true": (lambda: stream(batch(true_probability=[True] * N)), "wrong_type"),
    "too many events": (lambda: many(MOST_EVENTS + 1), "too_many_events"),
    "more bad events than are dead letters": (lambda: many(1001), "too_many_bad_events"),
    "more bytes than a record may have": (lambda: many(1000, x=pa.array(["x" * 2000] * 1000)), "too_large"),
    "a bomb": (lambda: stream(pa.RecordBatch.from_pydict({"x": ["x" * 20_000] * 1000}), compression="zstd"), "too_large"),
    "one long id shown often": (
        lambda: many(1000, impression_id=pa.DictionaryArray.from_arrays([0] * 1000, pa.array(["x" * 100_000]))), "too_large"),
    "hardly any bytes and very many events": (
        lambda: stream(many_shown(5000), compression="zstd"), "too_large"),
    "one long text shown often, in two columns": (
        lambda: stream(many_shown(500, impression_id=shown_often(b"i" * 2500, 500), features=pa.StructArray.from_arrays(
            [shown_often(b"x" * 2500, 500)], ["app"]))), "too_large"),
    "hardly any bytes and very many dead letters": (
        lambda: stream(many_shown(1000, time=one_time(5, 1000)), compression="zstd"), "too_many_bad_events"),
    "one long bad word shown often": (
        lambda: many(1000, x=pa.DictionaryArray.from_arrays([0] * 1000, pa.array(["x" * 100_000]))), "too_many_bad_events"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_cannot_be_read_is_one_reject_and_harms_no_other(name):
    make, reason = BAD_RECORDS[name]
    value = make()
    for around in ([], [stream(batch())], [GOOD]):
        read = decode(*around, value, *around)
        assert [(row, code) for row, code, _ in read["rejects"]] == [(len(around), reason)]
        assert read["rejects"][0][2].isprintable()
        assert read["values"] == [None]
        assert len(read["impressions"]) == 2 * len(decode(*around)["impressions"])


def test_good_events_that_compress_well_are_no_bomb():
    ids = pa.array([f"{i:020}" for i in range(10_000)])
    value = stream(
        many_shown(10_000, impression_id=ids, time=pa.array(np.arange(10_000) + T)),
        compression="zstd",
    )
    assert len(value) < 10_000 * 8
    assert len(decode(value)["impressions"]) == 10_000
    word = pa.DictionaryArray.from_arrays(
        pa.array([0, 0]), pa.array(["x" * 200_000], pa.string_view())
    )
    shared = [many_shown(2, features=pa.StructArray.from_arrays([word], ["app"]))] * 200
    assert len(decode(stream(*shared))["impressions"]) == 400


@pytest.mark.parametrize(
    "where",
    ["stream_ctr.events.arrow_events.ipc_frames.sizes", "stream_ctr.events.arrow_events._Columns"],
)
def test_a_record_for_which_there_is_no_memory_now_is_not_a_bad_one(where, monkeypatch):
    def full(*_: object) -> None:
        raise pa.lib.ArrowMemoryError("malloc failed")

    monkeypatch.setattr(where, full)
    with pytest.raises(MemoryError):
        decode(stream(batch()))


def test_numbers_stored_big_end_first_are_refused():
    def only_schema(endianness: int) -> bytes:
        message = struct.pack(
            "<I5H2xiB3xI", 16, 10, 12, 0, 4, 8, 12, 1, 12
        )  # where the table is, its vtable, the table
        schema = struct.pack("<3H2xih", 6, 6, 4, 8, endianness)
        metadata = (message + schema).ljust(48, b"\0")
        return MARKER + struct.pack("<i", len(metadata)) + metadata + MARKER + bytes(4)

    assert sizes(only_schema(0)) == Sizes(0, 0)
    with pytest.raises(DamagedStream, match="big end first"):
        sizes(only_schema(1))


def test_names_that_are_no_text_are_refused_wherever_they_stand():
    inner = pa.array([{"nested": {"feature": 1}}] * N)
    for name in (b"nested", b"feature", b"server"):
        value = stream(batch(features=inner, server=pa.array(["x"] * N)))
        assert decode(value)["rejects"] == []
        assert [
            code for _, code, _ in decode(value.replace(name, b"\xff" * len(name)))["rejects"]
        ] == ["not_arrow"]


SEEDS = [make() for make in WAYS.values()]


@pytest.mark.slow
def test_mutated_streams_are_read_or_refused_and_their_neighbours_are_read(full):
    neighbour = WAYS["coded ids and kinds"]()

    @fuzz(full, 400, mutated(*SEEDS))
    def check(value: bytes) -> None:
        read = decode(neighbour, value, GOOD)
        assert [row for row, *_ in read["impressions"] if row != 1] == [0] * 4 + [2]
        assert [row for row, *_ in read["clicks"] if row != 1] == [0, 0]
        assert [row for row, *_ in read["rejects"] if row != 1] == []
        assert any(
            row == 1 for name in ("impressions", "clicks", "rejects") for row, *_ in read[name]
        ) or not len(value)
        assert all(
            message.isprintable() and len(message) < 300 for _, _, message in read["rejects"]
        )
