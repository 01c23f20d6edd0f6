"""Ours: watermarks, lateness and the join of impressions of 39 fields with their clicks, while so many impressions are pending; one core.

Columns as the reader hands them over are ready before it is timed: one impression a millisecond, of which one in sixteen is clicked four
milliseconds later. What is counted are events, both kinds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
from answers import answer, on_one_core

from stream_ctr.events.batch import Came, EventBatch, Rejected
from stream_ctr.events.features import mix64
from stream_ctr.join import joining
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks

_BLOCK, _CLICK_EVERY, _CLICK_AFTER_MS = 8192, 16, 4
_START_MS = 1_735_689_600_000
_NONE = Rejected(np.zeros(0, np.int32), np.zeros(0, np.int64), [], [], [], [])


def blocks(fields: int) -> Iterator[EventBatch]:
    """Endless, `_BLOCK` impressions and their clicks each."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1 << 20, (_BLOCK, fields), dtype=np.int32)
    shown, clicked = np.arange(_BLOCK), np.arange(0, _BLOCK, _CLICK_EVERY)
    arrival = np.argsort(np.concatenate([shown, clicked + _CLICK_AFTER_MS + 0.5]))
    place = np.empty(len(arrival), np.int64)
    place[arrival] = np.arange(len(arrival))
    first = 0
    while True:
        came = [
            Came(
                mix64((first + rows).astype(np.uint64)),
                _START_MS + first + rows + after,
                np.zeros(len(rows), np.int32),
                2 * first + at,
            )
            for rows, after, at in (
                (shown, 0, place[:_BLOCK]),
                (clicked, _CLICK_AFTER_MS, place[_BLOCK:]),
            )
        ]
        values, truth = np.zeros((_BLOCK, 0), np.float32), np.full(_BLOCK, np.nan)
        yield EventBatch(
            len(arrival), came[0], ids, values, truth, came[1], arrival, _NONE, frozenset(), 0, 0.0
        )
        first += _BLOCK


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pending", type=int, required=True)
    parser.add_argument(
        "--impressions", type=int, required=True, help="for which it is timed, each time"
    )
    parser.add_argument("--fields", type=int, default=39)
    arguments = parser.parse_args()
    on_one_core()
    joiner = LabelJoiner(
        fields=arguments.fields, id_bits=20, label_window_ms=arguments.pending, duplicate_horizon_ms=arguments.pending,
    )  # fmt: skip
    watermarks, endless = (
        Watermarks(partitions=1, lateness_ms=1, stall_clicks=40.0),
        blocks(arguments.fields),
    )
    nobody = np.zeros(1, bool)

    def join(columns: EventBatch) -> int:
        joining.push(columns, joiner, watermarks)
        watermark, clicked = watermarks.overall(excused=nobody), 0
        while len(examples := joiner.advance(watermark)):
            clicked += int(examples.label.sum())
        return clicked

    for columns in islice(endless, arguments.pending // _BLOCK + 2):
        join(columns)

    def measure() -> dict[str, float]:
        ready = list(islice(endless, max(1, arguments.impressions // _BLOCK)))
        began, processor = time.perf_counter(), time.process_time()
        clicked = sum(join(columns) for columns in ready)
        seconds, processor_seconds = time.perf_counter() - began, time.process_time() - processor
        if clicked != len(ready) * _BLOCK // _CLICK_EVERY:
            raise AssertionError(f"{clicked} examples were clicked, of {len(ready)} blocks")
        return {
            "count": sum(columns.events for columns in ready),
            "seconds": seconds,
            "processor_seconds": processor_seconds,
        }

    answer(measure, note=f"{joiner.pending:,} pending")


if __name__ == "__main__":
    main()
