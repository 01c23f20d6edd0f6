"""Requests need the token, or come from this machine and say so."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from stream_ctr.errors import ConfigError
from stream_ctr.http.access import Token, protect, read_token
from stream_ctr.http.address import Address
from stream_ctr.http.server import HttpServer

SECRET = "0123456789abcdef-the-token"
OTHERS = Address("0.0.0.0", 9100)
FREE = Address("127.0.0.1", 0)
LOCAL = Address("127.0.0.1", 9100)
BROWSER = {"accept": "text/html,application/xhtml+xml"}


async def secrets(scope: Scope, receive: Receive, send: Send) -> None:
    """An app whose answer holds the path, the query and a secret."""
    request = Request(scope)
    await PlainTextResponse(f"secret {request.url.path} {request.url.query}")(scope, receive, send)


@pytest.fixture(scope="module")
def with_token() -> Iterator[str]:
    with HttpServer(protect(secrets, OTHERS, Token(SECRET)), FREE) as server:
        yield server.address.url


@pytest.fixture(scope="module")
def without_token() -> Iterator[str]:
    with HttpServer(protect(secrets, LOCAL, None), FREE) as server:
        yield server.address.url


@pytest.fixture
def guarded(with_token: str) -> Iterator[httpx.Client]:
    """A browser or program that has shown no token yet."""
    with httpx.Client(base_url=with_token) as client:
        yield client


@pytest.fixture
def local(without_token: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=without_token) as client:
        yield client


def token_file(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.chmod(path, mode)
    return path


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def is_refused(answer: httpx.Response, status: int = 401) -> bool:
    return answer.status_code == status and "secret" not in answer.text


# -- programs ------------------------------------------------------------------------------------


def test_a_request_with_the_token_is_answered(guarded: httpx.Client) -> None:
    assert guarded.get("/reports", headers=bearer(SECRET)).text == "secret /reports "


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        SECRET,
        f"Basic {SECRET}",
        f"Bearer {SECRET}x",
        f"Bearer {SECRET[:-1]}",
        f"Bearer {Token(SECRET).session}",
    ],
)
def test_a_request_without_the_token_is_refused(guarded: httpx.Client, header: str | None) -> None:
    answer = guarded.get("/reports", headers={} if header is None else {"authorization": header})
    assert is_refused(answer)
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.security(
    "the port answers only those who may ask", how="Authorization headers of any bytes"
)
@given(shown=st.binary(max_size=60))
def test_no_header_of_any_bytes_is_answered(with_token: str, shown: bytes) -> None:
    header = b"Bearer " + bytes(byte for byte in shown if byte not in b"\r\n\0")
    where = httpx.URL(with_token)
    with socket.create_connection((where.host, where.port or 0)) as sent:
        sent.sendall(b"GET / HTTP/1.0\r\nHost: x\r\nAuthorization: " + header + b"\r\n\r\n")
        answer = b"".join(iter(lambda: sent.recv(4096), b""))
    assert answer.split()[1] in (b"400", b"401")
    assert b"secret" not in answer


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_every_method_needs_the_token(guarded: httpx.Client, method: str) -> None:
    assert guarded.request(method, "/reports").status_code == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_need_no_token(guarded: httpx.Client, local: httpx.Client, path: str) -> None:
    assert guarded.get(path).status_code == 200
    assert local.get(path, headers={"host": "10.0.0.7:9100"}).status_code == 200


@pytest.mark.parametrize("path", ["/healthz/", "//healthz", "/healthz/../reports", "/Healthz"])
def test_only_these_two_paths_are_open(guarded: httpx.Client, path: str) -> None:
    assert is_refused(guarded.get(path))


# -- browsers ------------------------------------------------------------------------------------


def test_a_browser_gets_a_form(guarded: httpx.Client) -> None:
    answer = guarded.get("/", headers=BROWSER)
    assert is_refused(answer)
    assert '<form method="post" action="/login">' in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_form_logs_a_browser_in(guarded: httpx.Client) -> None:
    answer = guarded.post("/login", data={"token": SECRET}, headers=BROWSER)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert guarded.get("/", headers=BROWSER).text == "secret / "


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(guarded: httpx.Client) -> None:
    cookie = guarded.post("/login", data={"token": SECRET}).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert SECRET not in cookie
    assert "Secure" not in cookie


def test_the_cookie_is_for_https_only_where_it_came_by_https(guarded: httpx.Client) -> None:
    behind = {"x-forwarded-proto": "https"}  # a proxy on this machine says so
    answer = guarded.post("/login", data={"token": SECRET}, headers=behind)
    assert "Secure" in answer.headers["set-cookie"]


def test_a_wrong_token_sets_no_cookie_and_is_not_shown(guarded: httpx.Client) -> None:
    answer = guarded.post("/login", data={"token": "<b>guess"}, headers=BROWSER)
    assert is_refused(answer)
    assert "This is not the token." in answer.text
    assert "guess" not in answer.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "body", [b"", b"token", b"\xff=\xfe", b"token=" + 10_000 * b"x", b"a=&b=&c=&token=%FF"]
)
def test_a_body_that_is_no_form_is_refused(guarded: httpx.Client, body: bytes) -> None:
    assert is_refused(guarded.post("/login", content=body))


def test_a_body_of_too_many_fields_is_refused(guarded: httpx.Client) -> None:
    assert is_refused(guarded.post("/login", content=f"a=&b=&c=&d=&e=&token={SECRET}"))


@pytest.mark.security(
    "the port answers only those who may ask",
    how="cookies of another token, and the token itself as a cookie",
)
def test_the_cookie_of_another_token_is_refused(guarded: httpx.Client) -> None:
    mine, other = Token(SECRET), Token("another-token-of-another-run")
    assert mine.cookie != other.cookie  # two ports of one host share their cookies
    for name in (mine.cookie, other.cookie):
        assert is_refused(guarded.get("/", headers={"cookie": f"{name}={other.session}"}))
    assert is_refused(guarded.get("/", headers={"cookie": f"{mine.cookie}={SECRET}"}))
    assert guarded.get("/", headers={"cookie": f"a=b; {mine.cookie}={mine.session}"}).is_success


def test_a_link_with_the_token_leads_to_the_page_without_it(guarded: httpx.Client) -> None:
    answer = guarded.get(f"/reports?token={SECRET}&from=2", headers=BROWSER)
    assert (answer.status_code, answer.headers["location"]) == (303, "/reports?from=2")
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert guarded.get("/reports").is_success


def test_a_link_leads_to_no_other_server(guarded: httpx.Client) -> None:
    answer = guarded.get(f"{guarded.base_url}/evil.example/?token={SECRET}", headers=BROWSER)
    assert answer.headers["location"] == "/evil.example/"


def test_a_token_in_the_query_of_a_request_that_changes_something_is_refused(
    guarded: httpx.Client,
) -> None:
    assert is_refused(guarded.post(f"/predict?token={SECRET}"))


# -- without a token -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "127.0.0.1:9100", "[::1]:9100", "127.1.1.1"]
)
def test_this_machine_is_answered_without_a_token(local: httpx.Client, host: str) -> None:
    assert local.get("/", headers={"host": host}).text == "secret / "


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:9100", "localhost.evil.example", "127.0.0.1.nip.example", ""],
)
def test_a_foreign_name_that_leads_to_this_machine_is_refused(
    local: httpx.Client, host: str
) -> None:
    answer = local.get("/", headers={"host": host})
    assert is_refused(answer, 403)
    assert "--http-token-file" in answer.text


@pytest.mark.security(
    "the port answers only those who may ask",
    how="an address that other machines reach, without a token",
)
def test_an_address_that_others_reach_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--http-token-file"):
        read_token(OTHERS, None)
    with pytest.raises(ConfigError, match="--http-token-file"):
        protect(secrets, OTHERS, None)
    assert read_token(LOCAL, None) is None
    assert read_token(OTHERS, token_file(tmp_path, SECRET)) is not None


# -- the token file ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [SECRET, f"{SECRET}\n", f"  {SECRET}\r\n# a note\n"])
def test_the_token_is_the_first_line_of_its_file(tmp_path: Path, text: str) -> None:
    assert Token.read(token_file(tmp_path, text)).is_right(SECRET)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"short\n", "holds 5 characters; a token needs 16 or more"),
        (b"sixteen characters and a space", "printable ASCII characters without a space"),
        (b"\xff" * 20, "printable ASCII characters without a space"),
    ],
)
def test_a_file_without_a_token_is_named(tmp_path: Path, text: bytes, problem: str) -> None:
    path = token_file(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        Token.read(path)
    assert problem in str(refused.value)
    assert "openssl rand -hex 32" in str(refused.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o666])
def test_a_file_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path, SECRET, mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600 {path}"):
        Token.read(path)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640])
def test_a_file_of_its_owner_and_group_is_read(tmp_path: Path, mode: int) -> None:
    assert Token.read(token_file(tmp_path, SECRET, mode)).is_right(SECRET)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token: No such file or directory"):
        Token.read(tmp_path / "token")
    with pytest.raises(ConfigError, match="Is a directory"):
        Token.read(tmp_path)


def test_the_token_is_in_no_representation() -> None:
    assert SECRET not in repr(Token(SECRET))
    assert SECRET not in str(Token(SECRET))
