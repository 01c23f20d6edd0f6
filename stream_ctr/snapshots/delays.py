"""The age of a state of the model when a server has loaded it.

    newest event -> its label window closes -> learned -> copied -> published -> loaded
    |------------------------------- event_seconds --------------------------------|
                    |------------------------ closed_seconds ----------------------|
                                               |-------- learned_seconds ----------|
                                                         |---- copied_seconds -----|

The times before the last arrow are those of the trainer's clock. Where the clocks of two machines
differ, so do the seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Self

from msgspec import Struct

from stream_ctr.snapshots.delta import DeltaHeader
from stream_ctr.snapshots.pointer import Pointer

_MILLISECONDS = 1000
BOUNDS = (
    *(0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
"""The upper bounds of a histogram of delays, in seconds."""


class Delays(Struct, frozen=True, kw_only=True):
    """Seconds until a state was loaded, None where the start is unknown.

    `event_seconds` count from the newest event, `closed_seconds` from the closing of the label
    windows of the new examples, on average, `learned_seconds` from the last of these examples, and
    `copied_seconds` from the copy of the weights. A delta without new examples has the last only,
    and a snapshot does not say when windows closed.
    """

    event_seconds: float | None
    closed_seconds: float | None
    learned_seconds: float | None
    copied_seconds: float

    @classmethod
    def of_delta(cls, header: DeltaHeader, now_ms: float) -> Self:
        """Return the delays of a delta that was loaded at `now_ms`."""
        examples = sum(closed.examples for closed in header.closed)
        waited_ms = sum(closed.examples * (now_ms - closed.at_ms) for closed in header.closed)
        return cls(
            event_seconds=_seconds(header.newest_event_ms, now_ms) if examples else None,
            closed_seconds=round(waited_ms / examples / _MILLISECONDS, 3) if examples else None,
            learned_seconds=_seconds(header.learned_ms, now_ms) if examples else None,
            copied_seconds=_seconds(header.created_ms, now_ms),
        )

    @classmethod
    def of_snapshot(cls, pointer: Pointer, now_ms: float) -> Self:
        """Return the delays of a snapshot that was loaded at `now_ms`."""
        return cls(
            event_seconds=_seconds(pointer.event_time_ms, now_ms),
            closed_seconds=None,
            learned_seconds=None,
            copied_seconds=_seconds(pointer.created_ms, now_ms),
        )


class DelayHistogram:
    """Counts of delays, by `BOUNDS`.

    >>> histogram = DelayHistogram()
    >>> histogram.observe(0.7, 3)
    >>> histogram.observe(9000.0)
    >>> [(bound, count) for bound, count in histogram.cumulative() if bound in ("1.0", "+Inf")]
    [('1.0', 3), ('+Inf', 4)]
    """

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self.total_seconds = 0.0
        """The sum of all delays."""

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count a delay of so many examples or deltas. One below 0 is that of a clock, and is 0."""
        seconds = max(seconds, 0.0)
        self._counts[bisect_left(BOUNDS, seconds)] += count
        self.total_seconds += seconds * count

    def cumulative(self) -> list[tuple[str, int]]:
        """Return each bound as text, and the number of delays up to it."""
        total = 0
        pairs = []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self._counts, strict=True):
            total += count
            pairs.append((bound, total))
        return pairs


def _seconds(since_ms: float, now_ms: float) -> float:
    return round((now_ms - since_ms) / _MILLISECONDS, 3)
