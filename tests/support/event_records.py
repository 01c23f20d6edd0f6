"""Event records as JSON, and the fields that they have."""

from __future__ import annotations

import json

from stream_ctr.events.field import Field

FIELDS = (Field("app", "categorical"), Field("age", "numeric"))


T = 1_735_689_600_000


GOOD = b'{"kind":"impression","impression_id":"a","time":1735689600000,"features":{"app":"maps","age":31}}'


def record(**changes: object) -> bytes:
    document = {
        "kind": "impression",
        "impression_id": "a",
        "time": T,
        "features": {"app": "maps", "age": 31},
        **changes,
    }
    return json.dumps(
        {name: value for name, value in document.items() if value is not ...}
    ).encode()


def features(**changes: object) -> bytes:
    return record(features={"app": "maps", "age": 31, **changes})
