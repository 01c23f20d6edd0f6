"""Snapshots that can be served: their arrays are those of small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Sign
from stream_ctr.snapshots.pointer import Pointer, pointer_for, write_pointer
from support.manifests import LEARNER, MANIFEST, manifest

ROWS: list[dict[str, object]] = [
    {"app": "maps", "age": 31, "os": "a"},
    {"app": "mail"},
    {"app": None, "age": 1.5},
    {"os": "b"},
]
"""Impressions with the fields of these snapshots."""


def write_served(root: Path, *, seed: int = 0, sign: Sign | None = None, **changes: Any) -> Path:
    """Write a snapshot of `deepfm`, whose weights depend on the seed, and of `ftrl`."""
    published = NetworkLearner(structs.replace(LEARNER, seed=seed), device="cpu")
    ftrl = make_learner(MANIFEST.beside["ftrl"])
    ids = np.array([[1, 2, 3, 4], [1, 5, 3, 6]], np.int32)
    ftrl.learn(ids, np.array([1, 0], np.uint8), np.ones((2, 1), np.float32))
    tensors = {"model": published.weights(), "ftrl.model": ftrl.weights()}
    return snapshot.write(root, tensors=tensors, manifest=manifest(**changes), sign=sign)


def write_blend(root: Path) -> Path:
    """Write a snapshot of the blend of a DeepFM, an FNN and an LR, and an FM beside it."""
    specs = {
        "deepfm": LEARNER,
        "fnn": structs.replace(LEARNER, model="fnn", pretrain_examples=100),
        "ftrl": structs.replace(LEARNER, model="lr"),
        "fm": structs.replace(LEARNER, model="fm"),
    }
    ids = np.arange(128, dtype=np.int32).reshape(32, 4) % 64
    tensors: snapshot.Tensors = {}
    for name, spec in specs.items():
        learner = make_learner(spec, device="cpu")
        for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
            learner.learn(ids[rows], np.arange(8).astype(np.uint8) % 2, np.ones((8, 1), np.float32))
        tensors[f"{name}.model"] = learner.weights()
    tensors["model"] = {"omega": np.array([0.4, 0.3, 0.2, 0.1]), "u": np.array([1, 0, 0, -0.5])}
    tensors["joiner"] = {"counters": np.zeros(3, np.int64)}
    described = structs.replace(
        manifest(),
        learner=__import__("msgspec").UNSET,
        blend=("deepfm", "fnn", "ftrl"),
        beside=specs,
    )
    return snapshot.write(root, tensors=tensors, manifest=described)


def publish(path: Path, **changes: Any) -> Pointer:
    """Point `latest.json` of the state directory at the snapshot, with these fields changed.

    Nothing but its manifest is looked at: what is damaged is published too.
    """
    pointer = structs.replace(pointer_for(path, snapshot.read_manifest(path)), **changes)
    write_pointer(path.parent.parent / "latest.json", pointer)
    return pointer


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A snapshot that can be served."""
    return write_served(tmp_path / "snapshots")
