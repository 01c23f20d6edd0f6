"""The baseline on a share of the impressions, chosen by a hash of their id."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from stream_ctr.events.features import mix64
from stream_ctr.join.examples import Examples
from stream_ctr.learn.baseline import BaselineProcess, Marker


class SampledBaseline:
    """Feed `process` with a `share` of the examples, and with the first `fields` of their ids.

    The remaining ids are those of cross products, which the baseline does not read.
    """

    def __init__(self, process: BaselineProcess, *, share: float = 1.0, fields: int) -> None:
        self.name = process.name
        self.share = share
        self.process = process
        self._fields = fields
        # Examples whose hash is below this are chosen; None chooses all.
        self._threshold = None if share >= 1 else np.uint64(int(share * 2.0**64))

    def submit(self, batch: Examples) -> npt.NDArray[np.bool_] | None:
        """Queue a batch. Return which examples [n] were chosen, or None for all."""
        chosen = None
        if self._threshold is not None:
            chosen = mix64(batch.id_hash) < self._threshold
            batch = batch[chosen]
        self.process.submit(batch.ids[:, : self._fields], batch.values, batch.label)
        return chosen

    def take(self, *, wait: bool) -> npt.NDArray[np.float64] | Marker | None:
        """Return the next answer: probabilities of the chosen examples, a `Marker`, or None yet.

        It waits if told to, or if more is queued than may be.
        """
        return self.process.take(wait=wait or self.process.full)

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Give the process the state that a `Marker` carried."""
        self.process.load_state_dict(dict(state))

    def close(self) -> None:
        """End the process."""
        self.process.close()
