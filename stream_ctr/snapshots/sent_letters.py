"""The positions whose dead letters are kept already: a record has one, however often it is read.

A run that resumes reads the records after its snapshot again, and one that its data policy stops
does so at each start. The letters in `dead_letters.jsonl` hold their positions. Those that a broker
has taken are listed in `dead_letters.sent`, a line each, once the broker has acknowledged them. At
each snapshot this file becomes `dead_letters.sent.1`, and that one `dead_letters.sent.2`: enough
for a run that resumes from the newest snapshot or from the one before it.

Letters that were on their way when the process was killed are sent again. Their key is their
position too.
"""

from __future__ import annotations

import contextlib
import logging
import os
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from stream_ctr import state_files

_log = logging.getLogger(__name__)
_NAMES = ("dead_letters.sent", "dead_letters.sent.1", "dead_letters.sent.2")
# A place is an offset of 43 bits and, in 21 bits, 0 for the record or 1 + the index of the event.
_EVENT_BITS = 21
_Number = Annotated[str, Meta(pattern="^[0-9]{1,13}$")]


class Position(NamedTuple):
    """A record, or one event of it, of a partition."""

    topic: str
    partition: int
    offset: int
    event: int | None

    @property
    def place(self) -> int:
        """The record and the event, as a number of 64 bits."""
        return self.offset << _EVENT_BITS | (0 if self.event is None else self.event + 1)


class _Line(Struct):
    """The part of a line of either file that says which record it is about."""

    topic: str
    partition: _Number
    offset: _Number
    event: _Number | None = None


class SentLetters:
    """The positions whose dead letters were kept before this process began.

    They are read at the first question: a run without malformed records opens no file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places: dict[tuple[str, int], npt.NDArray[np.uint64]] | None = None
        self._unwritten = False

    def __contains__(self, position: Position) -> bool:
        if self._places is None:
            self._places = _read(self._directory / name for name in (*_NAMES, "dead_letters.jsonl"))
        places = self._places.get((position.topic, position.partition))
        if places is None:
            return False
        at = int(np.searchsorted(places, np.uint64(position.place)))
        return at < len(places) and int(places[at]) == position.place

    def add(self, letters: Iterable[dict[str, str]]) -> None:
        """List letters that the broker has. A full disk is logged: they may then be sent twice."""
        named = (
            {name: fields[name] for name in _Line.__struct_fields__ if name in fields}
            for fields in letters
        )
        lines = b"".join(msgspec.json.encode(fields) + b"\n" for fields in named)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with open(state_files.open_file(self._directory / _NAMES[0], flags), "ab") as file:
                file.write(lines)
        except OSError as error:
            if not self._unwritten:
                _log.warning(
                    "dead letters may be sent twice after a restart: cannot write %s: %s",
                    self._directory / _NAMES[0],
                    error.strerror,
                )
            self._unwritten = True

    def begin_file(self) -> None:
        """Begin another file, because a snapshot is on disk; the oldest one goes."""
        with contextlib.suppress(OSError):  # then the files hold more than is needed
            for older, newer in zip(reversed(_NAMES), reversed(_NAMES[:-1]), strict=False):
                if (self._directory / newer).exists():
                    (self._directory / newer).replace(self._directory / older)
                else:
                    (self._directory / older).unlink(missing_ok=True)


def _read(paths: Iterable[Path]) -> dict[tuple[str, int], npt.NDArray[np.uint64]]:
    """Return the places in these files by partition, each sorted."""
    found: defaultdict[tuple[str, int], array[int]] = defaultdict(lambda: array("Q"))
    for path in paths:
        for topic, partition, offset, event in _positions(path):
            place = Position(topic, partition, offset, event).place
            if place < 1 << 64:
                found[topic, partition].append(place)
    return {name: np.unique(np.frombuffer(places, np.uint64)) for name, places in found.items()}


def _positions(path: Path) -> Iterator[Position]:
    """Yield the positions in a file, and pass over lines that are none, such as half a line."""
    decoder = msgspec.json.Decoder(_Line)
    try:
        with open(state_files.open_file(path, os.O_RDONLY), "rb") as file:
            for text in file:
                with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                    line = decoder.decode(text)
                    event = None if line.event is None else int(line.event)
                    yield Position(line.topic, int(line.partition), int(line.offset), event)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("dead letters may be kept twice: cannot read %s: %s", path, error.strerror)
