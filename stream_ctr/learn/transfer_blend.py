"""Carry the weights of a blend over to another run (see `transfer`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from stream_ctr.events.field_changes import listed
from stream_ctr.learn.carried import Carried
from stream_ctr.learn.tensors import State


class BlendState(NamedTuple):
    """The members of a blend, in their order, its weights and the state of its optimiser."""

    members: tuple[str, ...]
    weights: State
    optimizer: State


def carry_blend(old: BlendState | None, fresh: BlendState, known: Mapping[str, str]) -> Carried:
    """Return what a blend begins with.

    `known` maps each member of `fresh` that carries over to its name in `old`. The others have
    learned nothing: their weight is 0, and the first examples raise it if they deserve it. The
    stack without a member that is gone is the one that loses least, by its curvature H. Without an
    `old` blend, the members that carry over and the stack share the weight.
    """
    m = len(fresh.members)
    if not known:
        return Carried(
            fresh.weights, fresh.optimizer, False, ["begins anew: no member carries over"]
        )
    if old is None:
        carried = np.array([name in known for name in fresh.members])
        omega = np.append(carried, True) / (carried.sum() + 1)
        u = np.zeros(m + 1)
        u[carried.argmax()] = 1.0
        said = [f"is new, and begins with the weight on {listed(known)}"]
        return Carried({"omega": omega, "u": u}, fresh.optimizer, True, said)
    stays = {name: old.members.index(known[name]) for name in fresh.members if name in known}
    source = np.array([*stays.values(), len(old.members)])
    target = np.array([*(fresh.members.index(name) for name in stays), m])
    gone = np.setdiff1d(np.arange(len(old.members)), source)
    omega, u = np.zeros(m + 1), np.zeros(m + 1)
    kept = old.weights["omega"][source]
    omega[target] = kept / kept.sum() if len(gone) else kept
    u[target] = old.weights["u"][source]
    h_old = old.optimizer["h"]
    if len(gone):
        lost = h_old[np.ix_(source, gone)] @ old.weights["u"][gone]
        u[target] += np.linalg.solve(h_old[np.ix_(source, source)], lost)
    h = fresh.optimizer["h"].copy()
    h[np.ix_(target, target)] = h_old[np.ix_(source, source)]
    optimizer = {**fresh.optimizer, "h": h, "examples": old.optimizer["examples"]}
    said = [f"the weights of {listed(stays)} and of the stack carry over"]
    if new := [name for name in fresh.members if name not in known]:
        said.append(f"new, with the weight 0: {listed(new)}")
    if len(gone):
        said.append(f"gone, the others share its weight: {listed(old.members[at] for at in gone)}")
    return Carried({"omega": omega, "u": u}, optimizer, True, said)
