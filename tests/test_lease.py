"""One trainer on a state directory: a second is refused, and one that lost it writes nothing more."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.lineage import SMALL, newest, published
from support.patience import PATIENCE_SECONDS, started, wait_until

from stream_ctr.cli.main import main
from stream_ctr.errors import ConfigError
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.lease import Lease, TakenOver


def test_a_second_lease_is_refused_and_names_the_holder(tmp_path):
    with (
        Lease(tmp_path),
        pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .*--take-over"),
    ):
        Lease(tmp_path)
    Lease(tmp_path).close()  # free again


def test_each_lease_has_a_higher_epoch_also_when_nothing_was_written_under_it(tmp_path):
    found = []
    for _ in range(3):
        with Lease(tmp_path) as lease:
            found.append(lease.epoch)
    assert found == [1, 2, 3]


def test_the_epoch_is_above_that_of_every_snapshot_and_of_what_is_published(tmp_path):
    path = snapshot.write(
        tmp_path / "snapshots", tensors={}, manifest={"epoch": 7}, snapshot_id=snapshot.new_id(1, 0)
    )
    with Lease(tmp_path) as lease:
        assert lease.epoch == 8
    told = {"model": "m", "sequence": 1, "examples": 1, "event_time_ms": 0, "created_ms": 0}
    snapshot.write_pointer(tmp_path / "latest.json", snapshot.pointer_for(path, told, epoch=20))
    with Lease(tmp_path) as lease:
        assert lease.epoch == 21


def test_who_was_taken_over_finds_out_and_the_new_holder_is_named(tmp_path):
    old = Lease(tmp_path)
    old.check()
    new = Lease(tmp_path, take_over=True)
    assert new.epoch == old.epoch + 1
    new.check()
    with pytest.raises(TakenOver, match=f"taken over by process {os.getpid()}"):
        old.check()
    old.close()  # which must not free what is the new holder's
    with pytest.raises(ConfigError, match="in use"):
        Lease(tmp_path)
    new.close()


def test_a_lock_that_was_removed_is_a_lease_that_was_lost(tmp_path):
    with Lease(tmp_path) as lease:
        (tmp_path / "lock").unlink()
        with pytest.raises(TakenOver, match="is gone"):
            lease.check()


def obey_modes() -> None:
    """Root may write anywhere; without this capability it may not."""
    if os.geteuid() == 0:
        drop_from_bounding_set, cap_dac_override = 24, 1
        assert ctypes.CDLL(None).prctl(drop_from_bounding_set, cap_dac_override, 0, 0, 0) == 0


@pytest.mark.fault(21, injected="state directory with mode 0555; lock held by another process")
@pytest.mark.slow
def test_a_state_directory_that_cannot_be_written_is_an_error_at_the_start(tmp_path, outcome):
    log = tmp_path / "log.jsonl"
    Simulation(10, seed=0).write_jsonl(log)
    state = tmp_path / "state"
    state.mkdir(mode=0o555)
    command = [
        sys.executable,
        "-m",
        "stream_ctr",
        "run",
        "--source",
        str(log),
        "--state",
        str(state),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=obey_modes
    )
    assert done.returncode == 3, done.stderr
    assert f"cannot write in the state directory {state}" in done.stderr
    assert "Traceback" not in done.stderr
    with Lease(tmp_path / "held"):
        result = CliRunner().invoke(
            main, ["run", "--source", str(log), "--state", str(tmp_path / "held")]
        )
    assert result.exit_code == 3
    assert f"in use by process {os.getpid()}" in result.output
    outcome(
        "exit 3 at once; the message names the directory, or the holder's process and host", times=2
    )


def start(state: Path, log: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "stream_ctr",
        "run",
        "--source",
        str(log),
        "--state",
        str(state),
        *SMALL,
        *options,
    ]
    return started(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))


@pytest.mark.fault(9, injected="a second `run` while the first one learns")
@pytest.mark.fault(
    10, injected="SIGSTOP of A between two snapshots, B with --take-over to the end, SIGCONT of A"
)
@pytest.mark.slow
def test_a_frozen_trainer_that_wakes_after_a_takeover_writes_nothing_and_ends(tmp_path, outcome):
    log, state = tmp_path / "log.jsonl", tmp_path / "state"
    Simulation(40_000, seed=2).write_jsonl(log)
    frequent = ["-X", "schedule.snapshot_examples=1024", "-X", "schedule.report_every=100ms"]
    a = start(state, log, *frequent)
    wait_until(lambda: (state / "latest.json").exists())
    assert a.poll() is None
    os.kill(a.pid, signal.SIGSTOP)
    refused = start(state, log)
    assert refused.wait(PATIENCE_SECONDS) == 3
    assert f"in use by process {a.pid}" in (refused.stderr.read() if refused.stderr else "")

    b = start(state, log, "--take-over", *frequent)
    assert b.wait(PATIENCE_SECONDS) == 0, b.stderr.read() if b.stderr else ""
    before = {path: path.stat().st_mtime_ns for path in state.rglob("*") if path.is_file()}
    left = newest(state)
    os.kill(a.pid, signal.SIGCONT)
    _, said = a.communicate(timeout=PATIENCE_SECONDS)
    assert a.returncode == 3, said
    assert f"was taken over by process {b.pid}" in said
    assert {path: path.stat().st_mtime_ns for path in state.rglob("*") if path.is_file()} == before
    assert newest(state) == left
    pointed = published(state)
    assert pointed is not None
    assert (
        pointed["examples"]
        == 40_000
        == json.loads((state / "reports.jsonl").read_text().splitlines()[-1])["examples"]
    )
    outcome(
        "the second is refused and names the holder; A finds B's lease, changes no file, publishes nothing, exit 3"
    )
