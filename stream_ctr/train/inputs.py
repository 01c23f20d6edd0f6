"""The inputs of a run, one after another, as one source.

A run reads the logs that it is given one after another, and a state directory that was begun on
logs goes on with other logs or with topics. `Inputs` is the source of such a run:

    day1.csv       day2.csv       topic clicks
    partition 0    partition 1    partitions 2, 3 and 4

A partition keeps its index for as long as the state directory lives: inputs have theirs in the
order in which they were first read. One input is read at a time. Of those that have ended, and of
those that have not begun, nothing is expected, so they do not hold back the watermark.

The watermark of the joiner never goes back, and examples of the same time leave it in the order of
their partitions. So inputs one after another teach what one log of all their records would.

Everything here is bookkeeping; records come from the sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.errors import ConfigError
from stream_ctr.events.batch import RecordColumns
from stream_ctr.snapshots.manifest import Input
from stream_ctr.train.source import DivisibleSource, Source


def partition_names(source: Source) -> tuple[str, ...]:
    """Return "topic:partition" of each partition, as positions are named in manifests."""
    return tuple(f"{topic}:{partition}" for topic, partition in source.partitions)


def input_name(partitions: Sequence[str]) -> str:
    """Return what people call an input: the file names or the topics of its partitions.

    >>> input_name(["day1.csv#0fc3e1a2b3c4:0"]), input_name(["shown:0", "shown:1", "clicks:0"])
    ('day1.csv', 'shown and clicks')
    """
    names = (name.rpartition(":")[0].partition("#")[0] for name in partitions)
    return " and ".join(dict.fromkeys(names))


class Inputs:
    """Read `sources` one after another, after the inputs that have `ended` already.

    `positions` has the last position of each partition of the ended inputs, by name. The first
    source begins at once or, if it follows other inputs, with the first poll.

    >>> from stream_ctr.connectors.memory import BatchSource
    >>> day1, day2 = (
    ...     BatchSource(lambda each=each: [pa.array([each], pa.large_binary())], name=each)
    ...     for each in ("day1", "day2")
    ... )
    >>> inputs = Inputs([day1, day2])
    >>> inputs.partitions
    (('day1', 0), ('day2', 0))
    >>> polls = [inputs.poll(0) for _ in range(4)]
    >>> [(poll.partition.tolist(), poll.value.to_pylist()) for poll in polls]
    [([0], [b'day1']), ([], []), ([1], [b'day2']), ([], [])]
    >>> inputs.finished, inputs.positions()
    (True, {0: 1, 1: 1})
    >>> [(each.partitions, each.ended) for each in inputs.begun]
    [(('day1:0',), True), (('day2:0',), True)]
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        ended: Sequence[Input] = (),
        positions: Mapping[str, int] | None = None,
    ) -> None:
        self.before = tuple(ended)
        """The inputs that had ended before this run."""
        self.sources = tuple(sources)
        self._last_positions = dict(positions or {})
        self._names_before = tuple(name for each in ended for name in each.partitions)
        read_before = [
            (topic, int(partition))
            for topic, _, partition in (name.rpartition(":") for name in self._names_before)
        ]
        self.partitions: tuple[tuple[str, int], ...] = (
            *read_before,
            *(partition for source in sources for partition in source.partitions),
        )
        self.names = partition_names(self)
        """The name of each partition, "topic:partition"."""
        ends = np.cumsum([len(read_before), *(len(source.partitions) for source in sources)])
        self._ranges = [range(*bounds) for bounds in zip(ends[:-1], ends[1:], strict=True)]
        self._read_by: list[Input] = []  # the sources of this run that were read to their end
        self._at = -1 if ended else 0  # the source that is read; -1: none has begun

    @classmethod
    def of(cls, source: Source) -> Inputs:
        """Return a source as inputs; those of a run are returned as they are."""
        return source if isinstance(source, cls) else cls([source])

    # -- which input is read ---------------------------------------------------------------------

    @property
    def present(self) -> range:
        """The partitions of the input that is read now, or that was read last."""
        if self._at >= 0:
            return self._ranges[self._at]
        last = len(self._names_before)
        return range(last - len(self.before[-1].partitions), last)

    @property
    def begun(self) -> tuple[Input, ...]:
        """The inputs that have begun, in the order of their partitions."""
        if self._at < 0:
            return self.before
        return (*self.before, *self._read_by, _input(self.sources[self._at]))

    @property
    def finished(self) -> bool:
        """True once the last source was read to its end."""
        return self._at == len(self.sources) - 1 and self.sources[-1].finished

    @property
    def until_end(self) -> bool:
        """True if the last source ends; only a source that ends can have others after it."""
        return self.sources[-1].until_end

    @property
    def _reading(self) -> Source:
        return self.sources[max(self._at, 0)]

    # -- the interface of a source ---------------------------------------------------------------

    def poll(self, timeout_seconds: float) -> RecordColumns:
        """Return the next records of the present source; begin the next one after its end."""
        if self._at < 0:
            self._at = 0
        elif self._reading.finished and not self.finished:
            self._read_by.append(_input(self._reading))
            self._at += 1
        records = self._reading.poll(timeout_seconds)
        first = self.present.start
        return _Moved(records, records.partition + np.int32(first)) if first else records

    def positions(self) -> dict[int, int]:
        """Return the next offset to read of each partition of the inputs that have begun."""
        positions = {
            index: self._last_positions.get(name, 0)
            for index, name in enumerate(self._names_before)
        }
        for partitions, source in self._begun_sources():
            positions |= _shifted(source.positions(), partitions.start)
        return positions

    def seek(self, positions: Mapping[int, int]) -> None:
        """Read on at these offsets, in the last source that has one of them."""
        for at, (partitions, source) in enumerate(zip(self._ranges, self.sources, strict=True)):
            if own := _own(positions, partitions):
                source.seek(own)
                self._at = at
        self._read_by = [_input(source, ended=True) for source in self.sources[: max(self._at, 0)]]

    def leader_epochs(self) -> dict[int, int]:
        """Return the leader epoch before the positions of the inputs that have begun."""
        epochs: dict[int, int] = {}
        for partitions, source in self._begun_sources():
            epochs |= _shifted(source.leader_epochs(), partitions.start)
        return epochs

    def expect_epochs(self, leader_epochs: Mapping[int, int]) -> None:
        """Let each source expect the epochs of its partitions."""
        for partitions, source in self._begun_sources():
            if own := _own(leader_epochs, partitions):
                source.expect_epochs(own)

    @property
    def ended_positions(self) -> dict[str, int]:
        """The last position of each partition of the inputs that had ended before, by name."""
        return {name: self._last_positions.get(name, 0) for name in self._names_before}

    @property
    def last(self) -> range:
        """The partitions of the last source."""
        return self._ranges[-1]

    def divide(self, rank: int, size: int) -> None:
        """Read every `size`-th partition of the only source, from number `rank` on.

        Raises `ConfigError` unless it can be read by several processes.
        """
        source = self.sources[-1]
        if len(self.sources) > 1 or not isinstance(source, DivisibleSource):
            raise ConfigError(
                f"{input_name(partition_names(source))} cannot be read by several ranks: with "
                "ranks.share_input = false rank 0 reads it"
            )
        source.divide(range(rank, len(source.partitions), size))

    def pause(self, partitions: frozenset[int]) -> None:
        """Return no records of exactly these partitions from now on."""
        present = self.present
        if self._at >= 0:
            own = frozenset(index - present.start for index in partitions if index in present)
            self._reading.pause(own)

    def lag(self) -> int:
        """Return how many offsets of the present input are not read yet."""
        return self._reading.lag()

    def caught_up(self) -> npt.NDArray[np.bool_]:
        """Return a mask [P]: false only where the present source has more."""
        mask = np.ones(len(self.partitions), np.bool_)
        if self._at >= 0:
            present = self.present
            mask[present.start : present.stop] = self._reading.caught_up()
        return mask

    def silent_seconds(self) -> float:
        """Return for how long no broker of the present input has answered."""
        return self._reading.silent_seconds()

    def lost(self) -> dict[int, int]:
        """Return how many offsets of each partition were skipped because they are gone."""
        lost: dict[int, int] = {}
        for partitions, source in self._begun_sources():
            lost |= _shifted(source.lost(), partitions.start)
        return lost

    def topic_ids(self) -> dict[str, str | None]:
        """Return the id of each topic, None where brokers give none."""
        return {name: id_ for source in self.sources for name, id_ in source.topic_ids().items()}

    def commit(self, positions: Mapping[int, int]) -> None:
        """Commit the offsets of each source. The ended inputs have nobody to commit to."""
        for partitions, source in zip(self._ranges, self.sources, strict=True):
            if own := _own(positions, partitions):
                source.commit(own)

    def _begun_sources(self) -> Iterator[tuple[range, Source]]:
        begun = self._at + 1
        return zip(self._ranges[:begun], self.sources[:begun], strict=True)


@dataclass(frozen=True, slots=True)
class _Moved:
    """Records whose partitions are numbered as those of the whole run."""

    records: RecordColumns
    partition: npt.NDArray[np.int32]

    @property
    def offset(self) -> npt.NDArray[np.int64]:
        return self.records.offset

    @property
    def time(self) -> npt.NDArray[np.int64]:
        return self.records.time

    @property
    def value(self) -> pa.LargeBinaryArray:
        return self.records.value

    def __len__(self) -> int:
        return len(self.partition)


def _input(source: Source, *, ended: bool | None = None) -> Input:
    """Describe a source: only topics have ids, and only a log has an end."""
    topics = bool(source.topic_ids())
    return Input(
        kind="topics" if topics else "log",
        partitions=partition_names(source),
        ended=(source.finished if ended is None else ended) and not topics,
    )


def _own(positions: Mapping[int, int], partitions: range) -> dict[int, int]:
    """Return the positions of these partitions, numbered from 0."""
    first = partitions.start
    return {index - first: at for index, at in positions.items() if index in partitions}


def _shifted(positions: Mapping[int, int], first: int) -> dict[int, int]:
    return {first + index: at for index, at in positions.items()}
