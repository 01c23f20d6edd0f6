"""The report as a table on a terminal: redrawn in place during a run, and printed once at the end.

It has a row for each model, then two lines that put a logloss in perspective: a constant, and the
best possible, which a simulated stream knows. It draws the JSON object of a report, so that it
draws reports of other versions too: a missing figure is a dash, or is left out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from stream_ctr.cli.report_line import waiting_words
from stream_ctr.messages import one_line
from stream_ctr.train.report import Waiting

Report = Mapping[str, Any]


class LiveTable:
    """The table of the latest report, redrawn in place until the context is left.

    It writes nothing unless the output is a terminal. Colours follow NO_COLOR, and the columns
    follow the width of the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        # Transient, so that a file never gets the last table either.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def update(self, report: Report) -> None:
        self._live.update(_View(report), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()


def final_table(report: Report) -> RenderableType:
    """Return the table of a run that is over: the last half beside the whole run."""
    return _View(report)


class _Metric(NamedTuple):
    head: str
    key: str
    form: str


# The first stays on the narrowest terminal, the last goes first.
_METRICS = (
    _Metric("logloss", "logloss", "{:.5f}"),
    _Metric("AUC", "auc", "{:.4f}"),
    _Metric("pred/\nactual", "pred_over_actual", "{:.3f}"),
    _Metric("NE", "ne", "{:.4f}"),
    _Metric("count", "count", "{:,}"),
    _Metric("CTR", "ctr", "{:.4f}"),
)
_REFERENCES = {"constant": "constant_logloss", "best possible": "best_possible_logloss"}
_AS_SERVED = "as served"
_AS_SERVED_WORDS = (
    "As served: a share of the impressions, by the snapshot that was published when each came; all "
    "other rows: by the model as it is just before it learns the example."
)
_PROGRESSIVE = "progressive"
_DASH = "–"
_MOST_VERDICTS = 2  # as sentences; more pairs become a table
# The columns of that table, in the order of `_METRICS`.
_COMPARED = ("{} minus\nthe model", "verdict", "95 % interval", "gap\nclosed")
# Counters that are shown only if they are not 0.
_SELDOM = {
    "impressions_spilled",
    "impressions_evicted",
    "clicks_evicted",
    "ids_forgotten_early",
    "labelled",
    "labelled_late",
    "labelled_duplicate",
    "labelled_evicted",
}
# The alarms that no other part of a report tells.
_FURTHER_ALARMS = {"lost", "evicted", "rolled_back", "snapshot", "behind_baseline", "drift"}
_SILENT_SECONDS = 5.0  # without an answer from any broker, before it is shown
_ASCII = str.maketrans({"–": "-", "·": "|", "±": "+-"})


class _Scope(NamedTuple):
    """A part of the stream, the metrics of the models over it, and those of what was served."""

    title: str
    style: str
    known: Report
    served: Report


class _View:
    """A report that draws itself as wide as there is room."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report, width = self._report, options.max_width
        parts: list[RenderableType] = [
            *_flow(_progress(report), width),
            Text(),
            _widest_table(report, console, options),
            *_served_words(report),
            Text(),
        ]
        verdicts = (
            _verdicts(report)
            if len(_measured(report).pairs) <= _MOST_VERDICTS
            else [_widest_comparison(report, console, options)]
        )
        segments = console.render(
            Group(*parts, *_alarms(report), *verdicts, *_flow(_counts(report), width)), options
        )
        # A terminal that is not UTF-8 would end the program with an encoding error.
        yield from (
            (Segment(text.translate(_ASCII), style, control) for text, style, control in segments)
            if options.ascii_only
            else segments
        )


def _widest_table(report: Report, console: Console, options: ConsoleOptions) -> Table:
    """Return the table with as many metrics as fit."""
    return _first_that_fits(
        [_table(_scopes(report), _METRICS[:count]) for count in range(len(_METRICS), 0, -1)],
        console,
        options,
    )


def _widest_comparison(report: Report, console: Console, options: ConsoleOptions) -> Table:
    heads = [*_COMPARED]
    return _first_that_fits(
        [_comparison(report, heads[:count]) for count in range(len(heads), 0, -1)], console, options
    )


def _first_that_fits(tables: Sequence[Table], console: Console, options: ConsoleOptions) -> Table:
    """Return the first of ever narrower tables that fits, or the last."""
    return next(
        (
            table
            for table in tables
            if console.measure(table, options=options.update(width=1000)).maximum
            <= options.max_width
        ),
        tables[-1],
    )


def _scopes(report: Report) -> list[_Scope]:
    scopes = [_Scope("whole run", "", report, _served(report, "as_served"))]
    if "last_half" in report:
        served = _served(report, "as_served_last_half")
        return [_Scope("last half", "cyan", _mapping(report, "last_half"), served), *scopes]
    if "rolling" in report:
        return [_Scope("rolling window", "cyan", _mapping(report, "rolling"), {}), *scopes]
    return scopes


def _served(report: Report, key: str) -> Report:
    """Return the metrics of what was served, by the name of their row."""
    models = _mapping(_mapping(report, key), "models")
    return {
        f"{name} {_AS_SERVED}": _mapping(models, name)
        for name in models
        if name != _PROGRESSIVE and _mapping(models, name).get("count")
    }


def _served_words(report: Report) -> Iterator[Text]:
    """Yield what the rows of served predictions mean, and how far they are from progressive."""
    if not _served(report, "as_served"):
        return
    yield Text(_AS_SERVED_WORDS, "dim")
    part = "last half" if _served(report, "as_served_last_half") else "whole run"
    known = _mapping(report, "as_served_last_half" if part == "last half" else "as_served")
    pair = _mapping(_mapping(known, "pairs"), _PROGRESSIVE)
    difference = _number(pair.get("logloss_difference"))
    low, high = (_number(pair.get(key)) for key in ("low", "high"))
    if difference is not None:
        interval = "" if low is None else f", 95 % interval {low:+.5f} to {high:+.5f}"
        yield Text(
            f"As served minus progressive on the same impressions: logloss {difference:+.5f} nats "
            f"({part}{interval})",
            "dim",
        )


def _table(scopes: Sequence[_Scope], metrics: Sequence[_Metric]) -> Table:
    """Return the names and a table for each scope, side by side, so that each scope has a title."""
    models = list(
        dict.fromkeys(
            name for scope in reversed(scopes) for name in _mapping(scope.known, "models")
        )
    )
    models += dict.fromkeys(name for scope in scopes for name in scope.served)
    references = [
        label
        for label, key in _REFERENCES.items()
        if any(_number(scope.known.get(key)) is not None for scope in scopes)
    ]
    names = _columns(
        "", "", ["model"], [[name] for name in models], [[label] for label in references], "left"
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(1 + len(scopes)):
        # Titles and heads may need more lines in one table than in the other; the rows line up.
        table.add_column(vertical="bottom")
    scope_tables = (_scope_table(scope, metrics, models, references) for scope in scopes)
    table.add_row(
        names,
        *(
            Padding(scope_table, (0, 0, 0, min(position, 1)))
            for position, scope_table in enumerate(scope_tables)
        ),
    )
    return table


def _scope_table(
    scope: _Scope, metrics: Sequence[_Metric], models: Sequence[str], references: Sequence[str]
) -> Table:
    known = {**_mapping(scope.known, "models"), **scope.served}
    rows = [
        [_cell(metric, _mapping(known, name).get(metric.key)) for metric in metrics]
        for name in models
    ]
    lines = [
        [
            _cell(metrics[0], scope.known.get(_REFERENCES[label]), missing=""),
            *[""] * (len(metrics) - 1),
        ]
        for label in references
    ]
    return _columns(
        scope.title, scope.style, [metric.head for metric in metrics], rows, lines, "right"
    )


def _columns(
    title: str,
    style: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    dim: Iterable[Sequence[str]],
    justify: Any,
) -> Table:
    table = Table(
        title=title or " ",
        title_justify="left",
        title_style=f"bold {style}",
        box=None,
        pad_edge=False,
        style=style,
    )
    for head in heads:
        table.add_column(Text(head, "dim"), justify=justify, no_wrap=True, style=style)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    for row in dim:
        table.add_row(*(Text(cell) for cell in row), style="dim")
    return table


def _cell(metric: _Metric, value: object, missing: str = _DASH) -> str:
    number = _number(value)
    return missing if number is None else metric.form.format(number)


def _progress(report: Report) -> Iterator[Text]:
    yield from _count(report, "examples")
    if (rate := _number(report.get("events_per_second"))) is not None:
        yield Text.assemble(f"{rate:,.0f}", (" events/s", "dim"))
    if event_time := report.get("event_time"):
        yield Text.assemble(("event time ", "dim"), str(event_time))
    rolling = _mapping(report, "rolling")
    if "last_half" not in report and rolling.get("start") and rolling.get("end"):
        provisional = " (provisional)" if rolling.get("provisional") else ""
        yield Text.assemble(
            ("window ", "dim"), f"{rolling['start']} to {rolling['end']}{provisional}"
        )
    yield from _count(report, "pending")
    yield from _count(report, "lag")
    if report.get("snapshot"):
        yield Text.assemble(("snapshot ", "dim"), str(report["snapshot"]))


def _counts(report: Report) -> Iterator[Text]:
    counters = _mapping(report, "counters")
    for key in counters:
        if counters[key] or key not in _SELDOM:
            yield from _count(counters, key)
    if (coverage := _number(report.get("click_coverage"))) is not None:
        yield Text.assemble(f"{coverage:.2%}", (" of clicks joined", "dim"))
    bounds = (
        _number(_mapping(scope.known, "models")[name].get("auc_error_bound"))
        for scope in _scopes(report)
        for name in _models(scope)
    )
    if (bound := max((bound for bound in bounds if bound is not None), default=0.0)) >= 0.00005:
        yield Text.assemble(("AUC exact to ", "dim"), f"±{bound:.4f}")


def _count(known: Report, key: str) -> Iterator[Text]:
    if (count := _number(known.get(key))) is not None:
        yield Text.assemble(f"{count:,.0f}", (f" {key.replace('_', ' ')}", "dim"))


def _models(scope: _Scope) -> list[str]:
    models = _mapping(scope.known, "models")
    return [name for name in models if isinstance(models[name], Mapping)]


def _alarms(report: Report) -> Iterator[Text]:
    """Yield what keeps the run from learning or from publishing."""
    if waiting := _mapping(report, "waiting"):
        with contextlib.suppress(msgspec.ValidationError):  # of another version
            known = msgspec.convert(waiting, Waiting)
            yield Text(waiting_words(known, int(_number(report.get("pending")) or 0)), "yellow")
    if (silent := _number(report.get("silent_seconds"))) is not None and silent >= _SILENT_SECONDS:
        yield Text(f"no broker has answered for {silent:.0f} s", "red")
    if stalled := report.get("stalled"):
        yield Text(
            f"learning waits: the clicks of {', '.join(map(str, stalled))} are overdue", "red"
        )
    for reason in report.get("refused") or ():
        yield Text(f"snapshots are not published: {reason}", "red")
    for name in _mapping(report, "left_out"):
        yield Text(f"{name} diverged and is left out; the others go on", "red")
    for alarm in report.get("alarms") or ():
        if isinstance(alarm, Mapping) and alarm.get("name") in _FURTHER_ALARMS:
            yield Text(one_line(str(alarm.get("text")), 300), "yellow")


class _Pair(NamedTuple):
    """The logloss of the first model minus that of another; negative if the first is better."""

    difference: float
    low: float
    high: float

    @property
    def winner(self) -> int:
        """-1 for the first, 1 for the other, 0 if they cannot be told apart."""
        return 0 if self.low <= 0.0 <= self.high else -1 if self.difference < 0 else 1


class _Measured(NamedTuple):
    """The scope in which models are compared with the first."""

    scope: _Scope
    first: str
    pairs: Mapping[str, _Pair]


def _measured(report: Report) -> _Measured:
    half = _mapping(report, "last_half")
    scope = _Scope("last half" if half else "whole run", "", half or report, {})
    pairs, known = {}, _mapping(scope.known, "pairs")
    for name in known:
        numbers = [
            _number(_mapping(known, name).get(key)) for key in ("logloss_difference", "low", "high")
        ]
        if all(number is not None for number in numbers):
            pairs[name] = _Pair(*(float(number) for number in numbers if number is not None))
    first = next(iter(_models(scope)), "")
    return _Measured(scope, first, pairs if first else {})


def _verdicts(report: Report) -> Iterator[Text]:
    """Yield sentences: which model is better, and how much of the gap to the best is closed."""
    measured = _measured(report)
    for name, pair in measured.pairs.items():
        yield _paired_words(measured.first, name, pair, measured.scope.title)
    for scope in _scopes(report):
        if shares := _shares_of_gap(scope):
            words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            yield Text(f"gap to best possible closed ({scope.title}): {words}")
            return


def _comparison(report: Report, heads: Sequence[str]) -> Table:
    """Return the same as a table with a row for each model."""
    measured = _measured(report)
    shares = _shares_of_gap(measured.scope)
    title = f"{measured.scope.title}, logloss in nats per impression"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for head in ("model", *heads):
        justify: Any = "left" if head in ("model", "verdict") else "right"
        table.add_column(
            Text(head.format(measured.first), "dim"),
            justify=justify,
            no_wrap=True,
            vertical="bottom",
        )
    for name in _models(measured.scope):
        pair = measured.pairs.get(name)
        cells = {"gap\nclosed": f"{shares[name]:.0%}" if name in shares else ""}
        if pair:
            verdict = {
                -1: f"{measured.first} is better",
                0: "cannot be told apart",
                1: f"{name} is better",
            }[pair.winner]
            compared = (f"{pair.difference:+.5f}", verdict, f"{pair.low:+.5f} to {pair.high:+.5f}")
            cells |= dict(zip(_COMPARED, compared, strict=False))
        style = "" if pair is None else "green" if pair.winner else "yellow"
        table.add_row(
            *(Text(cell) for cell in (name, *(cells.get(head, "") for head in heads))), style=style
        )
    return table


def _paired_words(first: str, second: str, pair: _Pair, scope: str) -> Text:
    difference, low, high = pair
    if not pair.winner:
        words = (
            f"{first} and {second} cannot be told apart: "
            f"logloss differs by {difference:+.5f} nats per impression"
        )
        return Text(f"{words} ({scope}, 95 % interval {low:+.5f} to {high:+.5f})", "yellow")
    better, worse = (first, second) if pair.winner < 0 else (second, first)
    least, most = sorted((abs(low), abs(high)))
    words = f"{better} beats {worse} by {abs(difference):.5f} nats per impression"
    return Text(f"{words} ({scope}, 95 % interval {least:.5f} to {most:.5f})", "green")


def _shares_of_gap(scope: _Scope) -> dict[str, float]:
    """Return the share of the gap between the constant and the best possible that is closed."""
    constant, best = (_number(scope.known.get(key)) for key in _REFERENCES.values())
    if constant is None or best is None or not constant > best:
        return {}
    known = {
        name: _number(_mapping(scope.known, "models")[name].get("logloss"))
        for name in _models(scope)
    }
    return {
        name: (constant - logloss) / (constant - best)
        for name, logloss in known.items()
        if logloss is not None
    }


def _flow(pieces: Iterable[Text], width: int) -> Iterator[Text]:
    """Yield lines of the pieces with a dot between two; a line breaks only between pieces."""
    line = Text()
    for piece in pieces:
        if line and line.cell_len + 3 + piece.cell_len > width:
            yield line
            line = Text()
        line = Text.assemble(line, (" · ", "dim"), piece) if line else piece
    if line:
        yield line


def _mapping(known: Report, key: str) -> Report:
    value = known.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
