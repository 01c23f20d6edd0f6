"""The source through confluent-kafka: what kafka-python does otherwise or not at all."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.commands import own_topics
from support.lineage import SMALL, newest
from support.sources import numbered, write
from support.topics import produced

from stream_ctr.cli.main import main
from stream_ctr.connectors.kafka import (
    KafkaOptionError,
    client_options,
    confluent,
)
from stream_ctr.connectors.kafka.confluent import ConfluentSource

pytest.importorskip("confluent_kafka")


def opened(
    servers: str, topic: str, options: dict[str, str] | None = None, **arguments: Any
) -> closing[ConfluentSource]:
    """Return a source that ends, to be closed by a `with` block."""
    client = client_options(servers, options or {})
    return closing(
        ConfluentSource([topic], client=client, group="readers", until_end=True, **arguments)
    )


def test_a_poll_ends_when_its_values_have_many_bytes(
    embedded_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confluent, "POLL_BYTES", 100_000)
    monkeypatch.setattr(confluent, "_PIECE_RECORDS", 5)
    write(embedded_broker, topic, [[b"%d " % index + bytes(10_000) for index in range(100)]])
    with opened(embedded_broker, topic) as source:
        polls = []
        while not source.finished:
            polls.append(source.poll(1.0))
    assert max(map(len, polls)) < 10 + 5  # the tenth reaches the bound, in the middle of a piece
    assert [offset for records in polls for offset in records.offset.tolist()] == list(range(100))


# -- silence -------------------------------------------------------------------------------------


def statistics(*, idle_seconds: float, waiting: int, leader: int = 1) -> str:
    """Return statistics as librdkafka gives them: one broker, one partition."""
    broker = {
        "nodeid": 1,
        "state": "UP",
        "rxidle": int(idle_seconds * 1e6),
        "waitresp_cnt": waiting,
    }
    partitions = {"0": {"partition": 0, "leader": leader}}
    return json.dumps(
        {"brokers": {"b": broker}, "topics": {"t": {"topic": "t", "partitions": partitions}}}
    )


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        (statistics(idle_seconds=0.2, waiting=1), 0.0),
        (statistics(idle_seconds=5.0, waiting=0), 0.0),  # nothing was asked
        (statistics(idle_seconds=5.0, waiting=1), 5.0),
        (statistics(idle_seconds=0.0, waiting=1, leader=-1), 9.0),  # since the start
    ],
    ids=["answered", "not asked", "silent", "no leader"],
)
def test_silence_is_read_from_statistics(
    noted: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    answers = confluent._Answers()
    now += 9.0
    answers.note(noted)
    assert answers.silent_seconds([("t", 0)]) == pytest.approx(expected)
    assert answers.silent_seconds([]) == 0


# -- options -------------------------------------------------------------------------------------


def test_every_option_is_taken_by_librdkafka(embedded_broker: str, topic: str) -> None:
    write(embedded_broker, topic, numbered(0))
    options = {
        "client.id": "c",
        "client.dns.lookup": "use_all_dns_ips",
        "connections.max.idle.ms": "600000",
        "max.in.flight.requests.per.connection": "5",
        "metadata.max.age.ms": "10000",
        "receive.buffer.bytes": "100000",
        "reconnect.backoff.ms": "10",
        "reconnect.backoff.max.ms": "2000",
        "request.timeout.ms": "10000",
        "retry.backoff.ms": "50",
        "send.buffer.bytes": "100000",
        "client.rack": "r",
        "fetch.max.bytes": "2000000",
        "fetch.max.wait.ms": "10",
        "fetch.min.bytes": "1",
        "max.partition.fetch.bytes": "1000",
        "acks": "1",
        "retries": "3",
        "compression.type": "gzip",
        "max.poll.records": "2000000",
    }
    with opened(embedded_broker, topic, options) as source:
        assert source.finished


def test_an_option_that_this_client_does_not_have_is_an_error() -> None:
    aws = client_options("a:1", {"security.protocol": "SASL_SSL", "sasl.mechanism": "AWS_MSK_IAM"})
    lacks = "AWS_MSK_IAM, which the client confluent does not have"
    with pytest.raises(KafkaOptionError, match=lacks):
        ConfluentSource(["t"], client=aws, group="g")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "GSSAPI"}, "GSSAPI"),
        ({"fetch.max.wait.ms": "-1"}, '"fetch.wait.max.ms"'),
        ({"security.protocol": "SSL", "ssl.cipher.suites": "none such"}, "cipher"),
    ],
)
def test_an_option_that_librdkafka_refuses_is_an_error(
    options: dict[str, str], message: str
) -> None:
    with pytest.raises(KafkaOptionError, match=f"does not take its options: .*{message}"):
        ConfluentSource(["t"], client=client_options("127.0.0.1:1", options), group="g")


def test_without_the_library_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    monkeypatch.setitem(sys.modules, "confluent_kafka.admin", None)
    state = str(tmp_path / "state")
    done = CliRunner().invoke(main, ["run", "--client", "confluent", "--state", state])
    assert done.exit_code == 3
    assert "pip install 'stream-ctr[confluent]'" in done.output


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_may_change_its_client_and_ends_alike(
    kafka_broker: str, topic: str, tmp_path: Path
) -> None:
    def run(state: str, client: str) -> None:
        command = ["run", "--topic", topic, "--bootstrap-servers", kafka_broker, "--until-end"]
        command += ["--client", client, "--state", str(tmp_path / state), *SMALL]
        command += own_topics(f"{topic}.{state}")
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output

    clients = {
        "neither": ("kafka-python", "kafka-python"),
        "to": ("kafka-python", "confluent"),
        "from": ("confluent", "kafka-python"),
    }
    for number in range(2):
        produced(kafka_broker, topic, slice(3000 * number, 3000 * (number + 1)))
        for state, client in clients.items():
            run(state, client[number])
    first, *others = (newest(tmp_path / state) for state in clients)
    assert first
    for other in others:
        assert other
        assert (other.examples, other.ledger) == (first.examples, first.ledger)
        assert other.positions == first.positions
        assert other.weights_sha256 == first.weights_sha256
        assert other.same(first, "model", "optimizer", "baseline")
    assert first.examples > 2000
