"""A source that reads batches of bytes, with the index of a record as its offset.

The batches come from a callable, which can generate them or read them from a file. To seek, the
source calls it again and skips records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.connectors.errors import PositionLost
from stream_ctr.connectors.records import Records


class BatchSource:
    """Yields the records of batches, in order, as the single partition `(name, 0)`.

    `batches` must return the same batches each time it is called. The source ends after the last
    batch. The records have no timestamps. A poll returns one batch.

    >>> def batches():
    ...     yield pa.array([b"a", b"b"], pa.large_binary())
    ...     yield pa.array([b"c"], pa.large_binary())
    >>> source = BatchSource(batches, name="log")
    >>> source.ends()
    {0: 3}
    >>> source.seek({0: 1})
    >>> source.poll(0).value.to_pylist(), source.poll(0).offset.tolist(), source.finished
    ([b'b'], [2], False)
    >>> len(source.poll(0)), source.finished, source.positions()
    (0, True, {0: 3})
    >>> source.seek({0: 4})
    Traceback (most recent call last):
        ...
    stream_ctr.connectors.errors.PositionLost: log ends at 3, but 4 comes next: is it the same log?
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
        """Return the next batch without waiting: empty while paused and after the last batch."""
        if self._paused:
            return Records.empty()
        values = self._next_batch()
        n = len(values)
        offset = np.arange(self._position, self._position + n, dtype=np.int64)
        self._position += n
        return Records(np.zeros(n, np.int32), offset, np.full(n, -1, np.int64), values)

    def positions(self) -> dict[int, int]:
        """Return the index of the next record to read."""
        return {0: self._position}

    def seek(self, positions: Mapping[int, int]) -> None:
        """Continue at this index. The batches are read again from the start and skipped up to it.

        Raises `PositionLost` when there are fewer records, or for another partition than 0.
        """
        ((name, _),) = self.partitions
        for index, position in positions.items():
            if index != 0 or position < 0:
                raise PositionLost(
                    f"{name} has only partition 0, from position 0 on: "
                    f"there is no position {position} in partition {index}"
                )
            self._restart()
            while self._position < position:
                batch = self._next_batch()
                if not len(batch):
                    raise PositionLost(
                        f"{name} ends at {self._position}, but {position} comes next: "
                        "is it the same log?"
                    )
                used = min(len(batch), position - self._position)
                self._rest = batch[used:]
                self._position += used

    def beginning(self) -> dict[int, int]:
        """Return the position of the first record, which is always 0."""
        return {0: 0}

    def ends(self) -> dict[int, int]:
        """Return the number of records. This reads all batches once."""
        return {0: sum(len(batch) for batch in self._batches())}

    def pause(self, partitions: Collection[int]) -> None:
        """Pause exactly these partitions: polls return no records from them."""
        self._paused = 0 in partitions

    def caught_up(self) -> npt.NDArray[np.bool_]:
        """Return whether all records were read [1], which a poll without records finds out."""
        return np.array([self._exhausted])

    @property
    def finished(self) -> bool:
        return self._exhausted

    def lag(self) -> int:
        """Return 0: batches are read on demand."""
        return 0

    def silent_seconds(self) -> float:
        """Return 0: there is no broker that could be silent."""
        return 0.0

    def lost(self) -> dict[int, int]:
        """Return no lost records: memory has no retention."""
        return {}

    def leader_epochs(self) -> dict[int, int]:
        """Return no epochs: nobody leads."""
        return {}

    def expect_epochs(self, leader_epochs: Mapping[int, int]) -> None:
        """Expect nothing: memory loses no records."""

    def topic_ids(self) -> dict[str, str | None]:
        """Return no ids: there is no topic."""
        return {}

    def commit(self, positions: Mapping[int, int]) -> None:
        """Do nothing: there is no consumer group."""

    def close(self) -> None:
        self._iterator = iter(())

    def _restart(self) -> None:
        self._iterator = iter(self._batches())
        self._rest = pa.array([], pa.large_binary())
        self._position = 0
        self._exhausted = False

    def _next_batch(self) -> pa.LargeBinaryArray:
        """Return the rest of a batch, or the next nonempty batch, or an empty one at the end."""
        batch = self._rest
        self._rest = batch[:0]
        while not len(batch):
            following = next(self._iterator, None)
            if following is None:
                self._exhausted = True
                return self._rest
            batch = following.cast(pa.large_binary())
        return batch
