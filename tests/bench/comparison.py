"""The results of one case against its goals, as JSON and as a table.

>>> ours, peer = Result("ours", [9.0, 8.0, 10.0]), Result("peer", [2.0, 2.0, 2.5])
>>> goals = [Goal("ours", least=4.0, times="peer"), Goal("ours", least=20.0)]
>>> case = Comparison("train", "One case", "k/s", [ours, peer], goals, peer="peer").as_json()
>>> [(goal["goal"], goal["reached"], goal["met"]) for goal in case["goals"]]
[('at least 4 x peer', 4.0, True), ('at least 20', 9.0, False)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from support.record import formatted

from bench.contest import Result, difference, ratio


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound for a contender: at least or at most a value.

    The value is a number, or a multiple of contender `times`, or a difference from `above`.

    >>> str(Goal("ours", least=4.5, times="peer")), str(Goal("ours", most=250.0, above="peer"))
    ('at least 4.5 x peer', 'at most 250 above peer')
    """

    contender: str
    least: float | None = None
    most: float | None = None
    times: str = ""
    above: str = ""

    def __str__(self) -> str:
        bound = f"at most {number(self.most)}"
        if self.least is not None:
            bound = f"at least {number(self.least)}"
        if self.times:
            return f"{bound} x {self.times}"
        return f"{bound} above {self.above}" if self.above else bound

    def reached(self, results: Mapping[str, Result]) -> float | None:
        """Return the reached value, or None if a contender was not measured."""
        ours = results.get(self.contender)
        other_name = self.times or self.above
        other = results.get(other_name)
        if ours is None or not ours.values or (other is None and other_name):
            return None
        if other is None:
            return ours.median
        return ratio(ours, other) if self.times else difference(ours, other)

    def met(self, reached: float | None) -> bool | None:
        """Return whether the value meets the goal, or None for no value."""
        if reached is None:
            return None
        return reached >= self.least if self.least is not None else reached <= (self.most or 0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of a case. `name` is also the block of the page; ratios are to `peer`, if any."""

    name: str
    title: str
    unit: str
    results: Sequence[Result]
    goals: Sequence[Goal] = ()
    peer: str = ""

    def as_json(self) -> dict[str, Any]:
        by_name = {result.name: result for result in self.results}
        peer = by_name.get(self.peer)
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "peer": self.peer,
            "goals": [_goal_as_json(goal, by_name) for goal in self.goals],
            "results": [
                result.as_json() | {"ratio": ratio(result, peer) if peer else None}
                for result in self.results
            ],
        }


def _goal_as_json(goal: Goal, results: Mapping[str, Result]) -> dict[str, Any]:
    reached = goal.reached(results)
    return {
        "contender": goal.contender,
        "goal": str(goal),
        "reached": reached,
        "met": goal.met(reached),
    }


def table(case: Mapping[str, Any]) -> str:
    """Return a case as Markdown: its title, table, notes on the contenders, machine and command.

    `case` is the result of `Comparison.as_json`, with what `record` in `speed` adds.
    """
    results = case["results"]
    unmeasured = {result.get("not_run") for result in results}
    if None not in unmeasured and len(unmeasured) == 1:
        body = [f"not measured: {unmeasured.pop()}"]
    else:
        rows = [_row(case, result) for result in results]
        body = [formatted(_header(case), rows), _notes(results)]
    source = f"{case['machine']}: `{case['command']}`" if "machine" in case else ""
    return "\n\n".join(filter(None, [f"**{case['title']}**", *body, source]))


def _header(case: Mapping[str, Any]) -> list[str]:
    times = [f"x {case['peer']}"] if case["peer"] else []
    return ["contender", f"{case['unit']}, median", "least..most", *times, "goal", "met"]


def _row(case: Mapping[str, Any], result: Mapping[str, Any]) -> list[object]:
    goals = [goal for goal in case["goals"] if goal["contender"] == result["contender"]]
    verdict = ["; ".join(goal["goal"] for goal in goals), "; ".join(map(_verdict, goals))]
    if "not_run" in result:
        empty = [""] * (2 if case["peer"] else 1)
        return [result["contender"], "not run", *empty, *verdict]
    spread = f"{number(result['least'])}..{number(result['most'])}"
    times = [number(result["ratio"])] if case["peer"] else []
    return [result["contender"], number(result["median"]), spread, *times, *verdict]


def _notes(results: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for result in results:
        note = f"not run: {result['not_run']}" if "not_run" in result else result["note"]
        if note:
            lines.append(f"- {result['contender']}: {note}")
    return "\n".join(lines)


def _verdict(goal: Mapping[str, Any]) -> str:
    if goal["met"] is None:
        return "not measured"
    return f"{'yes' if goal['met'] else 'no'} ({number(goal['reached'])})"


def number(value: float | None) -> str:
    """Return a number with three significant digits, or with all digits before the point.

    >>> number(12345.6), number(4.5678), number(0.29), number(4.0), number(None)
    ('12,346', '4.57', '0.29', '4', '')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
