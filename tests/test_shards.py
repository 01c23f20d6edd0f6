"""A table that ranks hold together: its files, and snapshots of it."""

from __future__ import annotations

import os
import re
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import command, succeed
from support.delta_chains import assert_chains_hold
from support.lineage import QUICK, last_report
from support.manifests import LEARNER, edit_manifest, manifest, write_snapshot
from support.rank_runs import RankRun, run_on_ranks
from support.ranks import on_ranks
from support.served import ROWS as IMPRESSIONS
from support.served import publish, write_served
from support.shards import HeldRows, HeldTable, in_shards, make_one_rank, table
from support.snapshots import TENSORS, crash_at_each_step, equal_tensors, flip_bit
from support.trainers import (
    SMALL,
    Partitions,
    Sections,
    assert_equal_states,
    finish,
    trainer,
)

from stream_ctr.cli import assembly
from stream_ctr.cli.main import main
from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.errors import SnapshotError
from stream_ctr.failpoint import EXIT_CODE, RANK_VARIABLE, VARIABLE
from stream_ctr.learn.onnx_graph import build_graph
from stream_ctr.learn.shard_files import StoredTable, read_rows, shards_of
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.cache import SnapshotCache
from stream_ctr.snapshots.compaction import compact
from stream_ctr.snapshots.export import export_snapshot
from stream_ctr.snapshots.mirror import mirror_once
from stream_ctr.snapshots.places import LocalPlace
from stream_ctr.snapshots.remote import served_files
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.snapshot_writer import Cut, NotFinite, SnapshotWriter, Written
from stream_ctr.train.trainer import Surroundings, Trainer

ROWS = 128
DENSE = {"dense.bias": np.ones((), np.float32), "intercept": np.ones(2)}
FM = msgspec.structs.replace(LEARNER, model="fm", table_bits=6)
OPTIMIZER = {"steps": np.array([3, 0, 9])}


def cut(
    sequence: int, *, held: dict[str, HeldTable] | None = None, seed: int = 0, **dense: Any
) -> Cut:
    """Return a cut of a DeepFM: of a run in one process, or one whose tables ranks hold."""
    model: dict[str, Any] = {**DENSE, **dense}
    if held is None:
        model = {"table": table(ROWS, seed=seed), **model}
    tensors = {**TENSORS, "model": model, "optimizer": OPTIMIZER}
    described = manifest(sequence=sequence, weights_sha256="", beside={})
    shards = {stem: each.copy for stem, each in (held or {}).items()}
    return Cut(tensors, described, {0: 7}, {}, shards)


def written_by_one(root: Path, sequence: int = 1, *, seed: int = 0) -> Written:
    """Return the snapshot that a run in one process writes."""
    writer = SnapshotWriter(root)
    writer.begin(cut(sequence, seed=seed))
    written = writer.take(wait=True)
    writer.close()
    assert written
    return written


def take(writer: SnapshotWriter) -> Written:
    written = writer.take(wait=True)
    assert written
    return written


def shard_names(rows: int = ROWS) -> list[str]:
    return [shard.name for shard in shards_of("model", rows)]


class EveryThird:
    """Raise the flag of deltas each third time that it is asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def due(self, name: str) -> bool:
        self.asked += name == "delta"
        return name == "delta" and self.asked % 3 == 0


class Alone:
    """A table in shards of a run with one rank, in this process."""

    def __init__(self, rows: int = ROWS, *, seed: int = 0) -> None:
        team = Team(Ranks.alone(), {"rows": HeldRows})
        self.table = HeldTable(team, rows=rows, seed=seed)

    def write(self, root: Path, sequence: int = 1, **dense: Any) -> Path:
        writer = SnapshotWriter(root)
        writer.begin(cut(sequence, held={"model": self.table}, **dense))
        path = take(writer).path
        writer.close()
        return path


# -- on several ranks ------------------------------------------------------------------------------


def _led(ranks: Ranks, lead: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `lead` returns on rank 0. The others follow it."""
    team = Team(ranks, {"rows": HeldRows})
    if ranks.rank:
        team.follow()
        return None
    try:
        return lead(team, *arguments)
    finally:
        team.close()


def _failure(writer: SnapshotWriter, cut: Cut, expected: type[Exception]) -> str:
    writer.begin(cut)
    with pytest.raises(expected) as caught:
        writer.take(wait=True)
    return str(caught.value)


def _lead(team: Team, root: Path, plain: Path) -> dict[str, Any]:
    held = HeldTable(team, rows=ROWS, seed=5)
    writer = SnapshotWriter(root)
    found: dict[str, Any] = {}
    held.spoil(1, "full")
    found["full"] = _failure(writer, cut(1, held={"model": held}), SnapshotError)
    found["left"] = sorted(path.name for path in root.iterdir())
    held.spoil(1, "nan")
    found["nan"] = _failure(writer, cut(2, held={"model": held}), NotFinite)
    found["left"] += sorted(path.name for path in root.iterdir())
    held.spoil(-1, "mend")
    table = snapshot.load(plain, stems=["model"], stored=True)[1]["model"]["table"]
    assert isinstance(table, StoredTable)
    held.load(table)
    writer.begin(cut(3, held={"model": held}))
    found["written"] = take(writer).path
    additional = HeldTable(team, rows=16, seed=1)
    additional.spoil(0, "nan")
    both = replace(
        cut(4, held={"model": held, "fm.model": additional}),
        manifest=manifest(sequence=4, weights_sha256="", beside={"fm": FM}),
    )
    both.tensors["fm.model"] = DENSE
    both.tensors["fm.optimizer"] = OPTIMIZER
    writer.begin(both)
    found["omitted"] = take(writer)
    additional.spoil(-1, "mend")
    manifest_of_both = msgspec.structs.replace(both.manifest, snapshot="00000005-x", sequence=5)
    writer.begin(replace(both, manifest=manifest_of_both))
    found["both"] = take(writer).path
    writer.close()
    return found


@pytest.mark.slow
@pytest.mark.fault(19, injected="a file size limit on one rank while all write a snapshot")
def test_ranks_write_together_what_one_process_writes(
    tmp_path: Path,
) -> None:
    plain = written_by_one(tmp_path / "plain")
    root = tmp_path / "snapshots"
    root.mkdir()
    found = on_ranks(3, _led, _lead, root, plain.path)[0]
    assert re.search(
        r"cannot write snapshot 00000001-\S+: rank 1: cannot write "
        r"model\.shard-21-of-64\.safetensors: .*File too large",
        found["full"],
    )
    assert "not finite" in found["nan"]
    assert found["left"] == []
    sharded = snapshot.verify(found["written"])
    assert {*sharded.files} >= {*shard_names(), "model.safetensors"}
    assert sharded.weights_sha256 == plain.manifest.weights_sha256
    assert sharded.serving_sha256 == plain.manifest.serving_sha256
    assert equal_tensors(snapshot.load(found["written"])[1], snapshot.load(plain.path)[1])
    assert found["omitted"].not_finite == ("fm",)
    assert not any(name.startswith("fm.") for name in found["omitted"].manifest.files)
    mended = table(16, seed=1)
    mended[16 // 3 - 1, -1] = 0.0  # the last value of rank 0
    assert np.array_equal(snapshot.load(found["both"])[1]["fm.model"]["table"], mended)
    assert not [path for path in root.iterdir() if path.name.startswith("tmp-")]


# -- files -----------------------------------------------------------------------------------------


def harmed(path: Path, other: Path, how: str) -> None:
    """Do harm to the shards of the snapshot at `path`; `other` is another one of the same run."""
    name, next_name = shard_names()[7:9]
    if how == "missing":
        (path / name).unlink()
    elif how == "flipped":
        flip_bit(path / name, -1)
    elif how == "shorter":
        os.truncate(path / name, 100)
    elif how == "of another snapshot":
        shutil.copyfile(other / name, path / name)
    elif how == "swapped":
        (path / name).rename(path / "x")
        (path / next_name).rename(path / name)
        (path / "x").rename(path / next_name)
    elif how == "a link":
        (path / name).rename(path.parent / "elsewhere")
        (path / name).symlink_to(path.parent / "elsewhere")


@pytest.mark.fault(3, injected="shards missing, changed, cut, swapped, or of another snapshot")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "is missing, the manifest names it"),
        ("flipped", "has SHA-256 .*, the manifest says"),
        ("shorter", "has 100 bytes, the manifest says"),
        ("of another snapshot", "has SHA-256 .*, the manifest says"),
        ("swapped", "has SHA-256 .*, the manifest says"),
        ("a link", "is not a regular file"),
    ],
)
def test_a_damaged_shard_is_named_by_all_who_read_it(
    tmp_path: Path, how: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = Alone(seed=1).write(tmp_path, 1)
    path = Alone().write(tmp_path, 2)
    stored = StoredTable.found(path, "model", snapshot.digests(snapshot.read_manifest(path)))
    harmed(path, good, how)
    named = rf"model\.shard-0[78]-of-64\.safetensors {reason}"
    for read in (snapshot.verify, snapshot.load):
        with pytest.raises(SnapshotError, match=named):
            read(path)
    with pytest.raises(SnapshotError, match=r"model\.shard-0[78]-of-64\.safetensors"):
        stored.read(range(0, 32))
    assert np.array_equal(stored.read(range(32, ROWS)), table(ROWS)[32:])
    assert snapshot.newest(tmp_path) == good
    assert re.search(named, caplog.text)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda files: files.pop("model.shard-63-of-64.safetensors"),
            r"manifest\.json: shard model\.shard-63-of-64\.safetensors is missing",
        ),
        (
            lambda files: files.update(
                {"model.shard-00-of-65.safetensors": files["model.shard-00-of-64.safetensors"]}
            ),
            r"manifest\.json: shard model\.shard-00-of-64\.safetensors is one too many",
        ),
        (
            lambda files: files.pop("model.safetensors"),
            r"manifest\.json lists shards of model\.safetensors, and not that file",
        ),
    ],
)
def test_a_manifest_lists_all_shards_of_a_table_and_no_others(
    tmp_path: Path, change: Callable[[Any], object], reason: str
) -> None:
    path = Alone().write(tmp_path)
    edit_manifest(path, lambda document: change(document["files"]))
    for read in (snapshot.verify, snapshot.load, snapshot.read_manifest):
        with pytest.raises(SnapshotError, match=reason):
            read(path)


def test_a_table_is_in_shards_or_in_the_file_of_its_model_but_not_in_both(tmp_path: Path) -> None:
    path = Alone().write(tmp_path, table=np.zeros((1, 16), np.float32))
    with pytest.raises(SnapshotError, match=r"model\.safetensors has a table, which is in shards"):
        snapshot.load(path)


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, ROWS), count=st.integers(0, ROWS))
def test_any_rows_are_read_alike_from_shards_and_from_a_whole_file(
    both: tuple[StoredTable, StoredTable], first: int, count: int
) -> None:
    rows = range(first, min(first + count, ROWS))
    expected = table(ROWS)[first : rows.stop]
    for stored in both:
        assert stored.shape == (ROWS, 16)
        assert np.array_equal(stored.read(rows), expected)
        out = np.full((len(rows), 16), -1.0, np.float32)
        assert stored.read(rows, out=out) is out
        assert np.array_equal(out, expected)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredTable, StoredTable]:
    """The same table in shards and in a whole file."""
    root = tmp_path_factory.mktemp("both")
    found = []
    for path in (Alone().write(root, 1), written_by_one(root, 2).path):
        tensors = snapshot.load(path, stems=["model", "optimizer"], stored=True)[1]
        assert np.array_equal(tensors["model"]["intercept"], np.ones(2))
        assert np.array_equal(tensors["optimizer"]["steps"], OPTIMIZER["steps"])
        stored: Any = tensors["model"]["table"]
        assert isinstance(stored, StoredTable)
        assert np.array_equal(np.asarray(stored), table(ROWS))
        found.append(stored)
    return found[0], found[1]


def test_a_whole_file_is_compared_with_its_digest_wherever_it_was_changed(
    both: tuple[StoredTable, StoredTable], tmp_path: Path
) -> None:
    whole = both[1]
    data = (whole.folder / "model.safetensors").read_bytes()
    for position in (3, 30, len(data) // 2, len(data) - 1):
        (tmp_path / "model.safetensors").write_bytes(data)
        flip_bit(tmp_path / "model.safetensors", position)
        with pytest.raises(SnapshotError, match=r"model\.safetensors (has SHA-256|is not a safe)"):
            read_rows(tmp_path, "model", whole.files, shape=whole.shape, rows=range(2))


def test_a_table_of_another_shape_is_refused(both: tuple[StoredTable, StoredTable]) -> None:
    for stored in both:
        for shape in ((ROWS * 2, 8), (ROWS // 2, 16), (ROWS, 15)):
            with pytest.raises(SnapshotError, match=r"'table' has shape \(\d+, 16\), expected"):
                read_rows(stored.folder, "model", stored.files, shape=shape, rows=range(2))
    with pytest.raises(SnapshotError, match=r"65 rows does not have 64 shards of one size"):
        read_rows(both[0].folder, "model", both[0].files, shape=(65, 16), rows=range(2))


def test_memory_is_taken_for_the_rows_of_a_rank_alone(tmp_path: Path) -> None:
    """Whether its table is in a whole file or not, and also while other tensors are read."""
    rows = 1 << 15
    whole = {"table": np.zeros((rows, 16), np.float32), "dense.bias": np.ones((), np.float32)}
    path = write_snapshot(tmp_path, {"model": whole})
    tracemalloc.start()
    stored: Any = snapshot.load(path, stored=True)[1]["model"]["table"]
    found = stored.read(range(512))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nbytes == 1 << 15
    assert peak < whole["table"].nbytes


def test_small_tables_have_a_shard_for_each_row(tmp_path: Path) -> None:
    held = Alone(16).table
    writer = SnapshotWriter(tmp_path)
    writer.begin(cut(1, held={"model": held}))
    path = take(writer).path
    writer.close()
    assert {*shard_names(16)} < {*snapshot.verify(path).files}
    assert np.array_equal(snapshot.load(path)[1]["model"]["table"], table(16))


def test_servers_get_the_shards_from_a_mirror(tmp_path: Path) -> None:
    root = tmp_path / "state" / "snapshots"
    whole = write_served(root)
    path = in_shards(whole, 2)
    pointer = publish(path)
    mirror_once(f"file://{tmp_path / 'mirror'}", tmp_path / "state", pointer)
    cache = SnapshotCache(tmp_path / "cache", served_files(None, "torch"))
    fetched = cache.fetch(LocalPlace(tmp_path / "mirror"), pointer)
    names = {"manifest.json", "model.safetensors", *shard_names()}
    assert {file.name for file in fetched.iterdir()} == names
    expected = Scorer(whole)
    scorer = Scorer(fetched)
    assert scorer.predict(IMPRESSIONS).tolist() == expected.predict(IMPRESSIONS).tolist()
    assert scorer.serving_sha256() == expected.serving_sha256()
    cache.close()


@pytest.mark.slow
@pytest.mark.fault(2, injected="death before every system call that touches the disk: shards")
def test_a_crash_at_any_step_leaves_the_snapshot_before_or_a_complete_new_one(
    tmp_path: Path,
) -> None:
    old = written_by_one(tmp_path).path
    new = tmp_path / manifest(sequence=2).snapshot
    seen = set()

    def inspect() -> None:
        found = snapshot.newest(tmp_path)
        seen.add(found)
        assert found in (old, new)
        if found == new:
            assert np.array_equal(snapshot.load(new)[1]["model"]["table"], table(16))
            os.rename(new, tmp_path / "tmp-done")
        snapshot.clean(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [old.name]

    def write() -> None:
        writer = SnapshotWriter(tmp_path)
        writer.begin(cut(2, held={"model": Alone(16).table}))
        take(writer)

    assert crash_at_each_step(write, inspect) >= 30
    assert seen == {old, new}


def test_shards_are_on_disk_before_the_manifest_and_it_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(fd: int) -> None:
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def recorded_rename(source: Path, target: Path) -> None:
        order.append(f"{Path(source).name} moves")
        rename(source, target)

    alone = Alone(16)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    name = alone.write(tmp_path).name
    unfinished = f"tmp-{snapshot.OWN}-{name}"
    shards = shard_names(16)
    assert order[-20:] == [
        *(f"{shard} moves" for shard in shards),
        "manifest.json",
        unfinished,
        f"{unfinished} moves",
        tmp_path.name,
    ]
    assert {*order[:-20]} == {*shards, *(f"{stem}.safetensors" for stem in cut(1).tensors)}


# -- runs ------------------------------------------------------------------------------------------

RUN: Sections = {
    "schedule": {"snapshot_examples": 1000},
    "snapshots": {"keep": 50, "delta_every": "1s", "onnx": True},
    "model": {**SMALL["model"], "beside": ("fm", "lr")},
}


def run(directory: Path, records: Any, *, sharded: bool, stop_after: int | None = None) -> Trainer:
    """Go on with a run, in one process or with tables that are held in shards."""
    with pytest.MonkeyPatch.context() as patch:
        if sharded:
            patch.setattr(assembly, "make_learner", make_one_rank)
        source = Partitions([records], stop_after=stop_after)
        built = trainer(directory, source, surroundings=Surroundings(flags=EveryThird()), **RUN)
        if before := snapshot.newest(directory / "snapshots"):
            built.restore(before)
        finish(built)
    return built


@pytest.mark.slow
def test_a_run_with_shards_equals_one_without_and_all_who_read_snapshots_read_its(
    tmp_path: Path, stream: Any
) -> None:
    """With deltas, an additional model, a logistic regression, and copies that were served."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, stream, sharded=False)
    run(parts, stream, sharded=False, stop_after=2000)
    built = run(parts, stream, sharded=True)
    assert_equal_states(whole, parts)
    last, expected = (snapshot.read_manifest(newest(each)) for each in (parts, whole))
    assert last.ledger == expected.ledger
    assert last.weights_sha256 == expected.weights_sha256
    assert last.serving_sha256 == expected.serving_sha256
    assert assert_chains_hold(parts) >= 2
    held = [name for path in all_snapshots(parts) for name in names_of(path)]
    assert {"model.shard-00-of-64.safetensors", "fm.model.shard-63-of-64.safetensors"} < {*held}
    assert any(re.fullmatch(r"served\.\d+\.model\.shard-63-of-64\.safetensors", n) for n in held)
    # Serving, exports and compactions.
    assert "model.onnx" in held
    exported = export_snapshot(newest(parts), tmp_path / "exported", build_graph)
    compacted = compact(parts, tmp_path / "compacted", build_graph).path
    found = [predicted(path) for path in (newest(whole), newest(parts), exported, compacted)]
    assert found == [found[0]] * 4
    assert not any("shard" in name for name in (*names_of(exported), *names_of(compacted)))
    assert Scorer(newest(parts)).serving_sha256() == {"model": last.serving_sha256["model"]}
    # A model that goes back, and a run in one process that goes on.
    learner: Any = built.state.learners["deepfm"]
    rows = learner.table.rows.clone()
    learner.table.rows.zero_()
    built.state.guards["deepfm"].restore(newest(parts), "it was spoilt", trained=6000)
    assert torch.equal(learner.table.rows, rows)
    resumed = trainer(parts, Partitions([stream]), **RUN)
    resumed.restore(newest(parts))
    assert torch.equal(learner.table.rows, resumed.state.learners["deepfm"].table.rows)  # type: ignore[attr-defined]
    shown = CliRunner().invoke(main, ["snapshots", "show", str(newest(parts))]).output
    assert re.search(
        r"\nmodel\.shard-00-of-64\.safetensors \.\.\. model\.shard-63-of-64\.safetensors  "
        r"[\d,]+ bytes in 64 files\n +table +F32 +\[64, 16\]",
        shown,
    )


def all_snapshots(directory: Path) -> list[Path]:
    root = directory / "snapshots"
    return [root / name for name in snapshot.snapshot_ids(root)]


def newest(directory: Path) -> Path:
    return all_snapshots(directory)[-1]


def names_of(path: Path) -> list[str]:
    return [*snapshot.read_manifest(path, any_name=True).files]


def predicted(path: Path) -> list[float]:
    rows = [{"rating": float(n % 5), "hour": str(n)} for n in range(50)]
    found: list[float] = Scorer(path, on_invalid="score").predict(rows).tolist()
    return found


# -- runs on several ranks -------------------------------------------------------------------------

OPTIONS = [
    *(*QUICK, "-X", "model.name=fm"),
    *("-X", "schedule.snapshot_examples=1024", "-X", "snapshots.delta_every=0.2s"),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    Simulation(4000, seed=5).write_jsonl(path)
    return path


@pytest.fixture(scope="module")
def clean(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run in one process."""
    state = tmp_path_factory.mktemp("clean") / "state"
    succeed("run", "--source", log, "--state", state, *OPTIONS)
    return state


@pytest.mark.slow
@pytest.mark.fault(19, injected="a rank that cannot write a shard, once in a run")
def test_a_run_on_ranks_goes_on_when_one_cannot_write_and_its_deltas_lead_to_its_snapshots(
    log: Path, clean: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    cannot = {VARIABLE: "snapshot.file:40=out-of-memory", RANK_VARIABLE: "1"}
    arguments = ["run", "--source", log, "--state", state, *OPTIONS]
    ranks = run_on_ranks(tmp_path / "ranks", 2, *arguments, env=cannot)
    assert re.search(
        r"cannot write snapshot 00000002-\S+: rank 1: cannot write model\.shard-39-of-64\.safeten",
        ranks.said(0),
    )
    assert not list((state / "snapshots").glob("tmp-*"))
    ours, theirs = snapshot.read_manifest(newest(state)), snapshot.read_manifest(newest(clean))
    assert last_report(state)["counters"]["snapshots_failed"] == 1
    assert ours.weights_sha256 == theirs.weights_sha256
    assert ours.serving_sha256 == theirs.serving_sha256
    assert ours.ledger == theirs.ledger
    assert {*shard_names()} < {*ours.files}
    assert assert_chains_hold(state) >= 1
    for path in all_snapshots(state):
        snapshot.verify(path)
    (newest(state) / shard_names()[50]).unlink()
    done = command("snapshots", "verify", newest(state))
    assert done.exit_code == 6
    assert "model.shard-50-of-64.safetensors is missing" in done.output


@pytest.mark.slow
@pytest.mark.fault(37, injected="death of a rank that writes its shards of a snapshot")
def test_a_rank_that_dies_while_it_writes_leaves_the_snapshot_before(
    log: Path, clean: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    arguments = ["run", "--source", log, "--state", state, *OPTIONS]
    die = {VARIABLE: "snapshot.file:40", RANK_VARIABLE: "1"}
    ranks = RankRun(tmp_path / "ranks", 2, *arguments, env=die)
    assert ranks.wait() == [1, EXIT_CODE]
    assert len(all_snapshots(state)) == 1
    # Rank 0 removes what the others wrote. Had it died too, the next run would.
    unfinished = state / "snapshots" / "tmp-1-model"
    unfinished.mkdir()
    (unfinished / shard_names()[0]).write_bytes(b"a part of it")
    run_on_ranks(tmp_path / "again", 3, *arguments)
    assert not list((state / "snapshots").glob("tmp-*"))
    ours, theirs = snapshot.read_manifest(newest(state)), snapshot.read_manifest(newest(clean))
    assert (ours.ledger, ours.weights_sha256) == (theirs.ledger, theirs.weights_sha256)
