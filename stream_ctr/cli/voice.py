"""What commands say on standard error: lines of text, or with `--log-format json` JSON objects.

An object has `time`, `level` (debug, info, warning, error), `kind` and `message`. The kinds are
`log`, with the name of its `logger`, `note`, `report`, with the figures of a report, and `error`,
which ends a command. Everything is escaped, so that no input steers a terminal or adds a line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from stream_ctr.messages import printable

Format = Literal["text", "json"]
Kind = Literal["log", "note", "report", "error"]

_LONGEST_MESSAGE_LINE = 4000
# Libraries report what they go through at every level: each lost connection is an error to them.
# An error that ends a command is reported by the command.
_LIBRARIES = ("kafka", "numba", "apscheduler", "urllib3", "asyncio", "confluent_kafka")
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_FORMAT: dict[str, Format] = {"now": "text"}


def say(text: str) -> None:
    """Write lines to standard error; standard output is for results.

    What "warning:" or "error:" opens has that level in JSON.
    """
    opening = text.partition(":")[0]
    level = opening if opening in ("warning", "error") else "info"
    kind: Kind = "error" if level == "error" else "note"
    if _as_json():
        said = opening in ("note", "warning", "error")
        _write(_object(kind, level, text.removeprefix(f"{opening}: ") if said else text))
    else:
        _write(safe_lines(text))


def say_report(text: str, figures: Mapping[str, object]) -> None:
    """Write the line of a report: its words, or in JSON its figures too."""
    _write(_object("report", "info", text, figures) if _as_json() else safe_lines(text))


def say_error(text: str) -> None:
    """Write the message of the error that ends a command."""
    say(f"error: {text}")


def safe_lines(text: object) -> str:
    """Return the lines of a message, which may quote input, so that none steers a terminal."""
    return "\n".join(printable(line, _LONGEST_MESSAGE_LINE) for line in str(text).split("\n"))


def speaks_json() -> bool:
    """Return whether standard error gets JSON objects."""
    return _as_json()


@contextmanager
def speaking(format: Format, *, verbose: int = 0) -> Iterator[None]:
    """Write log messages to standard error in this format, as long as the block runs.

    `verbose` is the number of -v: 0 warnings, 1 progress, 2 everything, and what libraries say.
    """
    handler = _Handler()
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    if verbose < 2:
        handler.addFilter(_is_ours)
    root = logging.getLogger()
    level = _LEVELS[min(verbose, 2)]
    # At DEBUG numba prints the bytecode of every function that it compiles.
    logging.getLogger("numba").setLevel(logging.INFO)
    before = root.level, _FORMAT["now"]
    handler.setLevel(level)
    root.addHandler(handler)
    root.setLevel(min(root.level, level))
    _FORMAT["now"] = format
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        _FORMAT["now"] = before[1]


def _as_json() -> bool:
    return _FORMAT["now"] == "json"


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] not in _LIBRARIES


def _write(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _object(
    kind: Kind, level: str, message: str, others: Mapping[str, object] | None = None
) -> str:
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
    named = {"time": now.replace("+00:00", "Z"), "level": level, "kind": kind, "message": message}
    return json.dumps({**named, **(others or {})}, allow_nan=False)


class _Handler(logging.Handler):
    """Writes to what standard error is now."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _write(self.format(record))
        except Exception:  # noqa: BLE001 - logging never ends what it describes
            self.handleError(record)


class _TextFormatter(logging.Formatter):
    """Write each log message on one line, whatever input it quotes."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message, _LONGEST_MESSAGE_LINE)
        return super().formatMessage(record)


class _JsonFormatter(logging.Formatter):
    """Write each log message as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        others: dict[str, object] = {"logger": record.name}
        if record.exc_info:
            others["traceback"] = self.formatException(record.exc_info)
        return _object("log", record.levelname.lower(), record.getMessage(), others)
