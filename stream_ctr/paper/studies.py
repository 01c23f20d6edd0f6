"""Figures 6 to 11, each with the paper's claim and the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_ctr.paper import figures, published
from stream_ctr.paper.aggregate import Report, chosen, compared, relative_times, rough
from stream_ctr.paper.page import (
    Block,
    Cell,
    Column,
    Details,
    Heading,
    Note,
    Picture,
    Strong,
    Table,
    Text,
)
from stream_ctr.paper.words import NONE, count, number, spread


def figure6(told: Report) -> list[Block]:
    """Training times; none where none was taken."""
    times = told["figure6"]
    if not times:
        return []
    blocks: list[Block] = [Heading("Figure 6: training time"), _claim("figure6")]
    whole, per_epoch = (relative_times(times, kind) for kind in ("seconds", "seconds_per_epoch"))
    tables = [
        _time_table(told, device, whole.get(device), per_epoch.get(device)) for device in times
    ]
    if not whole:
        note = Note(
            "No multiples of LR's time: LR and another system must have been timed on one machine."
        )
        return [*blocks, note, *tables]
    panels = [figures.relative_time({device: of}, per_epoch) for device, of in whole.items()]
    picture = Picture(
        "figure6", _figure6_caption(told), figures.relative_time(whole, per_epoch), panels
    )
    return [
        *blocks,
        *([_of_short_times(times)] if rough(times) else []),
        picture,
        Details("The numbers", tables),
    ]


def _of_short_times(times: Mapping[str, Mapping[str, Any]]) -> Note:
    epoch = times["cpu"]["LR"]["seconds_per_epoch"]["median"]
    return Note(
        f"An epoch of LR takes {number(epoch, significant=1)} s here: read multiples of so short a time as orders of magnitude."
    )


def _figure6_caption(told: Report) -> str:
    gpu = (
        " in the GPU's panel too, for it has no GPU code" if set(told["figure6"]) - {"cpu"} else ""
    )
    several = (
        " Of several machines, one is shown."
        if len({str(where["machine"]) for where in told["machines"]}) > 1
        else ""
    )
    return (
        "Bars: training time until the best check over LR's, medians over seeds, FNN's pre-training included; whiskers from the least to "
        "the most. Diamonds: an epoch over LR's, since how many epochs a system needs is another question. The numbers are these two, in "
        f"this order. The axis goes by powers of ten. LR is FTRL-Proximal in compiled code on one CPU core{gpu}.{several}"
    )


Times = Mapping[str, Mapping[str, Any]]  # by system


def _time_table(told: Report, device: str, whole: Times | None, per_epoch: Times | None) -> Table:
    columns = [Column("system", number=False), Column("runs")]
    for group in ("until the best check", "an epoch"):
        columns += [Column("seconds", group), Column("least to most", group)]
        columns += [Column("over LR's", group)] if whole else []
    columns += [
        Column("seconds of pre-training"),
        Column("examples a second"),
        Column("parameters of the network"),
    ]
    rows: list[list[Cell]] = []
    for name, time in told["figure6"][device].items():
        said: list[Cell] = [name, str(time["runs"])]
        for kind, over in (("seconds", whole), ("seconds_per_epoch", per_epoch)):
            said += _taken(time[kind], time["runs"])
            said += [number(over[name]["median"], significant=2)] if over else []
        rows.append([*said, *_of_table2(told["table2"][name], device)])
    return Table(f"Training time on the {_device(device)}.", columns, rows)


def _taken(seconds: Mapping[str, float], runs: int) -> list[Cell]:
    middle, least, most = (
        number(seconds[part], significant=2) for part in ("median", "least", "most")
    )
    return [middle, f"{least} to {most}" if runs > 1 else NONE]


def _of_table2(row: Mapping[str, Any], device: str) -> list[Cell]:
    """Where Table 2 was on that device."""
    if row["device"] != device:
        return [NONE] * 3
    return [
        number(row["seconds_pretraining"] or None, significant=2),
        number(row["examples_per_second"], significant=2),
        count(row["parameters"]),
    ]


def _device(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}.get(device, device)


def study(told: Report, part: str) -> list[Block]:
    """One of Figures 7 to 11; none where no system was run at more than one value."""
    values = compared(told[part])
    if not values:
        return []
    blocks: list[Block] = [
        Heading(f"Figure {part.removeprefix('figure')}: {_SUBJECT[part]}"),
        _claim(part),
    ]
    caption = f"Test AUC and logloss by {figures.AXES[part]}, all else as in the settings. {_whiskers(values)}"
    panels = [figures.study(part, values, [metric]) for metric in ("auc", "logloss")]
    best = [f"{name} at {value}" for name, value in chosen(values).items()]
    return [
        *blocks,
        Picture(part, caption, figures.study(part, values), panels),
        Text(f"Lowest logloss on validation: {'; '.join(best)}."),
        Details("The numbers", [_study_table(values, part, metric) for metric in _STUDIED]),
    ]


_SUBJECT = {
    "figure7": "activation function",
    "figure8": "dropout",
    "figure9": "neurons per layer",
    "figure10": "hidden layers",
    "figure11": "network shape",
}


_STUDIED = {
    "validation_logloss": ("Validation logloss", 5),
    "logloss": ("Test logloss", 5),
    "auc": ("Test AUC", 4),
}


def _claim(part: str) -> Text:
    return Text(
        f"The paper{'' if part == 'figure6' else ', on Company*'}: {published.CLAIMS[part]}"
    )


def _whiskers(values: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    runs = max(row["runs"] for of in values.values() for row in of.values())
    if runs > 1:
        return f"Whiskers: one standard deviation over {runs} seeds; what is closer together than that is not told apart."
    return "One seed: how much of a difference is chance is not known."


def _study_table(
    values: Mapping[str, Mapping[str, Mapping[str, Any]]], part: str, metric: str
) -> Table:
    name, digits = _STUDIED[metric]
    best = chosen(values)
    rows: list[list[Cell]] = []
    for system in best:
        texts = {value: spread(point.get(metric), point.get(f"{metric}_std"), digits)
                 for value, of in values.items() for point in [of.get(system, {})]}  # fmt: skip
        rows.append(
            [
                system,
                *(Strong(text) if value == best[system] else text for value, text in texts.items()),
            ]
        )
    caption = (
        f"{name} by {figures.AXES[part]}; set off is where the validation logloss is the lowest."
    )
    return Table(
        caption, [Column("system", number=False), *(Column(value) for value in values)], rows
    )
