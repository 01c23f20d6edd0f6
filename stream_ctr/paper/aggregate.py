"""Runs to the numbers of a report: means and spreads over seeds, paired differences, relative times. Nothing is read or written here.

A run is a dictionary: `part` (of the report) and `value` (of the factor that the part is about), and what came of it. A run that
`failed` says why; it counts nowhere, and is named.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.models import MODELS
from stream_ctr.paper import published

Run = Mapping[str, Any]
Floats = npt.NDArray[np.floating]
Difference = dict[str, float | int | None]

STUDIES = ("figure7", "figure8", "figure9", "figure10", "figure11")
DEEP = tuple(system.title for system in MODELS.values() if system.high_order)
TITLES = tuple(system.title for system in MODELS.values())
_BLOCKS = 128
_BLOCKS_LEAST = 10
_DRAWS = 10_000


def title(run: Run) -> str:
    """The paper's name of the run's system."""
    return MODELS[run["system"]].title


def mean_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values for it.

    >>> mean_std([1.0, 2.0, 3.0]), mean_std([0.5]), mean_std([])
    ((2.0, 1.0), (0.5, None), (None, None))
    """
    found = np.array(list(values), np.float64)
    return (float(found.mean()) if len(found) else None), (float(found.std(ddof=1)) if len(found) > 1 else None)


def scores(runs: Sequence[Run]) -> dict[str, float | None]:
    """`auc`, `auc_std`, `logloss`, `logloss_std` over these runs."""
    told: dict[str, float | None] = {}
    for metric in ("auc", "logloss"):
        told[metric], told[f"{metric}_std"] = mean_std(run[metric] for run in runs)
    return told


def paired_difference(losses: Floats, reference: Floats) -> Difference:
    """Mean loss of a system less that of another on the same test examples, and a 95 % interval for both kinds of chance.

    `losses` and `reference` are [S, n]: S seeds, n test examples in their order. Each of 10,000 draws takes blocks of neighbouring examples
    with replacement - another test part might have been drawn - and adds the error of a mean over S seeds, which has Student's t
    distribution with S - 1 degrees of freedom: three seeds are few, and the interval says so. With one seed it holds the test examples
    alone. No bounds below ten examples.

    >>> once, twice = np.full((3, 100), 0.25), np.full((3, 100), 0.75)
    >>> paired_difference(twice, once)
    {'logloss_difference': 0.5, 'low': 0.5, 'high': 0.5, 'seeds': 3}
    """
    seeds, examples = losses.shape
    blocks, counts = _blocks(losses, reference)
    difference = float(blocks.sum() / examples / seeds)
    told: Difference = {"logloss_difference": difference, "low": None, "high": None, "seeds": seeds}
    if len(counts) < _BLOCKS_LEAST:
        return told
    drawn = _draws(len(counts))
    errors = (drawn @ blocks.mean(axis=0)) / (drawn @ counts) - difference
    if seeds > 1:
        spread = (blocks.sum(axis=1) / examples).std(ddof=1) / math.sqrt(seeds)
        errors = errors + spread * np.random.default_rng(1).standard_t(seeds - 1, _DRAWS)
    low, high = (difference + np.quantile(errors, (0.025, 0.975))).tolist()
    return {**told, "low": low, "high": high}


def _blocks(losses: Floats, reference: Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums of differences [S, blocks] and how many examples each block has [blocks]."""
    examples = losses.shape[1]
    edges = np.linspace(0, examples, min(_BLOCKS, examples) + 1).astype(np.int64)
    sums = [np.add.reduceat(a.astype(np.float64) - b.astype(np.float64), edges[:-1]) for a, b in zip(losses, reference, strict=True)]
    return np.array(sums), np.diff(edges).astype(np.float64)


@lru_cache(maxsize=2)
def _draws(blocks: int) -> npt.NDArray[np.float64]:
    """How often each block is drawn [draws, blocks]: every system is compared on the same draws."""
    return np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), size=_DRAWS).astype(np.float64)


def table2(runs: Iterable[Run], losses: Callable[[Run], Floats]) -> dict[str, dict[str, Any]]:
    """A row for each of the nine, with None where no run says anything. `losses` gives a run's test losses [n]."""
    by_title = _by_title(_of_part(runs, "table2"))
    of_deepfm = {run["seed"]: run for run in by_title["DeepFM"]}
    rows = {}
    for name in TITLES:
        found = by_title[name]
        difference = None if name == "DeepFM" else _minus([(run, of_deepfm.get(run["seed"])) for run in found], losses)
        rows[name] = {**_row(found), "published": _published(name), "minus_deepfm": difference}
    return rows


def _row(runs: Sequence[Run]) -> dict[str, Any]:
    told: dict[str, Any] = {**scores(runs), "runs": len(runs), "seeds": sorted(run["seed"] for run in runs)}
    kinds = {"seconds": "seconds", "seconds_pretraining": "seconds_pretraining", "seconds_per_epoch": "seconds_per_epoch",
             "epochs": "best_epoch", "examples_per_second": "examples_per_second", "parameters": "parameters",
             "train_logloss": "train_logloss"}  # fmt: skip
    for name, of_run in kinds.items():
        told[name] = mean_std(run[of_run] for run in runs if run.get(of_run) is not None)[0]
    return {**told, "device": "/".join(sorted({run["device"] for run in runs})) or None}


def _published(name: str) -> dict[str, dict[str, float]]:
    return {data: rows[name]._asdict() for data, rows in published.TABLE2.items()}


def _minus(pairs: Sequence[tuple[Run, Run | None]], losses: Callable[[Run], Floats]) -> Difference | None:
    """Over the seeds that both have, and only where both kept their losses."""
    both = [(mine, other) for mine, other in pairs if other is not None and mine.get("losses") and other.get("losses")]
    if not both:
        return None
    return paired_difference(np.stack([losses(mine) for mine, _ in both]), np.stack([losses(other) for _, other in both]))


def verdict(difference: Mapping[str, Any] | None) -> str:
    """Against DeepFM: `worse`, `better`, `same` where the interval holds zero, `unknown` without an interval."""
    if difference is None or difference["low"] is None:
        return "unknown"
    return "worse" if difference["low"] > 0 else "better" if difference["high"] < 0 else "same"


def order(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The systems that have a logloss, the lowest first."""
    return sorted((name for name in rows if rows[name]["logloss"] is not None), key=lambda name: rows[name]["logloss"])


def seconds(runs: Iterable[Run]) -> dict[str, dict[str, float]]:
    """Mean training time by device and system, until the best epoch, pre-training included."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in _of_part(runs, "table2", "figure6"):
        found[run["device"]][title(run)].append(run["seconds"])
    return {
        device: {name: float(np.mean(found[device][name])) for name in TITLES if name in found[device]}
        for device in sorted(found, key=lambda device: (device != "cpu", device))
    }


def relative_times(times: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Figure 6: |training time of a system| / |training time of LR|, by device. LR has no GPU code: its time is always a CPU's.

    >>> relative_times({"cpu": {"LR": 2.0, "FM": 3.0}, "cuda": {"FM": 1.0}})
    {'cpu': {'LR': 1.0, 'FM': 1.5}, 'cuda': {'FM': 0.5}}
    """
    told = {}
    for device, of in times.items():
        of_lr = of.get("LR", times.get("cpu", {}).get("LR"))
        if of_lr and (set(of) - {"LR"}):
            told[device] = {name: time / of_lr for name, time in of.items()}
    return told


def study(runs: Iterable[Run], part: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures 7 to 11: value -> system -> scores, values in the order in which the runs came."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in _of_part(runs, part):
        found.setdefault(str(run["value"]), {}).setdefault(title(run), []).append(run)
    return {value: {name: {**scores(of[name]), "runs": len(of[name])} for name in TITLES if name in of} for value, of in found.items()}


def streaming(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """One pass over the log, each example predicted before it is learned."""
    told: dict[str, dict[str, Any]] = {}
    for name, of in _by_title(_of_part(runs, "streaming")).items():
        last = {metric: mean_std(run["last_half"][metric] for run in of)[0] for metric in ("auc", "logloss")}
        speed = {kind: mean_std(run[kind] for run in of)[0] for kind in ("seconds", "examples_per_second")}
        if of:
            told[name] = {**scores(of), "last_half": last, **speed, "runs": len(of), "device": of[0]["device"],
                          "minus_deepfm": of[0].get("paired") if len(of) == 1 else None}  # fmt: skip
    return told


def failures(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The runs that failed, and why."""
    return [
        {"part": run["part"], "value": run.get("value"), "system": title(run), "seed": run.get("seed"), "error": str(run["failed"])}
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
        for value, of in values.items():
            told += _lacking(f"{name}, {value}", [(system, of.get(system)) for system in DEEP])
    return told + _lacking("Streaming", list(_by_title(_of_part(runs, "streaming")).items()))


def _lacking(where: str, found: Sequence[tuple[str, object]]) -> list[str]:
    absent = [name for name, of in found if not of]
    if len(absent) == len(found):
        return [f"{where}: not run."]
    return [f"{where}: no run of {', '.join(absent)}."] if absent else []


def _of_part(runs: Iterable[Run], *parts: str) -> list[Run]:
    return [run for run in runs if run["part"] in parts and not run.get("failed")]


def _by_title(runs: Iterable[Run]) -> dict[str, list[Run]]:
    by_title: dict[str, list[Run]] = {name: [] for name in TITLES}
    for run in runs:
        by_title[title(run)].append(run)
    return by_title
