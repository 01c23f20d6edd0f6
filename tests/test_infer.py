"""Fields inferred from a sample of records."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.ipc
import pytest
from support.event_records import GOOD, T, features, record

from stream_ctr.errors import DataError
from stream_ctr.events.field import Field
from stream_ctr.events.infer import infer_fields


def infer(*records: bytes, max_record_bytes: int = 1 << 20) -> tuple[Field, ...]:
    return infer_fields(pa.array(records, pa.large_binary()), max_record_bytes=max_record_bytes)


def names(*records: bytes) -> list[str]:
    return [field.name for field in infer(*records)]


def arrow_impressions(features: list[dict[str, object]]) -> bytes:
    n = len(features)
    batch = pa.RecordBatch.from_pydict(
        {
            "kind": ["impression"] * n,
            "impression_id": ["a"] * n,
            "time": [T] * n,
            "features": features,
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def test_a_field_is_numeric_when_all_its_values_are_numbers() -> None:
    fields = infer(
        features(flag=True, mixed=1),
        features(mixed="x", price=2.5, empty=None),
        b"junk",
        b'{"kind":"click"}',
    )
    assert fields == (
        Field("app", "categorical"),
        Field("flag", "categorical"),
        Field("mixed", "categorical"),
        Field("age", "numeric"),
        Field("price", "numeric"),
    )


def test_a_feature_of_hardly_any_impression_is_not_a_field() -> None:
    usual = [features(rare=1)] + [features()] * 150
    flood = record(features={f"f{i}": 1 for i in range(5000)})
    assert names(*usual, flood, flood) == ["app", "age"]
    assert names(*usual[:100]) == ["app", "age", "rare"]


def test_too_many_fields_are_an_error() -> None:
    many = [record(features={f"f{i * 100 + j}": 1 for j in range(900)}) for i in range(12)]
    with pytest.raises(DataError, match="the impressions have 2,000 features, more than the 1,000"):
        infer(*many)


def test_fields_of_arrow_records_are_inferred_as_from_json() -> None:
    value = arrow_impressions([{"app": "x", "age": 1, "flag": True, "b": None}] * 6)
    assert infer(value, GOOD, b"\xff\xff\xff\xff") == (
        Field("app", "categorical"),
        Field("flag", "categorical"),
        Field("age", "numeric"),
    )
    rare = arrow_impressions([{"app": "x", "rare": 1 if i == 0 else None} for i in range(200)])
    assert names(rare) == ["app"]
    assert infer(rare, max_record_bytes=100) == ()  # the decoder rejects the record too
