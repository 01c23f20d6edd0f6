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


def write_served(root: Path, *, seed: int = 0, sign: Sign | None = None, **changes: Any) -> Path:
    """Write a snapshot of `deepfm`, whose weights depend on the seed, and of `ftrl`."""
    published = NetworkLearner(structs.replace(LEARNER, seed=seed), device="cpu")
    ftrl = make_learner(MANIFEST.beside["ftrl"])
    ids = np.array([[1, 2, 3, 4], [1, 5, 3, 6]], np.int32)
    ftrl.learn(ids, np.array([1, 0], np.uint8), np.ones((2, 1), np.float32))
    tensors = {"model": published.weights(), "ftrl.model": ftrl.weights()}
    return snapshot.write(root, tensors=tensors, manifest=manifest(**changes), sign=sign)


def publish(path: Path, **changes: Any) -> Pointer:
    """Point `latest.json` of the state directory at the snapshot, with these fields changed."""
    pointer = structs.replace(pointer_for(path, snapshot.verify(path)), **changes)
    write_pointer(path.parent.parent / "latest.json", pointer)
    return pointer


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A snapshot that can be served."""
    return write_served(tmp_path / "snapshots")
