"""The health of each field: how much is missing, new, crowded together, or unlike before.

It measures the examples that the models learn, in their order, so it depends on the log alone. It
is behind the events by a label window. Everything is measured in the columns of ids that the models
see: those of F fields and, after them, of C cross products.

    figure           of                        how
    --------------   -----------------------   ----------------------------------------------------
    missing rate     recent examples           the id is the row of a missing value
    unseen rate      recent examples           the row had never been learned before the batch
    PSI              recent examples           64 cells, by the low bits of the id, and one for
                                               missing values, against the reference (see `psi`)
    distinct         the whole run             HyperLogLog of the rows of a column (see `sketch`);
                                               from r of m rows, -m ln(1 - r / m) values
    occupancy        the whole run             r / m
    collision rate   the whole run             1 - (1 - 1/m)^(d - 1): the share of d values that
                                               share their row with another one

*Recent* are the newest windows of event time, as many as the rolling window of the metrics has. A
window that leaves them enters the *reference*, whose counts lose half of their weight in a day of
event time. A reference that ends where the recent windows begin shows what changes faster than an
online model forgets, and needs constant memory; a fixed one would show forever that an advertiser
has gone. A field with values (the encodings `value` and `log_value`) has one row, so its cells are
those of the value's logarithmic bucket.

Distinct rows and learned rows are those of all examples. The other figures are of a share of the
examples, chosen by a hash of the impression id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.evaluate import sketch
from stream_ctr.evaluate.drift import Drift, DriftWatch, Kind
from stream_ctr.evaluate.psi import SHIFTED_MUCH_FROM, psi
from stream_ctr.evaluate.scoreboard import part
from stream_ctr.evaluate.summary import FieldFigures, FieldSummary, TableFigures
from stream_ctr.events.features import mix64
from stream_ctr.join.examples import Examples

CELLS = 64
_MISSING = CELLS  # the cell of missing values
_UNSEEN = CELLS + 1  # counts unseen ids; it is no cell
_COLUMNS = CELLS + 2
_FEWEST = 500  # values on each side: the PSI of 65 cells then has a standard deviation of 0.045
_HALF_LIFE_MS = 86_400_000
_SALT = np.uint64(0x9E3779B97F4A7C15)  # another sample than that of the baseline
_FULLEST = 0.98  # of the rows: beyond it, their number says little about that of the values
_DRIFT_KINDS = {
    "missing rate": Kind(unit=0.005),
    "unseen rate": Kind(unit=0.01, rises_only=True),
    # The PSI of an hour or a weekday is always high: it says nothing new when it rises.
    "PSI": Kind(unit=0.02, rises_only=True, most_before=SHIFTED_MUCH_FROM),
}


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of ids to measure.

    `names` has those of the F fields and of the C cross products. `missing_ids` int32 [F] are the
    rows of missing values, `value_columns` int64 [F + C] the columns of `values` that belong to
    them, -1 for none. The ids have `table_bits` bits.
    """

    names: tuple[str, ...]
    missing_ids: npt.NDArray[np.int32]
    value_columns: npt.NDArray[np.int64]
    table_bits: int

    @property
    def fields(self) -> int:
        return len(self.missing_ids)


class FieldHealth:
    """Measure the columns of examples in windows of event time of `window_ms`.

    The newest `rolling` windows are recent. `share` is that of the examples that are sampled.

    >>> columns = Columns(("app",), np.array([7], np.int32), np.array([-1]), table_bits=4)
    >>> health = FieldHealth(columns, window_ms=1000, rolling=2, share=1.0)
    >>> ids = np.array([[1], [7], [1], [3]], np.int32)
    >>> none = np.zeros((4, 0), np.float32)
    >>> label = np.zeros(4, np.uint8)
    >>> number = np.arange(4)
    >>> batch = Examples(number.astype(np.uint64), number, ids, none, label, label, number)
    >>> health.add(batch)
    >>> health.add(batch)
    >>> app = health.summary().fields["app"]
    >>> app.missing_rate, app.unseen_rate, app.distinct, app.psi
    (0.25, 0.5, 2, None)
    """

    def __init__(
        self, columns: Columns, *, window_ms: int, rolling: int, share: float = 0.125
    ) -> None:
        self._columns = columns
        self._window_ms = window_ms
        self._rolling = rolling
        self._threshold = None if share >= 1 else np.uint64(int(share * 2.0**64))
        n = len(columns.names)
        self._missing_ids = np.full(n, -1, np.int64)  # a cross product is never missing
        self._missing_ids[: columns.fields] = columns.missing_ids
        self._learned = np.zeros(max((1 << columns.table_bits) // 64, 1), np.uint64)
        self._sketch = sketch.HyperLogLog(n)
        self._windows: dict[int, npt.NDArray[np.int64]] = {}  # by their start: [n, _COLUMNS]
        self._reference = np.zeros((n, CELLS + 1))
        # The start of its newest window, and the sums of weight x count and of weight^2 x count.
        self._reference_ms = 0
        self._reference_sums = np.zeros(2)
        self._final_before_ms = 0
        self._drift = DriftWatch(
            {
                _series(name, figure): kind
                for index, name in enumerate(columns.names)
                for figure, kind in _DRIFT_KINDS.items()
                if index < columns.fields or figure != "missing rate"
            },
            hold=rolling,
        )

    @property
    def drifts(self) -> list[Drift]:
        """The figures of fields whose level has changed in the last windows."""
        return self._drift.found

    def add(self, batch: Examples) -> None:
        """Measure a batch that was just learned, and close the windows that it ends."""
        n = len(batch)
        if not n:
            return
        chosen = np.ones(n, np.bool_)
        if self._threshold is not None:
            chosen = mix64(batch.id_hash ^ _SALT) < self._threshold
        starts = batch.time // self._window_ms * self._window_ms
        in_order = bool((np.diff(batch.time) >= 0).all())
        if in_order and starts[0] == starts[-1]:
            self._count(batch, chosen, int(starts[0]))
        else:
            for start in np.unique(starts).tolist():
                rows = starts == start
                self._count(batch[rows], chosen[rows], start)
        _mark(batch.ids, self._learned)
        self._close(int(batch.time[-1] if in_order else batch.time.min()))

    def _count(self, batch: Examples, chosen: npt.NDArray[np.bool_], start: int) -> None:
        if start + self._window_ms <= self._final_before_ms:
            chosen = np.zeros(len(batch), np.bool_)  # its window is final
            start = self._final_before_ms
        if start not in self._windows:
            self._windows[start] = np.zeros((len(self._columns.names), _COLUMNS), np.int64)
        _observe(
            batch.ids,
            batch.values,
            chosen,
            self._missing_ids,
            self._columns.value_columns,
            self._learned,
            self._sketch.registers,
            self._windows[start],
        )

    # -- windows ---------------------------------------------------------------------------------

    def _close(self, before_ms: int) -> None:
        """Make the windows that end at or before this event time final."""
        final_before_ms = before_ms // self._window_ms * self._window_ms
        if final_before_ms <= self._final_before_ms:
            return
        for start in sorted(self._windows):
            if self._final_before_ms < start + self._window_ms <= final_before_ms:
                self._watch(start)
        self._final_before_ms = final_before_ms
        newest = max(self._windows)
        for start in sorted(self._windows):
            if start <= newest - self._rolling * self._window_ms:
                self._enter_reference(start, self._windows.pop(start))

    def _watch(self, start: int) -> None:
        """Add the figures of a final window to the series in which drift is looked for."""
        counts = self._windows[start]
        n = int(counts[0, : CELLS + 1].sum())
        if n < _FEWEST:
            return
        for index, name in enumerate(self._columns.names):
            column = counts[index]
            if index < self._columns.fields:
                self._drift.add(_series(name, "missing rate"), start, int(column[_MISSING]) / n)
            self._drift.add(_series(name, "unseen rate"), start, int(column[_UNSEEN]) / n)
            found = self._psi(index, column)
            if found is not None:
                self._drift.add(_series(name, "PSI"), start, found)

    def _enter_reference(self, start: int, counts: npt.NDArray[np.int64]) -> None:
        weight = 2.0 ** (-max(start - self._reference_ms, 0) / _HALF_LIFE_MS)
        n = float(counts[0, : CELLS + 1].sum())
        self._reference = self._reference * weight + counts[:, : CELLS + 1]
        self._reference_sums *= (weight, weight**2)
        self._reference_sums += n
        self._reference_ms = max(start, self._reference_ms)

    def _psi(self, index: int, counts: npt.NDArray[np.int64]) -> float | None:
        """Return the PSI of a column's counts, None if there are too few values."""
        total, squares = self._reference_sums.tolist()
        size = total**2 / squares if squares else 0.0
        cells = counts[: CELLS + 1]
        if cells.sum() < _FEWEST or size < _FEWEST:
            return None
        return psi(cells, self._reference[index], size=size)

    # -- figures ---------------------------------------------------------------------------------

    def summary(self) -> FieldSummary | None:
        """Return the figures of the recent windows and of the whole run, None before an example."""
        if not self._windows:
            return None
        recent = np.sum([self._windows[start] for start in sorted(self._windows)], axis=0)
        n = int(recent[0, : CELLS + 1].sum())
        m = 1 << self._columns.table_bits
        rows = np.minimum(self._sketch.estimates(), m)
        values = [_values(r, m) for r in rows.tolist()]
        fields = {
            name: FieldFigures(
                missing_rate=(
                    _rate(recent[index, _MISSING], n) if index < self._columns.fields else None
                ),
                unseen_rate=_rate(recent[index, _UNSEEN], n),
                distinct=round(values[index]),
                occupancy=float(rows[index]) / m,
                collision_rate=_collision_rate(values[index], m),
                psi=self._psi(index, recent[index]),
            )
            for index, name in enumerate(self._columns.names)
        }
        used = int(np.bitwise_count(self._learned).sum())
        return FieldSummary(
            start_ms=min(self._windows),
            end_ms=max(self._windows) + self._window_ms,
            count=n,
            fields=fields,
            table=TableFigures(
                rows=m,
                occupancy=used / m,
                collision_rate=_collision_rate(_values(used, m), m),
            ),
        )

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of everything as arrays."""
        starts = sorted(self._windows)
        shape = (len(starts), len(self._columns.names), _COLUMNS)
        counts = np.array([self._windows[start] for start in starts], np.int64).reshape(shape)
        drift = {f"drift.{name}": array for name, array in self._drift.state_dict().items()}
        return {
            "learned": self._learned.copy(),
            "registers": self._sketch.registers.copy(),
            "starts": np.array(starts, np.int64),
            "counts": counts,
            "reference": self._reference.copy(),
            "reference_sums": self._reference_sums.copy(),
            "times": np.array([self._window_ms, self._final_before_ms, self._reference_ms]),
            **drift,
        }

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned.

        If windows had another length, the recent ones become part of the reference.
        """
        self._learned[:] = state["learned"]
        self._sketch.registers[:] = state["registers"]
        self._reference = np.array(state["reference"])
        self._reference_sums = np.array(state["reference_sums"])
        window_ms, self._final_before_ms, self._reference_ms = state["times"].tolist()
        self._windows = {
            start: np.array(counts)
            for start, counts in zip(state["starts"].tolist(), state["counts"], strict=True)
        }
        if window_ms != self._window_ms:
            for start in sorted(self._windows):
                self._enter_reference(start, self._windows.pop(start))
            self._final_before_ms = self._final_before_ms // self._window_ms * self._window_ms
        self._drift.load_state_dict(part(state, "drift."))


def _series(name: str, figure: str) -> str:
    return f"{figure} of {name}"


def _rate(count: np.int64, n: int) -> float | None:
    return int(count) / n if n else None


def _values(rows: float, m: int) -> float:
    """Return how many values fill so many of m rows (Whang et al. 1990, linear counting).

    >>> round(_values(1 << 19, 1 << 20)), round(_values(3, 1 << 20))
    (726817, 3)
    """
    return -m * math.log1p(-min(rows / m, _FULLEST))


def _collision_rate(values: float, m: int) -> float:
    """Return the share of the values that share one of m rows with another value.

    >>> round(_collision_rate(1 << 20, 1 << 20), 3), _collision_rate(1.0, 16)
    (0.632, 0.0)
    """
    return -math.expm1(max(values - 1.0, 0.0) * math.log1p(-1.0 / m)) if m > 1 else 0.0


# -- compiled ------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _observe(  # type: ignore[no-untyped-def]
    ids, values, chosen, missing_ids, value_columns, learned, registers, counts
):
    """Add a batch to the sketches, and of its `chosen` examples to the counts of a window."""
    for i in range(len(ids)):
        for c in range(len(counts)):
            found = ids[i, c]
            is_missing = found == missing_ids[c]
            if not is_missing:
                sketch.update(registers[c], np.uint64(found))
            if not chosen[i]:
                continue
            cell = found & (CELLS - 1)
            if is_missing:
                cell = _MISSING
            elif value_columns[c] >= 0:
                x = values[i, value_columns[c]]
                bucket = np.int64(math.floor(2.0 * math.log2(1.0 + abs(x))))
                cell = (-bucket if x < 0 else bucket) & (CELLS - 1)
            counts[c, cell] += 1
            word = learned[found >> 6]
            if (word >> np.uint64(found & 63)) & np.uint64(1) == 0:
                counts[c, _UNSEEN] += 1


@numba.njit(cache=True, nogil=True)
def _mark(ids, learned):  # type: ignore[no-untyped-def]
    """Mark the rows of a batch as learned."""
    for i in range(len(ids)):
        for c in range(ids.shape[1]):
            learned[ids[i, c] >> 6] |= np.uint64(1) << np.uint64(ids[i, c] & 63)
