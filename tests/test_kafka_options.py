"""Kafka options as users write them, for both clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaConsumer

from stream_ctr.connectors.kafka import (
    KafkaOptionError,
    client_options,
    parse_properties,
    read_properties,
)
from stream_ctr.connectors.kafka.options import _LIBRDKAFKA, _OPTIONS, librdkafka_options

SASL_SSL = {"security.protocol": "SASL_SSL"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linger.msec": "5"}, "'linger.msec' does not exist; did you mean 'linger.ms'"),
        ({"sasl.pasword": "hidden"}, "'sasl.pasword' does not exist; did you mean 'sasl.password'"),
        ({"auto.offset.reset": "latest"}, "'auto.offset.reset' cannot be set: .*lose or repeat"),
        ({"isolation.level": "read_uncommitted"}, "'isolation.level' cannot be set: .*aborted"),
        (
            {"max.poll.interval.ms": "5000"},
            "'max.poll.interval.ms' cannot be set: .*without group membership",
        ),
        ({"value.deserializer": "x"}, "'value.deserializer' cannot be set: .*raw bytes"),
        ({"enable.auto.commit": "true"}, "'enable.auto.commit' cannot be set"),
        (
            {"max.poll.records": "0"},
            "'max.poll.records' must be a whole number above zero, got '0'",
        ),
        (
            {"max.poll.records": "-5"},
            "'max.poll.records' must be a whole number above zero, got '-5'",
        ),
        ({"linger.ms": "5s"}, "'linger.ms' must be a whole number, got '5s'"),
        ({"enable.idempotence": "yes"}, "'enable.idempotence' must be true or false, got 'yes'"),
        (
            {"compression.type": "lzo"},
            "'compression.type' must be one of none, gzip, snappy, lz4, zstd, got 'lzo'",
        ),
        (
            {"security.protocol": "TLS"},
            "'security.protocol' must be one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL",
        ),
        ({"sasl.mechanism": "PLAIN"}, "a login is given, but 'security.protocol' is PLAINTEXT"),
        (SASL_SSL, "so 'sasl.mechanism' is needed"),
        (
            SASL_SSL | {"sasl.mechanism": "PLAIN", "sasl.username": "u"},
            "'sasl.password' .* needed",
        ),
        (SASL_SSL | {"sasl.mechanism": "OAUTHBEARER"}, "another mechanism than OAUTHBEARER"),
        (
            {"ssl.ca.location": "/no/such/file.pem", "security.protocol": "SSL"},
            "must be a PEM file that can be read",
        ),
    ],
)
def test_a_wrong_option_is_an_error_with_the_way_out(options: dict[str, str], message: str) -> None:
    with pytest.raises(KafkaOptionError, match=message) as caught:
        client_options("localhost:9092", options)
    assert "hidden" not in str(caught.value)


def test_a_java_key_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    store = tmp_path / "truststore.jks"
    store.write_bytes(b"\xfe\xed\xfe\xed\x00\x00\x00\x02")
    options = {"security.protocol": "SSL", "ssl.truststore.location": str(store)}
    must = "'ssl.truststore.location' must be a PEM file, which keytool -exportcert -rfc"
    with pytest.raises(KafkaOptionError, match=must):
        client_options("localhost:9092", options)


@pytest.mark.parametrize(
    "servers",
    [
        "",
        "localhost",
        "localhost:nine",
        "http://localhost:9092",
        "user:secret@host:9092",
        "a:1 b:2",
    ],
)
def test_a_bootstrap_server_is_host_and_port(servers: str) -> None:
    with pytest.raises(KafkaOptionError, match="host:port"):
        client_options(servers, {})


def test_bootstrap_servers_may_come_from_the_properties() -> None:
    properties = {"bootstrap.servers": "a:1, [::1]:2"}
    assert client_options("", properties)["bootstrap_servers"] == ["a:1", "[::1]:2"]
    assert client_options("c:3", {"bootstrap.servers": "a:1"})["bootstrap_servers"] == ["c:3"]


def test_a_login_is_read_from_both_spellings() -> None:
    both = {"security.protocol": "sasl_ssl", "sasl.mechanism": "scram-sha-256"}
    jaas = (
        "org.apache.kafka.common.security.scram.ScramLoginModule required "
        r'username="me" password="a \"b\" \\ ;c";'
    )
    librdkafka = {"sasl.username": "me", "sasl.password": 'a "b" \\ ;c'}
    java = client_options("h:1", both | {"sasl.jaas.config": jaas})
    assert java == client_options("h:1", both | librdkafka)
    assert java["sasl_mechanism"] == "SCRAM-SHA-256"


@pytest.mark.parametrize(("value", "expected"), [("", False), ("https", True), (None, None)])
def test_the_host_name_check_is_only_left_out_when_asked(
    value: str | None, expected: bool | None
) -> None:
    options = {"security.protocol": "SSL"}
    if value is not None:
        options["ssl.endpoint.identification.algorithm"] = value
    assert client_options("h:1", options).get("ssl_check_hostname") is expected


# -- properties files ----------------------------------------------------------------------------


def test_a_properties_file_is_read_as_java_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "client.properties"
    file.write_bytes(
        b"# comment \\\r\n! another\r\n\r\n  key1=value1\r\nkey2 : value 2 \r\nkey3 value3\r\n"
        b"key\\ 4\\:=\\u00fc\\t\\=\r\nkey5=one,\\\r\n     two\\\\\r\nempty=\r\nalone\r\n"
        b"key1=last\r\nutf8=\xc3\xbc"
    )
    assert read_properties(file) == {
        "key1": "last",
        "key2": "value 2 ",
        "key3": "value3",
        "key 4:": "ü\t=",
        "key5": "one,two\\",
        "empty": "",
        "alone": "",
        "utf8": "ü",
    }
    with pytest.raises(KafkaOptionError, match="cannot read the Kafka options in .*missing"):
        read_properties(tmp_path / "missing")


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_properties_survive_being_written(pairs: dict[str, str]) -> None:
    lines = [f"{escaped(key)}={escaped(value)}\n" for key, value in pairs.items()]
    assert parse_properties("".join(lines)) == pairs


def escaped(text: str) -> str:
    """Return the text as Java writes it into a properties file."""
    return "".join(
        char if char.isascii() and char.isalnum() else utf16_escape(char) for char in text
    )


def utf16_escape(char: str) -> str:
    return f"\\{char}" if ord(char) > 0xFFFF or char in "#=:" else f"\\u{ord(char):04x}"


# -- librdkafka ----------------------------------------------------------------------------------


def test_every_option_of_a_consumer_has_a_name_in_librdkafka() -> None:
    known = {name for name, _ in _OPTIONS.values() if name in KafkaConsumer.DEFAULT_CONFIG}
    # There is no group, and the size of a poll is not librdkafka's.
    assert known - _LIBRDKAFKA.keys() == {"group_id", "max_poll_records"}


def test_a_secret_is_whole_for_the_client_and_names_are_its_own() -> None:
    options = SASL_SSL | {
        "sasl.mechanism": "PLAIN",
        "sasl.username": "u",
        "sasl.password": "hidden",
        "ssl.endpoint.identification.algorithm": "",
    }
    assert librdkafka_options(client_options("a:1,b:2", options)) == {
        "bootstrap.servers": "a:1,b:2",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "u",
        "sasl.password": "hidden",
        "ssl.endpoint.identification.algorithm": "none",
    }
