"""The schema of features: fields, value fields and cross products."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from stream_ctr.events.field import Field, Schema, cross, require_members, shown_cross

FIELDS = (Field("app", "categorical"), Field("age", "numeric"), Field("user", "categorical"))


def test_a_schema_is_the_same_after_it_was_written_as_json() -> None:
    schema = Schema(
        fields=FIELDS,
        table_bits=20,
        hash_seed=7,
        crosses=(("app", "user"),),
        bucket_edges={"age": (0.1, 1e300)},
    )
    assert msgspec.json.decode(msgspec.json.encode(schema), type=Schema) == schema


@pytest.mark.parametrize(
    ("encoding", "value_fields"), [("buckets", ()), ("value", (1,)), ("log_value", (1,))]
)
def test_numeric_fields_have_values_unless_they_are_in_buckets(
    encoding: Any, value_fields: tuple[int, ...]
) -> None:
    schema = Schema(fields=FIELDS, table_bits=20, numeric_encoding=encoding)
    assert schema.value_fields == value_fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": (*FIELDS, FIELDS[0])}, "a field is listed twice: app"),
        ({"crosses": (("app",),)}, "a cross product needs two or more fields"),
        ({"crosses": (("app", "user", "app"),)}, "has a field twice: 'app*user*app'"),
        ({"crosses": (("app", "user"), ("user", "app"))}, "is listed twice: 'user*app'"),
        ({"bucket_edges": {"app": (1.0, 2.0)}}, "'app' has edges or a scale, and is no numeric"),
        (
            {"value_scales": {"agee": 1.0}, "numeric_encoding": "value"},
            "'agee' has edges or a scale, and is no numeric field",
        ),
        ({"value_scales": {"age": 1.0}}, "scales for other encodings"),
        ({"bucket_edges": {"age": (1.0,)}}, "the edges of 'age' must be two or more rising"),
        ({"bucket_edges": {"age": (1.0, 1.0)}}, "the edges of 'age' must be two or more rising"),
        ({"bucket_edges": {"age": (-1e308, 1e308)}}, "the edges of 'age' must be two or more"),
        (
            {"bucket_edges": {"age": (1.0, 2.0)}, "numeric_encoding": "value"},
            "edges are for numbers in buckets",
        ),
        ({"crosses": (("app", "usr"),)}, "'app*usr' has 'usr', which is not a field"),
        (
            {"crosses": (("app", "age"),), "numeric_encoding": "value"},
            "'app*age' has the number 'age', which has one row with numeric_encoding = 'value'",
        ),
    ],
)
def test_a_schema_that_contradicts_itself_is_an_error(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Schema(**{"fields": FIELDS, "table_bits": 20, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"fields":[["app","text"]],"table_bits":20}', "Invalid enum value 'text'"),
        (b'{"fields":[["app","numeric"]],"table_bits":3}', ">= 4"),
        (b'{"fields":[["app","numeric"]],"table_bits":32}', "<= 31"),
        (b'{"fields":[["app","numeric"]],"table_bits":20,"hash_seed":-1}', ">= 0"),
        (b'{"fields":[["a","numeric"]],"table_bits":20,"value_scales":{"a":0}}', "> 0"),
        (b'{"fields":[["a","numeric"]],"table_bits":20,"bucket_edges":{"a":[1]}}', "length >= 2"),
        (b'{"fields":[],"table_bits":20,"seed":1}', "unknown field `seed`"),
    ],
)
def test_a_schema_out_of_bounds_is_not_decoded(text: bytes, message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=re.escape(message)):
        msgspec.json.decode(text, type=Schema)


def test_a_member_of_a_cross_product_that_is_not_a_field_is_named_with_the_nearest_field() -> None:
    with pytest.raises(ValueError, match="did you mean 'user'"):
        require_members([("app", "usr")], FIELDS, "buckets")
    require_members([("app", "age", "user")], FIELDS, "buckets")


def test_a_cross_product_is_written_with_stars() -> None:
    assert cross("app* user ") == ("app", "user")
    assert cross(["app", "user"]) == ["app", "user"]
    assert shown_cross(("app", "user")) == "'app*user'"
    assert len(shown_cross(["x" * 500])) == 120
