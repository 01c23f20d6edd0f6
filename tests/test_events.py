"""Decoding: what is an event, what is not, and that a bad record harms no other."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_ctr.config import Field
from stream_ctr.events import Decoder, encode_clicks, encode_impressions, infer_fields

FIELDS = (Field("app", "categorical"), Field("age", "numeric"))
T = 1_735_689_600_000
GOOD = b'{"kind":"impression","impression_id":"a","time":1735689600000,"features":{"app":"maps","age":31}}'


def record(**changes: object) -> bytes:
    document = {"kind": "impression", "impression_id": "a", "time": T, "features": {"app": "maps", "age": 31}, **changes}
    return json.dumps({name: value for name, value in document.items() if value is not ...}).encode()


def features(**changes: object) -> bytes:
    return record(features={"app": "maps", "age": 31, **changes})


def decode(*values: bytes | None):
    return Decoder(FIELDS).decode(pa.array(values, pa.large_binary()))


BAD = {
    "tombstone": (None, "tombstone"),
    "no bytes": (b"", "empty"),
    "white space": (b"  \n ", "empty"),
    "text": (b"oops", "not_json"),
    "truncated": (GOOD[:-5], "not_json"),
    "trailing bytes": (GOOD + b" x", "not_json"),
    "two documents": (GOOD + GOOD, "not_json"),
    "two lines": (GOOD + b"\n" + GOOD, "not_json"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "not_json"),
    "invalid UTF-8": (GOOD.replace(b"maps", b"\xff\xfe"), "not_json"),
    "lone surrogate": (GOOD.replace(b"maps", b"\\ud800"), "not_json"),
    "control character": (GOOD.replace(b"maps", b"m\x01"), "not_json"),
    "NaN": (GOOD.replace(b"31", b"NaN"), "not_json"),
    "Infinity": (GOOD.replace(b"31", b"Infinity"), "not_json"),
    "1e999": (GOOD.replace(b"31", b"1e999"), "not_json"),
    "100,000 deep": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
    "good but for an extra field 300 deep": (GOOD[:-1] + b',"x":' + b"[" * 300 + b"]" * 300 + b"}", "too_deep"),
    "null": (b"null", "not_an_object"),
    "a list": (b"[1]", "not_an_object"),
    "a string": (b'"x"', "not_an_object"),
    "no kind": (record(kind=...), "unknown_kind"),
    "another kind": (record(kind="view"), "unknown_kind"),
    "a number as kind": (record(kind=3), "wrong_type"),
    "no id": (record(impression_id=...), "missing_id"),
    "an empty id": (record(impression_id=""), "missing_id"),
    "a number as id": (record(impression_id=5), "wrong_type"),
    "no time": (record(time=...), "missing_time"),
    "time 0": (record(time=0), "time_out_of_range"),
    "negative time": (record(time=-T), "time_out_of_range"),
    "seconds": (record(time=T // 1000), "time_out_of_range"),
    "microseconds": (record(time=T * 1000), "time_out_of_range"),
    "beyond 64 bits": (record(time=2**63), "wrong_time"),
    "a fraction as time": (record(time=T + 0.5), "wrong_time"),
    "true as time": (record(time=True), "wrong_time"),
    "a word as time": (record(time="yesterday"), "wrong_time"),
    "time without zone": (record(time="2025-01-01T00:00:00"), "wrong_time"),
    "no features": (record(features=...), "missing_features"),
    "null features": (record(features=None), "missing_features"),
    "features a list": (record(features=[1]), "wrong_type"),
    "true for a number": (features(age=True), "wrong_type"),
    "a string for a number": (features(age="31"), "wrong_type"),
    "a fraction for a category": (features(app=1.5), "wrong_type"),
    "a list for a category": (features(app=["maps"]), "wrong_type"),
    "a category beyond 64 bits": (features(app=2**63), "wrong_type"),
    "a probability of 2": (record(true_probability=2), "wrong_probability"),
    "a probability of true": (record(true_probability=True), "wrong_type"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_rejected_with_its_reason_and_harms_no_other(name):
    value, reason = BAD[name]
    events, rejects = decode(GOOD, value, GOOD)
    assert (rejects.row.tolist(), rejects.reason) == ([1], [reason])
    assert len(rejects.message[0]) < 300
    assert events.impressions.row.tolist() == [0, 2]
    assert events.impressions.features["app"].to_pylist() == ["maps", "maps"]
    assert decode(value)[1].reason == [reason]  # alone as well


def test_a_record_over_the_size_limit_is_rejected_unread():
    _, rejects = Decoder(FIELDS, max_record_bytes=200).decode(pa.array([GOOD, features(app="m" * 200)], pa.large_binary()))
    assert rejects.reason == ["too_large"]


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
        (GOOD.replace(b'"age":31', b'"age":1,"age":31'), "maps", 31.0),  # of duplicate keys the last wins
        (GOOD[:-1] + b',"x":' + b"[" * 200 + b"]" * 200 + b"}", "maps", 31.0),
        (record(extra="[" * 1000), "maps", 31.0),
        (GOOD.replace(b"maps", b"m\\u0000\\u00e9"), "m\0é", 31.0),
    ],
)
def test_unusual_but_good_records_are_read(value, app, age):
    for values in ([value], [GOOD, value, GOOD]):
        events, rejects = decode(*values)
        assert len(rejects) == 0
        at = len(values) // 2
        assert (events.impressions.features["app"][at].as_py(), events.impressions.features["age"][at].as_py()) == (app, age)


@pytest.mark.parametrize(
    "text", ["2025-01-01T00:00:04.200Z", "2025-01-01T01:00:04.200+01:00", "2025-01-01T00:00:04.200999Z", "2025-01-01 00:00:04.2+00:00"]
)
def test_rfc_3339_times_are_read_to_the_millisecond_alone_and_in_a_stream_of_them(text):
    value = json.dumps({"kind": "click", "impression_id": "a", "time": text}).encode()
    decoder = Decoder(FIELDS)
    for count in (1, 100, 100):  # the later blocks are read the fast way
        events, rejects = decoder.decode(pa.array([value] * count, pa.large_binary()))
        assert len(rejects) == 0
        assert set(events.clicks.time.tolist()) == {T + 4200}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["impression", "click", "view", 1, None]),
        "impression_id": st.sampled_from(["a", "b", "", 5, None]),
        "time": st.one_of(st.integers(T, T + 10**6), st.just("2025-01-01T00:00:00Z"), json_values),
        "features": st.one_of(
            st.fixed_dictionaries({}, optional={"app": st.text(max_size=3) | json_values, "age": st.floats(-9, 9) | json_values}),
            json_values,
        ),
        "true_probability": st.floats(-1, 2) | json_values,
    },
)
records = st.one_of(
    documents.map(lambda d: json.dumps(d).encode("utf-8", "surrogatepass")), st.just(GOOD), st.binary(max_size=20), st.none()
)


@settings(max_examples=150, deadline=None)
@given(st.lists(records, min_size=1, max_size=30))
def test_the_fast_way_and_the_strict_way_accept_the_same_records(values):
    """Together (blocks through Arrow) and alone through the strict parser."""

    class Strict(Decoder):
        def _sort_out(self, values):
            return np.empty(0, np.int64), np.arange(len(values))

    array = pa.array(values, pa.large_binary())
    together, rejects = Decoder(FIELDS).decode(array)
    strict, strict_rejects = Strict(FIELDS).decode(array)
    assert rejects.row.tolist() == strict_rejects.row.tolist()
    assert rejects.reason == strict_rejects.reason
    for a, b in ((together.impressions, strict.impressions), (together.clicks, strict.clicks)):
        assert a.row.tolist() == b.row.tolist()
        assert a.time.tolist() == b.time.tolist()
        assert a.impression_id.to_pylist() == b.impression_id.to_pylist()
    for name in ("app", "age"):
        assert together.impressions.features[name].to_pylist() == strict.impressions.features[name].to_pylist()
    seen = sorted([*together.impressions.row, *together.clicks.row, *rejects.row])
    assert seen == list(range(len(values)))  # nothing is lost, nothing is read twice


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
        pa.array(names), time, {"app": pa.array(apps, pa.string()), "age": pa.array(ages, pa.float64())}, np.array(truth)
    )
    assert [strict_json(v)["impression_id"] for v in values.to_pylist()] == names
    events, rejects = Decoder(FIELDS).decode(values)
    assert len(rejects) == 0
    read = events.impressions
    assert read.impression_id.to_pylist() == names
    assert read.features["app"].to_pylist() == apps
    assert read.features["age"].to_pylist() == [age if age is not None and math.isfinite(age) else None for age in ages]
    assert np.array_equal(read.true_probability, truth, equal_nan=True)
    clicks, _ = Decoder(FIELDS).decode(encode_clicks(pa.array(names), time))
    assert clicks.clicks.impression_id.to_pylist() == names


def strict_json(text):
    """Python reads NaN and Infinity, which are no JSON."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_what_json_cannot_say_is_left_out():
    columns = {"age": pa.array([math.nan, 1.5, math.inf]), "size": pa.array([-math.inf, None, 2.0], pa.float32())}
    values = encode_impressions(pa.array(["a", "b", "c"]), np.arange(3) + T, columns, np.array([0.5, math.nan, math.inf]))
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
    expected = [{k: v for k, v in row.items() if v is not None and v == v} for row in pa.table(columns).to_pylist()]
    assert [strict_json(value)["features"] for value in whole] == expected
    assert [strict_json(value)["impression_id"] for value in whole] == names.to_pylist()
    coded = {name: column.dictionary_encode() for name, column in columns.items()}
    assert encode_impressions(names.dictionary_encode(), time, coded).to_pylist() == whole
    for first, last in ((0, 0), (1, 1), (0, 3), (1, 4), (3, 5)):
        for each in (columns, coded):
            part = {name: column[first:last] for name, column in each.items()}
            assert encode_impressions(names[first:last], time[first:last], part).to_pylist() == whole[first:last]
    assert encode_impressions(names[:1], time[:1], {}).to_pylist() == [record(features={}).replace(b" ", b"")]


def test_fields_are_inferred_from_what_the_impressions_hold():
    values = [features(flag=True, mixed=1), features(mixed="x", price=2.5, empty=None), b"junk", b'{"kind":"click"}']
    fields = infer_fields(pa.array(values, pa.large_binary()))
    assert [(f.name, f.kind) for f in fields] == [
        ("app", "categorical"), ("flag", "categorical"), ("mixed", "categorical"), ("age", "numeric"), ("price", "numeric"),
    ]  # fmt: skip


def test_an_event_far_ahead_of_its_record_is_rejected_and_one_without_a_record_time_is_not():
    ahead = record(time=T + 86_400_001)
    values = pa.array([ahead, ahead, record(time=T + 86_400_000), record(time=T - 10**10)], pa.large_binary())
    events, rejects = Decoder(FIELDS).decode(values, np.array([T, -1, T, T]))
    assert (rejects.row.tolist(), rejects.reason) == ([0], ["time_in_future"])
    assert events.impressions.row.tolist() == [1, 2, 3]
