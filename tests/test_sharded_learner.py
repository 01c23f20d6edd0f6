"""A network on several ranks is the network of one process, bit for bit."""

from __future__ import annotations

import resource
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.learners import learner_spec
from support.long import only_long
from support.ranks import on_ranks
from support.sharded import (
    SIZES,
    batch_of,
    differences,
    led,
    plain_history,
    sharded_history,
    whole_state,
)

from stream_ctr.distributed.ranks import RankError, Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.errors import ConfigError
from stream_ctr.learn import sharded_network
from stream_ctr.learn.linear_learner import LinearLearner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.shard_files import StoredTable
from stream_ctr.learn.sharded_learner import ShardedLearner, make_sharded_learner
from stream_ctr.learn.sharded_online_step import ShardedOnlineStep
from stream_ctr.learn.tensors import State

SMALL: dict[str, Any] = {
    "fields": 5,
    "embedding_dim": 4,
    "hidden": [8, 8],
    "table_bits": 10,
    "batch_size": 1024,
    "initial_scale": 0.3,
}
VALUED = {"dropout": 0.3, "value_fields": [1, 3]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{model: (model, {}) for model in ("fm", "ipnn", "opnn", "pnn", "fm_dnn", "deepfm")},
    "fnn, begun": ("fnn", {"pretrain_examples": 800, "dropout": 0.3}),
    "lr_dnn, crosses": ("lr_dnn", {"crosses": 2, "value_fields": [0]}),
    "bf16": ("deepfm", {"precision": "bf16", **VALUED}),
    "few rows": ("deepfm", {"table_bits": 4}),
    "adagrad": ("deepfm", {"table_optimizer": "adagrad", **VALUED}),
    "adagrad, fm": ("fm", {"table_optimizer": "adagrad"}),
    "adam": ("lr_dnn", {"table_optimizer": "adam", "crosses": 2, "dropout": 0.5}),
    "adam, fnn, begun": ("fnn", {"table_optimizer": "adam", "pretrain_examples": 800}),
    "large batches": ("deepfm", {"batch_size": 5000}),
}
LARGE_SIZES = (5000, 700, 2600)


def case(name: str) -> tuple[str, tuple[int, ...], dict[str, Any]]:
    model, options = CASES[name]
    sizes = LARGE_SIZES if options.get("batch_size") else SIZES
    return model, sizes, {**SMALL, **options}


@cache
def expected(name: str) -> list[State]:
    """Return the history of one process."""
    return plain_history(*case(name))


def _histories(ranks: Ranks, threads: int) -> dict[str, list[State]]:
    def lead(team: Team) -> dict[str, list[State]]:
        return {name: sharded_history(team, *case(name), threads=threads) for name in CASES}

    found: dict[str, list[State]] = led(ranks, lead)
    return found


def require_equal(histories: dict[str, list[State]]) -> None:
    odd = {name: differences(found, expected(name)) for name, found in histories.items()}
    assert {name: found for name, found in odd.items() if found} == {}


def test_one_rank_learns_the_same_bits_as_a_plain_learner() -> None:
    require_equal(_histories(Ranks.alone(), 1))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "threads"), [(3, 2), *only_long([(2, 1), (4, 1)])])
def test_several_ranks_learn_the_same_bits_as_a_plain_learner(size: int, threads: int) -> None:
    require_equal(on_ranks(size, _histories, threads)[0])


# -- everything else that a learner does -----------------------------------------------------------


class Pair:
    """A learner on all ranks, and a plain one that does the same on rank 0."""

    def __init__(self, team: Team, model: str = "deepfm", **options: Any) -> None:
        self.options = {**SMALL, **options}
        spec = learner_spec(model, **self.options)
        self.sharded = ShardedLearner(team, spec, threads=1)
        self.plain = NetworkLearner(spec, device="cpu", threads=1)

    def learn(self, *sizes: int, seed: int = 0) -> None:
        """Let both learn batches of these sizes, and require equal logits."""
        for n in sizes:
            batch = batch_of(n, seed + n, self.options)
            found, wanted = self.sharded.learn(*batch), self.plain.learn(*batch)
            assert found is not None
            assert wanted is not None
            assert found.numpy().tobytes() == wanted.numpy().tobytes()

    def require_equal(self) -> None:
        states = [[whole_state(each)] for each in (self.sharded, self.plain)]
        assert differences(*states) == []


def predictions(team: Team) -> None:
    """Any number of examples, also none, and more than all ranks take at once."""
    for options in ({}, {"table_optimizer": "adagrad"}, {"batch_size": 16}):
        pair = Pair(team, **options)
        for n in (0, 1, 31, 256, 257, 5000):
            ids, _, _ = batch_of(n, n, pair.options)
            found = pair.sharded.predict(ids)
            assert found.tobytes() == pair.plain.predict(ids).tobytes(), (options, n)


def refusals(team: Team) -> None:
    """A batch with numbers that are not finite changes nothing on any rank."""
    for options in ({}, {"table_optimizer": "adagrad"}):
        pair = Pair(team, **options)
        pair.learn(300, 600)
        spoilt = pair.plain.weights()
        ids, labels, _ = batch_of(600, 0, pair.options)
        spoilt["table"][ids[599, 0], 0] = 1e30  # an example of the last rank
        for each in (pair.sharded, pair.plain):
            each.load_weights(spoilt)
            assert each.learn(ids, labels) is None
        pair.require_equal()
        assert whole_state(pair.sharded)["table"].tobytes() == spoilt["table"].tobytes()


def padding(team: Team) -> None:
    """Padding reads row 0 of the table, wherever it is: if that explodes, the batch is refused."""
    for options in ({}, {"table_optimizer": "adagrad"}):
        pair = Pair(team, model="pnn", **options)
        pair.learn(300)
        ids, labels, _ = batch_of(600, 0, pair.options)
        ids[ids == 0] = 1
        spoilt = pair.plain.weights()
        spoilt["table"][0, :4] = 1e18
        outcomes = []
        for each in (pair.sharded, pair.plain):
            each.load_weights(spoilt)
            outcomes.append(each.learn(ids, labels) is None)
        assert outcomes[0] == outcomes[1]
        assert outcomes[0] or options
        pair.require_equal()


def loading(team: Team) -> None:
    """Weights and state of the optimisers go from a plain learner to ranks and back."""
    source, pair = Pair(team), Pair(team, seed=7)
    source.learn(300, 600)
    for into in (pair.sharded, pair.plain):
        into.load_weights(source.plain.weights())
        into.load_optimizer_state(source.sharded.optimizer_state())
    assert pair.sharded.restored == 1
    pair.require_equal()
    pair.learn(900)
    pair.require_equal()
    for name, odd in (("table", np.nan), ("intercept", np.inf)):
        wrong = pair.plain.weights()
        wrong[name].reshape(-1)[-1] = odd
        with pytest.raises(ValueError, match=f"tensor '{name}' holds values that are not finite"):
            pair.sharded.load_weights(wrong)
    with pytest.raises(ValueError, match="has shape"):
        pair.sharded.load_optimizer_state(Pair(team, fields=4).plain.optimizer_state())
    pair.require_equal()


def touched(team: Team) -> None:
    """What changed comes from all ranks, in ascending order."""
    for options in ({}, {"table_optimizer": "adam"}):
        pair = Pair(team, value_fields=[2], table_bits=16, **options)
        with pytest.raises(ValueError, match="track_touched"):
            pair.sharded.take_changes()
        pair.sharded.track_touched()
        pair.plain.track_touched()
        rows = pair.sharded.touched
        assert rows is not None
        assert pair.plain.touched is not None
        pair.learn(16, 300, 7)
        assert len(rows) == len(pair.plain.touched) > 0
        changes = [each.take_changes() for each in (pair.sharded, pair.plain)]
        assert differences(changes[:1], changes[1:]) == []
        assert len(rows) == 0
        rows.put_back(changes[0]["rows"][::3])
        assert rows.take().tolist() == changes[0]["rows"][::3].tolist()


def copies(team: Team) -> None:
    """A copy serves what was learned until it was made; ranks copy the rows that changed."""
    pair = Pair(team)
    spec = learner_spec("deepfm", **{**SMALL, "initial_scale": 0.0, "batch_size": 256})
    copy = ShardedLearner(team, spec)
    ids, _, _ = batch_of(400, 99, SMALL)
    pair.sharded.track_changes()
    for n in (300, 16, 900):
        pair.learn(n)
        pair.sharded.copy_weights_to(copy)
        before = pair.plain.predict(ids)
        pair.learn(48, seed=1)
        assert copy.predict(ids).tobytes() == before.tobytes()


def shards(team: Team) -> None:
    """Weights leave the table out; each rank writes its rows, and loads them from any number."""
    pair = Pair(team)
    pair.learn(300, 600)
    weights: dict[str, Any] = pair.sharded.weights(reuse=True)
    whole = pair.plain.weights()
    assert weights.keys() == whole.keys() - {"table"}
    with tempfile.TemporaryDirectory() as folder:
        pair.sharded.shards().begin(Path(folder), "model")
        pair.learn(900)
        written = pair.sharded.shards().written()
        files = {name: (sha256, size) for name, (_, sha256, size) in written.files.items()}
        stored = StoredTable.found(Path(folder), "model", files)
        assert stored.read().tobytes() == whole["table"].tobytes()
        pair.plain.load_weights(whole)
        weights["table"] = stored
        pair.sharded.load_weights(weights)
        assert differences([pair.sharded.whole_weights()], [pair.plain.weights()]) == []


def _protocol(ranks: Ranks) -> None:
    def lead(team: Team) -> None:
        for check in (predictions, refusals, padding, loading, touched, copies, shards):
            check(team)

    led(ranks, lead)


def test_one_rank_does_what_a_plain_learner_does() -> None:
    _protocol(Ranks.alone())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, *only_long([4])])
def test_several_ranks_do_what_a_plain_learner_does(size: int) -> None:
    on_ranks(size, _protocol)


# -- problems --------------------------------------------------------------------------------------


def _too_large(ranks: Ranks) -> None:
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 34, resource.RLIM_INFINITY))
    spec = learner_spec(fields=2, table_bits=29, initial_scale=0.0)
    led(ranks, lambda team: ShardedLearner(team, spec))


class _Broken(ShardedOnlineStep):
    """A step that raises an exception in the middle of its second batch."""

    _batches = 0

    def _step_sub_batches(self, batch: Any) -> None:
        self._batches += 1
        if self._batches == 2:
            raise ArithmeticError("broken")
        super()._step_sub_batches(batch)


def _breaks(ranks: Ranks) -> None:
    if ranks.rank == 1:
        vars(sharded_network)["ShardedOnlineStep"] = _Broken

    def lead(team: Team) -> None:
        learner = ShardedLearner(team, learner_spec("deepfm", **SMALL), threads=1)
        for seed in range(3):
            learner.learn(*batch_of(600, seed, SMALL)[:2])

    led(ranks, lead)


@pytest.mark.slow
def test_an_exception_on_a_rank_ends_the_others() -> None:
    with pytest.raises(RankError, match="another rank has ended"):
        on_ranks(2, _breaks)


@pytest.mark.slow
def test_a_rank_without_memory_for_its_rows_is_an_error_of_all() -> None:
    with pytest.raises(ConfigError, match="^rank 1: no memory for a table"):
        on_ranks(2, _too_large)


def test_logistic_regression_stays_whole_on_rank_0() -> None:
    team = Team(Ranks.alone(), {})
    assert isinstance(make_sharded_learner(team, learner_spec("lr", fields=2)), LinearLearner)
