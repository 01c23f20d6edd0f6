"""History as a stream: impressions and clicks in event-time order, each click after its impression.

Impressions travel as record batches: impression_id string, time int64, click_time int64 (null: no click), features struct, and on
simulated streams true_probability float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
"""2025-01-01T00:00:00Z: where time begins in logs that have none."""
BATCH_ROWS = 16_384
_IDENTITY_BYTES = 4096

# A log may be out of order by half as many events as are held back, or by half as many bytes: memory stays bounded either way.
_HELD_EVENTS, _HELD_BYTES = 1_000_000, 256 << 20


@dataclass(frozen=True, slots=True)
class LogBatch:
    """n events in event-time order: `time` in epoch milliseconds, `key` the impression id as UTF-8 (null: unreadable), `value` JSON."""

    time: npt.NDArray[np.int64]
    key: pa.LargeBinaryArray
    value: pa.LargeBinaryArray

    def __len__(self) -> int:
        return len(self.time)


class Log:
    """Events in event-time order. `fields` is None where only the events themselves can tell.

    `rejected`, `out_of_order` (events older than one before them, passed on all the same) and `progress` (0 to 1) are of the latest pass.
    """

    format: ClassVar[str]

    def __init__(
        self,
        path: Path | None,
        fields: tuple[Field, ...] | None,
        invented: Iterable[str] = (),
        *,
        name: str = "",
    ) -> None:
        self.path = path
        self.name = name or str(path)
        self.fields = fields
        self.rejected = Rejected()
        self.out_of_order = 0
        self.progress = 0.0
        self._invented = tuple(invented)

    @property
    def identity(self) -> str:
        """Name and beginning of the log: what tells it from another that happens to have the same name, wherever it lies."""
        if self.path is None:
            return self.name
        with self.path.open("rb") as file:
            beginning = file.read(_IDENTITY_BYTES).partition(b"\n")[0]
        return f"{self.path.name}#{hashlib.sha256(beginning).hexdigest()[:12]}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was invented, then what the latest pass found wrong: one sentence each."""
        found = []
        if self.rejected.count:
            line, reason = min(self.rejected.first)
            found.append(
                f"{self.rejected.count} lines cannot be read, the first is {self.path}:{line}: {reason}"
            )
        if self.out_of_order:
            found.append(
                f"{self.out_of_order} events are older than events before them, by more than the reorder buffer holds"
            )
        return (*self._invented, *found)

    def batches(self) -> Iterator[LogBatch]:
        """One pass over the log. Raises `DataError` when it ends without a single event."""
        self.rejected, self.out_of_order, self.progress = Rejected(), 0, 0.0
        latest = np.iinfo(np.int64).min
        for batch in self._read():
            if not len(batch):
                continue
            reached = np.maximum.accumulate(np.append(latest, batch.time))
            self.out_of_order += int(np.count_nonzero(batch.time < reached[:-1]))
            latest = reached[-1]
            yield batch
        self.progress = 1.0
        if latest == np.iinfo(np.int64).min:
            line, reason = min(self.rejected.first, default=(1, "no events"))
            raise DataError(
                f"nothing in {self.path} can be read as {self.format}; {self.path}:{line}: {reason}"
            )

    def write_jsonl(self, path: Path | str) -> int:
        """Writes one event a line (compressed when the name ends in .gz or .zst) and returns the number of events."""
        events = 0
        with pa.output_stream(str(path), compression="detect") as out:
            for batch in self.batches():
                lines = pa.LargeListArray.from_arrays(
                    pa.array([0, len(batch)], pa.int64()), batch.value
                )
                out.write(pc.binary_join(lines, pa.scalar(b"\n", pa.large_binary()))[0].as_buffer())
                out.write(b"\n")
                events += len(batch)
        return events

    def _read(self) -> Iterator[LogBatch]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ClickDelays:
    """Log-normal click delays, drawn in the order of the impressions: how they are cut into batches does not matter."""

    rng: np.random.Generator
    median_seconds: float
    sigma: float

    def click_time(
        self, time: npt.NDArray[np.int64], clicked: npt.NDArray[np.bool_]
    ) -> pa.Int64Array:
        """Epoch milliseconds of each click, at least one after its impression; null where there was none."""
        click_time = np.zeros(len(time), np.int64)
        at = np.flatnonzero(clicked)
        delay = 1000 * self.median_seconds * np.exp(self.sigma * self.rng.standard_normal(len(at)))
        click_time[at] = time[at] + np.maximum(1, delay.astype(np.int64))
        return pa.array(click_time, mask=~clicked)


def impression_batch(
    impression_id: pa.StringArray,
    time: npt.NDArray[np.int64],
    click_time: pa.Int64Array,
    features: Mapping[str, pa.Array],
    true_probability: npt.NDArray[np.float64] | None = None,
) -> pa.RecordBatch:
    """n impressions in columns, as `merge_clicks` takes them."""
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
    """Impressions, sorted by time, and their clicks as one stream of events in time order.

    At equal times impressions come before clicks, and each kind keeps its own order. A click waits until impressions have passed it.
    """
    waiting = pa.table(
        {"impression_id": pa.array([], pa.string()), "time": pa.array([], pa.int64())}
    )
    for batch in impressions:
        if not len(batch):
            continue
        shown = pa.table({"impression_id": batch["impression_id"], "time": batch["click_time"]})
        clicks = pa.concat_tables(
            [waiting, shown.filter(pc.is_valid(shown["time"]))]
        ).combine_chunks()
        passed = pc.less(clicks["time"], batch["time"][-1])
        yield _interleave(_encoded_impressions(batch), _encoded_clicks(clicks.filter(passed)))
        waiting = clicks.filter(pc.invert(passed))
    yield _interleave(_encoded_clicks(waiting))


def _encoded_impressions(batch: pa.RecordBatch) -> LogBatch:
    time = batch["time"].to_numpy()
    features = {
        f.name: pc.struct_field(batch["features"], [i])
        for i, f in enumerate(batch["features"].type)
    }
    probability = (
        batch["true_probability"].to_numpy() if "true_probability" in batch.schema.names else None
    )
    value = encode_impressions(batch["impression_id"], time, features, probability)
    return LogBatch(time, batch["impression_id"].cast(pa.large_binary()), value)


def _encoded_clicks(clicks: pa.Table) -> LogBatch:
    identity, time = one_array(clicks["impression_id"]), clicks["time"].to_numpy()
    return LogBatch(time, identity.cast(pa.large_binary()), encode_clicks(identity, time))


def _interleave(*batches: LogBatch) -> LogBatch:
    time = np.concatenate([batch.time for batch in batches])
    order = np.argsort(time, kind="stable")
    key, value = (
        pa.concat_arrays([getattr(batch, name) for batch in batches]) for name in ("key", "value")
    )
    return LogBatch(time[order], key.take(pa.array(order)), value.take(pa.array(order)))


def in_time_order(
    batches: Iterable[pa.RecordBatch],
    *,
    held_events: int = _HELD_EVENTS,
    held_bytes: int = _HELD_BYTES,
) -> Iterator[pa.RecordBatch]:
    """Rows sorted by their column `time`, stably, as far as a bounded buffer reaches: when it is full, the older half goes out."""
    held: list[pa.Table] = []
    for batch in batches:
        held.append(pa.Table.from_batches([batch]))
        if sum(map(len, held)) > held_events or sum(table.nbytes for table in held) > held_bytes:
            table = _sorted_by_time(held)
            yield from table.slice(0, len(table) // 2).to_batches(max_chunksize=BATCH_ROWS)
            held = [table.slice(len(table) // 2)]
    if held:
        yield from _sorted_by_time(held).to_batches(max_chunksize=BATCH_ROWS)


def _sorted_by_time(tables: Sequence[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    time = table["time"].to_numpy()
    if np.all(time[1:] >= time[:-1]):
        return table
    return table.take(pa.array(np.argsort(time, kind="stable")))
