"""Figures 6 to 11, each with the paper's claim and the numbers behind the figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_ctr.paper import figures, published
from stream_ctr.paper.aggregate import (
    Report,
    Study,
    Times,
    best_values,
    ratios_are_rough,
    relative_times,
    with_several_values,
)
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
from stream_ctr.paper.words import ABSENT, count, number, spread


def _claim(part: str) -> Text:
    data = "" if part == "figure6" else ", on Company*"
    return Text(f"The paper{data}: {published.CLAIMS[part]}")


# -- Figure 6 ------------------------------------------------------------------------------------


def figure6(report: Report) -> list[Block]:
    """Return the blocks on training times, or none if no time was measured."""
    times = report["figure6"]
    if not times:
        return []
    training = relative_times(times, "seconds")
    epoch = relative_times(times, "seconds_per_epoch")
    tables = [
        _time_table(report, device, training.get(device), epoch.get(device)) for device in times
    ]
    head: list[Block] = [Heading("Figure 6: training time"), _claim("figure6")]
    if not training:
        note = Note(
            "Times relative to LR are missing: LR and another system must be timed on one machine."
        )
        return [*head, note, *tables]
    panels = [figures.relative_time({device: training[device]}, epoch) for device in training]
    picture = figures.relative_time(training, epoch)
    return [
        *head,
        *_rough_note(times),
        Picture("figure6", _figure6_caption(report), picture, panels),
        Details("The numbers", tables),
    ]


def _rough_note(times: Times) -> list[Block]:
    if not ratios_are_rough(times):
        return []
    epoch = times["cpu"]["LR"]["seconds_per_epoch"]["median"]
    return [
        Note(
            f"An epoch of LR takes {number(epoch, significant=1)} s here. Multiples of so short a "
            "time are orders of magnitude only."
        )
    ]


def _figure6_caption(report: Report) -> str:
    on_gpu = set(report["figure6"]) - {"cpu"}
    machines = {str(found["machine"]) for found in report["machines"]}
    gpu = ", also in the GPU panel, because it has no GPU code" if on_gpu else ""
    several = " The times are from one of several machines." if len(machines) > 1 else ""
    return (
        "Bars show the training time until the best check divided by LR's, as the median over "
        "seeds and with FNN's pre-training. Whiskers show the least and the most. Diamonds show "
        "one epoch divided by LR's, which does not depend on how many epochs a system needs. The "
        "labels give both numbers in this order. The axis is logarithmic. LR is FTRL-Proximal in "
        f"compiled code on one CPU core{gpu}.{several}"
    )


Ratios = Mapping[str, Mapping[str, float]]  # system -> median, least, most


def _time_table(
    report: Report, device: str, training: Ratios | None, epoch: Ratios | None
) -> Table:
    """Return the times on a device. The ratios are None where LR or other systems have no time."""
    columns = [Column("system", number=False), Column("runs")]
    for group in ("until the best check", "one epoch"):
        columns += [Column("seconds", group), Column("least to most", group)]
        columns += [Column("relative to LR", group)] if training else []
    columns += [
        Column("pre-training seconds"),
        Column("examples per second"),
        Column("network parameters"),
    ]
    rows: list[list[Cell]] = []
    for name, time in report["figure6"][device].items():
        row: list[Cell] = [name, str(time["runs"])]
        for kind, ratios in (("seconds", training), ("seconds_per_epoch", epoch)):
            row += _seconds(time[kind], time["runs"])
            row += [number(ratios[name]["median"], significant=2)] if ratios else []
        rows.append([*row, *_table2_cells(report["table2"][name], device)])
    return Table(f"Training time on the {_device(device)}.", columns, rows)


def _seconds(seconds: Mapping[str, float], runs: int) -> list[Cell]:
    median, least, most = (
        number(seconds[part], significant=2) for part in ("median", "least", "most")
    )
    return [median, f"{least} to {most}" if runs > 1 else ABSENT]


def _table2_cells(row: Mapping[str, Any], device: str) -> list[Cell]:
    """Return what Table 2 measured, if it ran on this device."""
    if row["device"] != device:
        return [ABSENT] * 3
    return [
        number(row["seconds_pretraining"] or None, significant=2),
        number(row["examples_per_second"], significant=2),
        count(row["parameters"]),
    ]


def _device(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}.get(device, device)


# -- Figures 7 to 11 -----------------------------------------------------------------------------


_SUBJECTS = {
    "figure7": "activation function",
    "figure8": "dropout",
    "figure9": "neurons per layer",
    "figure10": "hidden layers",
    "figure11": "network shape",
}

# Metric -> its name and decimals.
_METRICS = {
    "validation_logloss": ("Validation logloss", 5),
    "logloss": ("Test logloss", 5),
    "auc": ("Test AUC", 4),
}


def study(report: Report, part: str) -> list[Block]:
    """Return the blocks of one of Figures 7 to 11.

    The list is empty if no system was run at more than one value.
    """
    values = with_several_values(report[part])
    if not values:
        return []
    caption = (
        f"Test AUC and logloss by {figures.AXES[part]}; all other settings are those above. "
        f"{_whiskers(values)}"
    )
    panels = [figures.study(part, values, [metric]) for metric in ("auc", "logloss")]
    best = [f"{name} at {value}" for name, value in best_values(values).items()]
    return [
        Heading(f"Figure {part.removeprefix('figure')}: {_SUBJECTS[part]}"),
        _claim(part),
        Picture(part, caption, figures.study(part, values), panels),
        Text(f"Lowest validation logloss: {'; '.join(best)}."),
        Details("The numbers", [_study_table(values, part, metric) for metric in _METRICS]),
    ]


def _whiskers(values: Study) -> str:
    runs = max(point["runs"] for points in values.values() for point in points.values())
    if runs > 1:
        return (
            f"Whiskers show one standard deviation over {runs} seeds; smaller differences may be "
            "chance."
        )
    return "With one seed it is unknown how much of a difference is chance."


def _study_table(values: Study, part: str, metric: str) -> Table:
    name, digits = _METRICS[metric]
    best = best_values(values)
    rows: list[list[Cell]] = []
    for system in best:
        row: list[Cell] = [system]
        for value, points in values.items():
            point = points.get(system, {})
            text = spread(point.get(metric), point.get(f"{metric}_std"), digits)
            row.append(Strong(text) if value == best[system] else text)
        rows.append(row)
    caption = (
        f"{name} by {figures.AXES[part]}. Bold marks the value with the lowest validation logloss."
    )
    columns = [Column("system", number=False), *(Column(value) for value in values)]
    return Table(caption, columns, rows)
