"""The loop: the same examples however polls fell, exact resume, bad input kept apart."""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from support.manifests import edit_manifest
from support.reliability import Outcome
from support.trainers import (
    RIVER,
    SIMULATED_FIELDS,
    SMALL,
    Partitions,
    Sections,
    assert_equal_states,
    final_state,
    finish,
    split,
    trainer,
)

from stream_ctr import Scorer, Subscriber
from stream_ctr.cli.main import main
from stream_ctr.connectors import Records
from stream_ctr.errors import ConfigError, DataError, SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.evaluate.gate import Verdict
from stream_ctr.events import features
from stream_ctr.events.arrow_events import pack
from stream_ctr.events.batch import Arrivals, EventBatch, Rejected
from stream_ctr.events.field import Field
from stream_ctr.learn import baseline
from stream_ctr.logs.simulate import Simulation
from stream_ctr.models import MODELS
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.lease import Lease, TakenOver
from stream_ctr.snapshots.pointer import pointer_for, read_pointer, write_pointer
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.train.alarms import FieldWatch
from stream_ctr.train.trainer import Surroundings, Trainer


def test_everything_that_is_reported_is_handed_on_as_it_was_written(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    written: list[dict[str, Any]] = []
    beats: list[int] = []
    around = Surroundings(written=written.append, beat=lambda: beats.append(len(written)))
    finish(trainer(tmp_path, Partitions([stream]), surroundings=around))
    lines = (tmp_path / "reports.jsonl").read_text().splitlines()
    assert written == [json.loads(line) for line in lines]
    assert {report["kind"] for report in written} == {"window", "final"}
    assert len(beats) > written[-1]["examples"] / SMALL["learn"]["batch_size"] / 2


def test_a_report_names_the_published_snapshot_and_the_memory_of_the_join(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    report = finish(trainer(tmp_path, Partitions([stream])))
    pointer = read_pointer(tmp_path / "latest.json")
    assert pointer
    moment = datetime.fromisoformat(report["published"].pop("event_time"))
    assert moment == datetime.fromtimestamp(pointer.event_time_ms / 1000, UTC)
    moment = datetime.fromisoformat(report["published"].pop("written"))
    assert moment == datetime.fromtimestamp(pointer.created_ms / 1000, UTC)
    assert report["published"] == {"snapshot": pointer.snapshot}
    assert report["pending_bytes"] > 0


def test_the_model_does_not_depend_on_how_polls_fell(tmp_path, stream):
    reports = []
    for seed in (1, 2):
        source = Partitions(split(stream, 3), seed=seed)
        reports.append(finish(trainer(tmp_path / str(seed), source, **RIVER)))
    assert reports[0]["ledger"] == reports[1]["ledger"]
    assert reports[0]["models"] == reports[1]["models"]
    assert_equal_states(tmp_path / "1", tmp_path / "2")


SEVERAL: dict[str, Any] = {
    **SMALL["model"],
    "name": "deepfm",
    "beside": ("fnn", "lr", "fm_dnn"),
    "pretrain_examples": 2500,
    "dropout": 0.1,
}


@pytest.mark.parametrize(
    ("partitions", "model"),
    [pytest.param(3, SMALL["model"], marks=pytest.mark.long), (2, SEVERAL)],
)
@pytest.mark.slow
def test_a_run_stopped_and_resumed_equals_one_that_went_through_bit_for_bit(
    tmp_path, stream, partitions, model
):
    whole = finish(
        trainer(tmp_path / "whole", Partitions(split(stream, partitions)), model=model, **RIVER)
    )
    parts = tmp_path / "parts"
    for seed in range(4):
        source = Partitions(
            split(stream, partitions), seed=seed, stop_after=1500 if seed < 3 else None
        )
        resumed = trainer(
            parts, source, model=model, learn={**SMALL["learn"], "threads": 1 + seed % 3}, **RIVER
        )
        newest = snapshot.newest(parts / "snapshots")
        if newest:
            resumed.restore(newest)
        last = finish(resumed)
        assert last["kind"] == ("stopped" if seed < 3 else "final")
        assert source.committed == source.positions()
    assert last["ledger"] == whole["ledger"]
    assert last["models"] == whole["models"]
    assert last["examples"] == 6000
    assert_equal_states(tmp_path / "whole", parts)


def test_the_last_report_says_what_happened_to_every_event(tmp_path, stream):
    report = finish(trainer(tmp_path, Partitions([stream]), **RIVER))
    assert json.loads((tmp_path / "reports.jsonl").read_text().splitlines()[-1]) == report
    counters = report["counters"]
    assert report["kind"] == "final"
    assert report["examples"] == counters["impressions"] == 6000
    assert counters["clicks"] == len(stream) - 6000
    assert counters["clicks"] == sum(
        counters[f"clicks_{fate}"] for fate in ("joined", "duplicate", "late", "unmatched")
    )
    assert (
        report["clicks_late"] == counters["clicks_late"] > 0
    )  # the window is a minute, the delays are longer
    joined = report["models"]["deepfm"]["ctr"] * 6000
    assert joined == pytest.approx(counters["clicks_joined"])
    assert report["click_coverage"] == pytest.approx(
        counters["clicks_joined"] / counters["clicks"], abs=1e-3
    )
    assert report["models"].keys() == {"deepfm", "ftrl", "river_ftrl"}
    assert report["paired"] == {"models": ["deepfm", "river_ftrl"], **report["pairs"]["river_ftrl"]}
    assert report["pairs"]["ftrl"]["count"] == 6000
    for model in report["models"]:
        assert report["models"][model]["count"] == 6000
        assert report["last_half"][model]["count"] == report["last_half"]["deepfm"]["count"]
    assert report["best_possible_logloss"] < report["constant_logloss"]
    assert [point["lost_share"] for point in report["window_curve"]] == sorted(
        [p["lost_share"] for p in report["window_curve"]], reverse=True
    )
    windows = [
        line
        for line in map(json.loads, (tmp_path / "reports.jsonl").read_text().splitlines())
        if line["kind"] == "window"
    ]
    assert sum(w["models"]["deepfm"]["count"] for w in windows) <= 6000
    assert all(w["provisional"] is False for w in windows)


@pytest.mark.slow
def test_the_baseline_learns_a_deterministic_share_and_is_compared_on_it(tmp_path, stream):
    share = {"baseline": {"enabled": True, "sample_rate": 0.25}}
    a = finish(trainer(tmp_path / "a", Partitions([stream], seed=1), **share))
    b = finish(trainer(tmp_path / "b", Partitions([stream], seed=2), **share))
    count = a["models"]["river_ftrl"]["count"]
    assert count == pytest.approx(1500, rel=0.1)
    assert a["paired"] == b["paired"]
    assert a["paired"]["count"] == count
    assert a["models"]["deepfm"]["count"] == 6000
    assert "intercept" in a["baseline"]["note"]


def test_ftrl_learns_every_example_in_order_however_batches_are_cut(tmp_path, stream):
    reports = []
    for size in (128, 500):
        sections = {
            "learn": {**SMALL["learn"], "batch_size": size},
            "baseline": {"enabled": False},
            "ftrl": {"l1": 0.5},
        }
        reports.append(
            finish(trainer(tmp_path / str(size), Partitions([stream], seed=size), **sections))
        )
    one, other = (report["models"]["ftrl"] for report in reports)
    assert one["count"] == 6000
    assert one == pytest.approx(other, rel=1e-12)
    assert reports[0]["models"]["deepfm"]["logloss"] != reports[1]["models"]["deepfm"]["logloss"]
    assert reports[0]["paired"]["models"] == ["deepfm", "ftrl"]
    states = [final_state(tmp_path / name)["ftrl.model"] for name in ("128", "500")]
    for name, array in states[0].items():
        assert np.array_equal(array, states[1][name]), name


# -- several models on the same examples ---------------------------------------------------------

ALONE: Sections = {"baseline": {"enabled": False}, "ftrl": {"enabled": False}}


def model(name: str, *beside: str, **options: Any) -> dict[str, Any]:
    return {"model": {**SMALL["model"], "name": name, "beside": beside, **options}}


def weights(directory: Path, beside: str | None = None) -> dict[str, np.ndarray]:
    return final_state(directory)[snapshot.stems(beside)[0]]


def assert_same_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def fm_alone(stream: pa.LargeBinaryArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "fm"
    finish(trainer(directory, Partitions([stream]), **ALONE, **model("fm")))
    return directory


def test_beside_others_a_model_learns_what_it_learns_alone(tmp_path, stream, fm_alone):
    together = finish(
        trainer(tmp_path / "many", Partitions([stream]), **ALONE, **model("deepfm", "fm", "lr"))
    )
    assert list(together["models"]) == ["deepfm", "fm", "lr"]
    assert_same_weights(weights(tmp_path / "many", "fm"), weights(fm_alone))
    for name in ("deepfm", "lr"):
        alone = finish(trainer(tmp_path / name, Partitions([stream]), **ALONE, **model(name)))
        assert alone["models"][name] == together["models"][name]
        assert_same_weights(
            weights(tmp_path / name), weights(tmp_path / "many", None if name == "deepfm" else name)
        )


@pytest.mark.slow
def test_the_first_model_is_compared_with_each_other_one_in_the_order_in_which_they_were_named(
    tmp_path, stream
):
    report = finish(
        trainer(tmp_path, Partitions([stream]), **RIVER, **model("fm", "deepfm", "ipnn"))
    )
    assert list(report["models"]) == ["fm", "deepfm", "ipnn", "ftrl", "river_ftrl"]
    assert list(report["pairs"]) == ["deepfm", "ipnn", "ftrl", "river_ftrl"]
    for name, paired in report["pairs"].items():
        assert paired["count"] == 6000
        difference = report["models"]["fm"]["logloss"] - report["models"][name]["logloss"]
        assert paired["logloss_difference"] == pytest.approx(difference, abs=1e-12)
    stages = report["profile"]["trainer"]
    assert {"learn", "learn.deepfm", "learn.ipnn", "learn.ftrl"} <= stages.keys()


def test_lr_has_the_rates_of_ftrl_which_then_does_not_learn_twice(tmp_path, stream):
    rates = {"ftrl": {"alpha": 0.3, "l1": 0.2}, "baseline": {"enabled": False}}
    named = finish(trainer(tmp_path / "lr", Partitions([stream]), **rates, **model("lr", "fm")))
    beside = finish(trainer(tmp_path / "ftrl", Partitions([stream]), **rates, **model("fm")))
    assert list(named["models"]) == ["lr", "fm"]
    assert named["models"]["lr"] == beside["models"]["ftrl"]
    assert_same_weights(weights(tmp_path / "lr"), weights(tmp_path / "ftrl", "ftrl"))


@pytest.mark.parametrize(("name", "beside"), [("fm", None), ("deepfm", "lr"), ("lr", "fm")])
@pytest.mark.slow
def test_every_model_of_a_snapshot_scores_as_it_stood(tmp_path, stream, name, beside):
    built = trainer(
        tmp_path,
        Partitions([stream]),
        ftrl={"alpha": 0.3},
        **RIVER,
        **model(name, *([beside] if beside else [])),
    )
    finish(built)
    path = snapshot.newest(tmp_path / "snapshots")
    rows = [
        json.loads(value)["features"]
        for value in stream.to_pylist()
        if b"impression_id" in value and b"features" in value
    ][:50]
    for of, learner in built.state.learners.items():
        scorer = Scorer(path, model=of)
        expected = learner.predict(*scorer.hasher.rows(_columns(scorer.fields, rows))).astype(
            np.float64
        )
        assert np.allclose(scorer.predict(rows), metrics.probabilities(expected), rtol=0, atol=1e-6)
    assert np.array_equal(Scorer(path).predict(rows), Scorer(path, model=name).predict(rows))
    with pytest.raises(SnapshotError, match=f"no model 'opnn'; it has {name}"):
        Scorer(path, model="opnn")


def _columns(fields: Sequence[Field], rows: Sequence[dict[str, Any]]) -> dict[str, pa.Array]:
    kinds = {"categorical": pa.string(), "numeric": pa.float64()}
    return {
        field.name: pa.array([row.get(field.name) for row in rows], kinds[field.kind])
        for field in fields
    }


def spoil(built: Trainer, name: str, *, after: int, forever: bool = False) -> None:
    """Fill a model's table with NaN before step `after`, or before every step from there on."""
    learner: Any = built.state.learners[name]
    learn, calls = learner.learn, []

    def spoiled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == after or (forever and len(calls) > after):
            learner.table.rows.fill_(float("nan"))
        return learn(*arguments, **options)

    learner.learn = spoiled


FREQUENT = {"schedule": {"snapshot_examples": 1000}, "snapshots": {"keep": 50}}


def test_a_additional_model_that_diverges_goes_back_by_itself_and_no_other_one_notices(
    tmp_path, stream, fm_alone, caplog
):
    built = trainer(
        tmp_path, Partitions([stream]), **ALONE, **FREQUENT, **model("fm", "deepfm", "lr")
    )
    spoil(built, "deepfm", after=33)  # the fourth snapshot has 32 of its batches
    report = finish(built)
    counters = report["counters"]
    assert (
        counters["batches_skipped.deepfm"],
        counters["examples_skipped.deepfm"],
        counters["rollbacks.deepfm"],
    ) == (8, 8 * 128, 1)
    assert not {"batches_skipped", "rollbacks", "batches_skipped.lr"} & counters.keys()
    assert "the additional model deepfm goes back to snapshot 00000004" in caplog.text
    assert report["left_out"] == {}
    assert {name: score["count"] for name, score in report["models"].items()} == {
        "fm": 6000,
        "deepfm": 6000 - 8 * 128,
        "lr": 6000,
    }
    assert report["pairs"]["deepfm"]["count"] == 6000 - 8 * 128
    assert_same_weights(weights(tmp_path), weights(fm_alone))
    assert all(np.isfinite(array).all() for array in weights(tmp_path, "deepfm").values())


@pytest.mark.parametrize("frequent", [{}, FREQUENT], ids=["no snapshot yet", "snapshots"])
def test_a_additional_model_that_nothing_helps_is_left_out_and_stays_so_when_the_run_is_resumed(
    tmp_path, stream, fm_alone, frequent, caplog
):
    stopping = Partitions([stream], stop_after=len(stream) - 500)
    built = trainer(tmp_path, stopping, **ALONE, **frequent, **model("fm", "deepfm", "lr"))
    spoil(built, "deepfm", after=2, forever=True)
    assert finish(built)["counters"]["left_out.deepfm"] == 1
    resumed = trainer(
        tmp_path, Partitions([stream]), **ALONE, **frequent, **model("fm", "deepfm", "lr")
    )
    resumed.restore(snapshot.newest(tmp_path / "snapshots"))
    report = finish(resumed)
    assert report["examples"] == 6000
    assert report["counters"]["left_out.deepfm"] == 1
    assert list(report["left_out"]) == ["deepfm"]
    assert report["models"]["deepfm"]["count"] == report["pairs"]["deepfm"]["count"] == 128
    assert report["models"]["lr"]["count"] == 6000
    assert "the run goes on without it" in caplog.text
    assert_same_weights(weights(tmp_path), weights(fm_alone))
    assert "deepfm.model" not in final_state(tmp_path)
    with pytest.raises(SnapshotError, match="without the model 'deepfm', which had diverged"):
        Scorer(snapshot.newest(tmp_path / "snapshots"), model="deepfm")
    assert Subscriber(tmp_path, model="deepfm").next(0.0) is None
    assert "without the model 'deepfm', which had diverged" in caplog.text


def spoil_the_third_snapshot(built: Trainer, of: str) -> None:
    """Make a weight infinite in it, of a row that the last batch lacks."""
    begin = built.snapshots._writer.begin

    def begun(cut: Any) -> None:
        if cut.manifest.sequence == 3:
            cut.tensors[f"{of}.model"]["table"][7, 0] = np.inf
        begin(cut)

    built.snapshots._writer.begin = begun  # type: ignore[method-assign]


def test_a_snapshot_omits_an_additional_model_whose_weights_are_not_finite(
    tmp_path, stream, fm_alone
):
    built = trainer(
        tmp_path / "state", Partitions([stream]), **ALONE, **FREQUENT, **model("fm", "deepfm")
    )
    spoil_the_third_snapshot(built, "deepfm")
    report = finish(built)
    assert (report["counters"]["rollbacks.deepfm"], report["models"]["fm"]["count"]) == (1, 6000)
    assert_same_weights(weights(tmp_path / "state"), weights(fm_alone))
    folder = tmp_path / "state" / "snapshots"
    second, third, fourth = (folder / name for name in snapshot.snapshot_ids(folder)[1:4])
    assert [(path / "deepfm.model.safetensors").exists() for path in (second, third, fourth)] == [
        True,
        False,
        True,
    ]
    resumed = trainer(
        tmp_path / "state", Partitions([stream]), **ALONE, **FREQUENT, **model("fm", "deepfm")
    )  # the second is kept
    resumed.restore(third)
    assert resumed.state.counters["rollbacks.deepfm"] == 1
    assert_same_weights(
        dict(resumed.state.learners["deepfm"].weights()), snapshot.load(second)[1]["deepfm.model"]
    )


def test_what_a_additional_model_goes_back_to_is_there_though_only_one_snapshot_is_kept(
    tmp_path, stream
):
    frequent = {**FREQUENT, "snapshots": {"keep": 1}}
    built = trainer(tmp_path, Partitions([stream]), **ALONE, **frequent, **model("fm", "deepfm"))
    spoil_the_third_snapshot(built, "deepfm")
    built.snapshots._writer.after = lambda work: work()  # what is too old goes at once
    report = finish(built)
    assert (report["counters"]["rollbacks.deepfm"], report["left_out"]) == (1, {})


@pytest.mark.parametrize("parent", ["../other/snapshots/00000001-x", None])
def test_an_additional_model_follows_parents_within_its_run_only(tmp_path, stream, parent):
    built = trainer(
        tmp_path, Partitions([stream.slice(0, 3000)]), **ALONE, **FREQUENT, **model("fm", "deepfm")
    )
    finish(built)
    newest = snapshot.newest(tmp_path / "snapshots")
    before = snapshot.snapshot_ids(tmp_path / "snapshots")[-2]
    assert snapshot.read_manifest(newest).parent == before
    assert built.snapshots.last_good("deepfm") == newest
    (newest / "deepfm.model.safetensors").unlink()
    edit_manifest(newest, lambda manifest: manifest["files"].pop("deepfm.model.safetensors"))
    assert built.snapshots.last_good("deepfm") == newest.parent / before
    edit_manifest(newest, lambda manifest: manifest.update(parent=parent))
    assert built.snapshots.last_good("deepfm") is None


def test_a_additional_model_goes_back_to_no_snapshot_that_the_key_did_not_sign(tmp_path, stream):
    key = tmp_path / "key.pem"
    key.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
    )
    signed = {"snapshots": {"signing_key": str(key)}}
    built = trainer(
        tmp_path / "state",
        Partitions([stream.slice(0, 1000)]),
        **ALONE,
        **signed,
        **model("fm", "deepfm"),
    )
    finish(built)
    newest = snapshot.newest(tmp_path / "state" / "snapshots")
    assert built.snapshots.last_good("deepfm") == newest
    edit_manifest(newest, lambda manifest: manifest.update(parent="x"))
    with pytest.raises(SnapshotError, match="sign"):
        built.snapshots.last_good("deepfm")


def test_an_example_that_an_additional_model_cannot_learn_is_skipped_by_it_alone(
    tmp_path, stream, monkeypatch
):
    monkeypatch.setattr(features, "LARGEST_UNSCALED_MULTIPLIER", np.inf)
    documents = [json.loads(value) for value in stream.to_pylist()]
    numeric = next(field.name for field in Simulation(1, seed=0).fields if field.kind == "numeric")
    huge = 0
    for number, event in enumerate(documents):
        if number % 500 == 250 and event["kind"] == "impression":
            event["features"][numeric] = 1e38
            huge += 1
    values = pa.array([json.dumps(event).encode() for event in documents], pa.large_binary())
    report = finish(
        trainer(
            tmp_path,
            Partitions([values]),
            features={"numeric_encoding": "value"},
            **ALONE,
            **model("lr", "fm"),
        )
    )
    assert huge > 5
    assert report["counters"]["examples_skipped.fm"] == huge
    assert (
        report["examples"],
        report["models"]["fm"]["count"],
        report["pairs"]["fm"]["count"],
    ) == (6000, 6000 - huge, 6000 - huge)


@pytest.mark.slow
def test_fnn_is_not_published_after_its_pre_training_until_there_is_a_verdict(
    tmp_path, stream, caplog
):
    lenient = {"keep": 50, "gate_clicks": 100, "gate_logloss": 100, "gate_calibration": 100}
    sections = {"schedule": {"snapshot_examples": 1024}, "snapshots": lenient}
    report = finish(
        trainer(
            tmp_path,
            Partitions([stream]),
            **RIVER,
            **sections,
            **model("fnn", pretrain_examples=2000),
        )
    )
    assert report["examples"] == 6000
    manifests = [
        snapshot.read_manifest(tmp_path / "snapshots" / name)
        for name in snapshot.snapshot_ids(tmp_path / "snapshots")
    ]
    waiting = [
        manifest.examples
        for manifest in manifests
        if "no verdict yet" in str(manifest.gate.refused)
    ]
    assert waiting == [2048, 3072]
    # The network has learned too little to be better than a constant, and that is the verdict.
    assert all(manifest.gate.evidence for manifest in manifests[3:])
    assert all("running constant" in manifest.gate.refused[0] for manifest in manifests[3:])
    assert (
        "is not published: its pre-training has ended, and there is no verdict yet on the network "
        "that took over" in caplog.text
    )
    assert (
        "its last step ended its pre-training, the network that took over has learned nothing "
        "yet: it took the logloss" in caplog.text
    )
    assert read_pointer(tmp_path / "latest.json").examples == 1024


@pytest.mark.slow
def test_fnn_that_diverges_as_a_network_before_it_was_published_is_an_fm_again(tmp_path, stream):
    gate = {"keep": 50, "gate_clicks": 100, "gate_logloss": 100, "gate_calibration": 100}
    sections = {
        "schedule": {"snapshot_examples": 1024},
        "snapshots": gate,
        "learn": {**SMALL["learn"], "skips_before_rollback": 2},
    }
    built = trainer(
        tmp_path, Partitions([stream]), **RIVER, **sections, **model("fnn", pretrain_examples=2000)
    )
    spoil(built, "fnn", after=18)  # the network has learned one batch
    report = finish(built)
    assert (report["counters"]["rollbacks"], report["examples"]) == (1, 6000 - 2 * 128)
    folder = tmp_path / "snapshots"
    manifests = [snapshot.read_manifest(folder / name) for name in snapshot.snapshot_ids(folder)]
    refused = {manifest.examples: list(manifest.gate.refused) for manifest in manifests}
    assert refused[2048] == [
        "its pre-training has ended, and there is no verdict yet on the network that took over"
    ]
    assert refused[3072] == []  # seven more batches as the FM, of too few clicks for a verdict
    assert refused[4096] == refused[2048]
    assert manifests[2].gate.evidence == manifests[0].gate.evidence


def test_what_an_earlier_run_published_does_not_count_as_published_by_this_one(tmp_path, stream):
    finish(trainer(tmp_path, Partitions([stream], stop_after=3000)))
    assert read_pointer(tmp_path / "latest.json").examples > 0

    class Refuses(Partitions):
        def poll(self, timeout_seconds: float) -> Records:
            if self.trainer and self._at[0] > 4500:
                self.trainer.state.scoreboard.judge.begin_anew("it is another model")
            return super().poll(timeout_seconds)

    built = trainer(tmp_path, Refuses([stream]), schedule={"snapshot_examples": 100_000})
    built.restore(snapshot.newest(tmp_path / "snapshots"))
    assert finish(built)["withheld"] == ["it is another model"]
    again = tmp_path / "again"
    built = trainer(again, Refuses([stream]), schedule={"snapshot_examples": 1000})
    report = finish(built)
    assert (report["refused"], report["withheld"]) == (["it is another model"], [])


def test_a_run_that_publishes_at_last_has_published(tmp_path, stream):
    class Hesitates(Partitions):
        def poll(self, timeout_seconds: float) -> Records:
            if self.trainer:
                judge = self.trainer.state.scoreboard.judge
                if self._at[0] < 3000:
                    judge.begin_anew("it is another model")
                else:
                    judge.go_back(Verdict())
            return super().poll(timeout_seconds)

    built = trainer(tmp_path, Hesitates([stream]), schedule={"snapshot_examples": 1000})
    report = finish(built)
    assert report["counters"]["publications_refused"] > 0
    assert report["withheld"] == []


def test_a_run_without_an_example_publishes_nothing_and_says_so(tmp_path, stream):
    report = finish(trainer(tmp_path, Partitions([stream.slice(0, 0)])))
    assert (report["examples"], report["withheld"]) == (0, ["it has learned no example"])


@pytest.mark.parametrize("name", MODELS)
def test_every_system_is_served_with_the_default_network(tmp_path, stream, name):
    own = {"name": name, "table_bits": 4, "embedding_dim": 4}
    built = trainer(tmp_path, Partitions([stream.slice(0, 300)]), **ALONE, model=own)
    finish(built)
    scorer = Scorer(snapshot.newest(tmp_path / "snapshots"))
    rows = [{"app_id": "a1"}, {"app_id": "a2", "hour": "20"}]
    expected = (
        built.state.learners[name]
        .predict(*scorer.hasher.rows(_columns(scorer.fields, rows)))
        .astype(np.float64)
    )
    # Few rows are predicted by another routine than a batch of training.
    assert scorer.predict(rows) == pytest.approx(metrics.probabilities(expected), abs=1e-6)


@pytest.mark.parametrize(
    "other",
    [model("deepfm", "lr"), model("deepfm", "lr", "fm"), model("fm", "deepfm"), model("deepfm")],
)
def test_a_snapshot_of_other_models_is_refused_by_their_names(tmp_path, stream, other):
    finish(trainer(tmp_path, Partitions([stream.slice(0, 500)]), **ALONE, **model("deepfm", "fm")))
    with pytest.raises(
        ConfigError, match=r"made with the models deepfm, fm, not with .*another --state"
    ):
        trainer(tmp_path, Partitions([stream]), **ALONE, **other).restore(
            snapshot.newest(tmp_path / "snapshots")
        )


def test_models_that_are_not_wanted_are_in_no_report_and_no_snapshot(tmp_path, stream):
    alone = {"baseline": {"enabled": False}, "ftrl": {"enabled": False}}
    report = finish(trainer(tmp_path, Partitions([stream]), **alone))
    assert report["models"].keys() == {"deepfm"}
    assert (report["paired"]["models"], report["pairs"]) == (["deepfm"], {})
    assert not {"ftrl.model", "baseline"} & final_state(tmp_path).keys()
    with pytest.raises(ConfigError, match="with the models deepfm, not with deepfm, ftrl"):
        trainer(tmp_path, Partitions([stream]), baseline={"enabled": False}).restore(
            snapshot.newest(tmp_path / "snapshots")
        )


@pytest.mark.parametrize("window", ["10s", "1h"])
def test_a_run_resumed_with_another_metric_window_dates_its_windows_by_event_time(
    tmp_path, stream, window
):
    stopped = trainer(tmp_path, Partitions([stream], stop_after=3000))
    finish(stopped)
    resumed = trainer(tmp_path, Partitions([stream]), metrics={"window": window})
    resumed.restore(snapshot.newest(tmp_path / "snapshots"))
    final = finish(resumed)
    reports = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    times = [
        report[name]
        for report in reports
        if report["kind"] == "window"
        for name in ("start", "end")
    ]
    first, last = (json.loads(value.as_py())["time"] for value in (stream[0], stream[-1]))
    dates = [
        datetime.fromtimestamp((time + moved) / 1000, UTC).isoformat()
        for time, moved in ((first, -6 * 3_600_000), (last, 3_600_000))
    ]
    assert times
    assert dates[0] < min(times) < max(times) < dates[1]
    assert dates[0] < final["rolling"]["start"] < final["rolling"]["end"] < dates[1]


def test_bad_records_are_counted_kept_and_not_trained(tmp_path, stream):
    junk = pa.array(
        [b"junk", None, b'{"kind":"impression","impression_id":"x\x1b[31m","time":5}'],
        pa.large_binary(),
    )
    mixed = pa.concat_arrays([stream.slice(0, 50), junk, stream.slice(50)])
    clean = finish(trainer(tmp_path / "clean", Partitions([stream])))
    dirty = finish(trainer(tmp_path / "dirty", Partitions([mixed])))
    assert dirty["ledger"] == clean["ledger"]
    assert dirty["models"] == clean["models"]
    counters = dirty["counters"]
    assert (
        counters["rejected"],
        counters["rejected.not_json"],
        counters["rejected.tombstone"],
    ) == (2, 2, 1)
    letters = [
        json.loads(line)
        for line in (tmp_path / "dirty" / "dead_letters.jsonl").read_text().splitlines()
    ]
    assert [(letter["offset"], letter["reason"]) for letter in letters] == [
        ("50", "not_json"),
        ("52", "not_json"),
    ]


def test_a_flood_of_bad_records_stops_the_run_instead_of_training_on_the_rest(tmp_path, stream):
    flood = pa.concat_arrays(
        [stream.slice(0, 500), pa.array([b"junk"] * 5000, pa.large_binary()), stream.slice(500)]
    )
    with pytest.raises(DataError, match=r"records read are bad.*not_json"):
        finish(trainer(tmp_path, Partitions([flood])))


def test_a_flood_of_bad_records_is_one_beside_good_ones_of_many_events_too(tmp_path, stream):
    good = pack(stream.slice(0, 2000), events_a_record=100)
    flood = pa.concat_arrays([good, pa.array([b"\xff\xff\xff\xff"] * 1200, pa.large_binary())])
    with pytest.raises(DataError, match=r"records read are bad.*not_arrow"):
        finish(trainer(tmp_path, Partitions([flood])))


def test_bad_events_of_one_record_are_letters_that_name_them(tmp_path, stream):
    events = [json.loads(value) for value in stream.slice(0, 6).to_pylist()]
    for at in (1, 4):
        events[at]["time"] = 5
    packed = pack(
        pa.array([json.dumps(event).encode() for event in events], pa.large_binary()),
        events_a_record=6,
    )
    finish(
        trainer(
            tmp_path,
            Partitions(
                [
                    pa.concat_arrays(
                        [stream.slice(6, 3), packed, pa.array([b"junk"], pa.large_binary())]
                    )
                ]
            ),
        )
    )
    letters = [
        json.loads(line) for line in (tmp_path / "dead_letters.jsonl").read_text().splitlines()
    ]
    assert [(one["offset"], one.get("event")) for one in letters] == [
        ("3", "1"),
        ("3", "4"),
        ("4", None),
    ]
    shown = (
        CliRunner()
        .invoke(main, ["dlq", "show", "--state", str(tmp_path), "--event", "4"])
        .stdout.splitlines()
    )
    assert len(shown) == 2
    assert "offset 3  event 4  time_out_of_range" in shown[0]
    raw = CliRunner().invoke(
        main, ["dlq", "show", "--state", str(tmp_path), "--offset", "3", "--event", "1", "--raw"]
    )
    assert raw.stdout_bytes == base64.b64decode(letters[0]["value_base64"])


def test_a_snapshot_of_another_configuration_is_refused_by_name(tmp_path, stream):
    finish(trainer(tmp_path, Partitions([stream.slice(0, 500)])))
    other = trainer(tmp_path, Partitions([stream]), model={**SMALL["model"], "embedding_dim": 5})
    with pytest.raises(ConfigError, match=r"embedding_dim = 4, not 5"):
        other.restore(snapshot.newest(tmp_path / "snapshots"))


def test_a_run_may_go_on_with_another_precision_and_says_so(tmp_path, stream, caplog):
    several = {"model": {**SMALL["model"], "beside": ("fm",)}}
    finish(
        trainer(
            tmp_path,
            Partitions([stream.slice(0, 600)]),
            learn={**SMALL["learn"], "precision": "bf16"},
            **several,
        )
    )
    before = final_state(tmp_path)["model"]
    resumed = trainer(
        tmp_path, Partitions([stream]), learn={**SMALL["learn"], "precision": "fp32"}, **several
    )
    resumed.restore(snapshot.newest(tmp_path / "snapshots"))
    assert caplog.text.count("was made with precision bf16; from here on it is fp32") == 1
    after = resumed.state.learners["deepfm"].weights()
    assert all(np.array_equal(before[name], array) for name, array in after.items())
    assert finish(resumed)["examples"] == 6000
    assert snapshot.verify(snapshot.newest(tmp_path / "snapshots")).learner.precision == "fp32"


def test_snapshots_by_number_of_examples_name_their_parent_and_old_ones_go(tmp_path, stream):
    finish(
        trainer(
            tmp_path,
            Partitions([stream]),
            schedule={"snapshot_examples": 1000},
            snapshots={"keep": 2},
        )
    )
    names = snapshot.snapshot_ids(tmp_path / "snapshots")
    assert len(names) == 2
    manifest = snapshot.verify(tmp_path / "snapshots" / names[1])
    assert manifest.parent == names[0]
    assert manifest.positions == {"clicks:0": len(stream)}
    assert manifest.sequence >= 5
    pointer = read_pointer(tmp_path / "latest.json")
    assert pointer.snapshot == names[1]


class Flags:
    def __init__(self) -> None:
        self.raised = {"report", "snapshot"}

    def due(self, name: str) -> bool:
        due = name in self.raised
        self.raised.discard(name)
        return due


def test_flags_are_served_between_batches(tmp_path, stream):
    finish(trainer(tmp_path, Partitions([stream]), surroundings=Surroundings(flags=Flags())))
    kinds = [
        json.loads(line)["kind"] for line in (tmp_path / "reports.jsonl").read_text().splitlines()
    ]
    assert kinds.count("report") == 1
    assert len(snapshot.snapshot_ids(tmp_path / "snapshots")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("max_memory", "held"), [("1GB", False), ("4MiB", True)])
def test_a_partition_that_is_far_ahead_is_held_once_what_waits_has_filled_some_of_its_room(
    tmp_path, stream, max_memory, held
):
    class Uneven(Partitions):
        fullest, pauses = 0.0, 0

        def poll(self, timeout_seconds: float) -> Records:
            assert self.trainer
            self.fullest = max(self.fullest, self.trainer.state.joiner.filled)
            records = super().poll(timeout_seconds)
            late = (records.partition == 1).cumsum() > 5  # of partition 1, five records a poll
            kept = ~((records.partition == 1) & late)
            self._at[1] -= int((~kept).sum())
            return Records(
                records.partition[kept],
                records.offset[kept],
                records.time[kept],
                records.value.filter(pa.array(kept)),
            )

        def pause(self, partitions: frozenset[int]) -> None:
            self.pauses += bool(partitions)
            super().pause(partitions)

    source = Uneven(split(stream, 2))
    report = finish(
        trainer(tmp_path, source, join={"label_window": "1s", "max_memory": max_memory})
    )
    assert (
        report["examples"]
        == finish(
            trainer(tmp_path / "even", Partitions(split(stream, 2)), join={"label_window": "1s"})
        )["examples"]
    )
    assert (source.pauses > 0) == held
    assert (source.fullest < 0.3) or not held


def test_an_idle_partition_stops_holding_the_others_back(tmp_path, stream):
    class Live(Partitions):
        until_end = False
        finished = False
        now = 0.0

        def poll(self, timeout_seconds: float) -> Records:
            self.now += 1.0
            if self.now == 200:
                assert self.trainer
                self.trainer.stop()
            return super().poll(timeout_seconds)

    source = Live([stream.slice(0, 5000), pa.array([], pa.large_binary())])
    report = finish(
        trainer(
            tmp_path,
            source,
            surroundings=Surroundings(clock=lambda: source.now),
            join={"label_window": "60s", "idle_timeout": "10s"},
        )
    )
    assert report["examples"] > 3000  # though partition 1 never spoke
    assert report["pending"] > 0  # nothing says yet that their clicks will not come


def test_a_snapshot_that_cannot_be_written_does_not_stop_learning_but_the_last_one_must_succeed(
    tmp_path, stream
):
    built = trainer(tmp_path, Partitions([stream]), schedule={"snapshot_examples": 1000})
    (tmp_path / "snapshots").write_text("in the way")
    with pytest.raises(SnapshotError, match="cannot write snapshot"):
        finish(built)
    last = json.loads((tmp_path / "reports.jsonl").read_text().splitlines()[-1])
    assert last["examples"] == 6000
    assert last["snapshot"] is None
    assert last["counters"]["snapshots_failed"] >= 6


def test_a_model_that_diverges_stops_the_run_and_is_never_published(tmp_path, stream):
    wild = {
        "learn": {**SMALL["learn"], "table_learning_rate": 1e38},
        "schedule": {"snapshot_examples": 500},
    }
    with pytest.raises(DataError, match=r"the model diverged: 8 batches in a row"):
        finish(trainer(tmp_path, Partitions([stream]), **wild))
    for name in snapshot.snapshot_ids(tmp_path / "snapshots"):
        _, tensors = snapshot.load(tmp_path / "snapshots" / name)
        assert all(np.isfinite(array).all() for array in tensors["model"].values())


def test_a_model_that_has_learned_nothing_is_kept_but_not_published(tmp_path, stream):
    source = Partitions([stream.slice(0, 300)])
    built = trainer(tmp_path, source)
    built.stop()
    built._handle(built.ingest.take(0))
    assert finish(built)["examples"] == 0
    assert len(snapshot.snapshot_ids(tmp_path / "snapshots")) == 1
    assert not (tmp_path / "latest.json").exists()


def test_a_resumed_run_with_nothing_new_writes_no_further_snapshot(tmp_path, stream):
    finish(trainer(tmp_path, Partitions([stream])))
    again = trainer(tmp_path, Partitions([stream]))
    again.restore(snapshot.newest(tmp_path / "snapshots"))
    assert finish(again)["examples"] == 6000
    assert len(snapshot.snapshot_ids(tmp_path / "snapshots")) == 1


def test_a_resumed_run_expects_the_leader_epochs_that_its_snapshot_has(tmp_path, stream):
    class Led(Partitions):
        expected: Mapping[int, int] | None = None

        def leader_epochs(self) -> dict[int, int]:
            return {index: 7 + index for index, at in self.positions().items() if at and index}

        def expect_epochs(self, leader_epochs: Mapping[int, int]) -> None:
            assert self.positions()[1] > 0, "the positions are those of the snapshot by then"
            self.expected = leader_epochs

    finish(trainer(tmp_path, Led(split(stream, 2))))
    newest = snapshot.newest(tmp_path / "snapshots")
    assert snapshot.load(newest)[0].leader_epochs == {"clicks:1": 8}
    again = Led(split(stream, 2))
    resumed = trainer(tmp_path, again)
    resumed.restore(newest)
    assert again.expected == {1: 8}


def test_a_resumed_run_leaves_a_rollback_in_force(tmp_path, stream):
    """The run goes on from the newest snapshot, and subscribers keep the one that was chosen."""
    frequent = {"schedule": {"snapshot_examples": 2000}, "snapshots": {"keep": 9}}
    finish(trainer(tmp_path, Partitions([stream]), **frequent))
    root = tmp_path / "snapshots"
    names = snapshot.snapshot_ids(root)
    Publisher(tmp_path).roll_back(root / names[0], snapshot.verify(root / names[0]))
    trainer(tmp_path, Partitions([stream]), **frequent).restore(root / names[-1])
    assert read_pointer(tmp_path / "latest.json").snapshot == names[0]


def test_a_resumed_run_publishes_what_its_writer_did_not_live_to_publish(tmp_path, stream):
    frequent = {"schedule": {"snapshot_examples": 2000}, "snapshots": {"keep": 9}}
    finish(trainer(tmp_path, Partitions([stream]), **frequent))
    root = tmp_path / "snapshots"
    names = snapshot.snapshot_ids(root)
    epoch = snapshot.verify(root / names[-1]).epoch  # that of a run that held a lease throughout
    older = pointer_for(root / names[0], snapshot.verify(root / names[0]), epoch=epoch)
    write_pointer(tmp_path / "latest.json", older)
    trainer(tmp_path, Partitions([stream]), **frequent).restore(root / names[-1])
    assert read_pointer(tmp_path / "latest.json").snapshot == names[-1]


@pytest.fixture(scope="module")
def watched(stream: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """A stream whose impressions have a constant text, a constant number and a varying one."""
    events = [json.loads(value) for value in stream.to_pylist()]
    for number, event in enumerate(events):
        if event["kind"] == "impression":
            event["features"] |= {"publisher": "p", "version": 7.0, "shown": number % 90 + 10.0}
    return pa.array([json.dumps(event).encode() for event in events], pa.large_binary())


WATCHED = [
    *SIMULATED_FIELDS,
    Field("pubisher", "categorical"),
    Field("version", "numeric"),
    Field("shown", "numeric"),
]


@pytest.mark.parametrize("encoding", ["buckets", "value"])
@pytest.mark.parametrize("n", [6000, 200, 50])
def test_fields_that_teach_nothing_are_warned_of_with_their_nearest_spelling(
    tmp_path, watched, caplog, n, encoding
):
    features = {"numeric_encoding": encoding}
    with caplog.at_level("WARNING", "stream_ctr.train"):
        source = Partitions([watched.slice(0, n)])
        report = finish(trainer(tmp_path, source, fields=WATCHED, features=features))
    warnings = [text for text in caplog.messages if text.startswith("in the first ")]
    if n == 50:  # too few to tell
        assert warnings == []
        return
    missing, constant = warnings
    assert missing.endswith(
        "these fields were always missing: pubisher (the events have 'publisher', which is no "
        "field); are they spelled as in the events?"
    )
    assert constant.endswith("had one value each, which teaches nothing: hour, version")
    assert f"in the first {report['counters']['impressions']} impressions" in constant


def test_a_field_that_has_one_value_for_a_week_is_warned_of_while_the_run_goes_on(caplog):
    day = 86_400_000
    watch = FieldWatch(["hour", "weekday", "version"])

    def observe(first_day: int, hours: int) -> None:
        n = 24 * hours
        time = first_day * day + np.arange(n) * (day // 24)
        ids = np.stack([time // (day // 24) % 24, time // day % 7, np.full(n, 5)], axis=1)
        watch.observe(
            EventBatch(
                records=n,
                impressions=Arrivals.of([0] * n, time.tolist()),
                ids=ids.astype(np.int32),
                values=np.empty((n, 0), np.float32),
                true_probability=np.full(n, np.nan),
                clicks=Arrivals.of([], []),
                arrival=np.arange(n),
                rejected=Rejected(np.empty(0, np.int32), np.empty(0, np.int64), [], [], [], []),
                with_fields=frozenset({"hour", "weekday", "version"}),
                with_unknown_fields=0,
                bad_shares=None,
            ).field_sample()
        )

    for first_day in range(0, 9):
        observe(first_day, 1)
        assert len(caplog.messages) == (first_day == 8)
    assert caplog.messages[0].endswith("teaches nothing: version")
    watch.finish()
    assert len(caplog.messages) == 1


def test_a_field_with_one_value_is_compared_with_unknown_features_too(tmp_path, watched, caplog):
    fields = [*WATCHED[:-3], Field("publisher", "categorical"), Field("versions", "numeric")]
    events = [json.loads(value) for value in watched.to_pylist()]
    for number, event in enumerate(events):
        if event["kind"] == "impression":
            event["features"] |= {"publisher2": str(number), "versions": 1}
    values = pa.array([json.dumps(event).encode() for event in events], pa.large_binary())
    with caplog.at_level("WARNING", "stream_ctr.train"):
        finish(trainer(tmp_path, Partitions([values]), fields=fields))
    assert (
        "publisher (the events have 'publisher2', which is no field), "
        "versions (the events have 'version', which is no field)" in caplog.text
    )


# -- a take-over ---------------------------------------------------------------------------------


class TakenOverAtThePoll(Partitions):
    """Another process takes the state directory over at the third poll."""

    polls = 0

    def poll(self, timeout_seconds: float) -> Records:
        self.polls += 1
        if self.polls == 3:
            assert self.trainer
            (self.trainer.snapshots.policy.directory / "lock").write_text('{"token": "other"}')
        return super().poll(timeout_seconds)


def test_a_run_ends_at_the_first_poll_after_a_takeover_though_it_has_nothing_to_write(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    source = TakenOverAtThePoll(split(stream, 4))
    built = trainer(tmp_path, source)
    with Lease(tmp_path) as lease:
        built.publisher._lease = lease
        with pytest.raises(TakenOver):
            finish(built)
    assert source.polls == 3
    assert not (tmp_path / "reports.jsonl").exists()


# -- the baseline's process ----------------------------------------------------------------------


class BaselineStopped(Partitions):
    """Once examples are learned, the baseline's process is stopped and the run is told to end."""

    def poll(self, timeout_seconds: float) -> Records:
        assert self.trainer
        if self.trainer.baseline and self.trainer.state.ledger.count:
            os.kill(self.trainer.baseline.process._process.pid, signal.SIGSTOP)
            self.trainer.stop()
        return super().poll(timeout_seconds)


@pytest.mark.fault(34, injected="SIGSTOP of the baseline's process, then SIGTERM to the run")
@pytest.mark.slow
def test_a_run_whose_baseline_is_frozen_still_ends_with_a_snapshot_that_has_its_state(
    tmp_path: Path,
    stream: pa.LargeBinaryArray,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
) -> None:
    monkeypatch.setattr(baseline, "_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(baseline, "_WAITS_BEFORE_FAILING", 10_000)
    values = [stream]
    finish(trainer(tmp_path / "whole", Partitions(values), **RIVER))
    stopped = finish(trainer(tmp_path / "parts", BaselineStopped(values), **RIVER))
    assert stopped["kind"] == "stopped"
    resumed = trainer(tmp_path / "parts", Partitions(values), **RIVER)
    newest = snapshot.newest(tmp_path / "parts" / "snapshots")
    assert newest
    resumed.restore(newest)
    assert finish(resumed)["examples"] > stopped["examples"] > 0
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")
    outcome("woken after 5 s; the run ends with a snapshot, resumed, ledger and all state equal")
