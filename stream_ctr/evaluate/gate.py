"""The gate: a snapshot is published only if its model does no worse than all that is at hand.

At hand are the other models of the run, the baseline among them, the running constant (the
click-through rate so far), and the published snapshot. A model is measured on the examples since
the last verdict, each predicted before it was learned, once they hold enough clicks. Compared with
the published snapshot is not the logloss itself but its ratio to that of the other models: if
traffic becomes harder to predict, all get worse, and the model is not refused for it.

A model that saw no click is refused without a verdict, because it can only have learned that there
are none.

>>> import msgspec
>>> good = Measured(
...     clicks=5000,
...     count=60_000,
...     ne=0.8,
...     logloss=0.40,
...     constant_logloss=0.50,
...     calibration=1.02,
...     others={"ftrl": Other(logloss=0.42, difference=-0.02, calibration=1.0)},
... )
>>> worse = {"ftrl": Other(logloss=0.42, difference=0.13, calibration=1.0)}
>>> bad = msgspec.structs.replace(good, logloss=0.55, ne=1.1, calibration=2.0, others=worse)
>>> Gate().refusals(good, published=None), Gate().refusals(good, published=good)
([], [])
>>> for reason in Gate().refusals(bad, published=good):
...     print(reason)
its logloss is 10.0 % above that of the running constant, its normalised entropy is 1.100
its logloss is 31 % above that of ftrl
its logloss over that of the other models is 38 % above that of the published snapshot
it predicts 2.00 times the clicks that came, ftrl 1.00 times
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from stream_ctr.evaluate import metrics

# This many clicks without an impression, and none with one, are not chance.
_CLICKS_IN_VAIN = 50


class Other(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What another model did on the examples of a verdict that it predicted too.

    `difference` is the mean logloss of the published model minus that of this one on these
    examples, `calibration` is predicted over actual clicks.
    """

    logloss: float
    difference: float
    calibration: float | None


class Measured(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The evidence of a verdict on the published model, and on the others by name.

    `calibration` is predicted over actual clicks, `ne` the normalised entropy: the logloss over
    that of the best constant for these examples. `constant_logloss` is that of the running
    constant, which is known before each example. A figure without meaning, such as the calibration
    of a model that saw no click, is None.
    """

    clicks: int
    count: int
    ne: float | None
    logloss: float | None
    constant_logloss: float | None
    calibration: float | None
    others: dict[str, Other]


class Verdict(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The reasons not to publish a snapshot, and the evidence of the last verdict.

    `refused` holds until the next verdict. `last_step` and `missing_clicks` are about this snapshot
    alone.
    """

    last_step: tuple[str, ...] = ()
    missing_clicks: tuple[str, ...] = ()
    evidence: Measured | None = None
    refused: tuple[str, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """All reasons not to publish the snapshot; without any it is published."""
        return (*self.missing_clicks, *self.refused, *self.last_step)


class Clicks(NamedTuple):
    """Clicks of a run: `came` counts all, `known` those with a known fate, `joined` the labels.

    Clicks that wait for their impression have no fate yet. A repeated click counts as joined.
    """

    came: int = 0
    known: int = 0
    joined: int = 0


@dataclass(frozen=True, slots=True)
class Gate:
    """Bounds on how much worse a snapshot may be.

    `logloss` is a share of the logloss that it is compared with, `calibration` a difference of
    |ln(predicted / actual clicks)|. No verdict is passed on fewer than `clicks` clicks, and with 0
    there is no gate.
    """

    clicks: int = 1000
    logloss: float = 0.1
    calibration: float = 0.3

    def refusals(self, now: Measured, published: Measured | None) -> list[str]:
        """Return the reasons not to publish, or an empty list."""
        reasons = [
            self._worse_than_a_constant(now),
            self._worse_than_another(now),
            self._worse_than_published(now, published),
            self._off_calibration(now, published),
        ]
        return [reason for reason in reasons if reason]

    def _worse_than_a_constant(self, now: Measured) -> str | None:
        """Compare with one number. A model that does worse is of no use, by however little."""
        reasons = []
        if now.logloss is not None and now.constant_logloss:
            above = now.logloss / now.constant_logloss - 1
            if above > 0:
                reasons.append(
                    f"its logloss is {_percent(above, 1)} above that of the running constant"
                )
        if now.ne is not None and now.ne > 1:
            reasons.append(f"its normalised entropy is {now.ne:.3f}")
        return ", ".join(reasons) or None

    def _worse_than_another(self, now: Measured) -> str | None:
        above, name = max(
            ((_ratio(other) - 1, name) for name, other in now.others.items()), default=(0.0, "")
        )
        if above <= self.logloss:
            return None
        return f"its logloss is {_percent(above)} above that of {name}"

    def _worse_than_published(self, now: Measured, published: Measured | None) -> str | None:
        """Compare ratios to the other models. One of these may change; a worse model shows in all.

        Without other models the normalised entropies are compared.
        """
        if not published:
            return None
        figure = "logloss over that of the other models"
        rises = [
            _ratio(now.others[name]) / _ratio(published.others[name])
            for name in now.others.keys() & published.others.keys()
        ]
        if not rises and now.ne and published.ne:
            figure = "normalised entropy"
            rises = [now.ne / published.ne]
        if not rises or min(rises) <= 1 + self.logloss:
            return None
        worse = _percent(min(rises) - 1)
        return f"its {figure} is {worse} above that of the published snapshot"

    def _off_calibration(self, now: Measured, published: Measured | None) -> str | None:
        if not now.calibration:
            return None
        references = {
            name: other.calibration for name, other in now.others.items() if other.calibration
        }
        if not references and published and published.calibration:
            references = {"the published one": published.calibration}
        off, name = min(((_off(c), name) for name, c in references.items()), default=(0.0, ""))
        if _off(now.calibration) <= off + self.calibration:
            return None
        compared = f", {name} {references[name]:.2f} times" if name else ""
        return f"it predicts {now.calibration:.2f} times the clicks that came{compared}"


class RunningConstant:
    """The click-through rate so far as a prediction: the estimate of Krichevsky and Trofimov.

    Each example is predicted as (clicks + 1/2) / (count + 1) of all examples before it. Over any n
    examples this costs at most ln(n) / 2 + ln(2) nats more than the best constant.

    >>> constant = RunningConstant()
    >>> constant.losses(np.array([0, 1])).round(4).tolist()  # ln 2 and ln 4
    [0.6931, 1.3863]
    >>> constant.state.tolist()
    [2, 1]
    """

    def __init__(self) -> None:
        self.state = np.zeros(2, np.int64)
        """The count of the examples so far, and of the clicks among them."""

    @property
    def clicks(self) -> int:
        return int(self.state[1])

    def losses(self, labels: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Return the losses [n] of n more examples, each predicted before it is counted."""
        count, clicks = self.state.tolist()
        counts = count + np.arange(len(labels))
        clicks_before = clicks + np.cumsum(labels) - labels
        of_label = np.where(labels == 1, clicks_before + 0.5, counts - clicks_before + 0.5)
        self.state += (len(labels), int(labels.sum()))
        return np.log((counts + 1.0) / of_label)


class Judge:
    """Collect evidence on the models of a run, and pass verdicts on the first one."""

    def __init__(self, gate: Gate, models: Sequence[str]) -> None:
        self._gate = gate
        self._models = models
        self._recent = metrics.Tally(models)  # since the last verdict
        self._constant = RunningConstant()
        self._constant_sums = np.zeros(2)  # its loss and the number of examples, since then
        self._clicks = np.zeros(len(Clicks._fields), np.int64)  # `Clicks` at the last verdict
        self._evidence: Measured | None = None  # of the last verdict
        self._refused: tuple[str, ...] = ()
        self._missing_clicks: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[str, ...]:
        """The reasons not to publish: those of the last verdict, and of missing clicks."""
        return (*self._missing_clicks, *self._refused)

    @property
    def standing(self) -> tuple[str, ...]:
        """The refusal of the last verdict, while there are too few clicks for another verdict."""
        return () if self._enough else self._refused

    @property
    def _enough(self) -> bool:
        return bool(self._gate.clicks) and self._recent.clicks >= self._gate.clicks

    def add(self, scored: metrics.Scored) -> None:
        """Add a batch to the evidence."""
        self._recent.add(scored)
        found = scored.bin[0]
        labels = (found[found >= 0] >= metrics.BINS).astype(np.int64)
        self._constant_sums += (self._constant.losses(labels).sum(), len(labels))

    def judge(self, published: Callable[[], Measured | None], clicks: Clicks | None = None) -> None:
        """Pass a verdict if there are enough clicks.

        `published` returns the evidence of the published snapshot. `clicks` are those that the
        join has counted; without them, only the labels of the examples are known.
        """
        clicks = clicks or Clicks()
        self._missing_clicks = tuple(self._lacks_clicks(clicks))
        if self._enough:
            self._evidence = self._measured()
            self._refused = tuple(self._gate.refusals(self._evidence, published()))
            self._clear()
            self._clicks[:] = clicks

    def _lacks_clicks(self, clicks: Clicks) -> list[str]:
        """Return why the model cannot know clicks, or nothing."""
        if not self._constant.clicks:
            came = f": {clicks.came:,} clicks came, and none found its impression"
            return [f"it has seen no click{came if clicks.came else ''}"]
        known, joined = (clicks.known - self._clicks[1], clicks.joined - self._clicks[2])
        if self._gate.clicks and known >= _CLICKS_IN_VAIN and joined == 0:
            return [f"none of the last {known:,} clicks found its impression"]
        return []

    def _measured(self) -> Measured:
        loss, count = self._constant_sums.tolist()
        return measured(self._recent, loss / count if count else None)

    def _clear(self) -> None:
        self._recent = metrics.Tally(self._models)
        self._constant_sums[:] = 0

    def begin_anew(self, reason: str) -> None:
        """Forget the evidence when another model takes over.

        With a gate, snapshots are refused for `reason` until the next verdict.
        """
        self._clear()
        self._refused = (reason,) if self._gate.clicks else ()

    def go_back(self, verdict: Verdict) -> None:
        """Forget the evidence, and take the verdict of the snapshot that was restored."""
        self._clear()
        self._take(verdict)

    def verdict(self, *, last_step: Sequence[str] = ()) -> Verdict:
        """Return the last verdict, for a manifest."""
        return Verdict(
            last_step=tuple(last_step),
            missing_clicks=self._missing_clicks,
            evidence=self._evidence,
            refused=self._refused,
        )

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return the evidence since the last verdict as arrays."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]], verdict: Verdict) -> None:
        """Restore what `state_dict` and `verdict` returned."""
        for name, array in self._arrays().items():
            array[:] = state[name]
        self._take(verdict)

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {
            **self._recent.arrays(),
            "constant": self._constant.state,
            "constant_sums": self._constant_sums,
            "clicks": self._clicks,
        }

    def _take(self, verdict: Verdict) -> None:
        self._evidence = verdict.evidence
        self._missing_clicks = verdict.missing_clicks
        self._refused = verdict.refused if self._gate.clicks else ()


def measured(tally: metrics.Tally, constant_logloss: float | None = None) -> Measured:
    """Return the evidence on the first model of a tally, and on the others beside it.

    A model that shares no example with the first is left out.
    """
    model, *others = tally.scores
    score = tally.scores[model].summary()
    return Measured(
        clicks=tally.clicks,
        count=score.count,
        ne=score.ne,
        logloss=score.logloss,
        constant_logloss=constant_logloss,
        calibration=score.pred_over_actual,
        others={
            name: other
            for name, pair in zip(others, tally.paired.tolist(), strict=True)
            if (other := _other(tally.scores[name], *pair))
        },
    )


def _other(score: metrics.Score, difference: float, count: float) -> Other | None:
    found = score.summary()
    if not count or not found.logloss:
        return None
    return Other(
        logloss=found.logloss, difference=difference / count, calibration=found.pred_over_actual
    )


def _ratio(other: Other) -> float:
    """Return the logloss of the published model over that of another, on the same examples."""
    return 1 + other.difference / other.logloss


def _off(calibration: float) -> float:
    return abs(math.log(calibration))


def _percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}".replace("%", " %")
