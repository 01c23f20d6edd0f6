"""Who may ask: a token for every request, or programs of this machine only.

With a token, a program sends `Authorization: Bearer TOKEN`. A browser gets a form, and then a
cookie that holds a value derived from the token. The cookie is bound to the host name, so no other
site can read an answer with it, and it leaves the token itself nowhere in the browser.

Without a token only loopback addresses are served. A page of another site may still make the
browser of this machine ask, under a name that its owner points to 127.0.0.1 (DNS rebinding). Such
a request has a foreign name in its Host header, and is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import os
import stat
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stream_ctr.errors import ConfigError
from stream_ctr.http.address import Address, is_loopback

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
LOGIN_PATH = "/login"
_SHORTEST_TOKEN = 16  # characters: the number of guesses is not limited
_LONGEST_TOKEN_FILE = 4096  # bytes
_LONGEST_FORM = 8192  # bytes: a token of the longest file, percent-encoded in part
_MOST_FORM_FIELDS = 4
_MOST_QUERY_FIELDS = 20
_MAKE_ONE = "make one with: openssl rand -hex 32"
_SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_FORM = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>stream-ctr: token</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 24rem; margin: 20vh auto; padding: 0 1rem }}
input, button {{ font: inherit; width: 100%; box-sizing: border-box; padding: .5rem;
  margin: .25rem 0 }}
</style>
<h1>stream-ctr</h1>
<form method="post" action="{action}">
<label for="token">Token of --http-token-file</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Open</button>
</form>
<p role="alert">{problem}</p>
</html>
"""


class Token:
    """A secret that requests must show. It is compared in constant time and never printed.

    >>> token = Token("a secret of sixteen or more")
    >>> token.is_right("a secret of sixteen or more"), token.is_right("a guess")
    (True, False)
    >>> token
    Token(not shown)
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self.session = self._derive(b"session")
        self.cookie = f"stream-ctr-{self._derive(b'name')[:8]}"  # ports share their cookies

    @classmethod
    def read(cls, path: Path) -> Token:
        """Read the token from the first line of a file.

        Raises `ConfigError` if the file is missing, is readable by others, or holds no token of at
        least 16 printable ASCII characters.
        """
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(_LONGEST_TOKEN_FILE)
        except OSError as error:
            raise ConfigError(f"token file {path}: {error.strerror}; {_MAKE_ONE}") from None
        if stat.S_IMODE(mode) & stat.S_IRWXO:
            raise ConfigError(
                f"token file {path} is open to every user of this machine "
                f"(mode {stat.S_IMODE(mode):04o}); allow its owner only: chmod 600 {path}"
            )
        return cls(_checked(data, path))

    def is_right(self, shown: str) -> bool:
        """Tell whether `shown` is the token."""
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self._secret)

    def is_session(self, shown: str) -> bool:
        """Tell whether `shown` is the value of the cookie that a login sets."""
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self.session.encode())

    def _derive(self, purpose: bytes) -> str:
        return hmac.digest(self._secret, b"stream-ctr " + purpose, hashlib.sha256).hex()

    def __repr__(self) -> str:
        return "Token(not shown)"


def read_token(address: Address, path: Path | None) -> Token | None:
    """Return the token of a server at `address`, or None for a loopback address without one.

    Raises `ConfigError` if another machine could connect and there is no token file.
    """
    if path is not None:
        return Token.read(path)
    if address.is_loopback:
        return None
    raise ConfigError(
        f"address {address} can be reached from other machines, and there is no token; "
        "give a file that holds one with --http-token-file, or listen on 127.0.0.1"
    )


def protect(app: ASGIApp, address: Address, token: Token | None) -> ASGIApp:
    """Return `app` behind the check that belongs to its address.

    Paths of `OPEN_PATHS` are answered for everyone. With a token, all others need it. Without one,
    the address must be a loopback address, or `ConfigError` is raised.
    """
    if token is not None:
        return TokenRequired(app, token)
    read_token(address, None)
    return LoopbackOnly(app)


class LoopbackOnly:
    """Refuse requests that name another host than this machine in their Host header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with 403."""
        if scope["type"] != "lifespan" and scope["path"] not in OPEN_PATHS:
            host = Headers(scope=scope).get("host", "")
            if not is_loopback(_without_port(host)):
                await _refusal(
                    HTTPStatus.FORBIDDEN,
                    "This server answers as localhost only. Behind another name it needs a token: "
                    "start it with --http-token-file.",
                )(scope, receive, send)
                return
        await self._app(scope, receive, send)


class TokenRequired:
    """Let requests through that show the token, and give browsers a form to show it.

    `GET ?token=TOKEN` and the form set a cookie and lead to the same page without the token, so
    that it stays in no address bar.
    """

    def __init__(self, app: ASGIApp, token: Token) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with 401."""
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] == LOGIN_PATH and scope["method"] == "POST":
            answer = self._login(scope, _form_token(await _body(receive)), "/")
        elif self._may(headers):
            await self._app(scope, receive, send)
            return
        elif (shown := dict(_query(scope)).get("token")) and scope["method"] in ("GET", "HEAD"):
            answer = self._login(scope, shown, _without_token(scope))
        else:
            answer = _ask(headers)
        await answer(scope, receive, send)

    def _may(self, headers: Mapping[str, str]) -> bool:
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._token.is_right(shown.strip())
        cookies = cookie_parser(headers.get("cookie", ""))
        return self._token.is_session(cookies.get(self._token.cookie, ""))

    def _login(self, scope: Scope, shown: str, page: str) -> Response:
        if not self._token.is_right(shown):
            return _ask(Headers(scope=scope), "This is not the token.")
        answer = RedirectResponse(page, HTTPStatus.SEE_OTHER, headers=_SECURITY_HEADERS)
        answer.set_cookie(
            self._token.cookie,
            self._token.session,
            httponly=True,
            samesite="strict",
            secure=scope["scheme"] == "https",
        )
        return answer


def _ask(headers: Mapping[str, str], problem: str = "") -> Response:
    """Return 401, as a form for a browser and as a line for a program."""
    if "text/html" not in headers.get("accept", ""):
        return _refusal(HTTPStatus.UNAUTHORIZED, "Send the header Authorization: Bearer TOKEN.")
    page = _FORM.format(action=LOGIN_PATH, problem=html.escape(problem))
    answer = HTMLResponse(page, HTTPStatus.UNAUTHORIZED, headers=_SECURITY_HEADERS)
    answer.headers["www-authenticate"] = "Bearer"
    return answer


def _refusal(status: HTTPStatus, line: str) -> Response:
    answer = PlainTextResponse(f"{line}\n", status, headers=_SECURITY_HEADERS)
    if status is HTTPStatus.UNAUTHORIZED:
        answer.headers["www-authenticate"] = "Bearer"
    return answer


async def _body(receive: Receive) -> str:
    """Return the body of a request, or "" if it is too long or not ASCII, as no form is."""
    body = b""
    more = True
    while more and len(body) <= _LONGEST_FORM:
        message: Message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body.decode("ascii") if len(body) <= _LONGEST_FORM and body.isascii() else ""


def _form_token(body: str) -> str:
    try:
        return parse_qs(body, max_num_fields=_MOST_FORM_FIELDS).get("token", [""])[0]
    except ValueError:  # more fields
        return ""


def _query(scope: Scope) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            scope["query_string"].decode("latin-1"),
            keep_blank_values=True,
            max_num_fields=_MOST_QUERY_FIELDS,
        )
    except ValueError:  # more fields
        return []


def _without_token(scope: Scope) -> str:
    """Return path and query of a request without the token, as a path of this server."""
    rest = urlencode([(name, value) for name, value in _query(scope) if name != "token"])
    path = "/" + scope["path"].lstrip("/\\")  # //host would lead to another server
    return f"{path}?{rest}" if rest else path


def _without_port(host: str) -> str:
    """Return the host of a Host header without port and brackets.

    >>> [_without_port(host) for host in ("127.0.0.1:9100", "localhost", "[::1]:9100", "[::1]")]
    ['127.0.0.1', 'localhost', '::1', '::1']
    """
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _checked(data: bytes, path: Path) -> str:
    line = data.strip().split(b"\n")[0].strip()
    if not line:
        raise ConfigError(f"token file {path} is empty; {_MAKE_ONE}")
    if not all(0x21 <= byte <= 0x7E for byte in line):
        raise ConfigError(
            f"token file {path} must hold printable ASCII characters without a space; {_MAKE_ONE}"
        )
    if len(line) < _SHORTEST_TOKEN:
        raise ConfigError(
            f"token file {path} holds {len(line)} characters; a token needs {_SHORTEST_TOKEN} "
            f"or more, {_MAKE_ONE}"
        )
    return line.decode("ascii")
