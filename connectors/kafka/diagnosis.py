"""Why a Kafka broker is silent or lets nobody in, in words for whom it happens to. Knows no client, only its options and its log."""

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

PROBE_SECONDS = 2.0  # for finding out why nobody answered

log = logging.getLogger(__name__)


class BootstrapListener(logging.Handler):
    """Keeps the reasons of failed attempts, which kafka-python tells to its log only."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.reasons: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(
            r"Bootstrap (?:connection|attempt) to \S+ failed: (.+?)(?: \(backoff .*)?$",
            record.getMessage(),
        )
        if found:
            self.reasons[found[1]] = None


@contextmanager
def listening_to_bootstrap() -> Iterator[BootstrapListener]:
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
    """What to raise when nobody let us in within that time; `reasons` are those that the client gave to its log."""
    servers = server_names(client)
    closed = {server: _why_closed(server, PROBE_SECONDS / len(servers)) for server in servers}
    if all(closed.values()):
        each = "; ".join(f"{server}: {why}" for server, why in closed.items())
        return KafkaUnreachable(f"no Kafka broker answered within {seconds:g} s ({each})")
    accepting = ", ".join(server for server, why in closed.items() if not why)
    hints = (
        *_REFUSAL_HINTS,
        ("", _HINT_BY_PROTOCOL[str(client.get("security_protocol", "PLAINTEXT"))]),
    )
    hint, reason = next(
        (hint, reason)
        for pattern, hint in hints
        for reason in [*reasons, ""]
        if re.search(pattern, reason)
    )
    told = f" ({reason})" if reason else ""
    return KafkaRefused(
        f"{accepting} accepts connections, but let nobody in within {seconds:g} s: {hint}{told}"
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
        "broker certificate could not be verified",  # librdkafka does not tell these apart
        "the certificate is not of an authority that is trusted here, does ssl.ca.location hold its authority? Or it is another host's",
    ),
    (
        "certificate verify failed",
        "the certificate is not of an authority that is trusted here, does ssl.ca.location hold its authority?",
    ),
    (
        "SSL|Handshake|certificate",
        "TLS failed, is this the TLS port and does ssl.ca.location hold its authority?",
    ),
)
# kafka-python often loses the answer of a broker that refuses a login and hangs up.
_LOGIN_CUT = "the login failed, check sasl.username, sasl.password and sasl.mechanism, and security.protocol for this listener"
_HINT_BY_PROTOCOL = {
    "PLAINTEXT": "is it a Kafka broker, and does it want TLS or a login (security.protocol)?",
    "SSL": "is it a Kafka broker, and is this the TLS port without a login (security.protocol)?",
    "SASL_PLAINTEXT": _LOGIN_CUT,
    "SASL_SSL": _LOGIN_CUT,
}


def _why_closed(server: str, seconds: float) -> str:
    """Why nothing accepts a connection there; empty when something does."""
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
    near = difflib.get_close_matches(topic, existing, n=3)
    others = (
        f"near it: {', '.join(near)}"
        if near
        else f"{len(existing)} other topics exist, none with a name near it"
    )
    create = f"kafka-topics.sh --bootstrap-server {server_names(client)[0]} --create --topic {topic} --partitions 4"
    return KafkaTopicMissing(
        f"topic {topic!r} does not exist on {servers(client)} ({others}); to create it: {create}"
    )


def warn_of_plaintext(client: Mapping[str, object]) -> None:
    """A warning in the log, once for each broker, when what is said to it can be read on the way."""
    protocol = str(client.get("security_protocol", "PLAINTEXT"))
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


def servers(client: Mapping[str, object]) -> str:
    return ", ".join(server_names(client))


def server_names(client: Mapping[str, object]) -> list[str]:
    named = client["bootstrap_servers"]
    assert isinstance(named, list)
    return named
