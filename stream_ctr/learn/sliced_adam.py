"""Adam of which each rank steps a slice of the parameters.

    every part's gradient of slice s   ->   rank s   sums them in the order of the parts, and steps
    the new parameters of slice s      ->   every rank

The sum does not depend on which rank had which part. Slices end where vector registers do, so any
number of them gives the same step, bit for bit. The moments of a slice are on its rank alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr.distributed.ranks import Ranks, Transfers
from stream_ctr.learn.adam import FlatAdam, sum_in_order
from stream_ctr.learn.thread_pool import ThreadPool


class SlicedAdam:
    """The steps of `adam`, taken by all ranks together."""

    def __init__(self, ranks: Ranks, adam: FlatAdam, pool: ThreadPool) -> None:
        self._ranks = ranks
        self._adam = adam
        self._pool = pool
        self._slices = adam.pieces(ranks.size)
        self._received: list[npt.NDArray[np.float32]] = []

    def start(self, gradients: Tensor, parts: Sequence[int]) -> Transfers:
        """Start to send the gradients [parts, P] of this rank's parts to the owners of the slices.

        `parts` are the numbers of parts that the ranks have. The gradients must not be touched
        until the transfers are done.
        """
        me = self._ranks.rank
        own = self._slices[me]
        size = own.stop - own.start
        wanted = sum(parts) - parts[me]
        if len(self._received) < wanted:
            self._received = [np.empty(size, np.float32) for _ in range(wanted)]
        owners = [rank for rank, count in enumerate(parts) for _ in range(count) if rank != me]
        rows = [gradients[at].numpy() for at in range(parts[me])]
        return self._ranks.start(
            send=[
                (rank, row[piece])
                for rank, piece in enumerate(self._slices)
                if rank != me
                for row in rows
            ],
            receive=zip(owners, self._received, strict=False),
        )

    def step(
        self, gradients: Tensor, parts: Sequence[int], steps: int, *, rate_scale: float = 1.0
    ) -> None:
        """Step this rank's slice, after the transfers of `start`, and fetch those of the others."""
        if self._ranks.size == 1:
            # Adam counts a step in the tensor that it is given, so each piece has its own.
            self._pool.run(
                [
                    partial(
                        self._adam.step,
                        gradients,
                        torch.tensor(float(steps)),
                        piece,
                        rate_scale=rate_scale,
                    )
                    for piece in self._adam.pieces(self._pool.threads)
                ]
            )
            return
        summed = sum_in_order(self._in_order(gradients, parts))
        own = self._slices[self._ranks.rank]
        self._adam.apply(summed, torch.tensor(float(steps)), own, rate_scale=rate_scale)
        self._fetch(self._adam.vector)
        self._adam.refresh()

    def _in_order(self, gradients: Tensor, parts: Sequence[int]) -> list[Tensor]:
        """Return the gradients of this rank's slice in the order of the parts."""
        me = self._ranks.rank
        before = sum(parts[:me])
        received = [torch.from_numpy(each) for each in self._received[: sum(parts) - parts[me]]]
        own = [part[self._slices[me]] for part in gradients[: parts[me]]]
        return [*received[:before], *own, *received[before:]]

    def gather_moments(self) -> None:
        """Fill the moments of rank 0 with those of the other ranks."""
        for moment in self._adam.moments:
            self._fetch(moment, ranks=[0])

    def _fetch(self, vector: Tensor, *, ranks: Sequence[int] | None = None) -> None:
        """Fill the slices of a vector [P] that other ranks have, on all or on these `ranks`."""
        me = self._ranks.rank
        everyone = range(self._ranks.size)
        filled = everyone if ranks is None else ranks
        values = vector.numpy()
        self._ranks.start(
            send=[(rank, values[self._slices[me]]) for rank in filled if rank != me],
            receive=[
                (rank, values[self._slices[rank]])
                for rank in everyone
                if rank != me and me in filled
            ],
        ).wait()
