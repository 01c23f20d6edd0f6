"""Alignment: partitions that are far ahead of the others wait for them.

Impressions of a partition that is ahead only fill memory, because their windows close when the
watermark, which the other partitions hold back, has passed.
"""

from __future__ import annotations

from stream_ctr.join.joiner import Joiner
from stream_ctr.join.watermark import Watermarks
from stream_ctr.train.ingest import Reading, SourceStatus

# Pausing and resuming cost fetches, which is not worth it where one poll is longer than a window.
# So partitions are paused only once the waiting impressions have filled this share of their room.
_PAUSE_WHEN_FILLED = 1 / 8


class Alignment:
    """Pause and resume the partitions of `ingest`."""

    def __init__(self, ingest: Reading) -> None:
        self._ingest = ingest
        self._paused: frozenset[int] = frozenset()

    def update(self, joiner: Joiner, watermarks: Watermarks, status: SourceStatus) -> None:
        """Pause exactly the partitions that are too far ahead now."""
        ahead: frozenset[int] = frozenset()
        if joiner.filled >= _PAUSE_WHEN_FILLED:
            ahead = watermarks.ahead(joiner.watermark, joiner.label_window_ms)
        behind = [index for index in status.present if index not in ahead]
        if self._ingest.source.until_end:
            behind = [index for index in behind if not status.caught_up[index]]
        if not behind:
            ahead = frozenset()  # the partitions that they wait for have ended
        if ahead != self._paused:
            self._ingest.pause(ahead)
            self._paused = ahead
