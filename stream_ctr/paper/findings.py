"""What came out, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from stream_ctr.paper import published
from stream_ctr.paper.aggregate import Report
from stream_ctr.paper.page import Block, Listing, Text
from stream_ctr.paper.words import number, percent


def findings(told: Report) -> list[Block]:
    """The order of Table 2 beside the paper's, who is told apart from DeepFM and LR, and what of the possible was learned."""
    order = told["order"]
    if not order:
        return [Text("No run of Table 2 has ended.")]
    rows = told["table2"]
    scored = [f"{name} {number(rows[name]['logloss'], 5)}" for name in order]
    said = [f"By test logloss, the lowest first: {', '.join(scored)}.", *_papers_order(told)]
    said += _against(told, "DeepFM", "against_deepfm") + _against(told, "LR", "against_lr")
    constant = told["data"]["constant_logloss"]
    if constant is not None and (
        above := [name for name in order if rows[name]["logloss"] >= constant]
    ):
        said.append(
            f"No better than the best constant, whose test logloss is {number(constant, 5)}: {', '.join(above)}."
        )
    if (best := told["data"]["best_possible_logloss"]) is not None:
        said.append(_closed(told, order[0], best))
    return [Listing(said)]


def _papers_order(told: Report) -> Iterator[str]:
    """By both metrics, which do not agree there."""
    if (paper := published.counterpart(told["data"])) is None or len(told["order"]) < 2:
        return
    of = {name: scores for name, scores in published.TABLE2[paper].items() if name in told["order"]}
    by_logloss = sorted(of, key=lambda name: of[name].logloss)
    by_auc = sorted(of, key=lambda name: -of[name].auc)
    also = " (by AUC the same)" if by_auc == by_logloss else f"; by AUC: {', '.join(by_auc)}"
    yield f"The paper's order of these on {published.NAMES[paper]}, by logloss: {', '.join(by_logloss)}{also}."


def _against(told: Report, other: str, verdicts: str) -> list[str]:
    """Who is told apart from another by its interval, and who is not."""
    words = {
        "better": f"Lower logloss than {other}'s, interval below zero",
        "worse": f"Higher logloss than {other}'s, interval above zero",
        "same": f"Not told apart from {other}, interval around zero",
    }
    found = {
        kind: [name for name in told["order"] if told[verdicts].get(name) == kind] for kind in words
    }
    return [f"{words[kind]}: {', '.join(names)}." for kind, names in found.items() if names]


def _closed(told: Report, first: str, best: float) -> str:
    lost, constant = told["table2"][first]["logloss"], told["data"]["constant_logloss"]
    said = f"The best possible test logloss is {number(best, 5)}; {first} is {number(lost - best, 5)} above it"
    if constant is None or constant <= lost:
        return said + "."
    return (
        said
        + f", and has {percent((constant - lost) / (constant - best))} of what there is to learn beyond the best constant."
    )
