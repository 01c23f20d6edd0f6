"""`stream-ctr snapshots` and `stream-ctr dlq`: what a person sees of what a run left behind, and what subscribers and the topic get."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner, Result
from msgspec import structs
from support.patience import PATIENCE_SECONDS

from stream_ctr import Subscriber
from stream_ctr.cli.main import main
from stream_ctr.connectors import kafka
from stream_ctr.logs.simulate import Simulation
from stream_ctr.messages import printable
from stream_ctr.snapshots import publisher as publisher
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import pointer_for, read_pointer, write_pointer
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.publisher import Publisher

QUICK = [
    part
    for pair in (
        "model.hidden=8",
        "model.embedding_dim=2",
        "model.table_bits=10",
        "learn.batch_size=64",
        "learn.threads=1",
        "join.label_window=60s",
        "schedule.snapshot_examples=500",
        "snapshots.keep=10",
        "input.max_bad_share=1",
    )
    for part in ("-X", pair)
]
IMPRESSIONS = 1500
# What is no event, as it may come: not text, steering a terminal, turning the writing direction, in two lines, longer than anyone reads.
BAD = [
    b"\xff\x00junk",
    b"\x1b]0;owned\x07\x1b[2Jboo",
    '{"kind": "\u202eimpression"}'.encode(),
    b'{\n"kind": "impression"}',
    b'["' + b"x" * 5000 + b'"]',
]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = command(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def json_lines(*arguments: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in succeed(*arguments, "--json").stdout.splitlines()]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    Simulation(IMPRESSIONS, seed=3).write_jsonl(path)
    return path


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with three snapshots, and the bad records of its log as dead letters."""
    state: Path = tmp_path_factory.mktemp("trained") / "state"
    bad = log.with_name("bad.jsonl")
    bad.write_bytes(
        log.read_bytes() + b"".join(value + b"\n" for value in BAD if b"\n" not in value)
    )
    succeed("run", "--source", bad, "--state", state, *QUICK)
    return state


@pytest.fixture
def state(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil, whose pointer names the copy."""
    copied = tmp_path / "state"
    shutil.copytree(trained, copied)
    newest = snapshot.newest(copied / "snapshots")
    assert newest
    write_pointer(copied / "latest.json", pointer_for(newest, snapshot.verify(newest)))
    return copied


def ids(state: Path) -> list[str]:
    return snapshot.snapshot_ids(state / "snapshots")


# -- snapshots -----------------------------------------------------------------------------------


def test_ls_has_a_line_for_each_snapshot_the_newest_last_and_marks_the_published_one(trained):
    lines = succeed("snapshots", "ls", trained).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ids(trained)
    assert [line.endswith("published") for line in lines] == [False] * (len(lines) - 1) + [True]
    report = json.loads((trained / "reports.jsonl").read_text().splitlines()[-1])
    score = report["models"]["deepfm"]
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
    (state / "snapshots" / broken / "manifest.json").write_text('{"format": 1, "files": "\x1b[2J"')
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
        ["learner.model", "deepfm"],
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
    result = CliRunner().invoke(main, ["snapshots", "verify", str(state)])
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
    rows = [{"app_id": "a1", "hour": "20"}, {}]
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
        in succeed("run", "--source", longer, "--state", state, *QUICK).output
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
    sink = kafka.KafkaSink(client)
    newest = state / "snapshots" / ids(state)[-1]
    Publisher(state, sink=sink, snapshot_topic=topic).publish(newest, snapshot.verify(newest))
    sink.close()
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


# -- dead letters --------------------------------------------------------------------------------


def values_of(servers: str, topic: str) -> list[bytes | None]:
    return [
        record.value for record in kafka.stored_records(kafka.client_options(servers, {}), topic)
    ]


class Lettered(NamedTuple):
    servers: str
    topic: str

    @property
    def where(self) -> tuple[str, ...]:
        return ("--topic", self.topic, "--bootstrap-servers", self.servers)


def made_letters(servers: str, log: Path, state: Path) -> Lettered:
    """A topic with events and bad records in two partitions, of which a run has made dead letters."""
    there = Lettered(servers, f"topic-{uuid.uuid4().hex[:12]}")
    client = kafka.client_options(servers, {})
    kafka.ensure_topic(client, there.topic, partitions=2)
    sink = kafka.KafkaSink(client)
    for number, value in enumerate([*log.read_bytes().splitlines()[:100], *BAD]):
        sink.send(there.topic, value, partition=number % 2)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    topics = (
        "-X",
        f"metrics.topic={there.topic}.metrics",
        "-X",
        f"snapshots.topic={there.topic}.snapshots",
    )
    succeed("run", *there.where, "--state", state, "--until-end", *QUICK, *topics)
    return there


@pytest.fixture(scope="module")
def lettered(embedded_broker: str, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Lettered:
    return made_letters(embedded_broker, log, tmp_path_factory.mktemp("lettered"))


@pytest.mark.slow
def test_ls_counts_the_letters_by_reason(lettered):
    where = lettered.where
    counts = {one["reason"]: one["letters"] for one in json_lines("dlq", "ls", *where)}
    assert sum(counts.values()) == len(BAD)
    assert len(counts) > 1
    lines = [line.split(maxsplit=1) for line in succeed("dlq", "ls", *where).stdout.splitlines()]
    assert lines[0] == ["letters", "reason"]
    assert {reason: int(count) for count, reason in lines[1:-1]} == counts
    assert lines[-1] == [str(len(BAD)), "in all"]


@pytest.mark.slow
def test_replay_puts_back_the_same_bytes_into_the_same_partitions(broker, log, tmp_path):
    lettered = made_letters(broker, log, tmp_path)
    where = lettered.where
    client = kafka.client_options(lettered.servers, {})
    before = list(kafka.stored_records(client, lettered.topic))
    letters = values_of(lettered.servers, f"{lettered.topic}.dlq")
    assert sorted(letters) == sorted(BAD)
    assert f"{len(BAD)}  in all" in succeed("dlq", "replay", *where, "--all").stdout
    back = [
        record for record in kafka.stored_records(client, lettered.topic) if record not in before
    ]
    assert sorted((record.partition, record.value) for record in back) == sorted(
        (number % 2, value) for number, value in enumerate(BAD, start=100)
    )
    assert values_of(lettered.servers, f"{lettered.topic}.dlq") == letters  # they stay


@pytest.mark.slow
def test_replay_with_a_reason_puts_back_those_alone_and_without_any_choice_nothing(lettered):
    where = lettered.where
    before = len(values_of(lettered.servers, lettered.topic))
    for refused in ([], ["--all", "--reason", "not_json"]):
        result = command("dlq", "replay", *where, *refused)
        assert result.exit_code == 2
        assert "--reason" in result.output
    assert (
        "the letters there are have other reasons: "
        in succeed("dlq", "replay", *where, "--reason", "none_such").output
    )
    assert len(values_of(lettered.servers, lettered.topic)) == before
    counts = {one["reason"]: one["letters"] for one in json_lines("dlq", "ls", *where)}
    reason = min(counts)
    succeed("dlq", "replay", *where, "--reason", reason)
    assert (
        len(values_of(lettered.servers, lettered.topic))
        == before + counts[reason]
        < before + len(BAD)
    )


def test_show_names_the_original_place_and_raw_has_the_exact_bytes(lettered):
    where = lettered.where
    shown = succeed("dlq", "show", *where).stdout
    for number in range(100, 100 + len(BAD)):
        assert f"{lettered.topic}  partition {number % 2}  offset {number // 2}  " in shown
    for number in (101, 104):
        raw = command(
            "dlq", "show", *where, "--raw", "--partition", number % 2, "--offset", number // 2
        )
        assert raw.stdout_bytes == BAD[number - 100]
    assert command("dlq", "show", *where, "--raw").exit_code == 2
    assert (
        "choose with --partition" in command("dlq", "show", *where, "--raw", "--offset", 50).output
    )  # one in each partition
    assert command("dlq", "show", *where, "--raw", "--offset", 49).exit_code == 5
    assert len(succeed("dlq", "show", *where, "--limit", 2).stdout.splitlines()) == 4


def test_nothing_in_a_letter_reaches_the_terminal_as_a_control_character(embedded_broker, topic):
    client = kafka.client_options(embedded_broker, {})
    kafka.ensure_topic(client, f"{topic}.dlq")
    sink = kafka.KafkaSink(client)
    nasty = b"\x1b[31mred\x9b\r\n\t\xe2\x80\xae\x7f"
    headers = [
        (f"__stream_ctr.errors.{name}", nasty)
        for name in ("topic", "partition", "offset", "reason", "message")
    ]
    sink.send(f"{topic}.dlq", nasty, headers=headers)
    sink.send(f"{topic}.dlq", b"")  # by somebody else, without any header
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    where = ("--topic", topic, "--bootstrap-servers", embedded_broker)
    for arguments in (["ls"], ["show"], ["replay", "--reason", "other"], ["ls", "--json"]):
        printed = succeed("dlq", *arguments, *where).output
        assert "red" in printed
        assert all(character == "\n" or character.isprintable() for character in printed), printed
    assert "\\x1b[31mred\\x9b\\r\\n\\t\\u202e\\x7f" in succeed("dlq", "show", *where).stdout
    assert (
        "does not name its topic" in succeed("dlq", "replay", *where, "--reason", "unknown").output
    )


def test_what_is_shown_is_cut_and_says_so():
    assert printable(b"x" * 5000) == "x" * 200 + "... (5,000 bytes)"
    assert printable("é".encode() * 150) == "é" * 150 + "... (300 bytes)"
    assert printable(b"\xf0\x9f\x98\x80" * 60, 50) == "\U0001f600" * 50 + "... (240 bytes)"


def test_letters_of_a_state_directory_are_shown_and_go_to_a_file_or_a_topic(
    embedded_broker, topic, log, trained, tmp_path
):
    written = [value for value in BAD if b"\n" not in value]
    where = ("--state", trained)
    assert sum(one["letters"] for one in json_lines("dlq", "ls", *where)) == len(written)
    first = len(log.read_bytes().splitlines())
    assert command("dlq", "show", *where, "--raw", "--offset", first + 1).stdout_bytes == written[1]
    out = tmp_path / "again.jsonl"
    succeed("dlq", "replay", *where, "--all", "--out", out)
    assert out.read_bytes().splitlines() == written
    kafka.ensure_topic(kafka.client_options(embedded_broker, {}), topic)
    succeed(
        "dlq", "replay", *where, "--all", "--topic", topic, "--bootstrap-servers", embedded_broker
    )
    assert sorted(values_of(embedded_broker, topic)) == sorted(written)
    assert command("dlq", "replay", *where, "--all").exit_code == 2
    assert command("dlq", "ls", *where, "--topic", topic).exit_code == 2


def test_a_letter_of_two_lines_is_not_torn_into_two(lettered, tmp_path):
    out = tmp_path / "out"
    result = succeed("dlq", "replay", *lettered.where, "--all", "--out", out)
    assert sorted(out.read_bytes().splitlines()) == sorted(
        value for value in BAD if b"\n" not in value
    )
    assert "more than one line" in result.output


def test_half_a_line_that_a_crash_left_hides_no_other_letter(state):
    count = sum(one["letters"] for one in json_lines("dlq", "ls", "--state", state))
    with (state / "dead_letters.jsonl").open("a") as file:
        file.write('{"topic": "x", "val')
    result = succeed("dlq", "ls", "--state", state)
    assert f"{count}  in all" in result.stdout
    assert f"dead_letters.jsonl:{count + 1} is not a dead letter" in result.stderr
    assert command("dlq", "ls", "--state", state / "missing").exit_code == 3


def test_a_topic_without_dead_letters_is_said_so(embedded_broker, topic):
    result = command("dlq", "ls", "--topic", topic, "--bootstrap-servers", embedded_broker)
    assert result.exit_code == 4
    assert f"{topic}.dlq" in result.output
