"""Avro schemas: compiled into a program for `avro_scan`, and fingerprinted.

A program is a list of instructions. Records vanish: their fields follow one another. A union is a
jump table, an array or a map is a loop. An instruction that reads a value names the *slot* of its
value, one of the members that an event has (`json_scan.TOP_MEMBERS`, then the fields), or says that
nobody reads it.

An event is an Avro record with the members of an event as fields. The features are the fields of a
record `features`, the entries of a map `features` or, without either, all other fields.

https://avro.apache.org/docs/1.11.1/specification/
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_ctr.events.json_scan import FEATURES, FIRST_FEATURE, TIME, TOP_MEMBERS
from stream_ctr.events.times import TimeUnit

# Instructions: (operation, slot or argument, argument).
END = 0
NULL = 1
BOOLEAN = 2
INTEGER = 3
FLOAT = 4
DOUBLE = 5
STRING = 6
BYTES = 7
FIXED = 8  # size
ENUM = 9  # the index of its first symbol, how many there are
UNION = 10  # the start of its jump table, how many branches there are
JUMP = 11  # target
PRESENT = 12  # a record or map that is a member of the event begins
ENTER = 13  # a loop begins: its depth
LOOP = 14  # its depth, the target after the last item
KEY = 15  # a map's key: whether it is that of `features`

# Slots of values that nobody reads.
UNKNOWN = -1  # of the event or of its features: counted
SKIPPED = -2  # within another value
BY_KEY = -3  # the slot is the one that the last key named

DEEPEST_LOOPS = 16
_MOST_INSTRUCTIONS = 20_000
# A record of a few bytes names symbols, which become text.
_LONGEST_SYMBOL = 1000
_MOST_SYMBOLS = 100_000
_PRIMITIVES = {
    "null": NULL,
    "boolean": BOOLEAN,
    "int": INTEGER,
    "long": INTEGER,
    "float": FLOAT,
    "double": DOUBLE,
    "bytes": BYTES,
    "string": STRING,
}
_UNITS: Mapping[str, TimeUnit] = {"millis": "ms", "micros": "us", "nanos": "ns"}
_NAMED = ("record", "error", "enum", "fixed")
_COMPLEX = (*_NAMED, "array", "map")


class UnusableSchema(ValueError):
    """Raised when a schema is not Avro, or describes no event."""


class Program(NamedTuple):
    """A compiled schema.

    `code` [I, 4] holds instructions: operation, slot, and two arguments. `jumps` holds the jump
    tables of all unions, `symbols` the symbols of all enums. `time_unit` is that of integer times:
    "ms", "us" or "ns". `has_features` says whether the features are in a member of that name.
    """

    code: npt.NDArray[np.int64]
    jumps: npt.NDArray[np.int64]
    symbols: tuple[str, ...]
    time_unit: TimeUnit
    has_features: bool


def compile_schema(text: str, fields: Sequence[str], *, references: Sequence[str] = ()) -> Program:
    """Return the program that reads records of this schema.

    `fields` are the names of the features. `references` are schemas whose types it uses, each after
    those that it uses itself. Raises `UnusableSchema`.

    >>> schema = '{"type":"record","name":"E","fields":[{"name":"kind","type":"string"}]}'
    >>> compile_schema(schema, []).code[:, 0].tolist() == [STRING, END]
    True
    """
    compiler = _Compiler(fields)
    try:
        for reference in references:
            compiler.types.define(parse(reference), "")
        return compiler.program(parse(text))
    except RecursionError:
        raise UnusableSchema("the schema is nested too deep") from None


def parse(text: str) -> Any:
    """Return the schema as JSON. Raises `UnusableSchema`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        stripped = text.strip()
        if stripped in _PRIMITIVES:
            return stripped
        raise UnusableSchema("the schema is not JSON") from None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value stands: its slot, how many loops are around it, and the types around it."""

    slot: int
    loops: int = 0
    within: tuple[str, ...] = ()

    def inner(self, slot: int | None = None) -> _Place:
        return _Place(self.slot if slot is None else slot, self.loops, self.within)


class Types:
    """The named types of schemas."""

    def __init__(self) -> None:
        self._types: dict[str, tuple[Any, str]] = {}

    def define(self, schema: Any, namespace: str) -> None:
        """Enter the named types within a schema."""
        if isinstance(schema, list):
            for branch in schema:
                self.define(branch, namespace)
        elif isinstance(schema, dict):
            kind = schema.get("type")
            if kind in _NAMED:
                self._types[full_name(schema, namespace)] = (schema, namespace)
            if kind in ("record", "error"):
                for member in fields_of(schema):
                    self.define(member["type"], namespace_of(schema, namespace))
            for name in ("items", "values"):
                if name in schema:
                    self.define(schema[name], namespace)
            if isinstance(kind, dict | list):
                self.define(kind, namespace)

    def resolve(self, schema: Any, namespace: str) -> tuple[Any, str]:
        """Return a list of branches, or an object whose type is no other object."""
        for _ in range(100):
            if isinstance(schema, list):
                return schema, namespace
            if isinstance(schema, str):
                if schema in _PRIMITIVES:
                    return {"type": schema}, namespace
                full = schema if "." in schema or not namespace else f"{namespace}.{schema}"
                found = self._types.get(full) or self._types.get(schema)
                if found is None:
                    raise UnusableSchema(f"there is no Avro type {schema!r:.80}")
                return found
            if not isinstance(schema, dict):
                break
            kind = schema.get("type")
            # JSON may have a list or an object in the place of a name.
            if isinstance(kind, str) and (kind in _PRIMITIVES or kind in _COMPLEX):
                return schema, namespace
            schema = kind
        raise UnusableSchema(f"no Avro type: {schema!r:.80}")


class _Compiler:
    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = {name: FIRST_FEATURE + index for index, name in enumerate(fields)}
        self.types = Types()
        self._code: list[list[int]] = []
        self._jumps: list[int] = []
        self._symbols: list[str] = []
        self._time_unit: TimeUnit = "ms"

    def program(self, schema: Any) -> Program:
        self.types.define(schema, "")
        if not isinstance(schema, dict) or schema.get("type") not in ("record", "error"):
            raise UnusableSchema("the schema of an event must be a record")
        namespace = namespace_of(schema, "")
        members = fields_of(schema)
        names = {str(member["name"]) for member in members}
        in_features = "features" in names
        for member in members:
            slot = self._slot(str(member["name"]), in_features)
            around = (full_name(schema, ""),)
            if slot == FEATURES:
                self._features(member["type"], namespace, _Place(slot, within=around))
                continue
            if slot == TIME:
                self._time_unit = _time_unit(member["type"])
            self._value(member["type"], namespace, _Place(slot, within=around))
        self._emit(END)
        return Program(
            np.array(self._code, np.int64),
            np.array(self._jumps, np.int64),
            tuple(self._symbols),
            self._time_unit,
            in_features,
        )

    def _slot(self, name: str, in_features: bool) -> int:
        if name in TOP_MEMBERS:
            return TOP_MEMBERS.index(name)
        return UNKNOWN if in_features else self._fields.get(name, UNKNOWN)

    def _emit(self, operation: int, slot: int = SKIPPED, a: int = 0, b: int = 0) -> int:
        if len(self._code) >= _MOST_INSTRUCTIONS:
            raise UnusableSchema("the schema is too large")
        self._code.append([operation, slot, a, b])
        return len(self._code) - 1

    def _value(self, schema: Any, namespace: str, place: _Place) -> None:
        """Emit the instructions that read a value of this schema."""
        schema, namespace = self.types.resolve(schema, namespace)
        if isinstance(schema, list):
            self._union(schema, namespace, place, self._value)
            return
        kind = schema["type"]
        if kind in _PRIMITIVES:
            self._emit(_PRIMITIVES[kind], place.slot)
        elif kind == "fixed":
            self._emit(FIXED, place.slot, _count(schema, "size"))
        elif kind == "enum":
            symbols = [str(symbol) for symbol in schema.get("symbols", ())]
            self._emit(ENUM, place.slot, len(self._symbols), len(symbols))
            self._symbols += symbols
            if len(self._symbols) > _MOST_SYMBOLS:
                raise UnusableSchema(f"its enums have more than {_MOST_SYMBOLS:,} symbols")
            if any(len(symbol) > _LONGEST_SYMBOL for symbol in symbols):
                raise UnusableSchema(f"a symbol has more than {_LONGEST_SYMBOL:,} characters")
        elif kind in ("record", "error"):
            self._emit(PRESENT, place.slot)
            inside = self._inside(schema, namespace, place)
            for member in fields_of(schema):
                self._value(member["type"], namespace_of(schema, namespace), inside)
        elif kind in ("array", "map"):
            self._emit(PRESENT, place.slot)
            inner = schema.get("items" if kind == "array" else "values")
            self._loop(kind == "map", inner, namespace, place.inner(SKIPPED))
        else:
            raise UnusableSchema(f"there is no Avro type {kind!r:.80}")

    def _features(self, schema: Any, namespace: str, place: _Place) -> None:
        """Emit the instructions that read the member `features`: a record, a map, or a union."""
        schema, namespace = self.types.resolve(schema, namespace)
        if isinstance(schema, list):
            self._union(schema, namespace, place, self._features)
        elif schema["type"] in ("record", "error"):
            self._emit(PRESENT, FEATURES)
            inside = self._inside(schema, namespace, place)
            for member in fields_of(schema):
                slot = self._fields.get(str(member["name"]), UNKNOWN)
                self._value(member["type"], namespace_of(schema, namespace), inside.inner(slot))
        elif schema["type"] == "map":
            self._emit(PRESENT, FEATURES)
            self._loop(True, schema.get("values"), namespace, place.inner(BY_KEY))
        else:
            self._value(schema, namespace, place)

    def _inside(self, schema: Any, namespace: str, place: _Place) -> _Place:
        name = full_name(schema, namespace)
        if name in place.within:
            raise UnusableSchema(f"the type {name:.80} contains itself")
        return _Place(SKIPPED, place.loops, (*place.within, name))

    def _union(self, branches: Sequence[Any], namespace: str, place: _Place, emit: Any) -> None:
        table = len(self._jumps)
        self._jumps += [0] * len(branches)
        self._emit(UNION, place.slot, table, len(branches))
        exits = []
        for index, branch in enumerate(branches):
            self._jumps[table + index] = len(self._code)
            emit(branch, namespace, place)
            exits.append(self._emit(JUMP))
        for jump in exits:
            self._code[jump][2] = len(self._code)

    def _loop(self, is_map: bool, inner: Any, namespace: str, place: _Place) -> None:
        if place.loops == DEEPEST_LOOPS:
            raise UnusableSchema(f"arrays and maps are nested more than {DEEPEST_LOOPS} deep")
        if not is_map and self._may_be_empty(inner, namespace, ()):
            # A few bytes could claim any number of them.
            raise UnusableSchema("the items of an array may have no bytes")
        self._emit(ENTER, a=place.loops)
        head = self._emit(LOOP, a=place.loops)
        if is_map:
            self._emit(KEY, place.slot)
        self._value(inner, namespace, _Place(place.slot, place.loops + 1, place.within))
        self._emit(JUMP, a=head)
        self._code[head][3] = len(self._code)

    def _may_be_empty(self, schema: Any, namespace: str, within: tuple[str, ...]) -> bool:
        schema, namespace = self.types.resolve(schema, namespace)
        if isinstance(schema, list):
            return False  # the index of the branch has a byte
        kind = schema["type"]
        if kind in ("record", "error"):
            name = full_name(schema, namespace)
            return name not in within and all(
                self._may_be_empty(member["type"], namespace_of(schema, namespace), (*within, name))
                for member in fields_of(schema)
            )
        return bool(kind == "null" or (kind == "fixed" and _count(schema, "size") == 0))


def fields_of(schema: Mapping[str, Any]) -> list[Any]:
    members = schema.get("fields")
    if not isinstance(members, list) or not all(
        isinstance(member, dict) and "name" in member and "type" in member for member in members
    ):
        raise UnusableSchema("a record needs fields, each with a name and a type")
    return members


def _count(schema: Mapping[str, Any], name: str) -> int:
    count = schema.get(name)
    if not isinstance(count, int) or not 0 <= count < 1 << 31:
        raise UnusableSchema(f"{name} must be a number, got {count!r:.80}")
    return count


def full_name(schema: Mapping[str, Any], namespace: str) -> str:
    name = str(schema.get("name", ""))
    if "." in name:
        return name
    space = str(schema.get("namespace", namespace) or "")
    return f"{space}.{name}" if space else name


def namespace_of(schema: Mapping[str, Any], namespace: str) -> str:
    return full_name(schema, namespace).rpartition(".")[0]


def _time_unit(schema: Any) -> TimeUnit:
    """Return the unit of a timestamp, or milliseconds.

    >>> _time_unit(["null", {"type": "long", "logicalType": "timestamp-micros"}])
    'us'
    """
    for branch in schema if isinstance(schema, list) else [schema]:
        if isinstance(branch, dict):
            logical = str(branch.get("logicalType", ""))
            if logical.startswith(("timestamp-", "local-timestamp-")):
                return _UNITS.get(logical.rpartition("-")[2], "ms")
    return "ms"


# -- fingerprints --------------------------------------------------------------------------------


def fingerprint(text: str) -> int:
    """Return the number that names a schema in single-object encoding: CRC-64-AVRO.

    >>> hex(fingerprint('"int"'))
    '0x7275d51a3f395c8f'
    """
    crc = _EMPTY
    for byte in canonical_form(parse(text)).encode():
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc


def canonical_form(schema: Any, namespace: str = "") -> str:
    """Return the Parsing Canonical Form of a schema.

    >>> canonical_form({"type": "enum", "name": "K", "namespace": "ads", "symbols": ["a"]})
    '{"name":"ads.K","type":"enum","symbols":["a"]}'
    """
    if isinstance(schema, str):
        name = schema
        if schema not in _PRIMITIVES and "." not in schema and namespace:
            name = f"{namespace}.{schema}"
        return json.dumps(name, ensure_ascii=False)
    if isinstance(schema, list):
        return f"[{','.join(canonical_form(branch, namespace) for branch in schema)}]"
    if not isinstance(schema, dict):
        raise UnusableSchema(f"no Avro type: {schema!r:.80}")
    kind = schema.get("type")
    if isinstance(kind, dict | list) or kind in _PRIMITIVES:
        return canonical_form(kind, namespace)
    if kind not in _COMPLEX:
        return canonical_form(kind, namespace)
    parts = []
    if kind in _NAMED:
        parts.append(f'"name":{json.dumps(full_name(schema, namespace), ensure_ascii=False)}')
        namespace = namespace_of(schema, namespace)
    parts.append(f'"type":{json.dumps(kind)}')
    if kind in ("record", "error"):
        members = [
            f'{{"name":{json.dumps(member["name"], ensure_ascii=False)},'
            f'"type":{canonical_form(member["type"], namespace)}}}'
            for member in fields_of(schema)
        ]
        parts.append(f'"fields":[{",".join(members)}]')
    if kind == "enum":
        symbols = json.dumps(schema.get("symbols"), ensure_ascii=False, separators=(",", ":"))
        parts.append(f'"symbols":{symbols}')
    parts += [
        f'"{name}":{canonical_form(schema[name], namespace)}'
        for name in ("items", "values")
        if name in schema
    ]
    if kind == "fixed":
        parts.append(f'"size":{_count(schema, "size")}')
    return f"{{{','.join(parts)}}}"


_EMPTY = 0xC15D213AA4D7A795


def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_EMPTY if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE = _table()
