"""Explanations of why a Kafka broker does not answer or refuses a connection.

This module knows no client, only the options of kafka-python and the log that it writes.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import logging
import re
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from stream_ctr.connectors.errors import KafkaRefused, KafkaTopicMissing, KafkaUnreachable

PROBE_SECONDS = 2.0  # for probing all bootstrap servers after none answered
_SIMILAR_TOPICS = 3

log = logging.getLogger(__name__)

_BOOTSTRAP_FAILED = re.compile(
    r"Bootstrap (?:connection|attempt) to \S+ failed: (.+?)(?: \(backoff .*)?$"
)


class BootstrapListener(logging.Handler):
    """Collects the reasons of failed attempts, which kafka-python writes to its log only."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.reasons: dict[str, None] = {}  # an ordered set

    def emit(self, record: logging.LogRecord) -> None:
        if found := _BOOTSTRAP_FAILED.match(record.getMessage()):
            self.reasons[found[1]] = None


@contextmanager
def listening_to_bootstrap() -> Iterator[BootstrapListener]:
    """Collect the reasons of failed connection attempts while the block runs.

    >>> kafka_log = logging.getLogger("kafka.net.manager")
    >>> with listening_to_bootstrap() as listener:
    ...     kafka_log.warning("Bootstrap attempt to b:9092 failed: refused")
    >>> list(listener.reasons)
    ['refused']
    """
    listener = BootstrapListener()
    logger = logging.getLogger("kafka.net.manager")
    logger.addHandler(listener)
    try:
        yield listener
    finally:
        logger.removeHandler(listener)


def explain_silence(
    client: Mapping[str, object], reasons: Sequence[str], seconds: float
) -> KafkaUnreachable:
    """Return the error to raise when no broker accepted the client within this time.

    `reasons` are those that the client wrote to its log. The result is a `KafkaRefused` if a server
    accepts TCP connections.
    """
    servers = server_names(client)
    closed = {server: _why_closed(server, PROBE_SECONDS / len(servers)) for server in servers}
    if all(closed.values()):
        each = "; ".join(f"{server}: {why}" for server, why in closed.items())
        return KafkaUnreachable(f"no Kafka broker answered within {seconds:g} s ({each})")
    accepting = ", ".join(server for server, why in closed.items() if not why)
    hint, reason = _refusal_hint(_protocol(client), reasons)
    quoted = f" ({reason})" if reason else ""
    return KafkaRefused(
        f"{accepting} accepts connections, but refused this client within {seconds:g} s: "
        f"{hint}{quoted}"
    )


def _refusal_hint(protocol: str, reasons: Sequence[str]) -> tuple[str, str]:
    """Return (hint, the reason that it explains), or the protocol's hint and no reason."""
    for pattern, hint in _REFUSAL_HINTS:
        for reason in reasons:
            if re.search(pattern, reason):
                return hint, reason
    return _HINT_BY_PROTOCOL[protocol], next(iter(reasons), "")


_AUTHORITY_HINT = (
    "the certificate is not of an authority that is trusted here, "
    "does ssl.ca.location hold its authority?"
)

_REFUSAL_HINTS = (
    (
        "SaslAuthenticationFailed|SASL authentication error",
        "the login was refused, check sasl.username and sasl.password",
    ),
    (
        "UnsupportedSaslMechanism|Unsupported SASL mechanism",
        "the login was refused, the broker does not offer this sasl.mechanism",
    ),
    (
        "IllegalSaslState|not valid in current SASL state",
        "this listener wants no login, check security.protocol",
    ),
    (
        "mismatch, certificate is not valid for",
        "the certificate is another host's, use a name that it was issued for",
    ),
    ("certificate has expired", "the certificate of the broker has expired"),
    (
        "broker certificate could not be verified",  # librdkafka's one message for all causes
        f"{_AUTHORITY_HINT} Or it is another host's, or has expired",
    ),
    ("certificate verify failed", _AUTHORITY_HINT),
    (
        "SSL|Handshake|certificate",
        "TLS failed, is this the TLS port and does ssl.ca.location hold its authority?",
    ),
)
# When a broker refuses a login and closes the connection, kafka-python often loses its answer.
_LOGIN_HINT = (
    "the login failed, check sasl.username, sasl.password and sasl.mechanism, "
    "and security.protocol for this listener"
)
_HINT_BY_PROTOCOL = {
    "PLAINTEXT": "is it a Kafka broker, and does it want TLS or a login "
    "(security.protocol=SSL, SASL_SSL or SASL_PLAINTEXT)?",
    "SSL": "is it a Kafka broker, and is this the TLS port without a login (security.protocol)?",
    "SASL_PLAINTEXT": _LOGIN_HINT,
    "SASL_SSL": _LOGIN_HINT,
}


def _why_closed(server: str, seconds: float) -> str:
    """Return why the server accepts no TCP connection, or "" if it does."""
    host, port = _host_and_port(server)
    try:
        socket.create_connection((host, port), seconds).close()
    except TimeoutError:
        return "no answer"
    except (OSError, OverflowError) as error:
        return str(getattr(error, "strerror", None) or error).lower()
    return ""


def topic_missing(
    topic: str, existing: Collection[str], client: Mapping[str, object]
) -> KafkaTopicMissing:
    """Return the error to raise for a missing topic, with similar names and a command.

    >>> print(topic_missing("clicks", ["click"], {"bootstrap_servers": ["b:9092"]}))
    topic 'clicks' does not exist on b:9092 (near it: click); to create it: \
kafka-topics.sh --bootstrap-server b:9092 --create --topic clicks --partitions 4
    """
    near = difflib.get_close_matches(topic, existing, n=_SIMILAR_TOPICS)
    others = (
        f"near it: {', '.join(near)}"
        if near
        else f"{len(existing)} other topics exist, none with a name near it"
    )
    return KafkaTopicMissing(
        f"topic {topic!r} does not exist on {servers(client)} ({others}); "
        f"{how_to_create(client, topic, 4)}"
    )


def how_to_create(client: Mapping[str, object], topic: str, partitions: int) -> str:
    """Return the words for the command that creates a topic."""
    return (
        f"to create it: kafka-topics.sh --bootstrap-server {server_names(client)[0]} "
        f"--create --topic {topic} --partitions {partitions}"
    )


def warn_of_plaintext(client: Mapping[str, object]) -> None:
    """Log a warning, once for each broker, if the connection to another host is not encrypted."""
    protocol = _protocol(client)
    if not protocol.endswith("SSL"):
        for server in server_names(client):
            if not _is_loopback(_host_and_port(server)[0]):
                _warn_of_plaintext(server, protocol)


@functools.cache
def _warn_of_plaintext(server: str, protocol: str) -> None:
    login = ", the login included" if protocol.startswith("SASL") else ""
    wanted = "SASL_SSL" if protocol.startswith("SASL") else "SSL"
    log.warning(
        "the connection to %s is not encrypted%s: set security.protocol to %s",
        server,
        login,
        wanted,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _host_and_port(server: str) -> tuple[str, int]:
    host, port = server.rsplit(":", 1)
    return host.strip("[]"), int(port)


def _protocol(client: Mapping[str, object]) -> str:
    return str(client.get("security_protocol", "PLAINTEXT"))


def servers(client: Mapping[str, object]) -> str:
    """Return the bootstrap servers of these options, separated by commas.

    >>> servers({"bootstrap_servers": ["a:1", "b:2"]})
    'a:1, b:2'
    """
    return ", ".join(server_names(client))


def server_names(client: Mapping[str, object]) -> list[str]:
    """Return the bootstrap servers of these options as a list."""
    names = client["bootstrap_servers"]
    assert isinstance(names, list)
    return names
