"""A pair of files as a log: the impressions in one, their clicks in the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from stream_ctr.logs.column_log import ColumnLog
from stream_ctr.logs.labelled_logs import SyntheticTimes
from stream_ctr.logs.layout import Layout
from stream_ctr.logs.log import Log, LogBatch, in_time_order
from stream_ctr.logs.tables import Table


class PairLog(Log):
    """The rows of `shown` as impressions, and those of `clicked` as their clicks, in time order.

    Both have a column of ids and one of times. The times of clicks may be in the column that the
    layout names as `click_time`.
    """

    format = "pair"

    def __init__(self, shown: Table, clicked: Table, layout: Layout, times: SyntheticTimes) -> None:
        self._shown = ColumnLog(shown, layout, times, shape="shown")
        click_time = layout.columns.click_time
        names = layout.columns
        if click_time in clicked.types:
            names = replace(names, time=click_time)
        self._clicked = ColumnLog(clicked, replace(layout, columns=names), times, shape="clicked")
        super().__init__(shown.path, self._shown.fields, name=f"{shown.name} and {clicked.name}")

    @cached_property
    def identity(self) -> str:
        """The name of the file of impressions, and a hash of both identities."""
        both = f"{self._shown.identity} {self._clicked.identity}"
        name = self._shown.identity.rpartition("#")[0]
        return f"{name}#{hashlib.sha256(both.encode()).hexdigest()[:12]}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._shown.notes, *self._clicked.notes, *super().notes)

    def _read(self) -> Iterator[LogBatch]:
        for log in (self._shown, self._clicked):
            log.start_pass()
        parts = [in_time_order(log.events()) for log in (self._shown, self._clicked)]
        for batch in merged(*parts):
            self.progress = min(self._shown.progress, self._clicked.progress)
            yield LogBatch(batch["time"].to_numpy(), batch["key"], batch["value"])


def merged(
    first: Iterator[pa.RecordBatch], second: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of two streams that are sorted by their column `time`, sorted together.

    At equal times, rows of the first stream come first.
    """
    left, right = next(first, None), next(second, None)
    while left is not None and right is not None:
        until = min(left["time"][-1].as_py(), right["time"][-1].as_py())
        due = []
        for batch in (left, right):
            count = int(np.searchsorted(np.asarray(batch["time"]), until, side="right"))
            due += [batch.slice(0, count), batch.slice(count)]
        left = due[1] if len(due[1]) else next(first, None)
        right = due[3] if len(due[3]) else next(second, None)
        table = pa.Table.from_batches([due[0], due[2]]).combine_chunks()
        order = np.argsort(np.asarray(table["time"]), kind="stable")
        yield from table.take(pa.array(order)).combine_chunks().to_batches()
    for batch, stream in ((left, first), (right, second)):
        if batch is not None:
            yield batch
            yield from stream
