"""Kafka options: the keys of a Java `client.properties` or of librdkafka, for kafka-python.

Three tables drive it: `_OPTIONS` has every supported key, `_REFUSED` has the keys that would break
exactness with the reason, and `_LIBRDKAFKA` has librdkafka's names of the consumer options. This
module opens no connection.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from stream_ctr.connectors.errors import KafkaOptionError

IN_FLIGHT_BYTES = 32 << 20  # the bound on values sent and not yet acknowledged


def client_options(bootstrap_servers: str, properties: Mapping[str, str]) -> dict[str, object]:
    """Return the options of kafka-python for a broker and Java or librdkafka properties.

    `bootstrap_servers` is `host:port[,host:port]` and overrides the key `bootstrap.servers`. The
    result holds options of both consumer and producer; each client picks its own. Passwords are
    printed as `***`.

    Raises `KafkaOptionError` for a key that does not exist (the message has the nearest key), for
    an invalid value, for a key that would break exactness, and for a login that would not be used.

    >>> login = {"sasl.mechanism": "PLAIN", "sasl.username": "u", "sasl.password": "hidden"}
    >>> properties = {"security.protocol": "SASL_SSL", **login, "linger.ms": "20"}
    >>> for name, value in client_options("localhost:9092", properties).items():
    ...     print(name, repr(value))
    bootstrap_servers ['localhost:9092']
    security_protocol 'SASL_SSL'
    sasl_mechanism 'PLAIN'
    sasl_plain_username 'u'
    sasl_plain_password '***'
    linger_ms 20
    >>> client_options("localhost:9092", {"fetch.max.byte": "1000"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    stream_ctr.connectors.errors.KafkaOptionError: Kafka option 'fetch.max.byte' does not exist; ...
    """
    rest = dict(properties)
    servers = (
        bootstrap_servers or rest.get("bootstrap.servers") or rest.get("metadata.broker.list") or ""
    )
    rest.pop("bootstrap.servers", None)
    rest.pop("metadata.broker.list", None)
    options: dict[str, object] = {"bootstrap_servers": _server_list(servers)}
    for key, value in rest.items():
        options |= _translate(key, value)
    _check_login(options)
    return options


def librdkafka_options(client: Mapping[str, object]) -> dict[str, str | int]:
    """Return the consumer options among those of `client_options` under librdkafka's names.

    Passwords are readable in the result. Raises `KafkaOptionError` for a SASL mechanism that
    librdkafka does not support.

    >>> properties = {"security.protocol": "SSL", "fetch.max.wait.ms": "50", "linger.ms": "20"}
    >>> librdkafka_options(client_options("a:1,b:2", properties))
    {'bootstrap.servers': 'a:1,b:2', 'security.protocol': 'SSL', 'fetch.wait.max.ms': 50}
    """
    options: dict[str, str | int] = {}
    for name, value in client.items():
        if name in _LIBRDKAFKA:
            options[_LIBRDKAFKA[name]] = _as_librdkafka(value)
    if options.get("sasl.mechanism") == "AWS_MSK_IAM":
        raise KafkaOptionError(
            "'sasl.mechanism' is AWS_MSK_IAM, which the client confluent does not have; "
            "the client kafka-python does"
        )
    if "ssl.certificate.location" in options:  # a PEM file may hold both
        options.setdefault("ssl.key.location", options["ssl.certificate.location"])
    return options


def read_properties(path: Path) -> dict[str, str]:
    """Return the keys and values of a Java properties file in UTF-8.

    The last value of a repeated key counts. Raises `KafkaOptionError` when the file cannot be read.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KafkaOptionError(f"cannot read the Kafka options in {path}: {error}") from error
    return parse_properties(text)


def parse_properties(text: str) -> dict[str, str]:
    r"""Return the keys and values in the text of a Java properties file.

    `=`, `:` or a blank separates key and value, `#` and `!` begin a comment, and a backslash at the
    end of a line continues it.

    >>> parse_properties("# login\nacks = all\nsasl.jaas.config: Plain \\\n   required;")
    {'acks': 'all', 'sasl.jaas.config': 'Plain required;'}
    >>> parse_properties(r"ssl.key.password=a\=b")
    {'ssl.key.password': 'a=b'}
    """
    pairs: dict[str, str] = {}
    for line in _logical_lines(text):
        split = _PROPERTY.match(line)
        assert split is not None, "the pattern matches every line"
        pairs[_unescape(split["key"])] = _unescape(split["value"])
    return pairs


class Secret(str):
    """A string that prints and logs as `***`. Encoding or joining it yields its characters.

    >>> password = Secret("hidden")
    >>> print(password, repr(password), f"{password}", "".join([password]))
    *** '***' *** hidden
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __format__(self, form: str) -> str:
        return format("***", form)


def _translate(key: str, value: str) -> dict[str, object]:
    if key in _REFUSED:
        raise KafkaOptionError(f"Kafka option {key!r} cannot be set: {_REFUSED[key]}")
    if key == "sasl.jaas.config":
        return _jaas_login(value)
    if key not in _OPTIONS:
        near = difflib.get_close_matches(
            _NAME_OF.split(key)[0], [*_OPTIONS, "sasl.jaas.config", "bootstrap.servers"], n=1
        )
        raise KafkaOptionError(
            f"Kafka option {_shown_name(key, near)} does not exist"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    name, read = _OPTIONS[key]
    try:
        translated = read(value)
    except ValueError as error:
        raise KafkaOptionError(
            f"Kafka option {key!r} must be {error}, got {_shown_value(key, value)}"
        ) from None
    return {name: translated} if name else {}


def _shown_name(key: str, near: Sequence[str]) -> str:
    """Return the name of an unknown option for a message.

    A text that has not the form of a name may be the value of an option: a line of a key in PEM, or
    what follows a colon or a blank instead of "=".
    """
    return repr(key) if near and key in near[0] or _NAME.fullmatch(key) else _NOT_SHOWN


def _shown_value(key: str, value: str) -> str:
    """Return the invalid value of an option for a message, if it cannot be a login or a key.

    >>> _shown_value("ssl.key.location", "/etc/ssl/key.pem"), _shown_value("ssl.ca.location", "MII")
    ("'/etc/ssl/key.pem'", '(not shown: it may be a secret)')
    """
    shown = _FILE_NAME if key.endswith(".location") else _SHORT
    return repr(value) if shown.fullmatch(value) else _NOT_SHOWN


def _text(value: str) -> object:
    return value


def _secret(value: str) -> object:
    return Secret(value)


def _integer(value: str) -> object:
    if not re.fullmatch(r"\s*-?\d+\s*", value):
        raise ValueError("a whole number")
    return int(value)


def _positive_integer(value: str) -> object:
    if not re.fullmatch(r"\s*0*[1-9]\d*\s*", value):
        raise ValueError("a whole number above zero")
    return int(value)


def _boolean(value: str) -> object:
    if value.strip().lower() not in ("true", "false"):
        raise ValueError("true or false")
    return value.strip().lower() == "true"


def _choice(*choices: str) -> Callable[[str], object]:
    def read(value: str) -> object:
        chosen = {choice.lower(): choice for choice in choices}.get(value.strip().lower())
        if chosen is None:
            raise ValueError(f"one of {', '.join(choices)}")
        return chosen

    return read


def _mechanism(value: str) -> object:
    if value.strip().upper() == "OAUTHBEARER":
        raise ValueError("another mechanism than OAUTHBEARER, whose tokens need code of their own")
    return _choice("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "AWS_MSK_IAM")(value)


def _compression(value: str) -> object:
    chosen = _choice("none", "gzip", "snappy", "lz4", "zstd")(value)
    return None if chosen == "none" else chosen


def _acks(value: str) -> object:
    chosen = _choice("all", "-1", "0", "1")(value)
    return "all" if chosen in ("all", "-1") else int(str(chosen))


def _host_check(value: str) -> object:
    chosen = _choice("https", "none", "")(value)
    return chosen == "https"


def _pem_file(value: str) -> object:
    try:
        content = Path(value).read_bytes()
    except OSError as error:
        raise ValueError(f"a PEM file that can be read ({error.strerror})") from error
    if b"-----BEGIN" not in content:
        raise ValueError(
            "a PEM file, which keytool -exportcert -rfc or openssl pkcs12 -nodes makes "
            "from a JKS or PKCS12 store"
        )
    return value


def _as_librdkafka(value: object) -> str | int:
    match value:
        case bool():  # ssl_check_hostname is the only one
            return "https" if value else "none"
        case list():
            return ",".join(value)
        case str():
            return "".join([value])  # the characters, even of a Secret
    assert isinstance(value, int)
    return value


# Key: (option of kafka-python, function that reads the value). None: the value is only checked.
_OPTIONS: dict[str, tuple[str | None, Callable[[str], object]]] = {
    # both clients
    "client.id": ("client_id", _text),
    "client.dns.lookup": (
        "client_dns_lookup",
        _choice("use_all_dns_ips", "resolve_canonical_bootstrap_servers_only"),
    ),
    "connections.max.idle.ms": ("connections_max_idle_ms", _integer),
    "max.in.flight.requests.per.connection": ("max_in_flight_requests_per_connection", _integer),
    "metadata.max.age.ms": ("metadata_max_age_ms", _integer),
    "receive.buffer.bytes": ("receive_buffer_bytes", _integer),
    "reconnect.backoff.ms": ("reconnect_backoff_ms", _integer),
    "reconnect.backoff.max.ms": ("reconnect_backoff_max_ms", _integer),
    "request.timeout.ms": ("request_timeout_ms", _integer),
    "retry.backoff.ms": ("retry_backoff_ms", _integer),
    "send.buffer.bytes": ("send_buffer_bytes", _integer),
    "security.protocol": (
        "security_protocol",
        _choice("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"),
    ),
    "sasl.mechanism": ("sasl_mechanism", _mechanism),
    "sasl.mechanisms": ("sasl_mechanism", _mechanism),
    "sasl.username": ("sasl_plain_username", _text),
    "sasl.password": ("sasl_plain_password", _secret),
    "sasl.kerberos.service.name": ("sasl_kerberos_service_name", _text),
    "ssl.ca.location": ("ssl_cafile", _pem_file),
    "ssl.truststore.location": ("ssl_cafile", _pem_file),
    "ssl.truststore.type": (None, _choice("PEM")),
    "ssl.certificate.location": ("ssl_certfile", _pem_file),
    "ssl.keystore.location": ("ssl_certfile", _pem_file),
    "ssl.keystore.type": (None, _choice("PEM")),
    "ssl.key.location": ("ssl_keyfile", _pem_file),
    "ssl.key.password": ("ssl_password", _secret),
    "ssl.crl.location": ("ssl_crlfile", _pem_file),
    "ssl.cipher.suites": ("ssl_ciphers", _text),
    "ssl.endpoint.identification.algorithm": ("ssl_check_hostname", _host_check),
    # the consumer
    "client.rack": ("client_rack", _text),
    "group.id": ("group_id", _text),
    "fetch.max.bytes": ("fetch_max_bytes", _integer),
    "fetch.max.wait.ms": ("fetch_max_wait_ms", _integer),
    "fetch.wait.max.ms": ("fetch_max_wait_ms", _integer),
    "fetch.message.max.bytes": ("max_partition_fetch_bytes", _integer),
    "fetch.min.bytes": ("fetch_min_bytes", _integer),
    "max.partition.fetch.bytes": ("max_partition_fetch_bytes", _integer),
    "max.poll.records": ("max_poll_records", _positive_integer),
    # the producer
    "acks": ("acks", _acks),
    "request.required.acks": ("acks", _acks),
    "batch.size": ("batch_size", _integer),
    "compression.codec": ("compression_type", _compression),
    "compression.type": ("compression_type", _compression),
    "delivery.timeout.ms": ("delivery_timeout_ms", _integer),
    "enable.idempotence": ("enable_idempotence", _boolean),
    "linger.ms": ("linger_ms", _integer),
    "queue.buffering.max.ms": ("linger_ms", _integer),
    "max.block.ms": ("max_block_ms", _integer),
    "max.request.size": ("max_request_size", _integer),
    "message.max.bytes": ("max_request_size", _integer),
    "message.timeout.ms": ("delivery_timeout_ms", _integer),
    "retries": ("retries", _integer),
}

# Option of kafka-python: property of librdkafka, which has none for the size of a poll.
_LIBRDKAFKA = {
    "bootstrap_servers": "bootstrap.servers",
    "client_id": "client.id",
    "client_dns_lookup": "client.dns.lookup",
    "connections_max_idle_ms": "connections.max.idle.ms",
    "max_in_flight_requests_per_connection": "max.in.flight.requests.per.connection",
    "metadata_max_age_ms": "topic.metadata.refresh.interval.ms",
    "receive_buffer_bytes": "socket.receive.buffer.bytes",
    "reconnect_backoff_ms": "reconnect.backoff.ms",
    "reconnect_backoff_max_ms": "reconnect.backoff.max.ms",
    "request_timeout_ms": "socket.timeout.ms",
    "retry_backoff_ms": "retry.backoff.ms",
    "send_buffer_bytes": "socket.send.buffer.bytes",
    "security_protocol": "security.protocol",
    "sasl_mechanism": "sasl.mechanism",
    "sasl_plain_username": "sasl.username",
    "sasl_plain_password": "sasl.password",
    "sasl_kerberos_service_name": "sasl.kerberos.service.name",
    "ssl_cafile": "ssl.ca.location",
    "ssl_certfile": "ssl.certificate.location",
    "ssl_keyfile": "ssl.key.location",
    "ssl_password": "ssl.key.password",
    "ssl_crlfile": "ssl.crl.location",
    "ssl_ciphers": "ssl.cipher.suites",
    "ssl_check_hostname": "ssl.endpoint.identification.algorithm",
    "client_rack": "client.rack",
    "fetch_max_bytes": "fetch.max.bytes",
    "fetch_max_wait_ms": "fetch.wait.max.ms",
    "fetch_min_bytes": "fetch.min.bytes",
    "max_partition_fetch_bytes": "max.partition.fetch.bytes",
}

_NO_GROUP = "one consumer reads all partitions, without group membership; remove the key"
_RAW_BYTES = (
    "records are read and written as raw bytes, because an error in a (de)serializer would lose "
    "the records around it; remove the key"
)
_POSITIONS = "the positions in the snapshot count, and committed offsets follow them"
_JAVA_CLASS = "its value is the name of a Java class"
_REFUSED: dict[str, str] = {
    "auto.offset.reset": (
        "a new run begins at the beginning and a resumed run at its positions; "
        "a jump would lose or repeat records"
    ),
    "enable.auto.commit": _POSITIONS,
    "auto.commit.interval.ms": _POSITIONS,
    "isolation.level": (
        "it is always read_committed, so that records of aborted transactions are not read"
    ),
    "check.crcs": "checksums are always verified",
    "key.deserializer": _RAW_BYTES,
    "value.deserializer": _RAW_BYTES,
    "key.serializer": _RAW_BYTES,
    "value.serializer": _RAW_BYTES,
    "group.instance.id": _NO_GROUP,
    "heartbeat.interval.ms": _NO_GROUP,
    "max.poll.interval.ms": _NO_GROUP,
    "partition.assignment.strategy": _NO_GROUP,
    "session.timeout.ms": _NO_GROUP,
    "transactional.id": "nothing is written in transactions",
    "buffer.memory": f"unacknowledged values are bounded at {IN_FLIGHT_BYTES >> 20} MiB",
    "enable.ssl.certificate.verification": (
        "certificates are always verified; set ssl.ca.location for a self-signed certificate"
    ),
    "ssl.keystore.password": "set ssl.key.password for the key in a PEM file",
    "ssl.truststore.password": "a PEM file of certificates has no password",
    "sasl.client.callback.handler.class": _JAVA_CLASS,
    "sasl.login.callback.handler.class": _JAVA_CLASS,
}

_NOT_SHOWN = "(not shown: it may be a secret)"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}(\.[a-z][a-z0-9_-]{0,30}){1,6}")
_NAME_OF = re.compile(r"[:\s]")  # a password may follow
_SHORT = re.compile(r".{0,40}")
_FILE_NAME = re.compile(r".{1,200}\.\w{1,8}")  # a key in base64 has no full stop
_PROPERTY = re.compile(r"(?P<key>(?:[^\\=:\s]|\\.)*)\s*[=:]?\s*(?P<value>.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_UNICODE_ESCAPE_CHARACTERS = 5  # u and four hexadecimal digits
_CONTROL_CHARACTERS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_JAAS_OPTION = re.compile(r"""(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([^\s;"']+))""")


def _server_list(servers: str) -> list[str]:
    listed = [server.strip() for server in servers.split(",") if server.strip()]
    for server in listed:
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+):\d{1,5}", server):
            if "//" in server and "@" not in server:
                raise KafkaOptionError(
                    "a bootstrap server must be host:port, such as localhost:9092, without a "
                    "scheme such as http://: brokers speak Kafka's own protocol"
                )
            shown = "a login (not shown: it may hold a password)" if "@" in server else repr(server)
            raise KafkaOptionError(
                f"a bootstrap server must be host:port, such as localhost:9092, got {shown}"
            )
    if not listed:
        raise KafkaOptionError("no bootstrap server is given: host:port, such as localhost:9092")
    return listed


def _jaas_login(value: str) -> dict[str, object]:
    found = {
        name: re.sub(r"\\(.)", r"\1", double) or single or bare
        for name, double, single, bare in _JAAS_OPTION.findall(value)
    }
    if "username" not in found or "password" not in found:
        raise KafkaOptionError(
            "Kafka option 'sasl.jaas.config' must hold "
            'username="..." and password="..." (the value is not shown)'
        )
    return {
        "sasl_plain_username": found["username"],
        "sasl_plain_password": Secret(found["password"]),
    }


def _check_login(options: Mapping[str, object]) -> None:
    protocol = str(options.get("security_protocol", "PLAINTEXT"))
    mechanism = str(options.get("sasl_mechanism", ""))
    if any(name.startswith("sasl_") for name in options) and not protocol.startswith("SASL_"):
        raise KafkaOptionError(
            f"a login is given, but 'security.protocol' is {protocol}: "
            "set it to SASL_SSL (or SASL_PLAINTEXT)"
        )
    if any(name.startswith("ssl_") for name in options) and not protocol.endswith("SSL"):
        raise KafkaOptionError(
            f"TLS options are given, but 'security.protocol' is {protocol}: "
            "set it to SSL or SASL_SSL"
        )
    if protocol.startswith("SASL_") and not mechanism:
        raise KafkaOptionError(
            f"'security.protocol' is {protocol}, so 'sasl.mechanism' is needed: "
            "PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"
        )
    if (
        mechanism.startswith(("PLAIN", "SCRAM"))
        and not {"sasl_plain_username", "sasl_plain_password"} <= options.keys()
    ):
        needed = "'sasl.username' and 'sasl.password' (or 'sasl.jaas.config') are needed"
        raise KafkaOptionError(f"'sasl.mechanism' is {mechanism}, so {needed}")


def _logical_lines(text: str) -> Iterator[str]:
    """Yield the lines without comments and blank lines, with continued lines joined."""
    begun = ""
    for line in text.split("\n"):
        line = line.removesuffix("\r").lstrip(" \t\f")
        if not begun and (not line or line[0] in "#!"):
            continue
        trailing_backslashes = len(line) - len(line.rstrip("\\"))
        if trailing_backslashes % 2:  # an even number is escaped backslashes
            begun += line[:-1]
            continue
        yield begun + line
        begun = ""
    if begun:
        yield begun


def _unescape(text: str) -> str:
    return _ESCAPED.sub(_unescaped, text)


def _unescaped(found: re.Match[str]) -> str:
    escaped = found[1]
    if len(escaped) == _UNICODE_ESCAPE_CHARACTERS:
        return chr(int(escaped[1:], 16))
    return _CONTROL_CHARACTERS.get(escaped, escaped)
