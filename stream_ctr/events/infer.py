"""Infer the fields of impressions from a sample of records, for runs that configure none."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec
import pyarrow as pa

from stream_ctr.errors import DataError
from stream_ctr.events.arrow_events import feature_types, is_arrow, read_batches
from stream_ctr.events.defects import defects_as_invalid
from stream_ctr.events.field import Field
from stream_ctr.events.parsed_events import InvalidRecord

# A feature of fewer impressions is a slip of one producer, and would be a row of the model for as
# long as the model lives.
_LEAST_SHARE_OF_IMPRESSIONS = 0.01
_MOST_FIELDS = 1000

_SHOWN_KINDS = ("impression", "example")

# A number of impressions, and of each of their features the number of values by Python type.
_TypeCounts = tuple[int, Mapping[str, Mapping[type, int]]]


def infer_fields(
    values: pa.LargeBinaryArray, *, max_record_bytes: int = 1 << 20
) -> tuple[Field, ...]:
    """Return the fields of these impressions and examples, sorted by kind and name.

    A field is numeric when all its values are numbers, and categorical otherwise. A feature that
    fewer than one impression in a hundred has does not become a field. Arrow records that the
    decoder would reject are ignored. Raises `DataError` when more than 1000 fields remain.

    >>> record = b'{"kind":"impression","features":{"age":31,"app":"maps"}}'
    >>> infer_fields(pa.array([record], pa.large_binary()))
    (Field(name='app', kind='categorical'), Field(name='age', kind='numeric'))
    """
    types_by_name: dict[str, Counter[type]] = {}
    impressions = 0
    for count, features in _type_counts(values, max_record_bytes):
        impressions += count
        for name, types in features.items():
            types_by_name.setdefault(name, Counter()).update(types)
    least = _LEAST_SHARE_OF_IMPRESSIONS * impressions
    types_by_name = {name: types for name, types in types_by_name.items() if types.total() >= least}
    if len(types_by_name) > _MOST_FIELDS:
        raise DataError(
            f"the impressions have {len(types_by_name):,} features, more than the {_MOST_FIELDS:,} "
            "that can be inferred; list those that matter in a --config"
        )
    numeric = {name for name, types in types_by_name.items() if types.keys() <= {int, float}}
    return (
        *(Field(name, "categorical") for name in sorted(types_by_name.keys() - numeric)),
        *(Field(name, "numeric") for name in sorted(numeric)),
    )


def feature_names(
    values: pa.LargeBinaryArray, *, max_record_bytes: int = 1 << 20
) -> frozenset[str]:
    """Return the names of all features of the impressions in these records.

    >>> record = b'{"kind":"impression","features":{"age":31,"app":"maps"}}'
    >>> sorted(feature_names(pa.array([record, b"junk"], pa.large_binary())))
    ['age', 'app']
    """
    return frozenset(
        name for _, features in _type_counts(values, max_record_bytes) for name in features
    )


def impression_counts(values: pa.LargeBinaryArray, *, max_record_bytes: int = 1 << 20) -> list[int]:
    """Return how many impressions with features each record holds.

    >>> record = b'{"kind":"impression","features":{"age":31,"app":"maps"}}'
    >>> impression_counts(pa.array([record, b"junk"], pa.large_binary()))
    [1, 0]
    """
    return [
        sum(
            count
            for count, features in _type_counts(values[row : row + 1], max_record_bytes)
            if features
        )
        for row in range(len(values))
    ]


def _type_counts(values: pa.LargeBinaryArray, max_record_bytes: int) -> Iterator[_TypeCounts]:
    for value, in_columns in zip(values.to_pylist(), is_arrow(values).tolist(), strict=True):
        if in_columns:
            yield from _arrow_type_counts(value, max_record_bytes)
        else:
            yield from _json_type_counts(value)


def _json_type_counts(value: bytes | None) -> Iterator[_TypeCounts]:
    """Yield the counts of one JSON record, unless it has absurdly many features."""
    try:
        document = msgspec.json.decode(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    if not isinstance(document, dict) or document.get("kind") not in _SHOWN_KINDS:
        return
    features = document.get("features")
    if isinstance(features, dict) and len(features) <= _MOST_FIELDS:
        yield (
            1,
            {
                name: {type(value): 1}
                for name, value in features.items()
                if isinstance(value, str | bool | int | float)
            },
        )


def _arrow_type_counts(value: bytes, max_record_bytes: int) -> Iterator[_TypeCounts]:
    with contextlib.suppress(InvalidRecord), defects_as_invalid():
        batches = read_batches(pa.py_buffer(value), max_record_bytes=max_record_bytes)
        yield from [feature_types(batch) for batch in batches]
