"""Arrow records: the same events as in JSON, whatever types the columns have.

Bad events and bad records are rejected one by one, and untrusted streams harm nothing else.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import strategies as st
from support.event_records import FIELDS, GOOD, T, as_values, features, record
from support.fuzzing import fuzz, mutated
from support.reliability import Outcome

from stream_ctr.events.arrow_events import MOST_EVENTS, feature_types, is_arrow, pack
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher, hash_ids
from stream_ctr.events.ipc_frames import MARKER
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
    write_options = pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_stream(sink, batches[0].schema, options=write_options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def batch(**changes: Any) -> pa.RecordBatch:
    """Return the good columns with these changed, or left out where they are `...`."""
    columns = {**COLUMNS, **changes}
    return pa.RecordBatch.from_pydict(
        {name: column for name, column in columns.items() if column is not ...}
    )


def members(column: pa.Array, name: str = "app") -> pa.StructArray:
    """Return the good features with this column as the feature `name`."""
    good = pa.array(COLUMNS["features"])
    arrays = {"app": good.field(0), "age": good.field(1), name: column}
    return pa.StructArray.from_arrays(list(arrays.values()), list(arrays), mask=good.is_null())


def decode(*records: bytes) -> dict[str, Any]:
    """Return the decoded events as plain values, with their indices within their records."""
    events, rejections = Decoder(FIELDS).decode(pa.array(records, pa.large_binary()))
    return {
        **as_values((events, rejections)),
        "within": {
            "i": events.impressions.within.tolist(),
            "c": events.clicks.within.tolist(),
            "r": rejections.within.tolist(),
        },
        "values": rejections.value,
    }


def without_places(read: dict[str, Any]) -> dict[str, Any]:
    """Return the decoded events without the rows of their records."""
    return {
        "features": read["features"],
        "true_probability": read["true_probability"],
        "with_unknown_fields": read["with_unknown_fields"],
        **{
            name: [event[1:] for event in read[name]]
            for name in ("impressions", "clicks", "rejects")
        },
    }


def as_json() -> list[bytes]:
    """Return the good columns as JSON records."""
    rows = [
        {name: value for name, value in row.items() if value is not None}
        for row in pa.RecordBatch.from_pydict(COLUMNS).to_pylist()
    ]
    return [json.dumps(row).encode() for row in rows]


def test_only_records_with_the_whole_marker_are_arrow() -> None:
    values = [MARKER, MARKER[:3], b"", None, b"{" + MARKER, MARKER[:3] + b"\0", stream(batch())]
    expected = [True, False, False, False, False, False, True]
    array = pa.array(values, pa.large_binary())
    assert is_arrow(array).tolist() == expected
    assert is_arrow(array[1:]).tolist() == expected[1:]
    assert is_arrow(array[:0]).tolist() == []


# -- the same as JSON ----------------------------------------------------------------------------

APPS = pa.array(COLUMNS["features"]).flatten()[0]
AGES = [31, None, -1, None, None, 7]
TEXT_TYPES = {"string": pa.string(), "large": pa.large_string(), "view": pa.string_view()}
NANOSECONDS = pa.array([1_000_000 * (T + i) + 999 for i in range(N)], pa.timestamp("ns"))
MICROSECONDS = pa.array(
    [1000 * (T + i) + 999 for i in range(N)], pa.timestamp("us", "Europe/Berlin")
)


def coded(type: pa.DataType, *others: Any) -> pa.DictionaryArray:
    """Return the apps as a dictionary. One null is an index of the first of the other words."""
    indices = [0, None, 2 if others else None, 1, None, 0]
    return pa.DictionaryArray.from_arrays(
        pa.array(indices, pa.int8()), pa.array(["maps", "mail", *others], type)
    )


def texts(type: pa.DataType, apps: pa.Array) -> bytes:
    kinds = pa.array(COLUMNS["kind"], type)
    ids = pa.array(COLUMNS["impression_id"], type)
    return stream(batch(features=members(apps), kind=kinds, impression_id=ids))


def with_features(column: pa.Array, name: str) -> bytes:
    return stream(batch(features=members(column, name)))


def coded_ids_and_kinds() -> bytes:
    columns = {name: pa.array(COLUMNS[name]) for name in ("kind", "impression_id")}
    return stream(batch(**{name: column.dictionary_encode() for name, column in columns.items()}))


def in_batches() -> bytes:
    return stream(
        batch().slice(0, 1), batch().slice(1, 4), batch().slice(5, 0), batch().slice(5, 1)
    )


ENCODINGS: dict[str, Callable[[], bytes]] = {
    "plain": lambda: stream(batch()),
    "in batches": in_batches,
    "compressed with Zstandard": lambda: stream(batch(), compression="zstd"),
    "compressed with LZ4": lambda: stream(batch(), compression="lz4"),
    "nanoseconds": lambda: stream(batch(time=NANOSECONDS)),
    "microseconds of a zone": lambda: stream(batch(time=MICROSECONDS)),
    "small integers": lambda: with_features(pa.array(AGES, pa.int8()), "age"),
    "decimals": lambda: with_features(pa.array(AGES).cast(pa.decimal128(22, 1)), "age"),
    "half floats, missing as NaN": lambda: with_features(
        pa.array(np.array(AGES, np.float16)), "age"
    ),
    "coded ids and kinds": coded_ids_and_kinds,
    "coded with a missing word": lambda: with_features(coded(pa.string(), None), "app"),
    **{f"{name} plain": partial(texts, type, APPS.cast(type)) for name, type in TEXT_TYPES.items()},
    **{f"{name} coded": partial(texts, type, coded(type)) for name, type in TEXT_TYPES.items()},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_events_in_columns_are_those_in_json_alone_and_among_records_of_both_formats(
    encoding: str,
) -> None:
    expected = decode(*as_json())
    value = ENCODINGS[encoding]()
    alone = decode(value)
    assert without_places(alone) == without_places(expected)
    assert alone["within"] == {"i": [0, 2, 3, 5], "c": [1, 4], "r": []}
    mixed = decode(GOOD, value, b"oops", ENCODINGS["coded with a missing word"](), value)
    assert [row for row, *_ in mixed["impressions"]] == [0, *[1] * 4, *[3] * 4, *[4] * 4]
    assert mixed["within"] == {"i": [0, *[0, 2, 3, 5] * 3], "c": [1, 4] * 3, "r": [0]}
    assert mixed["features"]["app"] == ["maps", *expected["features"]["app"] * 3]
    assert (mixed["rejects"][0][:2], mixed["values"]) == ((2, "not_json"), [None])


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, 0, None, 2**64 - 1, 0, 7], pa.uint64()), ["1", None, str(2**64 - 1), "7"]),
        (pa.array([True, None, None, False, None, True]), ["true", None, "false", "true"]),
        (pa.array([5, 5, None, -6, 5, 5]).dictionary_encode(), ["5", None, "-6", "5"]),
        (pa.nulls(N), [None] * 4),
    ],
)
def test_integers_and_booleans_are_categories_by_their_text(
    column: pa.Array, expected: list[str | None]
) -> None:
    assert decode(with_features(column, "app"))["features"]["app"] == expected


def test_the_last_of_several_columns_of_one_name_counts() -> None:
    good = batch()
    twice = pa.RecordBatch.from_arrays(
        [pa.array(["z"] * N), *good.columns], ["impression_id", *good.schema.names]
    )
    read = decode(stream(twice))
    assert [identity for _, identity, _ in read["clicks"]] == ["a", "b"]
    assert read["with_unknown_fields"] == N


def test_events_with_other_members_or_columns_are_counted() -> None:
    read = decode(stream(batch(server=[None, "x", None, None, None, None])))
    assert read["with_unknown_fields"] == 1
    # Features of clicks do not count.
    read = decode(with_features(pa.array([1, 1, None, 2, 1, None]), "x"))
    assert read["with_unknown_fields"] == 2


def test_types_of_features_are_counted_over_impressions() -> None:
    flags = members(pa.array([True] * N), "flag")
    impressions, types = feature_types(batch(features=flags))
    assert impressions == 4
    assert types == {"app": {str: 3}, "age": {float: 3}, "flag": {str: 4}}
    assert feature_types(batch(kind=["click"] * N)) == (0, {})


# -- packing -------------------------------------------------------------------------------------


def test_any_events_have_the_same_ids_in_both_formats(full: bool) -> None:
    """Pack records as `replay --wire arrow` does, among JSON records that do not fit."""
    apps = st.one_of(st.none(), st.text(max_size=4), st.integers(-9, 9), st.booleans())
    ages = st.one_of(
        st.none(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False)
    )
    impressions = st.builds(
        lambda app, age, i: features(app=app, age=age, other=i), apps, ages, st.integers(0, 2)
    )
    click = record(kind="click", features=...)
    others = st.sampled_from([click, b"oops", b""])
    hasher = Hasher(FIELDS, table_bits=20)

    def hashed(values: pa.Array) -> tuple[Any, ...]:
        events, rejections = Decoder(FIELDS).decode(values)
        impressions = events.impressions
        return (
            *(array.tolist() for array in hasher.rows(impressions.features)),
            hash_ids(impressions.impression_id).tolist(),
            len(events.clicks),
            rejections.reason,
        )

    @fuzz(
        full,
        100,
        st.lists(st.one_of(impressions, others), min_size=1, max_size=30),
        st.integers(1, 12),
    )
    def check(lines: list[bytes], size: int) -> None:
        values = pa.array(lines, pa.large_binary())
        packed = pack(values, events_a_record=size)
        assert hashed(packed) == hashed(values)


def test_packed_records_are_full_and_a_record_that_does_not_fit_stays_as_it_is() -> None:
    clicks = encode_clicks(pa.array([f"i{i}" for i in range(2500)]), np.arange(2500) + T)
    other = pa.array([b"x"], pa.large_binary())
    packed = pack(pa.concat_arrays([clicks, other]), events_a_record=1000)
    read = decode(*packed.to_pylist())
    assert read["within"]["c"][:2000] == [*range(1000)] * 2
    assert [identity for _, identity, _ in read["clicks"]] == [f"i{i}" for i in range(2500)]
    assert packed[-1].as_py() == b"x"


def test_packed_records_are_smaller_than_the_megabyte_that_a_broker_accepts() -> None:
    ids = pa.array([f"{i}" * 1000 for i in range(100, 500)])
    packed = pack(encode_impressions(ids, np.arange(400) + T, {}), events_a_record=1000)
    assert max(map(len, packed.to_pylist())) < 1_000_000
    assert len(decode(*packed.to_pylist())["impressions"]) == 400


# -- bad events, each a dead letter of its own ---------------------------------------------------

BAD_EVENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown_kind": (
        {"kind": ["impression", "view", "impression", None, "click", "impression"]},
        "kind must be impression, click or example",
    ),
    "missing_id": ({"impression_id": ["a", None, "b", "", "b", "d"]}, "impression_id is missing"),
    "missing_time": ({"time": [T, None, T, None, T, T]}, "time is missing"),
    "time_out_of_range": ({"time": [T, 5, T, -T, T, T]}, "is not between"),
    "missing_features": (
        {"features": [{"app": "maps"}, None, {"app": None}, None, None, {"app": "maps"}]},
        "needs features",
    ),
    "wrong_probability": ({"true_probability": [0.5, 1.5, None, -1.0, None, 1]}, "is not in"),
}


def coded_columns(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Return the columns with dictionaries, one of which has a long word that no event uses."""
    words = pa.array(["x" * 10_000, "maps"], pa.string_view())
    features = pa.StructArray.from_arrays(
        [pa.DictionaryArray.from_arrays([1] * N, words), pa.array([1.5] * N)],
        ["app", "age"],
        mask=columns["features"].is_null(),
    )
    texts = {name: columns[name].dictionary_encode() for name in ("kind", "impression_id")}
    return {**columns, **texts, "features": features}


@pytest.mark.parametrize("reason", BAD_EVENTS)
@pytest.mark.parametrize("coded", [False, True])
def test_a_bad_event_is_a_dead_letter_that_can_be_replayed_and_its_neighbours_are_read(
    reason: str, coded: bool
) -> None:
    changes, message = BAD_EVENTS[reason]
    columns = {name: pa.array(column) for name, column in {**COLUMNS, **changes}.items()}
    columns = coded_columns(columns) if coded else columns
    read = decode(stream(pa.RecordBatch.from_pydict(columns)), GOOD)
    bad = [3] if reason == "missing_features" else [1, 3]
    assert [(row, code) for row, code, _ in read["rejects"]] == [(0, reason)] * len(bad)
    assert all(message in text for _, _, text in read["rejects"])
    assert read["within"]["r"] == bad
    good = sorted(read["within"]["i"][:-1] + read["within"]["c"])
    assert good == [i for i in range(N) if i not in bad]
    for value in read["values"]:
        assert len(value) < 5000
        again = decode(value)
        assert [code for _, code, _ in again["rejects"]] == [reason]
        assert again["within"] == {"i": [], "c": [], "r": [0]}


def test_an_event_far_ahead_of_its_record_is_a_dead_letter_that_is_good_later() -> None:
    value = stream(batch(time=[T, T, T, T + 300_001, T, T]))
    values = pa.array([value, value], pa.large_binary())
    events, rejections = Decoder(FIELDS).decode(values, np.array([T, -1]))
    assert (rejections.row.tolist(), rejections.within.tolist()) == ([0], [3])
    assert rejections.reason == ["time_in_future"]
    assert (len(events.impressions), len(events.clicks)) == (7, 4)
    letter = rejections.value[0]
    assert letter is not None
    again = decode(letter)
    assert again["impressions"] == [(0, "caf\u00e9", T + 300_001)]
    assert again["features"] == {"app": ["mail"], "age": [None]}


# -- records that are rejected -------------------------------------------------------------------


def views_of(text: bytes, times: int) -> pa.StringViewArray:
    """Return many views of the same bytes."""
    view = struct.pack("<i4sii", len(text), text[:4], 0, 0)
    return pa.Array.from_buffers(
        pa.string_view(), times, [None, pa.py_buffer(view * times), pa.py_buffer(text)]
    )


def indices_of(word: str, times: int) -> pa.DictionaryArray:
    """Return many indices of the same word."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int8)), pa.array([word]))


def times_of(time: int, times: int) -> pa.Int64Array:
    return pa.array(np.full(times, time, np.int64))


def bad_events(n: int, **columns: Any) -> bytes:
    """Return n events without kind, id and time."""
    nulls = {"kind": pa.nulls(n), "impression_id": pa.nulls(n), "time": pa.nulls(n)}
    return stream(pa.RecordBatch.from_pydict({**nulls, **columns}))


def impressions(n: int, **columns: Any) -> pa.RecordBatch:
    """Return n good impressions that take hardly any bytes, with these columns changed."""
    good = {
        "kind": indices_of("impression", n),
        "impression_id": indices_of("a", n),
        "time": times_of(T, n),
        "features": pa.StructArray.from_arrays([indices_of("maps", n)], ["app"]),
    }
    return pa.RecordBatch.from_pydict({**good, **columns})


def compressed(batch: pa.RecordBatch) -> bytes:
    return stream(batch, compression="zstd")


def invalid_utf8() -> bytes:
    ids = pa.array([b"\xff"] * N).view(pa.string())
    return stream(batch(impression_id=ids))


def index_beyond_its_dictionary() -> bytes:
    column = pa.DictionaryArray.from_arrays([9] * N, pa.array(["x"]), safe=False)
    return with_features(column, "app")


def one_long_text_in_two_columns() -> bytes:
    features = pa.StructArray.from_arrays([views_of(b"x" * 2500, 500)], ["app"])
    return stream(impressions(500, impression_id=views_of(b"i" * 2500, 500), features=features))


def growing_dictionary() -> bytes:
    """Return 300 batches of one event, with 60 more words each: of 2 MB of words, 150 are made."""
    words = pa.array([f"{number:0100}" for number in range(60 * 300)])
    index = pa.array([0], pa.int32())
    return stream(
        *(
            impressions(
                1,
                features=pa.StructArray.from_arrays(
                    [pa.DictionaryArray.from_arrays(index, words[: 60 * (count + 1)])], ["app"]
                ),
            )
            for count in range(300)
        ),
        emit_dictionary_deltas=True,
        compression="zstd",
    )


def views_with_a_byte_too_many() -> bytes:
    """Return a stream of four events whose ids are views in a buffer of 65 bytes, not of 64."""
    ids = pa.array([f"a long id, {number}" for number in range(4)], pa.string_view())
    value = stream(impressions(4, impression_id=ids))
    size, other = struct.pack("<q", 64), struct.pack("<q", 65)
    assert value.count(size) == 1
    return value.replace(size, other)


DAMAGED: dict[str, Callable[[], bytes]] = {
    "only the marker": lambda: b"\xff\xff\xff\xff",
    "only an end": lambda: b"\xff\xff\xff\xff\0\0\0\0",
    "cut off within a batch": lambda: stream(batch())[:-200],
    "cut off before its end": lambda: stream(batch())[:-8],
    "more after its end": lambda: stream(batch()) + b"x",
    "two streams": lambda: stream(batch()) * 2,
    "text that is not UTF-8": invalid_utf8,
    "an index beyond its dictionary": index_beyond_its_dictionary,
}
WRONG_TYPE: dict[str, Callable[[], bytes]] = {
    "kind a number": lambda: stream(batch(kind=[1] * N)),
    "id a fraction": lambda: stream(batch(impression_id=[1.5] * N)),
    "time a fraction": lambda: stream(batch(time=[0.5] * N)),
    "time a text": lambda: stream(batch(time=["2025-01-01T00:00:00Z"] * N)),
    "features a text": lambda: stream(batch(features=["x"] * N)),
    "a category a fraction": lambda: with_features(pa.array([0.5] * N), "app"),
    "a category a list": lambda: with_features(pa.array([["x"]] * N), "app"),
    "a number a text": lambda: with_features(pa.array(["1"] * N), "age"),
    "a probability true": lambda: stream(batch(true_probability=[True] * N)),
}
TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "more bytes than a record may have": lambda: bad_events(1000, x=pa.array(["x" * 2000] * 1000)),
    "a compression bomb": lambda: compressed(
        pa.RecordBatch.from_pydict({"x": ["x" * 20_000] * 1000})
    ),
    "one long id many times": lambda: bad_events(
        1000, impression_id=indices_of("x" * 100_000, 1000)
    ),
    "hardly any bytes and very many events": lambda: compressed(impressions(5000)),
    "one long text many times, in two columns": one_long_text_in_two_columns,
    "a dictionary that grows with each batch": growing_dictionary,
}
TOO_MANY_BAD_EVENTS: dict[str, Callable[[], bytes]] = {
    "more bad events than dead letters": lambda: bad_events(1001),
    "hardly any bytes and very many dead letters": lambda: compressed(
        impressions(1000, time=times_of(5, 1000))
    ),
    "one long word in many dead letters": lambda: bad_events(
        1000, x=indices_of("x" * 100_000, 1000)
    ),
}
BAD_RECORDS: dict[str, tuple[Callable[[], bytes], str]] = {
    **{name: (make, "not_arrow") for name, make in DAMAGED.items()},
    "no kind": (lambda: stream(batch(kind=...)), "missing_column"),
    "no id": (lambda: stream(batch(impression_id=...)), "missing_column"),
    "no time": (lambda: stream(batch(time=...)), "missing_column"),
    **{name: (make, "wrong_type") for name, make in WRONG_TYPE.items()},
    "too many events": (lambda: bad_events(MOST_EVENTS + 1), "too_many_events"),
    **{name: (make, "too_large") for name, make in TOO_LARGE.items()},
    **{name: (make, "too_many_bad_events") for name, make in TOO_MANY_BAD_EVENTS.items()},
}


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that Arrow and Python allocate while this runs."""
    pool = pa.default_memory_pool()
    measured = pa.system_memory_pool()  # which nothing else uses here
    pa.set_memory_pool(measured)
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] + (measured.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(pool)


@pytest.mark.bad_input("Arrow: records that unfold to gigabytes", via="records")
@pytest.mark.parametrize("name", [*TOO_LARGE, *TOO_MANY_BAD_EVENTS])
def test_a_record_that_would_unfold_takes_little_memory(name: str, outcome: Outcome) -> None:
    make, reason = BAD_RECORDS[name]
    value = make()
    assert peak_bytes(lambda: decode(value)) < 5 * 16 * 2**20
    outcome(f"dead letter: {reason}, in bounded memory")


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_cannot_be_read_is_one_rejection_and_harms_no_other(name: str) -> None:
    make, reason = BAD_RECORDS[name]
    value = make()
    for around in ([], [stream(batch())], [GOOD]):
        read = decode(*around, value, *around)
        assert [(row, code) for row, code, _ in read["rejects"]] == [(len(around), reason)]
        assert read["rejects"][0][2].isprintable()
        assert read["values"] == [None]
        assert len(read["impressions"]) == 2 * len(decode(*around)["impressions"])


@pytest.mark.bad_input("Arrow: buffers of odd sizes, as full validation accepts", via="records")
def test_views_in_a_buffer_that_is_larger_than_they_need_are_read(outcome: Outcome) -> None:
    read = decode(views_with_a_byte_too_many())
    assert [identity for _, identity, _ in read["impressions"]] == [
        f"a long id, {number}" for number in range(4)
    ]
    outcome("read")


def test_good_events_that_compress_well_are_not_a_compression_bomb() -> None:
    ids = pa.array([f"{i:020}" for i in range(10_000)])
    times = pa.array(np.arange(10_000) + T)
    value = compressed(impressions(10_000, impression_id=ids, time=times))
    assert len(value) < 10_000 * 8
    assert len(decode(value)["impressions"]) == 10_000


def test_a_long_word_that_batches_share_counts_once() -> None:
    word = pa.array(["x" * 200_000], pa.string_view())
    column = pa.DictionaryArray.from_arrays(pa.array([0, 0]), word)
    one = impressions(2, features=pa.StructArray.from_arrays([column], ["app"]))
    assert len(decode(stream(*[one] * 200))["impressions"]) == 400


@pytest.mark.parametrize(
    "function",
    ["stream_ctr.events.arrow_events.ipc_frames.sizes", "stream_ctr.events.arrow_events._Columns"],
)
def test_a_record_for_which_memory_runs_out_is_not_rejected(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise pa.lib.ArrowMemoryError("malloc failed")

    monkeypatch.setattr(function, fail)
    with pytest.raises(MemoryError):
        decode(stream(batch()))


@pytest.mark.parametrize("name", [b"nested", b"feature", b"server"])
def test_a_name_that_is_not_utf_8_is_rejected_at_any_depth(name: bytes) -> None:
    nested = pa.array([{"nested": {"feature": 1}}] * N)
    value = stream(batch(features=nested, server=pa.array(["x"] * N)))
    assert decode(value)["rejects"] == []
    damaged = decode(value.replace(name, b"\xff" * len(name)))
    assert [code for _, code, _ in damaged["rejects"]] == ["not_arrow"]


SEEDS = [make() for make in ENCODINGS.values()]


@pytest.mark.slow
def test_mutated_streams_are_read_or_rejected_and_their_neighbours_are_read(full: bool) -> None:
    neighbour = coded_ids_and_kinds()

    @fuzz(full, 400, mutated(*SEEDS))
    def check(value: bytes) -> None:
        read = decode(neighbour, value, GOOD)
        others = {
            name: [row for row, *_ in read[name] if row != 1]
            for name in ("impressions", "clicks", "rejects")
        }
        assert others == {"impressions": [0] * 4 + [2], "clicks": [0, 0], "rejects": []}
        is_read = any(
            row == 1 for name in ("impressions", "clicks", "rejects") for row, *_ in read[name]
        )
        assert is_read or not len(value)
        for _, _, message in read["rejects"]:
            assert message.isprintable()
            assert len(message) < 300
