"""What a run answers over HTTP: the page, metrics, probes and reports. It changes nothing.

Starlette, because it is a routing table over ASGI and little else.

    GET /           the page, and its files
    GET /metrics    for Prometheus
    GET /healthz    200 while the loop goes round, 503 if it has stood still for minutes
    GET /readyz     200 once a snapshot is published, 503 before
    GET /reports    the newest reports, windows and snapshots, as JSON

All of it runs in the thread of the server, and reads a `View` and the disk.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stream_ctr.monitor.prometheus import Exposition, RunCollector
from stream_ctr.monitor.recent_reports import Kept, RecentReports, View
from stream_ctr.monitor.snapshot_list import SnapshotList, Snapshots

PAGE = Path(__file__).parent / "page"
STILL_SECONDS = 300.0
"""A loop that did not go round for so long is taken for dead; a large snapshot takes less."""
FORMAT = 1
_BUSY_SHARE = 0.02  # of the time, at most, for building /reports anew
_FAST = 1  # of gzip's levels: a third of the time of the usual one
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Plotly writes style elements. Everything else comes from files of this server.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "cache-control": "no-cache",  # ask with the ETag
    "content-security-policy": _POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def monitor_app(recent: RecentReports, directory: Path, *, page: Path = PAGE) -> Starlette:
    """Return the ASGI application for a run whose state is in `directory`.

    `page` is the folder of the page's files.
    """
    snapshots = SnapshotList(directory)
    exposition = Exposition(RunCollector(recent, snapshots))
    reports = ReportsBody(recent, snapshots)

    async def metrics(request: Request) -> Response:
        body, media_type = exposition.encode(request.headers.get("accept", ""))
        return Response(body, headers={**_HEADERS, "content-type": media_type})

    async def healthz(request: Request) -> Response:
        age = recent.beat_age
        alive = age is None or age < STILL_SECONDS or recent.view.ended
        known = {"status": "alive" if alive else "stalled", "loop_beat_age_seconds": age}
        return JSONResponse(known, 200 if alive else 503, headers=_HEADERS)

    async def readyz(request: Request) -> Response:
        ready = snapshots.read().pointer is not None
        status = "ready" if ready else "nothing is published yet"
        return JSONResponse({"status": status}, 200 if ready else 503, headers=_HEADERS)

    async def report_list(request: Request) -> Response:
        return reports.now().answer(request)

    return Starlette(
        routes=[
            *(Route(path, file.answer_async) for path, file in _page_files(page).items()),
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/reports", report_list),
        ]
    )


class Body:
    """A body with its ETag, compressed once, for those who take gzip."""

    def __init__(self, data: bytes, media_type: str, *, tag: str = "") -> None:
        self._data = data
        self._media_type = media_type
        self._tag = f'W/"{tag or hashlib.sha256(data).hexdigest()[:32]}"'
        self._compressed: bytes | None = None

    def answer(self, request: Request) -> Response:
        """Return the body, or 304 to a client that has it."""
        headers = {
            **_HEADERS,
            "content-type": self._media_type,
            "etag": self._tag,
            "vary": "accept-encoding",
        }
        known = request.headers.get("if-none-match", "")
        if self._tag in (tag.strip() for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self._data, headers=headers)
        return Response(self.compress(), headers={**headers, "content-encoding": "gzip"})

    def compress(self) -> bytes:
        """Return the body in gzip."""
        if self._compressed is None:
            self._compressed = gzip.compress(self._data, _FAST, mtime=0)
        return self._compressed

    async def answer_async(self, request: Request) -> Response:
        """Return the body, as a route calls it."""
        return self.answer(request)


class File:
    """A file of the page, which is read when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def answer_async(self, request: Request) -> Response:
        """Return the contents of the file."""
        return self._body.answer(request)

    @cached_property
    def _body(self) -> Body:
        return Body(self._path.read_bytes(), _MEDIA_TYPES[self._path.suffix])


@dataclass(frozen=True, slots=True)
class _Built:
    view: View
    snapshots: Snapshots
    body: Body
    seconds: float
    at: float


class ReportsBody:
    """The body of /reports. It is built anew when there is something new.

    Building and compressing takes time that the learner could use: after a body that took t
    seconds, the next one is built t / 0.02 seconds later at the earliest.
    """

    def __init__(
        self,
        recent: RecentReports,
        snapshots: SnapshotList,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recent = recent
        self._snapshots = snapshots
        self._clock = clock
        self._start = secrets.token_hex(8)  # views of two processes have the same versions
        self._count = 0
        self._built: _Built | None = None

    def now(self) -> Body:
        """Return the newest body."""
        built = self._built
        view, snapshots = self._recent.view, self._snapshots.read()
        began = self._clock()
        if built:
            same = built.view is view and built.snapshots is snapshots
            if same or began - built.at < built.seconds / _BUSY_SHARE:
                return built.body
        self._count += 1
        data = encode_reports(view, snapshots)
        body = Body(data, "application/json", tag=f"{self._start}-{self._count}")
        body.compress()
        ended = self._clock()
        self._built = _Built(view, snapshots, body, ended - began, ended)
        return body


def encode_reports(view: View, snapshots: Snapshots) -> bytes:
    """Return the JSON of /reports; the reports in it are the bytes that were encoded before.

    >>> encode_reports(View("ab"), Snapshots())[:46]
    b'{"format":1,"run":"ab","model":"","ended":fals'
    """
    head = msgspec.json.encode(
        {"format": FORMAT, "run": view.run, "model": view.model, "ended": view.ended}
    )
    return b"".join(
        (
            head[:-1],
            b',"reports":[',
            _joined(view.reports),
            b'],"windows":[',
            _joined(view.windows),
            b'],"snapshots":',
            msgspec.json.encode(snapshots.to_json_objects()),
            b"}",
        )
    )


def _joined(kept: tuple[Kept, ...]) -> bytes:
    return b",".join(each.data for each in kept)


def _page_files(folder: Path) -> Mapping[str, File | Body]:
    """Return the files of the page by path, or a text that names the paths if there is no page."""
    files: dict[str, File | Body] = {
        f"/{path.name}": File(path)
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.suffix in _MEDIA_TYPES
    }
    charts = _plotly()
    if "/index.html" not in files or charts is None:
        return {"/": Body(b"/metrics /healthz /readyz /reports\n", "text/plain; charset=utf-8")}
    return {"/": files.pop("/index.html"), "/plotly.min.js": File(charts), **files}


def _plotly() -> Path | None:
    """Return the JavaScript in plotly's wheel, without importing plotly, which takes a second."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "package_data" / "plotly.min.js"
    return path if path.is_file() else None
