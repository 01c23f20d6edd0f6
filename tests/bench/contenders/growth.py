"""Processor time of each event as a stream goes on: decoded, hashed, joined and learned by the trainer, `--block` events at a time.

The stream repeats one block of encoded events with new ids and times, which costs little and is not counted. Windows are short, so that
as many impressions are pending at the end as at the beginning. The value is the cost in the last quarter of the blocks as a multiple of
that in the first quarter, in medians, the first block left out.
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
_ID_DIGITS, _TIME_DIGITS = 10, 13
_START_MS = 1_735_689_600_000
OPTIONS = (
    *(
        "baseline.enabled=false",
        "model.hidden=16",
        "model.embedding_dim=4",
        "model.table_bits=16",
        "learn.batch_size=4096",
    ),
    *(
        "join.label_window=20s",
        "join.allowed_lateness=1s",
        "join.duplicate_horizon=1m",
        "snapshots.topic=",
        "metrics.topic=",
    ),
    "schedule.snapshot_every=1d",
)


class Template:
    """`_TEMPLATE` impressions at one a millisecond, and a click for every sixteenth right behind it; ids and times are written anew for
    each copy, in place."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        words = pa.array([f"v{i}" for i in range(5000)])
        features = {
            f"f{i}": words.take(pa.array(rng.zipf(1.3, _TEMPLATE) % 5000)) for i in range(FIELDS)
        }
        identity = pa.array([f"{row:0{_ID_DIGITS}d}" for row in range(_TEMPLATE)])
        moment = np.full(_TEMPLATE, _START_MS)
        clicked = np.arange(0, _TEMPLATE, _CLICK_EVERY)
        shown, clicks = (
            encode_impressions(identity, moment, features),
            encode_clicks(identity.take(pa.array(clicked)), moment[clicked]),
        )
        order = np.argsort(np.concatenate([np.arange(_TEMPLATE), clicked + 0.5]))
        self._row = np.concatenate([np.arange(_TEMPLATE), clicked])[order]
        self._value = pa.concat_arrays([shown, clicks]).take(pa.array(order))
        _, self._offsets, text = self._value.buffers()
        self._text = np.frombuffer(text, np.uint8)
        start = np.frombuffer(self._offsets, np.int64)[:-1]
        click = order >= _TEMPLATE
        self._id_at, self._time_at = (
            start
            + np.where(
                click,
                clicks[0].as_py().index(mark) + len(mark),
                shown[0].as_py().index(mark) + len(mark),
            )
            for mark in (b'"impression_id":"', b'"time":')
        )

    def copy(self, number: int) -> pa.LargeBinaryArray:
        text = self._text.copy()
        row = number * _TEMPLATE + self._row
        _write_digits(text, self._id_at, row, _ID_DIGITS)
        _write_digits(text, self._time_at, _START_MS + row, _TIME_DIGITS)
        return pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(self._value), [None, self._offsets, pa.py_buffer(text)]
        )


def _write_digits(
    text: npt.NDArray[np.uint8],
    at: npt.NDArray[np.int64],
    number: npt.NDArray[np.int64],
    digits: int,
) -> None:
    for place in range(digits):
        text[at + place] = ord("0") + number // 10 ** (digits - 1 - place) % 10


class Endless:
    """A stream for `runs.train_on_log` that notes, before each copy, how much processor time the process has used for all but making it."""

    name = identity = "endless"
    notes = ()
    fields = tuple(Field(f"f{i}", "categorical") for i in range(FIELDS))

    def __init__(self, impressions: int) -> None:
        self._copies = -(-impressions // _TEMPLATE)
        self._template = Template()
        self.marks: list[tuple[int, float]] = []
        self.made = 0.0

    def batches(self) -> Iterator[Any]:
        events = 0
        for number in range(self._copies):
            self.marks.append((events, time.process_time() - self.made))
            began = time.thread_time()
            value = self._template.copy(number)
            self.made += time.thread_time() - began
            events += len(value)
            yield _Batch(value)
        self.marks.append((events, time.process_time() - self.made))


class _Batch:
    def __init__(self, value: pa.LargeBinaryArray) -> None:
        self.value = value


def by_block(marks: list[tuple[int, float]], block: int) -> list[float]:
    """Microseconds of processor time an event in successive blocks of at least so many events."""
    costs, (events, seconds) = [], marks[0]
    for events_now, seconds_now in marks[1:]:
        if events_now - events >= block:
            costs.append(1e6 * (seconds_now - seconds) / (events_now - events))
            events, seconds = events_now, seconds_now
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
            report = runs.train_on_log(stream, config, lease)
        seconds, costs = time.perf_counter() - began, by_block(stream.marks, arguments.block)
        _, *steady = costs  # in the first block everything is loaded and grows to its size
        few = max(1, len(steady) // 4)
        return {
            "value": statistics.median(steady[-few:]) / statistics.median(steady[:few]), "microseconds_by_block": costs,
            "events": report["events"], "examples": report["examples"], "seconds": seconds,
        }  # fmt: skip

    answer(measure)


if __name__ == "__main__":
    main()
