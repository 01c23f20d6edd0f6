"""JSON records: times, blocks, the strict parser's part, and columns written as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.event_records import FIELDS, GOOD, T, as_values, features, record

from stream_ctr.events import json_events
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.json_events import encode_clicks, encode_impressions
from stream_ctr.events.json_strict import StrictEvent, parse_event

USUAL = [
    GOOD,
    features(app=5, age=-1.5e3),
    features(app=True, age=None),
    features(app='quote " and \\ and é'),
    features(extra={"deep": [1, {"a": None}]}),
    record(time="2025-01-01T00:00:04.200+01:00"),
    json.dumps(json.loads(GOOD), indent=2).encode(),
    b'{"kind":"click","impression_id":"a","time":1735689600000}',
    b'{"impression_id":"a","time":1735689600000,"kind":"click","features":null,'
    b'"true_probability":0.12345678901234567890}',
]


def test_usual_records_do_not_reach_the_strict_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(value: bytes, *_: Any, **__: Any) -> None:
        raise AssertionError(value)

    monkeypatch.setattr(json_events, "parse_event", never)
    events, rejections = Decoder(FIELDS).decode(pa.array(USUAL, pa.large_binary()))
    assert (len(events.impressions), len(events.clicks), len(rejections)) == (7, 2, 0)
    assert events.impressions.features["app"].to_pylist()[:4] == [
        "maps",
        "5",
        "true",
        'quote " and \\ and é',
    ]
    assert events.with_unknown_fields == 1


@pytest.mark.parametrize(("rows", "most_bytes"), [(7, 1 << 20), (1000, 900)])
def test_records_are_read_in_blocks_of_bounded_rows_and_bytes(
    monkeypatch: pytest.MonkeyPatch, rows: int, most_bytes: int
) -> None:
    records = [features(app="m" * (i % 700)) if i % 5 else b"oops" for i in range(200)]
    values = pa.array(records, pa.large_binary())
    together = as_values(Decoder(FIELDS).decode(values))
    monkeypatch.setattr(json_events, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(json_events, "_BLOCK_BYTES", most_bytes)
    size = np.array([len(value) for value in records])
    blocks = json_events._blocks(np.arange(200), size)
    assert np.concatenate(blocks).tolist() == list(range(200))
    assert max(len(block) for block in blocks) <= rows
    assert max(size[block].sum() for block in blocks) < most_bytes + 800
    assert as_values(Decoder(FIELDS).decode(values)) == together


# -- times ---------------------------------------------------------------------------------------


def click_at(time: str) -> bytes:
    return json.dumps({"kind": "click", "impression_id": "a", "time": time}).encode()


@pytest.mark.parametrize(
    "time",
    [
        "2025-01-01T00:00:04.200Z",
        "2025-01-01T01:00:04.200+01:00",
        "2025-01-01T00:00:04.200999Z",
        "2025-01-01 00:00:04.2+00:00",
    ],
)
@pytest.mark.parametrize("count", [1, 100])
def test_rfc_3339_times_are_read_to_the_millisecond(time: str, count: int) -> None:
    values = pa.array([click_at(time)] * count, pa.large_binary())
    events, rejections = Decoder(FIELDS).decode(values)
    assert len(rejections) == 0
    assert set(events.clicks.time.tolist()) == {T + 4200}


def test_only_the_record_with_an_impossible_time_reaches_the_strict_parser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed: list[bytes | None] = []

    def recorded(value: bytes | None, *arguments: Any, **options: Any) -> StrictEvent:
        parsed.append(value)
        return parse_event(value, *arguments, **options)

    monkeypatch.setattr(json_events, "parse_event", recorded)
    good = click_at("2025-02-28T00:00:00Z")
    bad = click_at("2025-02-30T00:00:00Z")
    values = pa.array([good] * 70 + [bad] + [good] * 30, pa.large_binary())
    events, rejections = Decoder(FIELDS).decode(values)
    assert len(events.clicks) == 100
    assert (rejections.row.tolist(), rejections.reason) == ([70], ["wrong_time"])
    assert parsed == [bad]


# -- columns to JSON -----------------------------------------------------------------------------


def strict_json(text: bytes) -> Any:
    """Parse JSON. Unlike the default of Python, reject NaN and Infinity."""

    def reject(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=reject)


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
def test_encoded_events_decode_to_the_same_events(
    rows: list[tuple[str, str | None, float | None, float]],
) -> None:
    ids, apps, ages, probabilities = (list(column) for column in zip(*rows, strict=True))
    time = np.arange(len(rows)) + T
    values = encode_impressions(
        pa.array(ids),
        time,
        {"app": pa.array(apps, pa.string()), "age": pa.array(ages, pa.float64())},
        np.array(probabilities),
    )
    assert [strict_json(value)["impression_id"] for value in values.to_pylist()] == ids
    events, rejections = Decoder(FIELDS).decode(values)
    assert len(rejections) == 0
    impressions = events.impressions
    assert impressions.impression_id.to_pylist() == ids
    assert impressions.features["app"].to_pylist() == apps
    assert impressions.features["age"].to_pylist() == [
        age if age is not None and math.isfinite(age) else None for age in ages
    ]
    assert np.array_equal(impressions.true_probability, probabilities, equal_nan=True)
    clicks = Decoder(FIELDS).decode(encode_clicks(pa.array(ids), time))[0].clicks
    assert clicks.impression_id.to_pylist() == ids


def test_numbers_that_json_cannot_express_are_left_out() -> None:
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


def test_slices_and_dictionaries_are_encoded_like_plain_columns() -> None:
    ids = pa.array(["a", 'quote " in it', "b", "c", "d"])
    columns = {
        "app": pa.array(["maps", None, "back \\ slash", "maps", "é \x01"]),
        "plain": pa.array(["x", "y", "x", None, "z"], pa.large_string()),
        "age": pa.array([31, None, 7, 7, -1]),
        "score": pa.array([0.5, math.nan, None, 0.5, 1e-300]),
        "new": pa.array([True, False, None, True, None]),
        "nothing": pa.array([None] * 5, pa.string()),
    }
    time = np.arange(5) + T
    encoded = encode_impressions(ids, time, columns).to_pylist()
    expected = [
        {name: value for name, value in row.items() if value is not None and value == value}
        for row in pa.table(columns).to_pylist()
    ]
    assert [strict_json(value)["features"] for value in encoded] == expected
    assert [strict_json(value)["impression_id"] for value in encoded] == ids.to_pylist()
    coded = {name: column.dictionary_encode() for name, column in columns.items()}
    assert encode_impressions(ids.dictionary_encode(), time, coded).to_pylist() == encoded
    for first, last in ((0, 0), (1, 1), (0, 3), (1, 4), (3, 5)):
        for each in (columns, coded):
            part = {name: column[first:last] for name, column in each.items()}
            values = encode_impressions(ids[first:last], time[first:last], part)
            assert values.to_pylist() == encoded[first:last]
    without_features = encode_impressions(ids[:1], time[:1], {}).to_pylist()
    assert without_features == [record(features={}).replace(b" ", b"")]
