"""What the ranks of a run send each other."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from support.ranks import on_ranks

from stream_ctr.distributed.ranks import RankError, Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.errors import ConfigError


def _everything(ranks: Ranks) -> dict[str, object]:
    me = ranks.rank
    rows = [np.full((to + me, 2), 10 * me + to, np.int32) for to in range(ranks.size)]
    long = bytes(range(256)) * 9
    second = ranks.another()
    parts = [np.arange(3 * to) for to in range(ranks.size)]
    return {
        "broadcast": ranks.broadcast(np.arange(4) * (me + 1), root=1).tolist(),
        "short": ranks.broadcast_bytes(b"ab" if me == 0 else None),
        "long": ranks.broadcast_bytes(long if me == 1 else None, root=1) == long,
        "exchange": [
            (part.shape, sorted(set(part.reshape(-1).tolist()))) for part in ranks.exchange(rows)
        ],
        "gather": [part.tolist() for part in ranks.gather(np.arange(me))],
        "scatter": ranks.scatter(parts if me == 0 else None, parts[0][:0]).tolist(),
        "collect": [part.tolist() for part in second.collect(np.array([me]))],
        "all_true": (ranks.all_true(True), ranks.all_true(me != 1)),
        "agree": (ranks.agree(None), ranks.agree("full" if me else None)),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_every_call_gives_each_rank_what_the_others_sent_it(size: int) -> None:
    for me, found in enumerate(on_ranks(size, _everything)):
        assert found == {
            "broadcast": [0, 2, 4, 6],
            "short": b"ab",
            "long": True,
            "exchange": [
                ((me + sender, 2), [10 * sender + me] if me + sender else [])
                for sender in range(size)
            ],
            "gather": [list(range(rank)) for rank in range(size)] if me == 0 else [],
            "scatter": list(range(3 * me)),
            "collect": [[rank] for rank in range(size)],
            "all_true": (True, False),
            "agree": (None, "rank 1: full"),
        }


def _killed(ranks: Ranks) -> str:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankError) as caught:
        ranks.broadcast(np.zeros(3), root=1)
    return str(caught.value)


def test_a_rank_that_was_killed_is_an_error_of_the_others() -> None:
    with pytest.raises(Exception, match="terminated abruptly"):
        on_ranks(2, _killed)


def test_without_torchrun_there_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match="was not started by torchrun"):
        Ranks.launched()


class _Sum:
    """Sums over all ranks, as an object of a team."""

    def __init__(self, ranks: Ranks, *, start: int) -> None:
        self._ranks = ranks
        self.total = start

    def add(self, times: int, number: int = 0) -> None:
        given = self._ranks.broadcast(np.array([number]))
        self.total += times * int(given[0])


def _team(ranks: Ranks) -> list[int]:
    made: list[_Sum] = []

    def make(ranks: Ranks, *, start: int) -> _Sum:
        made.append(_Sum(ranks, start=start))
        return made[-1]

    team = Team(ranks, {"sum": make}, beat_seconds=0.0)
    if ranks.rank:
        team.follow()
    else:
        numbers = [team.make("sum", start=start)[0] for start in (1, 100)]
        for number in (7, 8):
            team.announce(numbers[1], "add", times=2)
            made[1].add(2, number)
            team.beat()
        team.close()
    return [each.total for each in made]


def test_the_others_do_what_rank_0_announces() -> None:
    assert on_ranks(3, _team) == [[1, 130]] * 3
