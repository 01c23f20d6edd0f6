"""Write docs/vectors.json: test vectors of the published hash, for servers in other languages.

    python docs/vectors.py

`hashes` are those of bytes. Each of `schemas` is the `schema` of a manifest with rows of features,
their `ids` (those of cross products last) and the multipliers `values` of numeric fields that have
one. `pairs` are the rows that logistic regression over pairs of fields reads. docs/events.md
describes the formulas.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stream_ctr.events.feature_rows import FeatureRows
from stream_ctr.events.features import Hasher, murmur3
from stream_ctr.events.field import Field, Schema
from stream_ctr.learn.pairs import PairHasher, choose_columns

PATH = Path(__file__).with_name("vectors.json")
FORMAT = 1

FIELDS = (Field("app", "categorical"), Field("age", "numeric"), Field("größe 大", "categorical"))
EDGES = {"age": (0.25, 0.5, 0.75)}

TEXTS: Sequence[str | bool | int] = (
    "maps",
    "",
    "a",
    "Über",
    "地図",
    "🗺️",
    "e\u0301",
    "\u0000",
    "x" * 33,
    True,
    False,
    "true",
    0,
    7,
    -7,
    "7",
    2**53 - 1,
    str(2**63 - 1),
)
NUMBERS: Sequence[float] = (
    0,
    1,
    -1,
    3,
    31,
    31.5,
    -31,
    0.1,
    0.25,
    0.3,
    0.5,
    0.75,
    0.8,
    3.0,
    1e6,
    -1e6,
    1e300,
    5e-324,
)


def vectors() -> dict[str, Any]:
    """Return the contents of the file."""
    return {"format": FORMAT, "hashes": hashes(), "schemas": schemas(), "pairs": pairs()}


def hashes() -> list[dict[str, Any]]:
    """Return h1 of bytes of every length up to two blocks and a half, and of a missing value."""
    values = [bytes(range(size)) for size in range(41)] + [b"\xff", "地図".encode()]
    return [
        {"hex": value.hex(), "seed": seed, "h1": f"{murmur3(value, seed):016x}"}
        for value in values
        for seed in (0, 1, 2**32 - 1)
    ]


def schemas() -> list[dict[str, Any]]:
    """Return schemas with rows of features."""
    crosses = (("app", "age"), ("age", "größe 大", "app"))
    scales = {"age": 2.5}
    made: Mapping[str, dict[str, Any]] = {
        "defaults": {},
        "hash seed, small table and many buckets": {
            "hash_seed": 2**32 - 1,
            "table_bits": 4,
            "buckets_per_octave": 7.5,
        },
        "largest table": {"table_bits": 31},
        "cross products": {"crosses": crosses},
        "fitted buckets, crossed": {"bucket_edges": EDGES, "crosses": crosses},
        "multipliers": {"numeric_encoding": "value"},
        "multipliers with a scale": {"numeric_encoding": "value", "value_scales": scales},
        "logarithmic multipliers": {"numeric_encoding": "log_value"},
        "logarithmic multipliers with a scale": {
            "numeric_encoding": "log_value",
            "value_scales": scales,
        },
    }
    return [
        schema_vectors(about, Schema(fields=FIELDS, **{"table_bits": 20, **given}))
        for about, given in made.items()
    ]


def schema_vectors(about: str, schema: Schema) -> dict[str, Any]:
    """Return the schema with the ids and multipliers of each row of features."""
    hasher = Hasher(**msgspec.structs.asdict(schema))
    rows = []
    for features in examples():
        [columns] = FeatureRows(schema.fields).columns([features])
        ids, values = hasher.rows(columns)
        rows.append({"features": features, "ids": ids[0].tolist(), "values": values[0].tolist()})
    return {"about": about, "schema": msgspec.to_builtins(schema), "rows": rows}


def examples() -> list[dict[str, Any]]:
    """Return rows with every text and every number, and with missing values."""
    texts = [{"app": text, "größe 大": text} for text in TEXTS]
    numbers = [{"age": number} for number in NUMBERS]
    return [
        *texts,
        *numbers,
        {"app": "maps", "age": 31, "größe 大": "m"},
        {"app": "maps", "age": None},
    ]


def pairs() -> list[dict[str, Any]]:
    """Return the rows of pairs of three fields, with and without numbers of their own."""
    columns = choose_columns(3)
    made = (("pairs", 22, None), ("numbered pairs", 8, (2, 65535, 0)))
    ids = np.array([[0, 0, 0], [5, 7, 9], [2**20 - 1, 1, 2**31 - 1]], np.int32)
    return [
        {
            "about": about,
            "columns": columns,
            "table_bits": bits,
            "numbers": numbers,
            "rows": [
                {"ids": given.tolist(), "rows": found.tolist()}
                for given, found in zip(
                    ids,
                    PairHasher(columns, table_bits=bits, numbers=numbers).rows(ids),
                    strict=True,
                )
            ],
        }
        for about, bits, numbers in made
    ]


def text() -> str:
    """Return the file, with one vector a line."""
    return "".join(lines(vectors())) + "\n"


def lines(value: Any, indent: str = "") -> Iterator[str]:
    """Yield the JSON of a value in parts: lists of objects are broken down, and what has them."""
    if not has_objects(value) and not any(map(has_objects, values_of(value))):
        yield json.dumps(value, ensure_ascii=False)
        return
    inner = indent + " "
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    names = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else []
    for number, item in enumerate(values_of(value)):
        yield f"{',' if number else opening}\n{inner}{names[number] if names else ''}"
        yield from lines(item, inner)
    yield f"\n{indent}{closing}"


def has_objects(value: Any) -> bool:
    """Return whether a value is a list of objects."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def values_of(value: Any) -> Sequence[Any]:
    """Return the members of an object or a list, and none of any other value."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


if __name__ == "__main__":
    PATH.write_text(text())
