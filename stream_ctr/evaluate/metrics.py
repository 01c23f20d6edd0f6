"""Honest online metrics: mergeable, in constant memory, keyed by the event time of the impression.

AUC comes from a histogram over the *logit*: 4096 equal bins over [-16, 16], the outermost take what lies beyond. Two examples in
different bins are ordered exactly; a positive and a negative of one bin count one half. So the error is at most
1/2 sum_b pos_b neg_b / (P N), which is reported as `auc_error_bound`.

>>> score = Score()
>>> score.add(np.array([2.0, -1.0, 0.5, -3.0]), np.array([1, 0, 1, 0], np.uint8))
>>> summary = score.summary()
>>> summary["auc"], round(summary["logloss"], 4), summary["ctr"]
(1.0, 0.2407, 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

BINS = 4096
LOGIT_RANGE = 16.0
COUNT, CLICKS, SUM_P, SUM_LOSS = range(4)
_BLOCKS_MAX = 128
_DRAWS = 2000
Floats = npt.NDArray[np.float64]


def losses(logits: Floats, labels: npt.NDArray[np.uint8]) -> Floats:
    """-log p(label) in nats, from logits: softplus(-s) for a click, softplus(s) otherwise; never infinite.

    >>> losses(np.array([0.0, 800.0]), np.array([1, 0], np.uint8)).round(4).tolist()
    [0.6931, 800.0]
    """
    return np.logaddexp(0.0, np.where(labels == 1, -logits, logits))


def probabilities(logits: Floats) -> Floats:
    return np.where(
        logits >= 0,
        1.0 / (1.0 + np.exp(-np.abs(logits))),
        np.exp(-np.abs(logits)) / (1.0 + np.exp(-np.abs(logits))),
    )


def logits(p: Floats) -> Floats:
    """Of probabilities, which are kept 1e-15 away from 0 and 1."""
    p = np.clip(p, 1e-15, 1.0 - 1e-15)
    return np.log(p) - np.log1p(-p)


def entropy(rate: float) -> float:
    """In nats, of one label at this click-through rate: the logloss of the best constant.

    >>> round(entropy(0.5), 4), entropy(0.0)
    (0.6931, 0.0)
    """
    return sum(-q * math.log(q) for q in (rate, 1.0 - rate) if q > 0)


class Score:
    """What one model did on a set of examples."""

    def __init__(
        self, sums: Floats | None = None, histogram: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.sums = np.zeros(4) if sums is None else sums  # count, clicks, sum of p, sum of losses
        self.histogram = (
            np.zeros((2, BINS), np.int64) if histogram is None else histogram
        )  # [label, bin]

    def add(self, logits: Floats, labels: npt.NDArray[np.uint8]) -> None:
        _count(
            self.sums[None],
            self.histogram[None],
            *_measured(logits[None], labels, np.ones((1, len(logits)), np.bool_)),
        )

    def summary(self) -> dict[str, float | int | None]:
        """auc, auc_error_bound, logloss, ne, pred_over_actual, ctr, count.

        `ne` is the logloss over the entropy of this set's own CTR. A figure without meaning (the AUC of one class) is None.
        """
        count, clicks, sum_p, sum_loss = self.sums.tolist()
        auc, bound = self._auc()
        mean = sum_loss / count if count else None
        background = entropy(clicks / count) if count else 0.0
        return {
            "auc": auc,
            "auc_error_bound": bound,
            "logloss": mean,
            "ne": mean / background if mean is not None and background else None,
            "pred_over_actual": sum_p / clicks if clicks else None,
            "ctr": clicks / count if count else None,
            "count": int(count),
        }

    def _auc(self) -> tuple[float | None, float | None]:
        negative, positive = self.histogram
        pairs = int(positive.sum()) * int(negative.sum())
        if not pairs:
            return None, None
        below = np.cumsum(negative) - negative
        ties = float((positive * negative).sum())
        return (float((positive * below).sum()) + 0.5 * ties) / pairs, 0.5 * ties / pairs


def paired_interval(blocks: Floats) -> dict[str, float | int | None]:
    """Mean difference in loss per impression and its 95 % interval.

    `blocks` [n, 2] are of neighbouring examples: (sum of differences, count). The interval is a bootstrap over the blocks (2,000 draws,
    fixed seed), since examples close in time are not independent. No bounds below ten blocks.
    """
    total, count = blocks.sum(axis=0).tolist() if len(blocks) else (0.0, 0.0)
    if not count:
        return {"logloss_difference": None, "low": None, "high": None, "count": 0, "blocks": 0}
    low = high = None
    if len(blocks) >= 10:
        drawn = _draws(len(blocks)) @ blocks
        low, high = np.quantile(drawn[:, 0] / np.maximum(drawn[:, 1], 1), (0.025, 0.975)).tolist()
    return {
        "logloss_difference": total / count,
        "low": low,
        "high": high,
        "count": int(count),
        "blocks": len(blocks),
    }


@lru_cache(
    maxsize=8
)  # a report asks for those of the run, of its tails, of a window and of a rolling one
def _draws(blocks: int) -> Floats:
    """How often each block is drawn, [draws, blocks]; every model is compared on the same draws."""
    return (
        np.random.default_rng(0)
        .multinomial(blocks, np.full(blocks, 1 / blocks), size=_DRAWS)
        .astype(np.float64)
    )


class Scored:
    """A batch with every model's logits from before the update: `time` int64 ms [n], `labels` [n], `true_probability` [n] (NaN: unknown);
    `logits[model]` are of all n examples, or of those alone that `chosen[model]` (bool [n]) marks.

    What is measured of an example is computed once, for all tallies that it is added to; `batch[start:stop]` is a run of examples.
    """

    def __init__(
        self,
        time: npt.NDArray[np.int64],
        labels: npt.NDArray[np.uint8],
        true_probability: Floats,
        logits: Mapping[str, npt.NDArray[np.floating]],
        chosen: Mapping[str, npt.NDArray[np.bool_]],
    ) -> None:
        all_logits, all_chosen = (
            np.zeros((len(logits), len(time))),
            np.ones((len(logits), len(time)), np.bool_),
        )
        for m, (model, given) in enumerate(logits.items()):
            if model in chosen:
                all_chosen[m] = chosen[model]
                all_logits[m, chosen[model]] = given
            else:
                all_logits[m] = given
        self.time = time
        self.loss, self.probability, self.bin = _measured(
            all_logits, labels, all_chosen
        )  # each [M, n]; bin is -1 where not chosen
        self.best_loss = _best_losses(true_probability, labels)

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows: slice) -> Scored:
        part = copy(self)
        part.time, part.best_loss = self.time[rows], self.best_loss[rows]
        part.loss, part.probability, part.bin = (
            self.loss[:, rows],
            self.probability[:, rows],
            self.bin[:, rows],
        )
        return part


class Tally:
    """The scores of every model on one set of examples, the paired difference of the first with each other one, and the loss of the true
    probability. Two of them add up."""

    def __init__(self, models: Sequence[str]) -> None:
        self._sums = np.zeros((len(models), 4))
        self._histogram = np.zeros((len(models), 2, BINS), np.int64)
        self.paired = np.zeros((len(models) - 1, 2))  # sum of differences, count
        self.best = np.zeros(2)  # loss of the true probability, count
        self.scores = {
            model: Score(self._sums[m], self._histogram[m]) for m, model in enumerate(models)
        }

    def add(self, batch: Scored) -> None:
        _tally(
            self._sums,
            self._histogram,
            self.paired,
            self.best,
            batch.loss,
            batch.probability,
            batch.bin,
            batch.best_loss,
        )

    @property
    def clicks(self) -> int:
        return int(self._sums[0, CLICKS])

    def merge(self, other: Tally) -> None:
        for mine, others in zip(self.arrays().values(), other.arrays().values(), strict=True):
            mine += others

    def summary(self) -> dict[str, object]:
        count, clicks = self._sums[0, :SUM_P].tolist()
        return {
            "models": {model: score.summary() for model, score in self.scores.items()},
            "constant_logloss": entropy(clicks / count) if count else None,
            "best_possible_logloss": float(self.best[0] / self.best[1]) if self.best[1] else None,
        }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "sums": self._sums,
            "histogram": self._histogram,
            "paired": self.paired,
            "best": self.best,
        }


def _pairs(models: Sequence[str], blocks: Sequence[Floats]) -> dict[str, object]:
    """The first model less each other one, on the examples that both scored: `blocks` are of (sum of differences, count) [M - 1, 2].

    `paired` is the one with the last model, which is the baseline where there is one.
    """
    stacked = np.array(blocks).reshape(len(blocks), len(models) - 1, 2)
    pairs = {
        model: paired_interval(stacked[stacked[:, m, 1] > 0, m])
        for m, model in enumerate(models[1:])
    }
    named = pairs[models[-1]] if pairs else paired_interval(np.empty((0, 2)))
    return {
        "paired": {"models": list(dict.fromkeys((models[0], models[-1]))), **named},
        "pairs": pairs,
    }


class WholeRun:
    """The tally of everything, in at most 128 blocks of neighbouring examples.

    The blocks are of equal length (the last may still be filling), which doubles when they are too many: so the last half, and any other
    tail, can be told at the end of a run whose length nobody knew. They are the blocks of the bootstrap too.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self.models = tuple(models)
        self.length = 64
        self.blocks: list[Tally] = []
        self.counts: list[int] = []

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, batch: Scored) -> None:
        done = 0
        while done < len(batch):
            if not self.blocks or self.counts[-1] == self.length:
                self._open()
            n = min(self.length - self.counts[-1], len(batch) - done)
            self.blocks[-1].add(batch[done : done + n] if n < len(batch) else batch)
            self.counts[-1] += n
            done += n

    def _open(self) -> None:
        if len(self.blocks) == _BLOCKS_MAX:
            for left, right in zip(self.blocks[::2], self.blocks[1::2], strict=True):
                left.merge(right)
            self.blocks, self.counts = (
                self.blocks[::2],
                [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)],
            )
            self.length *= 2
        self.blocks.append(Tally(self.models))
        self.counts.append(0)

    def summary(self, *, last: float = 1.0) -> dict[str, object]:
        """Over the last share of the examples; it begins at the block boundary nearest to it, which `from_example` names."""
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        first = int(np.argmin(np.abs(starts - (1.0 - last) * self.count))) if self.blocks else 0
        total = Tally(self.models)
        for block in self.blocks[first:]:
            total.merge(block)
        pairs = _pairs(self.models, [block.paired for block in self.blocks[first:]])
        return {"from_example": int(starts[first]), **total.summary(), **pairs}

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        state: dict[str, npt.NDArray[np.generic]] = {
            "length": np.array([self.length]),
            "counts": np.array(self.counts, np.int64),
        }
        return state | _stack(self.blocks)

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self.length, self.counts = int(state["length"][0]), state["counts"].tolist()
        self.blocks = _unstack(self.models, state, len(self.counts))


class Windows:
    """Tumbling windows of event time; the last few together are the rolling window.

    The blocks of their bootstrap are panes of a twentieth of a window. Examples come in event-time order, so a window is final once every
    label window that began in it is closed and learned (`close`); until then it is provisional.
    """

    _PANES = 20

    def __init__(self, models: Sequence[str], *, window_ms: int, rolling: int) -> None:
        self.models, self.window_ms, self.rolling = tuple(models), window_ms, rolling
        self.tallies: dict[int, Tally] = {}  # by window number
        self.panes: dict[int, Floats] = {}  # (sum of differences, count) [M - 1, 2] by pane number
        self.final_before = 0  # windows before this number have been reported as final

    def add(self, batch: Scored) -> None:
        for pane, part in self._by_pane(batch):
            if (number := pane // self._PANES) not in self.tallies:
                self.tallies[number] = Tally(self.models)
            self.tallies[number].add(part)
            _pair(
                self.panes.setdefault(pane, np.zeros((len(self.models) - 1, 2))),
                part.loss,
                part.bin,
            )

    def _by_pane(self, batch: Scored) -> Iterator[tuple[int, Scored]]:
        first, last = (int(batch.time[at]) * self._PANES // self.window_ms for at in (0, -1))
        if first == last:
            yield first, batch
            return
        panes = batch.time * self._PANES // self.window_ms
        edges = (np.flatnonzero(np.diff(panes)) + 1).tolist()
        for start, stop in zip([0, *edges], [*edges, len(batch)], strict=True):
            yield int(panes[start]), batch[start:stop]

    def close(self, before_ms: int) -> list[dict[str, object]]:
        """Reports of the windows that end at or before this event time, once each; what no rolling window needs any more is forgotten."""
        number_now = before_ms // self.window_ms
        if number_now <= self.final_before:
            return []
        final = [
            self._summary(number, number)
            for number in sorted(self.tallies)
            if self.final_before <= number < number_now
        ]
        self.final_before = number_now
        keep_from = min(self.final_before, max(self.tallies, default=0)) - self.rolling
        self.tallies = {
            number: tally for number, tally in self.tallies.items() if number >= keep_from
        }
        self.panes = {
            pane: sums for pane, sums in self.panes.items() if pane // self._PANES >= keep_from
        }
        return [{**report, "provisional": False} for report in final]

    def rolling_summary(self) -> dict[str, object] | None:
        """The newest `rolling` windows, the last of them still open: provisional."""
        if not self.tallies:
            return None
        last = max(self.tallies)
        return {**self._summary(last - self.rolling + 1, last), "provisional": True}

    def _summary(self, first: int, last: int) -> dict[str, object]:
        total = Tally(self.models)
        for number in range(first, last + 1):
            if number in self.tallies:
                total.merge(self.tallies[number])
        pairs = _pairs(
            self.models,
            [
                sums
                for pane, sums in sorted(self.panes.items())
                if first <= pane // self._PANES <= last
            ],
        )
        return {
            "start_ms": first * self.window_ms,
            "end_ms": (last + 1) * self.window_ms,
            **total.summary(),
            **pairs,
        }

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        numbers, panes = sorted(self.tallies), sorted(self.panes)
        state: dict[str, npt.NDArray[np.generic]] = {
            "numbers": np.array(numbers, np.int64),
            "panes": np.array(panes, np.int64),
            "pane_sums": np.array([self.panes[pane] for pane in panes]).reshape(
                len(panes), len(self.models) - 1, 2
            ),
            "final_before": np.array([self.final_before]),
        }
        return state | _stack([self.tallies[number] for number in numbers])

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        numbers = state["numbers"].tolist()
        self.final_before = int(state["final_before"][0])
        self.tallies = dict(zip(numbers, _unstack(self.models, state, len(numbers)), strict=True))
        self.panes = dict(zip(state["panes"].tolist(), np.array(state["pane_sums"]), strict=True))


def _stack(tallies: Sequence[Tally]) -> dict[str, npt.NDArray[np.generic]]:
    if not tallies:
        return {}
    return {
        name: np.stack([tally.arrays()[name] for tally in tallies]) for name in tallies[0].arrays()
    }


def _unstack(
    models: Sequence[str], state: Mapping[str, npt.NDArray[np.generic]], count: int
) -> list[Tally]:
    tallies = [Tally(models) for _ in range(count)]
    for row, tally in enumerate(tallies):
        for name, array in tally.arrays().items():
            array[...] = state[name][row]
    return tallies


def _measured(
    logits: Floats, labels: npt.NDArray[np.uint8], chosen: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats, npt.NDArray[np.int32]]:
    """Of `logits` [M, n]: loss, probability, and the place in the histogram or -1 where not `chosen`; each [M, n]."""
    e = np.exp(
        -np.abs(logits)
    )  # numpy's exponential and logarithm have vector instructions, a compiled loop has not
    loss, probability, place = np.log1p(e), e, np.empty(logits.shape, np.int32)
    _measure(logits, labels, chosen, loss, probability, place)
    return loss, probability, place


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _measure(logits, labels, chosen, loss, probability, place):  # type: ignore[no-untyped-def]
    """In place: `loss` is softplus(-|logit|), `probability` exp(-|logit|)."""
    for m in range(len(logits)):
        for i in range(len(labels)):
            logit, e = logits[m, i], probability[m, i]
            loss[m, i] += max(-logit if labels[i] == 1 else logit, 0.0)
            probability[m, i] = (1.0 if logit >= 0.0 else e) / (1.0 + e)
            found = min(max((logit + LOGIT_RANGE) * (BINS / (2 * LOGIT_RANGE)), 0.0), BINS - 1.0)
            place[m, i] = np.int32(found) + BINS * labels[i] if chosen[m, i] else -1


@numba.njit(cache=True, nogil=True)
def _count(sums, histogram, loss, probability, place):  # type: ignore[no-untyped-def]
    for m in range(len(place)):
        count, clicks, sum_p, sum_loss = sums[m]
        for i in range(place.shape[1]):
            at = place[m, i]
            if at >= 0:
                clicked = at >= BINS
                histogram[m, int(clicked), at - BINS if clicked else at] += 1
                count += 1.0
                clicks += clicked
                sum_p += probability[m, i]
                sum_loss += loss[m, i]
        sums[m, COUNT], sums[m, CLICKS], sums[m, SUM_P], sums[m, SUM_LOSS] = (
            count,
            clicks,
            sum_p,
            sum_loss,
        )


@numba.njit(cache=True, nogil=True)
def _pair(paired, loss, place):  # type: ignore[no-untyped-def]
    for m in range(1, len(place)):
        difference, count = paired[m - 1]
        for i in range(place.shape[1]):
            if place[0, i] >= 0 and place[m, i] >= 0:
                difference += loss[0, i] - loss[m, i]
                count += 1.0
        paired[m - 1, 0], paired[m - 1, 1] = difference, count


@numba.njit(cache=True, nogil=True)
def _tally(sums, histogram, paired, best, loss, probability, place, best_loss):  # type: ignore[no-untyped-def]
    _count(sums, histogram, loss, probability, place)
    _pair(paired, loss, place)
    for i in range(len(best_loss)):
        if not math.isnan(best_loss[i]):
            best[0] += best_loss[i]
            best[1] += 1.0


def _best_losses(true_probability: Floats, labels: npt.NDArray[np.uint8]) -> Floats:
    """NaN where it is unknown."""
    of_label = np.where(labels == 1, true_probability, 1.0 - true_probability)
    return -np.log(np.maximum(of_label, 1e-15))
