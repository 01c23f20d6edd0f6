"""The monitor answers what the files of a run say, reads only, and is quick to say "the same"."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.observed import last_of, observed_run, recent_reports  # noqa: F401 - a fixture

from stream_ctr import monitor
from stream_ctr.http.access import protect
from stream_ctr.http.address import Address
from stream_ctr.http.server import HttpServer
from stream_ctr.monitor.app import STILL_SECONDS, ReportsBody, monitor_app
from stream_ctr.monitor.recent_reports import RecentReports
from stream_ctr.monitor.snapshot_list import SnapshotList
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.report_log import read_reports

FREE = Address("127.0.0.1", 0)


class Watch:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def recent(observed_run: Path, watch: Watch) -> RecentReports:  # noqa: F811
    recent = RecentReports(clock=watch)
    recent.add_all(read_reports(observed_run))
    return recent


@pytest.fixture
def client(observed_run: Path, recent: RecentReports) -> Iterator[httpx.Client]:  # noqa: F811
    yield from serving(recent, observed_run)


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[httpx.Client]:
    yield from serving(RecentReports(), tmp_path)


def serving(recent: RecentReports, state: Path, **options: Any) -> Iterator[httpx.Client]:
    app = protect(monitor_app(recent, state, **options), FREE, None)
    with (
        HttpServer(app, FREE) as server,
        httpx.Client(base_url=server.address.url) as client,
    ):
        yield client


def test_reports_are_those_that_were_written(
    client: httpx.Client,
    observed_run: Path,  # noqa: F811
) -> None:
    answer = client.get("/reports").json()
    written = list(read_reports(observed_run))
    assert answer["reports"] == [each for each in written if each["kind"] != "window"]
    assert answer["windows"] == [each for each in written if each["kind"] == "window"]
    assert len(answer["windows"]) > 1
    assert {key: answer[key] for key in ("format", "run", "model", "ended")} == {
        "format": 1,
        "run": last_of(observed_run)["run"],
        "model": "blend",
        "ended": True,
    }


def test_snapshots_are_those_on_the_disk(
    client: httpx.Client,
    observed_run: Path,  # noqa: F811
) -> None:
    listed = client.get("/reports").json()["snapshots"]
    assert [each["name"] for each in listed] == snapshot.snapshot_ids(observed_run / "snapshots")
    assert [each["loaded"] for each in listed] == [False] * (len(listed) - 1) + [True]
    assert set(listed[0]) >= {
        *("name", "sequence", "examples", "event_time", "written"),
        *("verdict", "reasons", "loaded"),
    }


def test_the_published_snapshot_is_in_the_report(
    client: httpx.Client,
    observed_run: Path,  # noqa: F811
) -> None:
    answer = client.get("/reports").json()
    published = answer["reports"][-1]["published"]
    loaded = next(each for each in answer["snapshots"] if each["loaded"])
    assert published == {
        "snapshot": loaded["name"],
        "event_time": loaded["event_time"],
        "written": loaded["written"],
    }


def test_a_client_that_has_the_newest_reports_gets_304(
    client: httpx.Client, recent: RecentReports
) -> None:
    tag = client.get("/reports").headers["etag"]
    again = client.get("/reports", headers={"if-none-match": f'"x", {tag}'})
    assert (again.status_code, again.content) == (304, b"")
    recent.add({"kind": "report", "run": "ab", "models": {}, "examples": 77})
    for _ in range(1000):
        changed = client.get("/reports", headers={"if-none-match": tag})
        if changed.status_code == 200:
            break
    assert changed.json()["reports"][-1]["examples"] == 77
    assert changed.headers["etag"] != tag


def test_reports_are_compressed_for_those_who_take_it(client: httpx.Client) -> None:
    packed = client.get("/reports")
    plain = client.get("/reports", headers={"accept-encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content
    assert int(packed.headers["content-length"]) < len(plain.content) / 3


def test_reports_are_built_again_only_after_fifty_times_as_long(
    observed_run: Path,  # noqa: F811
) -> None:
    watch = Watch()
    recent = recent_reports(observed_run)
    body = ReportsBody(recent, SnapshotList(observed_run), clock=iter(ticks(watch)).__next__)
    first = body.now()  # takes a second
    recent.add({"kind": "report", "run": "ab", "models": {}})
    watch.now = 50.0
    assert body.now() is first
    watch.now = 52.0
    assert body.now() is not first


def ticks(watch: Watch) -> Iterator[float]:
    """Yield times: the first two readings are a second apart."""
    yield 0.0
    yield 1.0
    while True:
        yield watch.now


def test_metrics_are_those_of_the_run(client: httpx.Client, observed_run: Path) -> None:  # noqa: F811
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    examples = re.search(r"^stream_ctr_examples_total (\S+)$", answer.text, re.MULTILINE)
    assert examples
    assert float(examples[1]) == last_of(observed_run)["examples"]


def test_a_published_run_is_ready(client: httpx.Client, empty: httpx.Client) -> None:
    assert client.get("/readyz").status_code == 200
    unready = empty.get("/readyz")
    assert (unready.status_code, unready.json()) == (503, {"status": "nothing is published yet"})


def test_a_loop_that_stands_still_is_not_healthy(
    client: httpx.Client, recent: RecentReports, watch: Watch
) -> None:
    recent.go_on()
    assert client.get("/healthz").status_code == 200  # it has not begun
    recent.beat()
    watch.now = STILL_SECONDS - 1
    assert client.get("/healthz").status_code == 200
    watch.now = STILL_SECONDS
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["status"]) == (503, "stalled")


def test_a_run_that_has_ended_is_healthy(
    client: httpx.Client, recent: RecentReports, watch: Watch
) -> None:
    recent.beat()
    watch.now = 10 * STILL_SECONDS
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/readyz", "/reports"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_but_get_and_head_is_allowed(client: httpx.Client, path: str, method: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize("path", ["/", "/metrics", "/readyz", "/reports"])
def test_head_has_the_headers_and_no_body(client: httpx.Client, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "path", ["/x", "/reports/", "/../app.py", "/%2e%2e/app.py", "/page/index.html", "//metrics"]
)
def test_no_other_path_is_answered(client: httpx.Client, path: str) -> None:
    assert client.get(f"{client.base_url}{path}").status_code in (404, 307)


def test_no_answer_lets_a_browser_load_from_elsewhere(client: httpx.Client) -> None:
    for path in ("/", "/metrics", "/healthz", "/reports"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


# -- the page ------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html><title>page</title>")
    (folder / "page.js").write_text("1")
    (folder / "page.css").write_text("p {}")
    (folder / "notes.txt").write_text("not a part of the page")
    return folder


@pytest.fixture
def with_page(page: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    yield from serving(RecentReports(), tmp_path, page=page)


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/plotly.min.js", "text/javascript; charset=utf-8"),
    ],
)
def test_the_files_of_the_page_are_served(
    with_page: httpx.Client, path: str, media_type: str
) -> None:
    answer = with_page.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
    again = with_page.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304


def test_the_charts_are_those_of_the_wheel(with_page: httpx.Client) -> None:
    assert "plotly.js" in with_page.get("/plotly.min.js").text[:400]


def test_only_files_of_a_page_are_served(with_page: httpx.Client) -> None:
    assert with_page.get("/notes.txt").status_code == 404


def test_without_a_page_the_paths_are_named(tmp_path: Path) -> None:
    for client in serving(RecentReports(), tmp_path, page=tmp_path):
        assert client.get("/").text.split() == ["/metrics", "/healthz", "/readyz", "/reports"]


def test_the_json_is_valid_while_nothing_is_known(empty: httpx.Client) -> None:
    assert json.loads(empty.get("/reports").content) == {
        "format": 1,
        "run": "",
        "model": "",
        "ended": False,
        "reports": [],
        "windows": [],
        "snapshots": [],
    }


def test_the_thread_of_the_port_knows_nothing_of_the_trainer() -> None:
    sources = Path(monitor.__file__).parent.glob("*.py")
    names = re.compile(r"^from stream_ctr(?:\.| import )(\w+)", re.MULTILINE)
    used = {name for source in sources for name in names.findall(source.read_text())}
    assert used == {"__version__", "errors", "messages", "monitor", "snapshots", "state_files"}
