"""Pending impressions: identity and click in memory, features in memory or on disk.

Features go to disk in segments (see `spill`), the newest first: their windows close last. A
snapshot holds what is in memory as arrays and the segments as files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_ctr.join import join_state, spill
from stream_ctr.join.examples import Examples
from stream_ctr.join.join_arrays import RowPool, pending_pool
from stream_ctr.join.join_state import NEVER, FeatureArrays
from stream_ctr.join.spill import Spill

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Slots = npt.NDArray[np.int64]

# The names of the columns in segments and in snapshots, in the order of the arrays.
_IDENTITY = ("id_hash", "time", "partition", "offset", "click", "delay")
_FEATURES = ("truth", "ids", "values")
# To find where the oldest end, about this many times are sorted.
_SAMPLE = 1 << 16


class Order(NamedTuple):
    """The columns by which pending rows leave: (time, partition, place), which are never equal.

    `time` is that of an impression, and of an example that came with its label the time of its
    release minus the label window.
    """

    time: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int32]
    place: npt.NDArray[np.int64]

    def argsort(self) -> npt.NDArray[np.int64]:
        """Return the places of the rows in order."""
        return np.lexsort((self.place, self.partition, self.time))

    def first(self, n: int) -> Order:
        """Return the columns of the first n rows."""
        return Order(self.time[:n], self.partition[:n], self.place[:n])

    def count_to(self, last: tuple[int, int, int]) -> int:
        """Return how many rows, which are in order, are not after `last`.

        >>> order = Order(np.array([5, 7, 7]), np.array([0, 0, 1], np.int32), np.array([9, 3, 1]))
        >>> order.count_to((7, 0, 3)), order.count_to((7, 1, 0)), order.count_to((4, 9, 9))
        (2, 2, 0)
        """
        time, partition, place = last
        first = int(np.searchsorted(self.time, time, "left"))
        end = int(np.searchsorted(self.time, time, "right"))
        there = (self.partition[first:end], self.place[first:end])
        return first + int(
            ((there[0] < partition) | ((there[0] == partition) & (there[1] <= place))).sum()
        )


class PendingImpressions:
    """The impressions whose label window is open. A slot names one of them.

    `features` is the pool of the features in memory, whose ids are packed into `id_bytes` bytes;
    `spill` holds the others. Examples that came with their label are pending, too, until the
    watermark has passed their time; `time` is `label_window_ms` earlier for them, so that all leave
    in the order of `time` (see `join_state`).
    """

    def __init__(
        self,
        features: RowPool[FeatureArrays],
        spill: Spill,
        *,
        id_bytes: int,
        label_window_ms: int,
    ) -> None:
        self.rows = pending_pool()
        self.features = features
        self.spill = spill
        self._id_bytes = id_bytes
        self._label_window_ms = label_window_ms
        self._disk_failed = False

    @property
    def count(self) -> int:
        return self.rows.count

    @property
    def oldest_ms(self) -> int | None:
        """The least event time, or None if nothing is pending."""
        return int(self._used_time.min()) if self.count else None

    @property
    def labelled(self) -> int:
        """The number of examples that came with their label."""
        used = np.flatnonzero(self._used_time != NEVER)
        return int(np.count_nonzero(self.given(used)))

    @property
    def in_memory(self) -> int:
        """The number of impressions whose features are in memory."""
        return self.features.count

    @property
    def spilled(self) -> int:
        """The number of impressions whose features are on disk."""
        return self.count - self.in_memory

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.features.nbytes

    @property
    def _used_time(self) -> npt.NDArray[np.int64]:
        return self.rows.arrays.time[: self.rows.used]

    @property
    def _used_feature_row(self) -> npt.NDArray[np.int64]:
        return self.rows.arrays.feature_row[: self.rows.used]

    def columns(
        self,
        ids: npt.NDArray[np.int32] | npt.NDArray[np.uint8],
        values: npt.NDArray[np.float32],
        true_probability: npt.NDArray[np.float64],
    ) -> join_state.FeatureColumns:
        """Return features as `join_state.push_impressions` takes them; `ids` may be packed."""
        packed: Array = ids
        if packed.dtype != np.uint8:
            packed = join_state.pack(packed, self._id_bytes)
        return join_state.FeatureColumns(true_probability, packed, values)

    def given(self, slots: Slots) -> npt.NDArray[np.bool_]:
        """Return True for the examples that came with their label."""
        return join_state.is_given(self.rows.arrays.click_end[slots])

    def clicked(self, slots: Slots) -> npt.NDArray[np.bool_]:
        """Return True for the impressions that were clicked in their window."""
        return (self.rows.arrays.click_end[slots] != NEVER) & ~self.given(slots)

    def keys(self, slots: Slots) -> npt.NDArray[np.uint64]:
        """Return the keys in the index."""
        id_hash = self.rows.arrays.id_hash[slots]
        return np.where(self.given(slots), join_state.given_key(id_hash), id_hash)

    # -- choosing ---------------------------------------------------------------------------------

    def oldest(self, before: int, at_most: int) -> Slots:
        """Return impressions with a time before `before`: at most `at_most`, the first in order."""
        return self._in_order(_oldest(self._used_time, before, at_most))[:at_most]

    def uniform_share(self, n: int, *, in_memory: bool) -> Slots:
        """Return n impressions or a few more, chosen by the hash of their ids.

        With `in_memory` only impressions whose features are in memory are chosen.
        """
        time = self._used_time
        id_hash = self.rows.arrays.id_hash
        return join_state.least_lots(id_hash, time, self._used_feature_row, n, in_memory)

    def order(self, slots: Slots) -> Order:
        """Return the columns by which impressions leave."""
        arrays = self.rows.arrays
        return Order(arrays.time[slots], arrays.partition[slots], arrays.place[slots])

    def _in_order(self, slots: Slots) -> Slots:
        return slots[self.order(slots).argsort()]

    # -- rows -------------------------------------------------------------------------------------

    def reserve(self, n: int, *, limit: int, features_limit: int) -> None:
        """Make room for n more impressions with their features in memory."""
        self.rows.reserve(n, limit)
        self.features.reserve(n, features_limit)

    def examples(self, slots: Slots) -> Examples:
        """Return the impressions as examples, with the labels that they have now."""
        arrays = self.rows.arrays
        features = self._features_of(slots)
        closed_ms = arrays.time[slots]
        time = closed_ms.copy()
        label = self.clicked(slots).astype(np.uint8)
        if (is_given := self.given(slots)).any():
            lateness, given = join_state.given(arrays.click_end[slots][is_given])
            time[is_given] += self._label_window_ms - lateness
            label[is_given] = given
        return Examples(
            id_hash=arrays.id_hash[slots],
            time=time,
            ids=join_state.unpack(features["ids"], self._id_bytes),
            values=features["values"],
            label=label,
            true_probability=features["truth"],
            closed_ms=closed_ms,
        )

    def _features_of(self, slots: Slots) -> dict[str, Array]:
        """Return the feature columns of impressions, from memory and from disk."""
        row = self.rows.arrays.feature_row[slots]
        here = row >= 0
        stored = dict(zip(_FEATURES, self.features.columns, strict=True))
        if here.all():
            return {name: array[row] for name, array in stored.items()}
        spilled = self.spill.read(row[~here])
        columns: dict[str, Array] = {}
        for name, array in stored.items():
            column = np.empty((len(row), *array.shape[1:]), array.dtype)
            column[here] = array[row[here]]
            if column.size:
                column[~here] = spilled[name]
            columns[name] = column
        return columns

    def remove(self, slots: Slots) -> None:
        """Free the rows of impressions that are no longer pending."""
        arrays = self.rows.arrays
        row = arrays.feature_row[slots]
        self.features.release(row[row >= 0])
        arrays.time[slots] = NEVER
        self.rows.release(slots)

    # -- disk -------------------------------------------------------------------------------------

    def spill_newest(self, n: int) -> int:
        """Move the features of the n newest impressions in memory to disk.

        Return how many were moved: fewer than n when the disk is full.
        """
        time = self._used_time
        slots = np.flatnonzero((self._used_feature_row >= 0) & (time != NEVER))
        first = len(slots) - n
        newest = slots[np.argpartition(time[slots], first)[first:]]
        return self._write(self._in_order(newest))

    def _write(self, slots: Slots) -> int:
        """Write the features of impressions, which are in order, to new segments.

        Return how many were written.
        """
        arrays = self.rows.arrays
        for start in range(0, len(slots), spill.SEGMENT_ROWS):
            part = slots[start : start + spill.SEGMENT_ROWS]
            last = int(arrays.time[part[-1]])
            try:
                places = self.spill.write(self._features_of(part), last=last)
            except OSError as error:
                self._log_full_disk(error)
                return start
            self._disk_failed = False
            rows = arrays.feature_row[part]
            self.features.release(rows[rows >= 0])
            arrays.feature_row[part] = places
        return len(slots)

    def _log_full_disk(self, error: OSError) -> None:
        """Log the first of several failures in a row."""
        if not self._disk_failed:
            _log.error(
                "pending impressions cannot be spilled to disk: %s; "
                "a share of them is evicted instead, and counted",
                error,
            )
        self._disk_failed = True

    def compact_segments(self) -> None:
        """Delete segments without pending impressions, and rewrite those with few.

        Otherwise the disk would fill with the features of evicted impressions.
        """
        if not self.spill.segments:
            return
        numbers = np.array(sorted(self.spill.segments))
        rows = np.array([self.spill.segments[number].rows for number in numbers.tolist()])
        sparse = numbers[2 * self._live_rows(numbers) < rows]
        feature_row = self._used_feature_row
        slots = np.flatnonzero((feature_row < 0) & (self._used_time != NEVER))
        slots = slots[np.isin(spill.segment_of(feature_row[slots]), sparse)]
        self._write(self._in_order(slots))
        self.spill.drop(numbers[self._live_rows(numbers) == 0].tolist())

    def _live_rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of pending impressions in each of these segments."""
        live = np.zeros(int(numbers[-1] - numbers[0]) + 1, np.int64)
        join_state.count_by_segment(self._used_time, self._used_feature_row, numbers[0], live)
        return live[numbers - numbers[0]]

    def drop_segments(self, before: int) -> None:
        """Delete segments that are no longer needed. No pending impression is before `before`."""
        if self.spill.segments:
            self.spill.drop(self.spill.ended_before(before if self.spilled else NEVER))

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Return the impressions in order. `place` is there only when some are on disk."""
        slots = self._in_order(np.flatnonzero(self._used_time < NEVER))
        row = self.rows.arrays.feature_row[slots]
        here = row >= 0
        identity = zip(_IDENTITY, self.rows.columns, strict=False)
        features = zip(_FEATURES, self.features.columns, strict=True)
        state = {name: array[slots] for name, array in identity}
        state["delay"][~self.clicked(slots)] = 0  # undefined without a click
        state |= {name: array[row[here]] for name, array in features}
        if not here.all():
            state["place"] = np.where(here, np.cumsum(here) - 1, row)
        return state

    def fill(self, state: Mapping[str, Array]) -> None:
        """Replace all impressions by those of `state`; the segments stay as they are."""
        row = state.get("place", np.arange(len(state["time"])))
        self.rows.fill([*(state[name] for name in _IDENTITY), row])
        self.features.fill([state[name] for name in _FEATURES])


def _oldest(time: npt.NDArray[np.int64], before: int, about: int) -> Slots:
    """Return the slots with a time before `before`.

    If these are more than `about`, return about so many, all of them older than the others.
    """
    old = time < before
    n = int(np.count_nonzero(old))
    if n > about:
        sample = np.sort(time[:: max(1, len(time) // _SAMPLE)])
        sample = sample[sample < before]
        if len(sample):
            old = time <= sample[min(len(sample) * about // n * 9 // 8, len(sample) - 1)]
    return np.flatnonzero(old)
