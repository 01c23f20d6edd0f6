"""Ours: watermarks, lateness and the join of impressions with their clicks, on one core.

The columns that the reader would hand over are made before the time is taken: one impression a
millisecond, and four milliseconds after every sixteenth a click of it. So many impressions are
pending all the time. Events of both kinds are counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt
from answers import answer, on_one_core

from stream_ctr.events.batch import Arrivals, EventBatch, Rejected
from stream_ctr.events.features import mix64
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks

_BLOCK = 8192
_CLICK_EVERY = 16
_CLICK_AFTER_MS = 4
_START_MS = 1_735_689_600_000
_NONE_REJECTED = Rejected(np.zeros(0, np.int32), np.zeros(0, np.int64), [], [], [], [])


def blocks(fields: int) -> Iterator[EventBatch]:
    """Yield blocks of `_BLOCK` impressions and their clicks, without end."""
    ids = np.random.default_rng(0).integers(0, 1 << 20, (_BLOCK, fields), dtype=np.int32)
    shown = np.arange(_BLOCK)
    clicked = np.arange(0, _BLOCK, _CLICK_EVERY)
    arrival = np.argsort(np.concatenate([shown, clicked + _CLICK_AFTER_MS + 0.5]))
    place = np.empty(len(arrival), np.int64)
    place[arrival] = np.arange(len(arrival))

    def arrivals(
        number: npt.NDArray[np.int64], delay_ms: int, place: npt.NDArray[np.int64]
    ) -> Arrivals:
        id_hash = mix64(number.astype(np.uint64))
        partition = np.zeros(len(number), np.int32)
        return Arrivals(id_hash, _START_MS + number + delay_ms, partition, place)

    first = 0
    while True:
        yield EventBatch(
            records=len(arrival),
            impressions=arrivals(first + shown, 0, 2 * first + place[:_BLOCK]),
            ids=ids,
            values=np.zeros((_BLOCK, 0), np.float32),
            true_probability=np.full(_BLOCK, np.nan),
            clicks=arrivals(first + clicked, _CLICK_AFTER_MS, 2 * first + place[_BLOCK:]),
            arrival=arrival,
            rejected=_NONE_REJECTED,
            with_fields=frozenset(),
            with_unknown_fields=0,
            bad_shares=None,
        )
        first += _BLOCK


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pending", type=int, required=True)
    parser.add_argument(
        "--impressions", type=int, required=True, help="impressions of one measurement"
    )
    parser.add_argument("--fields", type=int, default=39)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    on_one_core()
    joiner = LabelJoiner(
        fields=arguments.fields,
        id_bits=20,
        label_window_ms=arguments.pending,
        duplicate_horizon_ms=arguments.pending,
    )
    watermarks = Watermarks(partitions=1, lateness_ms=1, stall_clicks=40.0)
    none_excused = np.zeros(1, bool)
    endless = blocks(arguments.fields)

    def join(events: EventBatch) -> int:
        """Push a block, and return how many examples with a click left."""
        joiner.push(events, watermarks)
        watermark = watermarks.overall(excused=none_excused)
        clicked = 0
        while len(examples := joiner.advance(watermark)):
            clicked += int(examples.label.sum())
        return clicked

    for events in islice(endless, arguments.pending // _BLOCK + 2):
        join(events)

    def measure() -> dict[str, float]:
        ready = list(islice(endless, max(1, arguments.impressions // _BLOCK)))
        began = time.perf_counter()
        processor_began = time.process_time()
        clicked = sum(join(events) for events in ready)
        seconds = time.perf_counter() - began
        processor_seconds = time.process_time() - processor_began
        if clicked != len(ready) * _BLOCK // _CLICK_EVERY:
            raise AssertionError(f"{clicked} examples were clicked, of {len(ready)} blocks")
        return {
            "count": sum(events.events for events in ready),
            "seconds": seconds,
            "processor_seconds": processor_seconds,
        }

    answer(measure, note=f"{joiner.pending:,} pending")


if __name__ == "__main__":
    main()
