"""The newest reports of a run, for another thread to read.

    the loop     add(report) -> a new View replaces the old one, in one assignment
    a reader     view        -> one reference to a View, which never changes

So no lock stands between the two, and a reader touches nothing that the loop owns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

MOST_REPORTS = 1000
MOST_WINDOWS = 2000
_ENDS = ("final", "stopped")
_KINDS = ("report", *_ENDS)


@dataclass(frozen=True, slots=True)
class Kept:
    """A report that was encoded once: `start_ms` is that of a window, else 0."""

    start_ms: int
    data: bytes


@dataclass(frozen=True, slots=True)
class View:
    """The newest reports, the oldest first.

    `reports` are those about the run, `windows` those about final windows, ordered by their start.
    `latest` is the last of `reports` as an object, and nobody changes it. `ended` is true if it is
    the last one of a run that did not go on.
    """

    run: str = ""
    latest: Mapping[str, Any] | None = None
    reports: tuple[Kept, ...] = ()
    windows: tuple[Kept, ...] = ()
    ended: bool = False

    @property
    def model(self) -> str:
        """The name of the published model, which comes first in a report, or ""."""
        models = self.latest.get("models") if self.latest else None
        return next(iter(models), "") if isinstance(models, Mapping) else ""


class RecentReports:
    """Keep the newest reports. One thread adds them; any thread may read `view`.

    `clock` returns monotonic seconds, for `beat`.

    >>> recent = RecentReports("a" * 32)
    >>> recent.add({"kind": "report", "models": {"deepfm": {}}, "examples": 7})
    >>> recent.view.model, recent.view.ended, len(recent.view.reports)
    ('deepfm', False, 1)
    """

    def __init__(self, run: str = "", *, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = View(run)
        self._clock = clock
        self._beat: float | None = None

    @property
    def view(self) -> View:
        """The reports up to now."""
        return self._view

    def add(self, report: Mapping[str, Any]) -> None:
        """Add a report as it is written, an object of JSON; others than reports are left out.

        A window that was reported before, by a run that ended before its snapshot, is replaced.
        """
        view = self._view
        kind = report.get("kind")
        if kind == "window":
            start_ms = report.get("start_ms")
            if isinstance(start_ms, int):
                windows = _with_window(view.windows, Kept(start_ms, msgspec.json.encode(report)))
                self._view = replace(view, windows=windows)
        elif kind in _KINDS:
            run = report.get("run")
            self._view = replace(
                view,
                run=run if isinstance(run, str) else view.run,
                latest=report,
                reports=(*view.reports, Kept(0, msgspec.json.encode(report)))[-MOST_REPORTS:],
                ended=kind in _ENDS,
            )

    def add_all(self, reports: Iterable[Mapping[str, Any]]) -> None:
        """Add reports of earlier, the oldest first."""
        for report in reports:
            self.add(report)

    def go_on(self) -> None:
        """Note that the run goes on after the reports up to now."""
        self._view = replace(self._view, ended=False)

    def beat(self) -> None:
        """Note that the loop goes round."""
        self._beat = self._clock()

    @property
    def beat_age(self) -> float | None:
        """Seconds since the last beat, or None before the first one."""
        beat = self._beat
        return None if beat is None else max(0.0, self._clock() - beat)


def _with_window(windows: tuple[Kept, ...], window: Kept) -> tuple[Kept, ...]:
    """Return the windows with another one at its place, without an earlier one of its start."""
    after = len(windows)
    while after and windows[after - 1].start_ms > window.start_ms:
        after -= 1
    before = after
    while before and windows[before - 1].start_ms == window.start_ms:
        before -= 1
    return (*windows[:before], window, *windows[after:])[-MOST_WINDOWS:]
