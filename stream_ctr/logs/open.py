"""History on disk: a log becomes impressions and clicks in event-time order.

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

from collections.abc import Mapping
from pathlib import Path

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.logs.event_logs import MAGIC, ArrowLog, EventLog, ParquetLog
from stream_ctr.logs.labelled_logs import (
    AVAZU_COLUMNS,
    CRITEO_COLUMNS,
    AvazuLog,
    CriteoLog,
    Invention,
    OpenBanditLog,
)
from stream_ctr.logs.log import DEFAULT_START_MS, Log
from stream_ctr.logs.text_log import head
from stream_ctr.messages import nearest

__all__ = ["FORMATS", "open_log", "sniff"]

_EVENT_LOGS: Mapping[str, type[EventLog | ParquetLog | ArrowLog]] = {
    log.format: log for log in (EventLog, ParquetLog, ArrowLog)
}
_LABELLED_LOGS: Mapping[str, type[CriteoLog | AvazuLog | OpenBanditLog]] = {
    log.format: log for log in (CriteoLog, AvazuLog, OpenBanditLog)
}
FORMATS = (*_EVENT_LOGS, *_LABELLED_LOGS)


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
    format = format or sniff(path)
    if format not in FORMATS:
        raise ConfigError(
            f"unknown log format {format!r}{nearest(format, FORMATS)}; known are {', '.join(FORMATS)}"
        )
    head(path)
    if not (rate > 0 and click_delay_seconds > 0 and seed >= 0):
        raise ConfigError(
            f"rate and click delay must be positive, a seed at least 0, got {rate:g} a second, {click_delay_seconds:g} s and {seed}"
        )
    if format in _EVENT_LOGS:
        return _EVENT_LOGS[format](path)
    return _LABELLED_LOGS[format](path, Invention(seed, click_delay_seconds, rate, start_ms))


def sniff(path: Path | str) -> str:
    """The name of the format of the log at `path`, told from its first bytes.

    Raises `DataError` when the path is no readable file, when the file is empty, or when its format is none that is known.
    """
    first = head(Path(path))
    for magic, name in MAGIC.items():
        if first.startswith(magic):
            return name
    for line in first.splitlines() if b"\0" not in first else ():
        told = _format_of_line(line)
        if told:
            return told
    raise DataError(
        f"{path}: no known log format; name one of {', '.join(FORMATS)}. It begins with {first[:60]!r}"
    )


def _format_of_line(line: bytes) -> str | None:
    cells, tabbed = line.split(b","), line.split(b"\t")
    if line.lstrip().startswith(b"{"):
        return "events"
    if {b"timestamp", b"click", b"propensity_score"} <= set(cells):
        return "obd"
    if {b"id", b"click", b"hour"} <= set(cells) or (
        len(cells) == len(AVAZU_COLUMNS) and cells[1] in (b"0", b"1") and len(cells[2]) == 8
    ):
        return "avazu"
    if len(tabbed) == len(CRITEO_COLUMNS) and tabbed[0] in (b"0", b"1"):
        return "criteo"
    return None
