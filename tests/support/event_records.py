"""Event records as JSON, the fields that they have, and decoded events as plain values."""

from __future__ import annotations

import json
from typing import Any

from stream_ctr.events.decoder import Events, Rejections
from stream_ctr.events.field import Field

FIELDS = (Field("app", "categorical"), Field("age", "numeric"))

T = 1_735_689_600_000
"""2025-01-01 in epoch milliseconds."""

GOOD = (
    b'{"kind":"impression","impression_id":"a","time":1735689600000,'
    b'"features":{"app":"maps","age":31}}'
)

EVENTS = [
    GOOD,
    b'{"kind":"impression","impression_id":"b","time":1735689600000,'
    b'"features":{"app":7,"age":-0.5e3},"true_probability":0.25}',
    b'{"kind":"impression","impression_id":"c","time":1735689600000,'
    b'"features":{"app":true,"age":null,"x":{"y":[1,2]}}}',
    b'{"kind":"click","impression_id":"a","time":1735689600000}',
    b'{"time":"2025-01-01T00:00:04.200Z","kind":"click","impression_id":"caf\xc3\xa9"}',
    b'{ "kind" : "impression", "impression_id" : "\\ud83d\\ude00", '
    b'"time" : "2025-01-01T01:00:00+01:00", "features" : {"app" : "a\\"b"} }',
]
"""Good records: usual ones, and others that only the strict parser reads."""


def record(**changes: object) -> bytes:
    """Return a good impression with these members changed, or left out where they are `...`."""
    document = {
        "kind": "impression",
        "impression_id": "a",
        "time": T,
        "features": {"app": "maps", "age": 31},
        **changes,
    }
    present = {name: value for name, value in document.items() if value is not ...}
    return json.dumps(present).encode()


def features(**changes: object) -> bytes:
    """Return a good impression with these features changed or added."""
    return record(features={"app": "maps", "age": 31, **changes})


def as_values(decoded: tuple[Events, Rejections]) -> dict[str, Any]:
    """Return decoded events as plain values to compare. Raises an error for text not in UTF-8."""
    events, rejections = decoded
    impressions = events.impressions
    clicks = events.clicks
    return {
        "rejects": list(
            zip(rejections.row.tolist(), rejections.reason, rejections.message, strict=True)
        ),
        "impressions": list(
            zip(
                impressions.row.tolist(),
                impressions.impression_id.to_pylist(),
                impressions.time.tolist(),
                strict=True,
            )
        ),
        "features": {name: column.to_pylist() for name, column in impressions.features.items()},
        "true_probability": [None if p != p else p for p in impressions.true_probability.tolist()],
        "clicks": list(
            zip(
                clicks.row.tolist(),
                clicks.impression_id.to_pylist(),
                clicks.time.tolist(),
                strict=True,
            )
        ),
        "examples": list(
            zip(
                events.examples.row.tolist(),
                events.examples.impression_id.to_pylist(),
                events.examples.time.tolist(),
                events.label.tolist(),
                strict=True,
            )
        ),
        "features_of_examples": {
            name: column.to_pylist() for name, column in events.examples.features.items()
        },
        "with_unknown_fields": events.with_unknown_fields,
    }
