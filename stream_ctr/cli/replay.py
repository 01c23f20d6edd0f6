"""Replay: produce the events of a log to a topic, at full speed or at a multiple of real time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from stream_ctr.connectors import kafka
from stream_ctr.events.arrow_events import pack
from stream_ctr.events.field import Field

_FLUSH_SECONDS = 120.0


class TimedEvents(Protocol):
    """n events in event-time order.

    `time` holds epoch milliseconds [n], `value` JSON bytes [n], `key` the impression ids as Kafka
    keys [n].
    """

    @property
    def time(self) -> npt.NDArray[np.int64]: ...
    @property
    def value(self) -> pa.LargeBinaryArray: ...
    @property
    def key(self) -> pa.Array: ...
    def __len__(self) -> int: ...


class Stream(Protocol):
    """History that can be read as a stream more than once, such as `logs.log.Log`."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def fields(self) -> tuple[Field, ...] | None: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def batches(self) -> Iterator[TimedEvents]: ...


def produce(
    log: Stream,
    sink: kafka.KafkaSink,
    topic: str,
    factor: float | None,
    *,
    events_a_record: int | None = None,
) -> tuple[int, float]:
    """Send all events of a log to a topic; return how many, and in how many seconds.

    `factor` is the multiple of real time, None for as fast as possible. Each event is a JSON
    record, or with `events_a_record` a part of an Arrow record, which has no key: the partitions
    take turns.
    """
    count = 0
    started = time.monotonic()
    first_ms = None
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"replaying {log.name}", total=None)
        for batch in log.batches():
            if first_ms is None:
                first_ms = int(batch.time[0])
            parts = [slice(0, len(batch))]
            for rows in _paced(batch.time - first_ms, factor, started) if factor else parts:
                # Records carry no event times: a broker would delete a log that is older than its
                # retention at once.
                if events_a_record:
                    packed = pack(batch.value[rows], events_a_record=events_a_record)
                    sink.send_batch(topic, packed)
                else:
                    sink.send_batch(topic, batch.value[rows], keys=batch.key[rows])
                done = count + rows.stop
                progress.update(task, description=f"replaying {log.name}: {done:,} events")
            count += len(batch)
        sink.flush(_FLUSH_SECONDS)
    return count, time.monotonic() - started


def _paced(elapsed_ms: npt.NDArray[np.int64], factor: float, started: float) -> Iterator[slice]:
    """Yield runs of rows, each when its time has come."""
    done = 0
    while done < len(elapsed_ms):
        now_ms = (time.monotonic() - started) * 1000 * factor
        due = int(np.searchsorted(elapsed_ms, now_ms, side="right"))
        if due > done:
            yield slice(done, due)
            done = due
        else:
            wait = float(elapsed_ms[done]) / 1000 / factor - (time.monotonic() - started)
            time.sleep(min(0.05, max(0.001, wait)))
