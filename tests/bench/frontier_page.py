"""The tables of `frontier`: each log's contenders, and what the defaults are meant to reach.

Figures are means over the seeds of a log. The interval of a mean difference combines those of the
seeds, which are independent: its half-width is the root of the sum of squares over their number.

>>> mean_interval([[0.01, 0.00, 0.02], [0.03, 0.02, 0.04]])
(0.02, 0.012929, 0.027071)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from support.record import formatted

Case = Mapping[str, Any]

DEFAULTS = "defaults"
ONE_STEP = "DeepFM, one step a batch"
PROGRESSIVE = "progressive"  # among the models that were scored as served
IN_HINDSIGHT = ", in hindsight"
BEFORE = f"{ONE_STEP}, 512"
_PARTS = ("first_tenth", "whole", "last_half")
_GRID = ("first_fifth", "whole", "first_tenth", "last_half")  # the columns of a result's grid
_MILLION = 1_000_000
_HEADER = [
    "contender",
    "events/s",
    "first tenth",
    "whole run",
    "last half",
    "AUC, last half",
    "predicted / actual, last half",
    "whole run above exact FTRL [95 %]",
]
# Columns that a table has if any of its results has the key.
_OPTIONAL = {
    "recovery": "recovers after",
    "as_served": "as served, last half (the same, progressive)",
}


def batch_name(size: int) -> str:
    """Return the name of the contender with this batch size."""
    return f"batch {size:,}"


@dataclass(frozen=True, slots=True)
class Group:
    """The cases of one log, one for each seed."""

    log: str
    cases: Sequence[Case]

    @property
    def contenders(self) -> list[str]:
        """The names of the contenders, in the order of the first case."""
        names = [result["contender"] for case in self.cases for result in case["results"]]
        return list(dict.fromkeys(names))

    def results(self, contender: str) -> list[Mapping[str, Any]]:
        """Return the results of a contender over the seeds, without those that did not run."""
        return [
            result
            for case in self.cases
            for result in case["results"]
            if result["contender"] == contender and "not_run" not in result
        ]

    def mean(self, contender: str, part: str, score: str) -> float | None:
        """Return the mean of a score over the seeds, or None."""
        return _mean(result[part][score] for result in self.results(contender))

    def speed(self, contender: str) -> float | None:
        """Return the median of the events/s over the seeds, or None.

        Those that were measured on a busy machine do not count.
        """
        quiet = [result for result in self.results(contender) if not result.get("busy")]
        values = [result["events_per_second"] for result in quiet]
        return statistics.median(values) if values else None

    def fact(self, part: str, score: str) -> float | None:
        """Return the mean over the seeds of a figure of exact FTRL or of the log, or None."""
        return _mean(case[part][score] for case in self.cases)

    def above_ftrl(self, contender: str, part: str) -> tuple[float, float, float] | None:
        """Return the mean difference from exact FTRL with its interval, or None."""
        differences = [result[part]["above_ftrl"] for result in self.results(contender)]
        whole = [each for each in differences if None not in each]
        return mean_interval(whole) if whole else None

    def vowpal_best(self, part: str) -> float | None:
        """Return the least logloss of any learner and rate of Vowpal Wabbit, a mean over seeds."""
        column = _GRID.index(part)
        least = [
            min((row[column] for grid in _grids(case) for row in grid.values()), default=None)
            for case in self.cases
        ]
        return None if None in least else _mean(least)


def groups(cases: Iterable[Case]) -> list[Group]:
    """Return the cases by log, in the order in which the logs come."""
    by_log = {log: list(found) for log, found in groupby(cases, key=lambda case: case["log"])}
    return [Group(log, found) for log, found in by_log.items()]


def mean_interval(differences: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean of (difference, low, high), whose intervals are independent."""
    middle = statistics.mean(difference for difference, _, _ in differences)
    below, above = (
        math.sqrt(sum((each[0] - each[end]) ** 2 for each in differences)) / len(differences)
        for end in (1, 2)
    )
    return round(middle, 6), round(middle - below, 6), round(middle + above, 6)


def _grids(case: Case) -> list[Mapping[str, Sequence[float]]]:
    return [result["grid"] for result in case["results"] if "grid" in result]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


# -- the block of the page -----------------------------------------------------------------------


def block(cases: Sequence[Case], figure: Path | None = None, page: Path | None = None) -> str:
    """Return the tables of all logs in Markdown.

    `figure` is linked from the `page`, in whose folder it is.
    """
    found = groups(cases)
    picture = []
    if figure:
        link = figure.name if page and page.parent == figure.parent else str(figure)
        picture = [f"![Logloss above exact FTRL's against events/s, a panel for each log]({link})"]
    records = [record for case in cases for record in (case, *case.get("earlier", []))]
    sources = sorted({f"{record['machine']}: `{record['command']}`" for record in records})
    return "\n\n".join([*picture, goals_table(found), *map(log_block, found), *sources])


def log_block(group: Group) -> str:
    """Return the title, the table and the notes of one log."""
    seeds = [str(case["seed"]) for case in group.cases]
    examples = group.cases[0]["examples"]
    rate = group.fact("whole", "ctr") or 0.0
    plural = "s" if len(seeds) > 1 else ""
    title = f"**{group.log}**: {examples:,} impressions, {rate:.2%} clicked"
    title = f"{title.replace('%', ' %')}, seed{plural} {', '.join(seeds)}"
    return "\n\n".join(filter(None, [title, log_table(group), _notes(group)]))


def log_table(group: Group) -> str:
    """Return the contenders of a log, between the best constant and the best possible logloss."""
    keys = {key for case in group.cases for result in case["results"] for key in result}
    header = [*_HEADER, *(title for key, title in _OPTIONAL.items() if key in keys)]
    rows: list[list[object]] = [_bound(group, "best constant", "constant_logloss")]
    exact = [_digits(group.fact(part, "logloss")) for part in _PARTS]
    scores = [group.fact("last_half", name) for name in ("auc", "pred_over_actual")]
    rows.append(["exact FTRL, in our runs", "", *exact, *map(_digits4, scores), ""])
    rows += [
        _row(group, each, keys) for each in group.contenders if not _repeats_the_choice(group, each)
    ]
    if group.fact("whole", "best_possible_logloss") is not None:
        rows.append(_bound(group, "best possible", "best_possible_logloss"))
    return formatted(header, [[*row, *[""] * (len(header) - len(row))] for row in rows])


def _repeats_the_choice(group: Group, contender: str) -> bool:
    """Return whether the rates that are best in hindsight are those that were chosen."""
    chosen = contender.removesuffix(IN_HINDSIGHT)
    if chosen == contender:
        return False
    best = [result["options"] for result in group.results(contender)]
    return best == [result["options"] for result in group.results(chosen)]


def _bound(group: Group, name: str, key: str) -> list[object]:
    return [name, "", *[_digits(group.fact(part, key)) for part in _PARTS]]


def _row(group: Group, contender: str, keys: Collection[str]) -> list[object]:
    results = group.results(contender)
    title = contender
    if contender == DEFAULTS:
        title = f"**{DEFAULTS}** ({batch_name(group.cases[0]['default_batch'])})"
    if not results:
        return [title, "not run"]
    loss = [_digits(group.mean(contender, part, "logloss")) for part in _PARTS]
    scores = [group.mean(contender, "last_half", name) for name in ("auc", "pred_over_actual")]
    interval = group.above_ftrl(contender, "whole")
    shown = f"{interval[0]:+.5f} [{interval[1]:+.5f}, {interval[2]:+.5f}]" if interval else ""
    measured = group.speed(contender)
    speed = "" if measured is None else f"{measured:,.0f}"
    optional = {"recovery": _recovered(results), "as_served": _as_served(results)}
    more = [text for key, text in optional.items() if key in keys]
    return [title, speed, *loss, *map(_digits4, scores), shown, *more]


def _recovered(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the examples until each seed's run was calibrated again, and how far it was off."""
    found = [result["recovery"] for result in results if "recovery" in result]
    if not found:
        return ""
    after, exactly = (
        "; ".join("never" if each[name] is None else f"{each[name]:,}" for each in found)
        for name in ("examples", "by_true_probability")
    )
    worst = max((each["worst"] for each in found), key=lambda ratio: abs(math.log(ratio)))
    return f"{after} (by true probabilities {exactly}); at worst {worst:.2f}"


def _as_served(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the logloss of what was served, and the progressive one of the same impressions."""
    found = [result["as_served"]["last_half"] for result in results if "as_served" in result]
    if not found:
        return ""
    served, progressive = (
        _digits(_mean(figures[name]["logloss"] for figures in found))
        for name in (next(iter(found[0])), PROGRESSIVE)
    )
    return f"{served} ({progressive})"


def _notes(group: Group) -> str:
    """Return a line for each rate of Vowpal Wabbit, reason and message."""
    notes: dict[str, list[str]] = {}
    for case in group.cases:
        for result in case["results"]:
            name = result["contender"]
            if "not_run" in result:
                notes.setdefault(f"{name}: not run: {result['not_run']}", []).append(case["name"])
            elif _repeats_the_choice(group, name):
                continue
            elif "grid" in result or IN_HINDSIGHT in name:
                options = " ".join(result["options"])
                notes.setdefault(f"{name}: `{options}`", []).append(case["name"])
            elif "message" in result:
                notes.setdefault(f"{name}: {result['message']}", []).append(case["name"])
    several = len(group.cases) > 1
    seeds = {case["name"]: str(case["seed"]) for case in group.cases}
    return "\n".join(
        f"- {note}" + (f" (seed {', '.join(seeds[name] for name in names)})" if several else "")
        for note, names in notes.items()
    )


# -- goals ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reached:
    """A reached value, None if it was not measured, and the range that is the goal."""

    value: float | None
    least: float = -math.inf
    most: float = math.inf

    def __str__(self) -> str:
        if self.value is None:
            return ""
        sign = "" if math.isfinite(self.least) else "+"
        met = "yes" if self.least <= self.value <= self.most else "**no**"
        return f"{self.value:{sign}.4f} {met}"


def goals(group: Group) -> dict[str, Reached]:
    """Return what the defaults reach on a log, by the title of the goal."""

    def above(part: str, other: float | None) -> float | None:
        loss = group.mean(DEFAULTS, part, "logloss")
        return None if loss is None or other is None else loss - other

    smaller = [above(part, _best_smaller_batch(group, part)) for part in ("whole", "last_half")]
    slack = 0.001 if group.cases[0]["examples"] >= _MILLION else 0.0005
    calibration = group.mean(DEFAULTS, "last_half", "pred_over_actual")
    return {
        "whole run, above exact FTRL; at most 0.0005": Reached(
            above("whole", group.fact("whole", "logloss")), most=0.0005
        ),
        "first tenth, above Vowpal Wabbit's best; at most 0.002": Reached(
            above("first_tenth", group.vowpal_best("first_tenth")), most=0.002
        ),
        "last half, above Vowpal Wabbit's best; at most 0.001": Reached(
            above("last_half", group.vowpal_best("last_half")), most=0.001
        ),
        "last half, above one step a batch of 512; at most 0": Reached(
            above("last_half", group.mean(BEFORE, "last_half", "logloss")), most=0.0
        ),
        "above the best smaller batch, whole or last half; at most 0.0005, 0.001 at a million": (
            Reached(max((each for each in smaller if each is not None), default=None), most=slack)
        ),
        "predicted / actual, last half; 0.98 to 1.02": Reached(calibration, 0.98, 1.02),
    }


def _best_smaller_batch(group: Group, part: str) -> float | None:
    """Return the least logloss of the batch sizes below that of the defaults, or None."""
    size = group.cases[0]["default_batch"]
    smaller = [
        group.mean(name, part, "logloss")
        for name in group.contenders
        if name.startswith("batch ") and _size(name) < size
    ]
    return min((loss for loss in smaller if loss is not None), default=None)


def goals_table(found: Sequence[Group]) -> str:
    """Return a row for each log: what the defaults reach, and the share of the gap they close."""
    rows: list[list[object]] = []
    header: list[str] = []
    for group in found:
        reached = goals(group)
        header = ["log", *reached, "gap closed, last half"]
        rows.append([group.log, *reached.values(), _gap_closed(group)])
    return formatted(header, rows)


def _gap_closed(group: Group) -> str:
    """Return the share of the gap from the best constant to the best possible logloss."""
    loss = group.mean(DEFAULTS, "last_half", "logloss")
    constant = group.fact("last_half", "constant_logloss")
    best = group.fact("last_half", "best_possible_logloss")
    if loss is None or constant is None or best is None:
        return ""
    return f"{(constant - loss) / (constant - best):.1%}".replace("%", " %")


def _size(name: str) -> int:
    return int(name.removeprefix("batch ").replace(",", ""))


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _digits4(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
