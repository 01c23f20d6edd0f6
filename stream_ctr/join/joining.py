"""From what a poll brought into the joiner: each event with the watermark that decides whether it is late."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stream_ctr.events.batch import Came, EventBatch
from stream_ctr.join.joiner import Arrivals, LabelJoiner
from stream_ctr.join.watermark import Watermarks


def push(columns: EventBatch, joiner: LabelJoiner, watermarks: Watermarks) -> None:
    """Impressions and clicks into `joiner`. `watermarks` goes through both in order of arrival: the limit of an event is the watermark of
    its own partition when it arrived."""
    impressions, clicks, arrival = columns.impressions, columns.clicks, columns.arrival
    n = len(impressions)
    partition = np.concatenate([impressions.partition, clicks.partition])[arrival]
    time = np.concatenate([impressions.time, clicks.time])[arrival]
    limit = np.empty(len(arrival), np.int64)
    limit[arrival] = watermarks.observe(partition, time, arrival >= n)
    # A partition that was excused and comes back may be behind what has been closed meanwhile.
    limit = np.maximum(limit, joiner.watermark)
    joiner.push_impressions(
        _arrivals(impressions, limit[:n]), columns.ids, columns.values, columns.true_probability
    )
    joiner.push_clicks(_arrivals(clicks, limit[n:]))


def _arrivals(came: Came, limit: npt.NDArray[np.int64]) -> Arrivals:
    return Arrivals(came.id_hash, came.time, came.partition, came.place, limit)
