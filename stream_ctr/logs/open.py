"""Open a log on disk as a stream of impressions and clicks in event-time order.

| format             | contents                                     | synthesized            |
|--------------------|----------------------------------------------|------------------------|
| `events`           | JSON lines in the wire format (see `events`) | nothing                |
| `parquet`, `arrow` | columns kind, impression_id, time, features, | nothing                |
|                    | true_probability                             |                        |
| `criteo`           | TSV without header: label, 13 integers,      | times, click times     |
|                    | 26 hexadecimal categories                    |                        |
| `avazu`            | CSV of the 2014 challenge, header optional   | times within the hour, |
|                    |                                              | click times            |
| `obd`              | Open Bandit CSV                              | click times            |

The lines of `events` pass byte for byte. In `parquet` and `arrow`, `features` is a struct, or the
features are all other columns.

Text may be compressed with gzip or Zstandard. Values that a log lacks are synthesized from a seed,
and `Log.notes` says so. Lines that cannot be read are counted and named. Reading fails when no line
can be read.

A log is read in bounded memory. A second pass yields the same bytes, so that a resumed run finds
every event where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.logs.event_logs import MAGIC, ArrowLog, EventLog, ParquetLog
from stream_ctr.logs.files import find_files
from stream_ctr.logs.labelled_logs import (
    AVAZU_COLUMNS,
    CRITEO_COLUMNS,
    AvazuLog,
    CriteoLog,
    OpenBanditLog,
    SyntheticTimes,
)
from stream_ctr.logs.layout import PLAIN, Layout
from stream_ctr.logs.log import DEFAULT_START_MS, Log
from stream_ctr.logs.text_log import head
from stream_ctr.messages import nearest

__all__ = ["FORMATS", "open_log", "open_logs", "sniff"]

_EVENT_LOGS: Mapping[str, type[EventLog | ParquetLog | ArrowLog]] = {
    log.format: log for log in (EventLog, ParquetLog, ArrowLog)
}
_LABELLED_LOGS: Mapping[str, type[CriteoLog | AvazuLog | OpenBanditLog]] = {
    log.format: log for log in (CriteoLog, AvazuLog, OpenBanditLog)
}
FORMATS = (*_EVENT_LOGS, *_LABELLED_LOGS)
_LABELS = (b"0", b"1")
_HOUR_CHARACTERS = len("YYMMDDHH")


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
    impressions, and those of `clicks` their clicks, as many files of each. See `open_log` for the
    other arguments. In logs without times, the times of each begin where those of the one before
    it end.

    Raises `DataError` when a source names no file or a log cannot be read, and `ConfigError` when
    an argument is wrong.
    """
    if clicks:
        raise ConfigError("--clicks is not there yet")
    return [
        open_log(
            file.path,
            format=format,
            layout=layout,
            seed=seed,
            click_delay_seconds=click_delay_seconds,
            rate=rate,
            start_ms=start_ms,
            span=span,
        )
        for file in find_files(sources)
    ]


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
    path = Path(path)
    format = format or sniff(path)
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(
            f"unknown log format {format!r}{nearest(format, FORMATS)}; known are {known}"
        )
    head(path)
    if span is not None and span < timedelta(seconds=1):
        raise ConfigError(f"a span must be at least 1s, got {span.total_seconds():g}s")
    if not (rate > 0 and click_delay_seconds > 0 and seed >= 0):
        raise ConfigError(
            "rate and click delay must be positive, a seed at least 0, "
            f"got {rate:g} a second, {click_delay_seconds:g} s and {seed}"
        )
    if format in _EVENT_LOGS:
        return _EVENT_LOGS[format](path)
    times = SyntheticTimes(seed, click_delay_seconds, rate, start_ms, span)
    return _LABELLED_LOGS[format](path, times)


def sniff(path: Path | str) -> str:
    """Return the name of the format of the log at `path`, detected from its first bytes.

    Raises `DataError` when the file cannot be read, is empty, or has no known format.
    """
    first = head(Path(path))
    for magic, name in MAGIC.items():
        if first.startswith(magic):
            return name
    binary = b"\0" in first
    for line in () if binary else first.splitlines():
        if found := _format_of_line(line):
            return found
    raise DataError(
        f"{path} has no known log format; name one of {', '.join(FORMATS)}. "
        f"It begins with {first[:60]!r}"
    )


def _format_of_line(line: bytes) -> str | None:
    """Return the format that this line belongs to, or None.

    >>> _format_of_line(b'{"kind": "click"}'), _format_of_line(b"id,click,hour")
    ('events', 'avazu')
    """
    if line.lstrip().startswith(b"{"):
        return "events"
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
