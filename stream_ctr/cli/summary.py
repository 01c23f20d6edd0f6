"""The last words of a run: a line on the run, one for each model, and one for each pair of models.

Each figure stands there for the whole run and for its last half. The words are the same on a
terminal, in a pipe and in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct, UnsetType

from stream_ctr.evaluate.summary import Difference, ModelScore
from stream_ctr.train.report import Report

# These are counted for each additional model as well.
_COUNTED_BY_MODEL = ("examples_skipped", "examples_unlearned")
# Counters of what was not learned, and of the reasons.
_NAMED_COUNTERS = (
    "rejected",
    "records_lost",
    "impressions_late",
    "impressions_evicted",
    "clicks_late",
    "clicks_unmatched",
    "clicks_evicted",
    "ids_forgotten_early",
    "labelled_duplicate",
    "labelled_evicted",
    "examples_skipped",
    "examples_unlearned",
    "publications_refused",
)
_MISSING = "-"
_NO_INTERVAL = "no interval"


def summary(report: Report, state: Path, *, kept_open: int | None = None) -> str:
    """Summarise the last report of a run.

    `kept_open` impressions wait at the end of the input for the one that follows, None if the end
    closes all.
    """
    parts = [f"{report.examples:,} examples", *_named_counters(report.counters)]
    if report.stalled:
        parts.append(
            f"{report.pending:,} impressions wait for clicks that are overdue "
            "(join.stall_clicks = 0 does not wait)"
        )
    elif kept_open is not None and report.kind == "final":
        parts.append(f"{kept_open:,} impressions wait for the input that follows")
        if not report.examples:
            parts.append("nothing is published yet")
    place = state / "snapshots" / str(report.snapshot)
    line = f"{report.kind}: {'; '.join(parts)}; snapshot {place}"
    scopes = _scopes(report)
    tables = [_models(scopes)]
    if report.pairs:
        tables.append(_pairs(scopes))
    rows = [f"  {row}" for table in tables for row in _aligned(table)]
    return "\n".join([line, *rows, *_served_lines(report)])


class _Figures(Struct):
    """The figures of a part of a run, as a report holds them."""

    models: dict[str, ModelScore]
    pairs: dict[str, Difference]
    constant_logloss: float | None
    best_possible_logloss: float | None


def _served_lines(report: Report) -> Iterator[str]:
    """Yield the metrics of what was served, if anything was."""
    if isinstance(report.as_served, UnsetType):
        return
    first, *others = report.as_served.models.items()
    if not first[1].count:
        return
    figures = ", ".join(
        f"{name} {score.logloss:.5f}" for name, score in (first, *others) if score.logloss
    )
    yield f"  as served, logloss on {first[1].count:,} impressions: {figures}"


class _Scope(NamedTuple):
    """A part of a run with its title: each takes columns of its own."""

    title: str
    figures: _Figures


def _scopes(report: Report) -> list[_Scope]:
    scopes = [_Scope("whole run", msgspec.convert(report, _Figures, from_attributes=True))]
    if isinstance(report.last_half, Mapping):
        scopes.append(_Scope("last half", msgspec.convert(report.last_half, _Figures)))
    return scopes


# -- the models ----------------------------------------------------------------------------------


class _Column(NamedTuple):
    head: str
    form: str
    value: Callable[[ModelScore], float | None]


_COLUMNS = (
    _Column("logloss", "{:.5f}", lambda score: score.logloss),
    _Column("AUC", "{:.4f}", lambda score: score.auc),
    _Column("pred/actual", "{:.3f}", lambda score: score.pred_over_actual),
)
_REFERENCES: Mapping[str, Callable[[_Figures], float | None]] = {
    "constant": lambda figures: figures.constant_logloss,
    "best possible": lambda figures: figures.best_possible_logloss,
}


class _Table(NamedTuple):
    """Rows of a name and of the cells of each scope."""

    titles: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Sequence[str]]]]
    name: str


def _models(scopes: Sequence[_Scope]) -> _Table:
    """Return the scores of all models, and below them the loglosses that put them in perspective.

    These are that of the best constant and, of a simulated stream, the best possible.
    """
    rows: list[tuple[str, Sequence[Sequence[str]]]] = [
        (name, [_score(scope.figures.models.get(name)) for scope in scopes])
        for name in scopes[0].figures.models
    ]
    rows += [
        (name, [[_number(_COLUMNS[0].form, logloss(scope.figures)), "", ""] for scope in scopes])
        for name, logloss in _REFERENCES.items()
        if logloss(scopes[0].figures) is not None
    ]
    titles = [scope.title for scope in scopes]
    return _Table(titles, [column.head for column in _COLUMNS], rows, "model")


def _score(score: ModelScore | None) -> list[str]:
    return [
        _MISSING if score is None else _number(column.form, column.value(score))
        for column in _COLUMNS
    ]


# -- the pairs -----------------------------------------------------------------------------------


def _pairs(scopes: Sequence[_Scope]) -> _Table:
    """Return the difference in logloss of the first model from each other, on shared examples."""
    first = next(iter(scopes[0].figures.models))
    rows = [
        (f"{first} - {name}", [_difference(scope.figures.pairs.get(name)) for scope in scopes])
        for name in scopes[0].figures.pairs
    ]
    titles = [scope.title for scope in scopes]
    return _Table(titles, ["examples", "difference", "95 % interval"], rows, "pair")


def _difference(pair: Difference | None) -> list[str]:
    if pair is None or pair.logloss_difference is None:
        return ["0", _MISSING, _NO_INTERVAL]
    interval = _NO_INTERVAL if pair.low is None else f"{pair.low:+.5f} to {pair.high:+.5f}"
    return [f"{pair.count:,}", f"{pair.logloss_difference:+.5f}", interval]


# -- text ----------------------------------------------------------------------------------------


def _number(form: str, number: float | None) -> str:
    return _MISSING if number is None else form.format(number)


def _aligned(table: _Table) -> Iterator[str]:
    """Yield the lines of a table, with the titles of the scopes above their columns."""
    lines = [[table.name, *(head for _ in table.titles for head in table.heads)]]
    lines += [[name, *(cell for cells in scopes for cell in cells)] for name, scopes in table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    spans = [
        sum(widths[first : first + len(table.heads)]) + 2 * (len(table.heads) - 1)
        for first in range(1, len(widths), len(table.heads))
    ]
    titles = [title.rjust(span) for title, span in zip(table.titles, spans, strict=True)]
    yield "  ".join([" " * widths[0], *titles]).rstrip()
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([name.ljust(widths[0]), *padded]).rstrip()


def _named_counters(counters: Mapping[str, int]) -> Iterator[str]:
    for name in _NAMED_COUNTERS:
        words = name.replace("_", " ")
        if count := counters.get(name, 0):
            yield f"{count:,} {words}"
        if name in _COUNTED_BY_MODEL:
            for key in counters:
                if key.startswith(f"{name}."):
                    yield f"{counters[key]:,} {words} by {key.removeprefix(f'{name}.')}"
    if left_out := [
        key.removeprefix("left_out.") for key in counters if key.startswith("left_out.")
    ]:
        yield f"left out after diverging: {', '.join(left_out)}"
