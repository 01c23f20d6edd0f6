"""Processor time of each event as a stream grows: decoded, hashed, joined and learned.

The stream repeats one block of encoded events with new ids and times. This costs little and is not
counted. Windows are short, so that as many impressions are pending at the end as at the beginning.
The value is the median cost of the last quarter of the blocks divided by that of the first quarter,
without the first block. A block has at least --block events.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from answers import answer

from stream_ctr.cli import runs
from stream_ctr.cli.options import load_config
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import encode_clicks, encode_impressions
from stream_ctr.snapshots.lease import Lease

FIELDS = 14
_TEMPLATE = 16_384  # impressions
_CLICK_EVERY = 16
_WORDS = 5000
_ZIPF_EXPONENT = 1.3
_ID_DIGITS = 10
_TIME_DIGITS = 13
_ID_MARK = b'"impression_id":"'
_TIME_MARK = b'"time":'
_START_MS = 1_735_689_600_000
OPTIONS = (
    "baseline.enabled=false",
    "model.hidden=16",
    "model.embedding_dim=4",
    "model.table_bits=16",
    "learn.batch_size=4096",
    "join.label_window=20s",
    "join.allowed_lateness=1s",
    "join.duplicate_horizon=1m",
    "snapshots.topic=",
    "metrics.topic=",
    "schedule.snapshot_every=1d",
)


class Template:
    """A block of encoded events whose ids and times are overwritten for each copy.

    It has `_TEMPLATE` impressions, one a millisecond, and a click directly after every sixteenth.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        words = pa.array([f"v{i}" for i in range(_WORDS)])
        features = {
            f"f{i}": words.take(pa.array(rng.zipf(_ZIPF_EXPONENT, _TEMPLATE) % _WORDS))
            for i in range(FIELDS)
        }
        identity = pa.array([f"{row:0{_ID_DIGITS}d}" for row in range(_TEMPLATE)])
        time_ms = np.full(_TEMPLATE, _START_MS)
        clicked = np.arange(0, _TEMPLATE, _CLICK_EVERY)
        impressions = encode_impressions(identity, time_ms, features)
        clicks = encode_clicks(identity.take(pa.array(clicked)), time_ms[clicked])
        order = np.argsort(np.concatenate([np.arange(_TEMPLATE), clicked + 0.5]))
        self._row = np.concatenate([np.arange(_TEMPLATE), clicked])[order]
        self._value = pa.concat_arrays([impressions, clicks]).take(pa.array(order))
        _, self._offsets, text = self._value.buffers()
        self._text = np.frombuffer(text, np.uint8)
        begin = np.frombuffer(self._offsets, np.int64)[:-1]
        is_click = order >= _TEMPLATE
        impression: bytes = impressions[0].as_py()
        click: bytes = clicks[0].as_py()
        self._id_positions, self._time_positions = (
            begin + np.where(is_click, _end_of(click, mark), _end_of(impression, mark))
            for mark in (_ID_MARK, _TIME_MARK)
        )

    def copy(self, number: int) -> pa.LargeBinaryArray:
        """Return the block as the `number`-th of the stream."""
        text = self._text.copy()
        row = number * _TEMPLATE + self._row
        _write_digits(text, self._id_positions, row, _ID_DIGITS)
        _write_digits(text, self._time_positions, _START_MS + row, _TIME_DIGITS)
        return pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(self._value), [None, self._offsets, pa.py_buffer(text)]
        )


def _end_of(event: bytes, mark: bytes) -> int:
    return event.index(mark) + len(mark)


def _write_digits(
    text: npt.NDArray[np.uint8],
    positions: npt.NDArray[np.int64],
    number: npt.NDArray[np.int64],
    digits: int,
) -> None:
    """Write each number in decimal at its position."""
    for place in range(digits):
        text[positions + place] = ord("0") + number // 10 ** (digits - 1 - place) % 10


class Endless:
    """A stream for `runs.train_on_logs` that records processor time before each copy.

    The time that it takes to make the copies is left out.
    """

    name = identity = "endless"
    notes = ()
    fields = tuple(Field(f"f{i}", "categorical") for i in range(FIELDS))

    def __init__(self, impressions: int) -> None:
        self._copies = -(-impressions // _TEMPLATE)
        self._template = Template()
        self.marks: list[tuple[int, float]] = []
        self._copy_seconds = 0.0

    def batches(self) -> Iterator[Any]:
        events = 0
        for number in range(self._copies):
            self._mark(events)
            began = time.thread_time()
            value = self._template.copy(number)
            self._copy_seconds += time.thread_time() - began
            events += len(value)
            yield _Batch(value)
        self._mark(events)

    def _mark(self, events: int) -> None:
        self.marks.append((events, time.process_time() - self._copy_seconds))


class _Batch:
    def __init__(self, value: pa.LargeBinaryArray) -> None:
        self.value = value


def by_block(marks: list[tuple[int, float]], block: int) -> list[float]:
    """Return the microseconds of processor time an event, in blocks of at least so many events."""
    costs = []
    events, seconds = marks[0]
    for events_now, seconds_now in marks[1:]:
        if events_now - events >= block:
            costs.append(1e6 * (seconds_now - seconds) / (events_now - events))
            events = events_now
            seconds = seconds_now
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--impressions", type=int, required=True)
    parser.add_argument("--block", type=int, default=1_000_000, help="events")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    config, _ = load_config(None, OPTIONS)

    def measure() -> dict[str, Any]:
        stream = Endless(arguments.impressions)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as name, Lease(Path(name)) as lease:
            report = runs.train_on_logs([stream], config, lease)
        seconds = time.perf_counter() - began
        assert report
        costs = by_block(stream.marks, arguments.block)
        _, *steady = costs  # in the first block, code is loaded and memory grows
        quarter = max(1, len(steady) // 4)
        return {
            "value": statistics.median(steady[-quarter:]) / statistics.median(steady[:quarter]),
            "microseconds_by_block": costs,
            "events": report.events,
            "examples": report.examples,
            "seconds": seconds,
        }

    answer(measure)


if __name__ == "__main__":
    main()
