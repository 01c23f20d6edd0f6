"""A subscriber on another machine serves what the run published, bit for bit, or what it had."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec import structs
from support.delta_runs import DeltaRun, Truth, blend_manifest, served, truth_of
from support.keys import write_keys
from support.manifests import RUN
from support.memory_topic import topic_of
from support.other_machine import NoOtherMachine, OtherMachine
from support.patience import PATIENCE_SECONDS, wait_until
from support.served import ROWS, publish, write_served
from support.web_servers import FaultyServer, web_server

from stream_ctr.cli.main import main
from stream_ctr.connectors import kafka
from stream_ctr.errors import ConfigError
from stream_ctr.snapshots import base_topic, delta_topic, places, remote
from stream_ctr.snapshots.cache import SnapshotCache
from stream_ctr.snapshots.mirror import TopicMirror, mirror_at
from stream_ctr.snapshots.places import open_place
from stream_ctr.snapshots.pointer import Pointer, encode_pointer
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.remote import Downloads, served_files
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.snapshots.subscriber import Subscriber


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def server(state: Path) -> Iterator[FaultyServer]:
    with FaultyServer(state) as found:
        yield found


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_POINTER_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_INDEX_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_RETRY_SECONDS", 0.05)


def subscriber_at(url: str, tmp_path: Path, **options: Any) -> Subscriber:
    return Subscriber(url, cache=tmp_path / "cache", **options)


def follow(subscriber: Subscriber, truth: Truth) -> None:
    """Follow until the subscriber serves exactly this."""

    def reached() -> bool:
        subscriber.next(0.05)
        return subscriber.pointer is not None and served(subscriber) == truth

    wait_until(reached, 60, lambda: subscriber.health)


# -- snapshots at a URL --------------------------------------------------------------------------


@pytest.mark.slow
def test_snapshots_of_pythons_web_server_are_loaded_in_turn(state: Path, tmp_path: Path) -> None:
    run = DeltaRun(state, described=blend_manifest)
    run.learn()
    first = run.snapshot()
    with web_server(state) as url:
        subscriber = subscriber_at(url, tmp_path, deltas=False)
        assert subscriber.next(PATIENCE_SECONDS) == first
        assert served(subscriber) == run.truths[first.snapshot]
        run.learn()
        second = run.snapshot()
        assert subscriber.next(PATIENCE_SECONDS) == second
        assert served(subscriber) == run.truths[second.snapshot]
    assert subscriber.path
    assert (tmp_path / "cache") in subscriber.path.parents


@pytest.mark.slow
def test_the_model_serves_on_while_the_place_hangs_and_closing_takes_no_longer(
    state: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_SILENT_SECONDS", 1.0)
    publish(write_served(state / "snapshots"))
    with subscriber_at(server.url, tmp_path) as subscriber:
        assert subscriber.wait(PATIENCE_SECONDS)
        expected = subscriber.predict(ROWS).tolist()
        server.silent.set()
        asked = sum(server.asked.values())
        wait_until(lambda: sum(server.asked.values()) > asked)
        began = time.monotonic()
        for _ in range(50):
            assert subscriber.predict(ROWS).tolist() == expected
        assert time.monotonic() - began < 1.0
        wait_until(lambda: subscriber.failures["source"])
        assert "no answer in time" in str(subscriber.refusal)
        server.silent.clear()
        server.released.set()
        publish(write_served(state / "snapshots", seed=2, sequence=2))
        wait_until(lambda: subscriber.pointer and subscriber.pointer.sequence == 2)
    assert time.monotonic() - began < 60


def test_closing_ends_a_download(state: Path, server: FaultyServer, tmp_path: Path) -> None:
    publish(write_served(state / "snapshots"))
    server.only = "model.safetensors"
    server.delay_seconds = 0.1
    server.delay_bytes = 10
    with subscriber_at(server.url, tmp_path):
        wait_until(lambda: list((tmp_path / "cache").rglob("tmp-model*")))
        began = time.monotonic()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("fault", ["changed", "status", "break"])
def test_what_is_damaged_on_the_way_is_not_loaded_and_is_tried_again(
    state: Path, server: FaultyServer, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_RETRY_SECONDS", 0.01)
    first = publish(write_served(state / "snapshots"))
    subscriber = subscriber_at(server.url, tmp_path)
    assert subscriber.next(PATIENCE_SECONDS) == first
    expected = subscriber.predict(ROWS).tolist()
    second = publish(write_served(state / "snapshots", seed=2, sequence=2))
    server.only = "model.safetensors"
    server.changed = fault == "changed"
    server.status = 500 if fault == "status" else 0
    server.break_after = 0 if fault == "break" else None
    wait_until(lambda: subscriber.next(0.05) or subscriber.failures["snapshot"])
    assert (subscriber.pointer, subscriber.predict(ROWS).tolist()) == (first, expected)
    assert subscriber.health.awaited == second.snapshot
    server.changed, server.status, server.break_after = False, 0, None
    assert subscriber.next(PATIENCE_SECONDS) == second
    assert subscriber.predict(ROWS).tolist() != expected


def test_signatures_are_required_at_a_url(
    state: Path, server: FaultyServer, tmp_path: Path
) -> None:
    private, public = write_keys(tmp_path, "own")
    unsigned = subscriber_at(server.url, tmp_path, public_key=public)
    publish(write_served(state / "snapshots"))
    assert unsigned.next(0.0) is None
    assert "is not signed" in str(unsigned.refusal)
    assert not any(path.startswith("/snapshots") for path in server.asked)
    shutil.rmtree(state / "snapshots")
    run = DeltaRun(state, sign=SigningKey(private).sign)
    run.learn()
    pointer = run.snapshot()
    assert unsigned.next(PATIENCE_SECONDS) == pointer


def test_the_command_follows_a_url(state: Path, server: FaultyServer, tmp_path: Path) -> None:
    pointer = publish(write_served(state / "snapshots"))
    arguments = ["subscribe", "--state", server.url, "--cache", str(tmp_path / "c"), "--once"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert (line["snapshot"], line["verified"]) == (pointer.snapshot, True)
    assert line["path"] == str(tmp_path / "c" / pointer.manifest_sha256 / pointer.snapshot)


def test_a_url_that_cannot_be_opened_ends_the_command(tmp_path: Path) -> None:
    for url, message in (("ftp://host/x", "its scheme is one of"), ("s3://b/x", "needs s3fs")):
        with contextlib.suppress(ModuleNotFoundError):
            __import__("s3fs")
            continue
        result = CliRunner().invoke(main, ["subscribe", "--state", url, "--once"])
        assert result.exit_code == 3
        assert message in result.output
    with pytest.raises(ConfigError, match="its scheme is one of"):
        Subscriber("ftp://host/x")


# -- pointers of a topic -------------------------------------------------------------------------


def downloads(tmp_path: Path, **options: Any) -> Downloads:
    return Downloads(SnapshotCache(tmp_path / "cache", served_files(None, "torch")), **options)


def test_a_pointer_of_a_topic_leads_to_its_url_where_its_path_does_not_exist(
    state: Path, tmp_path: Path
) -> None:
    url = f"memory://{uuid.uuid4().hex}/run"
    pointer = publish(write_served(state / "snapshots"), url=url)
    with mirror_at(url, state, run=pointer.run):
        pass
    far = structs.replace(pointer, path=f"/nowhere/{pointer.snapshot}")
    for each, place in ((pointer, state / "snapshots"), (far, tmp_path / "cache")):
        topic = topic_of(each)
        subscriber = Subscriber(TopicPointers(topic.reader(), download=downloads(tmp_path)))
        assert subscriber.next(0.0) == each
        assert subscriber.path
        assert place in subscriber.path.parents


def test_a_pointer_without_a_url_says_what_is_missing(state: Path, tmp_path: Path) -> None:
    pointer = publish(write_served(state / "snapshots"))
    far = structs.replace(pointer, path=f"/nowhere/{pointer.snapshot}")
    subscriber = Subscriber(TopicPointers(topic_of(far).reader(), download=downloads(tmp_path)))
    assert subscriber.next(0.0) is None
    assert "its pointer names no URL (snapshots.url of the run)" in str(subscriber.refusal)


def test_a_url_that_cannot_be_opened_here_is_a_refusal(state: Path, tmp_path: Path) -> None:
    pointer = publish(write_served(state / "snapshots"), url="ftp://host/run")
    far = structs.replace(pointer, path=f"/nowhere/{pointer.snapshot}")
    subscriber = Subscriber(TopicPointers(topic_of(far).reader(), download=downloads(tmp_path)))
    assert subscriber.next(0.0) is None
    assert str(subscriber.refusal).startswith("there is no place ftp://host/run")


def test_a_given_url_replaces_that_of_the_pointer(
    state: Path, server: FaultyServer, tmp_path: Path
) -> None:
    pointer = publish(write_served(state / "snapshots"), url="s3://unreachable/run")
    far = structs.replace(pointer, path=f"/nowhere/{pointer.snapshot}")
    download = downloads(tmp_path, place=open_place(server.url))
    subscriber = Subscriber(TopicPointers(topic_of(far).reader(), download=download))
    assert subscriber.next(0.0) == far


# -- deltas --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("described", [None, blend_manifest], ids=["network", "blend"])
def test_base_and_deltas_of_a_mirror_serve_what_the_run_has_learned(
    state: Path, tmp_path: Path, described: Any
) -> None:
    run = DeltaRun(state, **({"described": described} if described else {}))
    with mirror_at((tmp_path / "mirror").as_uri(), state, run=RUN) as mirror:
        run.learn()
        base = run.snapshot()
        mirror.wake()
        with web_server(tmp_path / "mirror") as url:
            wait_until(lambda: (tmp_path / "mirror" / "latest.json").exists())
            subscriber = subscriber_at(url, tmp_path)
            follow(subscriber, run.truths[base.snapshot])
            for _ in range(4):
                run.learn()
                rank = run.delta().header.rank
                follow(subscriber, run.truths[rank.epoch, rank.sequence])
            run.learn()
            adopted = run.snapshot()
            follow(subscriber, run.truths[adopted.snapshot])
            late = subscriber_at(url, tmp_path / "late")
            run.learn()
            last = run.delta().header.rank
            follow(late, run.truths[last.epoch, last.sequence])
            follow(subscriber, run.truths[last.epoch, last.sequence])
    assert subscriber.deltas.applied == 6


@pytest.mark.slow
def test_deltas_damaged_at_a_url_are_never_served(
    state: Path, server: FaultyServer, tmp_path: Path
) -> None:
    run = DeltaRun(state)
    run.learn()
    base = run.snapshot()
    subscriber = subscriber_at(server.url, tmp_path)
    follow(subscriber, run.truths[base.snapshot])
    server.only = "/deltas/0"
    for number in range(12):
        server.changed = number % 4 == 1
        server.status = 503 if number % 4 == 2 else 0
        server.break_after = 50 if number % 4 == 3 else None
        run.learn()
        run.delta()
        subscriber.next(0.1)
        assert served(subscriber) == truth_of(run, subscriber.scorer)
    server.changed, server.status, server.break_after = False, 0, None
    last = run.deltas[-1].header.rank
    follow(subscriber, run.truths[last.epoch, last.sequence])


# -- another machine -----------------------------------------------------------------------------

_FOLLOW = """
import json, sys
from pathlib import Path
from stream_ctr.snapshots.subscriber import Subscriber

def follow(subscriber):
    said = None
    while True:
        subscriber.next(0.2)
        if subscriber.pointer:
            scorer = subscriber.scorer
            rank = scorer.delta.rank if scorer.delta else None
            state = [scorer.snapshot, rank and [rank.epoch, rank.sequence]]
            if state != said:
                print(json.dumps([*state, subscriber.predict(rows).tolist()]), flush=True)
            said = state

where, cache, rows, hidden = map(json.loads, sys.argv[1:])
assert not any(list(Path(each).iterdir()) for each in hidden), "something is shared"
"""
_AT_A_URL = """
follow(Subscriber(where, cache=cache))
"""
_AT_A_BROKER = """
from functools import partial
from stream_ctr.connectors import kafka
from stream_ctr.snapshots.cache import SnapshotCache
from stream_ctr.snapshots.delta_sources import TopicDeltas
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.remote import Downloads, served_files

servers, pointers, deltas = where
client = kafka.client_options(servers, {})
kept = SnapshotCache(Path(cache), served_files(None, "torch"))
download = Downloads(kept, scan=partial(kafka.TopicScan, client))
source = TopicPointers(kafka.PointerReader(client, pointers), download=download)
follow(Subscriber(source, deltas=TopicDeltas(kafka.RecordFollower(client, deltas))))
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[OtherMachine]:
    """Another machine, on which the folders `state` and `mirror` are empty."""
    hidden = [tmp_path / name for name in ("state", "mirror")]
    for folder in hidden:
        folder.mkdir(exist_ok=True)
    try:
        with OtherMachine(*hidden) as found:
            yield found
    except NoOtherMachine as reason:
        pytest.skip(str(reason))


class Far:
    """A subscriber on another machine, which says in which state it serves what."""

    def __init__(self, machine: OtherMachine, code: str, where: object, folder: Path) -> None:
        hidden = [str(folder / name) for name in ("state", "mirror")]
        arguments = [json.dumps(each) for each in (where, str(folder / "far"), ROWS, hidden)]
        self._process = machine.start(
            *(sys.executable, "-c", _FOLLOW + code, *arguments), stdout=subprocess.PIPE
        )
        self.states = 0

    def expect(self, run: DeltaRun, truth: Truth) -> None:
        """Wait for this truth; all that is said before must be the truth of its state."""
        assert self._process.stdout
        for line in self._process.stdout:
            name, rank, predicted = json.loads(line)
            self.states += 1
            assert tuple(predicted) == run.truths[tuple(rank) if rank else name]
            if tuple(predicted) == truth:
                return
        raise AssertionError(f"the subscriber ended with {self._process.wait()}")


@pytest.mark.slow
def test_another_machine_gets_base_and_deltas_over_http(
    machine: OtherMachine, tmp_path: Path
) -> None:
    state, mirror = tmp_path / "state", tmp_path / "mirror"
    assert machine.run("ls", state) == ""
    run = DeltaRun(state, described=blend_manifest)
    run.learn()
    base = run.snapshot()
    with (
        mirror_at(mirror.as_uri(), state, run=base.run),
        web_server(mirror, host=machine.near) as url,
    ):
        far = Far(machine, _AT_A_URL, url, tmp_path)
        far.expect(run, run.truths[base.snapshot])
        for _ in range(5):
            run.learn()
            rank = run.delta().header.rank
            far.expect(run, run.truths[rank.epoch, rank.sequence])
        run.learn()
        last = run.snapshot()
        far.expect(run, run.truths[last.snapshot])
    assert far.states >= 7


@pytest.mark.slow
def test_another_machine_gets_base_and_deltas_from_the_broker_alone(
    machine: OtherMachine, tmp_path: Path, broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_topic, "CHUNK_BYTES", 1000)
    state = tmp_path / "state"
    client = kafka.client_options(broker, {})
    names = {name: f"{topic}.{name}" for name in ("pointers", "bases", "deltas")}
    for name, each in names.items():
        kafka.ensure_topic(client, each, compacted=name != "deltas")
    url = f"kafka://{names['bases']}"
    run = DeltaRun(state)
    run.learn()
    with contextlib.closing(kafka.KafkaSink(client)) as sink:
        bases = TopicMirror(
            state, names["bases"], sink, model_name="default", unavailable=(kafka.KafkaFailure,)
        )

        def announce(pointer: Pointer) -> None:
            described = structs.replace(pointer, url=url)
            bases()
            sink.send(names["pointers"], encode_pointer(described), key=b"default")
            sink.flush(PATIENCE_SECONDS)

        base = run.snapshot()
        announce(base)
        with machine.tunnel(int(broker.rpartition(":")[2])):
            where = (broker, names["pointers"], names["deltas"])
            far = Far(machine, _AT_A_BROKER, where, tmp_path)
            far.expect(run, run.truths[base.snapshot])
            for _ in range(3):
                run.learn()
                sent = run.delta()
                data = (state / "deltas" / f"{sent.header.rank.name}.json").read_bytes()
                delta_topic.send(sink, names["deltas"], b"default", data, sent.header, sent.payload)
                rank = sent.header.rank
                far.expect(run, run.truths[rank.epoch, rank.sequence])
