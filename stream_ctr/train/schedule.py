"""When things are due. APScheduler lives here and nowhere else, and all it does is raise flags.

APScheduler 3.11 keeps a calendar of jobs in a thread of its own, runs late what a busy or stopped process missed, and folds several
missed runs into one, which is what reports and snapshots need. Version 4 is not taken: it is a pre-release whose own README says not
to use it in production. Of 3.11's defaults one must go: a job more than a second late (`misfire_grace_time`) would silently be skipped.
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

_CLOCK_SLACK = 1.0  # seconds; below it the clock was slewed and not set


class Schedule:
    """Named flags, each raised every so many seconds; the loop that owns the state serves them between two batches.

    The first one comes one interval after `start`. A flag that nobody took stays up: it is served late, never lost and never twice.

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
        self._clock = time() - monotonic()

    def start(self) -> None:
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        self._clock = time() - monotonic()
        for name, seconds in self._intervals.items():
            self._scheduler.add_job(self._flags[name].set, "interval", seconds=seconds, id=name)
        self._scheduler.start()

    def due(self, name: str) -> bool:
        """Whether `name` has become due since the last call that said so."""
        self._follow_clock()
        flag = self._flags[name]
        if not flag.is_set():
            return False
        flag.clear()
        return True

    def stop(self) -> None:
        """End the thread. What is due already stays due."""
        if self._scheduler is not None:
            self._scheduler.shutdown()
            self._scheduler = None

    def _follow_clock(self) -> None:
        """Keep the cadence when the wall clock, which APScheduler plans by, is set back: else nothing is due until it has caught up."""
        moved = time() - monotonic() - self._clock
        if abs(moved) < _CLOCK_SLACK:
            return
        self._clock += moved
        if (
            moved < 0 and self._scheduler is not None
        ):  # set forward, it raises at once whatever is due by the new time: early, never lost
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
