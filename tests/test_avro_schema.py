"""Fingerprints and canonical forms of Avro schemas, against fastavro."""

from __future__ import annotations

import json
from typing import Any

import fastavro.schema
import pytest
from support.avro import EVENT, FEATURES

from stream_ctr.events.avro_schema import (
    UnusableSchema,
    canonical_form,
    compile_schema,
    fingerprint,
)

SCHEMAS: list[Any] = [
    "int",
    {"type": "long", "logicalType": "timestamp-millis"},
    FEATURES,
    EVENT,
    {"type": "array", "items": {"type": "map", "values": ["null", "string"]}},
    {"type": "fixed", "name": "a.b.Hash", "size": 16, "doc": "no part of the form"},
    {
        "name": "List",
        "namespace": "a.b",
        "doc": "contains itself",
        "type": "record",
        "fields": [
            {"name": "next", "type": ["null", "List"], "default": None},
            {"name": "of", "type": {"type": "enum", "name": "c.K", "symbols": ["x", "y"]}},
            {"name": "again", "type": "c.K"},
        ],
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_fingerprints_are_those_of_fastavro(schema: Any) -> None:
    assert canonical_form(schema) == fastavro.schema.to_parsing_canonical_form(schema)
    expected = fastavro.schema.fingerprint(canonical_form(schema), "CRC-64-AVRO")
    assert fingerprint(json.dumps(schema)).to_bytes(8, "little").hex() == expected


def test_a_schema_may_use_types_of_others() -> None:
    text = json.dumps({**EVENT, "fields": [{"name": "features", "type": "Features"}]})
    alone = {**FEATURES, "namespace": "ads"}
    assert len(compile_schema(text, ["app"], references=[json.dumps(alone)]).code) > 5
    with pytest.raises(UnusableSchema, match="there is no Avro type 'Features'"):
        compile_schema(text, ["app"])


@pytest.mark.parametrize("text", ["{", "nonsense", "[]", "{}", '{"type":"record","name":"E"}', "3"])
def test_what_is_no_schema_is_an_error_of_its_own(text: str) -> None:
    with pytest.raises(UnusableSchema):
        compile_schema(text, [])
