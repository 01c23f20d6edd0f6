"""The schedule: APScheduler raises flags, and the trainer's loop serves them between two batches.

APScheduler 3.11 keeps a calendar of jobs in a thread of its own, runs late jobs that a busy or
stopped process missed, and folds several missed runs into one, which is what reports and snapshots
need. Version 4 is not used: it is a pre-release whose own README advises against production. One
default of 3.11 must go: a job more than a second late (`misfire_grace_time`) is skipped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, timedelta
from threading import Event
from time import monotonic, time
from types import TracebackType
from typing import Self

from apscheduler.schedulers.background import BackgroundScheduler

from stream_ctr.errors import ConfigError

_CLOCK_SLACK_SECONDS = 1.0  # a smaller change of the wall clock is drift, not a correction


class Schedule:
    """Named flags, each raised every so many seconds.

    A flag is first raised one interval after `start`. It stays up until `due` lowers it: it is
    served late, but never lost and never twice.

    >>> with Schedule({"report": 3600.0}) as schedule:
    ...     schedule.due("report")
    False
    """

    def __init__(self, interval_seconds: Mapping[str, float]) -> None:
        for name, seconds in interval_seconds.items():
            if not 0 < seconds < float("inf"):
                raise ConfigError(
                    f"interval of {name!r} must be a positive number of seconds, got {seconds}"
                )
        self._intervals = dict(interval_seconds)
        self._flags = {name: Event() for name in interval_seconds}
        self._scheduler: BackgroundScheduler | None = None
        self._clock_offset = time() - monotonic()

    def start(self) -> None:
        """Start the thread that raises the flags."""
        defaults = {"misfire_grace_time": None, "coalesce": True, "max_instances": 1}
        self._scheduler = BackgroundScheduler(timezone=UTC, job_defaults=defaults)
        self._clock_offset = time() - monotonic()
        for name, seconds in self._intervals.items():
            self._scheduler.add_job(self._flags[name].set, "interval", seconds=seconds, id=name)
        self._scheduler.start()

    def due(self, name: str) -> bool:
        """Return whether `name` became due since the last call that returned true."""
        self._follow_clock()
        flag = self._flags[name]
        if not flag.is_set():
            return False
        flag.clear()
        return True

    def stop(self) -> None:
        """End the thread. A flag that is up stays up."""
        if self._scheduler is not None:
            self._scheduler.shutdown()
            self._scheduler = None

    def _follow_clock(self) -> None:
        """Keep the cadence when the wall clock, by which APScheduler plans, is set back.

        Otherwise nothing would be due until the clock has caught up. If it is set forward,
        APScheduler raises at once what is due by the new time: early, but not lost.
        """
        moved = time() - monotonic() - self._clock_offset
        if abs(moved) < _CLOCK_SLACK_SECONDS:
            return
        self._clock_offset += moved
        if moved < 0 and self._scheduler is not None:
            for job in self._scheduler.get_jobs():
                job.modify(next_run_time=job.next_run_time + timedelta(seconds=moved))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
