"""Sharded networks on several ranks, and the same steps in one process to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.sharded_learner import NETWORK_MAKER, ShardedLearner
from stream_ctr.learn.tensors import State
from support.learners import learner_spec, random_batch

Array = npt.NDArray[Any]
SIZES = (16, 48, 300, 600, 900, 7, 1024)
"""Sizes of batches: one sub-batch; parts with padding; sub-batches that two ranks share."""
Options = Mapping[str, Any]


def led(ranks: Ranks, lead: Callable[[Team], Any]) -> Any:
    """Return what `lead(team)` returns on rank 0, which the other ranks follow."""
    team = Team(ranks, {"network": NETWORK_MAKER})
    if ranks.rank:
        team.follow()
        return None
    found = lead(team)
    team.close()
    return found


def batch_of(n: int, seed: int, options: Options) -> tuple[Array, Array, Array | None]:
    """Return random ids [n, F + C], labels [n] and values [n, V] for a model with these options."""
    fields = options["fields"] + options.get("crosses", 0)
    rows = 1 << options["table_bits"]
    ids, labels = random_batch(n, fields=fields, seed=seed, rows=rows)
    valued = len(options.get("value_fields", ()))
    values = np.random.default_rng(seed).normal(1, 0.5, (n, valued)).astype(np.float32)
    return ids, labels, values if valued else None


def history_of(
    made: NetworkLearner | ShardedLearner, sizes: Sequence[int], options: Options
) -> list[State]:
    """Learn batches of these sizes; return the logits and predictions of each, and the state."""
    history: list[State] = []
    for seed, n in enumerate(sizes):
        ids, labels, values = batch_of(n, seed, options)
        logits = made.learn(ids, labels, values)
        assert logits is not None
        history.append({"logits": logits.numpy(), "predicted": made.predict(ids, values)})
    return [*history, whole_state(made)]


def whole_state(made: NetworkLearner | ShardedLearner) -> State:
    """Return all weights and the state of the optimisers."""
    whole = made.whole_weights() if isinstance(made, ShardedLearner) else made.weights()
    return whole | made.optimizer_state()


def plain_history(model: str, sizes: Sequence[int], options: Options) -> list[State]:
    """Return the history of a learner in one process with one thread."""
    spec = learner_spec(model, **options)
    return history_of(NetworkLearner(spec, device="cpu", threads=1), sizes, options)


def sharded_history(
    team: Team, model: str, sizes: Sequence[int], options: Options, *, threads: int = 1
) -> list[State]:
    """Return the history of a learner on the ranks of the team."""
    spec = learner_spec(model, **options)
    return history_of(ShardedLearner(team, spec, threads=threads), sizes, options)


def differences(found: Sequence[State], expected: Sequence[State]) -> list[str]:
    """Return the names of the arrays in which two histories differ in any bit."""
    assert len(found) == len(expected)
    return [
        f"{name} after {number} batches"
        for number, (one, other) in enumerate(zip(found, expected, strict=True))
        for name in {*one, *other}
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or one[name].tobytes() != other[name].tobytes()
    ]
