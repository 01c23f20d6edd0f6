"""Ingest in a thread of its own, so that events are ready before the trainer asks for them.

Arrow, the compiled loops over buffers and torch release Python's lock, so one thread reads while
another learns.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import Self

from stream_ctr.train.ingest import Ingest, Poll, SourceStatus
from stream_ctr.train.stage_timer import ELSE

_POLL_SECONDS = 0.25


class ReadAhead:
    """Run `ingest` in a thread.

    It is ahead by at most one poll over `most_records` and `most_bytes` of events. The thread
    starts with the first `take`; before that, and after `close`, the source is the caller's.
    """

    def __init__(self, ingest: Ingest, *, most_records: int, most_bytes: int = 64 << 20) -> None:
        self._ingest = ingest
        self.source = ingest.source
        self.timer = ingest.timer
        self._most_records = most_records
        self._most_bytes = most_bytes
        self._ready: deque[Poll] = deque()
        self._records = 0
        self._bytes = 0
        self._last: SourceStatus | None = None  # of the poll taken last
        self._pause: frozenset[int] | None = None  # requested, not passed on yet
        self._failure: BaseException | None = None
        self._finished = False
        self._ended = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)

    def status(self) -> SourceStatus:
        """Return the status of the source now; only before the first `take` or after `close`."""
        return self._ingest.status()

    def take(self, timeout_seconds: float) -> Poll:
        """Return the next poll, or an empty one with the last status if none is ready in time.

        When everything read before is taken, raises what ended the thread, with its traceback.
        """
        if self._last is None:
            self._last = self.status()
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended, timeout_seconds)
            if self._ready:
                return self._hand_out()
            if self._failure:
                raise self._failure
            return Poll(None, self._last)

    def seek(self, positions: Mapping[int, int], leader_epochs: Mapping[int, int]) -> None:
        """Read on at these offsets; only before the first `take`."""
        self._ingest.seek(positions, leader_epochs)

    def pause(self, partitions: frozenset[int]) -> None:
        """Read no events of exactly these partitions from the thread's next poll on.

        Events that were read before are still returned.
        """
        with self._changed:
            self._pause = partitions

    def close(self) -> None:
        """End the thread, which may be in a poll. Events that were not taken are dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_out(self) -> Poll:
        poll = self._ready.popleft()
        if poll.events:
            self._records -= poll.events.records
            self._bytes -= poll.events.nbytes
        self._last = poll.status
        self._changed.notify_all()
        return poll

    # -- in the thread ---------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            with self.timer(ELSE):
                while not self._finished and self._wait_for_room():
                    self._put(self._ingest.take(_POLL_SECONDS))
        except BaseException as error:  # noqa: BLE001 - `take` raises it
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until there is room, and pass on the pauses. Return false if the thread must end."""
        with self.timer("wait.trainer"), self._changed:
            self._changed.wait_for(self._may_go_on)
            pause = self._pause
            self._pause = None
        if pause is not None:
            self._ingest.pause(pause)
        return not self._closing

    def _may_go_on(self) -> bool:
        room = self._records < self._most_records and self._bytes < self._most_bytes
        return self._closing or room

    def _put(self, poll: Poll) -> None:
        with self._changed:
            # Empty polls have no records to bound them: of several in a row only the last counts.
            if self._ready and not self._ready[-1].events and not poll.events:
                self._ready.pop()
            self._ready.append(poll)
            if poll.events:
                self._records += poll.events.records
                self._bytes += poll.events.nbytes
            self._changed.notify_all()
        self._finished = poll.status.finished
