"""Predictions in Parquet: every example once, and enough to compute every metric again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from support.trainers import RIVER, SMALL, Partitions, Sections, finish, split, trainer

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.snapshots import snapshot
from stream_ctr.train import predictions
from stream_ctr.train.predictions import PredictionLog

SECTIONS: Sections = {
    "model": {**SMALL["model"], "name": "blend"},
    "schedule": {"snapshot_examples": 1024},
    "metrics": {"window": "60s", "served_share": 0.5},
    "snapshots": {"keep": 1},
}


def rows_of(directory: Path) -> dict[str, Any]:
    """Return the columns of all parts, which must follow each other without a gap."""
    paths = sorted(directory.glob("*.parquet"), key=lambda path: path.name.split("-")[1])
    end = 0
    for path in paths:
        first, last = (int(number) for number in path.stem.split("-")[1:])
        assert first == end
        end = last
        assert pa.parquet.read_metadata(path).num_rows == last - first
    table = pa.concat_tables([pa.parquet.read_table(path) for path in paths])
    return {name: table[name].to_numpy() for name in table.column_names}


def logloss(p: np.ndarray, label: np.ndarray) -> float:
    known = ~np.isnan(p)
    of_label = np.where(label == 1, p, 1 - p)[known]
    return float(-np.log(of_label).mean())


def auc(p: np.ndarray, label: np.ndarray) -> float:
    """Return the share of pairs of a click and another impression in the right order."""
    known = ~np.isnan(p)
    clicked, others = p[known & (label == 1)], p[known & (label == 0)]
    order = np.sign(clicked[:, None] - others[None, :])
    return float((order.mean() + 1) / 2)


def assert_metrics(rows: dict[str, Any], kind: str, models: dict[str, Any]) -> None:
    for model, score in models.items():
        p = rows[f"{kind}.{model}"]
        assert score["count"] == (~np.isnan(p)).sum() > 0
        assert score["logloss"] == pytest.approx(logloss(p, rows["label"]), rel=1e-9)
        bound = score["auc_error_bound"] + 1e-9
        assert score["auc"] == pytest.approx(auc(p, rows["label"]), abs=bound)


def test_anybody_can_compute_the_metrics_of_the_report_again(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    sections = {**SECTIONS, **RIVER}
    report = finish(trainer(tmp_path, Partitions([stream]), predictions=tmp_path / "p", **sections))
    rows = rows_of(tmp_path / "p")
    assert len(rows["label"]) == report["examples"]
    assert_metrics(rows, "progressive", report["models"])
    served = dict(report["as_served"]["models"])
    same = served.pop("progressive")
    assert_metrics(rows, "served", served)
    chosen = ~np.isnan(rows["served.blend"])
    progressive = np.where(chosen, rows["progressive.blend"], np.nan)
    assert same["logloss"] == pytest.approx(logloss(progressive, rows["label"]), rel=1e-9)
    best = logloss(rows["true_probability"], rows["label"])
    assert report["best_possible_logloss"] == pytest.approx(best, rel=1e-9)


def test_rows_beyond_those_in_memory_go_to_the_unfinished_part(
    tmp_path: Path, stream: pa.LargeBinaryArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_ROW_GROUP", 256)
    report = finish(trainer(tmp_path, Partitions([stream]), predictions=tmp_path / "p", **SECTIONS))
    assert len(rows_of(tmp_path / "p")["label"]) == report["examples"]
    assert not list((tmp_path / "p").glob("tmp-*"))
    first = min((tmp_path / "p").glob("*.parquet"))
    assert pa.parquet.read_metadata(first).num_row_groups == 4


def test_stopped_runs_write_each_example_once(tmp_path: Path, stream: pa.LargeBinaryArray) -> None:
    for seed, stop in enumerate((2000, 2500, None)):
        source = Partitions(split(stream, 2), seed=seed, stop_after=stop)
        built = trainer(tmp_path, source, predictions=tmp_path / "p", **SECTIONS)
        if newest := snapshot.newest(tmp_path / "snapshots"):
            built.restore(newest)
        report = finish(built)
    rows = rows_of(tmp_path / "p")
    assert len(np.unique(rows["id_hash"])) == len(rows["id_hash"]) == 6000
    assert_metrics(rows, "progressive", report["models"])


def test_a_snapshot_that_cannot_be_written_loses_no_rows(
    tmp_path: Path, stream: pa.LargeBinaryArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = snapshot.write
    failures = iter([True, False, True, False, False, False, False])

    def sometimes(*args: Any, **options: Any) -> Path:
        if next(failures):
            raise SnapshotError("no space")
        return write(*args, **options)

    monkeypatch.setattr(snapshot, "write", sometimes)
    report = finish(trainer(tmp_path, Partitions([stream]), predictions=tmp_path / "p", **SECTIONS))
    assert report["counters"]["snapshots_failed"] == 2
    assert len(rows_of(tmp_path / "p")["label"]) == 6000


def test_the_directory_of_another_run_is_refused(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    finish(
        trainer(
            tmp_path / "one",
            Partitions([stream.slice(0, 1500)]),
            predictions=tmp_path / "p",
            **SECTIONS,
        )
    )
    before = sorted((tmp_path / "p").iterdir())
    with pytest.raises(ConfigError, match="predictions of another run"):
        trainer(tmp_path / "two", Partitions([stream]), predictions=tmp_path / "p", **SECTIONS)
    assert sorted((tmp_path / "p").iterdir()) == before


def test_a_directory_that_cannot_be_written_to_ends_the_run(
    tmp_path: Path, stream: pa.LargeBinaryArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cannot write predictions"):
        PredictionLog(Path("/dev/null/p"), state=tmp_path, models=["fm"])
    built = trainer(tmp_path, Partitions([stream]), predictions=tmp_path / "p", **SECTIONS)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pa.parquet.ParquetWriter, "write_table", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        finish(built)
    assert not snapshot.newest(tmp_path / "snapshots")


def test_parts_name_their_examples(tmp_path: Path, stream: pa.LargeBinaryArray) -> None:
    finish(trainer(tmp_path, Partitions([stream]), predictions=tmp_path / "p", **SECTIONS))
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names[:2] == [
        "00000001-000000000000-000000001024.parquet",
        "00000002-000000001024-000000002048.parquet",
    ]
    manifest = snapshot.read_manifest(
        tmp_path / "snapshots" / snapshot.snapshot_ids(tmp_path / "snapshots")[-1]
    )
    assert names[-1].endswith(f"-{manifest.examples:012d}.parquet")
    last = json.loads((tmp_path / "reports.jsonl").read_text().splitlines()[-1])
    assert last["examples"] == manifest.examples
