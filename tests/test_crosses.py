"""Cross products from the stream to the server.

LR & DNN learns from them what its fields alone cannot express. All other models ignore them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score
from support.commands import command, succeed
from support.manifests import edit_manifest, write_snapshot
from support.published_ids import published_cross, published_id
from support.trainers import Partitions, assert_equal_states, final_state, finish, split, trainer

from stream_ctr import Scorer
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field, Schema
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot

CROSSES = ["age*category", "user_id*app_id", "rating*hour*os"]
WIDE: dict[str, Any] = {
    "features": {"crosses": CROSSES},
    "model": {"name": "lr_dnn", "hidden": (16,), "embedding_dim": 4, "table_bits": 14},
}


@pytest.fixture(scope="module")
def stream() -> pa.LargeBinaryArray:
    """Return a simulated stream of impressions and clicks."""
    return pa.concat_arrays([batch.value for batch in Simulation(2000, seed=4).batches()])


def trained(directory: Path, stream: pa.LargeBinaryArray, **sections: Any) -> Any:
    """Return a trainer that has learned the stream, and left a snapshot in `directory`."""
    built = trainer(directory, Partitions(split(stream, 2)), **{**WIDE, **sections})
    finish(built)
    return built


def impressions(stream: pa.LargeBinaryArray) -> Mapping[str, pa.Array]:
    """Return the features of the impressions in the stream."""
    events, _ = Decoder(simulated_fields()).decode(stream)
    return events.impressions.features


def simulated_fields() -> tuple[Field, ...]:
    fields = Simulation(1, seed=0).fields
    assert fields
    return fields


def test_only_a_cross_product_can_express_an_exclusive_or() -> None:
    a, b = np.random.default_rng(1).integers(0, 2, (2, 2048))
    label = (a ^ b).astype(np.uint8)
    columns = {"a": pa.array(a).cast(pa.string()), "b": pa.array(b).cast(pa.string())}
    auc = {}
    crosses: tuple[tuple[str, ...], ...]
    for crosses in ((), (("a", "b"),)):
        fields = [Field("a", "categorical"), Field("b", "categorical")]
        hasher = Hasher(fields, table_bits=10, crosses=crosses)
        # Without hidden layers, the network is linear in the embeddings, and no sum over two fields
        # is an exclusive or.
        spec = LearnerSpec(
            model="lr_dnn",
            fields=2,
            crosses=len(crosses),
            hidden=(),
            table_bits=10,
            batch_size=256,
        )
        linear = make_learner(spec, device="cpu", threads=1)
        ids, _ = hasher.rows(columns)
        for start in range(0, len(label), 256):
            linear.learn(ids[start : start + 256], label[start : start + 256])
        auc[len(crosses)] = roc_auc_score(label, linear.predict(ids))
    assert auc[1] == 1.0
    # A sum can put three of the four points in order, which is 0.75, and a little for their counts.
    assert auc[0] < 0.8


@pytest.mark.slow
def test_a_run_with_crosses_that_resumes_equals_an_uninterrupted_one(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    trained(tmp_path / "uninterrupted", stream)
    for seed in range(3):
        source = Partitions(split(stream, 2), seed=seed, stop_after=700 if seed < 2 else None)
        resumed = trainer(tmp_path / "resumed", source, **WIDE)
        if newest := snapshot.newest(tmp_path / "resumed" / "snapshots"):
            resumed.restore(newest)
        finish(resumed)
    assert_equal_states(tmp_path / "uninterrupted", tmp_path / "resumed")


def test_a_server_scores_with_the_crosses_that_the_snapshot_names(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    built = trained(tmp_path, stream)
    newest = snapshot.newest(tmp_path / "snapshots")
    assert newest
    scorer = Scorer(newest)
    assert scorer.manifest.schema.crosses == (
        ("age", "category"),
        ("user_id", "app_id"),
        ("rating", "hour", "os"),
    )
    columns = impressions(stream)
    ids, values = built.ingest.hasher.rows(columns)
    logits = built.state.learners["lr_dnn"].predict(ids, values)
    expected = 1 / (1 + np.exp(-logits.astype(float)))
    assert scorer.predict_columns(columns) == pytest.approx(expected, abs=1e-6)
    # The model does read the crosses.
    shuffled = ids.copy()
    shuffled[:, 14:] = ids[::-1, 14:]
    assert not np.array_equal(built.state.learners["lr_dnn"].predict(shuffled), logits)


def test_ids_of_the_stream_are_those_of_the_published_formula(stream: pa.LargeBinaryArray) -> None:
    columns = impressions(stream)
    crosses = [tuple(names.split("*")) for names in CROSSES]
    hasher = Hasher(simulated_fields(), table_bits=14, crosses=crosses)
    ids, _ = hasher.rows(columns)
    hashed = {
        name: [b"\xff" if x is None else x.encode() for x in columns[name].to_pylist()]
        for name in ("user_id", "app_id")
    }
    crossed = [
        published_cross([("user_id", user), ("app_id", app)], bits=14)
        for user, app in zip(*hashed.values(), strict=True)
    ]
    assert ids[:, 15].tolist() == crossed
    users = [published_id("user_id", user, bits=14) for user in hashed["user_id"]]
    assert ids[:, 0].tolist() == users


@pytest.mark.slow
def test_a_model_that_ignores_crosses_learns_the_same_with_them_bit_for_bit(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    for crosses in ((), CROSSES):
        trained(
            tmp_path / f"deepfm{len(crosses)}",
            stream,
            model={**WIDE["model"], "name": "deepfm"},
            features={"crosses": crosses},
        )
        trained(tmp_path / f"lr_dnn{len(crosses)}", stream, features={"crosses": crosses})
    states = {
        name: final_state(tmp_path / name) for name in ("deepfm0", "deepfm3", "lr_dnn0", "lr_dnn3")
    }
    # The states of the joiner, of examples and of fields hold the ids.
    for stem in states["deepfm0"].keys() - {"joiner", "examples", "fields"}:
        for name, tensor in states["deepfm0"][stem].items():
            assert np.array_equal(tensor, states["deepfm3"][stem][name]), f"{stem} {name}"
    # LR & DNN itself reads crosses; FTRL and River, which learn from the same examples, do not.
    own = {"joiner", "examples", "fields", "metrics", "model", "optimizer"}
    for stem in states["lr_dnn0"].keys() - own:
        for name, tensor in states["lr_dnn0"][stem].items():
            assert np.array_equal(tensor, states["lr_dnn3"][stem][name]), f"{stem} {name}"
    without = states["lr_dnn0"]["model"]["table"]
    assert not np.array_equal(without, states["lr_dnn3"]["model"]["table"])


def options(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("-X", pair)]


QUICK = options(
    "baseline.enabled=false", "model.hidden=8", "model.table_bits=12", "model.name=lr_dnn"
)


def test_crosses_on_the_command_line_are_kept_and_wrong_ones_end_the_run(tmp_path: Path) -> None:
    log = tmp_path / "sim.jsonl"
    state = tmp_path / "state"
    succeed("simulate", "--impressions", "400", "--out", log)

    wrong = options("features.crosses=age*categry")
    result = command("run", "--source", log, "--state", tmp_path / "wrong", *QUICK, *wrong)
    assert result.exit_code == ConfigError.exit_code
    message = "features.crosses: 'age*categry' has 'categry', which is not a field"
    assert f"{message}; did you mean 'category'?" in result.output

    crosses = options("features.crosses=age*category,user_id*app_id")
    succeed("run", "--source", log, "--state", state, *QUICK, *crosses)
    newest = snapshot.newest(state / "snapshots")
    assert newest
    kept = snapshot.verify(newest)
    expected = [["age", "category"], ["user_id", "app_id"]]
    assert kept.config["features"]["crosses"] == expected
    assert [list(names) for names in kept.schema.crosses] == expected
    succeed("run", "--source", log, "--state", state)  # goes on with the crosses of the snapshot

    other = options("features.crosses=age*category")
    result = command("run", "--source", log, "--state", state, *other)
    assert result.exit_code == ConfigError.exit_code
    assert "was made with crosses" in result.output


FIELDS = tuple(Field(f"f{i}", "categorical") for i in range(24))
SCHEMA = Schema(fields=FIELDS, table_bits=8, crosses=(("f0", "f1"),))
SPEC = LearnerSpec(
    model="lr_dnn",
    fields=24,
    crosses=1,
    embedding_dim=4,
    hidden=(4,),
    table_bits=8,
    batch_size=8,
)


@pytest.mark.parametrize(
    ("crosses", "count", "message"),
    [
        ([["f0", "f1"]] * 2, 2, "listed twice"),
        ([["f0", "f1"]], 0, "do not agree"),
        ([["f0", "nothing"]], 1, "which is not a field"),
        (list(itertools.combinations([f"f{i}" for i in range(24)], 2))[:257], 257, "<= 25[67]"),
        ([["f0"]], 1, "Expected `array` of length >= 2"),
        ("f0*f1", 1, "Expected `array`, got `str`"),
        ([["f0", 1]], 1, "Expected `str`, got `int`"),
    ],
)
def test_a_manifest_whose_crosses_no_configuration_could_have_is_refused(
    tmp_path: Path, crosses: Any, count: int, message: str
) -> None:
    weights = make_learner(SPEC, device="cpu").weights()
    path = write_snapshot(tmp_path, {"model": weights}, schema=SCHEMA, learner=SPEC, beside={})
    assert Scorer(path).predict([{"f0": "1", "f1": "a"}]).shape == (1,)

    def change(document: dict[str, Any]) -> None:
        document["schema"]["crosses"] = crosses
        document["learner"]["crosses"] = count

    edit_manifest(path, change)
    with pytest.raises(SnapshotError, match=f"is damaged: .*{message}"):
        Scorer(path)
