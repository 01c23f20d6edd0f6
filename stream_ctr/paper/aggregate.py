"""Runs to the numbers of a report: means and spreads over seeds, paired differences, relative times. Nothing is read or written here.

A run is a dictionary: `part` (of the report) and `value` (of the factor that the part is about), and what came of it. A run that
`failed` says why; it counts nowhere, and is named.
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
Report = Mapping[str, Any]  # what report.json holds

STUDIES = tuple(published.VALUES)
DEEP = tuple(system.title for system in MODELS.values() if system.high_order)
TITLES = tuple(system.title for system in MODELS.values())
_ROUGH_SECONDS = 0.1


def title(run: Run) -> str:
    """The paper's name of the run's system."""
    return MODELS[run["system"]].title


def mean_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values for it.

    >>> mean_std([1.0, 2.0, 3.0]), mean_std([0.5]), mean_std([])
    ((2.0, 1.0), (0.5, None), (None, None))
    """
    found = np.array(list(values), np.float64)
    return (float(found.mean()) if len(found) else None), (
        float(found.std(ddof=1)) if len(found) > 1 else None
    )


def median(values: Iterable[float]) -> float | None:
    """Of times: one that was disturbed does not move it. None without any.

    >>> median([1.0, 2.0, 60.0]), median([])
    (2.0, None)
    """
    found = list(values)
    return float(np.median(found)) if found else None


def scores(runs: Sequence[Run]) -> dict[str, float | None]:
    """`auc`, `auc_std`, `logloss`, `logloss_std` over these runs."""
    told: dict[str, float | None] = {}
    for metric in ("auc", "logloss"):
        told[metric], told[f"{metric}_std"] = mean_std(run[metric] for run in runs)
    return told


def table2(runs: Iterable[Run], losses: Callable[[Run], Floats]) -> dict[str, dict[str, Any]]:
    """A row for each of the nine, with None where no run says anything. `losses` gives a run's test losses [n]."""
    by_title = _by_title(_of_part(runs, "table2"))
    return {
        name: {
            **_row(found),
            "published": _published(name),
            "minus_deepfm": _minus(found, by_title["DeepFM"], losses),
            "minus_lr": _minus(found, by_title["LR"], losses),
        }
        for name, found in by_title.items()
    }


def _row(runs: Sequence[Run]) -> dict[str, Any]:
    told: dict[str, Any] = {
        **scores(runs),
        "runs": len(runs),
        "seeds": sorted(run["seed"] for run in runs),
    }
    told["validation_logloss"], told["validation_logloss_std"] = mean_std(
        map(validation_logloss, runs)
    )
    told["pretraining"] = _pretraining(runs)
    told |= {kind: median(run[kind] for run in runs) for kind in _TIMES}
    told |= {name: mean_std(run[of_run] for run in runs)[0] for name, of_run in _MEANS.items()}
    return {**told, "device": "/".join(sorted({run["device"] for run in runs})) or None}


_TIMES = ("seconds", "seconds_pretraining", "seconds_per_epoch", "examples_per_second")
_MEANS = {
    "epochs": "best_epoch",
    "epochs_trained": "epochs",
    "parameters": "parameters",
    "train_logloss": "train_logloss",
}


def validation_logloss(run: Run) -> float:
    """That of the weights which were tested: the best check's.

    >>> validation_logloss({"validation": [{"epoch": 0.25, "logloss": 0.5}, {"epoch": 0.5, "logloss": 0.4}]})
    0.4
    """
    return min(check["logloss"] for check in run["validation"])


def _pretraining(runs: Sequence[Run]) -> dict[str, float | None] | None:
    """Validation logloss and epochs of the FM that FNN began as; None of what has begun as nothing."""
    best = [
        min(found, key=lambda check: check["logloss"])
        for run in runs
        if (found := run.get("validation_pretraining"))
    ]
    if not best:
        return None
    return {
        "validation_logloss": mean_std(check["logloss"] for check in best)[0],
        "epochs": mean_std(check["epoch"] for check in best)[0],
    }


def _published(name: str) -> dict[str, dict[str, float]]:
    return {data: rows[name]._asdict() for data, rows in published.TABLE2.items()}


def _minus(
    runs: Sequence[Run], others: Sequence[Run], losses: Callable[[Run], Floats]
) -> Difference | None:
    """Over the seeds that both have, and only where both kept their losses; None of a system and itself."""
    of_seed = {run["seed"]: run for run in others if run.get("losses")}
    both = [
        (run, of_seed[run["seed"]]) for run in runs if run.get("losses") and run["seed"] in of_seed
    ]
    if not both or runs is others:
        return None
    return paired_difference(
        np.stack([losses(run) for run, _ in both]), np.stack([losses(other) for _, other in both])
    )


def order(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The systems that have a logloss, the lowest first."""
    return sorted(
        (name for name in rows if rows[name]["logloss"] is not None),
        key=lambda name: rows[name]["logloss"],
    )


def machines(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Where the runs were done and with which versions, most runs first."""
    found = Counter(
        json.dumps({name: run[name] for name in ("machine", "version", "torch")}, sort_keys=True)
        for run in _ended(runs)
    )
    return [{**json.loads(where), "runs": count} for where, count in found.most_common()]


def times(runs: Iterable[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """Training times by device and system, of one machine: the one that timed the most systems.

    `seconds` until the best check, FNN's pre-training included, and `seconds_per_epoch`; of each the median over seeds, least and most.
    """
    found: dict[str, dict[tuple[str, str], list[Run]]] = {}
    for run in _of_part(runs, "table2", "figure6"):
        found.setdefault(json.dumps(run["machine"], sort_keys=True), {}).setdefault(
            (run["device"], title(run)), []
        ).append(run)
    if not found:
        return {}
    timed = max(found.values(), key=lambda of: ("LR" in {name for _, name in of}, len(of)))
    return {
        device: {name: _time(timed[device, name]) for name in TITLES if (device, name) in timed}
        for device in sorted(
            {device for device, _ in timed}, key=lambda device: (device != "cpu", device)
        )
    }


def _time(runs: Sequence[Run]) -> dict[str, Any]:
    told: dict[str, Any] = {"runs": len(runs)}
    for kind in ("seconds", "seconds_per_epoch"):
        taken = [float(run[kind]) for run in runs]
        told[kind] = {"median": float(np.median(taken)), "least": min(taken), "most": max(taken)}
    return told


def rough(times: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether LR's epoch takes so little that a multiple of it is an order of magnitude and no more."""
    of_lr = times.get("cpu", {}).get("LR")
    return of_lr is not None and of_lr["seconds_per_epoch"]["median"] < _ROUGH_SECONDS


def relative_times(
    times: Mapping[str, Mapping[str, Any]], kind: str = "seconds"
) -> dict[str, dict[str, dict[str, float]]]:
    """Figure 6: |training time of a system| / |training time of LR|, by device; the latter is LR's median. `kind` may be
    `seconds_per_epoch`. LR has no GPU code: its time is always a CPU's. Empty without LR and without others.

    >>> lr, fm = ({"seconds": {"median": s}, "seconds_per_epoch": {"median": s}} for s in (2.0, 3.0))
    >>> relative_times({"cpu": {"LR": lr, "FM": fm}})
    {'cpu': {'LR': {'median': 1.0}, 'FM': {'median': 1.5}}}
    """
    of_lr = times.get("cpu", {}).get("LR")
    if of_lr is None:
        return {}
    return {
        device: {
            name: {part: spent / of_lr[kind]["median"] for part, spent in time[kind].items()}
            for name, time in of.items()
        }
        for device, of in times.items()
        if set(of) - {"LR"}
    }


def study(runs: Iterable[Run], part: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures 7 to 11: value -> system -> scores, values in the order in which the runs came."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in _of_part(runs, part):
        found.setdefault(str(run["value"]), {}).setdefault(title(run), []).append(run)
    return {
        value: {name: _study_point(of[name]) for name in TITLES if name in of}
        for value, of in found.items()
    }


def _study_point(runs: Sequence[Run]) -> dict[str, Any]:
    validation, spread = mean_std(map(validation_logloss, runs))
    return {
        **scores(runs),
        "validation_logloss": validation,
        "validation_logloss_std": spread,
        "runs": len(runs),
    }


def compared(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of a study, the systems that were run at more than one value: the default's may be there from Table 2 alone.

    >>> compared({"relu": {"FNN": 1, "IPNN": 2}, "tanh": {"FNN": 3}})
    {'relu': {'FNN': 1}, 'tanh': {'FNN': 3}}
    """
    counts = Counter(name for of in values.values() for name in of)
    found = {
        value: {name: point for name, point in of.items() if counts[name] > 1}
        for value, of in values.items()
    }
    return {value: of for value, of in found.items() if of}


def chosen(values: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Of a study, the value at which each system's validation logloss is the lowest: the test part chooses nothing."""
    best = {}
    for name in DEEP:
        found = {
            value: of[name]["validation_logloss"] for value, of in values.items() if name in of
        }
        if found:
            best[name] = min(found, key=lambda value: found[value])
    return best


def streaming(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """One pass over the log, each example predicted before it is learned."""
    told: dict[str, dict[str, Any]] = {}
    for name, of in _by_title(_of_part(runs, "streaming")).items():
        last = {
            metric: mean_std(run["last_half"][metric] for run in of)[0]
            for metric in ("auc", "logloss")
        }
        speed = {
            kind: mean_std(run[kind] for run in of)[0]
            for kind in ("seconds", "examples_per_second")
        }
        if of:
            told[name] = {**scores(of), "last_half": last, **speed, "runs": len(of), "device": of[0]["device"],
                          "minus_deepfm": of[0].get("paired") if len(of) == 1 else None}  # fmt: skip
    return told


def failures(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The runs that failed, and why."""
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
    """What the report should have and no run gives, in words."""
    told = _lacking("Table 2", list(_by_title(_of_part(runs, "table2")).items()))
    for part in STUDIES:
        name, values = f"Figure {part.removeprefix('figure')}", study(runs, part)
        if not values:
            told.append(f"{name}: not run.")
        elif absent := [value for value in published.VALUES[part] if value not in values]:
            told.append(f"{name}: not run at {', '.join(absent)}.")
        ran = [system for system in DEEP if any(system in of for of in values.values())]
        told += _lacking(name, [(system, system in ran) for system in DEEP]) if values else []
        for value, of in values.items():
            told += _lacking(f"{name}, {value}", [(system, of.get(system)) for system in ran])
    return told + _lacking("Streaming", list(_by_title(_of_part(runs, "streaming")).items()))


def _lacking(where: str, found: Sequence[tuple[str, object]]) -> list[str]:
    absent = [name for name, of in found if not of]
    if len(absent) == len(found):
        return [f"{where}: not run."]
    return [f"{where}: no run of {', '.join(absent)}."] if absent else []


def _ended(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if not run.get("failed")]


def _of_part(runs: Iterable[Run], *parts: str) -> list[Run]:
    return [run for run in _ended(runs) if run["part"] in parts]


def _by_title(runs: Iterable[Run]) -> dict[str, list[Run]]:
    by_title: dict[str, list[Run]] = {name: [] for name in TITLES}
    for run in runs:
        by_title[title(run)].append(run)
    return by_title
