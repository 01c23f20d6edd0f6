"""Power loss at any moment leaves a state directory that a run goes on from, exactly."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.power_loss import LOSSES, Disk, Loss
from support.reliability import Outcome
from support.trainers import SIMULATED_FIELDS, SMALL, Partitions, assert_equal_states, finish

from stream_ctr.cli.assembly import build_trainer
from stream_ctr.cli.runs import state_directory
from stream_ctr.config import load
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot, writing_thread
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import read_pointer
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.train.trainer import Trainer

JUNK_EVERY = 50


class Promises(Partitions):
    """A log whose commits are promises: the snapshot of these positions is on the disk."""

    def __init__(self, values: list[pa.LargeBinaryArray]) -> None:
        super().__init__(values)
        self.committed_records = 0

    def commit(self, positions: Mapping[int, int]) -> None:
        super().commit(positions)
        self.committed_records = sum(positions.values())


def records() -> pa.LargeBinaryArray:
    good = pa.concat_arrays([batch.value for batch in Simulation(400, seed=3).batches()])
    parts = []
    for start in range(0, len(good), JUNK_EVERY):
        parts += [good.slice(start, JUNK_EVERY), pa.array([b"junk"], pa.large_binary())]
    return pa.concat_arrays(parts)


def run(state: Path, source: Promises) -> Trainer:
    """Run to the end of the log, from the newest snapshot if there is one."""
    sections = {
        **SMALL,
        "model": {"name": "fm", "embedding_dim": 4, "table_bits": 8},
        "schedule": {"snapshot_examples": 256},
        "snapshots": {"keep": 1},
        "metrics": {"window": "10s"},
    }
    with state_directory(state) as lease:
        built = build_trainer(
            load(environ={}, overrides=sections),
            fields=SIMULATED_FIELDS,
            source=source,
            publisher=Publisher(state, lease=lease),
            directory=state,
        )
        source.trainer = built
        if newest := snapshot.newest(state / "snapshots"):
            built.restore(newest)
        finish(built)
    return built


def contents(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(str(path.relative_to(directory)).encode() + b"\0")
        digest.update(path.read_bytes() if path.is_file() else b"/")
    return digest.hexdigest()


class InTurn:
    """An executor that does the work at once, so that the same moments come in every test."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001 - as an executor does
            done.set_exception(error)
        return done

    def shutdown(self) -> None:
        pass


class States:
    """The distinct states that a power loss may leave, and what each must have."""

    def __init__(self, directory: Path, source: Promises) -> None:
        directory.mkdir()
        self._directory = directory
        self._source = source
        self._rng = random.Random(0)
        self._seen: set[str] = set()
        self.states: list[Path] = []
        self.moments = 0

    def __call__(self, disk: Disk) -> None:
        self.moments += 1
        for loss in LOSSES:
            target = self._directory / f"{self.moments:04d}-{loss}-{len(self.states)}"
            disk.left(target, loss, self._rng)
            digest = contents(target)
            if digest in self._seen:
                shutil.rmtree(target)
                continue
            self._seen.add(digest)
            self.states.append(target)
            self._require_what_was_promised(target / "state", loss)

    def _require_what_was_promised(self, state: Path, loss: Loss) -> None:
        moment = f"{loss}, moment {self.moments}"
        newest = snapshot.newest(state / "snapshots") if state.exists() else None
        manifest = snapshot.verify(newest) if newest else None
        read = sum(manifest.positions.values()) if manifest else 0
        assert read >= self._source.committed_records, moment
        pointer = read_pointer(state / "latest.json") if state.exists() else None
        if pointer:
            path = state / "snapshots" / pointer.snapshot
            snapshot.verify(path, manifest_sha256=pointer.manifest_sha256)
        if manifest:
            assert json.loads((state / "run.json").read_text())["run"] == manifest.run, moment
            assert letters(state) >= junk_before(manifest), moment


def letters(state: Path) -> set[int]:
    path = state / "dead_letters.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    found = set()
    for line in lines:
        try:
            found.add(int(json.loads(line)["offset"]))
        except ValueError:
            continue  # the last one, which was cut
    return found


def junk_before(manifest: Manifest) -> set[int]:
    (position,) = manifest.positions.values()
    return set(range(JUNK_EVERY, position, JUNK_EVERY + 1))


@pytest.mark.fault(
    35, injected="all that was not synced lost, or any part of it, before every system call"
)
@pytest.mark.slow
def test_a_power_loss_at_any_moment_of_a_run_leaves_what_a_run_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool, outcome: Outcome
) -> None:
    values = [records()]
    clean = tmp_path / "clean"
    run(clean, Promises(values))
    source = Promises(values)
    (tmp_path / "disk").mkdir()
    states = States(tmp_path / "states", source)
    monkeypatch.setattr(writing_thread, "ThreadPoolExecutor", InTurn)
    with Disk(tmp_path / "disk", states).watched(monkeypatch):
        run(tmp_path / "disk" / "state", source)
    resumed = states.states if full else random.Random(1).sample(states.states, 3)
    for left in resumed:
        run(left / "state", Promises(values))
        assert_equal_states(clean, left / "state")
    outcome(
        f"{states.moments} moments, {len(states.states)} states: none loses a snapshot whose "
        f"offsets are committed, a dead letter before it, or its pointer; {len(resumed)} of them "
        "resumed, ledger and all state equal",
        times=len(states.states),
    )
