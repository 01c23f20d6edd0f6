"""Connections of kafka-python: options and rules, brokers that refuse or do not answer."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pyarrow as pa
import pytest
from support.brokers import SASL_PASSWORD, SASL_USER, ApacheBroker
from support.patience import PATIENCE_SECONDS

from stream_ctr.connectors.kafka import (
    KafkaOptionError,
    KafkaRefused,
    KafkaSink,
    KafkaSource,
    KafkaUnreachable,
    PointerReader,
    client,
    client_options,
    diagnosis,
    ensure_topic,
    stored_records,
    timeouts,
    topic_partitions,
)

Connect = Callable[[dict[str, object]], object]

CONNECTS: list[Any] = [
    pytest.param(lambda options: KafkaSource(["t"], client=options, group="g"), id="source"),
    pytest.param(lambda options: KafkaSink(options), id="sink"),
    pytest.param(lambda options: ensure_topic(options, "t"), id="admin"),
    pytest.param(lambda options: PointerReader(options, "t"), id="pointers"),
]


@pytest.mark.parametrize("connect", CONNECTS)
def test_unreachable_brokers_are_an_error_in_time(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", 0.3)
    options = client_options("127.0.0.1:1,no.such.host.invalid:9092", {})
    expected = (
        "no Kafka broker answered within 0.3 s .*127.0.0.1:1: connection refused; "
        "no.such.host.invalid"
    )
    with pytest.raises(KafkaUnreachable, match=expected):
        connect(options)


@pytest.mark.slow
@pytest.mark.parametrize("connect", CONNECTS)
def test_a_tls_client_does_not_hang_at_a_silent_peer(
    connect: Connect, embedded_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", 0.2)
    options = client_options(embedded_broker, {"security.protocol": "SSL"})
    with pytest.raises(KafkaRefused, match="accepts connections, but refused this client"):
        connect(options)


@pytest.mark.slow
def test_a_sink_writes_through_tls_and_the_check_of_the_host_name_can_be_left_out(
    apache: ApacheBroker, topic: str
) -> None:
    login = {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-256",
        "sasl.username": SASL_USER,
        "sasl.password": SASL_PASSWORD,
        "ssl.ca.location": str(apache.ca),
    }
    options = client_options(apache.tls_servers, login)
    ensure_topic(options, topic)
    with closing(KafkaSink(options)) as sink:
        sink.send_batch(topic, pa.array([b"x"] * 2000, pa.large_binary()))
    assert sum(1 for _ in stored_records(options, topic)) == 2000
    by_address = apache.tls_servers.replace("localhost", "127.0.0.1")
    unchecked = login | {"ssl.endpoint.identification.algorithm": ""}
    assert topic_partitions(client_options(by_address, unchecked), topic) == 1


@pytest.mark.security(
    "a connection that others can read is warned of",
    how="plain connections to other hosts, and to this one",
)
@pytest.mark.parametrize(
    ("servers", "protocol", "expected"),
    [
        (
            "kafka.invalid:9092",
            "PLAINTEXT",
            ["kafka.invalid:9092 is not encrypted: set security.protocol to SSL"],
        ),
        (
            "192.0.2.1:1,[2001:db8::1]:2",
            "PLAINTEXT",
            ["192.0.2.1:1 is not encrypted", r"\[2001:db8::1\]:2 is not encrypted"],
        ),
        (
            "login.invalid:1",
            "SASL_PLAINTEXT",
            ["the login included: set security.protocol to SASL_SSL"],
        ),
        ("tls.invalid:1", "SSL", []),
        ("localhost:1,127.3.2.1:1,[::1]:1", "PLAINTEXT", []),
    ],
)
def test_a_connection_that_others_can_read_is_warned_of_once(
    servers: str,
    protocol: str,
    expected: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", 0.05)
    monkeypatch.setattr(diagnosis, "PROBE_SECONDS", 0.05)
    options = {"security.protocol": protocol}
    if protocol == "SASL_PLAINTEXT":
        options |= {"sasl.mechanism": "PLAIN", "sasl.username": "u", "sasl.password": "p"}
    for _ in range(2):
        with pytest.raises(KafkaUnreachable):
            KafkaSource(["t"], client=client_options(servers, options), group="g")
    warned = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("stream_ctr.connectors")
    ]
    assert len(warned) == len(expected)
    assert all(re.search(pattern, text) for pattern, text in zip(expected, warned, strict=True))


class FakeClient:
    """A client of the library that keeps its options."""

    DEFAULT_CONFIG = {"bootstrap_servers": None, "linger_ms": 0, "client_id": "", "group_id": ""}

    def __init__(self, **options: object) -> None:
        self.options = options


def test_rules_override_options_which_override_defaults() -> None:
    made = client.connect(
        FakeClient,
        {"bootstrap_servers": ["localhost:1"], "client_id": "user", "group_id": "user"},
        {"client_id": "ours", "linger_ms": 20},
        {"group_id": None},
    )
    assert made.options == {
        "bootstrap_servers": ["localhost:1"],
        "client_id": "user",
        "linger_ms": 20,
        "group_id": None,
    }


def test_options_of_another_client_are_left_out_and_rules_never() -> None:
    options: dict[str, object] = {"bootstrap_servers": ["localhost:1"], "acks": "all"}
    made = client.connect(FakeClient, options, {"metrics_enabled": False}, {"check_crcs": True})
    assert made.options == {"bootstrap_servers": ["localhost:1"], "check_crcs": True}


def test_options_that_the_client_refuses_are_an_error(embedded_broker: str) -> None:
    options = client_options(embedded_broker, {}) | {"client_dns_lookup": "nowhere"}
    with pytest.raises(KafkaOptionError, match="does not take its options"):
        client.open_consumer(options, no_such_option=1)


def test_a_call_in_time_returns_or_raises_what_it_does() -> None:
    assert client.in_time(lambda: 5, 1.0) == 5
    with pytest.raises(ZeroDivisionError):
        client.in_time(lambda: 1 // 0, 1.0)
    never = threading.Event()
    try:
        with pytest.raises(TimeoutError):
            client.in_time(lambda: never.wait(PATIENCE_SECONDS), 0.05)
    finally:
        never.set()
