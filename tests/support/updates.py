"""Changes to served models: random ones, and what they make of the weights of a snapshot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.learn.ftrl import served_values
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.network_shape import network_shape
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State
from support.dense import dense_spec, learned

PAIRS = {"columns": [[0, 0], [1, 1], [0, 1], [2, 4]], "table_bits": 9}


def served_spec(model: str, **changes: Any) -> LearnerSpec:
    """Return a small specification; "lr_pairs" is LR over pairs of fields."""
    small = {"table_bits": 8, "batch_size": 32, "hidden": [8, 4], **changes}
    if model == "lr_pairs":
        return dense_spec("lr", **{**small, "pairs": PAIRS})
    return dense_spec(model, **small)


def first_weights(spec: LearnerSpec) -> State:
    """Return the weights of a model that has learned."""
    if spec.model != "lr":
        return learned(spec)[1]
    learner = make_learner(spec)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1 << spec.table_bits, (50, spec.fields)).astype(np.int32)
    learner.learn(ids, rng.integers(0, 2, 50).astype(np.uint8), np.ones((50, 1), np.float32))
    return learner.weights()


def random_changes(
    spec: LearnerSpec, weights: State, *, seed: int, share: float = 0.2
) -> tuple[State, State]:
    """Return changes to a `share` of the rows, and the weights of a snapshot taken after them."""
    rng = np.random.default_rng(seed)
    if spec.model == "lr":
        return _linear_changes(spec, weights, rng, share)
    width = network_shape(spec).width
    rows = _some_rows(len(weights["table"]), rng, share)
    values = rng.normal(0.0, 0.3, (len(rows), width + 1)).astype(np.float32)
    table = weights["table"].copy()
    table[rows, : width + 1] = values
    dense = {
        name: np.asarray(rng.normal(0.0, 0.4, array.shape), np.float32)
        for name, array in weights.items()
        if name.startswith("dense.")
    }
    if "dense.network" in dense:
        dense["dense.network"] = np.asarray(rng.integers(0, 2), np.float32)
    after: State = {**weights, "table": table, **dense}
    changes: State = {"rows": rows, "values": values, **dense}
    if "intercept" in weights:
        w0 = np.float32(rng.normal())
        after["intercept"] = np.array([w0, 2.0])
        changes["intercept"] = np.array([w0], np.float32)
    return changes, after


def _linear_changes(
    spec: LearnerSpec, weights: State, rng: np.random.Generator, share: float
) -> tuple[State, State]:
    size = 1 << (spec.pairs.table_bits if spec.pairs else spec.table_bits)
    rows = _some_rows(size, rng, share)
    pairs = np.column_stack([rng.normal(0.0, 5.0, len(rows)), rng.uniform(0.0, 9.0, len(rows))])
    pairs[:3, 0] = 0.0  # a weight may go back to 0
    table = np.zeros((size, 2))
    table[weights["rows"]] = weights["pairs"]
    table[rows] = pairs
    learned_rows = np.flatnonzero((table != 0).any(axis=1)).astype(np.int32)
    intercept = np.array([rng.normal(), 3.0])
    values, w0 = served_values(spec, pairs, intercept)
    after: State = {"rows": learned_rows, "pairs": table[learned_rows], "intercept": intercept}
    return {"rows": rows, "values": values, "intercept": np.array([w0])}, after


def _some_rows(size: int, rng: np.random.Generator, share: float) -> npt.NDArray[np.uint32]:
    return np.flatnonzero(rng.random(size) < share).astype(np.uint32)
