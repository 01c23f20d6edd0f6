"""Deltas come from files that are replaced, or from a topic, and what is refused is named once."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaAdminClient, TopicPartition
from support.brokers import ApacheBroker
from support.deltas import (
    BASE_SHA256,
    IDENTITY,
    SMALL_PAYLOAD,
    Made,
    Stored,
    chain,
    large,
    made,
    stored,
)
from support.keys import write_keys
from support.manifests import RUN
from support.patience import PATIENCE_SECONDS, wait_until

from stream_ctr.connectors.kafka import (
    KafkaSink,
    RecordFollower,
    client_options,
    ensure_topic,
    pointers,
)
from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import delta_sources
from stream_ctr.snapshots.delta import Delta, DeltaRank
from stream_ctr.snapshots.delta_chain import Apply, Chain
from stream_ctr.snapshots.delta_sources import DeltaSource, FileDeltas, TopicDeltas
from stream_ctr.snapshots.delta_store import FOLDER, DeltaStore
from stream_ctr.snapshots.delta_topic import send
from stream_ctr.snapshots.signing import PublicKey, SigningKey

PLENTY = 1 << 40


def write(directory: Path, *links: Made) -> None:
    store = DeltaStore(directory)
    for link in links:
        store.write(link.header_bytes, link.header, link.payload)


def texts(found: Sequence[Delta | SnapshotError]) -> list[Any]:
    """Return deltas, and the texts of errors."""
    return [str(each) if isinstance(each, SnapshotError) else each for each in found]


def deltas(links: Sequence[Made]) -> list[Delta]:
    return [link.delta for link in links]


def until(
    source: DeltaSource, done: Callable[[list[Any]], object], seconds: float = PATIENCE_SECONDS
) -> list[Any]:
    """Poll until what came satisfies a condition, and return it."""
    found: list[Any] = []
    deadline = time.monotonic() + seconds
    while not done(found):
        assert time.monotonic() < deadline, f"still waiting; so far {texts(found)}"
        found += texts(source.poll(0.2))
    return found


@pytest.fixture
def keys(tmp_path: Path) -> tuple[SigningKey, PublicKey]:
    private, public = write_keys(tmp_path, "trainer")
    return SigningKey(private), PublicKey(public)


# -- files -----------------------------------------------------------------------------------------


def test_deltas_are_returned_once_as_they_are_written(tmp_path: Path) -> None:
    """The state directory, its folder and its index may come later than the reader."""
    state = tmp_path / "state"
    source = FileDeltas(state)
    links = chain(4)
    assert source.poll(0.0) == []
    state.mkdir()
    assert source.poll(0.0) == []
    write(state, *links[:2])
    assert source.poll(0.0) == deltas(links[:2])
    assert source.poll(0.0) == []
    write(state, links[2])
    write(state, links[3])
    assert source.poll(0.0) == deltas(links[2:])
    assert not source.counts


def test_polling_waits_for_a_delta(tmp_path: Path) -> None:
    link = made()
    source = FileDeltas(tmp_path)
    writing = threading.Timer(0.2, lambda: write(tmp_path, link))
    writing.start()
    began = time.monotonic()
    assert source.poll(60.0) == [link.delta]
    assert time.monotonic() - began < 30
    writing.join()


def test_after_rewinding_what_is_kept_comes_again(tmp_path: Path) -> None:
    links = chain(4)
    write(tmp_path, *links)
    source = FileDeltas(tmp_path)
    assert source.poll(0.0) == deltas(links)
    source.rewind()
    assert source.poll(0.0) == deltas(links)
    source.rewind((RUN, links[1].header.rank))
    assert source.poll(0.0) == deltas(links[2:])
    source.rewind(("f" * 32, links[1].header.rank))
    assert source.poll(0.0) == deltas(links)
    DeltaStore(tmp_path).retain({"B": links[2].position}, most_bytes=PLENTY)
    source.rewind()
    assert source.poll(0.0) == deltas(links[3:])


def test_a_poll_returns_no_more_than_it_has_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = chain(5, payloads=[os.urandom(100) for _ in range(5)])
    write(tmp_path, *links)
    monkeypatch.setattr(delta_sources, "POLL_BYTES", 150)
    source = FileDeltas(tmp_path)
    assert [len(source.poll(0.0)) for _ in range(4)] == [2, 2, 1, 0]


@pytest.mark.fault(
    20, injected="a byte of each file of a delta flipped, or the file cut or removed"
)
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "grown", "huge", "removed", "a link"])
def test_a_damaged_file_is_named_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, damage: str
) -> None:
    monkeypatch.setattr(delta_sources, "_RETRY_SECONDS", 0.0)
    links = chain(3)
    write(tmp_path, *links)
    path = tmp_path / FOLDER / f"{links[1].header.rank.name}{suffix}"
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(whole[:-1])
    elif damage == "grown":
        path.write_bytes(whole + b"\n")
    elif damage == "huge":
        os.truncate(path, 1 << 42)
    else:
        path.unlink()
    if damage == "a link":
        (tmp_path / "elsewhere").write_bytes(whole)
        path.symlink_to(tmp_path / "elsewhere")
    source = FileDeltas(tmp_path)
    first, error, third = texts(source.poll(0.0))
    assert (first, third) == (links[0].delta, links[2].delta)
    assert str(path).removesuffix(suffix) in error
    assert source.poll(0.0) == []
    assert source.poll(0.0) == []
    assert source.counts == Counter(damaged=1)
    path.unlink(missing_ok=True)
    path.write_bytes(whole)
    assert source.poll(0.0) == [links[1].delta]


def test_a_damaged_delta_that_is_removed_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_sources, "_RETRY_SECONDS", 0.0)
    links = chain(3)
    write(tmp_path, *links)
    (tmp_path / FOLDER / f"{links[0].header.rank.name}.json").unlink()
    source = FileDeltas(tmp_path)
    assert len(source.poll(0.0)) == 3
    DeltaStore(tmp_path).retain({"B": links[1].position}, most_bytes=PLENTY)
    assert source.poll(0.0) == []
    assert source.counts == Counter(damaged=1)


def test_deltas_that_are_removed_while_they_are_read_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = chain(3)
    write(tmp_path, *links)
    source = FileDeltas(tmp_path)
    list(source._look_at_index())
    DeltaStore(tmp_path).retain({"B": links[1].position}, most_bytes=PLENTY)
    assert list(source._next_deltas()) == []
    assert source.poll(0.0) == [links[2].delta]
    assert not source.counts


def test_a_damaged_index_is_named_once_and_read_when_it_is_whole(tmp_path: Path) -> None:
    links = chain(2)
    write(tmp_path, links[0])
    path = tmp_path / FOLDER / "index.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    source = FileDeltas(tmp_path)
    (error,) = texts(source.poll(0.0))
    assert error.startswith(f"no deltas are read: {path} is damaged: ")
    assert source.poll(0.0) == []
    assert source.counts == Counter(index=1)
    path.write_bytes(whole)
    assert source.poll(0.0) == [links[0].delta]
    write(tmp_path, links[1])
    assert source.poll(0.0) == [links[1].delta]


def test_a_directory_that_begins_anew_is_another_run(tmp_path: Path) -> None:
    first = chain(2)
    write(tmp_path, *first)
    source = FileDeltas(tmp_path)
    assert source.poll(0.0) == deltas(first)
    shutil.rmtree(tmp_path / FOLDER)
    assert source.poll(0.0) == []
    second = chain(2, run="f" * 32)
    write(tmp_path, *second)
    assert source.poll(0.0) == deltas(second)


def test_headers_of_files_are_checked_with_the_key(
    tmp_path: Path, keys: tuple[SigningKey, PublicKey]
) -> None:
    signing, public = keys
    signed = chain(1, sign=signing.sign)
    unsigned = chain(1, first=2, parent=signed[0].sha256)
    write(tmp_path, *signed, *unsigned)
    first, error = texts(FileDeltas(tmp_path, signature=public.verify).poll(0.0))
    assert first == signed[0].delta
    assert "00000003-00000002.json is not signed, and a signature is required" in error


def test_a_file_under_the_name_of_another_delta_is_refused(tmp_path: Path) -> None:
    links = chain(2)
    write(tmp_path, *links)
    for suffix in (".json", ".safetensors"):
        shutil.copy(
            tmp_path / FOLDER / f"{links[0].header.rank.name}{suffix}",
            tmp_path / FOLDER / f"{links[1].header.rank.name}{suffix}",
        )
    _, error = texts(FileDeltas(tmp_path).poll(0.0))
    assert f"has SHA-256 {links[0].sha256}, the index says {links[1].sha256}" in error


# -- a topic in memory -----------------------------------------------------------------------------


class MemoryReader:
    """A topic in memory. Each element is one poll: records, an error, or what was lost."""

    def __init__(self, *polls: list[Stored] | Exception | str) -> None:
        self.polls = list(polls)
        self.read = 0
        self.losses: list[str] = []
        self.sought: list[int | None] = []
        self.closed = False

    def poll(self, timeout_seconds: float) -> list[Stored]:
        if self.read >= len(self.polls):
            return []
        found = self.polls[self.read]
        self.read += 1
        if isinstance(found, Exception):
            raise found
        if isinstance(found, str):
            self.losses.append(found)
            return []
        return found

    def take_losses(self) -> list[str]:
        losses, self.losses = self.losses, []
        return losses

    def seek_to_beginning(self, since_ms: int | None = None) -> None:
        self.read = 0
        self.sought.append(since_ms)

    def close(self) -> None:
        self.closed = True


def all_of(source: TopicDeltas, polls: int = 20) -> list[Any]:
    return texts([each for _ in range(polls) for each in source.poll(0.0)])


def test_a_delta_comes_when_its_last_record_does() -> None:
    first, second = chain(2, payloads=[large(2), SMALL_PAYLOAD])
    records = [*stored(first), *stored(second)]
    reader = MemoryReader(records[:1], records[1:4], records[4:])
    source = TopicDeltas(reader)
    assert [source.poll(0.0) for _ in range(3)] == [[], [first.delta], [second.delta]]
    source.rewind()
    assert all_of(source) == [first.delta, second.delta]
    source.rewind((RUN, first.header.rank))
    assert all_of(source) == [second.delta]
    source.close()
    assert reader.closed


def test_reading_begins_at_the_time_of_a_snapshot_and_after_a_gap_with_the_oldest() -> None:
    links = chain(2, payloads=[large(2), SMALL_PAYLOAD])
    middle = [*stored(links[0])[1:], *stored(links[1])]
    reader = MemoryReader(middle)
    source = TopicDeltas(reader)
    source.rewind(since_ms=100_000)
    assert all_of(source) == [links[1].delta], "the first one, cut off, is no error"
    source.rewind(since_ms=100_000)
    assert "cannot be put together" in all_of(source)[0]
    source.rewind(since_ms=30_000)
    source.rewind()
    assert reader.sought == [40_000, None, 0, None]


def test_a_poll_goes_on_until_something_comes_or_the_time_is_over() -> None:
    link = made(large(2))
    records = stored(link)
    reader = MemoryReader(records[:1], [], records[1:2], [], records[2:])
    assert TopicDeltas(reader).poll(60.0) == [link.delta]


def test_a_topic_that_cannot_be_read_is_said_once_for_as_long_as_it_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = made()
    away = ConnectionError("no Kafka\nbroker answered")
    reader = MemoryReader(away, away, stored(link), away, ConnectionError())
    source = TopicDeltas(reader)
    said = "deltas cannot be read now: no Kafka\\nbroker answered"
    assert all_of(source) == [
        *(said, link.delta, said, "deltas cannot be read now: ConnectionError")
    ]
    assert source.counts == Counter(away=3)


def test_lost_records_are_one_error_and_what_is_there_follows() -> None:
    first, second = chain(2)
    reader = MemoryReader(stored(first), "retention removed offset 3", stored(second))
    source = TopicDeltas(reader)
    assert all_of(source) == [
        *(first.delta, "deltas were lost: retention removed offset 3", second.delta)
    ]
    assert source.counts == Counter(lost=1)


def test_the_deltas_of_other_names_are_left_alone(keys: tuple[SigningKey, PublicKey]) -> None:
    signing, public = keys
    ours = made(model="ours", sign=signing.sign)
    reader = MemoryReader([*stored(made()), *stored(ours, key=b"ours")])
    assert all_of(TopicDeltas(reader, model_name="ours", signature=public.verify)) == [ours.delta]


@given(st.data())
def test_whatever_happens_to_the_records_a_chain_applies_a_prefix_and_then_all(
    data: st.DataObject,
) -> None:
    """Drop, repeat, reorder, flip and cut the records; then read them again as they were sent."""
    links = chain(4, payloads=[large(2, seed) for seed in range(4)])
    sent = [record for link in links for record in stored(link)]
    records = list(sent)
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(records) - 1))
        match data.draw(st.sampled_from(["drop", "repeat", "swap", "flip", "cut"])):
            case "drop" if len(records) > 1:
                del records[at]
            case "repeat":
                records.insert(data.draw(st.integers(0, len(records))), records[at])
            case "swap":
                other = data.draw(st.integers(0, len(records) - 1))
                records[at], records[other] = records[other], records[at]
            case "flip" | "cut" as damage:
                value = records[at].value or b""
                end = bytes([value[-1] ^ 1]) if damage == "flip" and value else b""
                records[at] = Stored(value[:-1] + end, records[at].headers)
    followed = Chain()
    followed.begin(
        BASE_SHA256,
        None,
        run=RUN,
        model="default",
        identity_sha256=IDENTITY,
        epoch=3,
        examples=1000,
    )
    reader = MemoryReader(records)
    source = TopicDeltas(reader)
    applied = []
    for polled in (records, sent):
        reader.polls = [polled]
        source.rewind()
        for each in source.poll(0.0):
            if isinstance(each, Delta) and followed.judge(each.header, each.sha256) == Apply():
                followed.applied(each.header, each.sha256)
                applied.append(each)
        assert applied == deltas(links[: len(applied)])
    assert applied == deltas(links)


# -- a broker --------------------------------------------------------------------------------------


@pytest.fixture
def sink(broker: str, topic: str) -> Iterator[KafkaSink]:
    client = client_options(broker, {})
    ensure_topic(client, topic, retention_ms=3_600_000)
    with closing(KafkaSink(client)) as opened:
        yield opened


def opened(servers: str, topic: str, **arguments: Any) -> TopicDeltas:
    return TopicDeltas(RecordFollower(client_options(servers, {}), topic), **arguments)


def publish(sink: KafkaSink, topic: str, *links: Made) -> None:
    for link in links:
        send(
            sink,
            topic,
            link.header.model.encode(),
            link.header_bytes,
            link.header,
            link.payload,
            flush_seconds=PATIENCE_SECONDS,
        )


def count(number: int) -> Callable[[list[Any]], object]:
    return lambda found: len(found) >= number


def test_deltas_of_many_chunks_travel_through_a_topic(
    broker: str, topic: str, sink: KafkaSink
) -> None:
    links = chain(3, payloads=[large(5), SMALL_PAYLOAD, large(2, seed=1)])
    publish(sink, topic, *links[:2], made(model="other"))
    with closing(opened(broker, topic)) as source:
        assert until(source, count(2)) == deltas(links[:2])
        publish(sink, topic, links[2])
        assert until(source, count(1)) == deltas(links[2:])
        source.rewind()
        assert until(source, count(3)) == deltas(links)
        source.rewind((RUN, DeltaRank(3, 2)))
        assert until(source, count(1)) == deltas(links[2:])
        assert not source.counts


@pytest.mark.slow
def test_reading_a_topic_begins_with_the_first_record_of_a_time(
    kafka_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tansu lists ends that are too low, and so more is read there."""
    monkeypatch.setattr(delta_sources, "_CLOCKS_DIFFER_MS", 0)
    client = client_options(kafka_broker, {})
    ensure_topic(client, topic)
    links = chain(3)
    with closing(KafkaSink(client)) as sink, closing(opened(kafka_broker, topic)) as source:
        publish(sink, topic, *links[:2])
        time.sleep(0.1)
        between_ms = int(1000 * time.time())
        time.sleep(0.1)
        source.rewind(since_ms=between_ms)
        assert source.poll(0.5) == []
        publish(sink, topic, links[2])
        assert until(source, count(1)) == deltas(links[2:])
        source.rewind(since_ms=between_ms - 1)
        assert until(source, count(1)) == deltas(links[2:])
        source.rewind(since_ms=between_ms - 1)
        assert until(source, count(3)) == deltas(links)
        source.rewind(since_ms=1000)
        assert until(source, count(3)) == deltas(links)


def test_two_threads_send_with_a_sink_each(broker: str, topic: str, sink: KafkaSink) -> None:
    """A run sends its reports with one sink and its deltas, in a thread, with another."""
    links = chain(4, payloads=[large(3, seed) for seed in range(4)])

    def send_all() -> None:
        with closing(KafkaSink(client_options(broker, {}))) as own:
            publish(own, topic, *links)

    sending = threading.Thread(target=send_all)
    sending.start()
    reports = 0
    while sending.is_alive():
        sink.send(topic, b"report", key=b"metrics")
        reports += 1
        time.sleep(0.005)
    sink.flush(PATIENCE_SECONDS)
    sending.join()
    assert reports
    with closing(opened(broker, topic)) as source:
        assert until(source, count(4)) == deltas(links)


@pytest.mark.slow
@pytest.mark.fault(5, injected="a broker killed while deltas are followed, and started again")
@pytest.mark.parametrize("renew_seconds", [30.0, 0.3])
def test_following_goes_on_when_a_killed_broker_comes_back(
    apache: ApacheBroker, topic: str, monkeypatch: pytest.MonkeyPatch, renew_seconds: float
) -> None:
    """The consumer finds the broker again, and so does one that takes its place meanwhile."""
    monkeypatch.setattr(pointers, "_RENEW_SECONDS", renew_seconds)
    client = client_options(apache.bootstrap_servers, {})
    ensure_topic(client, topic)
    links = chain(2, payloads=[large(2), large(3)])
    with closing(opened(apache.bootstrap_servers, topic)) as source:
        with closing(KafkaSink(client)) as first:
            publish(first, topic, links[0])
        assert until(source, count(1)) == deltas(links[:1])
        apache.kill()
        try:
            assert [source.poll(0.2) for _ in range(5)] == [[]] * 5
        finally:
            apache.start()
        with closing(KafkaSink(client)) as second:
            publish(second, topic, links[1])
        found = until(source, lambda found: any(isinstance(each, Delta) for each in found))
        # A new consumer may have given up the broker that was away.
        refused = [each for each in found if not isinstance(each, Delta)]
        assert all(each.startswith("deltas cannot be read now: no Kafka") for each in refused)
        assert [each for each in found if isinstance(each, Delta)] == deltas(links[1:])


@pytest.mark.slow
@pytest.mark.fault(27, injected="retention removes deltas before they are read")
def test_retention_that_has_passed_the_reader_is_one_error_and_reading_goes_on(
    kafka_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_options(kafka_broker, {})
    ensure_topic(client, topic)
    links = chain(4, payloads=[large(2, seed) for seed in range(4)])
    with (
        closing(KafkaSink(client)) as sink,
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        closing(RecordFollower(client, topic)) as follower,
    ):
        source = TopicDeltas(follower)
        publish(sink, topic, links[0])
        assert until(source, count(1)) == deltas(links[:1])
        # Three records a delta. Nobody reads while the second is written and removed.
        follower._drop_consumer()
        publish(sink, topic, *links[1:3])
        admin.delete_records({TopicPartition(topic, 0): 6})
        error, third = until(source, count(2))
        assert error == (
            f"deltas were lost: partition 0 of topic '{topic}' does not hold offset 3 any more: "
            "retention removed it, or the topic was created again"
        )
        assert third == links[2].delta
        publish(sink, topic, links[3])
        assert until(source, count(1)) == deltas(links[3:])
        source.rewind()
        assert until(source, count(2)) == deltas(links[2:])


@pytest.mark.slow
@pytest.mark.fault(28, injected="the topic of deltas deleted while it is followed, created again")
def test_a_topic_that_was_deleted_is_said_and_followed_again_when_it_is_there(
    broker: str, topic: str, sink: KafkaSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointers, "_RENEW_SECONDS", 0.5)
    first, second = chain(2, payloads=[large(3), SMALL_PAYLOAD])
    publish(sink, topic, first)
    client = client_options(broker, {})
    with (
        closing(opened(broker, topic)) as source,
        closing(KafkaAdminClient(bootstrap_servers=broker)) as admin,
    ):
        assert until(source, count(1)) == deltas([first])
        admin.delete_topics([topic])
        (error,) = until(source, count(1))
        assert f"topic '{topic}' does not exist" in error
        ensure_topic(client, topic)
        with closing(KafkaSink(client)) as anew:
            publish(anew, topic, second)
        found = until(source, lambda found: second.delta in found)
        assert f"topic '{topic}' was deleted while it was followed" in found[0]
        assert found[-1] == second.delta


@pytest.mark.slow
def test_a_topic_that_was_created_again_between_two_polls_is_read_from_its_beginning(
    kafka_broker: str, topic: str
) -> None:
    client = client_options(kafka_broker, {})
    ensure_topic(client, topic)
    first, second = chain(2, payloads=[large(3), SMALL_PAYLOAD])
    with (
        closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin,
        closing(opened(kafka_broker, topic)) as source,
    ):
        with closing(KafkaSink(client)) as sink:
            publish(sink, topic, first)
        assert until(source, count(1)) == deltas([first])
        admin.delete_topics([topic])
        wait_until(lambda: ensure_topic(client, topic))
        with closing(KafkaSink(client)) as sink:
            publish(sink, topic, second)
        found = until(source, lambda found: second.delta in found)
        assert source.counts["lost"] == 1
        assert found[-1] == second.delta


def test_a_consumer_that_reads_nothing_is_replaced_and_reads_on(
    broker: str, topic: str, sink: KafkaSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointers, "_RENEW_SECONDS", 0.2)
    links = chain(2, payloads=[large(2), large(2, seed=1)])
    publish(sink, topic, links[0])
    with closing(RecordFollower(client_options(broker, {}), topic)) as follower:
        source = TopicDeltas(follower)
        assert until(source, count(1)) == deltas(links[:1])
        before = follower._consumer

        def is_replaced() -> bool:
            assert source.poll(0.1) == []
            return follower._consumer is not before

        wait_until(is_replaced)
        publish(sink, topic, links[1])
        assert until(source, count(1)) == deltas(links[1:])
        assert not source.counts


@pytest.mark.slow
@pytest.mark.fault(20, injected="a byte of a stored chunk flipped on the broker's disk")
def test_a_batch_that_the_broker_has_damaged_costs_its_delta_alone(
    apache: ApacheBroker, topic: str
) -> None:
    client = client_options(apache.bootstrap_servers, {})
    ensure_topic(client, topic)
    links = chain(3, payloads=[large(2, seed) for seed in range(3)])
    with closing(KafkaSink(client)) as sink:
        publish(sink, topic, *links)
    apache.stop()
    (segment,) = apache.segments(topic)
    data = bytearray(segment.read_bytes())
    chunk = links[1].payload[1000:1100]
    at = data.index(chunk)
    data[at] ^= 1
    segment.write_bytes(bytes(data))
    apache.start()
    with closing(opened(apache.bootstrap_servers, topic)) as source:
        found = until(source, lambda found: links[2].delta in found)
    assert [each for each in found if isinstance(each, Delta)] == [links[0].delta, links[2].delta]
    assert any("cannot be read" in each for each in found if isinstance(each, str))


def test_random_bytes_in_the_topic_are_named_and_harm_nothing(
    embedded_broker: str, topic: str
) -> None:
    client = client_options(embedded_broker, {})
    ensure_topic(client, topic)
    rng = random.Random(0)
    link = made(large(2))
    with closing(KafkaSink(client)) as sink:
        for number in range(5):
            sink.send(topic, rng.randbytes(number + 1), key=b"default")
        publish(sink, topic, link)
    with closing(opened(embedded_broker, topic)) as source:
        found = until(source, lambda found: link.delta in found)
        assert source.counts == Counter(unreadable=5)
    assert [str(each)[:28] for each in found[:5]] == [
        f"the record at offset {offset} of pa"[:28] for offset in range(5)
    ]
