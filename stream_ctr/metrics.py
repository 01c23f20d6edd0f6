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

import numpy as np
import numpy.typing as npt

BINS = 4096
LOGIT_RANGE = 16.0
_SUMS = ("count", "clicks", "sum_p", "sum_loss")
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
    return np.where(logits >= 0, 1.0 / (1.0 + np.exp(-np.abs(logits))), np.exp(-np.abs(logits)) / (1.0 + np.exp(-np.abs(logits))))


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
    """What one model did on a set of examples; two of them add up."""

    def __init__(self) -> None:
        self.sums = np.zeros(len(_SUMS))
        self.histogram = np.zeros((2, BINS), np.int64)  # [label, bin]

    def add(self, logits: Floats, labels: npt.NDArray[np.uint8], loss: Floats | None = None) -> None:
        loss = losses(logits, labels) if loss is None else loss
        self.sums += (len(logits), labels.sum(), probabilities(logits).sum(), loss.sum())
        bins = np.clip((logits + LOGIT_RANGE) * (BINS / (2 * LOGIT_RANGE)), 0, BINS - 1).astype(np.int64)
        self.histogram += np.bincount(bins + labels.astype(np.int64) * BINS, minlength=2 * BINS).reshape(2, BINS)

    def merge(self, other: Score) -> None:
        self.sums += other.sums
        self.histogram += other.histogram

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
        drawn = np.random.default_rng(0).multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=_DRAWS) @ blocks
        low, high = np.quantile(drawn[:, 0] / np.maximum(drawn[:, 1], 1), (0.025, 0.975)).tolist()
    return {"logloss_difference": total / count, "low": low, "high": high, "count": int(count), "blocks": len(blocks)}


class Tally:
    """The scores of every model on one set of examples, the paired difference of the first two, and the loss of the true probability."""

    def __init__(self, models: Sequence[str]) -> None:
        self.scores = {model: Score() for model in models}
        self.paired = np.zeros(2)  # sum of differences, count
        self.best = np.zeros(2)  # loss of the true probability, count

    def add(self, batch: Scored) -> None:
        for model, score in self.scores.items():
            if (predicted := batch.logits.get(model)) is not None:
                chosen = batch.chosen[model]
                score.add(predicted, batch.labels[chosen], batch.loss[model])
        self.paired += batch.paired
        self.best += batch.best

    @property
    def clicks(self) -> int:
        return int(next(iter(self.scores.values())).sums[1])

    def merge(self, other: Tally) -> None:
        for model, score in self.scores.items():
            score.merge(other.scores[model])
        self.paired += other.paired
        self.best += other.best

    def summary(self) -> dict[str, object]:
        first = next(iter(self.scores.values()))
        count, clicks = first.sums[:2].tolist()
        return {
            "models": {model: score.summary() for model, score in self.scores.items()},
            "constant_logloss": entropy(clicks / count) if count else None,
            "best_possible_logloss": float(self.best[0] / self.best[1]) if self.best[1] else None,
        }

    def arrays(self) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        for model, score in self.scores.items():
            yield f"{model}.sums", score.sums
            yield f"{model}.histogram", score.histogram
        yield "paired", self.paired
        yield "best", self.best


class Scored:
    """A batch with every model's logits from before the update: `time` int64 ms [n], `labels` [n], `true_probability` [n] (NaN: unknown);
    `logits[model]` [number chosen] for the examples that `chosen[model]` (bool [n]) marks."""

    def __init__(
        self,
        time: npt.NDArray[np.int64],
        labels: npt.NDArray[np.uint8],
        true_probability: Floats,
        logits: Mapping[str, Floats],
        chosen: Mapping[str, npt.NDArray[np.bool_]],
    ) -> None:
        self.time, self.labels, self.true_probability = time, labels, true_probability
        self.logits, self.chosen = logits, chosen
        self.loss = {model: losses(predicted, labels[chosen[model]]) for model, predicted in logits.items()}

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows: slice) -> Scored:
        """A run of examples."""
        chosen = {model: mark[rows] for model, mark in self.chosen.items()}
        starts = {model: int(mark[: rows.start].sum()) for model, mark in self.chosen.items()}
        part = {model: x[starts[model] : starts[model] + int(chosen[model].sum())] for model, x in self.logits.items()}
        return Scored(self.time[rows], self.labels[rows], self.true_probability[rows], part, chosen)

    @property
    def paired(self) -> Floats:
        """(sum, count) of the first model's loss less the second's, on the examples both scored."""
        if len(self.logits) < 2:
            return np.zeros(2)
        first, second = list(self.logits)[:2]
        both = self.chosen[second][self.chosen[first]]
        return np.array([(self.loss[first][both] - self.loss[second]).sum(), both.sum()])

    @property
    def best(self) -> Floats:
        known = ~np.isnan(self.true_probability)
        if not known.any():
            return np.zeros(2)
        return np.array([losses(logits(self.true_probability[known]), self.labels[known]).sum(), known.sum()])


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
            self.blocks, self.counts = self.blocks[::2], [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]
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
        pairs = np.array([block.paired for block in self.blocks[first:] if block.paired[1]]).reshape(-1, 2)
        return {
            "from_example": int(starts[first]),
            **total.summary(),
            "paired": {"models": list(self.models[:2]), **paired_interval(pairs)},
        }

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        state: dict[str, npt.NDArray[np.generic]] = {"length": np.array([self.length]), "counts": np.array(self.counts, np.int64)}
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
        self.panes: dict[int, npt.NDArray[np.float64]] = {}  # (sum of differences, count) by pane number
        self.final_before = 0  # windows before this number have been reported as final

    def add(self, batch: Scored) -> None:
        panes = batch.time * self._PANES // self.window_ms
        edges = (np.flatnonzero(np.diff(panes)) + 1).tolist()
        for start, stop in zip([0, *edges], [*edges, len(batch)], strict=True):
            pane = int(panes[start])
            part = batch[start:stop]
            self.tallies.setdefault(pane // self._PANES, Tally(self.models)).add(part)
            self.panes[pane] = self.panes.get(pane, np.zeros(2)) + part.paired

    def close(self, before_ms: int) -> list[dict[str, object]]:
        """Reports of the windows that end at or before this event time, once each; what no rolling window needs any more is forgotten."""
        number_now = before_ms // self.window_ms
        final = [self._summary(number, number) for number in sorted(self.tallies) if self.final_before <= number < number_now]
        self.final_before = max(self.final_before, number_now)
        keep_from = min(self.final_before, max(self.tallies, default=0)) - self.rolling
        self.tallies = {number: tally for number, tally in self.tallies.items() if number >= keep_from}
        self.panes = {pane: sums for pane, sums in self.panes.items() if pane // self._PANES >= keep_from}
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
        pairs = [sums for pane, sums in sorted(self.panes.items()) if first <= pane // self._PANES <= last and sums[1]]
        paired = {"models": list(self.models[:2]), **paired_interval(np.array(pairs).reshape(-1, 2))}
        return {"start_ms": first * self.window_ms, "end_ms": (last + 1) * self.window_ms, **total.summary(), "paired": paired}

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        numbers, panes = sorted(self.tallies), sorted(self.panes)
        state: dict[str, npt.NDArray[np.generic]] = {
            "numbers": np.array(numbers, np.int64),
            "panes": np.array(panes, np.int64),
            "pane_sums": np.array([self.panes[pane] for pane in panes]).reshape(-1, 2),
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
    return {name: np.stack([dict(tally.arrays())[name] for tally in tallies]) for name, _ in tallies[0].arrays()}


def _unstack(models: Sequence[str], state: Mapping[str, npt.NDArray[np.generic]], count: int) -> list[Tally]:
    tallies = [Tally(models) for _ in range(count)]
    for row, tally in enumerate(tallies):
        for name, array in tally.arrays():
            array[...] = state[name][row]
    return tallies
