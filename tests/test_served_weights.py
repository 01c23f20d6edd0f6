"""The weights that serving reads, their digest, and the changes that a model refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.dense import examples, learned
from support.learners import planted_batches, small_learner
from support.updates import first_weights, random_changes, served_spec

from stream_ctr.errors import ConfigError
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.served_weights import require_changes, served_weights, serving_sha256
from stream_ctr.learn.spec import SYSTEMS
from stream_ctr.learn.tensors import State
from stream_ctr.snapshots.delta import decode_payload, encode_payload

MODELS = (*SYSTEMS, "lr_pairs")


def learn(learner: Any, spec: Any, *, seed: int, n: int = 30) -> None:
    ids, values = examples(spec, n, seed=seed)
    labels = (np.arange(n) % 3 == 0).astype(np.uint8)
    assert learner.learn(ids, labels, values) is not None


@pytest.mark.parametrize("options", [{}, {"table_optimizer": "adagrad"}], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_changes_are_what_serving_reads_of_the_rows_that_were_touched(
    model: str, options: dict[str, Any]
) -> None:
    spec = served_spec(model, **options)
    learner = make_learner(spec, device="cpu", threads=2)
    learner.load_weights(first_weights(spec))
    before = served_weights(spec, learner.weights())
    learner.track_touched()
    for seed in range(3):
        learn(learner, spec, seed=seed)
    changes = learner.take_changes()
    require_changes(spec, changes)
    after = served_weights(spec, learner.weights())
    rows = changes["rows"]
    if spec.model == "lr":
        known = np.isin(after["rows"], rows)
        assert np.array_equal(after["rows"][known], rows[changes["values"] != 0])
        assert np.array_equal(after["values"][known], changes["values"][changes["values"] != 0])
        assert len(rows) > 20
    else:
        assert np.array_equal(after["values"][rows], changes["values"])
        others = np.setdiff1d(np.arange(len(after["values"])), rows)
        assert np.array_equal(after["values"][others], before["values"][others])
        assert len(others)
    assert changes.keys() == {*after, "rows"}
    for name in changes.keys() - {"rows", "values"}:
        assert after[name].dtype == changes[name].dtype
        assert np.array_equal(after[name], changes[name]), name


@pytest.mark.parametrize("model", ["deepfm", "lr"])
def test_changes_go_through_a_payload(model: str) -> None:
    spec = served_spec(model)
    changes = random_changes(spec, first_weights(spec), seed=1)[0]
    found = decode_payload(encode_payload({"model": changes}, "fp32"), "fp32")["model"]
    require_changes(spec, found)
    assert all(np.array_equal(found[name], changes[name]) for name in changes)


def test_the_end_of_fnns_pretraining_is_among_the_changes() -> None:
    fnn = small_learner("fnn", pretrain_examples=256)
    fnn.track_touched()
    first, second, third = planted_batches(3, seed=0)
    fnn.learn(*first)
    assert fnn.take_changes()["dense.network"] == 0.0
    fnn.learn(*second)
    assert not fnn.pretraining
    changes = fnn.take_changes()
    assert changes["dense.network"] == 1.0
    assert changes["rows"].tolist() == np.unique(second[0]).tolist()
    table = fnn.weights()["table"]
    assert np.array_equal(changes["values"], table[changes["rows"], :5])
    fnn.learn(*third)
    assert not np.array_equal(
        fnn.take_changes()["dense.deep.layers.0.weight"], changes["dense.deep.layers.0.weight"]
    )


# -- the digest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["deepfm", "fm_dnn", "lr"])
def test_the_digest_changes_with_every_array_and_not_with_the_optimizers_state(model: str) -> None:
    spec = served_spec(model)
    weights = first_weights(spec)
    digest = serving_sha256(served_weights(spec, weights))
    for name in served_weights(spec, weights):
        other = {key: array.copy() for key, array in served_weights(spec, weights).items()}
        flat = other[name].reshape(-1).view(np.uint8)
        flat[-1] ^= 1
        assert serving_sha256(other) != digest, name
    state = {key: array.copy() for key, array in weights.items()}
    if model == "lr":
        state["pairs"] = np.concatenate([state["pairs"], [[0.0, 1.0]]])  # its weight is 0
        unknown = np.setdiff1d(np.arange(1 << spec.table_bits), state["rows"])[-1:]
        state["rows"] = np.concatenate([state["rows"], unknown]).astype(np.int32)
        order = np.argsort(state["rows"])
        state["rows"], state["pairs"] = state["rows"][order], state["pairs"][order]
    else:
        state["table"][:, -1] += 1.0
        state["intercept"][1] += 1.0
    assert serving_sha256(served_weights(spec, state)) == digest


def test_the_digest_of_a_large_array_does_not_depend_on_its_layout() -> None:
    rows = np.random.default_rng(0).normal(size=(600_000, 16)).astype(np.float32)
    view = {"values": rows[:, :11]}
    assert view["values"].nbytes > 1 << 24  # more than a block
    digest = serving_sha256(view)
    assert serving_sha256({"values": view["values"].copy()}) == digest
    rows[-1, 10] += 1.0
    assert serving_sha256(view) != digest


# -- what is refused -------------------------------------------------------------------------------

ROWS = np.array([3, 7], np.uint32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": None}, "tensor 'rows' is missing"),
        ({"dense.deep.layers.0.bias": None}, "tensor 'dense.deep.layers.0.bias' is missing"),
        ({"intercept": None}, "tensor 'intercept' is missing"),
        ({"table": np.zeros(1)}, "tensor 'table' is not one of this model"),
        ({"rows": ROWS.astype(np.int64)}, "'rows' is int64"),
        ({"rows": ROWS[None]}, r"'rows' is uint32 \(1, 2\)"),
        ({"rows": ROWS[::-1].copy()}, "'rows' does not ascend"),
        ({"rows": np.array([3, 3], np.uint32)}, "'rows' does not ascend"),
        ({"rows": np.array([3, 256], np.uint32)}, r"outside a table of 2\^8 rows"),
        ({"rows": np.array([3, 2**32 - 1], np.uint32)}, r"outside a table of 2\^8 rows"),
        ({"rows": ROWS[:1]}, r"'values' is float32 \(2, 6\), expected float32 \(1, 6\)"),
        ({"values": np.zeros((2, 16), np.float32)}, r"'values' is float32 \(2, 16\)"),
        ({"values": np.zeros((2, 6))}, "'values' is float64"),
        ({"values": np.full((2, 6), np.inf, np.float32)}, "'values' holds values that are not fin"),
        ({"dense.deep.layers.0.bias": np.zeros(7, np.float32)}, "0.bias' is float32"),
        ({"dense.deep.layers.0.bias": np.full(8, np.nan, np.float32)}, "not finite"),
        ({"intercept": np.zeros(1)}, "'intercept' is float64"),
        ({"intercept": np.zeros(2, np.float32)}, r"'intercept' is float32 \(2,\)"),
    ],
    ids=str,
)
def test_changes_that_are_not_those_of_a_network_are_refused(
    changed: dict[str, Any], message: str
) -> None:
    spec = served_spec("deepfm")
    changes = random_changes(spec, learned(spec)[1], seed=0)[0]
    changes = {**changes, "rows": ROWS, "values": changes["values"][:2], **changed}
    with pytest.raises(ValueError, match=message):
        require_changes(spec, {name: a for name, a in changes.items() if a is not None})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": np.zeros((2, 1), np.float32)}, r"'values' is float32 \(2, 1\)"),
        ({"values": np.array([1, np.nan], np.float32)}, "'values' holds values that are not fin"),
        ({"rows": np.array([3, 256], np.uint32)}, r"outside a table of 2\^8 rows"),
        ({"intercept": np.zeros(1, np.float32)}, "'intercept' is float32"),
        ({"intercept": np.array([np.inf])}, "'intercept' holds values that are not finite"),
        ({"dense.bias": np.zeros((), np.float32)}, "'dense.bias' is not one of this model"),
    ],
    ids=str,
)
def test_changes_that_are_not_those_of_lr_are_refused(
    changed: dict[str, Any], message: str
) -> None:
    changes = {"rows": ROWS, "values": np.ones(2, np.float32), "intercept": np.zeros(1), **changed}
    with pytest.raises(ValueError, match=message):
        require_changes(served_spec("lr"), changes)


def test_rows_of_pairs_lie_in_the_table_of_pairs() -> None:
    rows = np.array([256, 511], np.uint32)
    changes: State = {"rows": rows, "values": np.ones(2, np.float32), "intercept": np.zeros(1)}
    require_changes(served_spec("lr_pairs"), changes)
    with pytest.raises(ValueError, match=r"outside a table of 2\^9 rows"):
        require_changes(served_spec("lr_pairs"), {**changes, "rows": rows + np.uint32(1)})


def test_only_the_online_rule_has_a_constant() -> None:
    spec = served_spec("fm", table_optimizer="adam")
    changes = random_changes(spec, learned(spec)[1], seed=0)[0]
    require_changes(spec, changes)
    with pytest.raises(ValueError, match="'intercept' is not one of this model"):
        require_changes(spec, {**changes, "intercept": np.zeros(1, np.float32)})


def test_a_claimed_size_takes_no_memory() -> None:
    spec = served_spec("deepfm", table_bits=31, hidden=[16384] * 64)
    with pytest.raises(ValueError, match="is missing"):
        require_changes(spec, {})


def test_a_model_that_this_process_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not known to this process"):
        require_changes(served_spec("acme.nets:Wide"), {})
