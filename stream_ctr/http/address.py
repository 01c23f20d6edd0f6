"""The address that a server listens on."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from stream_ctr.errors import ConfigError
from stream_ctr.messages import one_line

LOOPBACK = "127.0.0.1"
_HIGHEST_PORT = 65535
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_EXAMPLE = "give HOST:PORT, such as 127.0.0.1:9100, or :9100 for this machine only"


@dataclass(frozen=True, slots=True)
class Address:
    """A host, which is a name or an IP address without brackets, and a port.

    Port 0 stands for a free port that the system chooses.

    >>> Address.parse("[::1]:9100")
    Address(host='::1', port=9100)
    >>> str(Address.parse(":9100"))
    '127.0.0.1:9100'
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `HOST:PORT`. An empty host is the loopback address 127.0.0.1.

        Raises `ConfigError` for anything else.

        >>> Address.parse("9100")
        Traceback (most recent call last):
        ...
        stream_ctr.errors.ConfigError: address '9100' has no port; give HOST:PORT, such as \
127.0.0.1:9100, or :9100 for this machine only
        """
        host, colon, port = text.strip().rpartition(":")
        if not colon:
            raise _wrong(text, "has no port")
        return cls(_host(host, text), _port(port, text))

    @property
    def is_loopback(self) -> bool:
        """Tell whether only programs of this machine can connect.

        >>> [Address.parse(text).is_loopback for text in ("localhost:1", "127.1.2.3:1", "[::1]:1")]
        [True, True, True]
        >>> [Address.parse(text).is_loopback for text in ("0.0.0.0:1", "[::]:1", "trainer:1")]
        [False, False, False]
        """
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """The address as a browser takes it.

        >>> Address("::1", 9100).url
        'http://[::1]:9100'
        """
        return f"http://{self}"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Tell whether a host, a name or an IP address without brackets, is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host(host: str, text: str) -> str:
    if not host:
        return LOOPBACK
    if host.startswith("[") and host.endswith("]"):
        return _ipv6(host[1:-1], text)
    if ":" in host:
        raise _wrong(text, "has an IPv6 address without brackets")
    if not _HOST_NAME.fullmatch(host):
        raise _wrong(text, f"has no valid host name: {one_line(host)!r}")
    return host


def _ipv6(host: str, text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError:
        raise _wrong(text, "has no valid IPv6 address in its brackets") from None


def _port(port: str, text: str) -> int:
    if not (port.isascii() and port.isdigit()) or int(port[:6]) > _HIGHEST_PORT:
        raise _wrong(text, f"has no port from 0 to {_HIGHEST_PORT}")
    return int(port)


def _wrong(text: str, problem: str) -> ConfigError:
    return ConfigError(f"address {one_line(text)!r} {problem}; {_EXAMPLE}")
