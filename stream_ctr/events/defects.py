"""Tell a defect of a decoder from a fault of the machine: nothing that a producer sends ends a run.

Decoders raise `InvalidRecord` for what they do not accept. Any other error is a defect, of ours or
of a library, that certain bytes reach. It costs those bytes their place among the events, and
nothing else. Two errors are none: memory that runs out, and a source of schemas that fails.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stream_ctr.events.parsed_events import InvalidRecord
from stream_ctr.messages import one_line

_PACKAGE = Path(__file__).parent.parent


class SchemasUnavailable(Exception):
    """Raised when the source of the schemas raised `error`: nothing is known about the record."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def defects_as_invalid() -> Iterator[None]:
    """Raise a defect as `InvalidRecord`, and the error of a source of schemas as it is.

    The message names the class of the error, and where in this package it came up.

    >>> with defects_as_invalid():
    ...     raise ValueError("buffer size")
    Traceback (most recent call last):
    stream_ctr.events.parsed_events.InvalidRecord: the decoder raised ValueError: buffer size
    """
    try:
        yield
    except (InvalidRecord, MemoryError):
        raise
    except SchemasUnavailable as unavailable:
        raise unavailable.error from None
    except Exception as error:
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> InvalidRecord:
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents]
    places = [frame for frame in places if Path(frame.filename) != Path(__file__)]
    where = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    message = f"the decoder raised {type(error).__name__}{where}: {one_line(error)}"
    return InvalidRecord("undecodable", message)
