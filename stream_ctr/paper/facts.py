"""Describe the data of a report and how the report was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stream_ctr.logs.log import Log
from stream_ctr.logs.simulate import Simulation
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, reference_loglosses
from stream_ctr.paper.plan import Plan

# Format -> name and number of rows of the training set that the public challenge distributed.
_PUBLIC_LOGS: Mapping[str, tuple[str, int]] = {
    "criteo": ("Criteo", 45_840_617),
    "avazu": ("Avazu", 40_428_967),
}
# Options of the learner that the report leaves out.
_OMITTED = ("pretrain_examples", "threads", "progressive", "fields", "crosses", "value_fields")


def data_facts(log: Log, plan: Plan) -> dict[str, Any]:
    """Return `data` of report.json: sizes, the split, and the loglosses to compare with."""
    data = plan.data
    split = plan.split
    identity = data.metadata["identity"]
    clicks = int(np.count_nonzero(data.labels))
    kinds = [kind for _, kind in identity["fields"]]
    return {
        "name": log.name if log.path is None else log.path.name,
        "format": log.format,
        "impressions": len(data),
        "clicks": clicks,
        "ctr": clicks / len(data),
        "fields": len(kinds),
        "categorical": kinds.count("categorical"),
        "numeric": kinds.count("numeric"),
        "crosses": data.metadata["hashed"]["crosses"],
        "train": split.count(TRAINING),
        "validation": split.count(VALIDATION),
        "test": split.count(TEST),
        "split": plan.options.split,
        **reference_loglosses(data, split),
        "simulated": log.seed if isinstance(log, Simulation) else None,
        "numeric_encoding": numeric_encoding(identity["hashing"]) if "numeric" in kinds else None,
        "whole": public_log_note(log.format, len(data)),
        "notes": [*data.metadata["notes"], *_study_notes(plan)],
    }


def public_log_note(log_format: str, impressions: int) -> str | None:
    """Return a note that the log is shorter than the public log of its format, else None.

    A shorter log may be a sample of the public one or a different log in the same format.

    >>> print(public_log_note("criteo", 7200))
    The log is in Criteo's format and has 7,200 rows; the training set of Criteo's challenge has \
45,840,617.
    >>> public_log_note("criteo", 45_840_617) is None
    True
    """
    name, rows = _PUBLIC_LOGS.get(log_format, ("", 0))
    if impressions >= rows:
        return None
    return (
        f"The log is in {name}'s format and has {impressions:,} rows; "
        f"the training set of {name}'s challenge has {rows:,}."
    )


def numeric_encoding(hashing: Mapping[str, Any]) -> str:
    """Return a phrase that says how a number becomes an id of the table.

    >>> numeric_encoding({"numeric_encoding": "buckets", "buckets_per_octave": 2.0})
    'hashed by logarithmic bucket, 2 per octave'
    """
    return {
        "buckets": f"hashed by logarithmic bucket, {hashing['buckets_per_octave']:g} per octave",
        "value": "one table row per field, multiplied by the value",
        "log_value": "one table row per field, multiplied by sign(x) log(1 + |x|)",
    }[hashing["numeric_encoding"]]


def _study_notes(plan: Plan) -> list[str]:
    """Return a note when Figures 7 to 11 train on fewer rows than Table 2."""
    rows = plan.options.study_rows
    if plan.split.count(TRAINING) <= rows:
        return []
    return [f"Figures 7 to 11 train on about {rows:,} rows of the training part"]


def run_facts(plan: Plan, command: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return `made` and `settings` of report.json: the command and the settings it used.

    `seconds_total` adds up all runs, including those of earlier commands and other machines.
    """
    device = plan.paper_setting.device
    return {
        "command": command,
        "device": device,
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "settings": _settings(plan),
        "quick": plan.options.quick,
        "seeds": plan.options.seeds,
        "study_seeds": plan.options.study_seeds,
        "seconds_total": sum({run["run"]: run["seconds_whole"] for run in runs}.values()),
    }


def _settings(plan: Plan) -> dict[str, Any]:
    paper = plan.paper_setting
    stream = plan.stream_setting
    return {
        "dropout": paper.dropout,
        "hidden": list(paper.hidden),
        "batch_size": paper.batch_size,
        "epochs": paper.epochs,
        **{name: value for name, value in paper.learner.items() if name not in _OMITTED},
        "pretraining": paper.learner["pretrain_examples"] > 0,
        "streaming": {
            "dropout": stream.dropout,
            "hidden": list(stream.hidden),
            "batch_size": stream.batch_size,
            "table_optimizer": stream.learner["table_optimizer"],
            "pretrain_examples": stream.learner["pretrain_examples"],
        },
    }
