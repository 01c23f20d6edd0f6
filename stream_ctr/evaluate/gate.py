"""The gate: a snapshot is published only if its model does no worse than others.

The others are the published model and the baseline. A model is measured on the examples since the
last verdict, each predicted before it was learned, once they hold enough clicks. With a baseline,
the logloss of a model is compared relative to the baseline's: if traffic becomes harder to predict,
both get worse, and the model is not refused for it.

>>> import msgspec
>>> good = Measured(
...     clicks=5000,
...     count=60_000,
...     ne=0.8,
...     logloss=0.40,
...     baseline_logloss=0.42,
...     calibration=1.02,
...     baseline_calibration=1.0,
... )
>>> bad = msgspec.structs.replace(good, logloss=0.55, calibration=2.0)
>>> Gate().refusals(good, published=None), Gate().refusals(good, published=good)
([], [])
>>> for reason in Gate().refusals(bad, published=good):
...     print(reason)
its logloss is 31 % above the baseline's
its logloss over the baseline's is 38 % above that of the published snapshot
it predicts 2.00 times the clicks that came, the baseline 1.00 times
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from stream_ctr.evaluate import metrics


class Measured(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The evidence of a verdict: the published model, and the baseline on the same examples.

    `calibration` is predicted over actual clicks, `ne` the normalised entropy. A figure without
    meaning, such as the calibration of a model that saw no click, is None.
    """

    clicks: int
    count: int
    ne: float | None
    logloss: float | None
    baseline_logloss: float | None
    calibration: float | None
    baseline_calibration: float | None


class Verdict(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A snapshot may be published if neither `refused` nor `last_step` holds a reason."""

    last_step: tuple[str, ...] = ()
    evidence: Measured | None = None
    refused: tuple[str, ...] = ()


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
            self._worse_than_baseline(now),
            self._worse_than_published(now, published),
            self._off_calibration(now, published),
        ]
        return [reason for reason in reasons if reason]

    def _worse_than_baseline(self, now: Measured) -> str | None:
        baseline = now.baseline_logloss
        if not baseline or now.logloss is None or now.logloss <= baseline * (1 + self.logloss):
            return None
        return f"its logloss is {_percent(now.logloss / baseline - 1)} above the baseline's"

    def _worse_than_published(self, now: Measured, published: Measured | None) -> str | None:
        relative = _relative(now)
        before = _relative(published) if published else None
        if not before or not relative or relative <= before * (1 + self.logloss):
            return None
        figure = "logloss over the baseline's" if now.baseline_logloss else "normalised entropy"
        worse = _percent(relative / before - 1)
        return f"its {figure} is {worse} above that of the published snapshot"

    def _off_calibration(self, now: Measured, published: Measured | None) -> str | None:
        if now.baseline_logloss:
            name, reference = "the baseline", now.baseline_calibration
        else:
            name, reference = "the published one", published.calibration if published else None
        if not now.calibration or _off(now.calibration) <= _off(reference) + self.calibration:
            return None
        compared = f", {name} {reference:.2f} times" if reference else ""
        return f"it predicts {now.calibration:.2f} times the clicks that came{compared}"


class Judge:
    """Collect evidence on the models of a run, and pass verdicts on the first one."""

    def __init__(self, gate: Gate, models: Sequence[str], baseline: str | None = None) -> None:
        self._gate = gate
        self._models = models
        self._baseline = baseline
        self._recent = metrics.Tally(models)  # since the last verdict
        self._evidence: Measured | None = None  # of the last verdict
        self.refused: tuple[str, ...] = ()
        """The reasons, by the last verdict, not to publish."""

    def add(self, scored: metrics.Scored) -> None:
        """Add a batch to the evidence."""
        self._recent.add(scored)

    def judge(self, published: Callable[[], Measured | None]) -> None:
        """Pass a verdict if there are enough clicks.

        `published` returns the evidence of the published snapshot.
        """
        if self._gate.clicks and self._recent.clicks >= self._gate.clicks:
            self._evidence = measured(self._recent, self._baseline)
            self.refused = tuple(self._gate.refusals(self._evidence, published()))
            self._recent = metrics.Tally(self._models)

    def begin_anew(self, reason: str) -> None:
        """Forget the evidence when another model takes over.

        With a gate, snapshots are refused for `reason` until the next verdict.
        """
        self._recent = metrics.Tally(self._models)
        self.refused = (reason,) if self._gate.clicks else ()

    def go_back(self, verdict: Verdict) -> None:
        """Forget the evidence, and take the verdict of the snapshot that was restored."""
        self._recent = metrics.Tally(self._models)
        self._take(verdict)

    def verdict(self, *, last_step: Sequence[str] = ()) -> Verdict:
        """Return the last verdict, for a manifest."""
        return Verdict(last_step=tuple(last_step), evidence=self._evidence, refused=self.refused)

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return the evidence since the last verdict as arrays."""
        return {name: array.copy() for name, array in self._recent.arrays().items()}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]], verdict: Verdict) -> None:
        """Restore what `state_dict` and `verdict` returned."""
        for name, array in self._recent.arrays().items():
            array[:] = state[name]
        self._take(verdict)

    def _take(self, verdict: Verdict) -> None:
        self._evidence = verdict.evidence
        self.refused = verdict.refused if self._gate.clicks else ()


def measured(tally: metrics.Tally, baseline: str | None) -> Measured:
    """Return the evidence on the first model of a tally, and on `baseline`.

    The model's logloss is the baseline's plus their mean difference on the examples that both
    scored.
    """
    model, *others = tally.scores
    score = tally.scores[model].summary()
    reference = tally.scores[baseline].summary() if baseline else None
    logloss = score.logloss
    if baseline and reference and reference.logloss is not None:
        difference, count = tally.paired[others.index(baseline)]
        logloss = float(reference.logloss + difference / count)
    return Measured(
        clicks=tally.clicks,
        count=score.count,
        ne=score.ne,
        logloss=logloss,
        baseline_logloss=reference.logloss if reference else None,
        calibration=score.pred_over_actual,
        baseline_calibration=reference.pred_over_actual if reference else None,
    )


def _relative(evidence: Measured) -> float | None:
    if evidence.baseline_logloss and evidence.logloss is not None:
        return evidence.logloss / evidence.baseline_logloss
    return evidence.ne


def _off(calibration: float | None) -> float:
    return abs(math.log(calibration)) if calibration else 0.0


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")
