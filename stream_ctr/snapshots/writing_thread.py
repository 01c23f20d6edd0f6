"""A thread that writes one thing at a time, so that learning goes on while it reaches the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from stream_ctr.errors import StreamCtrError

_log = logging.getLogger(__name__)
T = TypeVar("T")


class WritingThread(Generic[T]):
    """Write one thing at a time; `T` is what is known of it when it is on disk.

    `things` is the name of what is written, for messages and for the thread.
    """

    def __init__(self, things: str) -> None:
        self._things = things
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=things)
        self._writing: Future[T] | None = None

    @property
    def busy(self) -> bool:
        """True after something was begun, until `take` has returned it."""
        return self._writing is not None

    def take(self, *, wait: bool) -> T | None:
        """Return what was begun if it is on disk, or None.

        Raises `SnapshotError` if it could not be written, and any other error of the work.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        done = self._writing
        self._writing = None
        return done.result()

    def after(self, work: Callable[[], object]) -> None:
        """Run `work`, which removes old ones, after what was begun. Its errors are logged."""
        self._thread.submit(self._attempt, work)

    def close(self) -> None:
        """Finish everything that was begun."""
        self._thread.shutdown()

    def _begin(self, write: Callable[[], T]) -> Future[T]:
        """Begin to write. What was begun before must have been taken."""
        assert self._writing is None
        self._writing = self._thread.submit(write)
        return self._writing

    def _attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except StreamCtrError as error:  # the next time tries again
            _log.error("old %ss are not removed: %s", self._things, error)
