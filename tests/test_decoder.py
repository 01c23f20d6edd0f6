"""Decoding: what is an event, what is not, and that a bad record harms no other."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.event_records import FIELDS, GOOD, T, features, record

from stream_ctr.errors import DataError
from stream_ctr.events.decoder import Decoder, infer_fields
from stream_ctr.events.json_events import JsonReader, encode_clicks, encode_impressions


@pytest.mark.parametrize(
    ("value", "app", "age"),
    [
        (features(app=5), "5", 31.0),
        (features(app=-(2**63)), str(-(2**63)), 31.0),
        (features(app=True), "true", 31.0),
        (features(app=None, age=None), None, None),
        (record(features={}), None, None),
        (features(extra={"deep": [1]}), "maps", 31.0),
        (b" " + GOOD + b"\n", "maps", 31.0),
        (json.dumps(json.loads(GOOD), indent=2).encode(), "maps", 31.0),
        (
            GOOD.replace(b'"age":31', b'"age":1,"age":31'),
            "maps",
            31.0,
        ),  # of duplicate keys the last wins
        (GOOD[:-1] + b',"x":' + b"[" * 200 + b"]" * 200 + b"}", "maps", 31.0),
        (record(extra="[" * 1000), "maps", 31.0),
        (GOOD.replace(b"maps", b"m\\u0000\\u00e9"), "m\0é", 31.0),
    ],
)
def test_unusual_but_good_records_are_read(value, app, age):
    for values in ([value], [GOOD, value, GOOD]):
        events, rejects = Decoder(FIELDS).decode(pa.array(values, pa.large_binary()))
        assert len(rejects) == 0
        at = len(values) // 2
        assert (
            events.impressions.features["app"][at].as_py(),
            events.impressions.features["age"][at].as_py(),
        ) == (app, age)


@pytest.mark.parametrize(
    "text",
    [
        "2025-01-01T00:00:04.200Z",
        "2025-01-01T01:00:04.200+01:00",
        "2025-01-01T00:00:04.200999Z",
        "2025-01-01 00:00:04.2+00:00",
    ],
)
def test_rfc_3339_times_are_read_to_the_millisecond_alone_and_in_a_stream_of_them(text):
    value = json.dumps({"kind": "click", "impression_id": "a", "time": text}).encode()
    decoder = Decoder(FIELDS)
    for count in (1, 100, 100):  # the later blocks are read the fast way
        events, rejects = decoder.decode(pa.array([value] * count, pa.large_binary()))
        assert len(rejects) == 0
        assert set(events.clicks.time.tolist()) == {T + 4200}


def test_an_impossible_time_is_looked_at_alone_and_its_neighbours_are_read_as_fast_as_ever(
    monkeypatch,
):
    slowly: list[bytes] = []
    read_one = JsonReader._read_one
    monkeypatch.setattr(
        JsonReader,
        "_read_one",
        lambda reader, value: slowly.append(value) or read_one(reader, value),
    )
    good, bad = (
        json.dumps(
            {"kind": "click", "impression_id": "a", "time": f"2025-{day}T00:00:00Z"}
        ).encode()
        for day in ("02-28", "02-30")
    )
    events, rejects = Decoder(FIELDS).decode(
        pa.array([good] * 70 + [bad] + [good] * 30, pa.large_binary())
    )
    assert (len(events.clicks), rejects.row.tolist(), rejects.reason) == (100, [70], ["wrong_time"])
    assert slowly == [bad]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
            st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=8)),
            st.one_of(st.none(), st.floats()),
            st.floats(0, 1) | st.just(math.nan),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_what_is_encoded_decodes_to_itself(rows):
    names, apps, ages, truth = (list(column) for column in zip(*rows, strict=True))
    time = np.arange(len(rows)) + T
    values = encode_impressions(
        pa.array(names),
        time,
        {"app": pa.array(apps, pa.string()), "age": pa.array(ages, pa.float64())},
        np.array(truth),
    )
    assert [strict_json(v)["impression_id"] for v in values.to_pylist()] == names
    events, rejects = Decoder(FIELDS).decode(values)
    assert len(rejects) == 0
    read = events.impressions
    assert read.impression_id.to_pylist() == names
    assert read.features["app"].to_pylist() == apps
    assert read.features["age"].to_pylist() == [
        age if age is not None and math.isfinite(age) else None for age in ages
    ]
    assert np.array_equal(read.true_probability, truth, equal_nan=True)
    clicks, _ = Decoder(FIELDS).decode(encode_clicks(pa.array(names), time))
    assert clicks.clicks.impression_id.to_pylist() == names


def strict_json(text):
    """Python reads NaN and Infinity, which are no JSON."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_what_json_cannot_say_is_left_out():
    columns = {
        "age": pa.array([math.nan, 1.5, math.inf]),
        "size": pa.array([-math.inf, None, 2.0], pa.float32()),
    }
    values = encode_impressions(
        pa.array(["a", "b", "c"]), np.arange(3) + T, columns, np.array([0.5, math.nan, math.inf])
    )
    documents = [strict_json(value) for value in values.to_pylist()]
    assert [document["features"] for document in documents] == [{}, {"age": 1.5}, {"size": 2.0}]
    assert [document.get("true_probability") for document in documents] == [0.5, None, None]


def test_parts_of_columns_and_dictionaries_are_encoded_like_plain_columns():
    names = pa.array(["a", 'quote " in it', "b", "c", "d"])
    columns = {
        "app": pa.array(["maps", None, "back \\ slash", "maps", "é \x01"]),
        "plain": pa.array(["x", "y", "x", None, "z"], pa.large_string()),
        "age": pa.array([31, None, 7, 7, -1]),
        "score": pa.array([0.5, math.nan, None, 0.5, 1e-300]),
        "new": pa.array([True, False, None, True, None]),
        "nothing": pa.array([None] * 5, pa.string()),
    }
    time = np.arange(5) + T
    whole = encode_impressions(names, time, columns).to_pylist()
    expected = [
        {k: v for k, v in row.items() if v is not None and v == v}
        for row in pa.table(columns).to_pylist()
    ]
    assert [strict_json(value)["features"] for value in whole] == expected
    assert [strict_json(value)["impression_id"] for value in whole] == names.to_pylist()
    coded = {name: column.dictionary_encode() for name, column in columns.items()}
    assert encode_impressions(names.dictionary_encode(), time, coded).to_pylist() == whole
    for first, last in ((0, 0), (1, 1), (0, 3), (1, 4), (3, 5)):
        for each in (columns, coded):
            part = {name: column[first:last] for name, column in each.items()}
            assert (
                encode_impressions(names[first:last], time[first:last], part).to_pylist()
                == whole[first:last]
            )
    assert encode_impressions(names[:1], time[:1], {}).to_pylist() == [
        record(features={}).replace(b" ", b"")
    ]


def test_fields_are_inferred_from_what_the_impressions_hold():
    values = [
        features(flag=True, mixed=1),
        features(mixed="x", price=2.5, empty=None),
        b"junk",
        b'{"kind":"click"}',
    ]
    fields = infer_fields(pa.array(values, pa.large_binary()))
    assert [(f.name, f.kind) for f in fields] == [
        ("app", "categorical"), ("flag", "categorical"), ("mixed", "categorical"), ("age", "numeric"), ("price", "numeric"),
    ]  # fmt: skip


def test_what_hardly_any_impression_has_is_no_field_and_too_many_fields_are_an_error():
    usual = [features(rare=1)] + [features()] * 150
    flood = record(features={f"f{i}": 1 for i in range(5000)})
    fields = infer_fields(pa.array([*usual, flood, flood], pa.large_binary()))
    assert [field.name for field in fields] == ["app", "age"]
    assert [field.name for field in infer_fields(pa.array(usual[:100], pa.large_binary()))] == [
        "app",
        "age",
        "rare",
    ]
    many = [record(features={f"f{i * 100 + j}": 1 for j in range(900)}) for i in range(12)]
    with pytest.raises(DataError, match="the impressions have 2,000 features"):
        infer_fields(pa.array(many, pa.large_binary()))
