"""Tables 1 and 2, and that of the stream, each with what must be said of it."""

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
from stream_ctr.paper.words import NONE, count, number, signed, spread


def table1(told: Report) -> list[Block]:
    """Properties of the systems."""
    columns = [
        Column("system", number=False),
        *(Column(name, number=False) for name in _TABLE1_COLUMNS),
        Column("source", number=False),
    ]
    rows: list[list[Cell]] = []
    for name, of in told["table1"].items():
        marks = [not of["pretraining"], of["high_order"], of["low_order"], not of["engineering"]]
        rows.append(
            [
                name,
                *("yes" if mark else NONE for mark in marks),
                "the paper" if name in published.TABLE1 else "ours",
            ]
        )
    return [
        Heading("Table 1: properties of the systems"),
        Table("What each system does without, and what it learns.", columns, rows),
        Text(
            "The paper's rows are FNN, PNN (here its three variants), Wide & Deep (here LR & DNN) and DeepFM. The rows of LR, FM and "
            "FM & DNN are ours, by the same questions."
        ),
    ]


_TABLE1_COLUMNS = (
    "no pre-training",
    "high-order features",
    "low-order features",
    "no feature engineering",
)


def table2(told: Report) -> list[Block]:
    """Scores on the test part, the paper's beside them; none where no run has ended."""
    ended = [name for name in told["table2"] if told["table2"][name]["runs"]]
    if not ended:
        return []
    paper, best, other = (
        published.counterpart(told["data"]),
        told["data"]["best_possible_logloss"],
        _reference(told),
    )
    here = "measured here"
    columns = [Column("system", number=False), Column("AUC", here), Column("logloss", here)]
    columns += [Column("above the best possible", here)] if best is not None else []
    if paper:
        columns += [
            Column(name, f"the paper, on {published.NAMES[paper]}", quoted=True)
            for name in ("AUC", "logloss")
        ]
    columns += _difference_columns(other) if other else []
    columns += [Column("seconds", "training"), Column("epochs", "training")]
    rows = [_table2_row(told, name, paper, best, other) for name in ended]
    blocks: list[Block] = [
        Heading("Table 2: performance"),
        Table(_table2_caption(told), columns, rows),
    ]
    about = (
        f"The paper's numbers are of {published.DATA[paper]}: compare orders, not digits."
        if paper
        else None
    )
    blocks.append(Text(about or "The paper has no numbers on this data."))
    blocks += [_differences(told)] if other == "DeepFM" else []
    return [
        *blocks,
        *_of_pretraining(told),
        *_at_the_limit(told),
        Details("Validation, and differences to LR", [_more_table(told, ended)]),
    ]


def _reference(told: Report) -> str | None:
    """The system whose logloss the others' are compared with: DeepFM, or LR where DeepFM was not run."""
    compared = {"DeepFM": "minus_deepfm", "LR": "minus_lr"}
    return next(
        (
            name
            for name, kind in compared.items()
            if any(row[kind] for row in told["table2"].values())
        ),
        None,
    )


def _difference_columns(other: str) -> list[Column]:
    return [Column(name, f"logloss less {other}'s") for name in ("difference", "95 % interval")]


def _table2_row(
    told: Report, name: str, paper: str | None, best: float | None, other: str | None
) -> list[Cell]:
    row = told["table2"][name]
    said: list[Cell] = [_best(told, row, "auc", 4), _best(told, row, "logloss", 5)]
    if best is not None:
        said.append(number(None if row["logloss"] is None else row["logloss"] - best, 5))
    if paper:
        said += [
            f"{row['published'][paper]['auc']:.4f}",
            f"{row['published'][paper]['logloss']:.5f}",
        ]
    if other:
        said += _difference_to(other, name, row)
    return [name, *said, number(row["seconds"], significant=2), number(row["epochs"], 2)]


def _difference_to(other: str, name: str, row: Mapping[str, Any]) -> list[Cell]:
    return (
        ["0", NONE]
        if name == other
        else _difference(row["minus_deepfm" if other == "DeepFM" else "minus_lr"])
    )


def _more_table(told: Report, ended: Sequence[str]) -> Table:
    columns = [
        Column("system", number=False),
        Column("best", "validation logloss"),
        Column("less the test's", "validation logloss"),
    ]
    columns += [
        Column("logloss, last epoch", "training"),
        Column("epochs", "training"),
        *_difference_columns("LR"),
    ]
    rows: list[list[Cell]] = []
    for name in ended:
        row = told["table2"][name]
        validation = spread(row["validation_logloss"], row["validation_logloss_std"], 5)
        above = (
            NONE if row["logloss"] is None else signed(row["validation_logloss"] - row["logloss"])
        )
        training = [number(row["train_logloss"], 5), number(row["epochs_trained"], 2)]
        rows.append([name, validation, above, *training, *_difference_to("LR", name, row)])
    caption = (
        "The training logloss is of the last epoch, as far as it went: of each example before it was learned, with what dropout left. "
        "Epochs are counted until training was stopped."
    )
    return Table(caption, columns, rows)


def _of_pretraining(told: Report) -> list[Block]:
    row = told["table2"]["FNN"]
    if not (began := row["pretraining"]):
        return []
    fm, network = began["validation_logloss"], row["validation_logloss"]
    than = "above" if network > fm else "below"
    return [
        Text(
            f"FNN began as an FM, whose best validation logloss was {number(fm, 5)}, after {number(began['epochs'], 2)} epochs. That of "
            f"the network on its embeddings is {number(network, 5)}: {number(abs(network - fm), 5)} {than} it."
        )
    ]


def _at_the_limit(told: Report) -> list[Block]:
    most = told["settings"]["epochs"]
    still = [name for name, row in told["table2"].items() if row["epochs"] == most]
    return (
        [
            Text(
                f"At their best when the limit ended their training, so more epochs may help: {', '.join(still)}."
            )
        ]
        if still
        else []
    )


def _best(told: Report, row: Mapping[str, Any], metric: str, digits: int) -> Cell:
    """The mean and its spread; strong where no system's is better."""
    text = spread(row[metric], row[f"{metric}_std"], digits)
    found = [of[metric] for of in told["table2"].values() if of[metric] is not None]
    first = found and row[metric] == (max(found) if metric == "auc" else min(found))
    return Strong(text) if first else text


def _table2_caption(told: Report) -> str:
    devices = {row["device"] for row in told["table2"].values() if row["runs"]}
    where = "on a GPU, LR's on one core of the CPU" if "cuda" in devices else "on the CPU"
    return (
        f"{_over_seeds(told)}, on {count(told['data']['test'])} test examples. Seconds (the median over seeds, start-up left out) and "
        f"epochs are of training until the best check on validation; FNN's seconds with its pre-training; {where}. The best AUC and "
        "logloss are set off, and differences whose interval leaves zero out."
    )


def _over_seeds(told: Report) -> str:
    return (
        "One seed" if one_seed(told) else "Mean \N{PLUS-MINUS SIGN} standard deviation over seeds"
    )


def one_seed(told: Report) -> bool:
    """Whether Table 2 has no spread over seeds."""
    return max((row["runs"] for row in told["table2"].values()), default=0) <= 1


def _difference(of: Mapping[str, Any] | None) -> list[Cell]:
    if of is None or of["logloss_difference"] is None:
        return [NONE, NONE]
    apart = verdict(of) in ("better", "worse")
    text = signed(of["logloss_difference"])
    return [
        Strong(text) if apart else text,
        NONE if of["low"] is None else f"{signed(of['low'])} to {signed(of['high'])}",
    ]


def _compared(told: Report) -> dict[str, Mapping[str, float | None]]:
    return {
        name: row["minus_deepfm"]
        for name, row in told["table2"].items()
        if row["minus_deepfm"] is not None
    }


def _differences(told: Report) -> Picture:
    picture = figures.differences(_compared(told))
    caption = "Test logloss less DeepFM's, with 95 % intervals. A hollow dot: the interval holds zero, so chance alone may be the difference."
    return Picture("table2", caption, picture, [picture])


def streaming(told: Report) -> list[Block]:
    """One pass over the log; none where there was none."""
    found = told["streaming"]
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
        Column("examples a second"),
    ]
    caption = "Progressive validation. The interval is a bootstrap over blocks of neighbouring examples; it does not hold the spread over seeds."
    rows = [_streaming_row(found, name) for name in told["table2"] if name in found]
    return [
        Heading("The same systems on the stream"),
        *_of_streaming(told["settings"]["streaming"]),
        Table(caption, columns, rows),
    ]


def _of_streaming(settings: Mapping[str, Any]) -> list[Block]:
    pretrained = settings["pretrain_examples"]
    network = f"dropout {settings['dropout']:g}, network {'-'.join(map(str, settings['hidden']))}, table by {settings['table_optimizer']}"
    return [
        Text(
            "Not in the paper: one pass over the log in the order of its times, each example predicted before it is learned. Every example "
            f"is a test example once, and nothing is repeated or chosen. Settings are those of streams, not the paper's: {network}."
        ),
        Text(
            f"A network predicts a batch of {count(settings['batch_size'])} before it learns any of it; LR learns each example before the "
            "next, so it is up to a batch ahead."
            + (
                f" FNN is an FM for the first {count(pretrained)} examples, and goes on as a network."
                if pretrained
                else ""
            )
        ),
    ]


def _streaming_row(found: Mapping[str, Mapping[str, Any]], name: str) -> list[Cell]:
    of = found[name]
    row: list[Cell] = [
        name,
        spread(of["auc"], of["auc_std"], 4),
        spread(of["logloss"], of["logloss_std"], 5),
    ]
    row += [number(of["last_half"]["auc"], 4), number(of["last_half"]["logloss"], 5)]
    row += _difference_to("DeepFM", name, of) if "DeepFM" in found else []
    return [*row, number(of["examples_per_second"], significant=2)]
