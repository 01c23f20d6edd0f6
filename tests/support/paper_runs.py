"""Runs of `stream-ctr paper` with invented numbers, and the report that is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stream_ctr.models import MODELS
from stream_ctr.paper import facts, published, report

Run = dict[str, Any]

TITLES = ["LR", "FM", "FNN", "IPNN", "OPNN", "PNN*", "LR & DNN", "FM & DNN", "DeepFM"]
DEEP = [name for name in MODELS if name not in ("lr", "fm")]
TEST_EXAMPLES = 2000
LOGLOSS = {
    "lr": 0.4778,
    "fm": 0.4608,
    "fnn": 0.4574,
    "ipnn": 0.4532,
    "opnn": 0.4526,
    "pnn": 0.4505,
    "lr_dnn": 0.4567,
    "fm_dnn": 0.4538,
    "deepfm": 0.4508,
}
SECONDS = {
    "lr": 1.9,
    "fm": 14.0,
    "fnn": 160.0,
    "ipnn": 141.0,
    "opnn": 88.0,
    "pnn": 171.0,
    "lr_dnn": 79.0,
    "fm_dnn": 95.0,
    "deepfm": 82.0,
}
MACHINE = {"processor": "AMD EPYC 9R14", "cores": 2}

DATA: dict[str, Any] = {
    "name": "criteo_sample.txt",
    "format": "criteo",
    "impressions": 7200,
    "clicks": 1843,
    "ctr": 1843 / 7200,
    "fields": 39,
    "categorical": 26,
    "numeric": 13,
    "crosses": 0,
    "train": 5832,
    "validation": 648,
    "test": TEST_EXAMPLES,
    "split": "random",
    "best_possible_logloss": None,
    "constant_logloss": 0.5689,
    "simulated": None,
    "numeric_encoding": facts.numeric_encoding(
        {"numeric_encoding": "buckets", "buckets_per_octave": 2.0}
    ),
    "whole": facts.public_log_note("criteo", 7200),
    "notes": ["3 events were no events"],
}
SIMULATED: dict[str, Any] = {
    **DATA,
    "name": "the simulated app store",
    "format": "simulated",
    "simulated": 7,
    "best_possible_logloss": 0.4489,
    "whole": None,
    "impressions": 1_000_000,
}
MADE: dict[str, Any] = {
    "command": "stream-ctr paper --data criteo_sample.txt --format criteo --out report",
    "quick": False,
    "seeds": 3,
    "study_seeds": 2,
    "device": "cpu",
    "accelerator": None,
    "python": "3.11.7",
    "settings": {
        "dropout": 0.5,
        "hidden": [400, 400, 400],
        "batch_size": 128,
        "epochs": 10,
        "embedding_dim": 10,
        "table_bits": 20,
        "table_optimizer": "adam",
        "dense_learning_rate": 0.001,
        "precision": "bfloat16",
        "ftrl": {"alpha": 0.1, "beta": 1.0},
        "streaming": {
            "table_optimizer": "adagrad",
            "dropout": 0.0,
            "hidden": [64, 32],
            "batch_size": 128,
            "pretrain_examples": 720,
        },
    },
    "seconds_total": 5321.0,
}


def checks(best: float) -> list[dict[str, float]]:
    """Return the checks of a training that is best after three quarters of an epoch."""
    return [
        {"epoch": 0.25 * i, "auc": 0.79, "logloss": best + 0.001 * abs(i - 3)} for i in range(1, 6)
    ]


def outcome(system: str, seed: int, rng: np.random.Generator, **changes: Any) -> Run:
    """Return the outcome of a training, with noise from `rng`."""
    logloss = LOGLOSS[system] + 0.0006 * float(rng.standard_normal())
    found = {
        "system": system,
        "seed": seed,
        "activation": MODELS[system].activation,
        "dropout": 0.5,
        "hidden": [400, 400, 400],
        "batch_size": 128,
        "epochs": 1.25,
        "best_epoch": 0.75,
        "auc": 1.157 - 0.79 * logloss,
        "logloss": logloss,
        "train_logloss": logloss - 0.01,
        "validation": checks(logloss + 0.002),
        "machine": MACHINE,
        "version": "0.1.0",
        "torch": "2.13.0",
        "seconds": SECONDS[system] * (1 + 0.05 * float(rng.random())),
        "device": "cpu",
        "seconds_pretraining": 14.0 if system == "fnn" else 0.0,
        "seconds_per_epoch": SECONDS[system] / 2,
        "examples_per_second": 4e6 / SECONDS[system],
        "parameters": 1 if system == "lr" else 477_000,
    }
    if system == "fnn":
        found["validation_pretraining"] = checks(0.461)
    return found | changes


def table2_run(system: str, seed: int, **changes: Any) -> Run:
    """Return a run of Table 2."""
    found = outcome(system, seed, np.random.default_rng(0))
    return {"part": "table2", "value": "", **found, **changes}


def all_runs(out: Path, *, seeds: int = 3, study_seeds: int = 2) -> list[Run]:
    """Return runs of all parts, systems and values, and write their test losses below `out`."""
    rng = np.random.default_rng(7)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    shared_losses = rng.exponential(0.3, TEST_EXAMPLES)
    found = []
    for seed in range(seeds):
        for system in MODELS:
            run = outcome(system, seed, rng)
            noise = 0.02 * rng.standard_normal(TEST_EXAMPLES)
            losses = shared_losses + run["logloss"] - shared_losses.mean() + noise
            run["losses"] = f"runs/{system}-{seed}.npy"
            np.save(out / run["losses"], losses.astype(np.float32))
            found.append({"part": "table2", "value": "", **run})
    found += [_streaming_run(system, rng) for system in MODELS]
    for part, values in published.VALUES.items():
        for value in values:
            found += [
                {"part": part, "value": value, **outcome(system, seed, rng)}
                for seed in range(study_seeds)
                for system in DEEP
            ]
    return found


def _streaming_run(system: str, rng: np.random.Generator) -> Run:
    run = outcome(system, 0, rng)
    paired = {
        "logloss_difference": run["logloss"] - 0.4508,
        "low": run["logloss"] - 0.4512,
        "high": run["logloss"] - 0.4504,
    }
    last_half = {"auc": 0.79, "logloss": 0.46}
    return {"part": "streaming", "value": "", **run, "last_half": last_half, "paired": paired}


def select(runs: list[Run], *parts: str) -> list[Run]:
    """Return the runs of these parts."""
    return [run for run in runs if run["part"] in parts]


def write_report(
    out: Path, runs: list[Run], data: Mapping[str, Any] = DATA, **made: Any
) -> dict[str, Any]:
    """Write the report of these runs into `out` and return the content of report.json."""
    return report.write(out, runs, data=data, made=MADE | made)
