"""Watermarks: how far event time has come, a partition at a time and for all of them; and whether its clicks have come as far.

A partition whose clicks stop while its impressions go on would teach that nobody clicks. So when far more clicks were to be expected
since the last one than chance can explain, its watermark stands still; when clicks come again it moves with *their* time, until that has
caught up with the impressions'. Both depend on the partition's own log alone.

>>> marks = Watermarks(partitions=2, lateness_ms=100)
>>> marks.observe(np.array([0, 0, 1, 0]), np.array([1000, 900, 5000, 1500]))  # each event's own partition, with itself
array([ 900,  900, 4900, 1400])
>>> marks.overall(excused=np.array([False, False])), marks.overall(excused=np.array([True, False]))
(1400, 4900)
"""

from __future__ import annotations

from collections.abc import Mapping

import numba
import numpy as np
import numpy.typing as npt

NOT_YET = -(1 << 62)
# Clicks that a partition must have had before their rate says anything.
_KNOWN_CLICKS = 100
_STATE = (
    "latest",
    "mark",
    "latest_click",
    "impressions",
    "clicks",
    "since_click",
    "stalled",
    "all_since_click",
)


class Watermarks:
    """`latest` is the greatest event time seen in each partition, in epoch milliseconds; its watermark `mark` lags behind by `lateness_ms`,
    and further while its clicks are stalled.

    Clicks are taken for stalled when `stall_clicks` of them, at the partition's rate so far, should have come since the last one (by chance
    that happens with probability e^-stall_clicks); 0: never.
    """

    def __init__(self, *, partitions: int, lateness_ms: int, stall_clicks: float = 0.0) -> None:
        self.lateness_ms, self.stall_clicks = lateness_ms, stall_clicks
        self.latest, self.mark, self.latest_click = (
            np.full(partitions, NOT_YET, np.int64) for _ in range(3)
        )
        self.impressions, self.clicks, self.since_click = (
            np.zeros(partitions, np.int64) for _ in range(3)
        )
        # Impressions of all partitions later than the last click of each, for those that carry clicks only.
        self.all_since_click = np.zeros(partitions, np.int64)
        self.stalled = np.zeros(partitions, np.bool_)
        self.stalls = 0

    def observe(
        self,
        partition: npt.NDArray[np.integer],
        time: npt.NDArray[np.int64],
        click: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.int64]:
        """The watermark of its own partition at each of n events, in order of arrival; `click` [n] says which of them are clicks."""
        click = np.zeros(len(time), np.bool_) if click is None else click
        limit = np.empty(len(time), np.int64)
        self.stalls += _observe(
            partition.astype(np.int32), time, click, limit, self.lateness_ms, self.stall_clicks,
            self.latest, self.mark, self.latest_click, self.impressions, self.clicks, self.since_click, self.stalled,
        )  # fmt: skip
        self.all_since_click += (time[~click] > self.latest_click[:, None]).sum(axis=1)
        self.all_since_click[np.unique(partition[click])] = 0
        return limit

    def overall(self, *, excused: npt.NDArray[np.bool_]) -> int:
        """The least watermark of the partitions that are not excused; of all excused, the greatest. Who is stalled is not excused."""
        holding = self.mark[~excused | self.stalled]
        return int(holding.min()) if len(holding) else int(self.mark.max(initial=NOT_YET))

    def ahead(self, watermark: int, by_ms: int) -> frozenset[int]:
        """Partitions whose watermark is further ahead than this: reading on in them only fills memory."""
        return (
            frozenset(np.flatnonzero(self.mark > watermark + by_ms).tolist())
            if watermark != NOT_YET
            else frozenset()
        )

    def silent_clicks(self) -> npt.NDArray[np.bool_]:
        """Of each partition [P] that carries clicks only, whether they are missing: such a one is not idle but stalled."""
        if not self.stall_clicks:
            return np.zeros(len(self.clicks), np.bool_)
        only = (self.impressions == 0) & (self.clicks >= _KNOWN_CLICKS)
        expected = self.all_since_click * self.clicks / max(1, int(self.impressions.sum()))
        return only & (expected > self.stall_clicks)

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        state = {name: getattr(self, name).copy() for name in _STATE}
        state["all_since_click"][self.impressions > 0] = (
            0  # there it depends on how polls fell, and serves nothing
        )
        return state | {"stalls": np.array([self.stalls])}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        for name in _STATE:
            getattr(self, name)[:] = state[name]
        self.stalls = int(state["stalls"][0])


@numba.njit(cache=True, nogil=True)
def _observe(  # type: ignore[no-untyped-def]
    partition, time, click, limit, lateness, stall_clicks, latest, mark, latest_click, impressions, clicks, since_click, stalled,
):  # fmt: skip
    stalls = 0
    for i in range(len(time)):
        p = partition[i]
        latest[p] = max(latest[p], time[i])
        if click[i]:
            clicks[p] += 1
            since_click[p] = 0
            latest_click[p] = max(latest_click[p], time[i])
            if stalled[p] and latest_click[p] >= latest[p] - lateness:
                stalled[p] = False
        else:
            impressions[p] += 1
            since_click[p] += 1
            if stall_clicks > 0 and not stalled[p] and clicks[p] >= _KNOWN_CLICKS:
                stalled[p] = since_click[p] * clicks[p] > stall_clicks * impressions[p]
                stalls += stalled[p]
        mark[p] = max(mark[p], (latest_click[p] if stalled[p] else latest[p]) - lateness)
        limit[i] = mark[p]
    return stalls
