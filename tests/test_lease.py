"""One trainer holds a state directory: a second is refused, and one that lost it stops writing."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import forks
from support.lineage import QUICK, newest, published
from support.manifests import RUN, make_newer, manifest, sealed, write_snapshot
from support.patience import PATIENCE_SECONDS, started, wait_until
from support.reliability import Outcome

from stream_ctr.cli.main import main
from stream_ctr.cli.runs import state_directory
from stream_ctr.errors import ConfigError, DataError
from stream_ctr.failpoint import VARIABLE
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import lease as leases
from stream_ctr.snapshots import lineage, snapshot
from stream_ctr.snapshots import manifest as manifests
from stream_ctr.snapshots import pointer as pointers
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.lease import Lease, TakenOver, epochs
from stream_ctr.snapshots.pointer import pointer_for, write_pointer

FORMATS = {"manifest.json": manifests.FORMAT, "latest.json": pointers.FORMAT}


def test_a_second_lease_is_refused_and_names_the_holder(tmp_path: Path) -> None:
    with (
        Lease(tmp_path),
        pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .*--take-over"),
    ):
        Lease(tmp_path)
    Lease(tmp_path).close()  # it is free again


def test_each_lease_has_a_higher_epoch_even_if_nothing_was_written(tmp_path: Path) -> None:
    found = []
    for _ in range(3):
        with Lease(tmp_path) as lease:
            found.append(lease.epoch)
    assert found == [1, 2, 3]


def test_the_epoch_is_above_that_of_every_snapshot_and_of_the_pointer(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "snapshots", sequence=1, epoch=7)
    write_snapshot(tmp_path / "snapshots", sequence=2, epoch=2)
    with Lease(tmp_path) as lease:
        assert lease.epoch == 8
    write_pointer(tmp_path / "latest.json", pointer_for(path, manifest(), epoch=20))
    with Lease(tmp_path) as lease:
        assert lease.epoch == 21


def test_damaged_snapshots_and_pointers_have_no_epoch(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "snapshots", sequence=1, epoch=7)
    damaged = write_snapshot(tmp_path / "snapshots", sequence=2, epoch=9)
    (damaged / "manifest.json").write_text("{}")
    (tmp_path / "latest.json").write_text("{}")
    assert list(epochs(tmp_path)) == [7]


@pytest.mark.parametrize("document", ["manifest.json", "latest.json"])
def test_a_directory_of_a_newer_version_is_not_taken_and_not_locked(
    tmp_path: Path, document: str
) -> None:
    path = write_snapshot(tmp_path / "snapshots")
    write_pointer(tmp_path / "latest.json", pointer_for(path, manifest()))
    newer = path / document if document == "manifest.json" else tmp_path / document
    make_newer(newer)
    with pytest.raises(NewerFormat, match=f"{newer} has format {FORMATS[document] + 1}"):
        Lease(tmp_path)
    newer.write_text("{}")
    (tmp_path / "run.json").write_bytes(sealed({"format": lineage.FORMAT, "run": RUN}))
    Lease(tmp_path).close()


@pytest.mark.parametrize("document", ["manifest.json", "latest.json"])
def test_a_run_on_a_directory_of_a_newer_version_exits_6_and_changes_nothing(
    tmp_path: Path, document: str
) -> None:
    """An older snapshot that would verify is there, and is not resumed from."""
    log = tmp_path / "log.jsonl"
    state = tmp_path / "state"
    Simulation(600, seed=0).write_jsonl(log)

    def run(*options: str) -> Result:
        arguments = ["run", "--source", str(log), "--state", str(state), *QUICK, *options]
        return CliRunner().invoke(main, arguments)

    first = run("-X", "schedule.snapshot_examples=256")
    assert first.exit_code == 0, first.output
    names = snapshot.snapshot_ids(state / "snapshots")
    assert len(names) > 1
    newest_snapshot = state / "snapshots" / names[-1]
    changed = newest_snapshot / document if document == "manifest.json" else state / document
    make_newer(changed)

    def contents() -> dict[str, bytes]:
        files = [path for path in state.rglob("*") if path.is_file() and path.name != "lock"]
        return {str(path): path.read_bytes() for path in files}

    before = contents()
    result = run()
    assert result.exit_code == 6, result.output
    assert (
        f"{changed} has format {FORMATS[document] + 1}, and this version of stream-ctr reads "
        f"formats up to {FORMATS[document]}: "
        "install the version that wrote it" in " ".join(result.output.split())
    )
    assert contents() == before


def test_a_holder_that_was_taken_over_finds_out_and_the_new_one_is_named(
    tmp_path: Path, impatient: None
) -> None:
    old = Lease(tmp_path)
    old.check()
    new = Lease(tmp_path, take_over=True)
    assert new.epoch == old.epoch + 1
    new.check()
    with pytest.raises(TakenOver, match=f"taken over by process {os.getpid()}"):
        old.check()
    old.close()  # this must not release the lease of the new holder
    with pytest.raises(ConfigError, match="in use"):
        Lease(tmp_path)
    new.close()


def test_a_lease_whose_lock_was_removed_is_lost(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        (tmp_path / "lock").unlink()
        with pytest.raises(TakenOver, match="cannot be read .No such file"):
            lease.check()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A take-over goes on at once, though the holder in this process does not end."""
    monkeypatch.setattr(leases, "_LEAVE_SECONDS", 0.1)


def test_a_takeover_waits_until_the_former_holder_has_ended(tmp_path: Path) -> None:
    def work(held: Lease) -> None:
        with contextlib.suppress(TakenOver), held:
            while True:
                held.check()
                time.sleep(0.01)
        ends.append(time.monotonic())

    class Ending(Lease):
        def close(self) -> None:
            time.sleep(0.3)  # it has a snapshot in hand
            write_snapshot(tmp_path / "snapshots", sequence=1, epoch=self.epoch + 4)
            super().close()

    ends: list[float] = []
    former = Ending(tmp_path)
    thread = threading.Thread(target=work, args=[former])
    thread.start()
    with Lease(tmp_path, take_over=True) as successor:
        assert snapshot.snapshot_ids(tmp_path / "snapshots")
        assert successor.epoch == former.epoch + 5
        successor.check()
    thread.join()


def test_a_takeover_does_not_wait_for_ever_for_a_holder_that_is_frozen(
    tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    with Lease(tmp_path), Lease(tmp_path, take_over=True) as successor:
        successor.check()
    assert "has not ended within 0.1 s, and may be frozen" in caplog.text


def test_of_two_takeovers_the_last_one_holds_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_LEAVE_SECONDS", 0.5)

    def take_over_too(seconds: float) -> None:
        monkeypatch.setattr(time, "sleep", sleep)
        with contextlib.ExitStack() as stack:
            held.append(stack.enter_context(Lease(tmp_path, take_over=True)))
            stack.pop_all()

    held: list[Lease] = []
    sleep = time.sleep
    with Lease(tmp_path):
        monkeypatch.setattr(time, "sleep", take_over_too)
        with pytest.raises(TakenOver):
            Lease(tmp_path, take_over=True)
    held[0].check()
    held[0].close()


@pytest.mark.fault(
    10, injected="the lock is lost, as on a network file system, and another trainer gets it"
)
def test_a_holder_whose_lock_the_file_system_gave_to_another_finds_out(
    tmp_path: Path, outcome: Outcome
) -> None:
    former = Lease(tmp_path)
    fcntl.flock(former._fd, fcntl.LOCK_UN)
    former.check()  # nobody else holds it yet
    with Lease(tmp_path) as successor:
        with pytest.raises(TakenOver, match=f"taken over by process {os.getpid()}"):
            former.check()
        successor.check()
        assert successor.epoch == former.epoch + 1
    with pytest.raises(TakenOver):  # also when the other one has ended
        former.check()
    former.close()
    outcome("the former holder reads the other's token in the lock and writes nothing more")


@pytest.mark.parametrize(
    "damage", [b"", b"[1]", b"[" * 4000, b'{"epoch": "x"}', b'{"epoch": 9223372036854775807}']
)
def test_a_damaged_lock_has_no_epoch_and_does_not_end_a_start(
    tmp_path: Path, damage: bytes
) -> None:
    (tmp_path / "lock").write_bytes(damage)
    with Lease(tmp_path) as lease:
        assert lease.epoch == 1


def obey_modes() -> None:
    """Drop the capability with which root may write anywhere."""
    if os.geteuid() == 0:
        drop_from_bounding_set = 24
        cap_dac_override = 1
        assert ctypes.CDLL(None).prctl(drop_from_bounding_set, cap_dac_override, 0, 0, 0) == 0


@pytest.mark.fault(21, injected="state directory with mode 0555; lock held by another process")
@pytest.mark.slow
def test_a_state_directory_that_cannot_be_written_is_an_error_at_the_start(
    tmp_path: Path, outcome: Outcome
) -> None:
    log = tmp_path / "log.jsonl"
    state = tmp_path / "state"
    Simulation(10, seed=0).write_jsonl(log)
    state.mkdir(mode=0o555)
    arguments = ["run", "--source", str(log), "--state"]
    done = subprocess.run(
        [sys.executable, "-m", "stream_ctr", *arguments, str(state)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=obey_modes,
    )
    assert done.returncode == 3, done.stderr
    assert f"cannot write in the state directory {state}" in done.stderr
    assert "Traceback" not in done.stderr
    with Lease(tmp_path / "held"):
        result = CliRunner().invoke(main, [*arguments, str(tmp_path / "held")])
    assert result.exit_code == 3
    assert f"in use by process {os.getpid()}" in result.output
    outcome(
        "exit 3 at once; the message names the directory, or the holder's process and host", times=2
    )


def start(state: Path, log: Path, *options: str, failpoint: str = "") -> subprocess.Popen[str]:
    arguments = ["run", "--source", str(log), "--state", str(state), *QUICK, *options]
    environment = {**os.environ, VARIABLE: failpoint}
    return started(forks.start(*arguments, env=environment, stderr=subprocess.PIPE, text=True))


def errors_of(process: subprocess.Popen[str]) -> str:
    return process.stderr.read() if process.stderr else ""


def modification_times(state: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in state.rglob("*") if path.is_file()}


@pytest.mark.fault(9, injected="a second `run` while the first one learns")
@pytest.mark.fault(
    10, injected="SIGSTOP of A between two snapshots, B with --take-over to the end, SIGCONT of A"
)
@pytest.mark.slow
def test_a_frozen_trainer_that_wakes_after_a_takeover_writes_nothing_and_ends(
    tmp_path: Path, outcome: Outcome
) -> None:
    log = tmp_path / "log.jsonl"
    state = tmp_path / "state"
    Simulation(6000, seed=2).write_jsonl(log)
    frequent = ["-X", "schedule.snapshot_examples=1024", "-X", "schedule.report_every=100ms"]
    # It waits after the first snapshot, so that it is frozen before the end on any machine.
    frozen = start(state, log, *frequent, failpoint="learn.before:12=sleep:5")
    wait_until(lambda: (state / "latest.json").exists())
    time.sleep(1)  # until it has let go of the lock that it holds to publish
    assert frozen.poll() is None
    os.kill(frozen.pid, signal.SIGSTOP)
    refused = start(state, log)
    assert refused.wait(PATIENCE_SECONDS) == 3
    assert f"in use by process {frozen.pid}" in errors_of(refused)

    successor = start(state, log, "--take-over", *frequent)
    assert successor.wait(PATIENCE_SECONDS) == 0, errors_of(successor)
    before = modification_times(state)
    last = newest(state)
    os.kill(frozen.pid, signal.SIGCONT)
    _, errors = frozen.communicate(timeout=PATIENCE_SECONDS)
    assert frozen.returncode == 3, errors
    assert f"was taken over by process {successor.pid}" in errors
    assert modification_times(state) == before
    assert newest(state) == last
    served = published(state)
    assert served is not None
    report = json.loads((state / "reports.jsonl").read_text().splitlines()[-1])
    assert served.examples == 6000 == report["examples"]
    outcome(
        "the second is refused and names the holder; "
        "A finds B's lease, changes no file, publishes nothing, exit 3"
    )


@pytest.mark.fault(9, injected="`run --take-over` beside a run that learns and writes snapshots")
@pytest.mark.slow
def test_a_run_that_takes_over_from_one_that_learns_goes_on_where_it_ended(
    tmp_path: Path, outcome: Outcome
) -> None:
    log = tmp_path / "log.jsonl"
    state = tmp_path / "state"
    Simulation(6000, seed=2).write_jsonl(log)
    frequent = ["-X", "schedule.snapshot_examples=256", "-X", "join.max_memory=4MB"]
    former = start(state, log, *frequent, failpoint="learn.before:30=sleep:2")
    wait_until(lambda: len(snapshot.snapshot_ids(state / "snapshots")) > 1)
    successor = start(state, log, "--take-over", *frequent)
    assert former.wait(PATIENCE_SECONDS) == 3
    assert f"was taken over by process {successor.pid}" in errors_of(former)
    assert successor.wait(PATIENCE_SECONDS) == 0, errors_of(successor)
    last = newest(state)
    assert last is not None
    start(tmp_path / "clean", log, *frequent).wait(PATIENCE_SECONDS)
    clean = newest(tmp_path / "clean")
    assert (last.examples, last.ledger) == (6000, clean.ledger if clean else None)
    outcome("the first ends with exit 3, the other waits for it and goes on; ledger equal")


# -- a start that fails --------------------------------------------------------------------------


def fail_to_start(state: Path, do: Callable[[Path], object]) -> None:
    """Hold the directory, do something in it, and fail."""
    try:
        with state_directory(state):
            do(state)
            raise DataError("no start")
    except DataError:
        return


def test_a_start_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    fail_to_start(tmp_path / "runs" / "state", lambda state: (state / "spill").mkdir())
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_removes_nothing_that_was_there_or_was_written(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    (tmp_path / "empty").mkdir()
    fail_to_start(tmp_path, lambda state: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]
    for _ in range(2):
        fail_to_start(tmp_path, lambda state: (state / "reports.jsonl").touch())
        assert {"lock", "mine", "reports.jsonl"} <= {path.name for path in tmp_path.iterdir()}


def test_a_former_holder_removes_nothing(tmp_path: Path, impatient: None) -> None:
    former = Lease(tmp_path)
    with Lease(tmp_path, take_over=True):
        former.abandon()
        assert (tmp_path / "lock").exists()
    former.close()
