"""What a run waits for that has learned no example, in words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

_MOST_NAMED = 3
_MINUTE = 60
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR


class WaitsFor(Protocol):
    """A `train.report.Waiting`, whose module loads all that a run needs."""

    @property
    def until(self) -> str | None:
        """The event time where the first label window closes."""

    @property
    def reached(self) -> str | None:
        """The event time that all partitions have reached."""

    @property
    def held_by(self) -> Sequence[str]:
        """The partitions without an event yet."""

    @property
    def ready(self) -> int:
        """The number of examples that wait for a full batch."""

    @property
    def labelled(self) -> int:
        """The number of the pending that came with their label."""


def waiting_words(waiting: WaitsFor, pending: int, speed: float | None = None) -> str:
    """Return what a run without an example waits for; `speed` is in seconds of event time a second.

    >>> from stream_ctr.train.report import Waiting
    >>> waiting = Waiting(until="2025-01-01T10:10:30.000Z", reached="2025-01-01T10:08:30.000Z",
    ...                   held_by=[], ready=0)
    >>> waiting_words(waiting, 1200, speed=2.0)
    'no example yet: 1,200 impressions wait for their clicks; the first are learned when event \
time is 2025-01-01T10:10:30Z; it is 2025-01-01T10:08:30Z, 2m to go, at 2.0 s a second in about 1m'
    """
    if waiting.ready:
        return f"no example yet: {waiting.ready:,} wait for a full batch (learn.batch_size)"
    if waiting.until is None:
        return "no example yet: waiting for the first impression"
    words = (
        f"no example yet: {_pending_words(pending - waiting.labelled, waiting.labelled)}; "
        f"the first are learned when event time is {without_milliseconds(waiting.until)}"
    )
    if waiting.held_by:
        named = ", ".join(waiting.held_by[:_MOST_NAMED])
        others = len(waiting.held_by) - _MOST_NAMED
        named += f" and {others} others" if others > 0 else ""
        return (
            f"{words} in every partition; {named} brought no event yet, and no longer "
            "counts after join.idle_timeout without one"
        )
    if waiting.reached is None:
        return words
    remaining = (moment(waiting.until) - moment(waiting.reached)).total_seconds()
    words += f"; it is {without_milliseconds(waiting.reached)}, {_length(remaining)} to go"
    if speed is None:
        return words
    if speed <= 0:
        return f"{words}, and it stands still"
    return f"{words}, at {speed:,.1f} s a second in about {_length(remaining / speed)}"


def _pending_words(impressions: int, labelled: int) -> str:
    """Return what is pending in words.

    >>> print(_pending_words(1200, 0), _pending_words(2, 30), _pending_words(0, 30), sep="\\n")
    1,200 impressions wait for their clicks
    2 impressions wait for their clicks, 30 labelled examples for those before them
    30 labelled examples wait for those before them
    """
    examples = f"{labelled:,} labelled examples"
    if not impressions and labelled:
        return f"{examples} wait for those before them"
    words = f"{impressions:,} impressions wait for their clicks"
    return f"{words}, {examples} for those before them" if labelled else words


def moment(text: str) -> datetime:
    """Return a moment of a report."""
    return datetime.fromisoformat(text)


def without_milliseconds(text: str) -> str:
    """Return a moment without its milliseconds."""
    return text.partition(".")[0] + "Z"


def _length(seconds: float) -> str:
    """Return a length of time in its two largest units.

    >>> _length(75.2), _length(3720), _length(0.2)
    ('1m15s', '1h2m', '1s')
    """
    whole = max(1, round(seconds))
    units = (("d", _DAY), ("h", _HOUR), ("m", _MINUTE), ("s", 1))
    for place, (name, size) in enumerate(units):
        if whole >= size:
            text = f"{whole // size}{name}"
            if place + 1 < len(units) and (rest := whole % size // units[place + 1][1]):
                text += f"{rest}{units[place + 1][0]}"
            return text
    return "0s"
