"""The blend: a mixture of the probabilities of several models, which learns whom to trust.

M members predict each example before they learn it. A stack predicts too, from their logits. The
blend is the mean of the M + 1 probabilities under weights that follow their success, so it is never
far behind the best of them, whatever the stream:

    stack     x = (z_1, ..., z_M, 1), each logit clipped to [-12, 12]; q = sigmoid(u . x)
              H <- gamma H + (1 - gamma) h I + max(q (1 - q), 1e-4) x x'
              u <- u + H^-1 x (y - q)                  u_1 = 1, the others 0; H = h I; h = 50
    blend     p = sum_i omega_i p_i,  p_i = sigmoid(z_i), the last one q
              omega_i <- omega_i P_i(y) / sum_j omega_j P_j(y),  P_i(1) = p_i, P_i(0) = 1 - p_i
              omega   <- (1 - a) omega + a / (M + 1),  a = min(1/2, max(1/t, 1e-5))

The stack is an online Newton step on the logarithmic loss, with a memory of 20,000 examples (gamma
= 1 - 1/20,000). The part (1 - gamma) h I keeps H regular when two members agree. The weights are
those of Bayes for the logarithmic loss with a share for change (Herbster and Warmuth, "Tracking the
Best Expert", 1998). On T examples, the loss of the blend exceeds that of any one member by at most

    ln(M + 1) + sum_t -ln(1 - a_t M / (M + 1))

nats in total: -ln(omega_1) at the start, and one factor of the share for each example. With M = 4
this is ln 5 + 0.8 (ln T + 1) + 1e-5 T nats or less, however the members behave. Nothing is assumed
about the stream, because the loss is that of the mixed probability and not of a chosen member.

A member without a logit for an example, because it cannot learn it or was left out of the run, does
not take part in it: the probability is the mean of the others, their weights move within their
sum, and the stack reads 0 for it (Freund et al., "Using and Combining Predictors That Specialize",
1997). An example that no member predicts has the logit NaN and changes nothing.

>>> blend = Blend(["deepfm", "ftrl"])
>>> z = np.array([[2.0, -2.0], [0.0, 0.0]])
>>> blend.learn(z, np.array([1, 0], np.uint8)).round(3).tolist()
[1.119, -1.24]
>>> {name: round(weight, 2) for name, weight in blend.report().weights.items()}
{'deepfm': 0.37, 'ftrl': 0.26, 'stack': 0.37}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from stream_ctr.learn.predictor import Predictor, Predicts
from stream_ctr.learn.step import Ids, Values
from stream_ctr.learn.tensors import State, Tensors, require_names, require_tensor

Floats = npt.NDArray[np.float64]

STACK = "stack"
"""The name of the stack among the weights."""

MIXTURE = ""
"""The name of the mixture itself among the changes of a blend."""

_CLIP = 12.0
_RIDGE = 50.0  # h
_FORGET = 1.0 / 20_000  # 1 - gamma
_LEAST_CURVATURE = 1e-4
_LEAST_SHARE = 1e-5
_MOST_SHARE = 0.5
# A probability is kept this far from 0 and 1, so that a certain mistake costs a member its weight
# and not the blend its numbers.
_EPSILON = 1e-15


class BlendReport(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The weights of a blend, and what it lost against the best of what it mixes.

    `weights` maps each member, and the stack, to its present weight. `best` is the one with the
    least loss so far, on the examples that all of them predicted, and `regret_nats` is the loss of
    the blend minus that one's, in total. Both are None before the first of these examples.
    """

    weights: dict[str, float]
    best: str | None
    regret_nats: float | None


class Blend:
    """The mixture of the probabilities of `members`.

    Raises `ValueError` without members, or when a name occurs twice.
    """

    def __init__(self, members: Sequence[str]) -> None:
        if not members or len(set(members)) < len(members):
            raise ValueError(f"a blend needs members with distinct names, got {list(members)}")
        self.members = tuple(members)
        count = len(members)
        self._omega = np.full(count + 1, 1.0 / (count + 1))
        self._u = np.zeros(count + 1)
        self._u[0] = 1.0
        self._h = _RIDGE * np.eye(count + 1)
        self._examples = np.zeros(1, np.int64)
        # The losses of the members, of the stack and of the blend, where all members predicted.
        self._losses = np.zeros(count + 2)

    def stack(self, logits: Mapping[str, npt.NDArray[np.floating]], n: int) -> Floats:
        """Return the logits [M, n] of the members in their order, NaN for one that is absent.

        `logits` maps members to their logits [n].
        """
        stacked = np.full((len(self.members), n), np.nan)
        for row, name in enumerate(self.members):
            if name in logits:
                stacked[row] = logits[name]
        return stacked

    def learn(self, logits: Floats, labels: npt.NDArray[np.uint8]) -> Floats:
        """Predict each example, then learn it; return the logits [n] from before.

        `logits` [M, n] are those of the members, NaN where a member has none.
        """
        blended = np.empty(logits.shape[1])
        _learn(
            np.ascontiguousarray(logits, np.float64),
            labels,
            self._omega,
            self._u,
            self._h,
            self._examples,
            self._losses,
            blended,
        )
        return blended

    def predict(self, logits: Floats) -> Floats:
        """Return the logits [n] of examples with the members' `logits` [M, n]."""
        blended = np.empty(logits.shape[1])
        _predict(np.ascontiguousarray(logits, np.float64), self._omega, self._u, blended)
        return blended

    def predict_with(
        self, members: Mapping[str, Predicts], ids: Ids, values: Values | None = None
    ) -> Floats:
        """Return the logits [n] of examples that these `members` predict; others are absent."""
        logits = {name: made.predict(ids, values) for name, made in members.items()}
        return self.predict(self.stack(logits, len(ids)))

    def report(self) -> BlendReport:
        """Return the weights and the regret."""
        names = (*self.members, STACK)
        losses = self._losses[:-1]
        best = int(np.argmin(losses)) if losses.any() else None
        return BlendReport(
            weights=dict(zip(names, self._omega.tolist(), strict=True)),
            best=names[best] if best is not None else None,
            regret_nats=float(self._losses[-1] - losses[best]) if best is not None else None,
        )

    def weights(self) -> State:
        """Return everything that serving needs: `omega` [M + 1] and `u` [M + 1]."""
        return {"omega": self._omega.copy(), "u": self._u.copy()}

    def optimizer_state(self) -> State:
        """Return everything that learning needs besides the weights."""
        return {
            "h": self._h.copy(),
            "examples": self._examples.copy(),
            "losses": self._losses.copy(),
        }

    def load_weights(self, weights: Tensors) -> None:
        """Load `weights`. Raises `ValueError` unless they are those of a blend of M members."""
        require_names(weights, ["omega", "u"])
        for name, array in (("omega", self._omega), ("u", self._u)):
            require_tensor(name, weights[name], np.float64, array.shape)
        omega = np.asarray(weights["omega"], np.float64)
        if (omega < 0).any() or not math.isclose(float(omega.sum()), 1.0, rel_tol=1e-6):
            raise ValueError("tensor 'omega' does not hold weights that sum to 1")
        self._omega[:] = omega
        self._u[:] = weights["u"]

    def load_optimizer_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Load `state`. Raises `KeyError` or `ValueError` when it is not that of this blend."""
        for name, array in (("h", self._h), ("examples", self._examples), ("losses", self._losses)):
            require_tensor(name, state[name], array.dtype, array.shape)
            array[...] = state[name]


class BlendPredictor:
    """A blend that serves: its members predict, and the blend mixes their probabilities.

    `members` are its models by name; a member that is absent was left out of the run.
    """

    def __init__(self, blend: Blend, members: Mapping[str, Predictor]) -> None:
        self._blend = blend
        self.members = members

    def predict(self, ids: Ids, values: Values | None = None) -> Floats:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V]."""
        return self._blend.predict_with(self.members, ids, values)

    def updated(self, changes: Mapping[str, Tensors]) -> BlendPredictor:
        """Return the blend after `changes`, by the name of a member; `MIXTURE` is the blend itself.

        A member without changes stays as it is. Raises `ValueError`, with nothing changed, if a
        name is not that of a member, and as `Predictor.updated` does.
        """
        if odd := sorted({*changes} - {MIXTURE, *self.members}):
            raise ValueError(f"the blend has no member {odd[0]!r:.80} that serves")
        blend = self._blend
        if MIXTURE in changes:
            blend = Blend(blend.members)
            blend.load_weights(changes[MIXTURE])
        members = {
            name: made.updated(changes[name]) if name in changes else made
            for name, made in self.members.items()
        }
        return BlendPredictor(blend, members)

    def absorb(self) -> bool:
        """Let each member absorb its changes; return True once all have."""
        absorbed = [made.absorb() for made in self.members.values()]
        return all(absorbed)

    def served(self) -> State:
        """Return the weights of the mixture, `omega` and `u`; members have their own `served`."""
        return self._blend.weights()


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _learn(logits, labels, omega, u, h, count, losses, blended):  # type: ignore[no-untyped-def]
    members, n = logits.shape
    x = np.empty(members + 1)
    p = np.empty(members + 1)
    factor = np.empty((members + 1, members + 1))
    step = np.empty(members + 1)
    for e in range(n):
        present = _inputs(logits, e, u, x, p)
        if not present:
            blended[e] = np.nan
            continue
        mixed = _mix(p, omega)
        blended[e] = math.log(mixed) - math.log1p(-mixed)
        clicked = labels[e] == 1
        count[0] += 1
        if present == members:
            for i in range(members + 1):
                losses[i] -= math.log(p[i] if clicked else 1.0 - p[i])
            losses[members + 1] -= math.log(mixed if clicked else 1.0 - mixed)
        _move_weights(p, mixed, clicked, omega, count[0])
        q = p[members]
        curvature = max(q * (1.0 - q), _LEAST_CURVATURE)
        for i in range(members + 1):
            for j in range(i + 1):
                h[i, j] = (1.0 - _FORGET) * h[i, j] + curvature * x[i] * x[j]
                h[j, i] = h[i, j]
            h[i, i] += _FORGET * _RIDGE
        _solve(h, x, factor, step)
        gradient = (1.0 if clicked else 0.0) - q
        for i in range(members + 1):
            u[i] += gradient * step[i]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _predict(logits, omega, u, blended):  # type: ignore[no-untyped-def]
    members, n = logits.shape
    x = np.empty(members + 1)
    p = np.empty(members + 1)
    for e in range(n):
        if _inputs(logits, e, u, x, p):
            mixed = _mix(p, omega)
            blended[e] = math.log(mixed) - math.log1p(-mixed)
        else:
            blended[e] = np.nan


@numba.njit(inline="always")
def _inputs(logits, e, u, x, p):  # type: ignore[no-untyped-def]
    """Write the inputs of the stack and all probabilities, NaN for a missing member.

    Returns the number of members that predict example `e`.
    """
    members = len(logits)
    present = 0
    z = u[members]
    x[members] = 1.0
    for i in range(members):
        logit = logits[i, e]
        if math.isfinite(logit):
            present += 1
            p[i] = _probability(logit)
            x[i] = min(max(logit, -_CLIP), _CLIP)
            z += u[i] * x[i]
        else:
            p[i] = np.nan
            x[i] = 0.0
    p[members] = _probability(z)
    return present


@numba.njit(inline="always")
def _probability(logit):  # type: ignore[no-untyped-def]
    e = math.exp(-abs(logit))
    p = (1.0 if logit >= 0 else e) / (1.0 + e)
    return min(max(p, _EPSILON), 1.0 - _EPSILON)


@numba.njit(inline="always")
def _mix(p, omega):  # type: ignore[no-untyped-def]
    """Return the mean of the probabilities that are there, under the weights."""
    mixed = 0.0
    weight = 0.0
    for i in range(len(p)):
        if not math.isnan(p[i]):
            mixed += omega[i] * p[i]
            weight += omega[i]
    return mixed / weight


@numba.njit(inline="always")
def _move_weights(p, mixed, clicked, omega, t):  # type: ignore[no-untyped-def]
    """Multiply the weights by the members' likelihoods, then share a part of them equally."""
    likelihood = mixed if clicked else 1.0 - mixed
    share = min(_MOST_SHARE, max(1.0 / t, _LEAST_SHARE))
    total = 0.0
    for i in range(len(p)):
        if not math.isnan(p[i]):
            omega[i] *= (p[i] if clicked else 1.0 - p[i]) / likelihood
        total += omega[i]
    for i in range(len(p)):
        omega[i] = (1.0 - share) * omega[i] / total + share / len(p)


@numba.njit(inline="always")
def _solve(h, x, factor, out):  # type: ignore[no-untyped-def]
    """Write H^-1 x into `out`, by the Cholesky factor of H."""
    n = len(x)
    for i in range(n):
        for j in range(i + 1):
            total = h[i, j]
            for k in range(j):
                total -= factor[i, k] * factor[j, k]
            factor[i, j] = math.sqrt(total) if i == j else total / factor[j, j]
    for i in range(n):
        total = x[i]
        for k in range(i):
            total -= factor[i, k] * out[k]
        out[i] = total / factor[i, i]
    for i in range(n - 1, -1, -1):
        total = out[i]
        for k in range(i + 1, n):
            total -= factor[k, i] * out[k]
        out[i] = total / factor[i, i]
