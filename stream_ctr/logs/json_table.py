"""JSON lines, or an array of objects, as a table: the members of the objects are its columns.

Arrow parses a block of lines with the types that the first lines have. A block that does not have
them is parsed line by line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from stream_ctr.errors import DataError
from stream_ctr.logs.rows import Rejected, Rows
from stream_ctr.logs.tables import Table
from stream_ctr.logs.text_log import TextLog, head
from stream_ctr.messages import one_line

_SAMPLE_ROWS = 1000
_IDENTITY_ROWS = 100
_INT64 = range(-(1 << 63), 1 << 63)
_QUOTE = ord('"')
_BACKSLASH = ord("\\")
_SPACE = ord(" ")
_COMMA = ord(",")
_NEWLINE = ord("\n")
_CARRIAGE_RETURN = ord("\r")
_OPEN_ARRAY = ord("[")
_CLOSE_ARRAY = ord("]")
_OPEN_OBJECT = ord("{")
_CLOSE_OBJECT = ord("}")


class JsonTable(Table):
    """The members of the objects in a file; a member that an object lacks is null.

    The types are those of the first objects.
    """

    format = "json"
    sparse = True

    def __init__(self, path: Path, *, name: str = "") -> None:
        first = first_objects(path)
        if not first:
            raise DataError(f"{name or path} holds no JSON objects")
        super().__init__(path, list(_types(first).items()), name=name)

    def first_bytes(self) -> bytes:
        """Return the first hundred objects. They stay the same when others are added."""
        return msgspec.json.encode(first_objects(self.path, _IDENTITY_ROWS))

    def batches(self, names: Sequence[str], rejected: Rejected) -> Iterator[Rows]:
        text = JsonText(self.path, None)
        text.rejected = rejected
        types = {name: self.types.get(name, pa.string()) for name in names}
        for number, data in text.line_blocks():
            self.progress = text.progress
            lines = data.split(b"\n")[:-1]
            line = number + np.flatnonzero([bool(line.strip()) for line in lines])
            table = _parse_block(data, types, len(line))
            if table is None:
                line, table = _parse_lines(line, [lines[i - number] for i in line], types, rejected)
            yield Rows(line, table, rejected).valid()


class JsonText(TextLog):
    """JSON lines. The elements of an array become lines."""

    format = "json"

    def __init__(self, path: Path, fields: None) -> None:
        super().__init__(path, fields)
        self._is_array = head(path).lstrip().startswith(b"[")

    def line_blocks(self) -> Iterator[tuple[int, bytes]]:
        self._state = (0, 0)
        return super().line_blocks()

    def as_lines(self, chunk: bytes) -> bytes:
        """Return the next bytes of the file with a newline behind each element of the array."""
        if not self._is_array:
            return chunk
        data = np.frombuffer(chunk, np.uint8).copy()
        self._state = _divide(data, *self._state)
        return data.tobytes()


def first_objects(path: Path, most: int = _SAMPLE_ROWS) -> list[dict[str, Any]]:
    """Return the first objects of a file of JSON lines or of a JSON array.

    >>> first_objects(Path("/dev/null"))
    Traceback (most recent call last):
    stream_ctr.errors.DataError: /dev/null is not a regular file
    """
    first = head(path)
    if first.lstrip().startswith(b"["):
        data = np.frombuffer(first, np.uint8).copy()
        _divide(data, 0, 0)
        first = data.tobytes()
    objects = []
    for line in first.split(b"\n"):
        value = _decoded(line)
        if isinstance(value, dict):
            objects.append(value)
    return objects[:most]


def _decoded(line: bytes) -> object:
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _types(objects: Sequence[Mapping[str, Any]]) -> dict[str, pa.DataType | None]:
    """Return the type of each member; None where it differs."""
    names = dict.fromkeys(name for value in objects for name in value)
    return {name: _type([value.get(name) for value in objects]) for name in names}


def _type(values: Sequence[object]) -> pa.DataType | None:
    found = {type(value) for value in values if value is not None}
    if found == {dict}:
        members = _types([value for value in values if isinstance(value, dict)])
        typed = [(name, kind) for name, kind in members.items() if kind is not None]
        return pa.struct(typed) if len(typed) == len(members) else None
    if found == {int, float}:
        return pa.float64()
    known = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return known.get(found.pop()) if len(found) == 1 else None


def _parse_block(
    data: bytes, types: Mapping[str, pa.DataType | None], rows: int
) -> pa.Table | None:
    """Return the members of all lines in columns, or None if a line is not of these types."""
    if not types or None in types.values():
        return None
    try:
        table = pa.json.read_json(
            pa.BufferReader(data),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pa.json.ParseOptions(
                explicit_schema=pa.schema(list(types.items())),
                newlines_in_values=False,
                unexpected_field_behavior="ignore",
            ),
        )
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    return table if len(table) == rows else None


def _parse_lines(
    numbers: npt.NDArray[np.int64],
    lines: Sequence[bytes],
    types: Mapping[str, pa.DataType | None],
    rejected: Rejected,
) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Return the numbers and the members of the lines that are objects; reject the others."""
    good: list[int] = []
    objects: list[dict[str, Any]] = []
    for number, line in zip(numbers.tolist(), lines, strict=True):
        try:
            value = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            rejected.add(number, f"not JSON: {one_line(error)}")
            continue
        if isinstance(value, dict):
            good.append(number)
            objects.append(value)
        else:
            rejected.add(number, "not a JSON object")
    columns = {name: _column([value.get(name) for value in objects]) for name in types}
    return np.array(good, np.int64), pa.table(columns)


def _column(values: Sequence[Any]) -> pa.Array:
    """Return values of any types as one column: of their type, or of text if they have several."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {dict}:
        names = dict.fromkeys(name for value in values if value for name in value)
        members = [_column([(value or {}).get(name) for value in values]) for name in names]
        absent = pa.array([value is None for value in values])
        return pa.StructArray.from_arrays(members, list(names), mask=absent)
    if kinds <= {int} and all(value is None or value in _INT64 for value in values):
        return pa.array(values, pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if kinds in ({str}, {bool}):
        return pa.array(values)
    return pa.array([None if value is None else _text(value) for value in values], pa.string())


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


@numba.njit(cache=True, nogil=True)
def _divide(data: npt.NDArray[np.uint8], depth: int, within: int) -> tuple[int, int]:
    """Make each element of an array a line, in place: commas between elements become newlines.

    `depth` counts the open brackets; `within` is 1 in a string and 2 behind its backslash. Both are
    returned for the next bytes.
    """
    for i in range(len(data)):
        c = data[i]
        if within == 2:
            within = 1
        elif within == 1:
            if c == _BACKSLASH:
                within = 2
            elif c == _QUOTE:
                within = 0
        elif c == _QUOTE:
            within = 1
        elif c == _COMMA:
            if depth == 1:
                data[i] = _NEWLINE
        elif c in (_NEWLINE, _CARRIAGE_RETURN):
            data[i] = _SPACE
        elif c in (_OPEN_ARRAY, _OPEN_OBJECT):
            if depth == 0:
                data[i] = _SPACE
            depth += 1
        elif c in (_CLOSE_ARRAY, _CLOSE_OBJECT):
            depth -= 1
            if depth == 0:
                data[i] = _SPACE
    return depth, within
