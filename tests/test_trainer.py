"""The loop: the same examples however polls fell, exact resume, bad input kept apart."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from connectors import Records
from stream_ctr import snapshot
from stream_ctr.arrow_events import pack
from stream_ctr.assembly import build_trainer
from stream_ctr.cli import main
from stream_ctr.config import Field, load
from stream_ctr.errors import ConfigError, DataError, SnapshotError
from stream_ctr.outlet import Outlet
from stream_ctr.simulate import Simulation
from stream_ctr.trainer import Trainer

SMALL = {
    "input": {"read_ahead": 0},  # these tests steer the trainer by its polls
    "model": {"hidden": (16, 16), "embedding_dim": 4, "table_bits": 12},
    "learn": {"batch_size": 128, "threads": 1},
    "join": {"label_window": "60s"},
    "metrics": {"window": "60s"},
}


class Partitions:
    """A log of several partitions, polled in chunks that a seed decides; `end` reads only so many records in all."""

    until_end = True

    def __init__(self, values: Sequence[pa.LargeBinaryArray], *, seed: int = 0, stop_after: int | None = None) -> None:
        self.partitions = tuple(("clicks", index) for index in range(len(values)))
        self._values, self._at = values, [0] * len(values)
        self._rng = np.random.default_rng(seed)
        self._paused: frozenset[int] = frozenset()
        self._left = stop_after
        self.committed: dict[int, int] = {}
        self.trainer: Trainer | None = None

    @property
    def finished(self) -> bool:
        return bool(self.caught_up().all())

    def caught_up(self) -> np.ndarray:
        return np.array([at >= len(values) for at, values in zip(self._at, self._values, strict=True)])

    def poll(self, timeout_seconds: float) -> Records:
        parts = []
        for p in self._rng.permutation(len(self._values)).tolist():
            if p in self._paused:
                continue
            n = int(min(self._rng.integers(1, 400), len(self._values[p]) - self._at[p]))
            offset = np.arange(self._at[p], self._at[p] + n)
            parts.append((np.full(n, p, np.int32), offset, self._values[p].slice(self._at[p], n)))
            self._at[p] += n
            if self._left is not None:
                self._left -= n
        if self._left is not None and self._left <= 0 and self.trainer:
            self.trainer.stop()
        n = sum(len(offset) for _, offset, _ in parts)
        if not n:
            return Records.empty()
        value = pa.concat_arrays([v for _, _, v in parts])
        return Records(np.concatenate([p for p, _, _ in parts]), np.concatenate([o for _, o, _ in parts]), np.full(n, -1), value)

    def positions(self) -> dict[int, int]:
        return dict(enumerate(self._at))

    def seek(self, positions: dict[int, int]) -> None:
        for p, at in positions.items():
            self._at[p] = at

    def pause(self, partitions: frozenset[int]) -> None:
        self._paused = partitions

    def lag(self) -> int:
        return 0

    def silent_seconds(self) -> float:
        return 0.0

    def lost(self) -> dict[int, int]:
        return {}

    def topic_ids(self) -> dict[str, str | None]:
        return {}

    def commit(self, positions: dict[int, int]) -> None:
        self.committed = dict(positions)


@pytest.fixture(scope="module")
def stream() -> pa.LargeBinaryArray:
    return pa.concat_arrays([batch.value for batch in Simulation(6000, seed=3).batches()])


def split(stream: pa.LargeBinaryArray, partitions: int) -> list[pa.LargeBinaryArray]:
    """By record number: a click is seldom in the partition of its impression."""
    at = np.arange(len(stream))
    return [stream.take(pa.array(at[at % partitions == p])) for p in range(partitions)]


def trainer(
    directory: Path,
    source: Any,
    *,
    fields: Sequence[Field] = Simulation(1, seed=0).fields,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    **sections: Any,
) -> Trainer:
    directory.mkdir(exist_ok=True)
    config = load(environ={}, overrides={**SMALL, **sections})
    built = build_trainer(
        config, fields=fields, source=source, outlet=Outlet(directory), directory=directory, clock=clock, wall_clock=wall_clock
    )
    source.trainer = built
    return built


def finish(built: Trainer) -> dict[str, Any]:
    try:
        return built.run()
    finally:
        if built.baseline:
            built.baseline.close()


def final_state(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    _, tensors = snapshot.load(snapshot.newest(directory / "snapshots"))
    return tensors


def assert_equal_states(one: Path, other: Path) -> None:
    a, b = final_state(one), final_state(other)
    for stem in sorted({*a, *b} - {"examples"}):
        assert a[stem].keys() == b[stem].keys(), stem
        for name in a[stem]:
            assert np.array_equal(a[stem][name], b[stem][name]), f"{stem} {name}"


def test_the_model_does_not_depend_on_how_polls_fell(tmp_path, stream):
    reports = []
    for seed in (1, 2):
        source = Partitions(split(stream, 3), seed=seed)
        reports.append(finish(trainer(tmp_path / str(seed), source)))
    assert reports[0]["ledger"] == reports[1]["ledger"]
    assert reports[0]["models"] == reports[1]["models"]
    assert_equal_states(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_run_stopped_and_resumed_equals_one_that_went_through_bit_for_bit(tmp_path, stream, partitions):
    whole = finish(trainer(tmp_path / "whole", Partitions(split(stream, partitions))))
    parts = tmp_path / "parts"
    for seed in range(4):
        source = Partitions(split(stream, partitions), seed=seed, stop_after=1500 if seed < 3 else None)
        resumed = trainer(parts, source)
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
    report = finish(trainer(tmp_path, Partitions([stream])))
    assert json.loads((tmp_path / "reports.jsonl").read_text().splitlines()[-1]) == report
    counters = report["counters"]
    assert report["kind"] == "final"
    assert report["examples"] == counters["impressions"] == 6000
    assert counters["clicks"] == len(stream) - 6000
    assert counters["clicks"] == sum(counters[f"clicks_{fate}"] for fate in ("joined", "duplicate", "late", "unmatched"))
    assert report["clicks_late"] == counters["clicks_late"] > 0  # the window is a minute, the delays are longer
    joined = report["models"]["deepfm"]["ctr"] * 6000
    assert joined == pytest.approx(counters["clicks_joined"])
    assert report["click_coverage"] == pytest.approx(counters["clicks_joined"] / counters["clicks"], abs=1e-3)
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
    windows = [line for line in map(json.loads, (tmp_path / "reports.jsonl").read_text().splitlines()) if line["kind"] == "window"]
    assert sum(w["models"]["deepfm"]["count"] for w in windows) <= 6000
    assert all(w["provisional"] is False for w in windows)


def test_the_baseline_learns_a_deterministic_share_and_is_compared_on_it(tmp_path, stream):
    share = {"baseline": {"sample_rate": 0.25}}
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
        sections = {"learn": {"batch_size": size, "threads": 1}, "baseline": {"enabled": False}, "ftrl": {"l1": 0.5}}
        reports.append(finish(trainer(tmp_path / str(size), Partitions([stream], seed=size), **sections)))
    one, other = (report["models"]["ftrl"] for report in reports)
    assert one["count"] == 6000
    assert one == pytest.approx(other, rel=1e-12)
    assert reports[0]["models"]["deepfm"]["logloss"] != reports[1]["models"]["deepfm"]["logloss"]
    assert reports[0]["paired"]["models"] == ["deepfm", "ftrl"]
    states = [final_state(tmp_path / name)["ftrl.model"] for name in ("128", "500")]
    for name, array in states[0].items():
        assert np.array_equal(array, states[1][name]), name


def test_models_that_are_not_wanted_are_in_no_report_and_no_snapshot(tmp_path, stream):
    alone = {"baseline": {"enabled": False}, "ftrl": {"enabled": False}}
    report = finish(trainer(tmp_path, Partitions([stream]), **alone))
    assert report["models"].keys() == {"deepfm"}
    assert (report["paired"]["models"], report["pairs"]) == (["deepfm"], {})
    assert not {"ftrl.model", "baseline"} & final_state(tmp_path).keys()
    with pytest.raises(ConfigError, match="with the models deepfm, not with deepfm, ftrl"):
        trainer(tmp_path, Partitions([stream]), baseline={"enabled": False}).restore(snapshot.newest(tmp_path / "snapshots"))


def test_bad_records_are_counted_kept_and_not_trained(tmp_path, stream):
    junk = pa.array([b"junk", None, b'{"kind":"impression","impression_id":"x\x1b[31m","time":5}'], pa.large_binary())
    mixed = pa.concat_arrays([stream.slice(0, 50), junk, stream.slice(50)])
    clean = finish(trainer(tmp_path / "clean", Partitions([stream])))
    dirty = finish(trainer(tmp_path / "dirty", Partitions([mixed])))
    assert dirty["ledger"] == clean["ledger"]
    assert dirty["models"] == clean["models"]
    counters = dirty["counters"]
    assert (counters["rejected"], counters["rejected.not_json"], counters["rejected.tombstone"]) == (2, 2, 1)
    letters = [json.loads(line) for line in (tmp_path / "dirty" / "dead_letters.jsonl").read_text().splitlines()]
    assert [(letter["offset"], letter["reason"]) for letter in letters] == [("50", "not_json"), ("52", "not_json")]


def test_a_flood_of_bad_records_stops_the_run_instead_of_training_on_the_rest(tmp_path, stream):
    flood = pa.concat_arrays([stream.slice(0, 500), pa.array([b"junk"] * 5000, pa.large_binary()), stream.slice(500)])
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
    packed = pack(pa.array([json.dumps(event).encode() for event in events], pa.large_binary()), events_a_record=6)
    finish(trainer(tmp_path, Partitions([pa.concat_arrays([stream.slice(6, 3), packed, pa.array([b"junk"], pa.large_binary())])])))
    letters = [json.loads(line) for line in (tmp_path / "dead_letters.jsonl").read_text().splitlines()]
    assert [(one["offset"], one.get("event")) for one in letters] == [("3", "1"), ("3", "4"), ("4", None)]
    shown = CliRunner().invoke(main, ["dlq", "show", "--state", str(tmp_path), "--event", "4"]).stdout.splitlines()
    assert len(shown) == 2
    assert "offset 3  event 4  time_out_of_range" in shown[0]
    raw = CliRunner().invoke(main, ["dlq", "show", "--state", str(tmp_path), "--offset", "3", "--event", "1", "--raw"])
    assert raw.stdout_bytes == base64.b64decode(letters[0]["value_base64"])


def test_a_snapshot_of_another_configuration_is_refused_by_name(tmp_path, stream):
    finish(trainer(tmp_path, Partitions([stream.slice(0, 500)])))
    other = trainer(tmp_path, Partitions([stream]), model={**SMALL["model"], "embedding_dim": 5})
    with pytest.raises(ConfigError, match=r"embedding_dim = 4, not 5"):
        other.restore(snapshot.newest(tmp_path / "snapshots"))
    other.baseline.close()


def test_snapshots_by_number_of_examples_name_their_parent_and_old_ones_go(tmp_path, stream):
    finish(trainer(tmp_path, Partitions([stream]), schedule={"snapshot_examples": 1000}, snapshots={"keep": 2}))
    names = snapshot.snapshot_ids(tmp_path / "snapshots")
    assert len(names) == 2
    manifest = snapshot.verify(tmp_path / "snapshots" / names[1])
    assert manifest["parent"] == names[0]
    assert manifest["positions"] == {"clicks:0": len(stream)}
    assert manifest["sequence"] >= 5
    pointer = snapshot.read_pointer(tmp_path / "latest.json")
    assert pointer["snapshot"] == names[1]


class Flags:
    def __init__(self) -> None:
        self.raised = {"report", "snapshot"}

    def due(self, name: str) -> bool:
        due = name in self.raised
        self.raised.discard(name)
        return due


def test_flags_are_served_between_batches(tmp_path, stream):
    built = trainer(tmp_path, Partitions([stream]))
    built._flags = Flags()
    finish(built)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    assert kinds.count("report") == 1
    assert len(snapshot.snapshot_ids(tmp_path / "snapshots")) == 2


@pytest.mark.parametrize(("max_memory", "held"), [("1GB", False), ("4MiB", True)])
def test_a_partition_that_is_far_ahead_is_held_once_what_waits_has_filled_some_of_its_room(tmp_path, stream, max_memory, held):
    class Uneven(Partitions):
        fullest, pauses = 0.0, 0

        def poll(self, timeout_seconds: float) -> Records:
            assert self.trainer
            self.fullest = max(self.fullest, self.trainer.joiner.filled)
            records = super().poll(timeout_seconds)
            late = (records.partition == 1).cumsum() > 5  # of partition 1, five records a poll
            kept = ~((records.partition == 1) & late)
            self._at[1] -= int((~kept).sum())
            return Records(
                *(column[kept] for column in (records.partition, records.offset, records.time)), records.value.filter(pa.array(kept))
            )

        def pause(self, partitions: frozenset[int]) -> None:
            self.pauses += bool(partitions)
            super().pause(partitions)

    source = Uneven(split(stream, 2))
    report = finish(trainer(tmp_path, source, join={"label_window": "1s", "max_memory": max_memory}))
    assert report["examples"] == finish(trainer(tmp_path / "even", Partitions(split(stream, 2)), join={"label_window": "1s"}))["examples"]
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
                self.trainer.stop()
            return super().poll(timeout_seconds)

    source = Live([stream.slice(0, 5000), pa.array([], pa.large_binary())])
    report = finish(trainer(tmp_path, source, clock=lambda: source.now, join={"label_window": "60s", "idle_timeout": "10s"}))
    assert report["examples"] > 3000  # though partition 1 never spoke
    assert report["pending"] > 0  # nothing says yet that their clicks will not come


def test_a_snapshot_that_cannot_be_written_does_not_stop_learning_but_the_last_one_must_succeed(tmp_path, stream):
    built = trainer(tmp_path, Partitions([stream]), schedule={"snapshot_examples": 1000})
    (tmp_path / "snapshots").write_text("in the way")
    with pytest.raises(SnapshotError, match="cannot write snapshot"):
        finish(built)
    last = json.loads((tmp_path / "reports.jsonl").read_text().splitlines()[-1])
    assert last["examples"] == 6000
    assert last["snapshot"] is None
    assert last["counters"]["snapshots_failed"] >= 6


def test_a_model_that_diverges_stops_the_run_and_is_never_published(tmp_path, stream):
    wild = {"learn": {**SMALL["learn"], "table_optimizer": "sgd", "table_learning_rate": 1e30}, "schedule": {"snapshot_examples": 500}}
    with pytest.raises(DataError, match=r"the model diverged: 8 batches in a row"):
        finish(trainer(tmp_path, Partitions([stream]), **wild))
    for name in snapshot.snapshot_ids(tmp_path / "snapshots"):
        _, tensors = snapshot.load(tmp_path / "snapshots" / name)
        assert all(np.isfinite(array).all() for array in tensors["model"].values())


def test_a_model_that_has_learned_nothing_is_kept_but_not_published(tmp_path, stream):
    source = Partitions([stream.slice(0, 300)])
    built = trainer(tmp_path, source)
    built.stop()
    built._take(built.ingest.take(0))
    assert finish(built)["examples"] == 0
    assert len(snapshot.snapshot_ids(tmp_path / "snapshots")) == 1
    assert not (tmp_path / "latest.json").exists()


def test_a_resumed_run_with_nothing_new_writes_no_further_snapshot(tmp_path, stream):
    finish(trainer(tmp_path, Partitions([stream])))
    again = trainer(tmp_path, Partitions([stream]))
    again.restore(snapshot.newest(tmp_path / "snapshots"))
    assert finish(again)["examples"] == 6000
    assert len(snapshot.snapshot_ids(tmp_path / "snapshots")) == 1


def test_a_field_that_no_impression_has_is_warned_of_by_name(tmp_path, stream, caplog):
    fields = [*Simulation(1, seed=0).fields, Field("pubisher", "categorical")]
    with caplog.at_level("WARNING"):
        finish(trainer(tmp_path, Partitions([stream]), fields=fields))
    assert [record.getMessage() for record in caplog.records if "pubisher" in record.getMessage()]
    assert "user_id" not in caplog.text
