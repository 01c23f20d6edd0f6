"""A server runs in a thread beside other work and leaves nothing behind."""

import logging
import signal
import socket
import threading
import time

import anyio
import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from stream_ctr.errors import ConfigError
from stream_ctr.http.address import Address
from stream_ctr.http.server import HttpServer

FREE = Address.parse("127.0.0.1:0")
HELLO = PlainTextResponse("hello")


def test_requests_are_answered_until_the_block_is_left() -> None:
    with HttpServer(HELLO, FREE) as server:
        assert server.address.port != 0
        assert httpx.get(server.address.url).text == "hello"
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address.url)


def test_the_port_can_be_bound_again_at_once() -> None:
    with HttpServer(HELLO, FREE) as first:
        httpx.get(first.address.url)
    with HttpServer(HELLO, first.address) as second:
        assert second.address == first.address
        assert httpx.get(second.address.url).text == "hello"


def test_a_port_in_use_is_one_clear_error() -> None:
    with HttpServer(HELLO, FREE) as server, pytest.raises(ConfigError) as refused:
        HttpServer(HELLO, server.address)
    assert str(refused.value) == (
        f"cannot listen on {server.address}: another process listens there; end it, or give "
        "another port"
    )


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("192.0.2.1:9100", "no network interface of this machine has this address"),
        ("no-such-host.invalid:9100", "cannot listen on no-such-host.invalid:9100"),
    ],
)
def test_an_address_of_another_machine_is_named(address: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        HttpServer(HELLO, Address.parse(address))


def test_ipv6_is_served() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        server = HttpServer(HELLO, Address.parse("[::1]:0"))
    except ConfigError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with server:
        assert httpx.get(server.address.url).text == "hello"


def test_signals_stay_with_the_command() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with HttpServer(HELLO, FREE):
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), HttpServer(HELLO, FREE) as server:
        httpx.get(f"{server.address.url}/?token=secret")
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


def test_an_answer_that_does_not_end_delays_the_stop_by_a_second_or_two() -> None:
    asked = threading.Event()

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked.set()
            await anyio.sleep_forever()

    with HttpServer(never, FREE) as server:
        with socket.create_connection(("127.0.0.1", server.address.port)) as waiting:
            waiting.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert asked.wait(10)
            began = time.monotonic()
            server.stop()
        assert time.monotonic() - began < 4
    assert "http" not in [thread.name for thread in threading.enumerate()]


def test_more_connections_than_allowed_get_503() -> None:
    with (
        HttpServer(HELLO, FREE, connections=2) as server,
        httpx.Client(base_url=server.address.url) as first,
        httpx.Client(base_url=server.address.url) as second,
    ):
        answers = [first.get("/").status_code, second.get("/").status_code]
        assert answers == [200, 503]
