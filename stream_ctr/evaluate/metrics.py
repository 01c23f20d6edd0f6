"""Progressive metrics: mergeable, in constant memory, keyed by the event time of the impression.

The AUC comes from a histogram over the *logit*, with 4096 equal bins over [-16, 16]; the outermost
bins take what lies beyond. Two examples in different bins are ordered exactly, and a positive and
a negative in one bin count one half. The error is at most 1/2 sum_b pos_b neg_b / (P N), which is
reported as `auc_error_bound`.

>>> score = Score()
>>> score.add(np.array([2.0, -1.0, 0.5, -3.0]), np.array([1, 0, 1, 0], np.uint8))
>>> summary = score.summary()
>>> summary.auc, round(summary.logloss, 4), summary.ctr
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

from stream_ctr.evaluate.summary import Difference, ModelScore, Paired, Summary, WindowSummary

Floats = npt.NDArray[np.float64]
_Span = tuple[int, int]  # the start and the end of a window, in epoch milliseconds

BINS = 4096
LOGIT_RANGE = 16.0

# Columns of the sums of a score.
COUNT = 0
CLICKS = 1
SUM_P = 2
SUM_LOSS = 3

# Probabilities are kept this far away from 0 and 1.
_EPSILON = 1e-15
_MAX_BLOCKS = 128
_FIRST_BLOCK_LENGTH = 64
_MIN_BLOCKS_OF_INTERVAL = 10
_DRAWS = 2000


def losses(logits: Floats, labels: npt.NDArray[np.uint8]) -> Floats:
    """Return -log p(label) in nats: softplus(-logit) for a click, else softplus(logit).

    The result is never infinite.

    >>> losses(np.array([0.0, 800.0]), np.array([1, 0], np.uint8)).round(4).tolist()
    [0.6931, 800.0]
    """
    return np.logaddexp(0.0, np.where(labels == 1, -logits, logits))


def probabilities(logits: Floats) -> Floats:
    """Return the sigmoid of logits."""
    return np.where(
        logits >= 0,
        1.0 / (1.0 + np.exp(-np.abs(logits))),
        np.exp(-np.abs(logits)) / (1.0 + np.exp(-np.abs(logits))),
    )


def logits(p: Floats) -> Floats:
    """Return the logits of probabilities, which are kept 1e-15 away from 0 and 1."""
    p = np.clip(p, _EPSILON, 1.0 - _EPSILON)
    return np.log(p) - np.log1p(-p)


def entropy(rate: float) -> float:
    """Return the entropy in nats of a label with this click-through rate.

    It is the logloss of the best constant prediction.

    >>> round(entropy(0.5), 4), entropy(0.0)
    (0.6931, 0.0)
    """
    return sum(-q * math.log(q) for q in (rate, 1.0 - rate) if q > 0)


class Score:
    """The metrics of one model on a set of examples.

    `sums` holds the count, the clicks, and the sums of the probabilities and of the losses;
    `histogram` [label, bin] counts examples. Both may be views of the arrays of a `Tally`.
    """

    def __init__(
        self, sums: Floats | None = None, histogram: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.sums = np.zeros(4) if sums is None else sums
        self.histogram = np.zeros((2, BINS), np.int64) if histogram is None else histogram

    def add(self, logits: Floats, labels: npt.NDArray[np.uint8]) -> None:
        """Add n examples."""
        chosen = np.ones((1, len(logits)), np.bool_)
        _count(self.sums[None], self.histogram[None], *_measure(logits[None], labels, chosen))

    def summary(self) -> ModelScore:
        count, clicks, sum_p, sum_loss = self.sums.tolist()
        auc, bound = self._auc()
        mean = sum_loss / count if count else None
        background = entropy(clicks / count) if count else 0.0
        return ModelScore(
            auc=auc,
            auc_error_bound=bound,
            logloss=mean,
            ne=mean / background if mean is not None and background else None,
            pred_over_actual=sum_p / clicks if clicks else None,
            ctr=clicks / count if count else None,
            count=int(count),
        )

    def _auc(self) -> tuple[float | None, float | None]:
        """Return the AUC and the bound of its error."""
        negative, positive = self.histogram
        pairs = int(positive.sum()) * int(negative.sum())
        if not pairs:
            return None, None
        below = np.cumsum(negative) - negative
        ties = float((positive * negative).sum())
        return (float((positive * below).sum()) + 0.5 * ties) / pairs, 0.5 * ties / pairs


def paired_interval(blocks: Floats) -> Difference:
    """Return the mean difference in loss per impression, and its 95 % interval.

    `blocks` [n, 2] are (sum of differences, count) of neighbouring examples. The interval is a
    bootstrap over the blocks (2,000 draws, fixed seed), because examples close in time are not
    independent. There is no interval below ten blocks.
    """
    total, count = blocks.sum(axis=0).tolist() if len(blocks) else (0.0, 0.0)
    if not count:
        return Difference(logloss_difference=None, low=None, high=None, count=0, blocks=0)
    low = None
    high = None
    if len(blocks) >= _MIN_BLOCKS_OF_INTERVAL:
        drawn = _draws(len(blocks)) @ blocks
        means = drawn[:, 0] / np.maximum(drawn[:, 1], 1)
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Difference(
        logloss_difference=total / count, low=low, high=high, count=int(count), blocks=len(blocks)
    )


# One report asks for the draws of the run, of its tails, of a window and of the rolling window.
@lru_cache(maxsize=8)
def _draws(blocks: int) -> Floats:
    """Return how often each block is drawn, [draws, blocks], the same for every model."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=_DRAWS)
    return drawn.astype(np.float64)


class Scored:
    """A batch of n examples with the logits of every model from before the update.

    `time` is the event time in epoch milliseconds; `true_probability` is NaN where it is unknown.
    `logits[model]` are those of all n examples or, where `chosen` has the model, those of the
    examples that the mask `chosen[model]` [n] selects.

    All measures of an example are computed once, for all tallies that the batch is added to:
    `loss`, `probability` and `bin` [M, n] (`bin` is -1 where the model has no logit) and
    `best_loss` [n]. `batch[start:stop]` is a part of the batch.
    """

    def __init__(
        self,
        time: npt.NDArray[np.int64],
        labels: npt.NDArray[np.uint8],
        true_probability: Floats,
        logits: Mapping[str, npt.NDArray[np.floating]],
        chosen: Mapping[str, npt.NDArray[np.bool_]],
    ) -> None:
        every_logit = np.zeros((len(logits), len(time)))
        every_chosen = np.ones((len(logits), len(time)), np.bool_)
        for m, (model, predicted) in enumerate(logits.items()):
            if model in chosen:
                every_chosen[m] = chosen[model]
                every_logit[m, chosen[model]] = predicted
            else:
                every_logit[m] = predicted
        self.time = time
        self.loss, self.probability, self.bin = _measure(every_logit, labels, every_chosen)
        self.best_loss = _best_losses(true_probability, labels)

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows: slice | npt.NDArray[np.intp]) -> Scored:
        part = copy(self)
        part.time = self.time[rows]
        part.loss = self.loss[:, rows]
        part.probability = self.probability[:, rows]
        part.bin = self.bin[:, rows]
        part.best_loss = self.best_loss[rows]
        return part


class Tally:
    """The metrics of M models on one set of examples. Tallies of two sets can be merged.

    `scores` has the score of each model, `paired` [M - 1] the (sum of differences, count) of the
    first model and each of the others, and `best` the (sum, count) of the losses of the true
    probabilities.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self._sums = np.zeros((len(models), 4))
        self._histogram = np.zeros((len(models), 2, BINS), np.int64)
        self.paired = np.zeros((len(models) - 1, 2))
        self.best = np.zeros(2)
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

    def merge(self, other: Tally) -> None:
        for array, added in zip(self.arrays().values(), other.arrays().values(), strict=True):
            array += added

    @property
    def clicks(self) -> int:
        """The clicks of the examples that the first model scored."""
        return int(self._sums[0, CLICKS])

    @property
    def constant_logloss(self) -> float | None:
        """The logloss of the best constant prediction."""
        count, clicks = self._sums[0, :SUM_P].tolist()
        return entropy(clicks / count) if count else None

    @property
    def best_possible_logloss(self) -> float | None:
        """The logloss of the true probabilities."""
        total, count = self.best.tolist()
        return total / count if count else None

    def summaries(self) -> dict[str, ModelScore]:
        """Return the summary of each model."""
        return {model: score.summary() for model, score in self.scores.items()}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "sums": self._sums,
            "histogram": self._histogram,
            "paired": self.paired,
            "best": self.best,
        }


def _pairs(models: Sequence[str], blocks: Sequence[Floats]) -> dict[str, Difference]:
    """Return the difference of the first model from each other one.

    `blocks` are (sum of differences, count) [M - 1, 2] of the examples that both scored.
    """
    stacked = np.array(blocks).reshape(len(blocks), len(models) - 1, 2)
    return {
        model: paired_interval(stacked[stacked[:, m, 1] > 0, m])
        for m, model in enumerate(models[1:])
    }


def _paired(models: Sequence[str], pairs: Mapping[str, Difference]) -> Paired:
    """Return the difference from the last model, which is the baseline if there is one."""
    difference = pairs[models[-1]] if pairs else paired_interval(np.empty((0, 2)))
    return Paired(
        models=list(dict.fromkeys((models[0], models[-1]))),
        logloss_difference=difference.logloss_difference,
        low=difference.low,
        high=difference.high,
        count=difference.count,
        blocks=difference.blocks,
    )


class WholeRun:
    """The tally of a whole run, in at most 128 blocks of neighbouring examples.

    All blocks have the same length, except that the last may still be filling. The length doubles
    when there are too many blocks. Therefore the metrics of the last half, or of any other tail,
    are available at the end of a run whose length was not known. The blocks are also those of the
    bootstrap.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self.models = tuple(models)
        self.length = _FIRST_BLOCK_LENGTH
        self.blocks: list[Tally] = []
        self.counts: list[int] = []

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, batch: Scored) -> None:
        done = 0
        while done < len(batch):
            if not self.blocks or self.counts[-1] == self.length:
                self._open_block()
            n = min(self.length - self.counts[-1], len(batch) - done)
            self.blocks[-1].add(batch[done : done + n] if n < len(batch) else batch)
            self.counts[-1] += n
            done += n

    def _open_block(self) -> None:
        if len(self.blocks) == _MAX_BLOCKS:
            self._merge_neighbours()
        self.blocks.append(Tally(self.models))
        self.counts.append(0)

    def _merge_neighbours(self) -> None:
        for left, right in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            left.merge(right)
        self.blocks = self.blocks[::2]
        self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]
        self.length *= 2

    def summary(self, *, last: float = 1.0) -> Summary:
        """Return the metrics of the last share of the examples.

        The share begins at the nearest boundary of a block, at number `from_example`.
        """
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        first = int(np.argmin(np.abs(starts - (1.0 - last) * self.count))) if self.blocks else 0
        total = Tally(self.models)
        for block in self.blocks[first:]:
            total.merge(block)
        pairs = _pairs(self.models, [block.paired for block in self.blocks[first:]])
        return Summary(
            from_example=int(starts[first]),
            models=total.summaries(),
            constant_logloss=total.constant_logloss,
            best_possible_logloss=total.best_possible_logloss,
            paired=_paired(self.models, pairs),
            pairs=pairs,
        )

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        state: dict[str, npt.NDArray[np.generic]] = {
            "length": np.array([self.length]),
            "counts": np.array(self.counts, np.int64),
        }
        return state | _stack(self.blocks)

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self.length = int(state["length"][0])
        self.counts = state["counts"].tolist()
        self.blocks = _unstack(self.models, state, len(self.counts))


class Windows:
    """Metrics in tumbling windows of event time. The last `rolling` windows are the rolling window.

    A twentieth of a window is a pane; panes are the blocks of the bootstrap. Joined examples come
    in event-time order, so a window is final once all label windows that began in it are closed and
    learned (`close`). Until then it is provisional.

    Windows are known by their event times, so a state may be loaded with another `window_ms`: those
    that were begun keep their ends, and examples that follow go into windows of the new length.
    """

    _PANES = 20

    def __init__(self, models: Sequence[str], *, window_ms: int, rolling: int) -> None:
        self.models = tuple(models)
        self.window_ms = window_ms
        self.rolling = rolling
        self.tallies: dict[_Span, Tally] = {}
        # (sum of differences, count) [M - 1, 2] by the window and the number of the pane in it
        self.panes: dict[tuple[_Span, int], Floats] = {}
        self.final_before_ms = 0  # windows that end by then have been reported as final

    def add(self, batch: Scored) -> None:
        for number, part in self._by_pane(batch):
            start = number // self._PANES * self.window_ms
            span = start, start + self.window_ms
            if span not in self.tallies:
                self.tallies[span] = Tally(self.models)
            self.tallies[span].add(part)
            pane = span, number % self._PANES
            sums = self.panes.setdefault(pane, np.zeros((len(self.models) - 1, 2)))
            _pair(sums, part.loss, part.bin)

    def _by_pane(self, batch: Scored) -> Iterator[tuple[int, Scored]]:
        """Yield the parts of a batch by the number of their pane since 1970."""
        panes = batch.time * self._PANES // self.window_ms
        if (panes == panes[0]).all():
            yield int(panes[0]), batch
            return
        if (np.diff(panes) < 0).any():  # examples that came with their label are among them
            in_order = np.argsort(panes, kind="stable")
            batch, panes = batch[in_order], panes[in_order]
        edges = (np.flatnonzero(np.diff(panes)) + 1).tolist()
        for start, stop in zip([0, *edges], [*edges, len(batch)], strict=True):
            yield int(panes[start]), batch[start:stop]

    def close(self, before_ms: int) -> list[WindowSummary]:
        """Return each window that ends at or before this event time, once.

        Windows that no rolling window needs any more are forgotten.
        """
        final_before_ms = before_ms // self.window_ms * self.window_ms
        if final_before_ms <= self.final_before_ms:
            return []
        final = [
            self._summary([span], start_ms=span[0], provisional=False)
            for span in sorted(self.tallies, key=lambda span: span[::-1])
            if self.final_before_ms < span[1] <= final_before_ms
        ]
        self.final_before_ms = final_before_ms
        newest = max((start for start, _ in self.tallies), default=0)
        self._forget(min(self.final_before_ms, newest) - self.rolling * self.window_ms)
        return final

    def _forget(self, keep_from_ms: int) -> None:
        """Drop the windows that start before `keep_from_ms` and have been reported."""
        self.tallies = {
            (start, end): tally
            for (start, end), tally in self.tallies.items()
            if start >= keep_from_ms or end > self.final_before_ms
        }
        self.panes = {pane: sums for pane, sums in self.panes.items() if pane[0] in self.tallies}

    def rolling_summary(self) -> WindowSummary | None:
        """Return the newest `rolling` windows as one; the last of them is still open."""
        if not self.tallies:
            return None
        first = max(start for start, _ in self.tallies) - (self.rolling - 1) * self.window_ms
        spans = sorted(span for span in self.tallies if span[0] >= first)
        return self._summary(spans, start_ms=first, provisional=True)

    def final_summary(self) -> WindowSummary | None:
        """Return the newest `rolling` final windows as one, None before the first is final."""
        first = self.final_before_ms - self.rolling * self.window_ms
        spans = sorted(
            span for span in self.tallies if span[0] >= first and span[1] <= self.final_before_ms
        )
        if not spans:
            return None
        return self._summary(spans, start_ms=spans[0][0], provisional=False)

    def _summary(
        self, spans: Sequence[_Span], *, start_ms: int, provisional: bool
    ) -> WindowSummary:
        """Return the metrics of these windows, as one that begins at `start_ms`."""
        total = Tally(self.models)
        for span in spans:
            total.merge(self.tallies[span])
        chosen = set(spans)
        panes = sorted(pane for pane in self.panes if pane[0] in chosen)
        blocks = [self.panes[pane] for pane in panes]
        pairs = _pairs(self.models, blocks)
        return WindowSummary(
            start_ms=start_ms,
            end_ms=max(end for _, end in spans),
            models=total.summaries(),
            constant_logloss=total.constant_logloss,
            best_possible_logloss=total.best_possible_logloss,
            paired=_paired(self.models, pairs),
            pairs=pairs,
            provisional=provisional,
        )

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        spans = sorted(self.tallies)
        panes = sorted(self.panes)
        sums = np.array([self.panes[pane] for pane in panes])
        state: dict[str, npt.NDArray[np.generic]] = {
            "spans": np.array(spans, np.int64).reshape(len(spans), 2),
            "panes": np.array([(*span, pane) for span, pane in panes], np.int64).reshape(-1, 3),
            "pane_sums": sums.reshape(len(panes), len(self.models) - 1, 2),
            "final_before_ms": np.array([self.final_before_ms]),
        }
        return state | _stack([self.tallies[span] for span in spans])

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        spans = [(start, end) for start, end in state["spans"].tolist()]
        self.final_before_ms = int(state["final_before_ms"][0])
        self.tallies = dict(zip(spans, _unstack(self.models, state, len(spans)), strict=True))
        panes = [((start, end), pane) for start, end, pane in state["panes"].tolist()]
        self.panes = dict(zip(panes, np.array(state["pane_sums"]), strict=True))


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


# -- compiled ------------------------------------------------------------------------------------


def _measure(
    logits: Floats, labels: npt.NDArray[np.uint8], chosen: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats, npt.NDArray[np.int32]]:
    """Return loss, probability and bin of `logits` [M, n], each [M, n].

    A bin is an index into a flattened histogram [label, bin], and -1 where not `chosen`.
    """
    # The exponential and the logarithm of numpy use vector instructions; a compiled loop does not.
    e = np.exp(-np.abs(logits))
    loss = np.log1p(e)
    probability = e
    bins = np.empty(logits.shape, np.int32)
    _finish_measures(logits, labels, chosen, loss, probability, bins)
    return loss, probability, bins


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _finish_measures(logits, labels, chosen, loss, probability, bins):  # type: ignore[no-untyped-def]
    """Complete in place: `loss` is softplus(-|logit|), `probability` is exp(-|logit|)."""
    for m in range(len(logits)):
        for i in range(len(labels)):
            logit = logits[m, i]
            e = probability[m, i]
            loss[m, i] += max(-logit if labels[i] == 1 else logit, 0.0)
            probability[m, i] = (1.0 if logit >= 0.0 else e) / (1.0 + e)
            found = min(max((logit + LOGIT_RANGE) * (BINS / (2 * LOGIT_RANGE)), 0.0), BINS - 1.0)
            bins[m, i] = np.int32(found) + BINS * labels[i] if chosen[m, i] else -1


@numba.njit(cache=True, nogil=True)
def _count(sums, histogram, loss, probability, bins):  # type: ignore[no-untyped-def]
    """Add measures [M, n] to `sums` [M, 4] and `histogram` [M, label, bin]."""
    for m in range(len(bins)):
        count, clicks, sum_p, sum_loss = sums[m]
        for i in range(bins.shape[1]):
            found = bins[m, i]
            if found >= 0:
                clicked = found >= BINS
                histogram[m, int(clicked), found - BINS if clicked else found] += 1
                count += 1.0
                clicks += clicked
                sum_p += probability[m, i]
                sum_loss += loss[m, i]
        sums[m, COUNT] = count
        sums[m, CLICKS] = clicks
        sums[m, SUM_P] = sum_p
        sums[m, SUM_LOSS] = sum_loss


@numba.njit(cache=True, nogil=True)
def _pair(paired, loss, bins):  # type: ignore[no-untyped-def]
    """Add to `paired` [M - 1] the examples that the first model and each other one scored."""
    for m in range(1, len(bins)):
        difference, count = paired[m - 1]
        for i in range(bins.shape[1]):
            if bins[0, i] >= 0 and bins[m, i] >= 0:
                difference += loss[0, i] - loss[m, i]
                count += 1.0
        paired[m - 1, 0] = difference
        paired[m - 1, 1] = count


@numba.njit(cache=True, nogil=True)
def _tally(  # type: ignore[no-untyped-def]
    sums,
    histogram,
    paired,
    best,
    loss,
    probability,
    bins,
    best_loss,
):
    _count(sums, histogram, loss, probability, bins)
    _pair(paired, loss, bins)
    for i in range(len(best_loss)):
        if not math.isnan(best_loss[i]):
            best[0] += best_loss[i]
            best[1] += 1.0


def _best_losses(true_probability: Floats, labels: npt.NDArray[np.uint8]) -> Floats:
    """Return the losses of the true probabilities, NaN where these are unknown."""
    of_label = np.where(labels == 1, true_probability, 1.0 - true_probability)
    return -np.log(np.maximum(of_label, _EPSILON))
