"""Parse one JSON event record at a time, strictly: the slow path of `json_events`.

`parse_event` reads any record, and raises `InvalidRecord` with the reason when it is not an event.
`json_events` calls it for the records that the scanner (`json_scan`) does not pass. msgspec parses
the JSON: it rejects NaN, Infinity, lone surrogates and anything after the end of the document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.events.field import Field
from stream_ctr.events.json_scan import COLON, DEEPEST_NESTING, LETTER_N, LOWER_CASE, SPACE
from stream_ctr.events.parsed_events import InvalidRecord
from stream_ctr.events.times import DETECTED, TimeFormat

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_INT64 = range(-(1 << 63), 1 << 63)


class StrictEvent(NamedTuple):
    """One parsed event. Missing values are None."""

    kind: str | None
    impression_id: str | None
    time: int | None  # epoch milliseconds
    has_features: bool
    label: float | None
    features: Mapping[str, str | float | None]
    true_probability: float | None
    has_unknown_fields: bool


def parse_event(
    value: bytes | None,
    fields: Sequence[Field],
    *,
    max_record_bytes: int,
    time_format: TimeFormat = DETECTED,
) -> StrictEvent:
    """Parse the value of a record.

    Raises `InvalidRecord` when the record is too large, is not a JSON object, or has a member of a
    wrong type. A missing member is not an error here.

    >>> value = b'{"kind":"click","time":"2025-01-01T00:00:00Z"}'
    >>> event = parse_event(value, [], max_record_bytes=100)
    >>> event.kind, event.impression_id, event.time
    ('click', None, 1735689600000)
    """
    document, non_null_members = _parse_document(value, max_record_bytes)
    kind = _parse_text(document, "kind")
    impression_id = _parse_id(document.get("impression_id"))
    label = _parse_label(document.get("label")) if kind == "example" else None
    members = document.get("features")
    if members is not None and not isinstance(members, dict):
        raise InvalidRecord("wrong_type", f"features must be an object, got {members!r:.80}")
    given = members or {}
    features = {field.name: parse_feature(field, given.get(field.name)) for field in fields}
    true_probability = _parse_number("true_probability", document.get("true_probability"))
    # A good event has kind, id and time. Any other member that is not null and was not read is
    # unknown, and so are all but the last of several members of one name.
    read = 3 + (members is not None) + (label is not None) + (true_probability is not None)
    read += sum(feature is not None for feature in features.values())
    return StrictEvent(
        kind=kind,
        impression_id=impression_id,
        time=_parse_time(document.get("time"), time_format),
        has_features=members is not None,
        label=label,
        features=features,
        true_probability=true_probability,
        has_unknown_fields=non_null_members > read,
    )


def _parse_document(value: bytes | None, max_record_bytes: int) -> tuple[dict[str, Any], int]:
    """Return the JSON object, and how many members of all its objects are not null."""
    if value is None:
        raise InvalidRecord("tombstone", "null value")
    if not value.strip():
        raise InvalidRecord("empty", "no bytes")
    if len(value) > max_record_bytes:
        raise InvalidRecord("too_large", f"{len(value)} bytes, more than {max_record_bytes}")
    bare = np.frombuffer(_STRING.sub(b'"', value), np.uint8)
    if _nesting(bare) > DEEPEST_NESTING:
        raise InvalidRecord("too_deep", f"nested more than {DEEPEST_NESTING} deep")
    try:
        document = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRecord("not_json", str(error)) from None
    if not isinstance(document, dict):
        raise InvalidRecord("not_an_object", f"a JSON {type(document).__name__}")
    return document, _non_null_members(bare)


def _nesting(bare: npt.NDArray[np.uint8]) -> int:
    """Return how deep the brackets of JSON without its strings nest. [ and { count alike."""
    folded = bare | LOWER_CASE  # makes [ a { and ] a }
    steps = (folded == ord("{")).astype(np.int8) - (folded == ord("}")).astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _non_null_members(bare: npt.NDArray[np.uint8]) -> int:
    """Return how many members of all objects are not null, in valid JSON without its strings."""
    dense = bare[bare > SPACE]
    return int(np.count_nonzero((dense[:-1] == COLON) & (dense[1:] != LETTER_N)))


def _parse_text(document: Mapping[str, Any], name: str) -> str | None:
    text = document.get(name)
    if text is None or isinstance(text, str):
        return text
    raise InvalidRecord("wrong_type", f"{name} must be a string, got {text!r:.80}")


def _parse_id(value: object) -> str | None:
    """Return an id as text; an integer has the text of its digits."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise InvalidRecord(
        "wrong_type", f"impression_id must be a string or an integer, got {value!r:.80}"
    )


def _parse_label(value: object) -> float | None:
    return float(value) if isinstance(value, bool) else _parse_number("label", value)


def parse_feature(field: Field, value: object) -> str | float | None:
    """Return a value of a field as text or a number; None is missing.

    Raises `InvalidRecord` when the value is of a type that the field does not take.

    >>> parse_feature(Field("app", "categorical"), 7), parse_feature(Field("age", "numeric"), 7)
    ('7', 7.0)
    """
    if field.kind == "numeric":
        return _parse_number(field.name, value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value in _INT64:
        return str(value)
    raise InvalidRecord(
        "wrong_type",
        f"{field.name!r:.80} is categorical (a string, a 64-bit integer or a boolean), "
        f"got {value!r:.80}",
    )


def _parse_number(name: str, value: object) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:  # an integer beyond the range of a double
        pass
    raise InvalidRecord("wrong_type", f"{name!r:.80} must be a number, got {value!r:.80}")


def _parse_time(value: object, time_format: TimeFormat) -> int | None:
    """Return epoch milliseconds, rounded down."""
    if value is None:
        return None
    time = time_format.parse(value)
    if time is None and time_format.lacks_zone(value):
        raise InvalidRecord(
            "wrong_time", f"time has no zone offset, and input.time_zone names none: {value!r:.80}"
        )
    if time is None:
        raise InvalidRecord("wrong_time", f"time must be {time_format.expected}, got {value!r:.80}")
    return time
