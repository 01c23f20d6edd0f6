"""A log as a stream: impressions and clicks in event-time order, each click after its impression.

`Log` is the base class of every format. A format that records impressions and the times of their
clicks yields record batches of impressions with these columns:

    impression_id      string
    time               int64, epoch milliseconds
    click_time         int64, epoch milliseconds; null when there was no click
    features           struct
    true_probability   float64; simulated streams only

`merge_clicks` turns them into events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import DataError
from stream_ctr.events.arrow_columns import one_array
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import encode_clicks, encode_impressions
from stream_ctr.logs.rows import Rejected

DEFAULT_START_MS = 1_735_689_600_000
"""2025-01-01T00:00:00Z, the time of the first event of a log that has no times."""
BATCH_ROWS = 16_384
_IDENTITY_BYTES = 4096
_EARLIEST = np.iinfo(np.int64).min

# `in_time_order` sorts a log whose events are displaced by at most half as many events, or half as
# many bytes, as it buffers. Either limit bounds the memory.
_BUFFERED_EVENTS = 1_000_000
_BUFFERED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class LogBatch:
    """n events in event-time order.

    `time` is in epoch milliseconds, `key` is the impression id in UTF-8 (null when it cannot be
    read), `value` is the event as JSON.
    """

    time: npt.NDArray[np.int64]
    key: pa.LargeBinaryArray
    value: pa.LargeBinaryArray

    def __len__(self) -> int:
        return len(self.time)


class Log:
    """Events in event-time order, which can be read any number of times.

    `fields` is None when the format does not determine the fields of an impression.
    `assumptions` are sentences about values that the log does not contain and that were made up.

    These attributes describe the latest pass:

    - `rejected`: the lines that hold no event.
    - `out_of_order`: the number of events that are older than an event before them. They are
      yielded all the same.
    - `progress`: the share of the log that was read, from 0 to 1.
    """

    format: ClassVar[str]

    def __init__(
        self,
        path: Path | None,
        fields: tuple[Field, ...] | None,
        assumptions: Iterable[str] = (),
        *,
        name: str = "",
    ) -> None:
        self.path = path
        self.name = name or str(path)
        self.fields = fields
        self.rejected = Rejected()
        self.out_of_order = 0
        self.progress = 0.0
        self._assumptions = tuple(assumptions)

    @property
    def identity(self) -> str:
        """The file name and a hash of the first line, in whatever directory the log is.

        It tells the log from another one of the same name.
        """
        if self.path is None:
            return self.name
        with self.path.open("rb") as file:
            first_line = file.read(_IDENTITY_BYTES).partition(b"\n")[0]
        return f"{self.path.name}#{hashlib.sha256(first_line).hexdigest()[:12]}"

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each assumption, then for each problem of the latest pass."""
        problems = []
        if self.rejected.count:
            line, reason = min(self.rejected.first)
            problems.append(
                f"{self.rejected.count} lines cannot be read, "
                f"the first is {self.path}:{line}: {reason}"
            )
        if self.out_of_order:
            problems.append(
                f"{self.out_of_order} events are older than events before them, "
                "by more than the reorder buffer holds"
            )
        return (*self._assumptions, *problems)

    def batches(self) -> Iterator[LogBatch]:
        """Yield the events of one pass over the log.

        Raises `DataError` at the end of a pass without a single event.
        """
        self.rejected = Rejected()
        self.out_of_order = 0
        self.progress = 0.0
        latest = _EARLIEST
        for batch in self._read():
            if not len(batch):
                continue
            latest_so_far = np.maximum.accumulate(np.append(latest, batch.time))
            self.out_of_order += int(np.count_nonzero(batch.time < latest_so_far[:-1]))
            latest = latest_so_far[-1]
            yield batch
        self.progress = 1.0
        if latest == _EARLIEST:
            line, reason = min(self.rejected.first, default=(1, "no events"))
            raise DataError(
                f"nothing in {self.path} can be read as {self.format}; {self.path}:{line}: {reason}"
            )

    def write_jsonl(self, path: Path | str) -> int:
        """Write one event a line and return the number of events.

        A name that ends in .gz or .zst gives a compressed file.
        """
        with pa.output_stream(str(path), compression="detect") as out:
            return self.write_lines(out.write)

    def write_lines(self, write: Callable[[bytes], object]) -> int:
        """Pass one event a line to `write`, many at once, and return the number of events."""
        events = 0
        for batch in self.batches():
            lines = pa.LargeListArray.from_arrays(
                pa.array([0, len(batch)], pa.int64()), batch.value
            )
            write(pc.binary_join(lines, pa.scalar(b"\n", pa.large_binary()))[0].as_buffer())
            write(b"\n")
            events += len(batch)
        return events

    def _read(self) -> Iterator[LogBatch]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ClickDelays:
    """Log-normal click delays, drawn in the order of the impressions.

    The delays do not depend on how the impressions are divided into batches. `sigma` is the
    standard deviation of the logarithm of a delay.
    """

    rng: np.random.Generator
    median_seconds: float
    sigma: float

    def click_time(
        self, time: npt.NDArray[np.int64], clicked: npt.NDArray[np.bool_]
    ) -> pa.Int64Array:
        """Return the epoch milliseconds of each click, null where there was no click.

        A click comes at least one millisecond after its impression.
        """
        click_time = np.zeros(len(time), np.int64)
        index = np.flatnonzero(clicked)
        median_ms = 1000 * self.median_seconds
        delay = median_ms * np.exp(self.sigma * self.rng.standard_normal(len(index)))
        click_time[index] = time[index] + np.maximum(1, delay.astype(np.int64))
        return pa.array(click_time, mask=~clicked)


def impression_batch(
    impression_id: pa.StringArray,
    time: npt.NDArray[np.int64],
    click_time: pa.Int64Array,
    features: Mapping[str, pa.Array],
    true_probability: npt.NDArray[np.float64] | None = None,
) -> pa.RecordBatch:
    """Return n impressions as a record batch for `merge_clicks`."""
    columns = {
        "impression_id": impression_id,
        "time": pa.array(time),
        "click_time": click_time,
        "features": pa.StructArray.from_arrays(list(features.values()), list(features)),
    }
    if true_probability is not None:
        columns["true_probability"] = pa.array(true_probability)
    return pa.RecordBatch.from_pydict(columns)


def merge_clicks(impressions: Iterable[pa.RecordBatch]) -> Iterator[LogBatch]:
    """Yield impressions, which come sorted by time, and their clicks as events in time order.

    At equal times impressions come before clicks, and each kind keeps its own order. A click is
    held back until an impression with a later time has been read.
    """
    waiting = pa.table(
        {"impression_id": pa.array([], pa.string()), "time": pa.array([], pa.int64())}
    )
    for batch in impressions:
        if not len(batch):
            continue
        shown = pa.table({"impression_id": batch["impression_id"], "time": batch["click_time"]})
        new_clicks = shown.filter(pc.is_valid(shown["time"]))
        clicks = pa.concat_tables([waiting, new_clicks]).combine_chunks()
        due = pc.less(clicks["time"], batch["time"][-1])
        yield _interleave(_encoded_impressions(batch), _encoded_clicks(clicks.filter(due)))
        waiting = clicks.filter(pc.invert(due))
    yield _interleave(_encoded_clicks(waiting))


def _encoded_impressions(batch: pa.RecordBatch) -> LogBatch:
    time = batch["time"].to_numpy()
    features = {
        feature.name: pc.struct_field(batch["features"], [index])
        for index, feature in enumerate(batch["features"].type)
    }
    known = "true_probability" in batch.schema.names
    probability = batch["true_probability"].to_numpy() if known else None
    value = encode_impressions(batch["impression_id"], time, features, probability)
    return LogBatch(time, batch["impression_id"].cast(pa.large_binary()), value)


def _encoded_clicks(clicks: pa.Table) -> LogBatch:
    impression_id = one_array(clicks["impression_id"])
    time = clicks["time"].to_numpy()
    value = encode_clicks(impression_id, time)
    return LogBatch(time, impression_id.cast(pa.large_binary()), value)


def _interleave(*batches: LogBatch) -> LogBatch:
    """Return the events of the batches, stably sorted by time."""
    time = np.concatenate([batch.time for batch in batches])
    order = np.argsort(time, kind="stable")
    key = pa.concat_arrays([batch.key for batch in batches])
    value = pa.concat_arrays([batch.value for batch in batches])
    return LogBatch(time[order], key.take(pa.array(order)), value.take(pa.array(order)))


def in_time_order(
    batches: Iterable[pa.RecordBatch],
    *,
    buffered_events: int = _BUFFERED_EVENTS,
    buffered_bytes: int = _BUFFERED_BYTES,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows sorted by their column `time`, stably, as far as a bounded buffer reaches.

    When the buffer is over one of its limits, the older half of it is yielded.
    """
    buffer: list[pa.Table] = []
    for batch in batches:
        buffer.append(pa.Table.from_batches([batch]))
        events = sum(map(len, buffer))
        size = sum(table.nbytes for table in buffer)
        if events > buffered_events or size > buffered_bytes:
            table = _sorted_by_time(buffer)
            half = len(table) // 2
            yield from table.slice(0, half).to_batches(max_chunksize=BATCH_ROWS)
            buffer = [table.slice(half)]
    if buffer:
        yield from _sorted_by_time(buffer).to_batches(max_chunksize=BATCH_ROWS)


def _sorted_by_time(tables: Sequence[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    time = table["time"].to_numpy()
    if np.all(time[1:] >= time[:-1]):
        return table
    return table.take(pa.array(np.argsort(time, kind="stable")))
