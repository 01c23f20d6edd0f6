"""A run that begins with the weights of another run's snapshot, under another configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.trainers import (
    RIVER,
    SIMULATED_FIELDS,
    SMALL,
    Partitions,
    Sections,
    finish,
    trainer,
)

from stream_ctr.errors import ConfigError
from stream_ctr.events.field import Field
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.train.trainer import Trainer

MODEL = SMALL["model"]
BLEND: Sections = {"model": {**MODEL, "name": "blend"}, "learn": {"batch_size": 256, "threads": 1}}
ROWS: list[dict[str, object]] = [
    {"app_id": f"a{n}", "hour": str(n), "category": f"c{n}", "age": "3", "rating": n / 4}
    for n in range(8)
]


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory, stream: pa.LargeBinaryArray) -> Path:
    """The snapshot of a finished run of a blend, with River's baseline."""
    directory = tmp_path_factory.mktemp("blended")
    gate: Sections = {"snapshots": {"gate_clicks": 100}}
    finish(trainer(directory, Partitions([stream]), **BLEND, **RIVER, **gate))
    return newest(directory)


def newest(directory: Path) -> Path:
    found = snapshot.newest(directory / "snapshots")
    assert found
    return found


def begun(
    directory: Path, path: Path, *, fields: Sequence[Field] = SIMULATED_FIELDS, **sections: Any
) -> tuple[Trainer, list[str]]:
    """Return a trainer that begins with the weights at `path`, and what it says."""
    none = pa.array([], pa.large_binary())
    built = trainer(directory, Partitions([none]), fields=fields, **sections)
    return built, built.begin_from(path)


def stopped(built: Trainer) -> Path:
    """Stop a run before its first example; return its snapshot."""
    built.stop()
    finish(built)
    return newest(built.snapshots.policy.directory)


def predicted(path: Path, model: str | None = None) -> Any:
    return Scorer(path, model=model).predict(ROWS)


def manifest_of(path: Path) -> Manifest:
    return snapshot.read_manifest(path)


def test_with_another_batch_and_window_every_prediction_is_the_same(
    blended: Path, tmp_path: Path
) -> None:
    built, said = begun(
        tmp_path,
        blended,
        **{**BLEND, "learn": {"batch_size": 64, "threads": 1}, "join": {"label_window": "10s"}},
    )
    assert "configuration: learn.batch_size was 256 and is 64" in said
    assert "configuration: join.label_window was '1m' and is '10s'" in said
    assert f"fields: {len(SIMULATED_FIELDS)} of {len(SIMULATED_FIELDS)} carry over" in said
    assert not [each for each in said if "begins anew" in each]
    path = stopped(built)
    assert np.array_equal(predicted(path), predicted(blended))
    for model in manifest_of(blended).beside:
        assert np.array_equal(predicted(path, model), predicted(blended, model))


def test_positions_metrics_and_the_verdict_begin_anew(blended: Path, tmp_path: Path) -> None:
    built, _ = begun(tmp_path, blended, **BLEND)
    found = manifest_of(stopped(built))
    assert found.examples == found.ledger.count == 0
    assert found.positions == {"clicks:0": 0}
    assert found.gate.evidence is None
    assert found.metrics.models["blend"].count == 0
    assert manifest_of(blended).gate.evidence is not None
    assert (tmp_path / "latest.json").exists() is False


def test_a_larger_table_changes_only_what_pairs_of_fields_knew(
    blended: Path, tmp_path: Path
) -> None:
    built, said = begun(
        tmp_path, blended, **{**BLEND, "model": {**BLEND["model"], "table_bits": 14}}
    )
    path = stopped(built)
    for model in ("deepfm", "ftrl", "ftrl_scaled"):
        assert np.array_equal(predicted(path, model), predicted(blended, model))
    for name in ("ftrl_pairs", "ftrl_pairs_slow"):
        assert [each for each in said if each.startswith(f"{name}: begins anew")]
    assert "blend: new, with the weight 0: ftrl_pairs, ftrl_pairs_slow" in said


def test_fields_come_and_go(blended: Path, tmp_path: Path, stream: pa.LargeBinaryArray) -> None:
    fields = [Field("browser", "categorical"), *SIMULATED_FIELDS[2:]]
    built, said = begun(tmp_path, blended, fields=fields, **BLEND)
    gone = ", ".join(field.name for field in SIMULATED_FIELDS[:2])
    assert "fields: new, they begin as in a fresh table: browser" in said
    assert f"fields: gone, nothing reads their weights: {gone}" in said
    path = stopped(built)
    names = [field.name for field in SIMULATED_FIELDS[2:]]
    scorers = [Scorer(each, model="deepfm") for each in (path, blended)]
    tables = [snapshot.load(each)[1]["deepfm.model"]["table"] for each in (path, blended)]
    ids = [
        scorer.hasher.rows(
            {
                field.name: pa.array([None, "3"], pa.string())
                if field.kind == "categorical"
                else pa.array([None, 2.0])
                for field in scorer.fields
            }
        )[0]
        for scorer in scorers
    ]
    for name in names:
        rows = [
            table[found[:, [field.name for field in scorer.fields].index(name)]]
            for scorer, found, table in zip(scorers, ids, tables, strict=True)
        ]
        assert np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("name", ["deepfm", "ftrl"])
def test_a_member_of_a_blend_may_be_published_alone(
    blended: Path, tmp_path: Path, name: str
) -> None:
    """`ftrl` is `lr` where it is a model of the run."""
    model = {"deepfm": "deepfm", "ftrl": "lr"}[name]
    built, said = begun(tmp_path, blended, **{**BLEND, "model": {**MODEL, "name": model}})
    assert np.array_equal(predicted(stopped(built)), predicted(blended, name))
    assert "ftrl_pairs: gone, this run has no such model" in said


def test_a_published_model_becomes_a_member_of_a_blend(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    alone = tmp_path / "alone"
    finish(trainer(alone, Partitions([stream])))
    built, said = begun(
        tmp_path / "blend", newest(alone), **{**SMALL, "model": {**MODEL, "name": "blend"}}
    )
    assert "blend: is new, and begins with the weight on deepfm, ftrl" in said
    path = stopped(built)
    assert np.array_equal(predicted(path, "deepfm"), predicted(newest(alone)))
    between = [predicted(newest(alone)), predicted(newest(alone), "ftrl")]
    assert (predicted(path) >= np.minimum(*between) - 1e-12).all()
    assert (predicted(path) <= np.maximum(*between) + 1e-12).all()


def test_models_beside_carry_over_and_new_ones_begin_anew(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    first = tmp_path / "first"
    finish(trainer(first, Partitions([stream]), model={**MODEL, "beside": ("ipnn",)}))
    built, said = begun(
        tmp_path / "then", newest(first), model={**MODEL, "name": "ipnn", "beside": ("fm",)}
    )
    assert "fm: begins anew: the snapshot has no such model" in said
    assert "deepfm: gone, this run has no such model" in said
    assert np.array_equal(predicted(stopped(built)), predicted(newest(first), "ipnn"))


def test_river_goes_on_with_what_it_knows(
    blended: Path, tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    built, said = begun(tmp_path, blended, **BLEND, **RIVER)
    assert [each for each in said if each.startswith("river_ftrl:") and "carry over" in each]
    path = stopped(built)
    before, after = (snapshot.load(each, stems=["baseline"])[1] for each in (blended, path))
    assert before["baseline"].keys() == after["baseline"].keys()
    for name, array in before["baseline"].items():
        assert np.array_equal(array, after["baseline"][name])


def test_a_run_of_which_nothing_carries_over_is_refused(blended: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing of snapshot 0.* features.hash_seed was 0"):
        begun(tmp_path, blended, **BLEND, features={"hash_seed": 7})
    with pytest.raises(ConfigError, match="fm: begins anew: the snapshot has no such model"):
        begun(
            tmp_path,
            blended,
            **{**BLEND, "model": {**MODEL, "name": "fm"}, "ftrl": {"enabled": False}},
        )
