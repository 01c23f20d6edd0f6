"""Small learners, and streams of examples for them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.learn.learner import Learner, make_learner
from stream_ctr.learn.linear_model import ServedLinear
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State

Ids = npt.NDArray[np.int32]
Labels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]


def learner_spec(model: str = "deepfm", **options: object) -> LearnerSpec:
    """Return the specification with these options; it is checked as one from a manifest is."""
    return msgspec.convert({"model": model, **options}, LearnerSpec)


def learner(
    model: str = "deepfm",
    *,
    device: str = "cpu",
    threads: int = 0,
    progressive: bool = True,
    **options: object,
) -> Learner:
    """Return a learner made by `make_learner`; `options` are those of `LearnerSpec`."""
    return make_learner(
        learner_spec(model, **options),
        device=device,
        threads=threads,
        progressive=progressive,
    )


def small_network(model: str = "deepfm", **changes: Any) -> NetworkLearner:
    """Return a network over three fields, with batches of 16."""
    options = {
        "fields": 3,
        "embedding_dim": 4,
        "hidden": [8, 8],
        "table_bits": 10,
        "batch_size": 16,
        "initial_scale": 0.3,
    }
    made = learner(model, **{**options, **changes})
    assert isinstance(made, NetworkLearner)
    return made


def random_batch(
    n: int = 16, *, fields: int = 3, seed: int = 0, rows: int = 1024
) -> tuple[Ids, Labels]:
    """Return random ids [n, F] and labels [n]."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, (n, fields)).astype(np.int32)
    return ids, rng.integers(0, 2, n).astype(np.uint8)


PLANTED_FIELDS = 4
_SMALL = {
    "fields": PLANTED_FIELDS,
    "embedding_dim": 4,
    "hidden": [16, 16],
    "table_bits": 8,
    "batch_size": 128,
    "initial_scale": 0.05,
}


def small_learner(model: str, **changes: Any) -> Any:
    """Return a learner for `planted_stream`, with batches of 128."""
    return learner(model, **{**_SMALL, **changes})


def served_lr(weights: State, **changes: Any) -> ServedLinear:
    """Return an LR that serves the weights of a `small_learner("lr")` with these changes."""
    return ServedLinear(learner_spec("lr", **{**_SMALL, **changes}), weights)


def planted_stream(examples: int, *, seed: int, crosses: int = 0) -> tuple[Ids, Labels]:
    """Return ids [n, F + crosses] and labels [n] with main effects and one interaction.

    Each of the four fields has four values. The interaction is between the last two fields.
    """
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, (examples, PLANTED_FIELDS))
    ids = values + 4 * np.arange(PLANTED_FIELDS)
    logits = np.array([-2.0, -1.0, 0.5, 1.5])[values[:, 0]]
    logits += np.array([1.0, -1.0, 0.0, 0.0])[values[:, 1]]
    logits += np.where((values[:, 2] + values[:, 3]) % 2 == 0, 1.0, -1.0)
    crossed = [16 + 16 * c + 4 * values[:, c] + values[:, c + 1] for c in range(crosses)]
    labels = rng.random(examples) < 1 / (1 + np.exp(-logits))
    return np.column_stack([ids, *crossed]).astype(np.int32), labels.astype(np.uint8)


def planted_batches(
    count: int, *, seed: int, crosses: int = 0, size: int = 128
) -> list[tuple[Ids, Labels]]:
    """Return `count` batches of `planted_stream`."""
    ids, labels = planted_stream(size * count, seed=seed, crosses=crosses)
    return list(zip(np.split(ids, count), np.split(labels, count), strict=True))


def logloss(logits: Floats, labels: Labels) -> float:
    """Return the mean log loss."""
    return float(np.logaddexp(0, np.where(labels == 1, -logits, logits)).mean())


def state_of(made: Learner) -> State:
    """Return weights and optimiser state as one dict."""
    return made.weights() | made.optimizer_state()


def assert_equal_states(first: State, second: State) -> None:
    """Assert that two states are equal bit for bit."""
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert np.array_equal(array, second[name], equal_nan=True), name
