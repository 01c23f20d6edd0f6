"""State the results of Table 2 in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from stream_ctr.paper import published
from stream_ctr.paper.aggregate import Report
from stream_ctr.paper.page import Block, Listing, Text
from stream_ctr.paper.words import number, percent

_VERDICTS = {
    "better": "Lower logloss than {} (interval below zero)",
    "worse": "Higher logloss than {} (interval above zero)",
    "same": "No clear difference from {} (interval includes zero)",
}


def findings(report: Report) -> list[Block]:
    """Return the findings as a list.

    They are the order of the systems and the paper's order, the systems that differ from DeepFM and
    from LR by more than chance, and how much of the learnable logloss the best system has learned.
    """
    order = report["order"]
    if not order:
        return [Text("No run of Table 2 has finished.")]
    rows = report["table2"]
    scored = [f"{name} {number(rows[name]['logloss'], 5)}" for name in order]
    items = [f"Systems by test logloss, lowest first: {', '.join(scored)}."]
    items += _published_order(report)
    items += _compared_with(report, "DeepFM", "against_deepfm")
    items += _compared_with(report, "LR", "against_lr")
    items += _not_better_than_constant(report)
    items += _gap_closed(report)
    return [Listing(items)]


def _published_order(report: Report) -> Iterator[str]:
    """Yield the paper's order by both metrics, which do not agree in the paper."""
    paper = published.counterpart(report["data"])
    order = report["order"]
    if paper is None or len(order) < 2:
        return
    rows = {name: scores for name, scores in published.TABLE2[paper].items() if name in order}
    by_logloss = sorted(rows, key=lambda name: rows[name].logloss)
    by_auc = sorted(rows, key=lambda name: -rows[name].auc)
    same = by_auc == by_logloss
    auc_order = " (the same by AUC)" if same else f"; by AUC: {', '.join(by_auc)}"
    yield (
        f"The paper's order of these systems on {published.NAMES[paper]}, by logloss: "
        f"{', '.join(by_logloss)}{auc_order}."
    )


def _compared_with(report: Report, other: str, verdicts: str) -> Iterator[str]:
    """Yield the systems whose interval excludes zero, and those whose interval includes it."""
    for kind, sentence in _VERDICTS.items():
        names = [name for name in report["order"] if report[verdicts].get(name) == kind]
        if names:
            yield f"{sentence.format(other)}: {', '.join(names)}."


def _not_better_than_constant(report: Report) -> Iterator[str]:
    constant = report["data"]["constant_logloss"]
    if constant is None:
        return
    rows = report["table2"]
    names = [name for name in report["order"] if rows[name]["logloss"] >= constant]
    if names:
        yield (
            f"Not better than predicting the best constant (test logloss {number(constant, 5)}): "
            f"{', '.join(names)}."
        )


def _gap_closed(report: Report) -> Iterator[str]:
    best = report["data"]["best_possible_logloss"]
    if best is None:
        return
    first = report["order"][0]
    logloss = report["table2"][first]["logloss"]
    constant = report["data"]["constant_logloss"]
    closed = (
        ""
        if constant is None or constant <= logloss
        else f" and closes {percent((constant - logloss) / (constant - best))} of the gap between "
        "the best constant and the best possible logloss"
    )
    yield (
        f"The best possible test logloss is {number(best, 5)}. "
        f"{first} is {number(logloss - best, 5)} above it{closed}."
    )
