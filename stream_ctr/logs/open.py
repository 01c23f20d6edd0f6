"""Open logs on disk as streams of events in event-time order.

| format             | contents                                     | synthesized            |
|--------------------|----------------------------------------------|------------------------|
| `events`           | JSON lines, or an array, in the wire format  | nothing                |
|                    | (see `events`)                               |                        |
| `csv`, `tsv`       | columns by name, quoted, header optional     | times, ids             |
| `json`             | JSON lines, or an array, of any objects      | times, ids             |
| `parquet`, `arrow` | columns by name                              | times, ids             |
| `criteo`           | TSV without header: label, 13 integers,      | times, click times     |
|                    | 26 hexadecimal categories                    |                        |
| `avazu`            | CSV of the 2014 challenge, header optional   | times within the hour, |
|                    |                                              | click times            |
| `obd`              | Open Bandit CSV                              | click times            |

The lines of `events` pass byte for byte. `layout.ColumnNames` says what the columns of the other
formats mean: rows are events, impressions with click times, or labelled rows.

Files may be compressed with gzip, Zstandard, bzip2, LZ4 or xz. Values that a log lacks are
synthesized, from a seed if they are random, and `Log.notes` says so. Rows that cannot be read are
counted and named. Reading fails when no row can be read.

A log is read in bounded memory. A second pass yields the same bytes, so that a resumed run finds
every event where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.logs.column_log import ColumnLog
from stream_ctr.logs.csv_table import UTF_16, CsvTable
from stream_ctr.logs.event_logs import EventLog
from stream_ctr.logs.files import LogFile, find_files
from stream_ctr.logs.json_table import JsonTable, first_objects
from stream_ctr.logs.labelled_logs import (
    AVAZU_COLUMNS,
    CRITEO_COLUMNS,
    AvazuLog,
    CriteoLog,
    OpenBanditLog,
    SyntheticTimes,
)
from stream_ctr.logs.layout import PLAIN, ColumnNames, Layout
from stream_ctr.logs.log import DEFAULT_START_MS, Log
from stream_ctr.logs.pair_log import PairLog
from stream_ctr.logs.tables import MAGIC, ArrowTable, ParquetTable, Table
from stream_ctr.logs.text_log import head
from stream_ctr.messages import nearest

__all__ = ["FORMATS", "open_log", "open_logs", "open_table", "sniff"]

_LABELLED_LOGS: Mapping[str, type[CriteoLog | AvazuLog | OpenBanditLog]] = {
    log.format: log for log in (CriteoLog, AvazuLog, OpenBanditLog)
}
TABLES = ("csv", "tsv", "json", "parquet", "arrow")
FORMATS = (EventLog.format, *TABLES, *_LABELLED_LOGS)
_EVENT_MEMBERS = {"kind", "impression_id", "time"}
_CLOUD_EVENT_MEMBERS = {"specversion", "data"}
_LABELS = (b"0", b"1")
_HOUR_CHARACTERS = len("YYMMDDHH")
_MS = timedelta(milliseconds=1)


def open_logs(
    sources: Sequence[Path | str],
    *,
    clicks: Sequence[Path | str] = (),
    format: str | None = None,
    layout: Layout = PLAIN,
    seed: int = 0,
    click_delay_seconds: float = 30.0,
    rate: float = 100.0,
    start_ms: int = DEFAULT_START_MS,
    span: timedelta | None = None,
) -> list[Log]:
    """Return the logs that `sources` name, one for each file, in order.

    `files.find_files` says what a source is. With `clicks`, the files of `sources` hold
    impressions, and those of `clicks` their clicks, as many files of each. In logs without times,
    the times of each file begin a span after those of the one before it. See `open_log` for the
    other arguments.

    Raises `DataError` when a source names no file or a log cannot be read, and `ConfigError` when
    an argument is wrong.
    """
    files = find_files(sources)
    times = _synthetic_times(seed, click_delay_seconds, rate, start_ms, span)
    if clicks:
        return _open_pairs(files, find_files(clicks), format, layout, times)
    logs = []
    for file in files:
        logs.append(_open(file, format, layout, times))
        times = replace(times, start_ms=times.start_ms + (span or timedelta(0)) // _MS)
    _require_distinct(logs)
    return logs


def _require_distinct(logs: Sequence[Log]) -> None:
    """Raise `DataError` when two logs have the same identity, which positions are kept under."""
    if len(logs) < 2:
        return
    seen: dict[str, Log] = {}
    for log in logs:
        other = seen.setdefault(log.identity, log)
        if other is not log:
            raise DataError(
                f"{log.name} has the name and the first rows of {other.name}: are they the same? "
                "If not, rename one"
            )


def open_log(
    path: Path | str,
    *,
    format: str | None = None,
    layout: Layout = PLAIN,
    seed: int = 0,
    click_delay_seconds: float = 30.0,
    rate: float = 100.0,
    start_ms: int = DEFAULT_START_MS,
    span: timedelta | None = None,
) -> Log:
    """Return the log at `path`. Without a `format`, it is detected with `sniff`.

    Where the log lacks times, impressions are spaced evenly at `rate` a second of event time from
    `start_ms` (epoch milliseconds) on, or over all of `span`. Click delays are log-normal with
    median `click_delay_seconds`, drawn from `seed`.

    Raises `DataError` when the log cannot be read, and `ConfigError` when an argument is wrong.
    """
    times = _synthetic_times(seed, click_delay_seconds, rate, start_ms, span)
    return _open(LogFile(Path(path), str(path)), format, layout, times)


def _synthetic_times(
    seed: int, click_delay_seconds: float, rate: float, start_ms: int, span: timedelta | None
) -> SyntheticTimes:
    if span is not None and span < timedelta(seconds=1):
        raise ConfigError(f"a span must be at least 1s, got {span.total_seconds():g}s")
    if not (rate > 0 and click_delay_seconds > 0 and seed >= 0):
        raise ConfigError(
            "rate and click delay must be positive, a seed at least 0, "
            f"got {rate:g} a second, {click_delay_seconds:g} s and {seed}"
        )
    return SyntheticTimes(seed, click_delay_seconds, rate, start_ms, span)


def _open(file: LogFile, format: str | None, layout: Layout, times: SyntheticTimes) -> Log:
    format = _known_format(file.path, format, layout)
    if format == EventLog.format:
        return EventLog(file.path, layout.times)
    if format in _LABELLED_LOGS:
        return _LABELLED_LOGS[format](file.path, times)
    return ColumnLog(_table(file, format, layout), layout, times)


def _open_pairs(
    files: Sequence[LogFile],
    click_files: Sequence[LogFile],
    format: str | None,
    layout: Layout,
    times: SyntheticTimes,
) -> list[Log]:
    if len(files) != len(click_files):
        raise ConfigError(
            f"--clicks needs a file of clicks for each file of impressions, got {len(files)} of "
            f"impressions and {len(click_files)} of clicks"
        )
    logs: list[Log] = []
    for shown, clicked in zip(files, click_files, strict=True):
        first, second = (
            _table(file, _known_format(file.path, format, layout, tables_only=True), layout)
            for file in (shown, clicked)
        )
        logs.append(PairLog(first, second, layout, times))
    return logs


def open_table(
    path: Path | str, *, format: str | None = None, layout: Layout = PLAIN, name: str = ""
) -> Table:
    """Return the file at `path` as a table of columns by name.

    Raises `DataError` when it cannot be read.
    """
    path = Path(path)
    format = _known_format(path, format, layout, tables_only=True)
    return _table(LogFile(path, name or str(path)), format, layout)


def _table(file: LogFile, format: str, layout: Layout) -> Table:
    if format == "parquet":
        return ParquetTable(file.path, name=file.name)
    if format == "arrow":
        return ArrowTable(file.path, name=file.name)
    if format == "json":
        return JsonTable(file.path, name=file.name)
    return CsvTable(
        file.path,
        name=file.name,
        delimiter=layout.delimiter or ("\t" if format == "tsv" else ""),
        column_names=layout.column_names,
    )


def _known_format(
    path: Path, format: str | None, layout: Layout, *, tables_only: bool = False
) -> str:
    head(path)
    format = format or _sniff(path, layout, tables_only=tables_only)
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(
            f"unknown log format {format!r}{nearest(format, FORMATS)}; known are {known}"
        )
    if tables_only and format not in TABLES:
        raise ConfigError(f"the format {format} has no columns by name; {', '.join(TABLES)} have")
    return format


def sniff(path: Path | str, layout: Layout = PLAIN) -> str:
    """Return the name of the format of the log at `path`, detected from its first bytes.

    A layout that names columns rules out the formats whose columns are fixed.

    Raises `DataError` when the file cannot be read, is empty, or has no known format.
    """
    return _sniff(Path(path), layout, tables_only=False)


def _sniff(path: Path, layout: Layout, *, tables_only: bool) -> str:
    first = head(path)
    for magic, name in MAGIC.items():
        if first.startswith(magic):
            return name
    if first.lstrip().startswith((b"{", b"[")):
        objects = first_objects(path)
        is_events = not tables_only and _are_events(objects, layout)
        return EventLog.format if is_events else "json"
    binary = b"\0" in first and not first.startswith(UTF_16)
    if not (binary or tables_only or layout.columns or layout.column_names):
        for line in first.splitlines():
            if found := _format_of_line(line):
                return found
    if binary or not _is_header(first.partition(b"\n")[0]):
        raise DataError(
            f"{path} has no known log format; name one of {', '.join(FORMATS)}. "
            f"It begins with {first[:60]!r}"
        )
    return "csv"


def _is_header(line: bytes) -> bool:
    """Return whether the first line of a file may be that of a CSV file.

    >>> _is_header(b"id,label"), _is_header(b"\\x7fELF\\x02\\x01")
    (True, False)
    """
    if line.startswith(UTF_16):  # the reader of CSV files says what to do
        return True
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r" for character in text)


def _are_events(objects: Sequence[Mapping[str, object]], layout: Layout) -> bool:
    """Return whether JSON objects are events of the wire format.

    They are if one has the members of an event or is a CloudEvent, unless other columns are named,
    or if none can be read: then each line is a dead letter. Events can be scored whatever columns
    are named.
    """
    named = ColumnNames() if layout.only_scored else layout.columns
    names = (named.kind or "kind", named.id or "impression_id", named.time or "time")
    if set(names) != _EVENT_MEMBERS or named.label or named.click_time:
        return False
    return not objects or any(
        found.keys() >= _EVENT_MEMBERS or found.keys() >= _CLOUD_EVENT_MEMBERS for found in objects
    )


def _format_of_line(line: bytes) -> str | None:
    """Return the format that this line belongs to, or None.

    >>> _format_of_line(b"id,click,hour")
    'avazu'
    """
    cells = line.split(b",")
    if {b"timestamp", b"click", b"propensity_score"} <= set(cells):
        return "obd"
    if {b"id", b"click", b"hour"} <= set(cells) or _is_avazu_row(cells):
        return "avazu"
    cells = line.split(b"\t")
    if len(cells) == len(CRITEO_COLUMNS) and cells[0] in _LABELS:
        return "criteo"
    return None


def _is_avazu_row(cells: list[bytes]) -> bool:
    return (
        len(cells) == len(AVAZU_COLUMNS)
        and cells[1] in _LABELS
        and len(cells[2]) == _HOUR_CHARACTERS
    )
