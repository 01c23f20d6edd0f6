"""A published snapshot of a large table, on which chains of deltas begin."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.environments import ROOT
from stream_ctr.learn.learner import Learner, make_learner
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import read_pointer

STREAM_CTR = [sys.executable, "-m", "stream_ctr"]
# DeepFM alone: the tables of the other models of a blend would not fit beside one of 2^26 rows.
ALONE = (
    *("model.name=deepfm", "ftrl.enabled=false", "baseline.enabled=false"),
    *("metrics.served_share=0", "metrics.field_health=false"),
)
STEM = snapshot.stems()[0]


def options_of(pairs: Sequence[str]) -> list[str]:
    return [word for pair in pairs for word in ("-X", pair)]


def publish(state: Path, source: Sequence[str], bits: int) -> None:
    """Publish a snapshot of DeepFM with 2 ** `bits` rows that has learned what `source` names."""
    command = [*STREAM_CTR, "run", *source, "--state", str(state), "--until-end"]
    command += options_of([*ALONE, f"model.table_bits={bits}"])
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def published_learner(state: Path) -> Learner:
    """Return a learner with the published weights, which notes the rows that it touches."""
    pointer = read_pointer(state / "latest.json")
    assert pointer, f"nothing is published in {state}"
    manifest, tensors = snapshot.load(state / "snapshots" / pointer.snapshot, stems=(STEM,))
    learner = make_learner(manifest.specs[manifest.published], device="cpu")
    learner.load_weights(tensors[STEM])
    learner.track_touched()
    assert learner.touched is not None
    learner.touched.take()
    return learner


def random_rows(rng: np.random.Generator, bits: int, rows: int) -> npt.NDArray[np.uint32]:
    """Return distinct rows anywhere in a table, ascending."""
    chosen = rng.choice(1 << bits, min(rows, 1 << bits), replace=False)
    return np.sort(chosen).astype(np.uint32)


def now_ms() -> int:
    return int(time.time() * 1000)
