"""The bytes of a step, counted and by the formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from support.learners import learner_spec
from support.ranks import on_ranks
from support.sharded import batch_of

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.learn.batch_shares import shares_of
from stream_ctr.learn.sharded_learner import NETWORK_MAKER, ShardedLearner
from stream_ctr.learn.step import SUB_BATCH
from stream_ctr.learn.step_bytes import FRAME, StepShape, bytes_a_step

RANKS = 3
SMALL = {"fields": 5, "embedding_dim": 4, "hidden": [8, 8], "table_bits": 10, "batch_size": 1024}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("deepfm", {"value_fields": [1]}),
    ("fm", {}),
    ("deepfm", {"dropout": 0.3}),
    ("fnn", {}),
    ("pnn", {"table_optimizer": "adagrad"}),
]
SIZES = (16, 600, 900, 1024)


class Mark(NamedTuple):
    """What a rank had sent and received before a step, and the rows of all of its tables."""

    sent: int
    received: int
    fetched: int
    passed: int


class Marks:
    """The marks of a rank, as an object of a team."""

    def __init__(self, ranks: Ranks) -> None:
        self.networks: list[Any] = []
        self.found: list[Mark] = []
        self._ranks = ranks

    def mark(self) -> None:
        tables = [network.sharded for network in self.networks]
        self.found.append(
            Mark(
                self._ranks.bytes_sent,
                self._ranks.bytes_received,
                sum(table.rows_fetched for table in tables),
                sum(table.rows_passed for table in tables),
            )
        )


def _counted(ranks: Ranks) -> tuple[list[Mark], list[tuple[StepShape, Any]]]:
    """Return the marks of a rank around each step; rank 0 returns the steps too."""
    marks = Marks(ranks)

    def make(ranks: Ranks, **options: Any) -> Any:
        marks.networks.append(NETWORK_MAKER(ranks, **options))
        return marks.networks[-1]

    team = Team(ranks, {"network": make, "marks": lambda ranks: marks})
    if ranks.rank:
        team.follow()
        return marks.found, []
    number, _ = team.make("marks")
    steps = []
    for model, changes in CASES:
        options = {**SMALL, **changes}
        learner = ShardedLearner(team, learner_spec(model, **options), threads=1)
        for seed, n in enumerate(SIZES):
            team.announce(number, "mark")
            marks.mark()
            assert learner.learn(*batch_of(n, seed, options)) is not None
            steps.append((shape_of(learner, options), shares(learner, n)))
            team.announce(number, "mark")
            marks.mark()
    team.close()
    return marks.found, steps


def shape_of(learner: ShardedLearner, options: dict[str, Any]) -> StepShape:
    network = learner.network
    terms: Any = network.model.terms
    return StepShape(
        columns=network.columns,
        width=network.table.width,
        row_floats=network.sharded.floats,
        parameters=len(network.adam.vector) if terms.network or not network.online else 0,
        values=len(options.get("value_fields", [])),
        online=network.online,
        network=terms.network,
        slopes_w=terms.network_w,
        undropped=network.online and options.get("dropout", 0.0) > 0,
    )


def shares(learner: ShardedLearner, n: int) -> Any:
    step = learner.network._step
    return step._shares(n, sub_batch=SUB_BATCH if learner.network.online else None)


@pytest.mark.slow
def test_a_step_sends_the_bytes_of_the_formula() -> None:
    found = on_ranks(RANKS, _counted)
    steps = found[0][1]
    marks = [marks for marks, _ in found]
    for number, (shape, parts) in enumerate(steps):
        before, after = ([each[2 * number + at] for each in marks] for at in (0, 1))
        changes = [
            sum(getattr(b, name) - getattr(a, name) for a, b in zip(before, after, strict=True))
            for name in Mark._fields
        ]
        sent, received, fetched, passed = changes
        marking = FRAME * (RANKS - 1)
        assert sent == received
        assert sent - marking == bytes_a_step(shape, parts, fetched=fetched, passed=passed), shape


def test_one_rank_sends_nothing() -> None:
    ranks = Ranks.alone()
    team = Team(ranks, {"network": NETWORK_MAKER})
    learner = ShardedLearner(team, learner_spec("deepfm", **SMALL), threads=1)
    assert learner.learn(*batch_of(600, 0, SMALL)) is not None
    assert ranks.bytes_sent == ranks.bytes_received == 0
    one = shares_of(600, [slice(0, 320), slice(320, 640)], ranks=1, sub_batch=SUB_BATCH)
    assert bytes_a_step(shape_of(learner, SMALL), one, fetched=0, passed=0) == 0
