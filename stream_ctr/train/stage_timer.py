"""Where the time of an event goes: each thread counts its time in every stage.

Stages stand around work on whole batches, never around one event, so counting is always on. The
time of a stage does not include that of stages inside it. A thread's loop stands in the stage
`else`, so its stages add up to all of its time.

In a stage whose name begins with `wait.` the thread waits for another: the reader for the `source`
or for the `trainer`, the trainer for the `reader` or for the `baseline`. A stage inside another is
named after it: `learn.fm`.

>>> timer = StageTimer(clock=iter([0, 2, 5, 9, 11]).__next__)
>>> with timer("learn"):  # from 2 to 11
...     with timer("learn.fm"):  # from 5 to 9
...         pass
>>> timer.nanoseconds()
{'learn': 5, 'learn.fm': 4}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

ELSE = "else"
Profile = dict[str, Any]
# A baseline for which the trainer waits more than this share of its time may be the bound.
_BASELINE_WAIT_SHARE = 0.1


class StageTimer:
    """The stages of one thread.

    Other threads may call `nanoseconds` meanwhile, which reports the stages that were left.
    """

    def __init__(self, *, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._spent: dict[str, int] = {}
        self._entered: list[Stage] = []
        self._since = clock()

    def __call__(self, name: str) -> Stage:
        """Return a stage to enter with `with`."""
        return Stage(self, name)

    def nanoseconds(self) -> dict[str, int]:
        """Return the time spent in each stage, in the order in which they were first left."""
        return dict(self._spent)

    def enter(self, stage: Stage) -> None:
        """Begin to count for `stage`."""
        self._charge()
        self._entered.append(stage)

    def leave(self) -> None:
        """Count for the enclosing stage again."""
        self._charge()
        self._entered.pop()

    def _charge(self) -> None:
        """Add the time since the last change to the innermost stage."""
        now = self._clock()
        if self._entered:
            name = self._entered[-1].name
            self._spent[name] = self._spent.get(name, 0) + now - self._since
        self._since = now


class Stage:
    """A stage as a context; its `name` may change while it is entered."""

    __slots__ = ("_timer", "name")

    def __init__(self, timer: StageTimer, name: str) -> None:
        self._timer = timer
        self.name = name

    def __enter__(self) -> Self:
        self._timer.enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.leave()


def profile(reader: Mapping[str, int], trainer: Mapping[str, int], *, events: int) -> Profile:
    """Return the time of each stage in seconds and in nanoseconds an event, and the bound.

    `reader` and `trainer` map stages to nanoseconds.

    >>> spent = {"learn": 9_000_000, "wait.reader": 1_000_000}
    >>> profile({"poll": 3_000_000}, spent, events=1000)["bound"]
    'learning'
    """
    return {
        "bound": bound(reader, trainer),
        "reader": _times(reader, events),
        "trainer": _times(trainer, events),
    }


def _times(spent: Mapping[str, int], events: int) -> dict[str, dict[str, float]]:
    return {
        name: {
            "seconds": round(nanoseconds / 1e9, 3),
            "ns_per_event": round(nanoseconds / max(events, 1), 1),
        }
        for name, nanoseconds in spent.items()
    }


def bound(reader: Mapping[str, float], trainer: Mapping[str, float]) -> str:
    """Return which of `source`, `ingest`, `learning` and `baseline` needs the most time.

    They work beside each other, so a run is as fast as the slowest of them. A thread needs its time
    between waits. The baseline learns what the trainer gives it: it needs as much as the trainer
    and the time that the trainer waits for it, once that is more than a tenth.

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
    waits = trainer.get("wait.baseline", 0)
    if waits > _BASELINE_WAIT_SHARE * sum(trainer.values()):
        needs["baseline"] = needs["learning"] + waits
    return max(needs, key=needs.__getitem__)


def _working(thread: Mapping[str, float]) -> float:
    return sum(time for name, time in thread.items() if not name.startswith("wait."))


_EXPLANATIONS = {
    "source": (
        "The source is the bound: the trainer waits for the reader {reader:.0%} of its time, "
        "and the reader mostly for records."
    ),
    "ingest": (
        "Ingest is the bound: the trainer waits for the reader {reader:.0%} of its time, "
        "and the reader mostly works."
    ),
    "learning": (
        "Learning is the bound: the trainer waits for the reader {reader:.0%} of its time "
        "and for the baseline {baseline:.0%}."
    ),
    "baseline": (
        "The baseline is the bound: the trainer waits for it {baseline:.0%} of its time. "
        "With a lower baseline.sample_rate it learns a share of the impressions."
    ),
    "no thread": (
        "Ingest is the bound: nothing is read ahead (input.read_ahead = 0), "
        "so that ingest and learning take turns."
    ),
}


def table(known: Profile) -> str:
    """Format a profile as a table, with a sentence about the bound.

    >>> spent = {"wait.reader": 1_000_000, "learn": 9_000_000}
    >>> print(table(profile({"poll": 3_000_000}, spent, events=1000)))
    thread   stage              seconds   share   ns/event
    reader   poll                 0.003  100.0%      3,000
    trainer  wait.reader          0.001   10.0%      1,000
    trainer  learn                0.009   90.0%      9,000
    Learning is the bound: the trainer waits for the reader 10% of its time and for the baseline 0%.
    """
    bound = known["bound"]
    if bound == "ingest" and "wait.trainer" not in known["reader"]:
        bound = "no thread"
    lines = [f"{'thread':<8} {'stage':<16} {'seconds':>9} {'share':>7} {'ns/event':>10}"]
    for thread in ("reader", "trainer"):
        for name, spent in known[thread].items():
            share = _share(known[thread], name)
            lines.append(
                f"{thread:<8} {name:<16} {spent['seconds']:>9,.3f} {share:>7.1%} "
                f"{spent['ns_per_event']:>10,.0f}"
            )
    waits = {name: _share(known["trainer"], f"wait.{name}") for name in ("reader", "baseline")}
    return "\n".join([*lines, _EXPLANATIONS[bound].format(**waits)])


def _share(thread: Mapping[str, Mapping[str, float]], name: str) -> float:
    total = sum(spent["seconds"] for spent in thread.values())
    return thread[name]["seconds"] / total if name in thread and total else 0.0
