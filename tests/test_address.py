"""Addresses of servers are read strictly, and it is known who can reach them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.errors import ConfigError
from stream_ctr.http.address import Address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9100", "127.0.0.1", 9100),
        (":9100", "127.0.0.1", 9100),
        (" localhost:80 ", "localhost", 80),
        ("[::1]:9100", "::1", 9100),
        ("[0:0:0:0:0:0:0:1]:0", "::1", 0),
        ("0.0.0.0:65535", "0.0.0.0", 65535),
        ("trainer-0.ads.example:9100", "trainer-0.ads.example", 9100),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no port"),
        ("9100", "has no port"),
        ("localhost", "has no port"),
        ("localhost:", "has no port from 0 to 65535"),
        ("localhost:http", "has no port from 0 to 65535"),
        ("localhost:65536", "has no port from 0 to 65535"),
        ("localhost:-1", "has no port from 0 to 65535"),
        ("localhost:٣", "has no port from 0 to 65535"),
        ("::1:9100", "has an IPv6 address without brackets"),
        ("[::g]:9100", "has no valid IPv6 address in its brackets"),
        ("[fe80::1%eth0%]:1\n2:3", "has an IPv6 address without brackets"),
        ("http://localhost:9100", "has an IPv6 address without brackets"),
        ("*:9100", "has no valid host name: '*'"),
        ("a b:9100", "has no valid host name: 'a b'"),
    ],
)
def test_what_is_no_address_is_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Address.parse(text)
    message = str(refused.value)
    assert problem in message
    assert message.endswith("127.0.0.1:9100, or :9100 for this machine only")
    assert "\n" not in message


@given(st.text())
def test_any_text_is_an_address_or_one_clear_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigError:
        return
    assert 0 <= address.port <= 65535
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize("host", ["127.0.0.1", "127.255.0.3", "::1", "localhost", "LOCALHOST"])
def test_loopback_addresses_are_known(host: str) -> None:
    assert Address(host, 1).is_loopback


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "localhost.example", "127.0.0.1.example"]
)
def test_every_other_address_can_be_reached_from_elsewhere(host: str) -> None:
    assert not Address(host, 1).is_loopback


def test_an_ipv6_address_keeps_its_brackets_in_a_url() -> None:
    assert Address.parse("[::1]:9100").url == "http://[::1]:9100"
    assert Address.parse(":9100").url == "http://127.0.0.1:9100"
