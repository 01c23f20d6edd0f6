"""Mutated bytes, and what a decoder makes of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_ctr.events.decoder import Decoder, Events, Rejects
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import JsonReader

T = 1_735_689_600_000


def fuzz(full: bool, quick: int, *strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Runs the function below it at once, with `quick` examples or, when `full`, thirty times as many."""
    limits = settings(
        max_examples=quick * 30 if full else quick,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def run(check: Callable[..., None]) -> None:
        limits(given(*strategies)(check))()

    return run


Step = tuple[str, float, float, bytes]


JUNK = [
    b"", b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\r\n", b"\t", b"\0", b"1", b"2", b"\x80", b"\x85", b"\xff", b"\xc0\xaf",
    b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J", b"null", b"true", b"NaN", b"-Infinity", b"Inf", b"1e999", b"-0", b"0.5", b"1e-400",
    b"9" * 30, b"9" * 400, b"9" * 4301, b"[" * 300, b'"\\ud800"', b'"\\u0000"', b"\\u006b", b'"2025-01-01T00:00:00Z"', b'"2025-02-30"',
    b',"app":null', b',"features":{"age":1}', b',"x":{"y":[1,"a:b"]}', "\u202e\u00e9\U0001f600".encode(), b"PAR1", b"\x1f\x8b",
    b"\x80\x04cos\nsystem\n",
]  # fmt: skip


steps = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "replace", "repeat", "drop"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from(JUNK), st.binary(max_size=6)),
    ),
    max_size=4,
)


def mutate(data: bytes, done: Sequence[Step]) -> bytes:
    """`data` after each step: a place, a length, and bytes to put there."""
    for kind, where, how_long, junk in done:
        at = int(where * (len(data) + 1))
        end = at + int(how_long * how_long * (len(data) + 1 - at))
        part = data[at:end]
        if kind == "flip" and at < len(data):
            part, end = bytes([data[at] ^ (1 << int(8 * how_long))]), at + 1
        middle = {
            "flip": part,
            "cut": b"",
            "insert": junk + part,
            "replace": junk,
            "repeat": part + part,
            "drop": b"",
        }[kind]
        data = data[:at] + middle + (b"" if kind == "cut" else data[end:])
    return data


def mutated(*whole: bytes) -> st.SearchStrategy[bytes]:
    return st.builds(mutate, st.sampled_from(whole), steps)


EVENTS = [
    b'{"kind":"impression","impression_id":"a","time":1735689600000,"features":{"app":"maps","age":31}}',
    b'{"kind":"impression","impression_id":"b","time":1735689600000,"features":{"app":7,"age":-0.5e3},"true_probability":0.25}',
    b'{"kind":"impression","impression_id":"c","time":1735689600000,"features":{"app":true,"age":null,"x":{"y":[1,2]}}}',
    b'{"kind":"click","impression_id":"a","time":1735689600000}',
    b'{"time":"2025-01-01T00:00:04.200Z","kind":"click","impression_id":"caf\xc3\xa9"}',
    b'{ "kind" : "impression", "impression_id" : "\\ud83d\\ude00", "time" : "2025-01-01T01:00:00+01:00", "features" : {"app" : "a\\"b"} }',
]


class OneByOne(JsonReader):
    def read(self, values: Any, rows: Any) -> Any:
        return self._read_one_by_one(values, rows)


class Strict(Decoder):
    """Every JSON record by itself, through the strict parser."""

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__(fields)
        self._json = OneByOne(fields, max_record_bytes=self.max_record_bytes)


def told(decoded: tuple[Events, Rejects]) -> dict[str, Any]:
    """All of it as plain values: text that is not UTF-8 would fail here."""
    events, rejects = decoded
    shown, clicks = events.impressions, events.clicks
    return {
        "rejects": list(zip(rejects.row.tolist(), rejects.reason, rejects.message, strict=True)),
        "impressions": list(
            zip(
                shown.row.tolist(),
                shown.impression_id.to_pylist(),
                shown.time.tolist(),
                strict=True,
            )
        ),
        "features": {name: column.to_pylist() for name, column in shown.features.items()},
        "true_probability": [None if p != p else p for p in shown.true_probability.tolist()],
        "clicks": list(
            zip(
                clicks.row.tolist(),
                clicks.impression_id.to_pylist(),
                clicks.time.tolist(),
                strict=True,
            )
        ),
        "with_unknown_fields": events.with_unknown_fields,
    }


def in_memory(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def ipc(new_writer: Callable[..., Any], table: pa.Table) -> bytes:
    def write(stream: io.BytesIO) -> None:
        with new_writer(stream, table.schema) as writer:
            writer.write_table(table)

    return in_memory(write)
