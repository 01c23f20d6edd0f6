"""Mutated bytes for fuzz tests, and a decoder to compare with."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import JsonReader
from stream_ctr.events.parsed_events import ParsedEvents

Step = tuple[str, float, float, bytes]
"""A mutation: its kind, and as fractions of the data where it begins and how long it is; bytes."""

JUNK = [
    *(b"", b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":"),
    *(b"\n", b"\r\n", b"\t", b"\0", b"1", b"2"),
    *(b"\x80", b"\x85", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"Inf", b"1e999", b"-0", b"0.5", b"1e-400"),
    *(b"9" * 30, b"9" * 400, b"9" * 4301, b"[" * 300),
    *(b'"\\ud800"', b'"\\u0000"', b"\\u006b"),
    *(b'"2025-01-01T00:00:00Z"', b'"2025-02-30"'),
    *(b',"app":null', b',"features":{"age":1}', b',"x":{"y":[1,"a:b"]}'),
    *("\u202e\u00e9\U0001f600".encode(), b"PAR1", b"\x1f\x8b", b"\x80\x04cos\nsystem\n"),
]

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "replace", "repeat", "drop"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from(JUNK), st.binary(max_size=6)),
    ),
    max_size=4,
)


def fuzz(full: bool, quick: int, *strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Run the decorated function at once, with `quick` examples, or 30 times as many if `full`."""
    limits: Any = settings(
        max_examples=quick * 30 if full else quick,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def run(check: Callable[..., None]) -> None:
        decorate: Any = given(*strategies)
        limits(decorate(check))()

    return run


def mutate(data: bytes, steps: Sequence[Step]) -> bytes:
    """Return `data` after each of these steps."""
    for kind, where, how_long, junk in steps:
        start = int(where * (len(data) + 1))
        end = start + int(how_long * how_long * (len(data) + 1 - start))
        part = data[start:end]
        if kind == "flip" and start < len(data):
            part = bytes([data[start] ^ (1 << int(8 * how_long))])
            end = start + 1
        middle = {
            "flip": part,
            "cut": b"",
            "insert": junk + part,
            "replace": junk,
            "repeat": part + part,
            "drop": b"",
        }[kind]
        data = data[:start] + middle + (b"" if kind == "cut" else data[end:])
    return data


def mutated(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy of mutations of these bytes."""
    return st.builds(mutate, st.sampled_from(seeds), STEPS)


class StrictReader(JsonReader):
    def _scan(
        self, values: pa.LargeBinaryArray, rows: npt.NDArray[np.int64]
    ) -> tuple[list[ParsedEvents], npt.NDArray[np.int64]]:
        return [], rows


class StrictDecoder(Decoder):
    """Decode every JSON record by itself, with the strict parser."""

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__(fields)
        self._json = StrictReader(fields, max_record_bytes=self.max_record_bytes)


def in_memory(write: Callable[[io.BytesIO], object]) -> bytes:
    """Return the bytes that `write` writes to a file."""
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def ipc(new_writer: Callable[..., Any], table: pa.Table) -> bytes:
    """Return an Arrow IPC file or stream, by the writer of either."""

    def write(stream: io.BytesIO) -> None:
        with new_writer(stream, table.schema) as writer:
            writer.write_table(table)

    return in_memory(write)
