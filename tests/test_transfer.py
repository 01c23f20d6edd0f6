"""What a model carries over to a run with other fields, another table or another optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.learners import assert_equal_states, learner_spec, state_of

from stream_ctr.errors import ConfigError
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field, Schema
from stream_ctr.events.field_changes import compare_fields
from stream_ctr.learn.blend import Blend
from stream_ctr.learn.carried import Carried, ModelState
from stream_ctr.learn.learner import Learner, make_learner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.pairs import PairHasher, choose_columns, columns_after
from stream_ctr.learn.shard_files import StoredTable
from stream_ctr.learn.spec import FtrlRates, Pairs
from stream_ctr.learn.transfer import carry_over
from stream_ctr.learn.transfer_blend import BlendState, carry_blend
from stream_ctr.learn.transfer_linear import carry_river, with_rates
from stream_ctr.models import MODELS

NETWORKS = [name for name in MODELS if name not in ("lr", "fm")]
OUTER = ("opnn", "pnn")  # the outer product is of the sum over all fields
ALL = [*MODELS, "pairs", "pretraining"]
OPTIMIZERS = ["online", "adagrad", "adam"]
BATCH = 32
POOL = ["app", "site", "hour", "city", "size"]


def schema_of(names: Sequence[str], *, bits: int = 12, **options: Any) -> Schema:
    """Return a schema of categorical fields; those that begin with a # are numeric."""
    fields = tuple(
        Field(name, "numeric" if name.startswith("#") else "categorical") for name in names
    )
    return Schema(fields=fields, table_bits=bits, **options)


def examples(schema: Schema, *, n: int = 4 * BATCH, seed: int = 0) -> tuple[Any, ...]:
    """Return ids, labels and values of examples whose values depend on the name of the field."""
    columns = {}
    for field in schema.fields:
        rng = np.random.default_rng([seed, *field.name.encode()])
        number = rng.integers(0, 8, n)
        columns[field.name] = (
            pa.array(number.astype(np.float64))
            if field.kind == "numeric"
            else pa.array([f"v{each}" for each in number])
        )
    ids, values = Hasher(**msgspec.structs.asdict(schema)).rows(columns)
    return ids, np.random.default_rng(seed).integers(0, 2, n).astype(np.uint8), values


def made(model: str, schema: Schema, *, seed: int = 0, **options: Any) -> Learner:
    """Return a learner of the fields of a schema."""
    fields = len(schema.fields)
    if model == "pairs":
        model = "lr"
        options = {"pairs": {"columns": choose_columns(fields), "table_bits": 14}, **options}
    if model == "pretraining":
        model = "fnn"
        options = {"pretrain_examples": 10_000, **options}
    spec = learner_spec(
        model,
        **{
            "fields": fields,
            "crosses": len(schema.crosses),
            "value_fields": schema.value_fields,
            "embedding_dim": 4,
            "hidden": [8, 6],
            "table_bits": schema.table_bits,
            "batch_size": BATCH,
            "initial_scale": 0.3,
            "seed": seed,
            **options,
        },
    )
    learner = make_learner(spec, device="cpu", threads=1)
    learner.spec = spec  # type: ignore[attr-defined]
    return learner


def learn(learner: Learner, schema: Schema, *, seed: int = 0) -> None:
    ids, labels, values = examples(schema, seed=seed)
    for start in range(0, len(ids), BATCH):
        rows = slice(start, start + BATCH)
        assert learner.learn(ids[rows], labels[rows], values[rows]) is not None


def model_state(learner: Any, schema: Schema) -> ModelState:
    return ModelState(schema, learner.spec, learner.weights(), learner.optimizer_state())


def begin(old: Any, before: Schema, new: Any, now: Schema) -> Carried:
    """Let `new` begin with what `old` knows."""
    carried = carry_over(model_state(old, before), model_state(new, now))
    new.load_weights(carried.weights)
    new.load_optimizer_state(carried.optimizer)
    return carried


def predictions(learner: Learner, schema: Schema) -> npt.NDArray[np.floating]:
    ids, _, values = examples(schema, seed=1)
    return learner.predict(ids, values)


def optimizers(model: str) -> list[str]:
    return ["online"] if model in ("lr", "pairs") else OPTIMIZERS


CASES = [(model, optimizer) for model in ALL for optimizer in optimizers(model)]


# -- the same fields -----------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "optimizer"), CASES)
def test_with_the_same_configuration_a_model_goes_on_as_if_nothing_had_happened(
    model: str, optimizer: str
) -> None:
    schema = schema_of(POOL)
    old, new = (made(model, schema, seed=seed, table_optimizer=optimizer) for seed in (0, 0))
    learn(old, schema)
    carried = begin(old, schema, new, schema)
    assert carried.knows
    assert_equal_states(state_of(old), state_of(new))
    assert old.pretraining == new.pretraining == (model == "pretraining")
    for each in (old, new):
        learn(each, schema, seed=2)
    assert_equal_states(state_of(old), state_of(new))


@pytest.mark.parametrize(
    ("options", "schema"),
    [
        ({"embedding_dim": 5}, schema_of(POOL)),
        ({"table_optimizer": "adam"}, schema_of(POOL)),
        ({}, schema_of(POOL, bits=9)),
        (
            {},
            msgspec.structs.replace(
                schema_of(POOL), fields=(Field("app", "numeric"), *schema_of(POOL).fields[1:])
            ),
        ),
    ],
)
def test_a_table_in_the_files_of_several_ranks_carries_over_as_it_is_or_not_at_all(
    options: dict[str, Any], schema: Schema
) -> None:
    before, layer = schema_of(POOL), "dense.deep.layers.0.weight"
    old = model_state(made("deepfm", before), before)
    stored: Any = StoredTable(Path("snapshot"), "model", {}, old.weights["table"].shape)
    old.weights["table"] = stored
    fresh = model_state(made("deepfm", before, seed=1), before)
    del fresh.weights["table"]
    carried = carry_over(old, fresh)
    assert carried.weights["table"] is stored
    assert np.array_equal(carried.weights[layer], old.weights[layer])
    with pytest.raises(ConfigError, match="begin without torchrun, and go on with torchrun"):
        carry_over(old, model_state(made("deepfm", schema, **options), schema))


@pytest.mark.parametrize(("model", "optimizer"), CASES)
def test_a_larger_table_predicts_the_same_bits_and_back_again_holds_the_same_rows(
    model: str, optimizer: str
) -> None:
    small, large = schema_of(POOL, bits=7), schema_of(POOL, bits=9)
    old, new, back = (
        made(model, schema, table_optimizer=optimizer) for schema in (small, large, small)
    )
    learn(old, small)
    carried = begin(old, small, new, large)
    if model == "pairs":
        assert not carried.knows
        assert "model.table_bits was 7 and is 9" in carried.sentences[0]
        return
    assert np.array_equal(predictions(old, small), predictions(new, large))
    begin(new, large, back, small)
    assert_equal_states(state_of(old), state_of(back))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_smaller_table_takes_a_row_that_no_other_learned_row_falls_on(optimizer: str) -> None:
    large, small = schema_of(["app"], bits=6), schema_of(["app"], bits=4)
    old, new = (
        made("fm", each, seed=at, table_optimizer=optimizer)
        for at, each in enumerate((large, small))
    )
    # The rows 1 and 17 fall on 1; 18, alone, on 2; nothing that was learned falls on 3.
    ids = np.array([[1], [17], [18]], np.int32)
    for labels in ([1, 0, 1], [1, 1, 0]):
        old.learn(ids, np.array(labels, np.uint8))
    before, fresh = old.weights()["table"], new.weights()["table"]
    carried = begin(old, large, new, small)
    after = new.weights()["table"]
    assert np.array_equal(after[2], before[18])
    assert np.array_equal(np.delete(after, 2, axis=0), np.delete(fresh, 2, axis=0))
    assert "1 rows that were learned stay, 2 begin anew" in carried.sentences[0]


def test_a_smaller_table_of_lr_takes_rows_that_are_alone_or_equal() -> None:
    large, small = schema_of(["app"], bits=6), schema_of(["app"], bits=4)
    old, new = made("lr", large), made("lr", small)
    old.learn(np.array([[1], [17], [18]], np.int32), np.array([1, 0, 1], np.uint8))
    begin(old, large, new, small)
    assert new.weights()["rows"].tolist() == [2]
    assert np.array_equal(new.weights()["pairs"], old.weights()["pairs"][-1:])


# -- fields that come and go ---------------------------------------------------------------------


field_lists = st.lists(st.sampled_from(POOL), min_size=1, max_size=5, unique=True)


@settings(max_examples=25)
@given(st.sampled_from(NETWORKS), field_lists, field_lists)
def test_a_network_sees_fields_that_stay_as_before_and_no_others(
    model: str, before: list[str], now: list[str]
) -> None:
    """With the embeddings of fields that came or went at zero, the logits are the same."""
    fnn = {"pretrain_examples": 1} if model == "fnn" else {}
    old, new = (made(model, schema_of(names, bits=6), **fnn) for names in (before, now))
    learn(old, schema_of(before, bits=6))
    carried = begin(old, schema_of(before, bits=6), new, schema_of(now, bits=6))
    stay = {*before} & {*now}
    if not stay:
        assert not carried.knows
        assert carried.sentences == ["begins anew: none of its fields stays"]
        return
    rng = np.random.default_rng(0)
    k = 4 * MODELS[model].embeddings
    rows = {name: torch.from_numpy(rng.normal(size=(7, 1 + k))) for name in POOL}

    def logits(learner: Learner, names: list[str], seen: set[str], *, deep: bool) -> torch.Tensor:
        assert isinstance(learner, NetworkLearner)
        module = learner.model.double()
        both = torch.stack([rows[name] * (name in seen) for name in names], dim=1)
        w, v = both[..., 0], both[..., 1:]
        result: torch.Tensor = module.deep_logits(w, v) if deep else module(w, v)  # type: ignore[operator]
        return result

    torch.testing.assert_close(
        logits(old, before, stay, deep=False), logits(new, now, stay, deep=False)
    )
    if model not in OUTER:
        # Whatever the new fields hold, the network does not look at it yet.
        torch.testing.assert_close(
            logits(old, before, stay, deep=True), logits(new, now, {*now}, deep=True)
        )


@pytest.mark.parametrize("model", ["fnn", "ipnn", "lr_dnn", "lr"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_new_field_changes_no_logit_before_the_first_step(model: str, optimizer: str) -> None:
    """These models have neither products of all embeddings in their logit nor an outer product."""
    before, now = schema_of(POOL[:4], bits=14), schema_of([POOL[4], *POOL[:4]], bits=14)
    options = {"pretrain_examples": 1} if model == "fnn" else {}
    old, new = (
        made(model, schema, table_optimizer=optimizer, **options) for schema in (before, now)
    )
    learn(old, before)
    begin(old, before, new, now)
    np.testing.assert_allclose(predictions(old, before), predictions(new, now), atol=2e-6)
    learn(new, now)
    assert not np.allclose(predictions(old, before), predictions(new, now), atol=1e-3)


@pytest.mark.parametrize("model", ["deepfm", "fm", "fm_dnn", "opnn", "pnn"])
def test_only_the_embeddings_of_a_new_field_change_a_logit_before_the_first_step(
    model: str,
) -> None:
    before, now = schema_of(POOL[:4], bits=14), schema_of(POOL, bits=14)
    old, new = (made(model, schema) for schema in (before, now))
    learn(old, before)
    begin(old, before, new, now)
    assert isinstance(new, NetworkLearner)
    new_rows = examples(now, seed=1)[0][:, 4]
    assert (new.table.rows[new_rows, new.table.width :] == 0).all()  # as in a fresh table
    assert not np.allclose(predictions(old, before), predictions(new, now), atol=2e-6)
    new.table.rows[new_rows] = 0.0
    np.testing.assert_allclose(predictions(old, before), predictions(new, now), atol=2e-6)


@settings(max_examples=30)
@given(field_lists, field_lists, st.integers(0, 2))
def test_a_row_stays_with_its_value_whichever_fields_come_and_go(
    before: list[str], now: list[str], more_bits: int
) -> None:
    small, large = schema_of(before, bits=10), schema_of(now, bits=10 + more_bits)
    old, new = made("deepfm", small), made("deepfm", large, seed=1)
    learn(old, small)
    begin(old, small, new, large)
    rows, ids = {}, {}
    for schema, learner in ((small, old), (large, new)):
        found = examples(schema, seed=1)[0]
        for column, field in enumerate(schema.fields):
            ids[field.name, schema.table_bits, learner is new] = found[:, column]
            rows[field.name, learner is new] = learner.weights()["table"][found[:, column]]
    for name in {*before} & {*now}:
        assert np.array_equal(rows[name, False], rows[name, True])


@settings(max_examples=30)
@given(field_lists, field_lists)
@example(POOL[:4], ["hour", "size"])
def test_pairs_of_fields_that_stay_keep_their_rows(before: list[str], now: list[str]) -> None:
    old = Pairs(columns=tuple(choose_columns(len(before))), table_bits=14)
    for names in (now, before, now):
        stay = {*before} & {*names}
        new = columns_after(old, before, names, stay=stay)
        assert columns_after(new, names, names, stay=names) == new
        assert len({*(new.numbers or range(len(names)))}) == len(names)
        number = np.random.default_rng(0).integers(0, 1 << 20, (9, len(POOL))).astype(np.int32)
        found = {}
        for pairs, fields in ((old, before), (new, names)):
            ids = number[:, [POOL.index(name) for name in fields]]
            rows = PairHasher(pairs.columns, table_bits=14, numbers=pairs.numbers or None).rows(ids)
            found[fields is names] = {
                frozenset({fields[i], fields[j]}): rows[:, at].tolist()
                for at, (i, j) in enumerate(pairs.columns)
            }
        kept = found[False].keys() & found[True].keys()
        assert kept == {pair for pair in found[False] if pair <= stay}
        assert all(found[False][pair] == found[True][pair] for pair in kept)
        assert len(found[True]) == len(names) * (len(names) + 1) // 2
        old, before = new, names


def test_many_pairs_stay_as_they_were_chosen_and_are_filled_up() -> None:
    before = [f"f{number}" for number in range(39)]
    old = Pairs(columns=tuple(choose_columns(39)))
    now = [*before[1:], "new"]
    new = columns_after(old, before, now, stay=before[1:])
    chosen = {frozenset((before[i], before[j])) for i, j in old.columns if i != j}
    taken = [frozenset((now[i], now[j])) for i, j in new.columns if i != j]
    kept = {pair for pair in chosen if "f0" not in pair}
    assert len(kept) < len(taken) == len(set(taken)) == 190
    assert kept < {*taken}
    assert any("new" in pair for pair in taken)


def test_lr_over_pairs_keeps_the_weights_of_pairs_that_stay() -> None:
    before, now = schema_of(POOL[:3]), schema_of(["city", "hour", "site", "app"])
    columns = {"columns": choose_columns(3), "table_bits": 20}  # without collisions
    old = made("pairs", before, pairs=columns, ftrl={"alpha": 0.5})
    learn(old, before)
    after = columns_after(
        old.spec.pairs,  # type: ignore[attr-defined]
        POOL[:3],
        ["city", "hour", "site", "app"],
        stay=POOL[:3],
    )
    pairs = msgspec.to_builtins(after)
    new = made("pairs", now, pairs=pairs, ftrl={"alpha": 0.3})
    carried = begin(old, before, new, now)
    assert "6 of 10 fields and pairs carry over" in carried.sentences
    np.testing.assert_allclose(predictions(old, before), predictions(new, now), rtol=1e-12)
    learn(new, now, seed=2)
    assert not np.allclose(predictions(old, before), predictions(new, now), atol=1e-2)
    # Numbers that were given to other fields are other columns.
    other = made("pairs", now)
    assert "its columns have other rows" in begin(old, before, other, now).sentences[0]


# -- fields whose values are hashed in another way -----------------------------------------------


EDGES = (1.5, 3.5, 5.5)


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({"bucket_edges": {"#n": EDGES}}, {}, "its bucket edges are others"),
        ({}, {"buckets_per_octave": 3.0}, "its buckets_per_octave were 2 and are 3"),
        ({}, {"numeric_encoding": "value"}, "its numeric_encoding was buckets and is value"),
        (
            {"numeric_encoding": "value"},
            {"numeric_encoding": "value", "value_scales": {"#n": 2.0}},
            "its scale is another",
        ),
    ],
)
@pytest.mark.parametrize("model", ["deepfm", "fnn", "ipnn", "lr"])
def test_a_field_that_is_hashed_in_another_way_begins_anew(
    before: dict[str, Any], now: dict[str, Any], reason: str, model: str
) -> None:
    was, is_now = (schema_of(["app", "#n"], bits=16, **each) for each in (before, now))
    changes = compare_fields(was, is_now)
    assert (changes.stay, changes.changed) == (("app",), {"#n": reason})
    assert f"fields: #n begins anew: {reason}" in changes.sentences
    old = made(model, was, pretrain_examples=1)
    new, fresh = (made(model, is_now, seed=1, pretrain_examples=1) for _ in range(2))
    learn(old, was)
    begin(old, was, new, is_now)
    ids = examples(is_now, seed=1)[0]
    if model == "lr":
        kept = set(new.weights()["rows"].tolist())
        assert kept & {*ids[:, 0].tolist()}
        assert not kept & {*ids[:, 1].tolist()}
        return
    table, first = (each.weights()["table"] for each in (new, fresh))
    assert np.array_equal(table[ids[:, 0]], old.weights()["table"][ids[:, 0]])
    shared = np.isin(ids[:, 1], changes.rows)
    assert np.array_equal(table[ids[shared, 1]], first[ids[shared, 1]])
    width: int = new.table.width  # type: ignore[attr-defined]
    assert (table[ids[:, 1], width:] == 0).all()
    columns = new.weights()["dense.deep.layers.0.weight"]
    each = columns.shape[1] // 2
    if model != "ipnn":
        assert columns[:, :each].all()
        assert not columns[:, each:].any()


def test_a_field_of_another_kind_begins_anew() -> None:
    was = schema_of(["app", "size"])
    now = Schema(fields=(Field("size", "numeric"), Field("app", "categorical")), table_bits=12)
    assert compare_fields(was, now).changed == {"size": "it was categorical and is numeric"}
    # A category "3" and the bucket 3 have one row.
    hasher = Hasher(was.fields, table_bits=12)
    ids, _ = hasher.rows({"app": pa.array(["3"]), "size": pa.array(["3"])})
    assert ids[0, 1] in compare_fields(was, now).rows


def test_with_another_hash_seed_nothing_carries_over() -> None:
    was, now = schema_of(POOL), schema_of(POOL, hash_seed=1)
    old, new, fresh = made("deepfm", was), made("deepfm", now), made("deepfm", now)
    learn(old, was)
    carried = begin(old, was, new, now)
    assert not carried.knows
    assert "features.hash_seed was 0 and is 1" in carried.sentences[0]
    assert_equal_states(state_of(new), state_of(fresh))


# -- other optimisers, other shapes --------------------------------------------------------------


@pytest.mark.parametrize("model", [*MODELS, "pretraining"])
@pytest.mark.parametrize("was", OPTIMIZERS)
@pytest.mark.parametrize("now", OPTIMIZERS)
def test_another_optimiser_changes_no_logit(model: str, was: str, now: str) -> None:
    schema = schema_of(POOL)
    options = {"pretrain_examples": 1} if model == "fnn" else {}
    old, new = (made(model, schema, table_optimizer=each, **options) for each in (was, now))
    learn(old, schema)
    carried = begin(old, schema, new, schema)
    np.testing.assert_allclose(predictions(old, schema), predictions(new, schema), atol=2e-6)
    ids, labels, _ = examples(schema, n=BATCH, seed=1)
    before = old.predict(ids)
    if model == "lr":  # it learns one example at a time
        ids, labels, before = ids[:1], labels[:1], before[:1]
    learned = new.learn(ids, labels)
    assert learned is not None
    np.testing.assert_allclose(learned.numpy(), before, atol=2e-6)
    if model != "lr" and (was == "adam") != (now == "adam"):
        assert any("state of the rows begins anew" in each for each in carried.sentences)


def test_sums_of_squares_and_moments_stay_with_their_weights() -> None:
    was, now = schema_of(["app", "site"]), schema_of(["site", "new"])
    for optimizer in OPTIMIZERS:
        old, new = (made("ipnn", each, table_optimizer=optimizer) for each in (was, now))
        learn(old, was)
        begin(old, was, new, now)
        before, after = old.optimizer_state(), new.optimizer_state()
        assert after["steps"].tolist() == before["steps"].tolist()
        for moment in ("exp_avg", "exp_avg_sq"):
            name = f"deep.layers.0.weight.{moment}"
            assert before[name].any()
            assert np.array_equal(after[name][:, :4], before[name][:, 4:8])  # site
            assert not after[name][:, 4:].any()  # the new field, and its product with site
            name = f"deep.layers.2.weight.{moment}"
            assert np.array_equal(after[name], before[name])


def test_embeddings_of_another_width_begin_anew_and_first_order_weights_stay() -> None:
    schema = schema_of(POOL)
    old, new, fresh = (
        made("deepfm", schema, seed=at, embedding_dim=k) for at, k in ((0, 4), (1, 3), (1, 3))
    )
    learn(old, schema)
    carried = begin(old, schema, new, schema)
    before, after, first = (each.weights() for each in (old, new, fresh))
    assert np.array_equal(after["table"][:, 3], before["table"][:, 4])  # w
    assert np.array_equal(after["table"][:, 5], before["table"][:, 6])  # its sum of squares
    assert np.array_equal(after["table"][:, :3], first["table"][:, :3])
    assert np.array_equal(after["table"][:, 4], first["table"][:, 4])
    assert all(np.array_equal(after[each], first[each]) for each in after if "layers" in each)
    assert np.array_equal(after["intercept"], before["intercept"])
    assert any("model.embedding_dim was 4 and is 3" in each for each in carried.sentences)
    assert any("the network begins anew" in each for each in carried.sentences)


@pytest.mark.parametrize(
    ("hidden", "kept"),
    [([8, 6], [0, 2, 4]), ([8, 5], [0]), ([8, 6, 6], [0, 2]), ([7, 6], []), ([8, 6, 1], [0, 2])],
)
def test_a_layer_stays_if_its_shape_and_all_layers_below_do(
    hidden: list[int], kept: list[int]
) -> None:
    schema = schema_of(POOL)
    old, new, fresh = (
        made("deepfm", schema, seed=at, hidden=each)
        for at, each in ((0, [8, 6]), (1, hidden), (1, hidden))
    )
    learn(old, schema)
    carried = begin(old, schema, new, schema)
    before, after, first = (state_of(each) for each in (old, new, fresh))
    for layer in range(0, 2 * len(hidden) + 1, 2):
        for part in ("weight", "bias"):
            name = f"dense.deep.layers.{layer}.{part}"
            moment = f"deep.layers.{layer}.{part}.exp_avg"
            source = before if layer in kept else first
            assert np.array_equal(after[name], source[name])
            assert np.array_equal(after[moment], source[moment])
    assert any("model.hidden" in each for each in carried.sentences) == (hidden != [8, 6])


def test_a_network_with_another_activation_begins_anew() -> None:
    schema = schema_of(POOL)
    old, new, fresh = (made("deepfm", schema, activation=each) for each in ("relu", "tanh", "tanh"))
    learn(old, schema)
    carried = begin(old, schema, new, schema)
    after, first = new.weights(), fresh.weights()
    assert all(np.array_equal(after[each], first[each]) for each in after if "layers" in each)
    assert any("model.activation was relu and is tanh" in each for each in carried.sentences)


def test_pre_training_ends_after_as_many_examples_with_another_batch_size() -> None:
    schema = schema_of(POOL)
    old = made("fnn", schema, pretrain_examples=8 * BATCH)
    new = made("fnn", schema, pretrain_examples=8 * BATCH, batch_size=BATCH // 2)
    learn(old, schema)  # four batches
    carried = begin(old, schema, new, schema)
    assert "its pre-training goes on" in carried.sentences
    assert new.pretraining
    ids, labels, _ = examples(schema, n=4 * BATCH)
    for at in range(8):
        assert new.pretraining
        rows = slice(at * BATCH // 2, (at + 1) * BATCH // 2)
        new.learn(ids[rows], labels[rows])
    assert not new.pretraining


def test_a_network_after_pre_training_that_begins_anew_is_trained_before() -> None:
    schema = schema_of(POOL)
    old = made("fnn", schema, pretrain_examples=1)
    new = made("fnn", schema, pretrain_examples=100, hidden=[9])
    learn(old, schema)
    carried = begin(old, schema, new, schema)
    assert new.pretraining
    assert new.steps == 0
    assert "its pre-training begins anew, because the network does" in carried.sentences


positive = st.floats(0.05, 3.0)
rates = st.builds(FtrlRates, alpha=positive, beta=positive, l1=st.sampled_from([0.0, 0.5]),
                  l2=st.sampled_from([0.0, 1.0]))  # fmt: skip


@given(rates, rates, st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 9)), min_size=1))
def test_with_other_rates_ftrl_has_the_same_weights(
    before: FtrlRates, now: FtrlRates, pairs: list[tuple[float, float]]
) -> None:
    def weights(pairs: npt.NDArray[np.float64], rates: FtrlRates) -> list[float]:
        return [
            0.0
            if abs(z) <= rates.l1
            else -(z - np.sign(z) * rates.l1) / ((rates.beta + n**0.5) / rates.alpha + rates.l2)
            for z, n in pairs.tolist()
        ]

    moved = with_rates(np.array(pairs), before, now)
    np.testing.assert_allclose(
        weights(moved, now), weights(np.array(pairs), before), rtol=1e-9, atol=1e-12
    )
    assert np.array_equal(moved[:, 1], np.array(pairs)[:, 1])


# -- cross products ------------------------------------------------------------------------------


def test_cross_products_stay_with_their_members() -> None:
    was = schema_of(POOL[:3], crosses=(("app", "site"), ("app", "hour")))
    now = schema_of(["new", *POOL[:3]], crosses=(("site", "hour"), ("app", "site")))
    old, new = made("lr_dnn", was), made("lr_dnn", now)
    learn(old, was)
    begin(old, was, new, now)
    before, after = (
        each.weights()["table"][examples(schema, seed=1)[0][:, column], 4]
        for each, schema, column in ((old, was, 3), (new, now, 5))
    )
    assert before.any()
    assert np.array_equal(before, after)


# -- River and the blend -------------------------------------------------------------------------


def test_rivers_rows_carry_over_to_a_larger_table() -> None:
    state = {
        "weight_keys": np.array([3, 1]),
        "weights": np.array([0.5, -0.5]),
        "keys": np.array([1, 3, 2]),
        "z": np.array([1.0, 2.0, 3.0]),
        "n": np.array([4.0, 5.0, 6.0]),
        "intercept": np.array([0.1]),
        "iterations": np.array([7]),
    }
    small, large = schema_of(["app"], bits=4), schema_of(["app"], bits=5)
    same, sentence = carry_river(state, small, small, same_rates=True)
    assert same
    assert_equal_states(dict(state), same)
    assert sentence == "3 rows carry over"
    grown, _ = carry_river(state, small, large, same_rates=True)
    assert grown
    assert grown["keys"].tolist() == [1, 3, 2, 17, 19, 18]
    assert grown["n"].tolist() == [4.0, 5.0, 6.0] * 2
    assert carry_river(state, large, small, same_rates=True)[0] is None
    assert carry_river(state, small, small, same_rates=False)[0] is None
    assert (
        carry_river(state, small, schema_of(["app"], bits=4, hash_seed=1), same_rates=True)[0]
        is None
    )


def blend_state(blend: Blend) -> BlendState:
    return BlendState(blend.members, blend.weights(), blend.optimizer_state())


def trained_blend(*members: str) -> Blend:
    blend = Blend(members)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400).astype(np.uint8)
    logits = (2.0 * labels - 1) * 0.4 + rng.normal(size=(len(members), 400))
    blend.learn(logits, labels)
    return blend


def begin_blend(old: Blend | None, members: Sequence[str], known: dict[str, str]) -> Blend:
    new = Blend(members)
    carried = carry_blend(blend_state(old) if old else None, blend_state(new), known)
    new.load_weights(carried.weights)
    new.load_optimizer_state(carried.optimizer)
    return new


LOGITS = np.random.default_rng(1).normal(size=(3, 50))


def test_new_members_change_no_prediction_of_a_blend() -> None:
    old = trained_blend("deepfm", "ftrl")
    new = begin_blend(old, ["lr", "fm", "deepfm"], {"deepfm": "deepfm", "lr": "ftrl"})
    assert np.allclose(old.predict(LOGITS[[2, 0]]), new.predict(LOGITS), rtol=1e-12)
    assert new.report().best is None
    labels = np.ones(50, np.uint8)
    new.learn(LOGITS, labels)
    assert all(weight > 0 for weight in new.report().weights.values())


def test_a_blend_without_a_member_has_the_best_stack_of_the_others() -> None:
    old = trained_blend("a", "b", "c")
    new = begin_blend(old, ["c", "a"], {"a": "a", "c": "c"})
    before = old.report().weights
    rest = before["a"] + before["c"] + before["stack"]
    for name, weight in new.report().weights.items():
        assert weight == pytest.approx(before[name] / rest)
    # The loss around its minimum is (u - u*)' H (u - u*); nothing near the new u loses less.
    h, best = old.optimizer_state()["h"], old.weights()["u"]
    c, a, constant = new.weights()["u"]

    def loss(a: float, c: float, constant: float) -> float:
        from_best = np.array([a, 0.0, c, constant]) - best
        return float(from_best @ h @ from_best)

    rng = np.random.default_rng(0)
    for step in rng.normal(scale=1e-3, size=(50, 3)):
        assert loss(a + step[0], c + step[1], constant + step[2]) > loss(a, c, constant)


def test_a_new_blend_predicts_as_the_member_that_carries_over() -> None:
    new = begin_blend(None, ["fm", "deepfm", "ftrl"], {"deepfm": "deepfm"})
    assert np.allclose(new.predict(LOGITS), LOGITS[1], rtol=1e-9)


def test_a_blend_of_which_no_member_carries_over_begins_anew() -> None:
    new = begin_blend(trained_blend("a", "b"), ["c"], {})
    assert new.report().weights == {"c": 0.5, "stack": 0.5}
