"""Logs of events in the wire format: JSON lines, or an array of JSON objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from stream_ctr.events.decoder import Decoder
from stream_ctr.events.times import DETECTED, TimeFormat
from stream_ctr.logs.json_table import JsonText
from stream_ctr.logs.log import LogBatch, in_time_order

_NEWLINE = ord("\n")
_CARRIAGE_RETURN = ord("\r")


class EventLog(JsonText):
    """JSON lines, passed through byte for byte. The elements of an array are lines.

    Malformed lines pass too, because the decoder of the stream sets these aside. A line whose time
    cannot be read has the time of the line before it. Lines out of order are sorted as far as a
    bounded buffer reaches.
    """

    format = "events"

    def __init__(self, path: Path, times: TimeFormat = DETECTED) -> None:
        super().__init__(path, None)
        self._times = times

    def _read(self) -> Iterator[LogBatch]:
        return map(_log_batch, in_time_order(self._events()))

    def _events(self) -> Iterator[pa.RecordBatch]:
        decoder = Decoder((), time_format=self._times)
        latest = 0
        for _, data in self.line_blocks():
            value = _lines(data)
            if len(value):
                batch = _timed(decoder, value, latest)
                latest = batch["time"][-1].as_py()
                yield batch


def _lines(data: bytes) -> pa.LargeBinaryArray:
    """Return the non-empty lines of a block, without their ends (LF or CRLF).

    >>> _lines(b"a\\n\\nbc\\r\\n").to_pylist()
    [b'a', b'bc']
    """
    text = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(text == _NEWLINE)
    starts = np.concatenate([[0], newlines[:-1] + 1])
    ends = newlines - ((newlines > starts) & (text[newlines - 1] == _CARRIAGE_RETURN))
    # One array over the bytes without a copy: line, its end, line, its end, ... The even elements
    # are the lines.
    offsets = np.append(np.stack([starts, ends], 1).ravel(), len(text))
    pieces = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )
    return pieces.take(pa.array(2 * np.flatnonzero(ends > starts)))


def _timed(decoder: Decoder, value: pa.LargeBinaryArray, before: int) -> pa.RecordBatch:
    """Return the columns time, key, value of n lines.

    A line that holds no event has a null key and the time of the line before it; `before` is the
    time of the line before the first.
    """
    events, _ = decoder.decode(value)
    kinds = events.kinds
    row = np.concatenate([kind.row for kind in kinds])
    event_of_line = np.full(len(value), -1)
    event_of_line[row] = np.arange(len(row))
    known = event_of_line >= 0
    key = (
        pa.concat_arrays([kind.impression_id for kind in kinds])
        .cast(pa.large_binary())
        .take(pa.array(event_of_line, mask=~known))
    )
    latest_known = np.maximum.accumulate(np.where(known, np.arange(len(value)), -1))
    times = np.append(np.concatenate([kind.time for kind in kinds]), before)
    time = times[np.where(latest_known >= 0, event_of_line[latest_known], -1)]
    return pa.RecordBatch.from_pydict({"time": pa.array(time), "key": key, "value": value})


def _log_batch(batch: pa.RecordBatch) -> LogBatch:
    return LogBatch(batch["time"].to_numpy(), batch["key"], batch["value"])
