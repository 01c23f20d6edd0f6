"""A snapshot that a run sends to a topic arrives whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.served import ROWS, publish, write_blend, write_served

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.snapshots import base_topic
from stream_ctr.snapshots.base_topic import CHUNK_BYTES, TopicPlace, topic_of
from stream_ctr.snapshots.cache import SnapshotCache
from stream_ctr.snapshots.files import Missing
from stream_ctr.snapshots.mirror import TopicMirror
from stream_ctr.snapshots.places import Unreachable
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.remote import served_files
from stream_ctr.snapshots.scorer import Scorer

TOPIC = "bases"


@dataclass(frozen=True, slots=True)
class Stored:
    offset: int
    key: bytes
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


class Away(Exception):
    """The broker does not answer."""


class Topic:
    """A topic in memory, which is its own producer and the source of its consumers."""

    def __init__(self) -> None:
        self.log: list[Stored] = []
        self.end = 0
        self.away_after: int | None = None
        self.polled = 0

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        partition: int | None = None,
    ) -> None:
        assert (topic, partition) == (TOPIC, 0)
        if self.away_after is not None and self.end >= self.away_after:
            raise Away("no answer")
        self.log.append(Stored(self.end, key or b"", value, tuple(headers)))
        self.end += 1

    def flush(self, timeout_seconds: float) -> None:
        if self.away_after is not None:
            raise Away("no answer")

    def compact(self, up_to: int) -> None:
        """Keep the last record of each key, among those before an offset."""
        last = {record.key: record.offset for record in self.log if record.offset < up_to}
        self.log = [
            record
            for record in self.log
            if record.offset >= up_to or last[record.key] == record.offset
        ]

    def scan(self) -> Topic:
        return self

    def records(self, offset: int) -> Iterator[Stored]:
        for record in [each for each in self.log if each.offset >= offset]:
            self.polled += 1
            yield record

    def close(self) -> None:
        pass


def write(state: Path, sequence: int = 1, **changes: Any) -> Pointer:
    return publish(write_served(state / "snapshots", seed=sequence, sequence=sequence, **changes))


def mirror(state: Path, topic: Topic) -> TopicMirror:
    return TopicMirror(state, TOPIC, topic, model_name="default", unavailable=(Away,))


def fetch(topic: Topic, pointer: Pointer, folder: Path) -> Path:
    cache = SnapshotCache(folder / "cache", served_files(None, "torch"))
    return cache.fetch(TopicPlace(topic.scan, TOPIC, pointer), pointer)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_topic, "CHUNK_BYTES", 1000)


@pytest.mark.usefixtures("small_chunks")
def test_a_snapshot_arrives_through_a_topic(tmp_path: Path) -> None:
    topic = Topic()
    pointer = publish(write_blend(tmp_path / "state" / "snapshots"))
    mirror(tmp_path / "state", topic)()
    assert topic.end > 20
    path = fetch(topic, pointer, tmp_path)
    original = Scorer(tmp_path / "state" / "snapshots" / pointer.snapshot)
    assert Scorer(path).predict(ROWS).tolist() == original.predict(ROWS).tolist()


@pytest.mark.usefixtures("small_chunks")
def test_the_topic_is_read_once_for_all_files(tmp_path: Path) -> None:
    topic = Topic()
    pointer = publish(write_blend(tmp_path / "state" / "snapshots"))
    mirror(tmp_path / "state", topic)()
    fetch(topic, pointer, tmp_path)
    assert topic.polled < 1.1 * topic.end + 10


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_kills_and_compaction_leave_is_a_snapshot_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("topic")
    topic = Topic()
    pointer = write(folder / "state")
    expected = Scorer(folder / "state" / "snapshots" / pointer.snapshot).predict(ROWS).tolist()
    sent = False
    for _ in range(data.draw(st.integers(1, 4))):
        topic.away_after = data.draw(st.none() | st.integers(topic.end, topic.end + 25))
        try:
            mirror(folder / "state", topic)()
        except SnapshotError as error:
            assert "topic 'bases': no answer" in str(error)  # noqa: PT017
        else:
            sent = True
        topic.compact(data.draw(st.integers(0, topic.end)))
    try:
        path = fetch(topic, pointer, folder)
    except SnapshotError:
        assert not sent
    else:
        assert Scorer(path).predict(ROWS).tolist() == expected


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("resent", [1, 4, 7])
def test_a_resend_that_was_killed_leaves_chunks_in_another_order(
    tmp_path: Path, resent: int
) -> None:
    topic = Topic()
    pointer = write(tmp_path / "state")
    mirror(tmp_path / "state", topic)()
    topic.away_after = topic.end + resent
    with pytest.raises(SnapshotError):
        mirror(tmp_path / "state", topic)()
    topic.compact(topic.end)
    assert topic.log[0].offset == resent
    path = fetch(topic, pointer, tmp_path)
    original = Scorer(tmp_path / "state" / "snapshots" / pointer.snapshot)
    assert Scorer(path).predict(ROWS).tolist() == original.predict(ROWS).tolist()


@pytest.mark.usefixtures("small_chunks")
def test_the_last_snapshot_stays_on_a_compacted_topic(tmp_path: Path) -> None:
    topic = Topic()
    work = mirror(tmp_path / "state", topic)
    pointers = []
    for sequence in (1, 2, 3):
        pointers.append(write(tmp_path / "state", sequence))
        work()
        work()
    sent = topic.end
    topic.compact(topic.end)
    assert len(topic.log) == sent // 3
    Scorer(fetch(topic, pointers[2], tmp_path))
    with pytest.raises(Missing, match="does not have snapshots/.*manifest.json, or not yet"):
        fetch(topic, pointers[0], tmp_path)


@pytest.mark.usefixtures("small_chunks")
def test_changed_and_foreign_records_are_never_loaded(tmp_path: Path) -> None:
    topic = Topic()
    pointer = write(tmp_path / "state")
    mirror(tmp_path / "state", topic)()
    log = topic.log
    of_model = [number for number, each in enumerate(log) if b"/model.safetensors/" in each.key]
    at = of_model[1]
    changed = Stored(log[at].offset, log[at].key, b"?" * 1000, log[at].headers)
    for records in ([*log[:at], changed, *log[at + 1 :]], [*log[:at], *log[at + 1 :]]):
        topic.log = records
        with pytest.raises(SnapshotError):
            fetch(topic, pointer, tmp_path)
    rubbish = [
        Stored(0, b"x", b"y", (("__stream_ctr.base.file", b"\xff"),)),
        Stored(0, b"", None, ()),
    ]
    topic.log = [*rubbish, *log]
    Scorer(fetch(topic, pointer, tmp_path))


def test_a_claimed_size_takes_no_memory(tmp_path: Path) -> None:
    topic = Topic()
    pointer = write(tmp_path / "state")
    mirror(tmp_path / "state", topic)()
    first = topic.log[0]
    many = dict(first.headers) | {"__stream_ctr.base.count": b"1000"}
    topic.log = [
        Stored(
            index,
            b"",
            bytes(CHUNK_BYTES),
            tuple((many | {"__stream_ctr.base.index": b"%d" % index}).items()),
        )
        for index in range(100)
    ]
    place = TopicPlace(topic.scan, TOPIC, pointer)
    with pytest.raises(SnapshotError, match="is larger than 10,000,000 bytes"):
        place.read(f"snapshots/{pointer.snapshot}/manifest.json", 10_000_000)


def test_a_broker_that_is_away_is_an_error_that_says_so(tmp_path: Path) -> None:
    pointer = write(tmp_path / "state")

    def away() -> Topic:
        raise Away("no broker answers")

    place = TopicPlace(away, TOPIC, pointer)
    with pytest.raises(Unreachable, match="cannot read kafka://bases: no broker answers"):
        place.read(f"snapshots/{pointer.snapshot}/manifest.json", 1000)


def test_a_topic_is_not_written_by_names(tmp_path: Path) -> None:
    place = TopicPlace(Topic().scan, TOPIC, write(tmp_path / "state"))
    with pytest.raises(ConfigError, match="not written to by names"):
        place.write("x", b"")
    with pytest.raises(ConfigError, match="not written to by names"):
        place.remove("x")
    assert not place.exists("snapshots/another/manifest.json")


def test_the_topic_is_in_the_url() -> None:
    assert [topic_of(url) for url in ("kafka://a.b/", "kafka:a", "s3://x", "")] == [
        "a.b",
        "",
        "",
        "",
    ]
