"""What a report says of the data it is about and of how it was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stream_ctr.logs.log import Log
from stream_ctr.logs.simulate import Simulation
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, about_test
from stream_ctr.paper.plan import Plan

# Rows of the public sets, as their challenges gave them out for training.
_WHOLE: Mapping[str, tuple[str, int]] = {
    "criteo": ("Criteo", 45_840_617),
    "avazu": ("Avazu", 40_428_967),
}
_NOT_TOLD = ("pretrain_examples", "threads", "progressive", "fields", "crosses", "value_fields")


def of_data(log: Log, made: Plan) -> dict[str, Any]:
    """Sizes, the split, and what loglosses are to be compared with."""
    data, split = made.data, made.split
    identity = data.about["identity"]
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
        "crosses": data.about["hashed"]["crosses"],
        "train": split.count(TRAINING),
        "validation": split.count(VALIDATION),
        "test": split.count(TEST),
        "split": made.wishes.split,
        **about_test(data, split),
        "simulated": log.seed if isinstance(log, Simulation) else None,
        "numeric_encoding": encoded(identity["hashing"]) if "numeric" in kinds else None,
        "whole": whole(log.format, len(data)),
        "notes": [*data.about["notes"], *_of_studies(made)],
    }


def whole(format: str, impressions: int) -> str | None:
    """How long the public log is that has this format, where this one is shorter: it may be a part of it or somebody else's.

    >>> whole("criteo", 7200), whole("criteo", 45_840_617)
    ("The log is in Criteo's format and has 7,200 rows; the training set of Criteo's challenge has 45,840,617.", None)
    """
    name, rows = _WHOLE.get(format, ("", 0))
    if impressions >= rows:
        return None
    return f"The log is in {name}'s format and has {impressions:,} rows; the training set of {name}'s challenge has {rows:,}."


def encoded(hashing: Mapping[str, Any]) -> str:
    """How a number becomes an id of the table.

    >>> encoded({"numeric_encoding": "buckets", "buckets_per_octave": 2.0})
    'hashed by logarithmic bucket, 2 an octave'
    """
    return {
        "buckets": f"hashed by logarithmic bucket, {hashing['buckets_per_octave']:g} an octave",
        "value": "one row of the table a field, times the value",
        "log_value": "one row of the table a field, times sign(x) log(1 + |x|)",
    }[hashing["numeric_encoding"]]


def _of_studies(made: Plan) -> list[str]:
    """Where they train on less than Table 2 does."""
    if made.split.count(TRAINING) <= made.wishes.study_rows:
        return []
    return [f"figures 7 to 11 train on about {made.wishes.study_rows:,} rows of the training part"]


def of_making(made: Plan, command: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The command and what it set. `seconds_total` is of all runs, whenever and wherever they were done."""
    settings, stream = made.settings, made.stream
    return {
        "command": command,
        "device": settings.device,
        "accelerator": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "python": platform.python_version(),
        "settings": {
            "dropout": settings.dropout, "hidden": list(settings.hidden), "batch_size": settings.batch_size, "epochs": settings.epochs,
            **{name: value for name, value in settings.learner.items() if name not in _NOT_TOLD},
            "pretraining": settings.learner["pretrain_examples"] > 0,
            "streaming": {
                "dropout": stream.dropout, "hidden": list(stream.hidden), "batch_size": stream.batch_size,
                **{name: stream.learner[name] for name in ("table_optimizer", "pretrain_examples")},
            },
        },
        "quick": made.wishes.quick,
        "seeds": made.wishes.seeds,
        "study_seeds": made.wishes.study_seeds,
        "seconds_total": sum({run["run"]: run["seconds_whole"] for run in runs}.values()),
    }  # fmt: skip
