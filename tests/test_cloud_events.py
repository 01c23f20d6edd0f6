"""CloudEvents are read as the events that they wrap."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from support.event_records import EVENTS, FIELDS, GOOD, T, as_values, record
from support.fuzzing import StrictDecoder, fuzz, mutated

from stream_ctr.events.decoder import Decoder

ENVELOPE = {"specversion": "1.0", "id": "e1", "source": "/ads", "type": "shown"}


def decode(*records: bytes) -> dict[str, Any]:
    return as_values(Decoder(FIELDS).decode(pa.array(records, pa.large_binary())))


def wrapped(event: bytes, **more: object) -> bytes:
    envelope = json.dumps({**ENVELOPE, **more}).encode()
    return envelope[:-1] + b',"data":' + event + b"}"


def test_events_are_those_of_the_bare_records_in_any_mixture() -> None:
    bare = decode(*EVENTS)
    assert decode(*map(wrapped, EVENTS)) == bare
    assert decode(*(wrapped(e) if row % 2 else e for row, e in enumerate(EVENTS))) == bare


def test_the_id_and_the_time_of_the_envelope_stand_in() -> None:
    nameless = record(impression_id=..., time=...)
    nulls = record(impression_id=None, time=None)
    time = "2025-01-01T00:00:00.007Z"
    read = decode(wrapped(nameless, time=time), wrapped(nulls, time=time), wrapped(GOOD, time=time))
    assert read["rejects"] == []
    assert read["impressions"] == [(0, "e1", T + 7), (1, "e1", T + 7), (2, "a", T)]
    assert read["with_unknown_fields"] == 0


def test_an_event_with_a_kind_is_no_envelope() -> None:
    read = decode(record(specversion="1.0", data={"kind": "click"}))
    assert read["impressions"] == [(0, "a", T)]


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        (json.dumps(ENVELOPE).encode(), "not_an_object", "needs the event as its data"),
        (wrapped(b'"text"'), "not_an_object", "needs the event as its data, a JSON object, got"),
        (wrapped(b"{}"), "unknown_kind", "kind must be impression, click or example"),
        (
            wrapped(record(impression_id=1.5)),
            "wrong_type",
            "the data of a CloudEvent: impression_id",
        ),
        (wrapped(b"{"), "not_json", ""),
    ],
)
def test_a_bad_event_is_rejected_and_harms_no_other(
    value: bytes, reason: str, message: str
) -> None:
    read = decode(GOOD, value, wrapped(GOOD))
    ((row, found, said),) = read["rejects"]
    assert (row, found) == (1, reason)
    assert message in said
    assert [row for row, *_ in read["impressions"]] == [0, 2]


def test_both_parsers_read_the_same_of_any_bytes() -> None:
    seeds = [wrapped(event, time="2025-01-01T00:00:00Z") for event in EVENTS]

    def check(value: bytes) -> None:
        values = pa.array([value], pa.large_binary())
        strict = as_values(StrictDecoder(FIELDS).decode(values))
        assert as_values(Decoder(FIELDS).decode(values)) == strict

    fuzz(False, 200, mutated(*seeds))(check)
