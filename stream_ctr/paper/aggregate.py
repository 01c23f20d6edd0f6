"""Turn runs into the numbers of a report: means, spreads over seeds, differences, relative times.

A run is a dictionary: `part` of the report, `value` of the factor that the part varies, and the
outcome of the training. A run with `failed`, the error message, counts in no number; `failures`
lists it. This module reads and writes no file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stream_ctr.models import MODELS
from stream_ctr.paper import published
from stream_ctr.paper.intervals import Difference, Floats, paired_difference

Run = Mapping[str, Any]
Report = Mapping[str, Any]  # the content of report.json
Times = Mapping[str, Mapping[str, Any]]  # device -> system -> times
Study = Mapping[str, Mapping[str, Any]]  # value -> system -> scores

STUDIES = tuple(published.VALUES)
DEEP = tuple(system.title for system in MODELS.values() if system.high_order)
TITLES = tuple(system.title for system in MODELS.values())
_TIMES = ("seconds", "seconds_pretraining", "seconds_per_epoch", "examples_per_second")
# Name in a row of the report -> name in an outcome, whose mean it is.
_MEANS = {
    "epochs": "best_epoch",
    "epochs_trained": "epochs",
    "parameters": "parameters",
    "train_logloss": "train_logloss",
}
_ROUGH_SECONDS = 0.1


def title(run: Run) -> str:
    """Return the paper's name of the run's system."""
    return MODELS[run["system"]].title


def mean_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation, or None where there are too few values.

    >>> mean_std([1.0, 2.0, 3.0]), mean_std([0.5]), mean_std([])
    ((2.0, 1.0), (0.5, None), (None, None))
    """
    found = np.array(list(values), np.float64)
    mean = float(found.mean()) if len(found) else None
    std = float(found.std(ddof=1)) if len(found) > 1 else None
    return mean, std


def median(values: Iterable[float]) -> float | None:
    """Return the median, or None without values.

    Times use the median because a single disturbed measurement does not move it.

    >>> median([1.0, 2.0, 60.0]), median([])
    (2.0, None)
    """
    found = list(values)
    return float(np.median(found)) if found else None


def scores(runs: Sequence[Run]) -> dict[str, float | None]:
    """Return `auc`, `auc_std`, `logloss` and `logloss_std` over these runs."""
    found: dict[str, float | None] = {}
    for metric in ("auc", "logloss"):
        found[metric], found[f"{metric}_std"] = mean_std(run[metric] for run in runs)
    return found


# -- Table 2 -------------------------------------------------------------------------------------


def table2(runs: Iterable[Run], losses: Callable[[Run], Floats]) -> dict[str, dict[str, Any]]:
    """Return a row for each of the nine systems, with None where no run gives the number.

    `losses` returns the test losses [n] of a run.
    """
    by_title = _by_title(_select(runs, "table2"))
    return {
        name: {
            **_table2_row(found),
            "published": _published(name),
            "minus_deepfm": _difference(found, by_title["DeepFM"], losses),
            "minus_lr": _difference(found, by_title["LR"], losses),
        }
        for name, found in by_title.items()
    }


def _table2_row(runs: Sequence[Run]) -> dict[str, Any]:
    row: dict[str, Any] = {
        **scores(runs),
        "runs": len(runs),
        "seeds": sorted(run["seed"] for run in runs),
    }
    validation, spread = mean_std(map(validation_logloss, runs))
    row["validation_logloss"] = validation
    row["validation_logloss_std"] = spread
    row["pretraining"] = _pretraining(runs)
    row |= {kind: median(run[kind] for run in runs) for kind in _TIMES}
    row |= {name: mean_std(run[key] for run in runs)[0] for name, key in _MEANS.items()}
    row["device"] = "/".join(sorted({run["device"] for run in runs})) or None
    return row


def validation_logloss(run: Run) -> float:
    """Return the validation logloss of the best check, whose weights are the tested ones.

    >>> checks = [{"epoch": 0.25, "logloss": 0.5}, {"epoch": 0.5, "logloss": 0.4}]
    >>> validation_logloss({"validation": checks})
    0.4
    """
    return min(check["logloss"] for check in run["validation"])


def _pretraining(runs: Sequence[Run]) -> dict[str, float | None] | None:
    """Return the validation logloss and the epochs of the FM that FNN starts from, else None."""
    best = [
        min(checks, key=lambda check: check["logloss"])
        for run in runs
        if (checks := run.get("validation_pretraining"))
    ]
    if not best:
        return None
    return {
        "validation_logloss": mean_std(check["logloss"] for check in best)[0],
        "epochs": mean_std(check["epoch"] for check in best)[0],
    }


def _published(name: str) -> dict[str, dict[str, float]]:
    return {data: rows[name]._asdict() for data, rows in published.TABLE2.items()}


def _difference(
    runs: Sequence[Run], others: Sequence[Run], losses: Callable[[Run], Floats]
) -> Difference | None:
    """Return the difference over the seeds for which both systems have kept their losses.

    Returns None when there is no such seed, and for a system and itself.
    """
    other_by_seed = {run["seed"]: run for run in others if run.get("losses")}
    pairs = [
        (run, other_by_seed[run["seed"]])
        for run in runs
        if run.get("losses") and run["seed"] in other_by_seed
    ]
    if not pairs or runs is others:
        return None
    return paired_difference(
        np.stack([losses(run) for run, _ in pairs]),
        np.stack([losses(other) for _, other in pairs]),
    )


def order(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the systems that have a logloss, lowest first.

    >>> order({"LR": {"logloss": 0.5}, "FM": {"logloss": 0.4}, "FNN": {"logloss": None}})
    ['FM', 'LR']
    """
    scored = [name for name in rows if rows[name]["logloss"] is not None]
    return sorted(scored, key=lambda name: rows[name]["logloss"])


def machines(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return the machines and versions that the runs used, with the most used one first."""
    found = Counter(
        json.dumps({name: run[name] for name in ("machine", "version", "torch")}, sort_keys=True)
        for run in _finished(runs)
    )
    return [{**json.loads(machine), "runs": runs} for machine, runs in found.most_common()]


# -- Figure 6 ------------------------------------------------------------------------------------


def times(runs: Iterable[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return training times by device and system, from the machine that timed the most systems.

    A machine that timed LR comes before one that did not. `seconds` lasts until the best check and
    includes FNN's pre-training; `seconds_per_epoch` is one epoch. Each has the median over seeds,
    the least and the most.
    """
    by_machine: dict[str, dict[tuple[str, str], list[Run]]] = {}
    for run in _select(runs, "table2", "figure6"):
        timed = by_machine.setdefault(json.dumps(run["machine"], sort_keys=True), {})
        timed.setdefault((run["device"], title(run)), []).append(run)
    if not by_machine:
        return {}
    best = max(
        by_machine.values(), key=lambda timed: ("LR" in {name for _, name in timed}, len(timed))
    )
    devices = {device for device, _ in best}
    return {
        device: {name: _time(best[device, name]) for name in TITLES if (device, name) in best}
        for device in sorted(devices, key=lambda device: (device != "cpu", device))
    }


def _time(runs: Sequence[Run]) -> dict[str, Any]:
    time: dict[str, Any] = {"runs": len(runs)}
    for kind in ("seconds", "seconds_per_epoch"):
        seconds = [float(run[kind]) for run in runs]
        time[kind] = {
            "median": float(np.median(seconds)),
            "least": min(seconds),
            "most": max(seconds),
        }
    return time


def ratios_are_rough(times: Times) -> bool:
    """Return whether LR's epoch is so short that a multiple of it is only an order of magnitude."""
    lr = times.get("cpu", {}).get("LR")
    return lr is not None and lr["seconds_per_epoch"]["median"] < _ROUGH_SECONDS


def relative_times(times: Times, kind: str = "seconds") -> dict[str, dict[str, dict[str, float]]]:
    """Return |training time of a system| / |training time of LR| by device (Figure 6).

    The divisor is LR's median. `kind` is `seconds` or `seconds_per_epoch`. LR has no GPU code, so
    its time is always measured on a CPU. The result is empty without LR or without another system.

    >>> lr, fm = ({"seconds": {"median": seconds}} for seconds in (2.0, 3.0))
    >>> relative_times({"cpu": {"LR": lr, "FM": fm}})
    {'cpu': {'LR': {'median': 1.0}, 'FM': {'median': 1.5}}}
    """
    lr = times.get("cpu", {}).get("LR")
    if lr is None:
        return {}
    return {
        device: {
            name: {part: seconds / lr[kind]["median"] for part, seconds in time[kind].items()}
            for name, time in by_system.items()
        }
        for device, by_system in times.items()
        if set(by_system) - {"LR"}
    }


# -- Figures 7 to 11 -----------------------------------------------------------------------------


def study(runs: Iterable[Run], part: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return value -> system -> scores for one of Figures 7 to 11.

    Values keep the order in which their runs come.
    """
    by_value: dict[str, dict[str, list[Run]]] = {}
    for run in _select(runs, part):
        by_value.setdefault(str(run["value"]), {}).setdefault(title(run), []).append(run)
    return {
        value: {name: _study_point(found[name]) for name in TITLES if name in found}
        for value, found in by_value.items()
    }


def _study_point(runs: Sequence[Run]) -> dict[str, Any]:
    validation, spread = mean_std(map(validation_logloss, runs))
    return {
        **scores(runs),
        "validation_logloss": validation,
        "validation_logloss_std": spread,
        "runs": len(runs),
    }


def with_several_values(values: Study) -> dict[str, dict[str, Any]]:
    """Return a study without the systems that were run at one value only.

    The run at the default value may belong to Table 2 alone.

    >>> with_several_values({"relu": {"FNN": 1, "IPNN": 2}, "tanh": {"FNN": 3}})
    {'relu': {'FNN': 1}, 'tanh': {'FNN': 3}}
    """
    counts = Counter(name for points in values.values() for name in points)
    found = {
        value: {name: point for name, point in points.items() if counts[name] > 1}
        for value, points in values.items()
    }
    return {value: points for value, points in found.items() if points}


def best_values(values: Study) -> dict[str, str]:
    """Return the value at which each system's validation logloss is lowest.

    The test part takes no part in the choice.
    """
    best = {}
    for name in DEEP:
        loglosses = {
            value: points[name]["validation_logloss"]
            for value, points in values.items()
            if name in points
        }
        if loglosses:
            best[name] = min(loglosses, key=lambda value: loglosses[value])
    return best


# -- the stream ----------------------------------------------------------------------------------


def streaming(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """Return scores and speed of one pass that predicts each example before learning from it."""
    by_title = _by_title(_select(runs, "streaming"))
    return {name: _streaming_row(found) for name, found in by_title.items() if found}


def _streaming_row(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        **scores(runs),
        "last_half": {
            metric: mean_std(run["last_half"][metric] for run in runs)[0]
            for metric in ("auc", "logloss")
        },
        "seconds": mean_std(run["seconds"] for run in runs)[0],
        "examples_per_second": mean_std(run["examples_per_second"] for run in runs)[0],
        "runs": len(runs),
        "device": runs[0]["device"],
        "minus_deepfm": runs[0].get("paired") if len(runs) == 1 else None,
    }


# -- missing runs --------------------------------------------------------------------------------


def failures(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return the runs that failed, each with its error."""
    return [
        {
            "part": run["part"],
            "value": run.get("value"),
            "system": title(run),
            "seed": run.get("seed"),
            "error": str(run["failed"]),
        }
        for run in runs
        if run.get("failed")
    ]


def missing(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each part of the report, or point of it, that no run gives."""
    found = _missing_systems("Table 2", _by_title(_select(runs, "table2")))
    for part in STUDIES:
        found += _missing_points(runs, part)
    return found + _missing_systems("Streaming", _by_title(_select(runs, "streaming")))


def _missing_points(runs: Sequence[Run], part: str) -> list[str]:
    name = f"Figure {part.removeprefix('figure')}"
    values = study(runs, part)
    if not values:
        return [f"{name}: not run."]
    absent = [value for value in published.VALUES[part] if value not in values]
    found = [f"{name}: not run at {', '.join(absent)}."] if absent else []
    ran = [system for system in DEEP if any(system in points for points in values.values())]
    found += _missing_systems(name, {system: system in ran for system in DEEP})
    for value, points in values.items():
        found += _missing_systems(
            f"{name}, {value}", {system: points.get(system) for system in ran}
        )
    return found


def _missing_systems(part: str, found: Mapping[str, object]) -> list[str]:
    absent = [name for name, runs in found.items() if not runs]
    if len(absent) == len(found):
        return [f"{part}: not run."]
    return [f"{part}: no run of {', '.join(absent)}."] if absent else []


def _finished(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if not run.get("failed")]


def _select(runs: Iterable[Run], *parts: str) -> list[Run]:
    return [run for run in _finished(runs) if run["part"] in parts]


def _by_title(runs: Iterable[Run]) -> dict[str, list[Run]]:
    by_title: dict[str, list[Run]] = {name: [] for name in TITLES}
    for run in runs:
        by_title[title(run)].append(run)
    return by_title
