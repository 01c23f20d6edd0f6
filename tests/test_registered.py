"""A model of one's own is registered, checked, learned, published and served by its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from msgspec import structs
from support import own_models
from support.lineage import QUICK, fingerprint
from support.manifests import LEARNER, manifest
from support.served import publish

from stream_ctr import extensions
from stream_ctr.cli.main import main
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.learn.baseline import BaselineProcess
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import BLEND, EXPERTS, SYSTEMS, LearnerSpec
from stream_ctr.logs.simulate import Simulation
from stream_ctr.models.registered import RESERVED, register_model, system
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber

GATED = "support.own_models:Gated"
OWN_DEEPFM = "support.own_models:OwnDeepFM"
IDS = np.random.default_rng(0).integers(0, 256, (40, 3)).astype(np.int32)
LABELS = (np.arange(40) % 3 == 0).astype(np.uint8)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins in a process that knows the nine systems only."""
    monkeypatch.setattr(extensions, "_registered", {})


def spec(model: str, **changes: Any) -> LearnerSpec:
    small = LearnerSpec(
        model=model, fields=3, embedding_dim=4, hidden=(8,), table_bits=8, batch_size=16
    )
    return structs.replace(small, **changes)


def learned(model: str, **changes: Any) -> Any:
    learner = make_learner(spec(model, **changes), device="cpu", threads=1)
    for first in range(0, 40, 16):
        assert learner.learn(IDS[first : first + 16], LABELS[first : first + 16]) is not None
    return learner


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_model_with_terms_learns_by_the_online_rule_bit_for_bit(dropout: float) -> None:
    name = register_model(own_models.OwnDeepFM)
    own, paper = (learned(model, dropout=dropout) for model in (name, "deepfm"))
    assert name == "owndeepfm"
    assert own.online
    assert own.predict(IDS).tolist() == paper.predict(IDS).tolist()
    assert np.array_equal(own.weights()["table"], paper.weights()["table"])


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_a_model_without_terms_takes_a_step_a_batch(optimizer: str) -> None:
    name = register_model(own_models.Gated)
    learner = learned(name, table_optimizer=optimizer)
    fresh = make_learner(spec(name, table_optimizer=optimizer), device="cpu")
    for tensor in ("dense.gate.weight", "dense.gate.bias", "table"):
        assert not np.array_equal(learner.weights()[tensor], fresh.weights()[tensor]), tensor
    fresh.load_weights(learner.weights())
    assert fresh.predict(IDS).tolist() == learner.predict(IDS).tolist()


def test_a_model_without_a_parameter_can_learn() -> None:
    learner = learned(register_model(own_models.Linear))
    assert learner.predict(IDS).any()
    assert set(learner.weights()) == {"table", "intercept"}


# -- names ---------------------------------------------------------------------------------------


def test_a_name_is_that_of_the_class_or_given_or_the_import_path() -> None:
    assert register_model(own_models.Gated) == "gated"
    assert register_model(own_models.Gated, name="mine.v2") == "mine.v2"
    assert register_model(GATED) == GATED
    assert extensions.names() == ("gated", "mine.v2", GATED)
    assert [system(name).title for name in extensions.names()] == ["Gated"] * 3


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (own_models.Gated, "deepfm", "'deepfm' is that of another model"),
        (own_models.Gated, "blend", "'blend' is that of another model"),
        (own_models.Gated, "../x", "'../x' is no name of a model"),
        (own_models.Gated, "a" * 201, "is no name of a model"),
        (own_models.NotAModel, None, "NotAModel'> is not a torch.nn.Module"),
        (own_models.NoNetwork, None, "a method deep_logits.*, because it declares terms"),
        ("support.own_models:NotAModel", None, "is not a torch.nn.Module"),
        ("support.own_models:Absent", None, "support.own_models has no class 'Absent'"),
        ("support.absent:Model", None, "there is no module 'support.absent'"),
        ("support.own_models:nn", None, "nn is not a class"),
        ("own_models", None, "is not an import path, package.module:Class"),
    ],
)
def test_what_cannot_be_registered_says_why(model: Any, name: str | None, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        register_model(model, name=name)
    assert extensions.names() == ()


def test_code_that_fails_when_it_is_imported_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_model.py").write_text("raise OSError('no weights')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="importing broken_model failed: OSError: no weights"):
        register_model("broken_model:Model")
    assert str(tmp_path) not in sys.path


def test_the_names_that_reports_and_files_use_are_reserved() -> None:
    assert {BLEND, *EXPERTS, *SYSTEMS, BaselineProcess.name} == set(RESERVED)


# -- the check before learning -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (own_models.WrongShape, r"returns \[3, 1\] for 3 examples; logits are \[3\]"),
        (own_models.Infinite, "finite numbers"),
        (own_models.Double, "gate.weight is torch.float64"),
        (own_models.Constant, "no gradient"),
        (own_models.Random, "something else each time; .*layers.Dropout"),
        (own_models.Normed, "changes a buffer"),
        (own_models.Unbuilt, "its constructor fails with the keywords none: TypeError"),
        (own_models.Failing, r"fails on w \[3, 3\] and v \[3, 3, 4\]: RuntimeError: out of ideas"),
        (own_models.WrongTerms, "is not the sum of the Terms"),
        (own_models.Untaped, "would not learn the parameter scale"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_it_learns(
    model: Any, reason: str
) -> None:
    name = register_model(model)
    with pytest.raises(ConfigError, match=f"model .*{reason}"):
        make_learner(spec(name), device="cpu")


# -- entry points --------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package that offers the model `gated_example`, and one that is broken."""
    info = tmp_path / "acme_nets-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-nets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{extensions.GROUP}]\ngated_example = {GATED}\nbroken = acme.absent:Model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    extensions._installed.cache_clear()
    yield "gated_example"
    extensions._installed.cache_clear()


def test_an_installed_package_offers_a_model_by_name(package: str) -> None:
    assert package in extensions.names()
    assert learned(package, table_optimizer="adagrad").predict(IDS).any()
    with pytest.raises(ConfigError, match="'broken' of the package acme-nets: there is no module"):
        system("broken")
    listed = CliRunner().invoke(main, ["models", "--json"])
    assert [json.loads(line)["name"] for line in listed.stdout.splitlines()][-1] == package
    assert "warning: model 'broken' of the package acme-nets" in listed.stderr


# -- the command line ----------------------------------------------------------------------------


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "events.jsonl"
    Simulation(3000, seed=1).write_jsonl(path)
    return path


@pytest.mark.slow
def test_a_run_learns_models_by_import_path_and_goes_on_when_they_are_named_again(
    log: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    named = ("--model", OWN_DEEPFM, "--model", GATED, "--model", "deepfm")
    begun = command("run", "--source", log, "--state", state, *named, *QUICK)
    assert begun.exit_code == 0, begun.output
    path = snapshot.newest(state / "snapshots")
    assert path
    described, tensors = snapshot.load(path)
    assert described.published == OWN_DEEPFM
    assert {name: one.table_optimizer for name, one in described.specs.items()} == {
        OWN_DEEPFM: "online",
        GATED: "adagrad",
        "deepfm": "online",
        "ftrl": "online",
    }
    assert np.array_equal(tensors["model"]["table"], tensors["deepfm.model"]["table"])
    assert f"{GATED.replace(':', '-')}.model.safetensors" in described.files
    before = fingerprint(path)

    extensions._registered.clear()  # as in another process
    refused = command("run", "--source", log, "--state", state, *QUICK)
    assert refused.exit_code == 3
    assert "a name in a snapshot is never imported" in refused.output
    resumed = command("run", "--source", log, "--state", state, *named, *QUICK)
    assert resumed.exit_code == 0, resumed.output
    newest = snapshot.newest(state / "snapshots")
    assert newest
    assert fingerprint(newest).weights_sha256 == before.weights_sha256

    extensions._registered.clear()
    refused = command("score", "--snapshot", state, log)
    assert refused.exit_code == 6
    assert f"the model '{OWN_DEEPFM}' is not known to this process" in refused.output
    allowed = ("--allow-model", OWN_DEEPFM, "--allow-model", GATED)
    for model in (None, GATED):
        chosen = ("--model", model) if model else ()
        scored = command("score", "--snapshot", state, log, *allowed, *chosen)
        assert scored.exit_code == 0, scored.output
        assert len(scored.stdout.splitlines()) == 3000


def test_models_lists_what_was_allowed_in_the_terms_of_table_1() -> None:
    listed = command("models", "--allow-model", OWN_DEEPFM, "--allow-model", GATED, "--json")
    gated, deepfm = (json.loads(line) for line in listed.stdout.splitlines()[9:])
    assert deepfm["name"] == OWN_DEEPFM or gated["name"] == OWN_DEEPFM
    lines = {one["name"]: one for one in (gated, deepfm)}
    assert lines[OWN_DEEPFM]["low_order"]
    assert lines[OWN_DEEPFM]["says"] == "DeepFM written once more."
    assert not lines[GATED]["low_order"]
    assert lines[GATED]["high_order"]


def test_graphs_are_for_the_papers_systems_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    Simulation(500, seed=3).write_jsonl(log)
    options = ("--source", log, "--state", tmp_path / "state", "--model", OWN_DEEPFM)
    refused = command("run", *options, "-X", "snapshots.onnx=true")
    assert refused.exit_code == 3
    assert f"snapshots.onnx = true: the model '{OWN_DEEPFM}' has no ONNX graph" in refused.output


# -- a snapshot never causes an import -----------------------------------------------------------


def write_own(root: Path, model: str) -> Path:
    """Write a snapshot of `OwnDeepFM` that names this model."""
    learner = structs.replace(LEARNER, crosses=0, model=register_model(own_models.OwnDeepFM))
    weights = NetworkLearner(learner, device="cpu").weights()
    extensions._registered.clear()
    schema = structs.replace(manifest().schema, crosses=())
    described = manifest(schema=schema, learner=structs.replace(learner, model=model), beside={})
    return snapshot.write(root, tensors={"model": weights}, manifest=described)


@pytest.mark.security(
    "a snapshot never makes a subscriber import code", how="a manifest that names a module"
)
def test_a_subscriber_imports_nothing_that_a_manifest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted.py").write_text("raise SystemExit('it was imported')")
    for number, model in enumerate(["planted:Model", "planted", "os:system", "planted.x:Y"], 1):
        state = tmp_path / f"state{number}"
        path = write_own(state / "snapshots", model)
        with pytest.raises(SnapshotError, match=f"the model '{model}' is not known"):
            Scorer(path)
        publish(path)
        subscriber = Subscriber(state)
        assert subscriber.next(0.0) is None
        assert "is not known to this process" in str(subscriber.refusal)
        assert command("subscribe", "--state", state, "--once", "--timeout", 0.1).exit_code == 6
        assert command("snapshots", "verify", path).exit_code == 0
    assert "planted" not in sys.modules


def test_a_subscriber_serves_a_model_that_its_process_registered(tmp_path: Path) -> None:
    publish(write_own(tmp_path / "snapshots", "mine"))
    register_model(own_models.OwnDeepFM, name="mine")
    subscriber = Subscriber(tmp_path)
    assert subscriber.next(0.0)
    assert 0 < subscriber.predict({"app": "maps"}) < 1


def test_another_class_under_the_name_is_refused_by_its_shapes(tmp_path: Path) -> None:
    path = write_own(tmp_path / "snapshots", "mine")
    register_model(own_models.Gated, name="mine")
    with pytest.raises(SnapshotError, match="does not describe a model .*tensor 'dense.gate"):
        Scorer(path)


@pytest.mark.parametrize("model", ["../up", "a:b:c", "a b", "", "x" * 201])
def test_a_manifest_with_a_name_that_no_model_has_is_damaged(tmp_path: Path, model: str) -> None:
    with pytest.raises(SnapshotError):
        write_own(tmp_path / "snapshots", model)
