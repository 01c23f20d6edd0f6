"""Batches of bytes as a source: a log that is read again from the start whenever it must be, with the index of a record as its offset."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.connectors.errors import PositionLost
from stream_ctr.connectors.records import Records


class BatchSource:
    """The records of batches of bytes, in order, as the single partition `(name, 0)`; their times are unknown.

    Calling `batches` yields the same batches each time. The source ends where they end.

    >>> source = BatchSource(lambda: [pa.array([b"a", b"b"], pa.large_binary()), pa.array([b"c"], pa.large_binary())])
    >>> source.seek({0: 1})
    >>> source.poll(0).value.to_pylist(), source.poll(0).offset.tolist(), source.finished
    ([b'b'], [2], False)
    >>> len(source.poll(0)), source.finished, source.positions()
    (0, True, {0: 3})
    """

    until_end = True

    def __init__(self, batches: Callable[[], Iterable[pa.Array]], *, name: str = "memory") -> None:
        self.partitions: tuple[tuple[str, int], ...] = ((name, 0),)
        self._batches = batches
        self._paused = False
        self._iterator: Iterator[pa.Array] = iter(())
        self._rest = pa.array([], pa.large_binary())
        self._position = 0
        self._exhausted = False
        self._restart()

    def poll(self, timeout_seconds: float) -> Records:
        """The next batch, without waiting; empty while paused and when there is no more."""
        if self._paused:
            return Records.empty()
        values = self._next_batch()
        offset = np.arange(self._position, self._position + len(values), dtype=np.int64)
        self._position += len(values)
        return Records(
            np.zeros(len(values), np.int32), offset, np.full(len(values), -1, np.int64), values
        )

    def positions(self) -> dict[int, int]:
        """The index of the next record to read."""
        return {0: self._position}

    def seek(self, positions: Mapping[int, int]) -> None:
        """Read on at this index; the batches are read again from the start and skipped up to it.

        Raises `PositionLost` when there are fewer records than that.
        """
        for index, position in positions.items():
            if index != 0 or position < 0:
                raise PositionLost(
                    f"{self.partitions[0][0]} has one partition, 0, from position 0: it cannot go to {index}: {position}"
                )
            self._restart()
            while self._position < position:
                batch = self._next_batch()
                if not len(batch):
                    raise PositionLost(
                        f"{self.partitions[0][0]} ends at {self._position}, but {position} comes next: is it the same log?"
                    )
                used = min(len(batch), position - self._position)
                self._rest = batch[used:]
                self._position += used

    def beginning(self) -> dict[int, int]:
        """Always the first record."""
        return {0: 0}

    def ends(self) -> dict[int, int]:
        """How many records there are; reads all batches once."""
        return {0: sum(len(batch) for batch in self._batches())}

    def pause(self, partitions: Collection[int]) -> None:
        """Exactly these partitions yield nothing from now on."""
        self._paused = 0 in partitions

    def caught_up(self) -> npt.NDArray[np.bool_]:
        """Whether all was read [1]; known once a poll found no more."""
        return np.array([self._exhausted])

    @property
    def finished(self) -> bool:
        return self._exhausted

    def lag(self) -> int:
        """Nothing is behind what is read when it is wanted."""
        return 0

    def silent_seconds(self) -> float:
        """Always zero: memory answers."""
        return 0.0

    def lost(self) -> dict[int, int]:
        """Nothing ever is."""
        return {}

    def topic_ids(self) -> dict[str, str | None]:
        """There is no topic."""
        return {}

    def commit(self, positions: Mapping[int, int]) -> None:
        """Nobody looks at positions in memory."""

    def close(self) -> None:
        self._iterator = iter(())

    def _restart(self) -> None:
        self._iterator = iter(self._batches())
        self._rest = pa.array([], pa.large_binary())
        self._position = 0
        self._exhausted = False

    def _next_batch(self) -> pa.LargeBinaryArray:
        """The rest of a batch or the next one that is not empty; empty when there is no more."""
        batch, self._rest = self._rest, self._rest[:0]
        while not len(batch):
            following = next(self._iterator, None)
            if following is None:
                self._exhausted = True
                return self._rest
            batch = following.cast(pa.large_binary())
        return batch
