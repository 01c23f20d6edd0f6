"""Cross products from the stream to the server: LR & DNN learns by them what its fields cannot tell, and nobody else sees them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score
from support.manifests import edit_manifest, manifest
from support.published_ids import published_cross, published_id
from support.trainers import Partitions, assert_equal_states, final_state, finish, split, trainer

from stream_ctr import Scorer
from stream_ctr.cli.main import main
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field, Schema
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot

CROSSES = ["age*category", "user_id*app_id", "rating*hour*os"]
WIDE = {
    "features": {"crosses": CROSSES},
    "model": {"name": "lr_dnn", "hidden": (16,), "embedding_dim": 4, "table_bits": 14},
}


@pytest.fixture(scope="module")
def stream() -> pa.LargeBinaryArray:
    return pa.concat_arrays([batch.value for batch in Simulation(2000, seed=4).batches()])


def trained(directory: Path, stream: pa.LargeBinaryArray, **sections: Any) -> Any:
    built = trainer(directory, Partitions(split(stream, 2)), **{**WIDE, **sections})
    finish(built)
    return built


def impressions(stream: pa.LargeBinaryArray) -> Mapping[str, pa.Array]:
    return Decoder(Simulation(1, seed=0).fields).decode(stream)[0].impressions.features


def test_only_the_cross_product_tells_an_exclusive_or():
    a, b = np.random.default_rng(1).integers(0, 2, (2, 2048))
    label = (a ^ b).astype(np.uint8)
    columns = {"a": pa.array(a).cast(pa.string()), "b": pa.array(b).cast(pa.string())}
    auc = {}
    for crosses in ((), (("a", "b"),)):
        hasher = Hasher(
            [Field("a", "categorical"), Field("b", "categorical")], table_bits=10, crosses=crosses
        )
        # Without hidden layers the network is linear in the embeddings, and no sum over two fields is an exclusive or.
        linear = make_learner(
            LearnerSpec(
                model="lr_dnn",
                fields=2,
                crosses=len(crosses),
                hidden=(),
                table_bits=10,
                batch_size=256,
            ),
            device="cpu",
            threads=1,
        )
        ids, _ = hasher.rows(columns)
        for start in range(0, len(label), 256):
            linear.learn(ids[start : start + 256], label[start : start + 256])
        auc[len(crosses)] = roc_auc_score(label, linear.predict(ids))
    assert auc[1] == 1.0
    assert (
        auc[0] < 0.8
    )  # of four points a sum can put three in order: 0.75, and a little for their counts


@pytest.mark.slow
def test_a_run_with_crosses_stopped_and_resumed_equals_one_that_went_through(tmp_path, stream):
    trained(tmp_path / "whole", stream)
    for seed in range(3):
        source = Partitions(split(stream, 2), seed=seed, stop_after=700 if seed < 2 else None)
        resumed = trainer(tmp_path / "parts", source, **WIDE)
        if newest := snapshot.newest(tmp_path / "parts" / "snapshots"):
            resumed.restore(newest)
        finish(resumed)
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")


def test_a_server_scores_with_the_crosses_that_the_snapshot_names(tmp_path, stream):
    built = trained(tmp_path, stream)
    scorer = Scorer(snapshot.newest(tmp_path / "snapshots"))
    assert scorer.manifest.schema.crosses == (
        ("age", "category"),
        ("user_id", "app_id"),
        ("rating", "hour", "os"),
    )
    columns = impressions(stream)
    ids, values = built.ingest.hasher.rows(columns)
    logits = built.state.guard.learner.predict(ids, values)
    assert scorer.learner.predict(*scorer.hasher.rows(columns)).tolist() == logits.tolist()
    assert scorer.predict_columns(columns) == pytest.approx(
        1 / (1 + np.exp(-logits.astype(float))), rel=1e-12
    )
    shuffled = ids.copy()
    shuffled[:, 14:] = ids[::-1, 14:]
    assert not np.array_equal(
        built.state.guard.learner.predict(shuffled), logits
    )  # it does read them

    hashed = {
        name: [b"\xff" if x is None else x.encode() for x in columns[name].to_pylist()]
        for name in ("user_id", "app_id")
    }
    own = [
        published_cross([("user_id", user), ("app_id", app)], bits=14)
        for user, app in zip(*hashed.values(), strict=True)
    ]
    assert ids[:, 15].tolist() == own
    assert ids[:, 0].tolist() == [
        published_id("user_id", user, bits=14) for user in hashed["user_id"]
    ]


@pytest.mark.slow
def test_whoever_reads_no_crosses_learns_the_same_with_them_bit_for_bit(tmp_path, stream):
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
    for stem in states["deepfm0"].keys() - {"joiner", "examples"}:  # these hold the ids
        for name, tensor in states["deepfm0"][stem].items():
            assert np.array_equal(tensor, states["deepfm3"][stem][name]), f"{stem} {name}"
    for stem in states["lr_dnn0"].keys() - {
        "joiner",
        "examples",
        "metrics",
        "model",
        "optimizer",
    }:  # FTRL and River, beside who does read them
        for name, tensor in states["lr_dnn0"][stem].items():
            assert np.array_equal(tensor, states["lr_dnn3"][stem][name]), f"{stem} {name}"
    assert not np.array_equal(
        states["lr_dnn0"]["model"]["table"], states["lr_dnn3"]["model"]["table"]
    )


def test_crosses_given_on_the_command_line_are_kept_and_wrong_ones_end_the_run(tmp_path):
    log = tmp_path / "sim.jsonl"
    quick = [
        "-X",
        "baseline.enabled=false",
        "-X",
        "model.hidden=8",
        "-X",
        "model.table_bits=12",
        "-X",
        "model.name=lr_dnn",
    ]

    def command(*arguments: str | Path) -> Any:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    assert command("simulate", "--impressions", "400", "--out", log).exit_code == 0
    wrong = command(
        "run",
        "--source",
        log,
        "--state",
        tmp_path / "wrong",
        *quick,
        "-X",
        "features.crosses=age*categry",
    )
    assert wrong.exit_code == ConfigError.exit_code
    assert (
        "features.crosses: 'age*categry' has 'categry', which is no field; did you mean 'category'?"
        in wrong.output
    )
    state = tmp_path / "state"
    assert (
        command(
            "run",
            "--source",
            log,
            "--state",
            state,
            *quick,
            "-X",
            "features.crosses=age*category,user_id*app_id",
        ).exit_code
        == 0
    )
    manifest = snapshot.verify(snapshot.newest(state / "snapshots"))
    crosses = [["age", "category"], ["user_id", "app_id"]]
    assert manifest.config["features"]["crosses"] == crosses
    assert [list(names) for names in manifest.schema.crosses] == crosses
    assert (
        command("run", "--source", log, "--state", state).exit_code == 0
    )  # goes on with what is kept
    other = command("run", "--source", log, "--state", state, "-X", "features.crosses=age*category")
    assert other.exit_code == ConfigError.exit_code
    assert "was made with crosses" in other.output


@pytest.mark.parametrize(
    ("schema", "learner", "message"),
    [
        ([["f0", "f1"]] * 2, 2, "listed twice"),
        ([["f0", "f1"]], 0, "do not agree"),
        ([["f0", "nothing"]], 1, "which is no field"),
        (list(itertools.combinations([f"f{i}" for i in range(24)], 2))[:257], 257, "<= 25[67]"),
        ([["f0"]], 1, "Expected `array` of length >= 2"),
        ("f0*f1", 1, "Expected `array`, got `str`"),
        ([["f0", 1]], 1, "Expected `str`, got `int`"),
    ],
)
def test_a_manifest_whose_crosses_no_configuration_could_have_is_refused(
    tmp_path, schema, learner, message
):
    fields = tuple(Field(f"f{i}", "categorical") for i in range(24))
    spec = LearnerSpec(
        model="lr_dnn",
        fields=24,
        crosses=1,
        embedding_dim=4,
        hidden=(4,),
        table_bits=8,
        batch_size=8,
    )
    path = snapshot.write(
        tmp_path,
        tensors={"model": make_learner(spec, device="cpu").weights()},
        manifest=manifest(
            schema=Schema(fields=fields, table_bits=8, crosses=(("f0", "f1"),)),
            learner=spec,
            beside={},
        ),
    )
    assert Scorer(path).predict([{"f0": "1", "f1": "a"}]).shape == (1,)

    def change(document: Any) -> None:
        document["schema"]["crosses"] = schema
        document["learner"]["crosses"] = learner

    edit_manifest(path, change)
    with pytest.raises(SnapshotError, match=f"is damaged: .*{message}"):
        Scorer(path)
