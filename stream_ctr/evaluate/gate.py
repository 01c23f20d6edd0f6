"""Whether a snapshot may be published: it must not be worse than what subscribers have, nor than the simple model beside it.

What a model did is measured on examples that it had not learned yet, since the last verdict, once they hold enough clicks to tell. Where
there is a baseline, the model is compared through it: when traffic becomes harder both become worse, and that is no fault of the model.

>>> good = {"logloss": 0.40, "baseline_logloss": 0.42, "ne": 0.8, "calibration": 1.02, "baseline_calibration": 1.0, "clicks": 5000}
>>> bad = {**good, "logloss": 0.55, "calibration": 2.0}
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

Evidence = Mapping[str, Any]


class Measured(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a verdict rests on: the published model, and the baseline on the same examples.

    `calibration` is predicted over actual clicks, `ne` normalised entropy. A figure without
    meaning, as the calibration of a model that saw no click, is None.
    """

    clicks: int
    count: int
    ne: float | None
    logloss: float | None
    baseline_logloss: float | None
    calibration: float | None
    baseline_calibration: float | None


class Verdict(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether a snapshot may be published: it may not while `refused` or `last_step` has a reason."""

    last_step: tuple[str, ...] = ()
    evidence: Measured | None = None
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gate:
    """By how much a snapshot may be worse: `logloss`, as a share of what it is compared with; `calibration`, of |ln(predicted / actual
    clicks)|. No verdict on fewer than `clicks` clicks; with 0 there is no gate."""

    clicks: int = 1000
    logloss: float = 0.1
    calibration: float = 0.3

    def refusals(self, now: Evidence, published: Evidence | None) -> list[str]:
        """Why not, in words; empty: it may be published."""
        reasons = []
        against = now["baseline_logloss"]
        if against and now["logloss"] > against * (1 + self.logloss):
            reasons.append(
                f"its logloss is {now['logloss'] / against - 1:.0%} above the baseline's".replace(
                    "%", " %"
                )
            )
        relative, what = (
            _relative(now),
            "logloss over the baseline's" if against else "normalised entropy",
        )
        if (
            published
            and (before := _relative(published))
            and relative
            and relative > before * (1 + self.logloss)
        ):
            reasons.append(
                f"its {what} is {relative / before - 1:.0%} above that of the published snapshot".replace(
                    "%", " %"
                )
            )
        reference = now["baseline_calibration"] if against else (published or {}).get("calibration")
        if now["calibration"] and _off(now["calibration"]) > _off(reference) + self.calibration:
            beside = (
                f", {'the baseline' if against else 'the published one'} {reference:.2f} times"
                if reference
                else ""
            )
            reasons.append(
                f"it predicts {now['calibration']:.2f} times the clicks that came{beside}"
            )
        return reasons


class Judge:
    """Gathers what the `models` of a run do; has a verdict on the first, beside `baseline` if there is one, when that is enough."""

    def __init__(self, gate: Gate, models: Sequence[str], baseline: str | None = None) -> None:
        self._gate, self._models, self._baseline = gate, models, baseline
        self._recent = metrics.Tally(models)  # since the last verdict
        self._evidence: Evidence | None = None  # of the last verdict
        self.refused: list[str] = []
        """Why what is learned may not be published, by the last verdict."""

    def add(self, scored: metrics.Scored) -> None:
        self._recent.add(scored)

    def judge(self, published: Callable[[], Evidence | None]) -> None:
        """Come to a verdict if there are clicks enough; `published` tells what the snapshot was judged by that subscribers have."""
        if self._gate.clicks and self._recent.clicks >= self._gate.clicks:
            self._evidence = evidence(self._recent, self._baseline)
            self.refused = self._gate.refusals(self._evidence, published())
            self._recent = metrics.Tally(self._models)

    def begin_anew(self, why: str) -> None:
        """What was gathered is of another model: where there is a gate, refuse until there is a verdict on this one."""
        self._recent = metrics.Tally(self._models)
        self.refused = [why] if self._gate.clicks else []

    def go_back(self, told: Mapping[str, Any]) -> None:
        """The model is the one of an earlier snapshot again, which what was gathered is not of: the verdict is the one of its manifest."""
        self._recent = metrics.Tally(self._models)
        self._take(told)

    def told(self) -> dict[str, Any]:
        """The last verdict, for a manifest."""
        return {"evidence": self._evidence, "refused": self.refused}

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        return {name: array.copy() for name, array in self._recent.arrays().items()}

    def load_state_dict(
        self, state: Mapping[str, npt.NDArray[np.generic]], told: Mapping[str, Any]
    ) -> None:
        for name, array in self._recent.arrays().items():
            array[:] = state[name]
        self._take(told)

    def _take(self, told: Mapping[str, Any]) -> None:
        self._evidence, self.refused = (
            told["evidence"],
            told["refused"] if self._gate.clicks else [],
        )


def evidence(tally: metrics.Tally, baseline: str | None) -> dict[str, Any]:
    """What the first model of a tally did, and `baseline` on the examples that both scored."""
    model, *others = tally.scores
    score = tally.scores[model].summary()
    beside = tally.scores[baseline].summary() if baseline else None
    logloss = score["logloss"]
    if baseline and beside and beside["count"]:
        difference, count = tally.paired[others.index(baseline)]
        logloss = float(beside["logloss"] + difference / count)
    return {
        "clicks": tally.clicks,
        "count": score["count"],
        "ne": score["ne"],
        "logloss": logloss,
        "baseline_logloss": beside["logloss"] if beside else None,
        "calibration": score["pred_over_actual"],
        "baseline_calibration": beside["pred_over_actual"] if beside else None,
    }


def _relative(of: Evidence) -> float | None:
    relative: float | None = (
        of["logloss"] / of["baseline_logloss"] if of["baseline_logloss"] else of["ne"]
    )
    return relative


def _off(calibration: float | None) -> float:
    return abs(math.log(calibration)) if calibration else 0.0
