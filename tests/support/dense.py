"""Models with weights that matter: logits of either sign, of about the size that clicks give."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.learn.learner import Learner, make_learner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State
from support.learners import learner_spec

FIELDS = 6
CROSSES = 2
OPTIONS = {
    "fields": FIELDS,
    "crosses": CROSSES,
    "value_fields": [2],
    "embedding_dim": 5,
    "hidden": [32, 16, 8],
    "table_bits": 10,
    "batch_size": 256,
}


def dense_spec(model: str, **changes: Any) -> LearnerSpec:
    """Return a specification with several fields, cross products and a field with a value."""
    return learner_spec(model, **{**OPTIONS, **changes})


def learned(spec: LearnerSpec, *, seed: int = 0) -> tuple[Learner, State]:
    """Return a learner with random weights as large as those of a trained one, and the weights."""
    rng = np.random.default_rng(seed)
    learner = make_learner(spec, device="cpu", threads=1)
    weights = learner.weights()
    for name, array in weights.items():
        if name == "table":
            width = learner.table.width + 1  # type: ignore[attr-defined]
            scale = 0.7 / np.sqrt(spec.embedding_dim)
            array[:, :width] = rng.normal(0.0, scale, (len(array), width))
        elif name == "intercept":
            array[:] = -0.7, 3.0
        elif name != "dense.network":
            fan_in = array.shape[-1] if array.ndim == 2 else 4
            array[...] = rng.normal(0.0, 1.4 / np.sqrt(fan_in), array.shape)
    learner.load_weights(weights)
    return learner, weights


def examples(
    spec: LearnerSpec, n: int, *, seed: int = 1
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return random ids [n, F + C] and values [n, V]."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1 << spec.table_bits, (n, spec.fields + spec.crosses)).astype(np.int32)
    return ids, rng.uniform(-1.0, 2.0, (n, len(spec.value_fields))).astype(np.float32)
