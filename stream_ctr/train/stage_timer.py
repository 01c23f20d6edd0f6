"""Where the time of an event goes: each thread that works on events counts how long it is at which stage.

StageTimer stand around work on whole batches and never around one event, so that counting can always be on. A stage's time is its own,
without that of stages within it. A thread's loop stands in the stage `else`, so its stages add up to all of its time.

A stage whose name begins with `wait.` is one in which the thread waits for another: the reader for the `source` or for the `trainer`, the
trainer for the `reader` or for the `baseline`. A stage within another is named after it: `learn.gather`.

>>> stages = StageTimer(clock=iter([0, 2, 5, 9, 11]).__next__)
>>> with stages("learn"):  # from 2 to 11
...     with stages("learn.gather"):  # from 5 to 9
...         pass
>>> stages.nanoseconds()
{'learn': 5, 'learn.gather': 4}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

ELSE = "else"
Profile = dict[str, Any]


class StageTimer:
    """The stages of one thread; others may read `nanoseconds` meanwhile, which tells of stages that were left."""

    def __init__(self, *, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._spent: dict[str, int] = {}
        self._entered: list[Stage] = []
        self._since = clock()

    def __call__(self, name: str) -> Stage:
        """A stage to enter with `with`."""
        return Stage(self, name)

    def nanoseconds(self) -> dict[str, int]:
        """Stage -> its own time so far, in the order in which they were left first."""
        return dict(self._spent)

    def _charge(self) -> None:
        """The time since the last change is that of the innermost stage."""
        now = self._clock()
        if self._entered:
            name = self._entered[-1].name
            self._spent[name] = self._spent.get(name, 0) + now - self._since
        self._since = now

    def _enter(self, stage: Stage) -> None:
        self._charge()
        self._entered.append(stage)

    def _leave(self) -> None:
        self._charge()
        self._entered.pop()


class Stage:
    """One stay at a stage. Its `name` may be changed before it is left, when only its end tells what it was."""

    __slots__ = ("_stages", "name")

    def __init__(self, stages: StageTimer, name: str) -> None:
        self._stages, self.name = stages, name

    def __enter__(self) -> Self:
        self._stages._enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stages._leave()


def profile(reader: Mapping[str, int], trainer: Mapping[str, int], *, events: int) -> Profile:
    """What a report tells of both threads: for each stage its seconds and nanoseconds an event, and which `bound` the run has.

    >>> profile({"poll": 3_000_000}, {"learn": 9_000_000, "wait.reader": 1_000_000}, events=1000)["bound"]
    'learning'
    """

    def told(spent: Mapping[str, int]) -> dict[str, dict[str, float]]:
        return {
            name: {"seconds": round(ns / 1e9, 3), "ns_per_event": round(ns / max(events, 1), 1)}
            for name, ns in spent.items()
        }

    return {"bound": bound(reader, trainer), "reader": told(reader), "trainer": told(trainer)}


def bound(reader: Mapping[str, float], trainer: Mapping[str, float]) -> str:
    """Which of `source`, `ingest`, `learning` and `baseline` needs the most time, by stage -> time.

    They work beside each other, so the run is as fast as the slowest of them. Time between a thread's waits is what it needs; the baseline,
    which learns what the trainer gives it, needs as much as the trainer and what that waits for it, once that is more than a tenth.

    >>> bound({"poll": 1, "wait.source": 8}, {"wait.reader": 7, "learn": 2})
    'source'
    >>> bound({"poll": 3, "decode": 4, "wait.trainer": 1}, {"wait.reader": 2, "learn": 6})
    'ingest'
    """
    needs = {
        "source": reader.get("wait.source", 0),
        "ingest": _working(reader),
        "learning": _working(trainer),
    }
    if 10 * (waits := trainer.get("wait.baseline", 0)) > sum(trainer.values()):
        needs["baseline"] = needs["learning"] + waits
    return max(needs, key=needs.__getitem__)


def _working(thread: Mapping[str, float]) -> float:
    return sum(time for name, time in thread.items() if not name.startswith("wait."))


_WORDS = {
    "source": "The source is the bound: the trainer waits for the reader {reader:.0%} of its time, and the reader mostly for records.",
    "ingest": "Ingest is the bound: the trainer waits for the reader {reader:.0%} of its time, and the reader mostly works.",
    "learning": "Learning is the bound: the trainer waits for the reader {reader:.0%} of its time and for the baseline {baseline:.0%}.",
    "baseline": "The baseline is the bound: the trainer waits for it {baseline:.0%} of its time. With a lower baseline.sample_rate it "
    "learns a share of the impressions.",
}
_TURNS = "Ingest is the bound: nothing is read ahead (input.read_ahead = 0), so that ingest and learning take turns."


def table(known: Profile) -> str:
    """A profile as a table, and in one sentence what the bound is.

    >>> print(table(profile({"poll": 3_000_000}, {"wait.reader": 1_000_000, "learn": 9_000_000}, events=1000)))
    thread   stage              seconds   share   ns/event
    reader   poll                 0.003  100.0%      3,000
    trainer  wait.reader          0.001   10.0%      1,000
    trainer  learn                0.009   90.0%      9,000
    Learning is the bound: the trainer waits for the reader 10% of its time and for the baseline 0%.
    """
    words = (
        _WORDS[known["bound"]]
        if known["bound"] != "ingest" or "wait.trainer" in known["reader"]
        else _TURNS
    )
    lines = [f"{'thread':<8} {'stage':<16} {'seconds':>9} {'share':>7} {'ns/event':>10}"]
    for thread in ("reader", "trainer"):
        for name, time_ in known[thread].items():
            share = _share(known[thread], name)
            lines.append(
                f"{thread:<8} {name:<16} {time_['seconds']:>9,.3f} {share:>7.1%} {time_['ns_per_event']:>10,.0f}"
            )
    waits = {name: _share(known["trainer"], f"wait.{name}") for name in ("reader", "baseline")}
    return "\n".join([*lines, words.format(**waits)])


def _share(thread: Mapping[str, Mapping[str, float]], name: str) -> float:
    whole = sum(time_["seconds"] for time_ in thread.values())
    return thread[name]["seconds"] / whole if name in thread and whole else 0.0
