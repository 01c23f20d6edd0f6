"""What a report says of the data it is about and of how it was made."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stream_ctr import __version__
from stream_ctr.history import Log
from stream_ctr.learner import choose_device
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, about_test
from stream_ctr.paper.plan import Plan
from stream_ctr.simulate import Simulation

# Rows of the public sets, as their challenges gave them out for training.
_WHOLE: Mapping[str, tuple[str, int]] = {"criteo": ("Criteo", 45_840_617), "avazu": ("Avazu", 40_428_967)}


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
        "sample_of": sample_of(log.format, len(data)),
        "notes": [*data.about["notes"], *_of_studies(made)],
    }


def sample_of(format: str, impressions: int) -> str | None:
    """
    >>> sample_of("criteo", 7200), sample_of("criteo", 45_840_617)
    ("a sample of 7,200 of Criteo's 45,840,617 rows", None)
    """
    name, rows = _WHOLE.get(format, ("", 0))
    return f"a sample of {impressions:,} of {name}'s {rows:,} rows" if impressions < rows else None


def _of_studies(made: Plan) -> list[str]:
    stops = {wanted.setting.stop for wanted in made.wanted if wanted.part.startswith("figure")} - {len(made.data)}
    return [f"figures 7 to 11 train on the first {made.wishes.study_rows:,} rows of the training part" for _ in stops]


def of_making(made: Plan, command: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings, machine and versions. `seconds_total` is of all runs, whenever they were done."""
    settings, stream = made.settings, made.stream
    return {
        "command": command,
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "device": choose_device(made.wishes.device).type,
        "accelerator": torch.cuda.get_device_name() if choose_device(made.wishes.device).type == "cuda" else None,
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "settings": {
            "dropout": settings.dropout, "hidden": list(settings.hidden), "batch_size": settings.batch_size, "epochs": settings.epochs,
            **{name: value for name, value in settings.learner.items() if name not in ("pretrain_examples", "threads", "progressive")},
            "streaming": {
                "dropout": stream.dropout, "hidden": list(stream.hidden), "batch_size": stream.batch_size,
                **{name: stream.learner[name] for name in ("table_optimizer", "pretrain_examples")},
            },
        },
        "quick": made.wishes.quick,
        "seeds": made.wishes.seeds,
        "study_seeds": made.wishes.study_seeds,
        "study_rows": made.wishes.study_rows,
        "table_bits": settings.learner["table_bits"],
        "seconds_total": sum({run["run"]: run["seconds_whole"] for run in runs}.values()),
    }  # fmt: skip


def _processor() -> str:
    """Its name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine()
    )
