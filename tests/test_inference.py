"""The first records of a source, and what a run infers from them and keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.commands import command, succeed
from support.event_records import features, record
from support.lineage import QUICK, reports
from support.trainers import Partitions

from stream_ctr import Scorer
from stream_ctr.cli import inference, runs
from stream_ctr.cli.inference import FirstRecords, first_records
from stream_ctr.events.arrow_events import pack
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field
from stream_ctr.events.fit import fit_numbers
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest

CLICK = record(kind="click", features=...)


def values_of(*records: bytes) -> pa.LargeBinaryArray:
    return pa.array(records, pa.large_binary())


def newest(state: Path) -> Manifest:
    found = snapshot.newest(state / "snapshots")
    assert found
    return snapshot.read_manifest(found)


def first_of(source: Any, **options: Any) -> FirstRecords:
    found = first_records(
        source,
        **{
            "stopped": lambda: False,
            "say": lambda text: None,
            "max_record_bytes": 1 << 20,
            "reason": "",
            **options,
        },
    )
    assert found
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_first_records_do_not_depend_on_how_they_are_polled(seed: int) -> None:
    ends = [3000, 120, 900, 0]
    partitions = [
        values_of(*[CLICK] * (7 * p), *(features(n=n, p=p) for n in range(end)))
        for p, end in enumerate(ends)
    ]
    source = Partitions(partitions, seed=seed)
    first = first_of(source)
    expected = [
        features(n=n, p=p) for p, end in enumerate(ends) for n in range(min(end, 1000 // 4))
    ]
    assert first.values.to_pylist() == expected
    assert source.positions() == {0: 0, 1: 0, 2: 0, 3: 0}


def test_first_records_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_BYTES", 1 << 16)
    source = Partitions([values_of(*[features(text="x" * 1000)] * 900)])
    sizes = [len(value) for value in first_of(source).values.to_pylist()]
    assert sum(sizes[:-1]) < 1 << 16 <= sum(sizes)


def test_a_partition_of_clicks_does_not_keep_a_run_waiting() -> None:
    source = Partitions([values_of(*[features()] * 2000), values_of(*[CLICK] * 50_000)])
    first = first_of(source)
    assert len(first.values) == 500
    assert first.read < 10_000


def test_as_many_impressions_are_taken_whether_a_record_holds_one_or_many() -> None:
    alone = values_of(*[features(n=n) if n % 2 else CLICK for n in range(1, 4000)])
    packed = pack(alone, events_a_record=300)
    parts = [first_of(Partitions([values])).parts for values in (alone, packed)]
    assert [len(part) for (part,) in parts] == [1999, 7]
    fitted = [
        fit_numbers(part, [Field("n", "numeric")], numeric_encoding="value") for part in parts
    ]
    assert fitted[0] == fitted[1]


def test_a_live_source_is_waited_for_until_it_has_impressions() -> None:
    said: list[str] = []

    class Live(Partitions):
        until_end = False
        finished = False

        def caught_up(self) -> np.ndarray:
            return np.array([True])

        quiet = 3

        def poll(self, timeout_seconds: float) -> Any:
            self.quiet -= 1
            return Partitions([values_of()]).poll(0) if self.quiet > 0 else super().poll(0)

    source = Live([values_of(*[features()] * 1000)])
    first = first_of(source, say=said.append, reason="for a test")
    assert len(first.values) == 1000
    assert said == ["waiting for the first impressions, for a test"]
    stopped: Any = Live([values_of()])
    assert (
        first_records(
            stopped,
            stopped=lambda: True,
            say=said.append,
            max_record_bytes=1,
            reason="",
        )
        is None
    )


# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a log whose clicks depend on a number between 0 and 1 alone."""
    path = tmp_path_factory.mktemp("shares") / "shares.jsonl"
    rng = np.random.default_rng(0)
    lines = []
    for batch in Simulation(3000, seed=5).batches():
        lines += [json.loads(value) for value in batch.value.to_pylist()]
    share = {
        event["impression_id"]: round(float(rng.random()), 4)
        for event in lines
        if event["kind"] == "impression"
    }
    kept = []
    for event in lines:
        if event["kind"] == "impression":
            event["features"] = {"share": share[event["impression_id"]], "age": 31}
            event.pop("true_probability", None)
            kept.append(event)
            if rng.random() < (0.6 if 0.45 < event["features"]["share"] < 0.6 else 0.05):
                kept.append(
                    {
                        "kind": "click",
                        "impression_id": event["impression_id"],
                        "time": event["time"],
                    }
                )
    path.write_text("".join(json.dumps(event) + "\n" for event in kept))
    return path


@pytest.mark.parametrize("named", [(), ("-X", "features.numeric=share,age")])
def test_numbers_between_0_and_1_are_learned_with_the_defaults(
    shares: Path, tmp_path: Path, named: tuple[str, ...]
) -> None:
    state = tmp_path / "state"
    result = succeed("run", "--source", shares, "--state", state, *QUICK, *named)
    assert "note: buckets fitted to the numbers of share\n" in result.stderr
    assert reports(state)[-1]["models"]["ftrl"]["auc"] > 0.75
    schema = newest(state).schema
    assert {name: len(edges) for name, edges in schema.bucket_edges.items()} == {"share": 15}
    unfitted = tmp_path / "unfitted"
    off = ("-X", "features.fit_numbers=false")
    succeed("run", "--source", shares, "--state", unfitted, *QUICK, *named, *off)
    assert newest(unfitted).schema.bucket_edges == {}
    assert reports(unfitted)[-1]["models"]["ftrl"]["auc"] < 0.65


def test_a_resumed_run_and_a_server_have_the_fit_of_the_snapshot(
    shares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    lines = shares.read_text().splitlines(keepends=True)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(lines[:2000]))
    succeed("run", "--source", log, "--state", state, *QUICK)
    edges = newest(state).schema.bucket_edges
    log.write_text("".join(lines))
    monkeypatch.setattr(runs, "fit_numbers", None)  # nothing is fitted again
    result = succeed("run", "--source", log, "--state", state, *QUICK)
    assert "resumed" in result.stderr
    assert "fitted" not in result.stderr
    assert newest(state).schema.bucket_edges == edges
    scorer = Scorer(state / "snapshots" / newest(state).snapshot)
    hasher = Hasher([Field("share", "numeric")], table_bits=14, bucket_edges=edges)
    row = [scorer.fields.index(Field("share", "numeric"))]
    columns = {"share": pa.array([0.5]), "age": pa.array([31.0])}
    assert scorer.hasher.rows(columns)[0][:, row].tolist() == hasher.rows(columns)[0].tolist()
    off = ("-X", "features.fit_numbers=false")
    refused = command("run", "--source", log, "--state", state, *QUICK, *off)
    assert refused.exit_code == 3
    assert "was made with bucket_edges" in refused.output


@pytest.mark.parametrize("encoding", ["value", "log_value"])
def test_the_value_encodings_survive_large_numbers_with_the_defaults(
    tmp_path: Path, encoding: str
) -> None:
    events = [
        json.loads(value)
        for batch in Simulation(3000, seed=5).batches()
        for value in batch.value.to_pylist()
    ]
    rng = np.random.default_rng(0)
    for event in events:
        if event["kind"] == "impression":
            event["features"]["large"] = float(rng.lognormal(8, 3))
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    state = tmp_path / "state"
    chosen = ("-X", f"features.numeric_encoding={encoding}")
    succeed("run", "--source", log, "--state", state, *QUICK, *chosen)
    final = reports(state)[-1]
    for model in ("deepfm", "ftrl"):
        assert final["last_half"][model]["logloss"] < 1.1 * final["last_half"]["constant_logloss"]
    assert newest(state).schema.value_scales["large"] > (1000 if encoding == "value" else 5)
