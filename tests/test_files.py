"""Files of a state directory that are no files, or far too large, stop nobody who reads them."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.commands import command, succeed
from support.lineage import QUICK
from support.manifests import RUN, edit_json, write_snapshot
from support.reliability import Outcome
from support.served import publish, write_served

from stream_ctr.errors import SnapshotError
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import files, snapshot
from stream_ctr.snapshots.contract import LARGEST_EPOCH
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.lineage import run_of
from stream_ctr.snapshots.pointer import pointer_for, read_pointer, write_pointer
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.report_log import ReportLog, read_reports
from stream_ctr.snapshots.subscriber import Subscriber

SPARSE_BYTES = 40 << 30


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in a block that waits for longer."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def sparse(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, SPARSE_BYTES)


def endless_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


HARM = pytest.mark.parametrize("harm", [pipe, sparse, endless_link])
HOW = "a FIFO, a sparse file of 40 GB, a link to /dev/zero as latest.json, run.json, manifest.json"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with two snapshots, of which the second is published."""
    publish(write_served(tmp_path / "snapshots", sequence=1))
    publish(write_served(tmp_path / "snapshots", sequence=2))
    assert run_of(tmp_path) == RUN
    return tmp_path


@HARM
@pytest.mark.security("a file that is none stops nobody", how=HOW)
def test_a_document_that_is_no_file_is_passed_over_at_once(
    state: Path, harm: Callable[[Path], None], outcome: Outcome
) -> None:
    first, second = snapshot.snapshot_ids(state / "snapshots")
    for name in ("latest.json", "run.json", f"snapshots/{second}/manifest.json"):
        harm(state / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with within(10.0):
        with pytest.raises(SnapshotError, match=r"latest\.json"):
            read_pointer(state / "latest.json")
        found = snapshot.newest(state / "snapshots")
        assert found
        assert found.name == first
        with Lease(state) as lease:
            assert lease.run == RUN
            publisher = Publisher(state, lease=lease)
            assert publisher.published() is None
            publisher.publish(found, snapshot.verify(found))
        subscriber = Subscriber(state)
        assert subscriber.next(0.0)
        harm(state / "latest.json")
        assert subscriber.next(0.0) is None
        assert sum(subscriber.failures.values()) == 1
        assert subscriber.predict({"app": "maps"}) > 0
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 200
    outcome("refused without waiting or reading it; the snapshot before is used", times=3)


@HARM
def test_a_signature_or_a_tensor_file_that_is_no_file_is_refused_at_once(
    state: Path, harm: Callable[[Path], None]
) -> None:
    first, _ = snapshot.snapshot_ids(state / "snapshots")
    path = state / "snapshots" / first
    with within(10.0):
        harm(path / "manifest.sig")
        with pytest.raises(SnapshotError, match=r"manifest\.sig"):
            snapshot.verify(path, signature=lambda data, signature: None)
        harm(path / "model.safetensors")
        with pytest.raises(SnapshotError, match=r"model\.safetensors"):
            snapshot.load(path)


def test_a_pipe_in_place_of_a_log_of_reports_or_of_a_lock_stops_nobody(state: Path) -> None:
    pipe(state / "reports.jsonl")
    pipe(state / "latest.lock")
    path = state / "snapshots" / snapshot.snapshot_ids(state / "snapshots")[0]
    with within(10.0):
        with pytest.raises(OSError, match="it is not a regular file"):
            ReportLog(state).append("{}")
        with pytest.raises(OSError, match="it is not a regular file"):
            list(read_reports(state))
        with pytest.raises(SnapshotError, match="cannot publish in .*: "):
            Publisher(state).publish(path, snapshot.verify(path))


def test_only_a_document_of_a_possible_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"x" * 100)
    assert files.read_document(path, 100) == b"x" * 100
    with pytest.raises(SnapshotError, match=r"run\.json has 100 bytes, .* largest .* has 99"):
        files.read_document(path, 99)
    with pytest.raises(files.Missing, match="cannot read .*nothing: No such file"):
        files.read_document(tmp_path / "nothing")


@pytest.mark.security(
    "a forged epoch does not lock a run out",
    how="latest.json of epoch 2^63 - 1, and of the largest that is read",
)
def test_an_epoch_that_no_run_reaches_is_damage(tmp_path: Path, outcome: Outcome) -> None:
    log = tmp_path / "log.jsonl"
    state = tmp_path / "state"
    Simulation(2000, seed=0).write_jsonl(log)
    arguments = ["run", "--source", log, "--state", state, *QUICK]
    succeed(*arguments)
    latest = state / "latest.json"
    edit_json(latest, lambda pointer: pointer.update(epoch=2**63 - 1))
    assert "latest.json is damaged" in succeed(*arguments).stderr
    published = read_pointer(latest)
    assert published
    assert published.epoch == 1
    edit_json(latest, lambda pointer: pointer.update(epoch=LARGEST_EPOCH))
    refused = command(*arguments)
    assert refused.exit_code == 6
    assert f"no epoch is left in {state}" in " ".join(refused.stderr.split())
    outcome("the one is replaced with a warning; the other ends the start: exit 6, and a way out")


def test_a_rollback_and_a_take_over_stay_below_the_largest_epoch(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "snapshots", epoch=LARGEST_EPOCH - 2)
    with Lease(tmp_path) as lease:
        assert lease.epoch == LARGEST_EPOCH - 1
        with pytest.raises(SnapshotError, match="no epoch is left"):
            lease.raise_epoch(LARGEST_EPOCH)
    pointer = Publisher(tmp_path).roll_back(path, snapshot.verify(path))
    assert pointer.epoch == LARGEST_EPOCH
    write_pointer(
        tmp_path / "latest.json", pointer_for(path, snapshot.verify(path), epoch=LARGEST_EPOCH)
    )
    with pytest.raises(SnapshotError, match="no epoch is left"):
        Publisher(tmp_path).roll_back(path, snapshot.verify(path))
