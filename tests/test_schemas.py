"""The published JSON Schemas are those of the types, and a real run's documents satisfy them."""

from __future__ import annotations

import doctest
import importlib.util
import json
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.commands import succeed
from support.lineage import SMALL
from support.manifests import manifest

from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots.contract import encode

jsonschema = pytest.importorskip("jsonschema")

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
NAMES = ("pointer", "manifest", "report")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors(name: str, document: object) -> list[str]:
    """Return what the published schema says against a document."""
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def test_the_published_schemas_are_those_of_the_types() -> None:
    generator = load_generator()
    assert doctest.testmod(generator).failed == 0
    schemas = generator.schemas()
    assert {path.name for path in FOLDER.glob("*.json")} == set(schemas)
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    changed = [
        name
        for name, schema in schemas.items()
        if (FOLDER / name).read_text() != generator.text(schema)
    ]
    assert changed == [], "write them again with: make schemas"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the documents that two runs of three models and a baseline leave, by kind."""
    folder = tmp_path_factory.mktemp("run")
    log = folder / "log.jsonl"
    state = folder / "state"
    Simulation(6000, seed=3).write_jsonl(log)
    arguments = ["run", "--source", log, "--state", state, *SMALL]
    models = ["--model", "deepfm", "--model", "fm", "--model", "lr"]
    options = ["metrics.window=60s", "schedule.snapshot_examples=2000", "schedule.report_every=1ms"]
    options += ["features.crosses=age*category", "snapshots.gate_clicks=20"]
    settings = [part for option in options for part in ("-X", option)]
    succeed(*arguments, *models, *settings)
    succeed(*arguments)
    lines = (state / "reports.jsonl").read_text().splitlines()
    manifests = sorted((state / "snapshots").glob("*/manifest.json"))
    return {
        "pointer": [json.loads((state / "latest.json").read_text())],
        "manifest": [json.loads(path.read_text()) for path in manifests],
        "report": [json.loads(line) for line in lines],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_documents_of_a_run_satisfy_their_schemas(
    documents: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for document in documents[name]:
        assert errors(name, document) == []


@pytest.mark.slow
def test_the_run_leaves_reports_of_every_kind(
    documents: dict[str, list[dict[str, Any]]],
) -> None:
    assert {report["kind"] for report in documents["report"]} == {"report", "window", "final"}
    final = documents["report"][-1]
    assert final["baseline"]
    assert final["pairs"]
    assert final["last_half"]["deepfm"]
    assert final["window_curve"]
    assert all("format" in report for report in documents["report"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_document_is_in_its_schema_and_required(
    documents: dict[str, list[dict[str, Any]]], name: str
) -> None:
    optional = {
        # A snapshot of several models has no learner of its own.
        "manifest": {"learner"},
        "pointer": set(),
        "report": {
            "baseline",
            "fields",
            "fields_window",
            "table",
            "rolling",
            "stalls",
            "last_half",
            "last_quarter",
            "window_curve",
            "notes",
            "as_served",
            "as_served_last_half",
        },
    }[name]
    document = documents[name][-1]
    for key in document:
        rest = {other: value for other, value in document.items() if other != key}
        assert bool(errors(name, rest)) is not (key in optional), key
        assert errors(name, {**document, key: object}), key
    assert errors(name, {**document, "new": 1})
    assert errors(name, {**document, "format": document["format"] + 1})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema", "fields", 0), ["app", "categorical", 1]),
        (("schema", "hash_seed"), ...),
        (("learner", "dropout"), 1.5),
        (("ledger", "sum"), 2**64),
        (("ledger", "sum"), -1),
        (("metrics", "models", "deepfm"), {"auc": "x"}),
        (("metrics", "from_example"), ...),
        (("weights_sha256",), "0" * 63),
        (("weights_sha256",), "0" * 64 + "\n"),
        (("positions", "clicks:0"), -1),
        (("gate", "evidence", "logloss"), "0.4"),
    ],
)
def test_the_schema_of_the_manifest_refuses_what_the_decoder_refuses(
    path: tuple[Any, ...], value: object
) -> None:
    whole = json.loads(encode(manifest()))
    assert errors("manifest", whole) == []
    damaged = deepcopy(whole)
    owner = damaged
    for key in path[:-1]:
        owner = owner[key]
    if value is ...:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    assert errors("manifest", damaged)
