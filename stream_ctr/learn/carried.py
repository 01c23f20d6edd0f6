"""The state of a model before and after it is carried over to another run (see `transfer`)."""

from __future__ import annotations

from typing import NamedTuple

from stream_ctr.events.field import Schema
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State


class ModelState(NamedTuple):
    """A model of a run: its specification, the fields it reads, weights and optimiser state."""

    schema: Schema
    spec: LearnerSpec
    weights: State
    optimizer: State


class Carried(NamedTuple):
    """What a model begins with, and what it says about it.

    `knows` is false if the model begins anew.
    """

    weights: State
    optimizer: State
    knows: bool
    sentences: list[str]


def anew(fresh: ModelState, why: str) -> Carried:
    """Return what a model begins with that knows nothing, and why."""
    return Carried(fresh.weights, fresh.optimizer, False, [f"begins anew: {why}"])
