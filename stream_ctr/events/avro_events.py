"""Events as Avro, one event a record. The schema is not in the record: its number is.

    00 | id of the schema, int32, big-endian          | Avro      (Confluent framing)
    c3 01 | CRC-64-AVRO of the schema, little-endian  | Avro      (single-object encoding)

No JSON and no Arrow stream begins with these bytes. With Confluent framing, a schema registry may
also say that what follows is JSON.

A schema is fetched once (`Schemas`), compiled once (`avro_schema`), and its records are read
together (`avro_scan`), so there is no object for each event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.events import avro_scan, avro_value, json_scan
from stream_ctr.events.arrow_columns import ByteSpans, byte_spans
from stream_ctr.events.avro_scan import (
    ABSENT,
    DAMAGE,
    GOOD,
    IS_BOOLEAN,
    IS_INTEGER,
    IS_NUMBER,
    IS_OTHER,
    IS_SYMBOL,
    IS_TEXT,
    Values,
)
from stream_ctr.events.avro_schema import Program, UnusableSchema, compile_schema
from stream_ctr.events.defects import SchemasUnavailable
from stream_ctr.events.field import Field
from stream_ctr.events.json_scan import FIRST_FEATURE
from stream_ctr.events.parsed_events import EXAMPLE, ParsedEvents, Rejection, kind_codes
from stream_ctr.events.times import DETECTED, TimeFormat
from stream_ctr.messages import one_line

_BLOCK_ROWS = 2048
_TAG_NAMES = {
    IS_BOOLEAN: "a boolean",
    IS_INTEGER: "an integer",
    IS_NUMBER: "a number",
    IS_TEXT: "a string",
    IS_SYMBOL: "an enum",
    IS_OTHER: "bytes, a record, an array or a map",
}

Mask = npt.NDArray[np.bool_]


class WrittenSchema(Protocol):
    """A schema as it was written.

    `type` is "AVRO", "JSON" or "PROTOBUF". `references` are the texts of the schemas whose types it
    uses, each after those that it uses itself.
    """

    @property
    def type(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def references(self) -> tuple[str, ...]: ...


class Schemas(Protocol):
    """Schemas by their id, or by their fingerprint. `name` says where they are, for messages.

    Both methods return None if there is no such schema, and raise an error of the source if that
    cannot be known now.
    """

    name: str

    def by_id(self, id: int) -> WrittenSchema | None: ...
    def by_fingerprint(self, fingerprint: int) -> WrittenSchema | None: ...


class Framing(NamedTuple):
    """The bytes that a record begins with, and the type of the number of its schema after them."""

    name: str
    prefix: bytes
    number: str
    shown: str

    @property
    def size(self) -> int:
        """The number of bytes before the event."""
        return len(self.prefix) + np.dtype(self.number).itemsize


CONFLUENT = Framing("Confluent framing", b"\x00", ">u4", "schema id {}")
SINGLE_OBJECT = Framing("single-object encoding", b"\xc3\x01", "<u8", "schema {:016x}")


class Frame(NamedTuple):
    """How a record names its schema: by an id, or by a fingerprint.

    >>> print(Frame(CONFLUENT, 7))
    Confluent framing, schema id 7
    """

    framing: Framing
    number: int

    def __str__(self) -> str:
        return f"{self.framing.name}, {self.framing.shown.format(self.number)}"


def is_framed(values: pa.LargeBinaryArray) -> Mask:
    """Return which records begin as one whose schema is elsewhere [n].

    >>> records = pa.array([b"{}", b"\\x00\\x00", b"\\xc3\\x01", b"", None], pa.large_binary())
    >>> is_framed(records).tolist()
    [False, True, True, False, False]
    """
    data, start, size = byte_spans(values)
    found = np.zeros(len(values), np.bool_)
    for framing in (CONFLUENT, SINGLE_OBJECT):
        indices = np.flatnonzero(size >= len(framing.prefix))
        heads = data[start[indices, None] + np.arange(len(framing.prefix))]
        found[indices] |= (heads == np.frombuffer(framing.prefix, np.uint8)).all(axis=1)
    return found


class AvroReader:
    """Read framed records into `ParsedEvents` with the given fields.

    Without `schemas`, every such record is rejected, with what is needed to read it.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        schemas: Schemas | None,
        *,
        max_record_bytes: int,
        time_format: TimeFormat = DETECTED,
    ) -> None:
        self.fields = tuple(fields)
        self.time_format = time_format
        self.schemas = schemas
        self.max_record_bytes = max_record_bytes
        names = [field.name.encode() for field in self.fields]
        self._names = np.frombuffer(b"".join(names), np.uint8)
        self._name_ends = np.cumsum([0, *map(len, names)])
        self._programs: dict[Frame, Program | str] = {}  # or why there is none

    def read(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[list[ParsedEvents], list[Rejection], dict[int, bytes]]:
        """Read the records at `rows`.

        The last value holds the records that are JSON, by row, without their frames.
        """
        parts: list[ParsedEvents] = []
        rejections: list[Rejection] = []
        json_records: dict[int, bytes] = {}
        if not len(rows):
            return parts, rejections, json_records
        spans = byte_spans(values)
        for frame, members in self._frames(spans, rows, rejections):
            written = self._written(frame)
            if isinstance(written, str):
                rejections += [
                    Rejection(row, "unknown_schema", written) for row in members.tolist()
                ]
            elif written.type == "JSON":
                for row in members.tolist():
                    json_records[row] = values[row].as_py()[frame.framing.size :]
            else:
                try:
                    program = self._program(frame, written)
                except UnusableSchema as error:
                    message = f"{frame}: {one_line(error)}"
                    rejections += [
                        Rejection(row, "unusable_schema", message) for row in members.tolist()
                    ]
                    continue
                for first in range(0, len(members), _BLOCK_ROWS):
                    block = members[first : first + _BLOCK_ROWS]
                    events, bad = self._events(spans, block, frame, program)
                    parts.append(events)
                    rejections += bad
        return parts, rejections, json_records

    def plain(self, value: bytes) -> bytes:
        """Return a framed record as a JSON event, or as it is if it cannot be read.

        This is for looks at a few records; it is slow.
        """
        framing = CONFLUENT if value.startswith(CONFLUENT.prefix) else SINGLE_OBJECT
        if not value.startswith(framing.prefix) or len(value) < framing.size:
            return value
        head = value[len(framing.prefix) : framing.size]
        frame = Frame(framing, int(np.frombuffer(head, framing.number)[0]))
        written = self._written(frame)
        if isinstance(written, str):
            return value
        inner = value[framing.size :]
        if written.type == "JSON":
            return inner
        try:
            self._program(frame, written)  # a schema that it accepts does not contain itself
            event = avro_value.read(inner, written.text, references=written.references)
            return avro_value.event_as_json(event)
        except ValueError:
            return value

    def _frames(
        self, spans: ByteSpans, rows: npt.NDArray[np.int64], rejections: list[Rejection]
    ) -> Iterator[tuple[Frame, npt.NDArray[np.int64]]]:
        """Yield each frame and its rows. Rejects the records that are too large or cut off."""
        size = spans.size[rows]
        for row in rows[size > self.max_record_bytes].tolist():
            message = f"{spans.size[row]} bytes, more than {self.max_record_bytes}"
            rejections.append(Rejection(row, "too_large", message))
        rows = rows[size <= self.max_record_bytes]
        is_confluent = spans.data[spans.start[rows]] == CONFLUENT.prefix[0]
        for framing, members in ((CONFLUENT, is_confluent), (SINGLE_OBJECT, ~is_confluent)):
            group = rows[members]
            is_cut = spans.size[group] < framing.size
            for row in group[is_cut].tolist():
                message = (
                    f"begins as Avro with {framing.name}, and ends after "
                    f"{spans.size[row]} of the {framing.size} bytes of the frame"
                )
                rejections.append(Rejection(row, "bad_frame", message))
            group = group[~is_cut]
            number_bytes = np.arange(len(framing.prefix), framing.size)
            heads = spans.data[spans.start[group, None] + number_bytes]
            numbers = np.ascontiguousarray(heads).view(framing.number).ravel()
            distinct, frame_of = np.unique(numbers, return_inverse=True)
            for index, number in enumerate(distinct.tolist()):
                yield Frame(framing, number), group[frame_of == index]

    def _written(self, frame: Frame) -> WrittenSchema | str:
        """Return the schema of a frame, or why there is none."""
        if self.schemas is None:
            return f"{frame}: input.schema_registry or input.schema_folder is needed to read it"
        is_single = frame.framing is SINGLE_OBJECT
        find = self.schemas.by_fingerprint if is_single else self.schemas.by_id
        try:
            written = find(frame.number)
        except Exception as error:
            raise SchemasUnavailable(error) from error
        return written or f"{frame}: {self.schemas.name} has no such schema"

    def _program(self, frame: Frame, written: WrittenSchema) -> Program:
        if written.type != "AVRO":
            raise UnusableSchema(f"{written.type} is not supported, only AVRO and JSON are")
        if frame not in self._programs:
            names = [field.name for field in self.fields]
            try:
                program = compile_schema(written.text, names, references=written.references)
            except UnusableSchema as error:
                self._programs[frame] = str(error)
                raise
            self._programs[frame] = program
        known = self._programs[frame]
        if isinstance(known, str):
            raise UnusableSchema(known)
        return known

    def _events(
        self, spans: ByteSpans, rows: npt.NDArray[np.int64], frame: Frame, program: Program
    ) -> tuple[ParsedEvents, list[Rejection]]:
        records = ByteSpans(
            spans.data,
            spans.start[rows] + frame.framing.size,
            spans.size[rows] - frame.framing.size,
        )
        values = Values.empty(len(rows), FIRST_FEATURE + len(self.fields))
        avro_scan.scan(records, program.code, program.jumps, self._names, self._name_ends, values)
        columns = _Columns(spans.data, values, program, self.time_format)
        events = columns.events(rows, self.fields)
        reasons = [
            *(
                (index, "not_avro", DAMAGE[values.damage[index]])
                for index in np.flatnonzero(values.damage != GOOD).tolist()
            ),
            *columns.wrong,
        ]
        bad = np.zeros(len(rows), np.bool_)
        rejections = []
        for index, reason, message in reasons:
            if not bad[index]:
                bad[index] = True
                text = f"{frame}: {message}"
                rejections.append(Rejection(int(rows[index]), reason, text))
        return (events.take(np.flatnonzero(~bad)) if bad.any() else events), rejections


@dataclass(slots=True)
class _Columns:
    """The columns of scanned records. `wrong` collects (index, reason, message) of wrong types."""

    data: npt.NDArray[np.uint8]
    values: Values
    program: Program
    time_format: TimeFormat
    wrong: list[tuple[int, str, str]]

    def __init__(
        self,
        data: npt.NDArray[np.uint8],
        values: Values,
        program: Program,
        time_format: TimeFormat,
    ) -> None:
        self.data = data
        # Nothing of a damaged record is read.
        values.tag[values.damage != GOOD] = ABSENT
        self.values = values
        self.program = program
        self.time_format = time_format
        if program.time_unit != "ms":  # the schema says which
            self.time_format = TimeFormat(program.time_unit, time_format.zone)
        self.wrong = []

    def events(self, rows: npt.NDArray[np.int64], fields: Sequence[Field]) -> ParsedEvents:
        kind_text = self._texts("kind", json_scan.KIND, IS_TEXT | IS_SYMBOL, "a string")
        kind = kind_codes(kind_text)
        time, has_time = self._times()
        label = self._numbers("label", json_scan.LABEL, only=kind == EXAMPLE)
        probability = self._numbers("true_probability", json_scan.PROBABILITY)
        found = self.values.tag[:, json_scan.FEATURES] == IS_OTHER
        if not self.program.has_features:
            found = np.ones(len(rows), np.bool_)
        return ParsedEvents(
            row=rows,
            within=np.zeros_like(rows),
            kind=kind,
            kind_text=kind_text,
            impression_id=self._texts(
                "impression_id",
                json_scan.ID,
                IS_TEXT | IS_SYMBOL | IS_INTEGER,
                "a string or an integer",
            ),
            time=time,
            has_time=has_time,
            has_features=found,
            label=label,
            true_probability=probability,
            features={
                field.name: self._feature(field, slot)
                for slot, field in enumerate(fields, FIRST_FEATURE)
            },
            has_unknown_fields=self.values.has_unknown
            | (self.values.tag[:, json_scan.LABEL] != ABSENT) & (kind != EXAMPLE),
        )

    def _feature(self, field: Field, slot: int) -> pa.Array:
        name = one_line(field.name, 80)
        if field.kind == "numeric":
            numbers = self._numbers(name, slot)
            return pa.array(numbers, mask=~np.isfinite(numbers))
        accepted = IS_TEXT | IS_SYMBOL | IS_INTEGER | IS_BOOLEAN
        return self._texts(name, slot, accepted, "a string, an integer, a boolean or an enum")

    def _reject(self, name: str, slot: int, wrong: Mask, expected: str) -> None:
        for index in np.flatnonzero(wrong).tolist() if wrong.any() else ():
            got = _TAG_NAMES[int(self.values.tag[index, slot])]
            self.wrong.append((index, "wrong_type", f"{name} must be {expected}, got {got}"))

    def _texts(self, name: str, slot: int, accepted: int, expected: str) -> pa.StringArray:
        """Return the texts of a member [n], null where it is missing."""
        tag = self.values.tag[:, slot]
        integer = self.values.integer[:, slot]
        self._reject(name, slot, (tag & ~np.uint8(accepted)) != 0, expected)
        is_text = tag == IS_TEXT
        length = np.where(is_text, self.values.length[:, slot], -1).astype(np.int32)
        texts = _copy_texts(self.data, np.ascontiguousarray(integer), length)
        for kind in (IS_SYMBOL, IS_INTEGER, IS_BOOLEAN):
            here = (tag & np.uint8(accepted & kind)) != 0
            if not here.any():
                continue
            if kind == IS_SYMBOL:
                others = pa.array(self.program.symbols, pa.string()).take(pa.array(integer[here]))
            elif kind == IS_BOOLEAN:
                others = pa.array(integer[here] != 0).cast(pa.string())
            else:
                others = pa.array(integer[here]).cast(pa.string())
            texts = pc.replace_with_mask(texts, pa.array(here), others)
        return texts

    def _numbers(
        self, name: str, slot: int, *, only: Mask | None = None
    ) -> npt.NDArray[np.float64]:
        """Return the numbers of a member [n], NaN where it is missing, or not of `only` these."""
        tag = self.values.tag[:, slot]
        integer = np.ascontiguousarray(self.values.integer[:, slot])
        accepted = IS_INTEGER | IS_NUMBER
        if only is not None:  # a label
            accepted |= IS_BOOLEAN
            tag = np.where(only, tag, np.uint8(ABSENT))
        self._reject(name, slot, (tag & ~np.uint8(accepted)) != 0, "a number")
        numbers = np.where(tag == IS_NUMBER, integer.view(np.float64), integer)
        return np.where(tag & np.uint8(accepted), numbers, np.nan)

    def _times(self) -> tuple[npt.NDArray[np.int64], Mask]:
        """Return epoch milliseconds, and which events have a time."""
        slot = json_scan.TIME
        tag = self.values.tag[:, slot]
        is_wrong = (tag & ~np.uint8(IS_INTEGER | IS_TEXT)) != 0
        self._reject("time", slot, is_wrong, "an integer or a text")
        integer = self.values.integer[:, slot]
        time = self.time_format.from_integers(np.where(tag == IS_INTEGER, integer, 0))
        is_text = tag == IS_TEXT
        if is_text.any():
            length = self.values.length[is_text, slot]
            texts = _copy_texts(self.data, np.ascontiguousarray(integer[is_text]), length)
            moments = self.time_format.from_text(texts)
            time[is_text] = pc.fill_null(moments, 0).to_numpy()
            for index in np.flatnonzero(is_text)[~np.asarray(moments.is_valid())].tolist():
                message = f"time must be {self.time_format.expected}"
                self.wrong.append((index, "wrong_time", message))
        return time, tag != ABSENT


def _copy_texts(
    data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
) -> pa.StringArray:
    """Return n texts, null where the length is negative."""
    offsets, text = json_scan.copy_texts(data, start, length)
    mask = np.packbits(length >= 0, bitorder="little")
    buffers = (pa.py_buffer(offsets), pa.py_buffer(text), pa.py_buffer(mask))
    return pa.StringArray.from_buffers(len(start), *buffers)
