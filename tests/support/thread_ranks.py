"""Ranks in threads of one process, which exchange arrays through memory.

They make hundreds of cases in the time in which processes make one. A call checks what `gloo` would
fail at: that all ranks make the same call, with arrays of one type and of the lengths expected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from stream_ctr.distributed.ranks import Array, RankError, Ranks
from stream_ctr.distributed.team import Team

_TIMEOUT_SECONDS = 60.0


class _Meeting:
    """A place where all ranks bring something, and take what the others have brought."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=_TIMEOUT_SECONDS)
        self._brought: list[Any] = [None] * size

    def meet(self, rank: int, call: str, brought: Any) -> list[Any]:
        self._brought[rank] = (call, brought)
        self._wait()
        found = list(self._brought)
        self._wait()
        assert {name for name, _ in found} == {call}, found
        return [each for _, each in found]

    def leave(self) -> None:
        self._barrier.abort()

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RankError("another rank has ended") from None


class ThreadRanks(Ranks):
    """A rank in a thread."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        super().__init__(rank, size)
        self._meeting = meeting

    def broadcast(self, array: Array, *, root: int = 0) -> Array:
        met = self._meeting.meet(self.rank, f"broadcast {root}", array.copy())
        assert {(each.dtype, each.shape) for each in met} == {(array.dtype, array.shape)}
        array[...] = met[root]
        return array

    def exchange(
        self, parts: Sequence[Array], *, counts: Sequence[int] | None = None
    ) -> list[Array]:
        met = self._meeting.meet(self.rank, "exchange", [np.array(part) for part in parts])
        assert all(len(each) == self.size for each in met)
        assert len({(part.dtype, part.shape[1:]) for each in met for part in each}) == 1
        came = [each[self.rank] for each in met]
        assert counts is None or list(counts) == [len(part) for part in came]
        return came

    def all_true(self, value: bool) -> bool:
        return all(self._meeting.meet(self.rank, "all_true", value))


def on_threads(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(ranks, *arguments)` returns on each of `size` ranks in threads.

    The first error of a rank is raised, and not what the others make of it.
    """
    meeting = _Meeting(size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, size, meeting), *arguments)
        except BaseException:
            meeting.leave()
            raise

    with ThreadPoolExecutor(size) as pool:
        tasks = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for task in tasks if (error := task.exception())]
    for error in sorted(errors, key=lambda each: isinstance(each, RankError)):
        raise error
    return [task.result() for task in tasks]


def led(size: int, makers: Callable[[Ranks], dict[str, Any]], lead: Callable[[Team], Any]) -> Any:
    """Return what `lead(team)` returns on rank 0, while the other ranks follow."""

    def work(ranks: Ranks) -> Any:
        team = Team(ranks, makers(ranks))
        if ranks.rank:
            team.follow()
            return None
        found = lead(team)
        team.close()
        return found

    return on_threads(size, work)[0]
