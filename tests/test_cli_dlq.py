"""`stream-ctr dlq`: count, show and replay dead letters."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from kafka import KafkaAdminClient
from support.commands import command, succeed
from support.finished_runs import (
    MALFORMED,
    TINY,
    copy_run,
    finished_run,
    json_lines,
    write_log,
)
from support.patience import PATIENCE_SECONDS

from stream_ctr.connectors import kafka
from stream_ctr.messages import printable


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


GOOD = 400  # records before the malformed ones, clicks among them


def made_letters(servers: str, log: Path, state: Path) -> Lettered:
    """Make a topic with events and malformed records in two partitions, and run on it."""
    there = Lettered(servers, f"topic-{uuid.uuid4().hex[:12]}")
    client = kafka.client_options(servers, {})
    kafka.ensure_topic(client, there.topic, partitions=2)
    sink = kafka.KafkaSink(client)
    for number, value in enumerate([*log.read_bytes().splitlines()[:GOOD], *MALFORMED]):
        sink.send(there.topic, value, partition=number % 2)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    topics = (
        "-X",
        f"metrics.topic={there.topic}.metrics",
        "-X",
        f"snapshots.topic={there.topic}.snapshots",
    )
    succeed("run", *there.where, "--state", state, "--until-end", *TINY, *topics)
    return there


@pytest.fixture(scope="module")
def lettered(embedded_broker: str, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Lettered:
    return made_letters(embedded_broker, log, tmp_path_factory.mktemp("lettered"))


@pytest.mark.slow
def test_ls_counts_the_letters_by_reason(lettered):
    where = lettered.where
    counts = {one["reason"]: one["letters"] for one in json_lines("dlq", "ls", *where)}
    assert sum(counts.values()) == len(MALFORMED)
    assert len(counts) > 1
    lines = [line.split(maxsplit=1) for line in succeed("dlq", "ls", *where).stdout.splitlines()]
    assert lines[0] == ["letters", "reason"]
    assert {reason: int(count) for count, reason in lines[1:-1]} == counts
    assert lines[-1] == [str(len(MALFORMED)), "in all"]


@pytest.mark.slow
def test_replay_puts_back_the_same_bytes_into_the_same_partitions(broker, log, tmp_path):
    lettered = made_letters(broker, log, tmp_path)
    where = lettered.where
    client = kafka.client_options(lettered.servers, {})
    before = list(kafka.stored_records(client, lettered.topic))
    letters = values_of(lettered.servers, f"{lettered.topic}.dlq")
    assert sorted(letters) == sorted(MALFORMED)
    assert f"{len(MALFORMED)}  in all" in succeed("dlq", "replay", *where, "--all").stdout
    back = [
        record for record in kafka.stored_records(client, lettered.topic) if record not in before
    ]
    assert sorted((record.partition, record.value) for record in back) == sorted(
        (number % 2, value) for number, value in enumerate(MALFORMED, start=100)
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
    for verb in ("replay", "show"):
        refused = command("dlq", verb, *where, "--reason", "not_jsn")
        assert refused.exit_code == 2
        assert "no dead letter has the reason 'not_jsn', they have " in refused.stderr
        assert "did you mean 'not_json'?" in refused.stderr
    assert len(values_of(lettered.servers, lettered.topic)) == before
    counts = {one["reason"]: one["letters"] for one in json_lines("dlq", "ls", *where)}
    reason = min(counts)
    succeed("dlq", "replay", *where, "--reason", reason)
    assert (
        len(values_of(lettered.servers, lettered.topic))
        == before + counts[reason]
        < before + len(MALFORMED)
    )


def test_show_names_the_original_place_and_raw_has_the_exact_bytes(lettered):
    where = lettered.where
    shown = succeed("dlq", "show", *where).stdout
    for number in range(GOOD, GOOD + len(MALFORMED)):
        assert f"{lettered.topic}  partition {number % 2}  offset {number // 2}  " in shown
    for number in (GOOD + 1, GOOD + 4):
        raw = command(
            "dlq", "show", *where, "--raw", "--partition", number % 2, "--offset", number // 2
        )
        assert raw.stdout_bytes == MALFORMED[number - GOOD]
    assert command("dlq", "show", *where, "--raw").exit_code == 2
    assert (
        "choose with --partition"
        in command("dlq", "show", *where, "--raw", "--offset", GOOD // 2).output
    )  # one in each partition
    assert command("dlq", "show", *where, "--raw", "--offset", GOOD // 2 - 1).exit_code == 5
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
        printed = command("dlq", *arguments, *where).output
        assert "red" in printed
        assert all(character == "\n" or character.isprintable() for character in printed), printed
    assert "\\x1b[31mred\\x9b\\r\\n\\t\\u202e\\x7f" in succeed("dlq", "show", *where).stdout
    assert (
        "does not name its topic" in succeed("dlq", "replay", *where, "--reason", "unknown").output
    )


@pytest.mark.security(
    "headers of dead letters choose no topic",
    how="letters that name another topic, a partition that does not exist, and none, replayed",
)
def test_replay_puts_nothing_into_another_topic_whatever_the_headers_say(
    embedded_broker, topic, outcome
):
    client = kafka.client_options(embedded_broker, {})
    other = f"{topic}-other"
    for name in (topic, f"{topic}.dlq", other):
        kafka.ensure_topic(client, name)
    forged = [(other, b"0"), (f"{topic}-missing", b"0"), (topic, b"7"), (topic, b"x")]
    sink = kafka.KafkaSink(client)
    for number, (named, partition) in enumerate([*forged, (topic, b"0")]):
        headers = [
            ("__stream_ctr.errors.topic", named.encode()),
            ("__stream_ctr.errors.partition", partition),
        ]
        sink.send(f"{topic}.dlq", b"%d" % number, headers=headers)
    sink.close()
    done = succeed(
        "dlq", "replay", "--topic", topic, "--all", "--bootstrap-servers", embedded_broker
    )
    assert done.stderr.count("is left out") == len(forged)
    assert f"a letter names topic '{other}', not '{topic}'" in done.stderr
    assert f"a letter names partition 7 of '{topic}', which has 1" in done.stderr
    assert "1  in all" in done.stdout
    assert values_of(embedded_broker, other) == []
    assert values_of(embedded_broker, topic) == [b"4"]
    outcome("each is left out and named; the others go to their topic")


@pytest.mark.slow
def test_a_replay_whose_records_are_refused_ends_with_the_reason(kafka_broker, topic):
    client = kafka.client_options(kafka_broker, {})
    with closing(KafkaAdminClient(bootstrap_servers=kafka_broker)) as admin:
        small = {"max.message.bytes": "1000"}
        admin.create_topics({topic: {"num_partitions": 1, "configs": small}})
    kafka.ensure_topic(client, f"{topic}.dlq")
    headers = [
        ("__stream_ctr.errors.topic", topic.encode()),
        ("__stream_ctr.errors.partition", b"0"),
    ]
    sink = kafka.KafkaSink(client)
    for value in (b"small", os.urandom(5000), b"small"):
        sink.send(f"{topic}.dlq", value, headers=headers)
    sink.close()
    begun = time.monotonic()
    done = command("dlq", "replay", "--topic", topic, "--all", "--bootstrap-servers", kafka_broker)
    assert done.exit_code == 4, done.output
    assert "did not take" in done.output
    assert time.monotonic() - begun < 20


def test_what_is_shown_is_cut_and_says_so():
    assert printable(b"x" * 5000) == "x" * 200 + "... (5,000 bytes)"
    assert printable("é".encode() * 150) == "é" * 150 + "... (300 bytes)"
    assert printable(b"\xf0\x9f\x98\x80" * 60, 50) == "\U0001f600" * 50 + "... (240 bytes)"


def test_letters_of_a_state_directory_are_shown_and_go_to_a_file_or_a_topic(
    embedded_broker, topic, log, trained, tmp_path
):
    written = [value for value in MALFORMED if b"\n" not in value]
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
        value for value in MALFORMED if b"\n" not in value
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
