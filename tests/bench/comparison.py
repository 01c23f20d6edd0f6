"""What was measured of one case, against its goals: a table for people and a record for machines, both made of the same dictionary.

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
    """Contender `of` is to reach at least, or at most, so much; `times` another one, or so much `above` it."""

    of: str
    least: float | None = None
    most: float | None = None
    times: str = ""
    above: str = ""

    def __str__(self) -> str:
        bound = (
            f"at least {number(self.least)}"
            if self.least is not None
            else f"at most {number(self.most)}"
        )
        return bound + (
            f" x {self.times}" if self.times else f" above {self.above}" if self.above else ""
        )

    def reached(self, results: Mapping[str, Result]) -> float | None:
        """None when one that it takes was not measured."""
        ours, other = results.get(self.of), results.get(self.times or self.above)
        if ours is None or not ours.values or (other is None and (self.times or self.above)):
            return None
        if other is None:
            return ours.median
        return ratio(ours, other) if self.times else difference(ours, other)

    def met(self, reached: float | None) -> bool | None:
        if reached is None:
            return None
        return reached >= self.least if self.least is not None else reached <= (self.most or 0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`name` is the case's, and that of its block in a page; ratios are to `peer`, where there is one."""

    name: str
    title: str
    unit: str
    results: Sequence[Result]
    goals: Sequence[Goal] = ()
    peer: str = ""

    def as_json(self) -> dict[str, Any]:
        by_name = {result.name: result for result in self.results}
        goals = []
        for goal in self.goals:
            reached = goal.reached(by_name)
            goals.append(
                {
                    "contender": goal.of,
                    "goal": str(goal),
                    "reached": reached,
                    "met": goal.met(reached),
                }
            )
        ratios = {
            name: ratio(result, by_name[self.peer])
            for name, result in by_name.items()
            if self.peer in by_name
        }
        return {
            "name": self.name, "title": self.title, "unit": self.unit, "peer": self.peer, "goals": goals,
            "results": [result.as_json() | {"ratio": ratios.get(result.name)} for result in self.results],
        }  # fmt: skip


def table(case: Mapping[str, Any]) -> str:
    """In Markdown, from `Comparison.as_json` and what `record` adds to it; below it how each contender was made."""
    peer, unit = case["peer"], case["unit"]
    rows: list[list[object]] = []
    for result in case["results"]:
        goals = [goal for goal in case["goals"] if goal["contender"] == result["contender"]]
        verdict = ["; ".join(goal["goal"] for goal in goals), "; ".join(map(_verdict, goals))]
        if "not_run" in result:
            rows.append([result["contender"], "not run", *([""] * (2 if peer else 1)), *verdict])
            continue
        spread = f"{number(result['least'])}..{number(result['most'])}"
        times = [] if not peer else ["" if result["ratio"] is None else number(result["ratio"])]
        rows.append([result["contender"], number(result["median"]), spread, *times, *verdict])
    header = [
        "contender",
        f"{unit}, median",
        "least..most",
        *([f"x {peer}"] if peer else []),
        "goal",
        "met",
    ]
    said = {
        result["contender"]: f"not run: {result['not_run']}"
        if "not_run" in result
        else result["note"]
        for result in case["results"]
    }
    notes = "\n".join(f"- {name}: {note}" for name, note in said.items() if note)
    reasons = {result.get("not_run") for result in case["results"]}
    told = (
        [formatted(header, rows), notes]
        if None in reasons or len(reasons) > 1
        else [f"not measured: {reasons.pop()}"]
    )
    made = f"{case['machine']}: `{case['command']}`" if "machine" in case else ""
    return "\n\n".join(filter(None, [f"**{case['title']}**", *told, made]))


def _verdict(goal: Mapping[str, Any]) -> str:
    if goal["met"] is None:
        return "not measured"
    return f"{'yes' if goal['met'] else 'no'} ({number(goal['reached'])})"


def number(value: float | None) -> str:
    """Three digits, or all of those before the point.

    >>> number(12345.6), number(4.5678), number(0.29), number(4.0), number(None)
    ('12,346', '4.57', '0.29', '4', '')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
