"""Read one Avro record into Python objects: for looks at a few records, not for streams.

Field inference and messages look at records whose features nobody has named yet. `avro_scan` reads
streams.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from stream_ctr.events.avro_schema import Types, fields_of, namespace_of, parse
from stream_ctr.events.json_scan import TOP_MEMBERS


def read(data: bytes, text: str, *, references: Sequence[str] = ()) -> Any:
    """Return the value of a schema that does not contain itself. Raises `ValueError`.

    >>> read(b"\\x06abc", '"string"')
    'abc'
    """
    types = Types()
    for reference in references:
        types.define(parse(reference), "")
    schema = parse(text)
    types.define(schema, "")
    reader = _Reader(data, types)
    try:
        return reader.value(schema, "")
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"damaged: {error}") from None


def event_as_json(event: Mapping[str, Any]) -> bytes:
    """Return the event of a record as JSON: without `features`, all other members are features.

    >>> event_as_json({"kind": "impression", "impression_id": "a", "app": "maps"})
    b'{"kind": "impression", "impression_id": "a", "features": {"app": "maps"}}'
    """
    if not isinstance(event, Mapping):
        raise ValueError("no record")
    if "features" not in event:
        members = {name: value for name, value in event.items() if name in TOP_MEMBERS}
        features = {name: value for name, value in event.items() if name not in TOP_MEMBERS}
        event = {**members, "features": features}
    return json.dumps(event, default=lambda value: None).encode()


class _Reader:
    def __init__(self, data: bytes, types: Types) -> None:
        self._data = data
        self._at = 0
        self._types = types

    def value(self, schema: Any, namespace: str) -> Any:
        schema, namespace = self._types.resolve(schema, namespace)
        if isinstance(schema, list):
            return self.value(schema[self._number(len(schema))], namespace)
        kind = schema["type"]
        if kind in ("record", "error"):
            inner = namespace_of(schema, namespace)
            return {
                member["name"]: self.value(member["type"], inner) for member in fields_of(schema)
            }
        if kind in ("array", "map"):
            return self._items(schema, namespace)
        if kind == "enum":
            return schema["symbols"][self._number(len(schema["symbols"]))]
        if kind == "null":
            return None
        if kind == "boolean":
            return self._bytes(1) != b"\0"
        if kind in ("float", "double"):
            format, size = ("<f", 4) if kind == "float" else ("<d", 8)
            number = struct.unpack(format, self._bytes(size))[0]
            return number if math.isfinite(number) else None
        if kind in ("int", "long"):
            return self._varint()
        size = schema["size"] if kind == "fixed" else self._number(len(self._data) + 1)
        found = self._bytes(size)
        return found.decode() if kind == "string" else found

    def _items(self, schema: Any, namespace: str) -> Any:
        items: list[tuple[str, Any]] = []
        while count := self._varint():
            if count < 0:
                self._varint()
            for _ in range(self._below(abs(count), len(self._data))):
                if schema["type"] == "map":
                    key = self._bytes(self._number(len(self._data) + 1)).decode()
                    items.append((key, self.value(schema["values"], namespace)))
                else:
                    items.append(("", self.value(schema["items"], namespace)))
        return dict(items) if schema["type"] == "map" else [item for _, item in items]

    def _number(self, end: int) -> int:
        return self._below(self._varint(), end)

    def _below(self, number: int, end: int) -> int:
        if not 0 <= number < end:
            raise ValueError("a number is out of range")
        return number

    def _varint(self) -> int:
        coded = 0
        for shift in range(0, 70, 7):
            byte = self._bytes(1)[0]
            coded |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        return (coded >> 1) ^ -(coded & 1)

    def _bytes(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) < size:
            raise ValueError("the record ends within a value")
        self._at += size
        return found
