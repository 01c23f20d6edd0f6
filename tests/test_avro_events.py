"""Avro records, against fastavro and against the same events as JSON."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.avro import EVENT, KnownSchemas, body, confluent
from support.event_records import FIELDS, GOOD, T, as_values
from support.fuzzing import fuzz, mutated

from stream_ctr.events.avro_events import Schemas
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.parsed_events import KINDS

SHOWN = {
    "kind": "impression",
    "impression_id": "a",
    "time": T,
    "label": None,
    "features": {"app": "maps", "age": 31.0},
}
CLICK = {**SHOWN, "kind": "click", "features": None}
GIVEN = {**SHOWN, "kind": "example", "impression_id": 7, "label": 1}


def decode(schemas: Schemas | None, *records: bytes, format: Any = "auto") -> dict[str, Any]:
    decoder = Decoder(FIELDS, schemas=schemas, format=format)
    return as_values(decoder.decode(pa.array(records, pa.large_binary())))


def events(schema: Any, *values: Any) -> list[bytes]:
    return [confluent(0, body(schema, value)) for value in values]


def as_json(value: Any) -> bytes:
    """Return an event as JSON: without `features`, all other members are features."""
    if "features" not in value:
        top = ("kind", "impression_id", "time", "label", "true_probability")
        members = {name: member for name, member in value.items() if name in top}
        features = {name: member for name, member in value.items() if name not in top}
        value = {**members, "features": features}
    return json.dumps(value).encode()


# -- the same events -----------------------------------------------------------------------------

TEXT = st.text(max_size=8).filter(lambda text: text.isprintable())
CATEGORIES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ("string", TEXT),
    ("long", st.integers(-(1 << 63), (1 << 63) - 1)),
    ("boolean", st.booleans()),
    ({"type": "enum", "name": "Word", "symbols": ["x", "y"]}, st.sampled_from(["x", "y"])),
    (["null", "string", "long"], st.one_of(st.none(), TEXT, st.integers(-99, 99))),
]
NUMBERS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ("double", st.floats(allow_nan=False, allow_infinity=False)),
    ("float", st.floats(width=32, allow_nan=False, allow_infinity=False)),
    ("int", st.integers(-(1 << 31), (1 << 31) - 1)),
    (["null", "double"], st.one_of(st.none(), st.floats(-1, 1))),
]
OTHERS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ("null", st.none()),
    ({"type": "array", "items": ["null", "string"]}, st.lists(st.one_of(st.none(), TEXT))),
    ({"type": "map", "values": "double"}, st.dictionaries(TEXT, st.floats(0, 1))),
    (
        {"type": "record", "name": "Inner", "fields": [{"name": "kind", "type": "string"}]},
        st.fixed_dictionaries({"kind": TEXT}),
    ),
]


@st.composite
def avro_events(draw: st.DrawFn) -> tuple[Any, list[dict[str, Any]]]:
    """Draw a schema of events and some events: features in a record, in a map, or beside the id."""
    app, apps = draw(st.sampled_from(CATEGORIES))
    age, ages = draw(st.sampled_from(NUMBERS))
    other, others = draw(st.sampled_from(OTHERS))
    members = [("app", app), ("age", age), ("other", other)]
    values = {"app": apps, "age": ages, "other": others}
    fields: list[dict[str, Any]] = [
        {"name": "impression_id", "type": ["string", "long"]},
        {"name": "kind", "type": "string"},
        {"name": "time", "type": "long"},
        {"name": "label", "type": ["null", "boolean"]},
    ]
    shape = draw(st.sampled_from(["record", "map", "flat"]))
    described = [{"name": name, "type": kind} for name, kind in members]
    if shape == "record":
        inner = {"type": "record", "name": "F", "fields": described}
        fields.insert(draw(st.integers(0, 4)), {"name": "features", "type": [inner, "null"]})
    elif shape == "map":
        fields.append({"name": "features", "type": {"type": "map", "values": ["null", "string"]}})
        values = {"app": st.one_of(st.none(), TEXT), "zone": TEXT}
    else:
        fields += described
    event: dict[str, st.SearchStrategy[Any]] = {
        "impression_id": st.one_of(TEXT, st.integers(-9, 1 << 62)),
        "kind": st.sampled_from([*KINDS, "view"]),
        "time": st.integers(T - 9, T + 9),
        "label": st.one_of(st.none(), st.booleans()),
    }
    if shape == "flat":
        event |= values
    else:
        event["features"] = st.fixed_dictionaries({}, optional=values) if shape == "map" else (
            st.one_of(st.none(), st.fixed_dictionaries(values))
        )  # fmt: skip
    schema = {"type": "record", "name": "E", "namespace": "ads", "fields": fields}
    return schema, draw(st.lists(st.fixed_dictionaries(event), min_size=1, max_size=6))


@given(avro_events())
def test_events_are_those_of_the_same_json(case: tuple[Any, list[dict[str, Any]]]) -> None:
    schema, values = case
    read = decode(KnownSchemas(schema), *events(schema, *values))
    expected = decode(None, *map(as_json, values))
    # JSON counts the members of an unknown object, Avro the object.
    if "other" in json.dumps(schema):
        read.pop("with_unknown_fields")
        expected.pop("with_unknown_fields")
    assert read == expected
    plain = Decoder(FIELDS, schemas=KnownSchemas(schema)).plain(
        pa.array(events(schema, *values), pa.large_binary())
    )
    assert [json.loads(value) for value in plain.to_pylist()] == [
        json.loads(as_json(value)) for value in values
    ]


def test_every_kind_of_event_is_read_beside_json_and_arrow() -> None:
    read = decode(KnownSchemas(EVENT), *events(EVENT, SHOWN, CLICK), GOOD, *events(EVENT, GIVEN))
    assert read["rejects"] == []
    assert read["impressions"] == [(0, "a", T), (2, "a", T)]
    assert read["clicks"] == [(1, "a", T)]
    assert read["examples"] == [(3, "7", T, 1)]
    assert read["features"] == {"app": ["maps", "maps"], "age": [31.0, 31.0]}


@pytest.mark.parametrize(("unit", "ticks"), [("millis", 1), ("micros", 1000), ("nanos", 1_000_000)])
def test_a_timestamp_has_the_unit_of_its_schema(unit: str, ticks: int) -> None:
    schema = json.loads(json.dumps(EVENT).replace("timestamp-millis", f"timestamp-{unit}"))
    read = decode(KnownSchemas(schema), *events(schema, {**SHOWN, "time": T * ticks}))
    assert read["impressions"] == [(0, "a", T)]


def test_json_with_a_schema_id_is_read_as_json() -> None:
    read = decode(KnownSchemas({}, type="JSON"), confluent(0, GOOD), confluent(0, b"oops"))
    assert read["impressions"] == [(0, "a", T)]
    assert [(row, reason) for row, reason, _ in read["rejects"]] == [(1, "not_json")]


def nested(deep: int) -> Any:
    """Return unions within unions."""
    union: Any = ["null"]
    for _ in range(deep):
        union = [union]
    return union


# -- what cannot be read -------------------------------------------------------------------------

GOOD_AVRO = events(EVENT, SHOWN)[0]


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        (b"\0", "bad_frame", "begins as Avro with Confluent framing, and ends after 1 of the 5"),
        (b"\xc3\x01abc", "bad_frame", "begins as Avro with single-object encoding"),
        (b"\xc3\x01" + bytes(8), "unknown_schema", "schema 0000000000000000: the schemas of this"),
        (confluent(9, b"x"), "unknown_schema", "schema id 9: the schemas of this test has no such"),
        (GOOD_AVRO[:-1], "not_avro", "schema id 0: the record ends within a value"),
        (GOOD_AVRO + b"x", "not_avro", "bytes are left over after the record"),
        (confluent(0, b"\x09"), "not_avro", "an enum has no symbol of that number"),
        (confluent(0, b"\x00\x07"), "not_avro", "a union has no branch of that number"),
        (confluent(0, b"\x00\x00\x01"), "not_avro", "a length or count is negative or exceeds"),
        (confluent(0, b"\xff" * 11), "not_avro", "a number has more bytes than its type"),
        (GOOD_AVRO.replace(b"maps", b"m\xff\xffs"), "not_avro", "a text is not UTF-8"),
    ],
)
def test_a_bad_record_says_how_it_was_read_and_harms_no_other(
    record: bytes, reason: str, message: str
) -> None:
    read = decode(KnownSchemas(EVENT), GOOD_AVRO, record, GOOD_AVRO)
    ((row, found, said),) = read["rejects"]
    assert (row, found) == (1, reason)
    assert message in said
    assert [row for row, *_ in read["impressions"]] == [0, 2]


def test_without_schemas_a_record_says_what_is_needed_to_read_it() -> None:
    ((_, reason, message),) = decode(None, GOOD_AVRO)["rejects"]
    assert reason == "unknown_schema"
    assert message == (
        "Confluent framing, schema id 0: "
        "input.schema_registry or input.schema_folder is needed to read it"
    )


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("string", "must be a record"),
        ({"type": "record", "name": "E"}, "a record needs fields"),
        ({"type": "record", "name": "E", "fields": [{"name": "x", "type": "Z"}]}, "no Avro type"),
        ({"type": "record", "name": "E", "fields": [{"name": "x", "type": "E"}]}, "itself"),
        (
            {"type": "record", "name": "E", "fields": [
                {"name": "x", "type": {"type": "array", "items": "null"}}]},
            "may have no bytes",
        ),
        ({"type": "record", "name": "E", "fields": [
            {"name": "app", "type": {"type": "enum", "name": "A", "symbols": ["x" * 1001]}}]},
            "a symbol has more than 1,000 characters",
        ),
        ({"type": "record", "name": "E", "fields": [
            {"name": "app", "type": {"type": "enum", "name": "A", "symbols": ["x"] * 100_001}}]},
            "more than 100,000 symbols",
        ),
        ({"type": "record", "name": "E", "fields": [{"name": "x", "type": nested(900)}]},
            "nested too deep"),
    ],
)  # fmt: skip
def test_a_schema_that_is_no_event_is_said_to_be_so(schema: Any, message: str) -> None:
    ((_, reason, said),) = decode(KnownSchemas(schema), confluent(0, b"x"))["rejects"]
    assert reason == "unusable_schema"
    assert message in said


def test_protobuf_is_said_not_to_be_supported() -> None:
    ((_, reason, said),) = decode(KnownSchemas("", type="PROTOBUF"), GOOD_AVRO)["rejects"]
    assert reason == "unusable_schema"
    assert "PROTOBUF is not supported" in said


def test_a_wrong_type_names_the_member_and_what_came() -> None:
    wrong = json.loads(json.dumps(EVENT).replace('["null", "string"]', '"double"'))
    values = {**SHOWN, "features": {"app": 0.5, "age": 31.0}}
    ((_, reason, said),) = decode(KnownSchemas(wrong), *events(wrong, values))["rejects"]
    assert reason == "wrong_type"
    assert "app must be a string, an integer, a boolean or an enum, got a number" in said


@pytest.mark.parametrize(
    ("format", "rejected"), [("auto", []), ("json", [1, 2]), ("avro", [0, 2]), ("arrow", [0, 1])]
)
def test_a_set_format_rejects_the_others(format: str, rejected: list[int]) -> None:
    table = pa.table({"kind": ["click"], "impression_id": ["a"], "time": [T]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    records = (GOOD, GOOD_AVRO, sink.getvalue().to_pybytes())
    read = decode(KnownSchemas(EVENT), *records, format=format)
    assert [(row, reason) for row, reason, _ in read["rejects"]] == [
        (row, "other_format") for row in rejected
    ]


def test_a_map_of_any_claimed_size_ends_with_the_record() -> None:
    schema = {
        "type": "record",
        "name": "E",
        "fields": [{"name": "x", "type": {"type": "map", "values": "null"}}],
    }
    claimed = b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    ((_, reason, _),) = decode(KnownSchemas(schema), confluent(0, claimed))["rejects"]
    assert reason == "not_avro"


def test_any_bytes_become_an_event_or_a_rejection() -> None:
    seeds = [*events(EVENT, SHOWN, CLICK, GIVEN)]

    def check(record: bytes) -> None:
        decoder = Decoder(FIELDS, schemas=KnownSchemas(EVENT))
        found, rejections = decoder.decode(pa.array([record], pa.large_binary()))
        assert sum(len(kind) for kind in found.kinds) + len(rejections) == 1
        for kind in found.kinds:
            kind.impression_id.validate(full=True)
        found.impressions.features["app"].validate(full=True)

    fuzz(False, 300, mutated(*seeds))(check)


def test_numbers_that_are_not_finite_are_missing() -> None:
    data = body(EVENT, SHOWN)
    nan = data.replace(struct.pack("<d", 31.0), struct.pack("<d", np.nan))
    assert decode(KnownSchemas(EVENT), confluent(0, nan))["features"]["age"] == [None]
