"""The paths of a prediction server, as an ASGI application.

    POST /predict    predictions, see `bodies`; refusals are those of `answers`
    GET  /model      what is served: snapshot, fields, event time, positions
    GET  /healthz    200 while requests are answered
    GET  /readyz     200 once a model is loaded
    GET  /metrics    for Prometheus

The event loop reads and writes, and nothing else: bodies are parsed and scored in the thread of
`scoring`. Starlette finds the paths; the one that counts in microseconds speaks ASGI itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stream_ctr.messages import one_line
from stream_ctr.serve.answers import ARROW, JSON, Answer, Problem, Refused, refusal
from stream_ctr.serve.bodies import Limits
from stream_ctr.serve.describe import describe
from stream_ctr.serve.metrics import CONTENT_TYPE, Metrics
from stream_ctr.serve.scoring import DEADLINE, Answers, Scoring
from stream_ctr.serve.waiting import Request, WaitingRequests
from stream_ctr.snapshots.subscriber import Subscriber

TIMEOUT_HEADER = b"x-timeout-ms"
_MILLISECONDS = 1000
_SHOWN = 400  # characters of a message
_HELD_BODIES = 32  # of the largest size, by requests that arrive or wait


class Disconnected(Exception):
    """Raised when the client has left before its request was complete."""


@dataclass(frozen=True, slots=True)
class _Head:
    """What the headers of a request say."""

    is_arrow: bool
    length: int | None
    timeout_seconds: float | None


class Predict:
    """Answer POST /predict: read the body, let it wait for the model, and send what comes back."""

    def __init__(
        self,
        waiting: WaitingRequests,
        limits: Limits,
        timeout_seconds: float,
        count: Callable[[Answer, float], None],
    ) -> None:
        self._waiting = waiting
        self._limits = limits
        self._timeout_seconds = timeout_seconds
        self._count = count
        self._held_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        try:
            answer = await self._answer(scope, receive, started)
        except Refused as refused:
            answer = refused.answer
        except Disconnected:
            return
        self._count(answer, time.perf_counter() - started)
        await _send(answer, send)

    def deliver(self, answers: Answers) -> None:
        """Pass answers to their requests; called from the thread that predicts."""
        assert self._loop is not None  # a request came through it
        self._loop.call_soon_threadsafe(_deliver, answers)

    async def _answer(self, scope: Scope, receive: Receive, started: float) -> Answer:
        head = _head(scope)
        if head.length is not None:
            self._limits.require_body(head.length)
        self._require_place(head.length or 0)
        seconds = min(self._timeout_seconds, head.timeout_seconds or self._timeout_seconds)
        held = _Held(self)
        try:
            try:
                async with asyncio.timeout(seconds):
                    body = await self._body(receive, held)
            except TimeoutError:
                raise Refused(
                    HTTPStatus.REQUEST_TIMEOUT,
                    "slow_body",
                    f"the body did not arrive within {seconds:g} s",
                ) from None
            return await self._scored(body, head.is_arrow, started + seconds)
        finally:
            held.release()

    def _require_place(self, size: int) -> None:
        """Raise `Refused` if the request could not wait, before its body is read."""
        held = self._held_bytes + size > _HELD_BODIES * self._limits.body_bytes
        if held or self._waiting.full:
            raise _full()

    async def _body(self, receive: Receive, held: _Held) -> bytes:
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            parts.append(message.get("body", b""))
            held.add(len(parts[-1]))
            self._limits.require_body(held.size)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)
            self._require_place(0)

    async def _scored(self, body: bytes, is_arrow: bool, deadline: float) -> Answer:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        request = Request(body, is_arrow, deadline, partial(_resolve, future))
        if not self._waiting.put(request):
            raise _full()
        timer = loop.call_later(max(deadline - time.perf_counter(), 0.0), self._expire, request)
        try:
            return await future
        finally:
            timer.cancel()

    def _expire(self, request: Request) -> None:
        if self._waiting.withdraw(request):
            request.answer(DEADLINE)


class _Held:
    """The bytes of one body that count towards those of all."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self.size = 0

    def add(self, size: int) -> None:
        self.size += size
        self._predict._held_bytes += size

    def release(self) -> None:
        self._predict._held_bytes -= self.size
        self.size = 0


def _full() -> Refused:
    return Refused(
        HTTPStatus.SERVICE_UNAVAILABLE, "full", "too many requests wait; try again a little later"
    )


def _resolve(future: asyncio.Future[Answer], answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)


def _deliver(answers: Answers) -> None:
    for request, answer in answers:
        request.answer(answer)


def _head(scope: Scope) -> _Head:
    """Read the headers. Raises `Refused` for a body of another type, or a wrong timeout."""
    content_type, length, timeout = b"", None, None
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value.partition(b";")[0].strip().lower()
        elif name == b"content-length":
            length = int(value)
        elif name == TIMEOUT_HEADER:
            timeout = _timeout(value)
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            raise _wrong_type("a compressed body")
    if content_type not in (b"", JSON.encode(), ARROW.encode()):
        raise _wrong_type(f"the type {content_type.decode('latin-1')!r:.80}")
    return _Head(content_type == ARROW.encode(), length, timeout)


def _timeout(value: bytes) -> float:
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = 0.0
    if not 0.0 < milliseconds < float("inf"):
        raise Refused(
            HTTPStatus.BAD_REQUEST,
            "timeout_header",
            f"{TIMEOUT_HEADER.decode()} must be a positive number of milliseconds, "
            f"got {value.decode('latin-1')!r:.80}",
        )
    return milliseconds / _MILLISECONDS


def _wrong_type(given: str) -> Refused:
    return Refused(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "content_type",
        f"the body must be {JSON} or {ARROW}, without compression; got {given}",
    )


async def _send(answer: Answer, send: Send) -> None:
    headers = [
        (b"content-type", answer.content_type.encode()),
        (b"content-length", str(len(answer.body)).encode()),
        *((name.encode(), value.encode()) for name, value in answer.headers.items()),
    ]
    if answer.status == HTTPStatus.REQUEST_TIMEOUT:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": int(answer.status), "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


@dataclass(frozen=True, slots=True)
class Paths:
    """The paths besides /predict. Those for probes say nothing that needs a token."""

    subscriber: Subscriber
    scoring: Scoring
    metrics: Metrics
    model: str | None

    async def show_model(self, _: HttpRequest) -> Response:
        if self.subscriber.pointer is None:
            refused = self.subscriber.refusal
            error = f"no snapshot is loaded: {refused}" if refused else "none was published yet"
            problem = Problem(error=one_line(error, _SHOWN), reason="no_model")
            return _response(refusal(HTTPStatus.SERVICE_UNAVAILABLE, problem))
        return _json(describe(self.subscriber, self.model))

    async def show_health(self, _: HttpRequest) -> Response:
        running = self.scoring.running
        status = HTTPStatus.OK if running else HTTPStatus.INTERNAL_SERVER_ERROR
        health = self.subscriber.health
        document = {"running": running, "following": health.following, "healthy": health.ok}
        return _json(document, status)

    async def show_ready(self, _: HttpRequest) -> Response:
        ready = self.scoring.ready
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _json({"ready": ready}, status)

    async def show_metrics(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)


def make_app(predict: Predict, paths: Paths) -> Starlette:
    """Return the application. A path or method that it lacks is answered in JSON."""
    return Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/model", paths.show_model),
            Route("/healthz", paths.show_health),
            Route("/readyz", paths.show_ready),
            Route("/metrics", paths.show_metrics),
        ],
        exception_handlers={HTTPException: _http_error},
    )


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    reason = "path" if error.status_code == HTTPStatus.NOT_FOUND else "method"
    status = HTTPStatus(error.status_code)
    message = f"{status.phrase}: {where:.200}"
    response = _response(refusal(status, Problem(error=message, reason=reason)))
    response.headers.update(error.headers or {})
    return response


def _json(document: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(document), int(status), media_type=JSON)


def _response(answer: Answer) -> Response:
    return Response(
        answer.body, int(answer.status), dict(answer.headers), media_type=answer.content_type
    )
