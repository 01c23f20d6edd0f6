"""`stream-ctr snapshots`: list, show, verify and roll back the snapshots of a run."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from support.commands import command, succeed
from support.finished_runs import (
    IMPRESSIONS,
    TINY,
    copy_run,
    finished_run,
    json_lines,
    write_log,
)
from support.patience import PATIENCE_SECONDS

from stream_ctr import Subscriber
from stream_ctr.connectors import kafka
from stream_ctr.snapshots import publisher, snapshot
from stream_ctr.snapshots.pointer import read_pointer
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.snapshot_topic import SnapshotTopic


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(log, tmp_path_factory.mktemp("trained") / "state")


@pytest.fixture
def state(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return copy_run(trained, tmp_path / "state")


def flip(path: Path) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def ids(state: Path) -> list[str]:
    return snapshot.snapshot_ids(state / "snapshots")


def test_ls_has_a_line_for_each_snapshot_the_newest_last_and_marks_the_published_one(trained):
    lines = succeed("snapshots", "ls", trained).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ids(trained)
    assert [line.endswith("published") for line in lines] == [False] * (len(lines) - 1) + [True]
    report = json.loads((trained / "reports.jsonl").read_text().splitlines()[-1])
    score = report["models"]["blend"]
    for part in (
        f"{IMPRESSIONS:,} examples",
        report["event_time"],
        f"logloss {score['logloss']:.5f} AUC {score['auc']:.4f}",
        ids(trained)[-2],
    ):
        assert part in lines[-1]


def test_ls_as_json_tells_sizes_and_parents_and_takes_the_snapshots_folder_too(trained):
    listed = json_lines("snapshots", "ls", trained / "snapshots")
    assert [one["snapshot"] for one in listed] == ids(trained)
    assert [one["parent"] for one in listed] == [None, *ids(trained)[:-1]]
    assert [one["published"] for one in listed] == [False] * (len(listed) - 1) + [True]
    tensors = sum(path.stat().st_size for path in Path(listed[0]["path"]).glob("*.safetensors"))
    assert listed[0]["bytes"] == tensors


def test_ls_goes_on_past_a_snapshot_that_cannot_be_read(state):
    broken = ids(state)[0]
    (state / "snapshots" / broken / "manifest.json").write_text('{"format": 2, "files": "\x1b[2J"')
    lines = succeed("snapshots", "ls", state).stdout.splitlines()
    assert len(lines) == len(ids(state))
    assert "manifest.json is damaged" in lines[0]
    assert "examples" in lines[1]


def test_show_has_the_manifest_without_metrics_and_every_tensor(trained):
    newest = trained / "snapshots" / ids(trained)[-1]
    printed = succeed("snapshots", "show", newest).stdout
    assert (
        printed
        == succeed("snapshots", "show", trained).stdout
        == succeed("snapshots", "show", trained, newest.name).stdout
    )
    manifest, tensors = snapshot.load(newest)
    for line in (
        ["beside.deepfm.model", "deepfm"],
        ["examples", str(IMPRESSIONS)],
        ["ledger.sum", str(manifest.ledger.sum)],
    ):
        assert line in [printed_line.split() for printed_line in printed.splitlines()]
    assert "logloss" not in printed
    for stem, named in tensors.items():
        assert manifest.files[f"{stem}.safetensors"].sha256 in printed
        for name, array in named.items():
            assert any(
                line.split()[:1] == [name] and line.endswith(json.dumps(list(array.shape)))
                for line in printed.splitlines()
            ), name
    assert command("snapshots", "show", trained, "nope").exit_code == 6


def test_verify_says_ok_for_every_snapshot_or_for_the_one_named(trained):
    assert succeed("snapshots", "verify", trained).stdout.splitlines() == [
        f"{name}  ok" for name in ids(trained)
    ]
    first = ids(trained)[0]
    assert succeed("snapshots", "verify", trained / "snapshots" / first).stdout == f"{first}  ok\n"


def test_a_flipped_byte_makes_verify_exit_6_and_name_the_file(state):
    flip(state / "snapshots" / ids(state)[1] / "optimizer.safetensors")
    result = command("snapshots", "verify", state)
    assert result.exit_code == 6
    good, bad = ids(state)[0], result.stdout.splitlines()[1]
    assert result.stdout.splitlines()[0] == f"{good}  ok"
    assert f"{ids(state)[1]}/optimizer.safetensors has SHA-256" in bad
    assert command("snapshots", "verify", state / "snapshots" / ids(state)[1]).exit_code == 6
    assert command("snapshots", "verify", state / "snapshots" / good).exit_code == 0


def test_verify_misses_a_published_snapshot_that_is_not_there(state):
    pointer = read_pointer(state / "latest.json")
    assert pointer
    shutil.rmtree(pointer.path)
    result = command("snapshots", "verify", state)
    assert result.exit_code == 6
    assert f"{pointer.snapshot}  is published, and is missing" in result.output


def test_verify_holds_the_published_manifest_to_its_pointer(state):
    manifest = state / "snapshots" / ids(state)[-1] / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    result = command("snapshots", "verify", state)
    assert result.exit_code == 6
    assert "manifest.json has SHA-256" in result.stdout
    assert "its pointer says" in result.stdout
    (state / "latest.json").write_text("{")
    result = command("snapshots", "verify", state)
    assert (result.exit_code, result.stdout.splitlines()[0].split()[0]) == (6, "latest.json")


@pytest.mark.parametrize(
    "arguments", [["ls"], ["show"], ["verify"], ["rollback", "00000001-20250101T000000Z"]]
)
def test_where_there_is_no_snapshot_every_command_exits_6_and_says_what_to_give(
    arguments, tmp_path
):
    for directory in (tmp_path, tmp_path / "missing"):
        result = command("snapshots", arguments[0], directory, *arguments[1:])
        assert result.exit_code == 6
        assert f"there is no snapshot in {directory}" in result.output


def test_a_rollback_is_taken_by_a_subscriber_and_so_is_what_the_next_run_publishes(
    log, state, tmp_path
):
    older, newest = ids(state)[1], ids(state)[-1]
    subscriber = Subscriber(state)
    assert subscriber.next(PATIENCE_SECONDS).snapshot == newest
    rows = [{"app_id": "a1", "hour": "20"}, {"app_id": "a2"}]
    newer_model = subscriber.predict(rows)
    before = json.loads((state / "latest.json").read_text())
    manifest = (state / "snapshots" / older / "manifest.json").read_bytes()

    assert newest in succeed("snapshots", "rollback", state, older).stdout
    taken = subscriber.next(PATIENCE_SECONDS)
    assert (taken.snapshot, taken.epoch) == (older, before["epoch"] + 1)
    assert not np.array_equal(subscriber.predict(rows), newer_model)
    assert (
        state / "snapshots" / older / "manifest.json"
    ).read_bytes() == manifest  # nothing in a snapshot ever changes
    assert [
        one["snapshot"] for one in json_lines("snapshots", "ls", state) if one["published"]
    ] == [older]

    # The run goes on from what it learned last, not from what is served.
    longer = tmp_path / "bad.jsonl"  # the same log, grown
    extra = [
        json.dumps(
            {
                "kind": "impression",
                "impression_id": f"x{n}",
                "time": "2025-01-01T12:00:00Z",
                "features": {},
            }
        )
        for n in range(9)
    ]
    longer.write_bytes(
        (log.with_name("bad.jsonl")).read_bytes() + "".join(line + "\n" for line in extra).encode()
    )
    assert (
        f"resumed from snapshot {newest}"
        in succeed("run", "--source", longer, "--state", state, *TINY).output
    )
    again = subscriber.next(PATIENCE_SECONDS)
    assert again.snapshot == ids(state)[-1] > newest
    assert again.epoch == before["epoch"] + 2
    assert again.examples == IMPRESSIONS + len(extra)


def test_what_an_active_run_publishes_after_a_rollback_is_taken(state):
    """The run's own epoch is below that of the rollback: it learns of it as it publishes."""
    paths = [state / "snapshots" / name for name in ids(state)]
    manifests = [snapshot.verify(path) for path in paths]
    running = Publisher(state)
    running.publish(paths[-2], manifests[-2])
    subscriber = Subscriber(state)
    assert subscriber.next(PATIENCE_SECONDS).snapshot == paths[-2].name
    succeed("snapshots", "rollback", state, paths[0].name)
    assert subscriber.next(PATIENCE_SECONDS).snapshot == paths[0].name
    running.publish(paths[-1], manifests[-1])
    assert subscriber.next(PATIENCE_SECONDS).snapshot == paths[-1].name


def test_rollbacks_and_publishes_at_the_same_time_never_leave_a_pointer_that_subscribers_refuse(
    state, monkeypatch
):
    monkeypatch.setattr(publisher, "_PATIENCE_SECONDS", PATIENCE_SECONDS)
    path = state / "snapshots" / ids(state)[0]
    manifest = snapshot.verify(path)
    told: list[tuple[int, int]] = []

    def roll_back() -> None:
        for _ in range(30):
            pointer = Publisher(state).roll_back(path, manifest)
            told.append((pointer.epoch, pointer.sequence))

    thread = threading.Thread(target=roll_back)
    thread.start()
    for sequence in range(1000, 1060):
        Publisher(state).publish(path, structs.replace(manifest, sequence=sequence))
    thread.join()
    Publisher(state).publish(path, structs.replace(manifest, sequence=2000))
    last = read_pointer(state / "latest.json")
    assert len(told) == len(set(told)) == 30
    assert (last.epoch, last.sequence) > max(told)
    assert last.epoch == max(told)[0]


def test_a_rollback_refuses_a_snapshot_that_does_not_verify_and_one_that_is_not_there(state):
    before = (state / "latest.json").read_bytes()
    flip(state / "snapshots" / ids(state)[0] / "model.safetensors")
    result = command("snapshots", "rollback", state, ids(state)[0])
    assert result.exit_code == 6
    assert "model.safetensors" in result.output
    result = command("snapshots", "rollback", state, "../x")
    assert result.exit_code == 6
    assert ids(state)[-1] in result.output
    assert (state / "latest.json").read_bytes() == before


def test_a_rollback_with_a_topic_reaches_its_subscribers(embedded_broker, topic, state):
    client = kafka.client_options(embedded_broker, {})
    kafka.ensure_topic(client, topic, compacted=True)
    newest = state / "snapshots" / ids(state)[-1]
    manifest = snapshot.verify(newest)
    with closing(kafka.KafkaSink(client)) as sink, closing(kafka.PointerReader(client, topic)) as r:
        on_topic = SnapshotTopic(topic, sink=sink, reader=r, name="default", run=manifest.run)
        Publisher(state, snapshot_topic=on_topic).publish(newest, manifest)
    reader = kafka.PointerReader(client, topic)
    subscriber = Subscriber(TopicPointers(reader))
    assert subscriber.next(PATIENCE_SECONDS).snapshot == newest.name
    succeed(
        "snapshots",
        "rollback",
        state,
        ids(state)[0],
        "--topic",
        topic,
        "--bootstrap-servers",
        embedded_broker,
    )
    assert subscriber.next(PATIENCE_SECONDS).snapshot == ids(state)[0]
    reader.close()
    assert subscriber.pointer == read_pointer(state / "latest.json")
