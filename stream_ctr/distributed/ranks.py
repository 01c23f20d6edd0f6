"""The ranks of a run: its processes, which exchange arrays through `torch.distributed`.

    broadcast    root   -> every rank       the same array
    exchange     rank i -> rank j           rows of any number, also none
    gather       every  -> rank 0
    agree        every  -> every rank       the first problem that a rank has, or None
    start        rank i -> rank j           arrays whose sizes both know, while this rank works on

`torchrun` starts the processes, and its variables tell each one its rank and where the others are.
Every rank must make the same calls in the same order. What a call returns depends on the arrays
alone, never on which rank was faster. Nothing is summed here: sums are taken by the receiver, in an
order of its own choice, so that they do not depend on the number of ranks.

Connections are neither encrypted nor authenticated. They belong on a private network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from stream_ctr.distributed.meeting import torchrun_store
from stream_ctr.errors import ConfigError, StreamCtrError

Array = npt.NDArray[Any]
T = TypeVar("T")
TIMEOUT_SECONDS = 300.0
LAUNCHED = "TORCHELASTIC_RUN_ID"
"""The variable that `torchrun` sets in the processes that it starts."""
_FRAME = 1024  # bytes; most commands and problems fit
_LENGTH = 8  # bytes of a frame that hold the length of the data
_COUNT = 8  # bytes
_FLAG = 4  # bytes


class RankError(StreamCtrError):
    """Another rank has ended, or does not answer. `torchrun` starts all ranks again."""


class Ranks:
    """This process among the `size` processes of a run.

    Raises `RankError` from any call when another rank has ended, or has not made the same call
    within `timeout_seconds`.

    >>> ranks = Ranks.alone()
    >>> ranks.rank, ranks.size
    (0, 1)
    >>> [part.tolist() for part in ranks.exchange([np.arange(3)])]
    [[0, 1, 2]]
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        group: dist.ProcessGroup | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        """Bytes of arrays that were sent to other ranks; a broadcast counts once for each."""
        self.bytes_received = 0
        self._group = group
        self._timeout_seconds = timeout_seconds

    @classmethod
    def alone(cls) -> Ranks:
        """Return the only rank of a run in one process."""
        return cls(0, 1)

    @classmethod
    def launched(cls, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Ranks:
        """Join the ranks that `torchrun` has started with this process.

        Raises `ConfigError` unless `torchrun` started it, and `RankError` if the others do not come
        in time.
        """
        if LAUNCHED not in os.environ:
            raise ConfigError("this process was not started by torchrun")
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        waiting = timedelta(seconds=timeout_seconds)
        try:
            store = torchrun_store(rank, size, timeout_seconds=timeout_seconds)
            dist.init_process_group(
                "gloo", timeout=waiting, store=store, rank=rank, world_size=size
            )
        except (RuntimeError, ValueError) as error:
            raise RankError(f"the ranks of the run did not meet: {_first_line(error)}") from error
        return cls(dist.get_rank(), dist.get_world_size(), timeout_seconds=timeout_seconds)

    def another(self) -> Ranks:
        """Return the same ranks with connections of their own, for another thread."""
        if self.size == 1:
            return self
        group = self._calling(
            lambda: dist.new_group(timeout=timedelta(seconds=self._timeout_seconds))
        )
        return Ranks(self.rank, self.size, group=group, timeout_seconds=self._timeout_seconds)

    def leave(self) -> None:
        """Close the connections of this process."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # -- from one to all ---------------------------------------------------------------------------

    def broadcast(self, array: Array, *, root: int = 0) -> Array:
        """Fill `array`, which has the same shape and type on every rank, with that of `root`."""
        if self.size > 1 and array.size:
            if self.rank == root:
                self.bytes_sent += array.nbytes * (self.size - 1)
            else:
                self.bytes_received += array.nbytes
            self._calling(lambda: dist.broadcast(_bytes_of(array), root, group=self._group))
        return array

    def broadcast_bytes(self, data: bytes | None = None, *, root: int = 0) -> bytes:
        """Return the `data` of `root` on every rank."""
        if self.size == 1:
            return data or b""
        frame = np.zeros(_FRAME, np.uint8)
        room = _FRAME - _LENGTH
        if self.rank == root:
            data = data or b""
            frame[:_LENGTH].view(np.int64)[0] = len(data)
            frame[_LENGTH : _LENGTH + min(len(data), room)] = np.frombuffer(data[:room], np.uint8)
        self.broadcast(frame, root=root)
        length = int(frame[:_LENGTH].view(np.int64)[0])
        rest = np.zeros(max(length - room, 0), np.uint8)
        if self.rank == root and data:
            rest[:] = np.frombuffer(data[room:], np.uint8)
        self.broadcast(rest, root=root)
        return frame[_LENGTH : _LENGTH + min(length, room)].tobytes() + rest.tobytes()

    def scatter(self, parts: Sequence[Array] | None, like: Array, *, root: int = 0) -> Array:
        """Return this rank's one of the `parts` of `root`, which have the type and row of `like`.

        `like` is an empty array [0, ...]; the number of rows may differ from part to part.
        """
        given = parts if self.rank == root and parts is not None else [like] * self.size
        return self.exchange(given)[root]

    # -- from each to each -------------------------------------------------------------------------

    def exchange(
        self, parts: Sequence[Array], *, counts: Sequence[int] | None = None
    ) -> list[Array]:
        """Send `parts[i]` to rank i, and return what rank i sent to this one, for each i.

        The parts are arrays [n, ...] of one type and one shape of rows, on all ranks. `counts` are
        the rows that come from each rank, where they are known already.
        """
        if self.size == 1:
            return [parts[0]]
        first = np.asarray(parts[0])
        row_bytes = first.dtype.itemsize * int(np.prod(first.shape[1:], dtype=np.int64))
        sent = [len(part) for part in parts]
        came = self.counts(sent) if counts is None else list(counts)
        joined = np.concatenate([np.ascontiguousarray(part) for part in parts])
        received = np.empty((sum(came), *first.shape[1:]), first.dtype)
        self.bytes_sent += (sum(sent) - sent[self.rank]) * row_bytes
        self.bytes_received += (sum(came) - came[self.rank]) * row_bytes
        self._calling(
            lambda: dist.all_to_all_single(
                _bytes_of(received),
                _bytes_of(joined),
                [n * row_bytes for n in came],
                [n * row_bytes for n in sent],
                group=self._group,
            )
        )
        return np.split(received, np.cumsum(came)[:-1])

    def gather(self, array: Array, *, root: int = 0) -> list[Array]:
        """Return the arrays [n, ...] of all ranks in their order on `root`, and none elsewhere."""
        none = array[:0]
        came = self.exchange([array if rank == root else none for rank in range(self.size)])
        return came if self.rank == root else []

    def collect(self, array: Array) -> list[Array]:
        """Return the arrays [n, ...] of all ranks in their order, on every rank."""
        return self.exchange([array] * self.size)

    def start(
        self, *, send: Iterable[tuple[int, Array]] = (), receive: Iterable[tuple[int, Array]] = ()
    ) -> Transfers:
        """Start to send arrays to other ranks and to receive arrays from them.

        Each item is a rank and a contiguous array, which must not be touched until the transfers
        are done. Arrays for one rank arrive in the order in which they are sent. Both sides know
        their sizes, and empty ones are not sent.
        """
        works = []
        for source, array in receive:
            if array.size:
                self.bytes_received += array.nbytes
                works.append(self._posted(dist.irecv, array, source))
        for target, array in send:
            if array.size:
                self.bytes_sent += array.nbytes
                works.append(self._posted(dist.isend, array, target))
        return Transfers(self, works)

    def _posted(
        self, post: Callable[..., Any], array: Array, rank: int
    ) -> tuple[Any, torch.Tensor]:
        data = _bytes_of(array)
        return self._calling(lambda: post(data, rank, group=self._group)), data

    def all_true(self, value: bool) -> bool:
        """Return whether `value` is true on every rank."""
        if self.size == 1:
            return value
        self._count_each(_FLAG)
        flag = torch.tensor([int(value)], dtype=torch.int32)
        self._calling(lambda: dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._group))
        return bool(flag[0])

    def agree(self, problem: str | None) -> str | None:
        """Return the `problem` of the lowest rank that has one, with its rank; None without any.

        >>> Ranks.alone().agree("disk full"), Ranks.alone().agree(None)
        ('rank 0: disk full', None)
        """
        text = np.frombuffer((problem or "").encode(), np.uint8)
        found = [each.tobytes().decode() for each in self.collect(text)]
        return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), None)

    def counts(self, sent: Sequence[int]) -> list[int]:
        """Send `sent[i]` to rank i, and return the number that rank i sent to this one.

        >>> Ranks.alone().counts([3])
        [3]
        """
        if self.size == 1:
            return list(sent)
        self._count_each(_COUNT)
        given = torch.tensor(sent, dtype=torch.int64)
        came = torch.empty_like(given)
        self._calling(lambda: dist.all_to_all_single(came, given, group=self._group))
        found: list[int] = came.tolist()
        return found

    def _count_each(self, size: int) -> None:
        self.bytes_sent += size * (self.size - 1)
        self.bytes_received += size * (self.size - 1)

    def _calling(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size}: another rank has ended, or did not answer "
                f"within {self._timeout_seconds:g} s ({_first_line(error)})"
            ) from error


class Transfers:
    """Arrays on their way between this rank and others."""

    def __init__(self, ranks: Ranks, works: Sequence[tuple[Any, torch.Tensor]]) -> None:
        self._ranks = ranks
        self._works = works

    def wait(self) -> None:
        """Return when all arrays have arrived or been sent. Raises `RankError`."""
        for work, _ in self._works:
            self._ranks._calling(work.wait)
        self._works = ()


def _bytes_of(array: Array) -> torch.Tensor:
    """Return a tensor of bytes that shares the memory of a contiguous array."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
