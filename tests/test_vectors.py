"""The published test vectors are those of the hasher, and of another implementation of the hash."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import mmh3
import msgspec
import pytest
from support.published_ids import published_cross, published_id

from stream_ctr.events.field import Schema

DOCS = Path(__file__).parents[1] / "docs"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vectors", DOCS / "vectors.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return json.loads((DOCS / "vectors.json").read_text())


def test_the_published_file_is_the_one_that_the_command_writes() -> None:
    text = load_generator().text()
    assert (DOCS / "vectors.json").read_text() == text, "write it again with: make vectors"


def test_another_implementation_of_the_hash_agrees(published: dict[str, Any]) -> None:
    assert len(published["hashes"]) > 100
    for vector in published["hashes"]:
        found = mmh3.hash64(bytes.fromhex(vector["hex"]), vector["seed"], signed=False)[0]
        assert f"{found:016x}" == vector["h1"]


def test_ids_follow_the_published_formula(published: dict[str, Any]) -> None:
    crossed = 0
    for group in published["schemas"]:
        schema = msgspec.convert(group["schema"], Schema)
        if schema.has_values or schema.bucket_edges:
            continue
        for row in group["rows"]:
            values = {
                name: hashed(kind, row["features"].get(name), schema.buckets_per_octave)
                for name, kind in group["schema"]["fields"]
            }
            options = {"hash_seed": schema.hash_seed, "bits": schema.table_bits}
            ids = [published_id(name, value, **options) for name, value in values.items()]
            for members in schema.crosses:
                ids.append(published_cross([(name, values[name]) for name in members], **options))
                crossed += 1
            assert row["ids"] == ids, row
    assert crossed


def hashed(kind: str, value: object, per_octave: float) -> bytes:
    """Return the bytes that a value hashes, by docs/events.md."""
    if value is None:
        return b"\xff"
    if kind == "numeric":
        assert isinstance(value, int | float)
        octaves = math.log2(1 + abs(value))
        return str(int(math.copysign(math.floor(per_octave * octaves), value))).encode()
    return str(value).lower().encode() if isinstance(value, bool) else str(value).encode()


def test_the_vectors_cover_what_servers_get_wrong(published: dict[str, Any]) -> None:
    features = [row["features"] for row in published["schemas"][0]["rows"]]
    values = [value for row in features for value in row.values()]
    assert any(isinstance(value, str) and not value.isascii() for value in values)
    assert {None, True, False, ""} <= {value for value in values if not isinstance(value, float)}
    assert any("age" not in row for row in features)
    encodings = {group["schema"]["numeric_encoding"] for group in published["schemas"]}
    assert encodings == {"buckets", "value", "log_value"}
    assert any(group["schema"]["bucket_edges"] for group in published["schemas"])
    assert any(group["schema"]["value_scales"] for group in published["schemas"])
    assert {group["numbers"] is None for group in published["pairs"]} == {True, False}
