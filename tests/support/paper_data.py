"""Logs, datasets and settings that the tests of `stream_ctr.paper` share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stream_ctr import config
from stream_ctr.config import Config
from stream_ctr.connectors.memory import BatchSource
from stream_ctr.logs.log import Log
from stream_ctr.logs.open import open_log
from stream_ctr.logs.simulate import Simulation
from stream_ctr.paper import plan, reading
from stream_ctr.paper.dataset import Dataset, Split
from stream_ctr.paper.experiment import Setting

SMALL = {"model": {"table_bits": 12, "embedding_dim": 4, "hidden": [8, 8]}}
# A float32 row of SMALL with Adam: 2 x 4 + 1 coordinates with two moments each, in lines of 16.
SMALL_ROW_FLOATS = 32


def read_dataset(
    log: Log, directory: Path, *, limit: int | None = None, configured: Config | None = None
) -> Dataset:
    """Return the dataset of a log, read with the configuration SMALL unless another is given."""
    return reading.read(
        log,
        BatchSource(lambda: (batch.value for batch in log.batches()), name=log.identity),
        configured or config.load(overrides=SMALL),
        directory,
        limit=limit,
        console=Console(quiet=True),
    )


def simulated_dataset(directory: Path) -> Dataset:
    """Return 6,000 simulated impressions."""
    return read_dataset(Simulation(6000, seed=2), directory)


def log_events(log: Log) -> Iterator[dict[str, Any]]:
    """Yield the events of a log as dictionaries."""
    for batch in log.batches():
        yield from (json.loads(value) for value in batch.value.to_pylist())


def write_criteo_log(path: Path, rows: int, *, seed: int = 0, bad: Sequence[int] = ()) -> Path:
    """Write a log in Criteo's format whose clicks depend on C1 only; lines in `bad` are cut."""
    rng = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        kind = int(rng.integers(4))
        label = int(rng.random() < 0.1 + 0.2 * kind)
        numbers = [str(int(n)) for n in rng.integers(0, 50, 13)]
        others = [f"{int(n):08x}" for n in rng.integers(0, 30, 25)]
        cells = [str(label), *numbers, f"{kind:08x}", *others]
        lines.append("\t".join(cells[:7] if row in bad else cells))
    path.write_text("\n".join(lines) + "\n")
    return path


def open_labelled(path: Path) -> Log:
    """Open a log in Criteo's format as `stream-ctr paper` does."""
    return open_log(path, format="criteo", click_delay_seconds=reading.CLICK_DELAY_SECONDS)


def paper_setting(data: Dataset, split: Split, system: str = "deepfm", **changes: Any) -> Setting:
    """Return the paper's setting with the configuration SMALL, four epochs and these changes."""
    options = plan.Options(epochs=4, device="cpu")
    setting = plan.make_paper_setting(data, split, config.load(overrides=SMALL), options)
    return replace(setting, system=system, **changes)


def stream_setting(data: Dataset, system: str) -> Setting:
    """Return the setting of a pass over a stream with the configuration SMALL."""
    options = plan.Options(device="cpu")
    setting = plan.make_stream_setting(data, config.load(overrides=SMALL), options)
    return replace(setting, system=system)
