"""Tables 1 and 2 and the streaming table, each with its notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stream_ctr.paper import figures, published
from stream_ctr.paper.aggregate import Report
from stream_ctr.paper.intervals import verdict
from stream_ctr.paper.page import (
    Block,
    Cell,
    Column,
    Details,
    Heading,
    Picture,
    Strong,
    Table,
    Text,
)
from stream_ctr.paper.words import ABSENT, count, number, signed, spread

# -- Table 1 -------------------------------------------------------------------------------------

_TABLE1_COLUMNS = (
    "no pre-training",
    "high-order features",
    "low-order features",
    "no feature engineering",
)


def table1(report: Report) -> list[Block]:
    """Return the blocks on the properties of the systems."""
    columns = [
        Column("system", number=False),
        *(Column(name, number=False) for name in _TABLE1_COLUMNS),
        Column("source", number=False),
    ]
    rows: list[list[Cell]] = []
    for name, has in report["table1"].items():
        marks = (
            not has["pretraining"],
            has["high_order"],
            has["low_order"],
            not has["engineering"],
        )
        source = "the paper" if name in published.TABLE1 else "ours"
        rows.append([name, *("yes" if mark else ABSENT for mark in marks), source])
    return [
        Heading("Table 1: properties of the systems"),
        Table("What each system does without, and which features it learns.", columns, rows),
        Text(
            "The paper's rows are FNN, PNN (here its three variants), Wide & Deep (here LR & DNN) "
            "and DeepFM. The rows for LR, FM and FM & DNN are ours and answer the same questions."
        ),
    ]


# -- Table 2 -------------------------------------------------------------------------------------


def table2(report: Report) -> list[Block]:
    """Return the blocks on test scores, with the paper's scores next to them.

    The list is empty if no run has finished.
    """
    finished = [name for name in report["table2"] if report["table2"][name]["runs"]]
    if not finished:
        return []
    other = _reference(report)
    return [
        Heading("Table 2: performance"),
        _table2(report, finished, other),
        Text(_published_note(report)),
        *([_difference_picture(report)] if other == "DeepFM" else []),
        *_pretraining(report),
        *_at_epoch_limit(report),
        Details("Validation, and differences from LR", [_more_table(report, finished)]),
    ]


def _reference(report: Report) -> str | None:
    """Return the system to compare with: DeepFM, or LR if DeepFM was not run."""
    rows = report["table2"].values()
    for name, key in (("DeepFM", "minus_deepfm"), ("LR", "minus_lr")):
        if any(row[key] for row in rows):
            return name
    return None


def _table2(report: Report, finished: Sequence[str], other: str | None) -> Table:
    paper = published.counterpart(report["data"])
    best = report["data"]["best_possible_logloss"]
    here = "measured here"
    columns = [Column("system", number=False), Column("AUC", here), Column("logloss", here)]
    columns += [Column("above the best possible", here)] if best is not None else []
    if paper:
        group = f"the paper, on {published.NAMES[paper]}"
        columns += [Column(name, group, quoted=True) for name in ("AUC", "logloss")]
    columns += _difference_columns(other) if other else []
    columns += [Column("seconds", "training"), Column("epochs", "training")]
    rows = [_table2_row(report, name, other) for name in finished]
    return Table(_table2_caption(report), columns, rows)


def _difference_columns(other: str) -> list[Column]:
    group = f"logloss minus {other}'s"
    return [Column(name, group) for name in ("difference", "95 % interval")]


def _table2_row(report: Report, name: str, other: str | None) -> list[Cell]:
    row = report["table2"][name]
    paper = published.counterpart(report["data"])
    best = report["data"]["best_possible_logloss"]
    cells = [name, _score(report, row, "auc", 4), _score(report, row, "logloss", 5)]
    if best is not None:
        cells.append(number(None if row["logloss"] is None else row["logloss"] - best, 5))
    if paper:
        scores = row["published"][paper]
        cells += [f"{scores['auc']:.4f}", f"{scores['logloss']:.5f}"]
    if other:
        cells += _difference_from(other, name, row)
    return [*cells, number(row["seconds"], significant=2), number(row["epochs"], 2)]


def _score(report: Report, row: Mapping[str, Any], metric: str, digits: int) -> Cell:
    """Return the mean with its spread, in bold if no system has a better mean."""
    text = spread(row[metric], row[f"{metric}_std"], digits)
    found = [each[metric] for each in report["table2"].values() if each[metric] is not None]
    first = found and row[metric] == (max(found) if metric == "auc" else min(found))
    return Strong(text) if first else text


def _difference_from(other: str, name: str, row: Mapping[str, Any]) -> list[Cell]:
    """Return the difference from `other` and its interval, in bold if it excludes zero."""
    if name == other:
        return ["0", ABSENT]
    difference = row["minus_deepfm" if other == "DeepFM" else "minus_lr"]
    if difference is None or difference["logloss_difference"] is None:
        return [ABSENT, ABSENT]
    text = signed(difference["logloss_difference"])
    excludes_zero = verdict(difference) in ("better", "worse")
    low = difference["low"]
    high = difference["high"]
    return [
        Strong(text) if excludes_zero else text,
        ABSENT if low is None else f"{signed(low)} to {signed(high)}",
    ]


def _table2_caption(report: Report) -> str:
    devices = {row["device"] for row in report["table2"].values() if row["runs"]}
    device = "on a GPU, LR on one CPU core" if "cuda" in devices else "on the CPU"
    over = (
        "One seed" if one_seed(report) else "Mean \N{PLUS-MINUS SIGN} standard deviation over seeds"
    )
    return (
        f"{over}, on {count(report['data']['test'])} test examples. Seconds and epochs count "
        "training until the best check on validation. Seconds are the median over seeds, without "
        f"start-up and with FNN's pre-training, {device}. Bold marks the best AUC and logloss, and "
        "differences whose interval excludes zero."
    )


def one_seed(report: Report) -> bool:
    """Return whether Table 2 has no spread over seeds."""
    return max((row["runs"] for row in report["table2"].values()), default=0) <= 1


def _published_note(report: Report) -> str:
    paper = published.counterpart(report["data"])
    if paper is None:
        return "The paper has no numbers for this data."
    return (
        f"The paper's numbers are for {published.DATA[paper]}: compare the order of the systems, "
        "not the digits."
    )


def _difference_picture(report: Report) -> Picture:
    rows = report["table2"]
    found = {name: rows[name]["minus_deepfm"] for name in rows if rows[name]["minus_deepfm"]}
    picture = figures.differences(found)
    caption = (
        "Test logloss minus DeepFM's, with 95 % intervals. A hollow dot means that the interval "
        "includes zero, so that chance alone may explain the difference."
    )
    return Picture("table2", caption, picture, [picture])


def _pretraining(report: Report) -> list[Block]:
    row = report["table2"]["FNN"]
    pretraining = row["pretraining"]
    if not pretraining:
        return []
    fm = pretraining["validation_logloss"]
    network = row["validation_logloss"]
    side = "above" if network > fm else "below"
    return [
        Text(
            f"FNN started from an FM whose best validation logloss was {number(fm, 5)}, after "
            f"{number(pretraining['epochs'], 2)} epochs. The network on its embeddings reached "
            f"{number(network, 5)}, which is {number(abs(network - fm), 5)} {side} it."
        )
    ]


def _at_epoch_limit(report: Report) -> list[Block]:
    limit = report["settings"]["epochs"]
    names = [name for name, row in report["table2"].items() if row["epochs"] == limit]
    if not names:
        return []
    return [
        Text(
            "Still improving when training reached the epoch limit, so more epochs may help: "
            f"{', '.join(names)}."
        )
    ]


def _more_table(report: Report, finished: Sequence[str]) -> Table:
    columns = [
        Column("system", number=False),
        Column("best", "validation logloss"),
        Column("minus the test's", "validation logloss"),
        Column("logloss, last epoch", "training"),
        Column("epochs", "training"),
        *_difference_columns("LR"),
    ]
    caption = (
        "The training logloss is that of the last epoch, up to where training stopped: each "
        "example is scored before it is learned, with dropout. Epochs count until training stopped."
    )
    return Table(caption, columns, [_more_row(name, report["table2"][name]) for name in finished])


def _more_row(name: str, row: Mapping[str, Any]) -> list[Cell]:
    validation = row["validation_logloss"]
    return [
        name,
        spread(validation, row["validation_logloss_std"], 5),
        ABSENT if row["logloss"] is None else signed(validation - row["logloss"]),
        number(row["train_logloss"], 5),
        number(row["epochs_trained"], 2),
        *_difference_from("LR", name, row),
    ]


# -- the streaming table -------------------------------------------------------------------------


def streaming(report: Report) -> list[Block]:
    """Return the blocks on one pass over the log, or none if there was no such pass."""
    found = report["streaming"]
    if not found:
        return []
    columns = [
        Column("system", number=False),
        *(
            Column(name, group)
            for group in ("whole log", "last half")
            for name in ("AUC", "logloss")
        ),
        *(_difference_columns("DeepFM") if "DeepFM" in found else []),
        Column("examples per second"),
    ]
    caption = (
        "Progressive validation. The interval is a bootstrap over blocks of neighbouring examples; "
        "it does not cover the spread over seeds."
    )
    rows = [_streaming_row(found, name) for name in report["table2"] if name in found]
    return [
        Heading("The same systems on the stream"),
        *_streaming_texts(report["settings"]["streaming"]),
        Table(caption, columns, rows),
    ]


def _streaming_texts(settings: Mapping[str, Any]) -> list[Block]:
    pretrained = settings["pretrain_examples"]
    fnn = (
        f" FNN is an FM for the first {count(pretrained)} examples and continues as a network."
        if pretrained
        else ""
    )
    return [
        Text(
            "This table is not in the paper. Each system makes one pass over the log in event-time "
            "order and predicts each example before learning from it. Every example is a test "
            "example once; nothing is repeated or chosen. The settings are those for streams, not "
            f"the paper's: dropout {settings['dropout']:g}, network "
            f"{'-'.join(map(str, settings['hidden']))}, table optimizer "
            f"{settings['table_optimizer']}."
        ),
        Text(
            f"A network predicts a batch of {count(settings['batch_size'])} examples before it "
            "learns any of them. LR learns each example before it predicts the next, so it is up "
            f"to one batch ahead.{fnn}"
        ),
    ]


def _streaming_row(found: Mapping[str, Mapping[str, Any]], name: str) -> list[Cell]:
    row = found[name]
    return [
        name,
        spread(row["auc"], row["auc_std"], 4),
        spread(row["logloss"], row["logloss_std"], 5),
        number(row["last_half"]["auc"], 4),
        number(row["last_half"]["logloss"], 5),
        *(_difference_from("DeepFM", name, row) if "DeepFM" in found else []),
        number(row["examples_per_second"], significant=2),
    ]
