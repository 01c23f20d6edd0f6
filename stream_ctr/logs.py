"""History as a stream: a log on disk becomes impressions and clicks in event-time order.

| format    | what it is                                                     | what is invented                        |
|-----------|----------------------------------------------------------------|-----------------------------------------|
| `events`  | JSON lines as on the wire (see `events`)                       | nothing; the lines pass through as bytes |
| `parquet`, `arrow` | columns kind, impression_id, time, features (a struct, or all other columns), true_probability | nothing |
| `criteo`  | TSV without header: label, 13 integers, 26 hexadecimal categories | times, click times                   |
| `avazu`   | CSV of the 2014 challenge, with or without its header          | times within the hour, click times      |
| `obd`     | Open Bandit CSV                                                | click times                             |

Text may be compressed with gzip or Zstandard. What a log does not say is invented from a seed, and `Log.notes` says so. A line that cannot
be read is counted and named, never fatal, unless nothing can be read. Reading takes bounded memory, and a second pass yields
the same bytes: a run that resumes finds every event where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from stream_ctr.config import Field, nearest
from stream_ctr.errors import ConfigError, DataError
from stream_ctr.events import EARLIEST_MS, LATEST_MS, Decoder, encode_clicks, encode_impressions

DEFAULT_START_MS = 1_735_689_600_000
"""2025-01-01T00:00:00Z: where time begins in logs that have none."""
DELAY_SIGMA = 1.3
"""Spread of invented click delays (standard deviation of their logarithm): with a median of 30 s, 1 % take longer than 10 minutes."""

_HOUR_MS = 3_600_000
_BLOCK_BYTES = 4 << 20
_LONGEST_LINE_BYTES = 16 << 20
_BATCH_ROWS = 16_384
# A log may be out of order by half as many events as are held back, or by half as many bytes: memory stays bounded either way.
_HELD_EVENTS, _HELD_BYTES = 1_000_000, 256 << 20
_NAMED_REJECTS = 100
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class EventBatch:
    """n events in event-time order: `time` in epoch milliseconds, `key` the impression id as UTF-8 (null: unreadable), `value` JSON."""

    time: npt.NDArray[np.int64]
    key: pa.LargeBinaryArray
    value: pa.LargeBinaryArray

    def __len__(self) -> int:
        return len(self.time)


@dataclass(slots=True)
class Rejected:
    """Lines (of column formats: rows) that hold no event: how many, and the line number and reason of the first hundred found."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, reason: str) -> None:
        self.count += 1
        if len(self.first) < _NAMED_REJECTS:
            self.first.append((line, reason))


class Log:
    """Events in event-time order. `fields` is None where only the events themselves can tell.

    `rejected`, `out_of_order` (events older than one before them, passed on all the same) and `progress` (0 to 1) are of the latest pass.
    """

    format: ClassVar[str]

    def __init__(self, path: Path | None, fields: tuple[Field, ...] | None, invented: Iterable[str] = (), *, name: str = "") -> None:
        self.path = path
        self.name = name or str(path)
        self.fields = fields
        self.rejected = Rejected()
        self.out_of_order = 0
        self.progress = 0.0
        self._invented = tuple(invented)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was invented, then what the latest pass found wrong: one sentence each."""
        found = []
        if self.rejected.count:
            line, reason = min(self.rejected.first)
            found.append(f"{self.rejected.count} lines cannot be read, the first is {self.path}:{line}: {reason}")
        if self.out_of_order:
            found.append(f"{self.out_of_order} events are older than events before them, by more than the reorder buffer holds")
        return (*self._invented, *found)

    def batches(self) -> Iterator[EventBatch]:
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
            raise DataError(f"nothing in {self.path} can be read as {self.format}; {self.path}:{line}: {reason}")

    def write_jsonl(self, path: Path | str) -> int:
        """Writes one event a line (compressed when the name ends in .gz or .zst) and returns the number of events."""
        events = 0
        with pa.output_stream(str(path), compression="detect") as out:
            for batch in self.batches():
                lines = pa.LargeListArray.from_arrays(pa.array([0, len(batch)], pa.int64()), batch.value)
                out.write(pc.binary_join(lines, pa.scalar(b"\n", pa.large_binary()))[0].as_buffer())
                out.write(b"\n")
                events += len(batch)
        return events

    def _read(self) -> Iterator[EventBatch]:
        raise NotImplementedError


def open_log(
    path: Path | str,
    *,
    format: str | None = None,
    seed: int = 0,
    click_delay_seconds: float = 30.0,
    rate: float = 100.0,
    start_ms: int = DEFAULT_START_MS,
) -> Log:
    """The log at `path`, its format sniffed unless given.

    Where the log is silent: impressions are spaced evenly at `rate` a second of event time from `start_ms` on; click delays are
    log-normal with median `click_delay_seconds`, drawn from `seed`. Raises `DataError` when the log cannot be read at all.
    """
    path = Path(path)
    sniffed = format or sniff(path)
    if sniffed not in FORMATS:
        raise ConfigError(f"unknown log format {sniffed!r}{nearest(sniffed, FORMATS)}; known are {', '.join(FORMATS)}")
    _head(path)
    if not (rate > 0 and click_delay_seconds > 0 and seed >= 0):
        raise ConfigError(
            f"rate and click delay must be positive, a seed at least 0, got {rate:g} a second, {click_delay_seconds:g} s and {seed}"
        )
    return FORMATS[sniffed](path, Invention(seed, click_delay_seconds, rate, start_ms))


@dataclass(frozen=True, slots=True)
class Invention:
    """What is made up where a log is silent: median click delay, impressions per second of event time, first event time."""

    seed: int
    click_delay_seconds: float
    rate: float
    start_ms: int

    def click_note(self) -> str:
        return f"no click times in this log: delays drawn from a log-normal with median {self.click_delay_seconds:g} s, seed {self.seed}"

    def click_delays(self) -> ClickDelays:
        return ClickDelays(np.random.default_rng([self.seed, 0]), self.click_delay_seconds, DELAY_SIGMA)


@dataclass(frozen=True, slots=True)
class ClickDelays:
    """Log-normal click delays, drawn in the order of the impressions: how they are cut into batches does not matter."""

    rng: np.random.Generator
    median_seconds: float
    sigma: float

    def click_time(self, time: npt.NDArray[np.int64], clicked: npt.NDArray[np.bool_]) -> pa.Int64Array:
        """Epoch milliseconds of each click, at least one after its impression; null where there was none."""
        click_time = np.zeros(len(time), np.int64)
        at = np.flatnonzero(clicked)
        delay = 1000 * self.median_seconds * np.exp(self.sigma * self.rng.standard_normal(len(at)))
        click_time[at] = time[at] + np.maximum(1, delay.astype(np.int64))
        return pa.array(click_time, mask=~clicked)


# -- event-time order ---------------------------------------------------------------------------------------------------------------
#
# Impressions travel as record batches: impression_id string, time int64, click_time int64 (null: no click), features struct, and on
# simulated streams true_probability float64.


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


def merge_clicks(impressions: Iterable[pa.RecordBatch]) -> Iterator[EventBatch]:
    """Impressions, sorted by time, and their clicks as one stream of events in time order.

    At equal times impressions come before clicks, and each kind keeps its own order. A click waits until impressions have passed it.
    """
    waiting = pa.table({"impression_id": pa.array([], pa.string()), "time": pa.array([], pa.int64())})
    for batch in impressions:
        if not len(batch):
            continue
        clicked = batch.filter(pc.is_valid(batch["click_time"]))
        fresh = pa.table({"impression_id": clicked["impression_id"], "time": clicked["click_time"]})
        clicks = pa.concat_tables([waiting, fresh]).combine_chunks()
        passed = pc.less(clicks["time"], batch["time"][-1])
        yield _interleave(_encoded_impressions(batch), _encoded_clicks(clicks.filter(passed)))
        waiting = clicks.filter(pc.invert(passed))
    yield _interleave(_encoded_clicks(waiting))


def _encoded_impressions(batch: pa.RecordBatch) -> EventBatch:
    time = batch["time"].to_numpy()
    features = {f.name: pc.struct_field(batch["features"], [i]) for i, f in enumerate(batch["features"].type)}
    probability = batch["true_probability"].to_numpy() if "true_probability" in batch.schema.names else None
    value = encode_impressions(batch["impression_id"], time, features, probability)
    return EventBatch(time, batch["impression_id"].cast(pa.large_binary()), value)


def _encoded_clicks(clicks: pa.Table) -> EventBatch:
    identity, time = _one_array(clicks["impression_id"]), clicks["time"].to_numpy()
    return EventBatch(time, identity.cast(pa.large_binary()), encode_clicks(identity, time))


def _interleave(*batches: EventBatch) -> EventBatch:
    time = np.concatenate([batch.time for batch in batches])
    order = np.argsort(time, kind="stable")
    key, value = (pa.concat_arrays([getattr(batch, name) for batch in batches]) for name in ("key", "value"))
    return EventBatch(time[order], key.take(pa.array(order)), value.take(pa.array(order)))


def in_time_order(
    batches: Iterable[pa.RecordBatch], *, held_events: int = _HELD_EVENTS, held_bytes: int = _HELD_BYTES
) -> Iterator[pa.RecordBatch]:
    """Rows sorted by their column `time`, stably, as far as a bounded buffer reaches: when it is full, the older half goes out."""
    held: list[pa.Table] = []
    for batch in batches:
        held.append(pa.Table.from_batches([batch]))
        if sum(map(len, held)) > held_events or sum(table.nbytes for table in held) > held_bytes:
            table = _sorted_by_time(held)
            yield from table.slice(0, len(table) // 2).to_batches(max_chunksize=_BATCH_ROWS)
            held = [table.slice(len(table) // 2)]
    if held:
        yield from _sorted_by_time(held).to_batches(max_chunksize=_BATCH_ROWS)


def _sorted_by_time(tables: Sequence[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    time = table["time"].to_numpy()
    if np.all(time[1:] >= time[:-1]):
        return table
    return table.take(pa.array(np.argsort(time, kind="stable")))


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


# -- text ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a delimited file as text columns (null: blank), and the line that each stands on, from 1."""

    line: npt.NDArray[np.int64]
    columns: pa.Table
    rejected: Rejected

    def only(self, good: npt.NDArray[np.bool_], name: str, expected: str) -> _Rows:
        """The rows that are `good`. The others are rejected: "`name` must be `expected`, got ..."."""
        if good.all():
            return self
        for at in np.flatnonzero(~good).tolist():
            self.rejected.add(int(self.line[at]), f"{name} must be {expected}, got {_shown(self.columns[name][at].as_py())}")
        return _Rows(self.line[good], self.columns.filter(pa.array(good)), self.rejected)

    def labelled(self, name: str) -> _Rows:
        """The rows whose label is 0 or 1, nothing else."""
        return self.only(_mask(pc.is_in(self.columns[name], pa.array(["0", "1"]))), name, "0 or 1")

    def identified(self, name: str) -> _Rows:
        return self.only(_mask(pc.is_valid(self.columns[name])), name, "an id")

    def parsed(self, name: str, parse: Callable[[pa.Array], pa.Array], expected: str) -> _Rows:
        """Column `name` put through `parse`, without the rows that it refuses by raising `pa.ArrowInvalid`."""
        column = _one_array(self.columns[name])
        refused = _refused(column, parse)
        good = np.ones(len(column), bool)
        good[refused] = False
        rows = self.only(good, name, expected)
        at = rows.columns.schema.get_field_index(name)
        return _Rows(rows.line, rows.columns.set_column(at, name, parse(_one_array(rows.columns[name]))), rows.rejected)

    def equal(self, name: str, value: str) -> npt.NDArray[np.bool_]:
        return _mask(pc.equal(self.columns[name], value))

    def features(self, names: Iterable[str]) -> dict[str, pa.Array]:
        return {name: _one_array(self.columns[name]) for name in names}


def _refused(column: pa.Array, parse: Callable[[pa.Array], pa.Array], first: int = 0) -> list[int]:
    """Indices of the values that `parse` refuses, found by halving."""
    try:
        parse(column)
    except pa.ArrowInvalid:
        half = len(column) // 2
        return [first] if not half else _refused(column[:half], parse, first) + _refused(column[half:], parse, first + half)
    return []


def _integers(text: pa.Array) -> pa.Array:
    return text.cast(pa.int64())


def _text(column: pa.Array) -> pa.Array:
    return column.cast(pa.string())


def _finite(text: pa.Array) -> pa.Array:
    numbers = text.cast(pa.float64())
    if not pc.all(pc.is_finite(numbers), min_count=0).as_py():
        raise pa.ArrowInvalid("not finite")
    return numbers


def _mask(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.fill_null(column, False).to_numpy(), bool)


def _shown(value: object) -> str:
    return "nothing" if value is None else f"{value!r:.80}"


class _TextLog(Log):
    """A log of lines. Every line that is no row of `len(columns)` cells in UTF-8 is rejected."""

    path: Path

    def _line_blocks(self) -> Iterator[tuple[int, bytes]]:
        """Whole lines, some megabytes at a time: the number of the first, and the lines, each ended by a newline."""
        size = max(1, self.path.stat().st_size)
        number, rest, skipping = 1, b"", False
        with pa.OSFile(str(self.path)) as file, _decompressed(file, self.path) as text:
            while chunk := self._read_chunk(text, number):
                self.progress = min(1.0, file.tell() / size)
                if skipping:
                    _, newline, chunk = chunk.partition(b"\n")
                    skipping, number = not newline, number + len(newline)
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                if newline:
                    yield number, whole + newline
                    number += whole.count(b"\n") + 1
                if len(rest) > _LONGEST_LINE_BYTES:
                    self.rejected.add(number, f"the line is longer than {_LONGEST_LINE_BYTES >> 20} MiB")
                    rest, skipping = b"", True
        if rest:
            yield number, rest + b"\n"

    def _read_chunk(self, text: pa.NativeFile, number: int) -> bytes:
        try:
            chunk: bytes = text.read(_BLOCK_BYTES)
        except OSError as error:
            self.rejected.add(number, f"the rest cannot be read: {error}")
            return b""
        return chunk.removeprefix(_BYTE_ORDER_MARK) if number == 1 else chunk

    def _rows(self, columns: Sequence[str], delimiter: str, *, header: bytes | None, only: Sequence[str] = ()) -> Iterator[_Rows]:
        """Rows of a file whose cells are not quoted; a first line equal to `header` is left out. `only`: the columns wanted."""
        for number, data in self._line_blocks():
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n")
            if number == 1 and header is not None and data.partition(b"\n")[0] == header:
                data = data[len(header) :]
            yield self._parse(number, data, columns, delimiter, only)

    def _parse(self, number: int, data: bytes, columns: Sequence[str], delimiter: str, only: Sequence[str]) -> _Rows:
        wrong: list[tuple[int, str]] = []

        def note_wrong(row: pa.csv.InvalidRow) -> str:
            wrong.append((row.number - 1, f"expected {row.expected_columns} columns, got {row.actual_columns}"))
            return "skip"

        try:
            if b"\r" in data:  # Arrow takes a lone carriage return for the end of a line
                raise pa.ArrowInvalid("carriage return")
            table = pa.csv.read_csv(
                pa.BufferReader(data),
                read_options=pa.csv.ReadOptions(column_names=list(columns), use_threads=False, block_size=len(data) + 1),
                parse_options=pa.csv.ParseOptions(
                    delimiter=delimiter, quote_char=False, ignore_empty_lines=False, invalid_row_handler=note_wrong
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()),
                    strings_can_be_null=True,
                    null_values=[""],
                    include_columns=list(only) or None,
                ),
            )
        except pa.ArrowInvalid:
            return self._parse(number, self._without_bad_text(number, data), columns, delimiter, only)
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        filled = np.diff(ends, prepend=-1) > 1
        for at, reason in wrong:
            self.rejected.add(number + at, reason)
        kept = np.ones(len(ends), bool)
        kept[[at for at, _ in wrong]] = False
        return _Rows(number + np.flatnonzero(kept & filled), table.filter(pa.array(filled[kept])), self.rejected)

    def _without_bad_text(self, number: int, data: bytes) -> bytes:
        lines = data.split(b"\n")
        for at, line in enumerate(lines):
            try:
                if "\r" in line.decode("utf-8"):
                    raise ValueError("a carriage return inside the line")
            except ValueError as error:
                self.rejected.add(number + at, f"no text: {error}")
                lines[at] = b""
        return b"\n".join(lines)


def _decompressed(file: pa.OSFile, path: Path) -> pa.NativeFile:
    codec = _codec(_first_bytes(path, 4))
    return pa.CompressedInputStream(file, codec) if codec else file


def _codec(magic: bytes) -> str | None:
    return "gzip" if magic[:2] == b"\x1f\x8b" else "zstd" if magic == b"\x28\xb5\x2f\xfd" else None


# -- the formats --------------------------------------------------------------------------------------------------------------------

CRITEO_INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
AVAZU_COLUMNS = (
    *("id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)


def _fields(categorical: Iterable[str], numeric: Iterable[str] = ()) -> tuple[Field, ...]:
    return (*(Field(name, "categorical") for name in categorical), *(Field(name, "numeric") for name in numeric))


class CriteoLog(_TextLog):
    """The Criteo display advertising challenge: numeric I1 to I13, categorical C1 to C26. Ids are `criteo-<line>`."""

    format = "criteo"

    def __init__(self, path: Path, invention: Invention) -> None:
        at = datetime.fromtimestamp(invention.start_ms / 1000, UTC).isoformat()
        spacing = f"no event times in this log: impressions spaced evenly at {invention.rate:g} a second from {at} on"
        super().__init__(path, _fields(CRITEO_CATEGORIES, CRITEO_INTEGERS), (spacing, invention.click_note()))
        self.invention = invention

    def _read(self) -> Iterator[EventBatch]:
        return merge_clicks(self._impressions())

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        delays = self.invention.click_delays()
        for rows in self._rows(("label", *CRITEO_INTEGERS, *CRITEO_CATEGORIES), "\t", header=None):
            rows = rows.labelled("label")
            for name in CRITEO_INTEGERS:
                rows = rows.parsed(name, _integers, "an integer")
            time = self.invention.start_ms + ((rows.line - 1) * (1000 / self.invention.rate)).astype(np.int64)
            features = rows.features((*CRITEO_CATEGORIES, *CRITEO_INTEGERS))
            yield impression_batch(_ids("criteo", rows.line), time, delays.click_time(time, rows.equal("label", "1")), features)


def _ids(prefix: str, number: npt.NDArray[np.int64]) -> pa.StringArray:
    return pc.binary_join_element_wise(prefix, pa.array(number).cast(pa.string()), "-")


class AvazuLog(_TextLog):
    """The Avazu challenge: every column but id, click and hour is categorical, and so are hour_of_day and day_of_week (0: Monday)."""

    format = "avazu"

    def __init__(self, path: Path, invention: Invention) -> None:
        first = _head(path).partition(b"\n")[0].rstrip(b"\r")
        self.header = first if first.startswith(b"id,") else None
        self.columns = tuple(first.decode("utf-8").split(",")) if self.header else AVAZU_COLUMNS
        missing = {"id", "click", "hour"} - set(self.columns)
        if missing:
            raise DataError(f"{path} has no column {', '.join(sorted(missing))}: it cannot say who clicked when")
        self.features = tuple(name for name in self.columns if name not in ("id", "click", "hour"))
        spread = "event times are known to the hour only: impressions spread evenly over each hour in file order"
        super().__init__(path, _fields((*self.features, "hour_of_day", "day_of_week")), (spread, invention.click_note()))
        self.invention = invention

    def _read(self) -> Iterator[EventBatch]:
        counts, ascending = self._count_hours()
        impressions = self._impressions(counts)
        return merge_clicks(impressions if ascending else in_time_order(impressions))

    def _count_hours(self) -> tuple[dict[str, int], bool]:
        """Impressions in each hour, and whether the hours ascend: a pass of its own, for a spread needs the count beforehand."""
        counts: dict[str, int] = {}
        ascending, latest = True, ""
        for rows in self._rows(self.columns, ",", header=self.header, only=["hour"]):
            hours = pc.run_end_encode(_one_array(rows.columns["hour"].drop_null()))
            for hour, ahead in zip(hours.values.to_pylist(), np.diff(hours.run_ends.to_numpy(), prepend=0).tolist(), strict=True):
                counts[hour] = counts.get(hour, 0) + ahead
                ascending &= hour >= latest
                latest = hour
        self.rejected = Rejected()
        return counts, ascending

    def _impressions(self, counts: Mapping[str, int]) -> Iterator[pa.RecordBatch]:
        delays = self.invention.click_delays()
        seen = dict.fromkeys(counts, 0)
        for rows in self._rows(self.columns, ",", header=self.header):
            starts = {hour: start for hour in pc.unique(rows.columns["hour"].drop_null()).to_pylist() if (start := _hour_start(hour))}
            good = pa.array(list(starts), pa.string())
            rows = rows.only(_mask(pc.is_in(rows.columns["hour"], good)), "hour", "YYMMDDHH").labelled("click").identified("id")
            hour = _one_array(rows.columns["hour"]).dictionary_encode()
            codes, moments = hour.indices.to_numpy(), [starts[text] for text in hour.dictionary.to_pylist()]
            time = np.zeros(len(codes), np.int64)
            for code, text in enumerate(hour.dictionary.to_pylist()):
                at = np.flatnonzero(codes == code)
                nth = seen[text] + np.arange(len(at))
                time[at] = (moments[code] - _EPOCH) // timedelta(milliseconds=1) + (2 * nth + 1) * _HOUR_MS // (2 * counts[text])
                seen[text] += len(at)
            features = {
                **rows.features(self.features),
                "hour_of_day": pa.array([str(moment.hour) for moment in moments], pa.string()).take(hour.indices),
                "day_of_week": pa.array([str(moment.weekday()) for moment in moments], pa.string()).take(hour.indices),
            }
            yield impression_batch(_one_array(rows.columns["id"]), time, delays.click_time(time, rows.equal("click", "1")), features)


def _hour_start(text: str) -> datetime | None:
    """
    >>> _hour_start("14102100"), _hour_start("14102124")
    (datetime.datetime(2014, 10, 21, 0, 0, tzinfo=datetime.timezone.utc), None)
    """
    try:
        return datetime.strptime(text, "%y%m%d%H").replace(tzinfo=UTC) if len(text) == 8 and text.isdecimal() else None
    except ValueError:
        return None


class OpenBanditLog(_TextLog):
    """An Open Bandit log. Ids are `obd-<line>`. Affinities are numeric, all else is categorical; what describes the logging policy
    rather than the impression (policy, propensity_score) is no feature.
    """

    format = "obd"

    def __init__(self, path: Path, invention: Invention) -> None:
        self.header = _head(path).partition(b"\n")[0].rstrip(b"\r")
        # pandas leaves the name of its index column blank
        self.columns = tuple(name or "index" for name in self.header.decode("utf-8", "replace").split(","))
        missing = {"timestamp", "click"} - set(self.columns)
        if missing:
            raise DataError(f"{path} is no Open Bandit log: its first line has no column {', '.join(sorted(missing))}")
        features = [name for name in self.columns if name not in ("index", "timestamp", "click", "policy", "propensity_score")]
        self.affinities = tuple(name for name in features if "affinity" in name)
        self.categories = tuple(name for name in features if "affinity" not in name)
        super().__init__(path, _fields(self.categories, self.affinities), (invention.click_note(),))
        self.invention = invention

    def _read(self) -> Iterator[EventBatch]:
        return merge_clicks(in_time_order(self._impressions()))

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        delays = self.invention.click_delays()
        for rows in self._rows(self.columns, ",", header=self.header):
            rows = rows.labelled("click").parsed("timestamp", _epoch_ms, "a time with its zone offset")
            rows = rows.only(_mask(pc.is_valid(rows.columns["timestamp"])), "timestamp", "a time")
            for name in self.affinities:
                rows = rows.parsed(name, _finite, "a finite number")
            time = _one_array(rows.columns["timestamp"]).to_numpy()
            features = rows.features((*self.categories, *self.affinities))
            yield impression_batch(_ids("obd", rows.line), time, delays.click_time(time, rows.equal("click", "1")), features)


def _epoch_ms(column: pa.Array) -> pa.Array:
    """Whole milliseconds, rounded down, of integers (taken as they are), timestamps (UTC unless they name a zone) or RFC 3339 text."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if not pa.types.is_timestamp(column.type):
        column = column.cast(pa.string()).cast(pa.timestamp("ns", "UTC"))
    return pc.floor_temporal(column, unit="millisecond").cast(pa.timestamp("ms", column.type.tz)).cast(pa.int64())


class EventLog(_TextLog):
    """JSON lines. Each line passes through byte for byte, also one that is no event: whoever decodes it shall see it and set it aside.

    A line whose time cannot be read takes the time of the line before. Lines out of order are sorted as far as a bounded buffer reaches.
    """

    format = "events"

    def __init__(self, path: Path, invention: Invention) -> None:
        super().__init__(path, None)

    def _read(self) -> Iterator[EventBatch]:
        return map(_event_batch, in_time_order(self._events()))

    def _events(self) -> Iterator[pa.RecordBatch]:
        decoder = Decoder(())
        before = 0
        for _, data in self._line_blocks():
            value = _lines(data)
            if len(value):
                batch = _timed(decoder, value, before)
                before = batch["time"][-1].as_py()
                yield batch


def _lines(data: bytes) -> pa.LargeBinaryArray:
    """The lines of a block that are not empty, without their ends (LF or CRLF).

    >>> _lines(b"a\\n\\nbc\\r\\n").to_pylist()
    [b'a', b'bc']
    """
    text = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate([[0], newlines[:-1] + 1])
    ends = newlines - ((newlines > starts) & (text[newlines - 1] == ord("\r")))
    # Line, its end, next line, ...: one array over the bytes as they are, of which the even elements are taken.
    offsets = np.append(np.stack([starts, ends], 1).ravel(), len(text))
    pieces = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    return pieces.take(pa.array(2 * np.flatnonzero(ends > starts)))


def _timed(decoder: Decoder, value: pa.LargeBinaryArray, before: int) -> pa.RecordBatch:
    """time, key, value of n lines: time and key as decoded, else the time of the line before and no key."""
    events, _ = decoder.decode(value)
    both = (events.impressions, events.clicks)
    row = np.concatenate([part.row for part in both])
    source = np.full(len(value), -1)
    source[row] = np.arange(len(row))
    known = source >= 0
    key = pa.concat_arrays([part.impression_id for part in both]).cast(pa.large_binary()).take(pa.array(source, mask=~known))
    latest_known = np.maximum.accumulate(np.where(known, np.arange(len(value)), -1))
    times = np.append(np.concatenate([part.time for part in both]), before)
    time = times[np.where(latest_known >= 0, source[latest_known], -1)]
    return pa.RecordBatch.from_pydict({"time": pa.array(time), "key": key, "value": value})


def _event_batch(batch: pa.RecordBatch) -> EventBatch:
    return EventBatch(batch["time"].to_numpy(), batch["key"], batch["value"])


_NO_EVENTS = pa.RecordBatch.from_pydict(
    {"time": pa.array([], pa.int64()), "key": pa.array([], pa.large_binary()), "value": pa.array([], pa.large_binary())}
)


class _ColumnLog(Log):
    """Events in columns. Features are a struct `features`, or all columns that are nothing else. Numbers are numeric fields, text,
    booleans and unsigned 64-bit integers categorical; NaN and infinities, which JSON lacks, are missing.
    """

    path: Path

    def __init__(self, path: Path, invention: Invention) -> None:
        try:
            schema = self._schema(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is no {self.format} file: {error}") from None
        for name, accepted in _EVENT_COLUMNS.items():
            if name not in schema.names or not any(accepts(schema.field(name).type) for accepts in accepted):
                what = f"column {name} is {schema.field(name).type}" if name in schema.names else f"there is no column {name}"
                raise DataError(
                    f"{path} holds no events: {what}; needed are kind and impression_id as text, time as milliseconds or timestamp"
                )
        self.nested = "features" in schema.names
        columns = (
            schema.field("features").type if self.nested else [c for c in schema if c.name not in (*_EVENT_COLUMNS, "true_probability")]
        )
        super().__init__(path, tuple(_column_field(path, column) for column in columns))

    def _schema(self, path: Path) -> pa.Schema:
        raise NotImplementedError

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def _read(self) -> Iterator[EventBatch]:
        return map(_event_batch, in_time_order(self._events()))

    def _events(self) -> Iterator[pa.RecordBatch]:
        first = 1
        try:
            for batch in self._record_batches():
                yield self._encoded(_Rows(np.arange(first, first + len(batch)), pa.Table.from_batches([batch]), self.rejected))
                first += len(batch)
        except (pa.ArrowInvalid, OSError) as error:
            self.rejected.add(first, f"the rest cannot be read: {error}")

    def _encoded(self, rows: _Rows) -> pa.RecordBatch:
        rows = rows.parsed("time", _epoch_ms, "epoch milliseconds, a timestamp or RFC 3339").identified("impression_id")
        in_range = pc.and_(pc.greater_equal(rows.columns["time"], EARLIEST_MS), pc.less(rows.columns["time"], LATEST_MS))
        rows = rows.only(_mask(in_range), "time", "between 1973 and 2100 in milliseconds")
        rows = rows.parsed("kind", _text, "text").parsed("impression_id", _text, "text")
        rows = rows.only(_mask(pc.is_in(rows.columns["kind"], pa.array(["impression", "click"]))), "kind", "impression or click")
        impression, known = rows.equal("kind", "impression"), np.zeros(len(rows.line), bool)
        if "true_probability" in rows.columns.column_names:
            known = _mask(pc.is_finite(rows.columns["true_probability"].cast(pa.float64())))
        encoders = ((impression & known, self._impressions_of_known), (impression & ~known, self._impressions), (~impression, _clicks))
        parts = [(np.flatnonzero(mask), encode(rows.columns.filter(pa.array(mask)))) for mask, encode in encoders if mask.any()]
        if not parts:
            return _NO_EVENTS
        order = pa.array(np.argsort(np.concatenate([at for at, _ in parts])))
        value = pa.concat_arrays([values for _, values in parts]).take(order)
        key = _one_array(rows.columns["impression_id"]).cast(pa.large_binary())
        return pa.RecordBatch.from_pydict({"time": _one_array(rows.columns["time"]), "key": key, "value": value})

    def _impressions_of_known(self, table: pa.Table) -> pa.LargeBinaryArray:
        probability = table["true_probability"].cast(pa.float64()).to_numpy()
        return encode_impressions(_one_array(table["impression_id"]), table["time"].to_numpy(), self._features(table), probability)

    def _impressions(self, table: pa.Table) -> pa.LargeBinaryArray:
        return encode_impressions(_one_array(table["impression_id"]), table["time"].to_numpy(), self._features(table))

    def _features(self, table: pa.Table) -> dict[str, pa.Array]:
        names = [field.name for field in self.fields or ()]
        features = _one_array(table["features"]) if self.nested else None
        return {
            name: _feature(_one_array(table[name]) if features is None else pc.struct_field(features, [i])) for i, name in enumerate(names)
        }


def _clicks(table: pa.Table) -> pa.LargeBinaryArray:
    return encode_clicks(_one_array(table["impression_id"]), table["time"].to_numpy())


def _feature(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        number = column.cast(pa.float64())
        return pc.if_else(pc.is_finite(number), number, None)
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        return column.cast(pa.int64())
    return column if pa.types.is_boolean(column.type) else column.cast(pa.string())


def _column_field(path: Path, column: pa.Field) -> Field:
    if column.type != pa.uint64() and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return Field(column.name, "numeric")
    if _is_text(column.type) or column.type in (pa.uint64(), pa.bool_()):
        return Field(column.name, "categorical")
    raise DataError(f"{path}: column {column.name} is {column.type}; a feature is text, a number or a boolean")


def _is_text(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))


_EVENT_COLUMNS: Mapping[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    "kind": (_is_text,),
    "impression_id": (_is_text, pa.types.is_integer),
    "time": (_is_text, pa.types.is_integer, pa.types.is_timestamp),
}


class ParquetLog(_ColumnLog):
    __doc__ = _ColumnLog.__doc__
    format = "parquet"

    def _schema(self, path: Path) -> pa.Schema:
        with pa.parquet.ParquetFile(path) as file:
            return file.schema_arrow

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        with pa.parquet.ParquetFile(self.path) as file:
            done, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                done += len(batch)
                self.progress = done / rows
                yield batch


class ArrowLog(_ColumnLog):
    """As `ParquetLog`, from an Arrow IPC file or stream."""

    format = "arrow"

    def _schema(self, path: Path) -> pa.Schema:
        with pa.memory_map(str(path)) as file:
            return _stream(file).schema

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.path)) as file:
            reader, size = _stream(file), max(1, file.size())
            for batch in reader:
                self.progress = min(1.0, file.tell() / size)
                for start in range(0, len(batch), _BATCH_ROWS):
                    yield batch.slice(start, _BATCH_ROWS)


def _stream(file: pa.MemoryMappedFile) -> pa.RecordBatchReader:
    """A reader of the batches one after the other. An IPC file is an IPC stream between the magic `ARROW1` and a footer."""
    if file.read(8) != _ARROW_FILE:
        file.seek(0)
    return pa.ipc.open_stream(file)


# -- which format? ------------------------------------------------------------------------------------------------------------------

_ARROW_FILE, _ARROW_STREAM, _PARQUET = b"ARROW1\0\0", b"\xff\xff\xff\xff", b"PAR1"
_HEAD_BYTES = 1 << 16
FORMATS: Mapping[str, type[CriteoLog | AvazuLog | OpenBanditLog | EventLog | ParquetLog | ArrowLog]] = {
    log.format: log for log in (EventLog, ParquetLog, ArrowLog, CriteoLog, AvazuLog, OpenBanditLog)
}


def sniff(path: Path | str) -> str:
    """The name of the format of the log at `path`, told from its first bytes.

    Raises `DataError` when the path is no readable file, when the file is empty, or when its format is none that is known.
    """
    path = Path(path)
    head = _head(path)
    for magic, name in ((_PARQUET, "parquet"), (_ARROW_FILE, "arrow"), (_ARROW_STREAM, "arrow")):
        if head.startswith(magic):
            return name
    for line in head.splitlines():
        told = _format_of_line(line)
        if told:
            return told
    raise DataError(f"{path}: no known log format; name one of {', '.join(FORMATS)}. It begins with {head[:60]!r}")


def _format_of_line(line: bytes) -> str | None:
    cells, tabbed = line.split(b","), line.split(b"\t")
    if line.lstrip().startswith(b"{"):
        return "events"
    if {b"timestamp", b"click", b"propensity_score"} <= set(cells):
        return "obd"
    if {b"id", b"click", b"hour"} <= set(cells) or (len(cells) == len(AVAZU_COLUMNS) and cells[1] in (b"0", b"1") and len(cells[2]) == 8):
        return "avazu"
    if len(tabbed) == 1 + len(CRITEO_INTEGERS) + len(CRITEO_CATEGORIES) and tabbed[0] in (b"0", b"1"):
        return "criteo"
    return None


def _head(path: Path) -> bytes:
    """The first bytes, decompressed where they are compressed."""
    try:
        if not path.is_file():
            raise DataError(f"{path} is a directory, not a log" if path.is_dir() else f"{path} does not exist or is no regular file")
        with pa.OSFile(str(path)) as file, _decompressed(file, path) as text:
            head: bytes = text.read(_HEAD_BYTES).removeprefix(_BYTE_ORDER_MARK)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not head.strip():
        raise DataError(f"{path} is empty")
    return head


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
