"""The strict parser of one record. tests/test_bad_input.py has the table of what it rejects."""

from __future__ import annotations

import tracemalloc

import pytest
from support.event_records import EVENTS, FIELDS, GOOD, T, features, record
from support.reliability import Outcome

from stream_ctr.events.json_strict import StrictEvent, parse_event
from stream_ctr.events.parsed_events import InvalidRecord


def parse(value: bytes | None) -> StrictEvent:
    return parse_event(value, FIELDS, max_record_bytes=1 << 20)


def test_all_members_of_an_event_are_read() -> None:
    assert parse(EVENTS[1]) == StrictEvent(
        kind="impression",
        impression_id="b",
        time=T,
        has_features=True,
        label=None,
        features={"app": "7", "age": -500.0},
        true_probability=0.25,
        has_unknown_fields=False,
    )


def test_missing_members_are_none() -> None:
    assert parse(b"{}") == StrictEvent(
        kind=None,
        impression_id=None,
        time=None,
        has_features=False,
        label=None,
        features={"app": None, "age": None},
        true_probability=None,
        has_unknown_fields=False,
    )


@pytest.mark.parametrize(
    ("value", "has_unknown_fields"),
    [
        (GOOD, False),
        (record(server=None), False),
        (record(server="x"), True),
        (record(server={"a": None}), True),
        (features(size=1), True),
        (features(size=None), False),
        (features(app='"x":1'), False),  # a colon in a string is not a member
        (GOOD.replace(b'"age":31', b'"age":1,"age":31'), True),
        (GOOD.replace(b'"age":31', b'"age":null,"age":31'), False),
    ],
)
def test_members_that_are_not_read_are_noticed(value: bytes, has_unknown_fields: bool) -> None:
    assert parse(value).has_unknown_fields == has_unknown_fields


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        (None, "tombstone", "null value"),
        (b" \n", "empty", "no bytes"),
        (b"[" * 257 + b"]" * 257, "too_deep", "nested more than 256 deep"),
        (b"[" * 256 + b"]" * 256, "not_an_object", "a JSON list"),
        (features(app="m" * (1 << 20)), "too_large", "bytes, more than 1048576"),
        (record(kind=3), "wrong_type", "kind must be a string, got 3"),
        (record(features=[1]), "wrong_type", r"features must be an object, got \[1\]"),
        (features(age="31"), "wrong_type", "'age' must be a number, got '31'"),
        (features(app=1.5), "wrong_type", "'app' is categorical .* got 1.5"),
        (record(time="2025-01-01T00:00:00"), "wrong_time", "time has no zone offset"),
        (record(time="noon"), "wrong_time", "time must be epoch time .*, got 'noon'"),
        (record(kind=3, features=[1]), "wrong_type", "kind must be"),  # the first error counts
    ],
)
def test_a_record_that_is_not_an_event_is_rejected_with_its_reason(
    value: bytes | None, reason: str, message: str
) -> None:
    with pytest.raises(InvalidRecord, match=message) as caught:
        parse(value)
    assert caught.value.reason == reason


N = 30_000
DENSE: dict[str, bytes] = {
    "integers": b"[" + b"0," * N + b"0]",
    "fractions": b"[" + b"0.5," * N + b"0]",
    "texts": b"[" + b'"",' * N + b"0]",
    "lists": b"[" + b"[]," * N + b"0]",
    "objects": b"[" + b"{}," * N + b"0]",
    "objects with a member": b"[" + b'{"":0},' * N + b"0]",
    "members": b"{" + b",".join(b'"%x":0' % number for number in range(N)) + b"}",
}


@pytest.mark.bad_input("JSON of very many small values", via="the strict parser")
@pytest.mark.parametrize("name", DENSE)
def test_a_record_takes_at_most_64_times_its_bytes(name: str, outcome: Outcome) -> None:
    value = GOOD[:-1] + b',"x":' + DENSE[name] + b"}"
    parse(value)
    tracemalloc.start()
    try:
        parse(value)
        assert tracemalloc.get_traced_memory()[1] < 64 * len(value)
    finally:
        tracemalloc.stop()
    outcome("accepted, in at most 64 times its bytes")
