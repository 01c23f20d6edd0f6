"""The last words of a run: one line, or one for each model if there are more than three."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import UnsetType

from stream_ctr.evaluate.summary import Difference, Paired
from stream_ctr.train.report import Report

_MODELS_IN_A_LINE = 3
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
    "examples_skipped",
    "examples_unlearned",
    "publications_refused",
)


def summary(report: Report, state: Path) -> str:
    """Summarise the last report of a run."""
    several = len(report.models) > _MODELS_IN_A_LINE
    parts = [f"{report.examples:,} examples"]
    if not several:
        parts += [
            f"{name}: logloss {score.logloss:.5f}, AUC {score.auc:.4f}"
            for name, score in report.models.items()
            if score.auc
        ]
    if report.best_possible_logloss:
        parts.append(f"best possible logloss {report.best_possible_logloss:.5f}")
    if report.paired.low is not None and not several:
        first, second = report.paired.models
        parts.append(f"{first} - {second} {_difference(report.paired)}")
    parts += _named_counters(report.counters)
    if report.stalled:
        parts.append(
            f"{report.pending:,} impressions wait for clicks that are overdue "
            "(join.stall_clicks = 0 does not wait)"
        )
    place = state / "snapshots" / str(report.snapshot)
    line = f"{report.kind}: {'; '.join(parts)}; snapshot {place}"
    return "\n".join([line, *(_model_lines(report) if several else ()), *_served_lines(report)])


def _model_lines(report: Report) -> Iterator[str]:
    first = next(iter(report.models))
    width = max(map(len, report.models))
    for name, score in report.models.items():
        figures = "no AUC"
        if score.auc:
            figures = f"logloss {score.logloss:.5f}, AUC {score.auc:.4f}"
        pair = report.pairs.get(name)
        compared = ""
        if pair and pair.low is not None:
            compared = f"; {first} - {name} {_difference(pair)}"
        yield f"  {name:<{width}}  {figures}{compared}"


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


def _difference(pair: Paired | Difference) -> str:
    interval = f"[{pair.low:+.5f}, {pair.high:+.5f}]"
    return f"on the same {pair.count:,}: {pair.logloss_difference:+.5f} {interval}"


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
