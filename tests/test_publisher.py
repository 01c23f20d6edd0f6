"""A line or message that cannot be written or sent now does not stop learning, and is not lost."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.manifests import RUN, edit_json, make_newer, sealed, write_snapshot
from support.memory_topic import Away, MemoryTopic, pointers_on
from support.processes import in_child

from stream_ctr.errors import BrokerError, ConfigError, SnapshotError
from stream_ctr.snapshots import publisher as publishing
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.lease import Lease, TakenOver
from stream_ctr.snapshots.line_file import LineFile
from stream_ctr.snapshots.pointer import FORMAT, Pointer, read_pointer
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.snapshot_topic import SnapshotTopic


class Broker:
    """A sink whose broker can go away."""

    def __init__(self) -> None:
        self.away = False
        self.sent: list[tuple[str, bytes]] = []
        self.headers: list[Sequence[tuple[str, bytes]]] = []
        self.keys: list[bytes | None] = []

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        time: int | None = None,
    ) -> None:
        self.flush(0)
        self.sent.append((topic, value))
        self.headers.append(headers)
        self.keys.append(key)

    def flush(self, timeout_seconds: float) -> None:
        if self.away:
            raise Away("the broker does not answer")


def dead_letter(publisher: Publisher, offset: int, *, event: int | None = None) -> None:
    publisher.dead_letter("clicks", 0, offset, b"junk", "not_json", "x", event=event)


def kept_offsets(directory: Path) -> list[str]:
    """Return the offsets of the dead letters in the file."""
    path = directory / "dead_letters.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["offset"] for line in lines]


def write(directory: Path, sequence: int, epoch: int = 1) -> Path:
    return write_snapshot(directory / "snapshots", sequence=sequence, epoch=epoch)


def published(directory: Path) -> Pointer:
    pointer = read_pointer(directory / "latest.json")
    assert pointer
    return pointer


# -- reports and dead letters --------------------------------------------------------------------


def test_no_report_and_no_dead_letter_is_lost_while_the_broker_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker, unavailable=(Away,), metrics_topic="m")
    dead_letter(publisher, 5)  # sent, but its delivery is unknown
    broker.away = True
    publisher.report({"n": 1})
    dead_letter(publisher, 7)
    broker.away = False
    dead_letter(publisher, 9)
    publisher.report({"n": 2})
    assert [topic for topic, _ in broker.sent] == ["clicks.dlq", "clicks.dlq", "m"]
    lines = (tmp_path / "reports.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"n": 1}, {"n": 2}]
    publisher.flush()
    assert kept_offsets(tmp_path) == ["5", "7"]
    assert "2 dead letters that no broker took are in" in caplog.text


def test_dead_letters_that_do_not_arrive_before_a_snapshot_are_in_the_file(tmp_path: Path) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker, unavailable=(Away,))
    dead_letter(publisher, 5)
    broker.away = True
    publisher.deliver_dead_letters()
    assert kept_offsets(tmp_path) == ["5"]


def test_delivered_dead_letters_are_not_kept_again(tmp_path: Path) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker, unavailable=(Away,))
    dead_letter(publisher, 5)
    publisher.deliver_dead_letters()
    broker.away = True
    dead_letter(publisher, 7)
    assert kept_offsets(tmp_path) == ["7"]


def test_the_next_run_sends_a_dead_letter_only_if_the_broker_may_not_have_it(
    tmp_path: Path,
) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker, unavailable=(Away,))
    dead_letter(publisher, 5)
    dead_letter(publisher, 6, event=1)
    publisher.deliver_dead_letters()
    dead_letter(publisher, 7)  # in flight when the process is killed
    broker.keys.clear()
    again = Publisher(tmp_path, sink=broker, unavailable=(Away,))
    for offset, event in ((5, None), (6, 1), (6, 2), (7, None)):
        dead_letter(again, offset, event=event)
    assert broker.keys == [b"clicks-0-6-2", b"clicks-0-7"]
    broker.away = True
    again.deliver_dead_letters()
    broker.away = False
    broker.keys.clear()
    last = Publisher(tmp_path, sink=broker, unavailable=(Away,))
    dead_letter(last, 7)
    assert broker.keys == []
    assert kept_offsets(tmp_path) == ["6", "7"]


def test_dead_letters_in_flight_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_IN_FLIGHT_LETTER_BYTES", 2 * (500 + 4))
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker, unavailable=(Away,))
    for offset in range(4):  # the third one flushes, the fourth is in flight
        dead_letter(publisher, offset)
    broker.away = True
    publisher.deliver_dead_letters()
    assert kept_offsets(tmp_path) == ["3"]


def test_a_dead_letter_that_is_too_large_for_a_broker_is_cut_with_a_header(tmp_path: Path) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker)
    publisher.dead_letter("clicks", 0, 5, b"x" * 2_000_000, "too_large", "x")
    assert [len(value) for _, value in broker.sent] == [900_000]
    assert dict(broker.headers[-1])["__stream_ctr.errors.cut_to"] == b"900000"


def test_the_dead_letters_of_one_record_have_their_own_keys_and_name_their_event(
    tmp_path: Path,
) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker)
    for event in (None, 0, 7):
        publisher.dead_letter("clicks", 2, 5, b"x", "missing_id", "x", event=event)
    assert broker.keys == [b"clicks-2-5", b"clicks-2-5-0", b"clicks-2-5-7"]
    assert [dict(headers).get("__stream_ctr.errors.event") for headers in broker.headers] == [
        None,
        b"0",
        b"7",
    ]


def test_a_report_that_cannot_be_written_is_an_error_at_the_end_only(tmp_path: Path) -> None:
    (tmp_path / "reports.jsonl").mkdir()
    publisher = Publisher(tmp_path)
    publisher.report({"n": 1})
    with pytest.raises(ConfigError, match=r"1 times something was not written.*reports.jsonl"):
        publisher.flush()
    Publisher(tmp_path / "empty").flush()


def test_a_report_that_does_not_fit_on_the_disk_damages_no_other(tmp_path: Path) -> None:
    def report() -> None:
        publisher = Publisher(tmp_path)
        publisher.report({"n": 1})
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        # A longer file fails to grow, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
        publisher.report({"n": 2, "long": "x" * 50_000})
        publisher.report({"n": 3})
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        publisher.report({"n": 4, "long": "x" * 50_000})

    (tmp_path / "reports.jsonl").write_text('{"n": 0}\n{"n": ')  # a crash has left half a line
    assert in_child(report) == 0
    first, half, *others = (tmp_path / "reports.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in (first, *others)] == [0, 1, 3, 4]
    assert half == '{"n": '


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "new\n"), ("old\n", "old\nnew\n"), ("old\nha", "old\nha\nnew\n"), ("h", "h\nnew\n")],
)
def test_a_line_begins_after_the_half_line_before_it(
    tmp_path: Path, before: str, after: str
) -> None:
    (tmp_path / "lines").write_text(before)
    LineFile(tmp_path / "lines").append("new")
    assert (tmp_path / "lines").read_text() == after


def topic_for(topic: MemoryTopic, **options: Any) -> SnapshotTopic:
    """Return a topic as a run sees it that publishes as `default`."""
    options = {"name": "default", "run": RUN, **options}
    return SnapshotTopic("s", sink=topic, reader=topic.reader(), **options)


# -- the pointer ---------------------------------------------------------------------------------


def test_a_pointer_that_does_not_reach_its_topic_is_sent_again_or_is_an_error_at_the_end(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, 1)
    broker = MemoryTopic()
    publisher = Publisher(tmp_path, unavailable=(Away,), snapshot_topic=topic_for(broker))
    broker.away = True
    publisher.publish(path, snapshot.verify(path))
    with pytest.raises(
        BrokerError, match="the pointer to snapshot 00000001-.* did not reach topic 's'"
    ):
        publisher.flush()
    broker.away = False
    publisher.flush()
    assert pointers_on(broker) == [published(tmp_path)]


def test_a_rollback_takes_an_epoch_above_all_others_and_the_next_snapshot_takes_it_too(
    tmp_path: Path,
) -> None:
    first, second, third = (write(tmp_path, sequence, epoch=4) for sequence in (1, 2, 3))
    publisher = Publisher(tmp_path)
    publisher.publish(second, snapshot.verify(second))
    assert published(tmp_path).rank == (4, 2)

    rolled_back = publisher.roll_back(first, snapshot.verify(first))
    assert rolled_back == published(tmp_path)
    assert (rolled_back.snapshot, rolled_back.rank) == (first.name, (5, 1))

    publisher.publish(third, snapshot.verify(third))
    assert (published(tmp_path).snapshot, published(tmp_path).rank) == (third.name, (5, 3))


def test_a_run_of_a_later_epoch_publishes_with_its_own(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    for sequence, epoch in ((1, 2), (2, 7)):
        path = write(tmp_path, sequence, epoch)
        publisher.publish(path, snapshot.verify(path))
    assert published(tmp_path).rank == (7, 2)


def test_an_older_snapshot_than_the_published_one_keeps_its_own_epoch(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    for sequence, epoch in ((5, 9), (2, 4)):
        path = write(tmp_path, sequence, epoch)
        publisher.publish(path, snapshot.verify(path))
    assert published(tmp_path).rank == (4, 2)


def test_a_snapshot_that_is_published_twice_keeps_its_epoch(tmp_path: Path) -> None:
    """A resumed run publishes the snapshot that it resumed from once more."""
    path = write(tmp_path, 3, epoch=2)
    publisher = Publisher(tmp_path)
    for _ in range(2):
        publisher.publish(path, snapshot.verify(path))
        assert published(tmp_path).rank == (2, 3)


def test_the_epoch_without_a_lease_is_above_all_snapshots(tmp_path: Path) -> None:
    assert Publisher(tmp_path).epoch == 1
    write(tmp_path, 1, epoch=6)
    assert Publisher(tmp_path).epoch == 7
    with Lease(tmp_path) as lease:
        assert Publisher(tmp_path, lease=lease).epoch == lease.epoch == 7


def test_old_snapshots_go_but_not_the_published_or_protected_ones(tmp_path: Path) -> None:
    paths = [write(tmp_path, sequence) for sequence in range(1, 7)]
    publisher = Publisher(tmp_path)
    publisher.publish(paths[1], snapshot.verify(paths[1]))
    publisher.retain(2, {paths[2].name})
    kept = [paths[index].name for index in (1, 2, 4, 5)]
    assert snapshot.snapshot_ids(tmp_path / "snapshots") == kept


def test_a_damaged_pointer_is_replaced_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, 1)
    (tmp_path / "latest.json").write_text('{"format": 1}')
    publisher = Publisher(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert publisher.published() is None
        assert publisher.published_manifest() is None
    assert "the published snapshot is unknown: " in caplog.text
    publisher.publish(path, snapshot.verify(path))
    assert published(tmp_path).snapshot == path.name
    assert publisher.published_manifest() == snapshot.verify(path)


def test_the_last_published_snapshot_is_read_again_only_when_the_pointer_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(tmp_path)
    assert publisher.last_published() is None
    path = write_snapshot(tmp_path / "snapshots", sequence=1)
    publisher.publish(path, snapshot.read_manifest(path))
    first = publisher.last_published()
    assert first == publisher.published()
    read: list[Path] = []
    monkeypatch.setattr(publishing, "read_pointer", read.append)
    assert publisher.last_published() is first
    assert read == []
    monkeypatch.undo()
    other = write_snapshot(tmp_path / "snapshots", sequence=2)
    Publisher(tmp_path).publish(other, snapshot.read_manifest(other))  # another process
    found = publisher.last_published()
    assert found
    assert found.snapshot == other.name
    (tmp_path / "latest.json").unlink()
    assert publisher.last_published() is None


def test_a_damaged_pointer_is_logged_once_for_all_reports(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latest.json").write_text("junk")
    publisher = Publisher(tmp_path)
    assert [publisher.last_published() for _ in range(3)] == [None] * 3
    assert caplog.text.count("the published snapshot is unknown") == 1


def test_a_published_snapshot_that_cannot_be_read_counts_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, 1)
    publisher = Publisher(tmp_path)
    publisher.publish(path, snapshot.verify(path))
    (path / "manifest.json").write_text("{}")
    assert publisher.published_manifest() is None
    assert "the published snapshot cannot be read" in caplog.text
    (path / "manifest.json").write_bytes(newer := sealed({"format": 99}))
    digest = sha256(newer).hexdigest()
    edit_json(tmp_path / "latest.json", lambda pointer: pointer.update(manifest_sha256=digest))
    with pytest.raises(NewerFormat):
        publisher.published_manifest()


def test_the_published_snapshot_is_found_in_a_directory_that_was_moved(tmp_path: Path) -> None:
    path = write(tmp_path / "before", 1)
    manifest = snapshot.verify(path)
    Publisher(tmp_path / "before").publish(path, manifest)
    (tmp_path / "before").rename(tmp_path / "after")
    assert Publisher(tmp_path / "after").published_manifest() == manifest


def test_a_pointer_of_a_newer_version_is_never_replaced(tmp_path: Path) -> None:
    first, second = (write(tmp_path, sequence) for sequence in (1, 2))
    publisher = Publisher(tmp_path)
    publisher.publish(first, snapshot.verify(first))
    make_newer(tmp_path / "latest.json")
    before = (tmp_path / "latest.json").read_bytes()
    attempts: list[Any] = [
        lambda: publisher.publish(second, snapshot.verify(second)),
        lambda: publisher.roll_back(second, snapshot.verify(second)),
        lambda: publisher.retain(1, set()),
        publisher.published,
        publisher.published_manifest,
    ]
    for attempt in attempts:
        with pytest.raises(NewerFormat, match=rf"latest\.json has format {FORMAT + 1}"):
            attempt()
    assert (tmp_path / "latest.json").read_bytes() == before
    assert len(snapshot.snapshot_ids(tmp_path / "snapshots")) == 2


def test_no_rollback_next_to_snapshots_of_a_newer_version(tmp_path: Path) -> None:
    """Their epochs are unknown, and the pointer must rank above all of them."""
    first, second = (write(tmp_path, sequence) for sequence in (1, 2))
    make_newer(second / "manifest.json")
    with pytest.raises(NewerFormat):
        Publisher(tmp_path).roll_back(first, snapshot.verify(first))
    assert not (tmp_path / "latest.json").exists()


def test_a_publisher_that_lost_its_lease_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    with Lease(tmp_path) as lost:
        publisher = Publisher(tmp_path, lease=lost)
        with Lease(tmp_path, take_over=True):
            attempts: list[Any] = [
                lambda: publisher.report({"n": 1}),
                lambda: dead_letter(publisher, 5),
                lambda: publisher.publish(path, snapshot.verify(path)),
                lambda: publisher.retain(1, set()),
                publisher.check,
            ]
            for attempt in attempts:
                with pytest.raises(TakenOver):
                    attempt()
    for name in ("reports.jsonl", "dead_letters.jsonl", "latest.json"):
        assert not (tmp_path / name).exists()


def test_publishing_waits_for_another_process_and_gives_up_on_a_frozen_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 1)
    held = os.open(tmp_path / "latest.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    releasing = threading.Timer(0.3, lambda: fcntl.flock(held, fcntl.LOCK_UN))
    releasing.start()
    publisher = Publisher(tmp_path)
    publisher.publish(path, snapshot.verify(path))
    releasing.join()
    assert published(tmp_path).snapshot == path.name

    monkeypatch.setattr(publishing, "_PATIENCE_SECONDS", 0.1)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(SnapshotError, match="another process has been publishing .*is it frozen"):
        publisher.publish(path, snapshot.verify(path))
    os.close(held)
