"""The live page in headless Chromium: a real run's numbers, its states, and whoever reads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from support.browser import CHROMIUM, Browser, Tab
from support.commands import succeed
from support.finished_runs import MALFORMED, TINY

from stream_ctr.http.address import Address
from stream_ctr.http.server import HttpServer
from stream_ctr.logs.simulate import Simulation
from stream_ctr.monitor.app import monitor_app
from stream_ctr.monitor.followed_reports import FollowedReports
from stream_ctr.monitor.recent_reports import RecentReports

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is not opened"),
]

FREE = Address.parse("127.0.0.1:0")
DRAWN = "document.body && document.body.dataset.drawn !== undefined"
MORE = [
    "model.beside=fm",
    "metrics.window=30s",
    "metrics.rolling_windows=3",
    "metrics.served_share=1",
    "schedule.snapshot_every=30s",  # in event time, for what is as served
]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><b>%{y}</b>"


class Port:
    """The port of a run, whose answer to /reports a test may replace."""

    def __init__(self, state: Path) -> None:
        self._recent = RecentReports()
        self._recent.add_all(FollowedReports(state).read())
        self._app = monitor_app(self._recent, state)
        self._instead: tuple[int, bytes] | None = None
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/reports":
            self.asked += 1
            if self._instead:
                status, body = self._instead
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
        await self._app(scope, receive, send)

    def answer(self, body: object, status: int = 200) -> None:
        """Answer with this body from now on."""
        self._instead = status, json.dumps(body).encode()

    def answer_truly(self) -> None:
        """Answer with the reports of the run again."""
        self._instead = None


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run on a simulated stream, with malformed records."""
    folder = tmp_path_factory.mktemp("run")
    log = folder / "sim.jsonl"
    Simulation(4000, seed=3).write_jsonl(log)  # long enough for impressions after a publication
    with log.open("ab") as file:
        file.writelines(value + b"\n" for value in MALFORMED if b"\n" not in value)
    more = [word for pair in MORE for word in ("-X", pair)]
    succeed("run", "--source", log, "--state", folder / "state", *TINY, *more)
    return folder / "state"


@pytest.fixture(scope="module")
def shared_port(state: Path) -> Port:
    return Port(state)


@pytest.fixture
def port(shared_port: Port) -> Port:
    shared_port.answer_truly()
    return shared_port


@pytest.fixture(scope="module")
def url(shared_port: Port) -> Iterator[str]:
    with HttpServer(shared_port, FREE) as server:
        yield server.address.url


@pytest.fixture(scope="module")
def truth(shared_port: Port, url: str) -> dict[str, Any]:
    """What the port answers at /reports."""
    shared_port.answer_truly()
    return dict(httpx.get(f"{url}/reports").json())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def shared_tab(browser: Browser, url: str) -> Tab:
    tab = browser.open(url)
    tab.wait_for(DRAWN)
    return tab


@pytest.fixture
def tab(shared_tab: Tab, port: Port, truth: dict[str, Any]) -> Tab:
    """The page on a laptop, with the newest report of the run drawn."""
    newest = truth["reports"][-1]["time"]
    shared_tab.wait_for(f"document.body.dataset.drawn === {json.dumps(newest)}")
    return shared_tab


# -- formats, written here a second time ---------------------------------------------------------


def signed(text: str) -> str:
    return text.replace("-", "−")


def fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else signed(f"{value:.{digits}f}")


def difference(value: float | None) -> str:
    return "–" if value is None else signed(f"{value:+.5f}")


def minutes(text: str) -> str:
    return text[:19].replace("T", " ")


def table(tab: Tab, selector: str) -> list[list[str]]:
    """The rows of a table as texts, without its head."""
    rows = f"document.querySelectorAll({json.dumps(selector + ' tbody tr')})"
    return tab.run(f"[...{rows}].map((row) => [...row.cells].map((cell) => cell.textContent))")


def tile(tab: Tab, key: str) -> tuple[str, str]:
    where = f".tile[data-figure={key}]"
    return tab.text(f"{where} .value"), tab.text(f"{where} .sub")


# -- a real run ----------------------------------------------------------------------------------


def test_the_models_on_the_page_have_the_numbers_of_the_report(
    tab: Tab, truth: dict[str, Any]
) -> None:
    now = truth["reports"][-1]
    rolling, served = now["rolling"], now["as_served"]["models"]
    rows = {row[0].lstrip("●■◆▲✚✖★▼"): row[1:] for row in table(tab, "#models-table")}
    assert len(now["models"]) >= 7
    assert list(rows) == [*now["models"], "best possible", "constant"]
    for place, (name, score) in enumerate(rolling["models"].items()):
        pair = rolling["pairs"].get(name, {})
        interval = f"{difference(pair.get('low'))} to {difference(pair.get('high'))}"
        assert rows[name] == [
            fixed(score["logloss"], 5),
            fixed(score["auc"], 4),
            fixed(score["pred_over_actual"], 3),
            fixed(score["ne"], 4),
            f"{score['count']:,}",
            difference(pair["logloss_difference"]) if place else "",
            ("–" if pair["low"] is None else interval) if place else "",
            fixed(now["models"][name]["logloss"], 5),
            fixed(served.get(name, {}).get("logloss"), 5),
        ]
    assert rows["best possible"][0] == fixed(rolling["best_possible_logloss"], 5)
    assert minutes(rolling["start"]) in tab.text("#models-about")


def test_the_key_figures_are_those_of_the_report(tab: Tab, truth: dict[str, Any]) -> None:
    now = truth["reports"][-1]
    counters = now["counters"]
    assert tab.text("#state-name") == "ended"
    assert f"{now['examples']:,} examples" in tab.text("#state-words")
    assert tile(tab, "lag") == (f"{now['lag']:,}", "records unread")
    assert tile(tab, "pending")[0] == f"{now['pending']:,}"
    assert tile(tab, "throughput") == (
        f"{now['events_per_second']:,.0f}",
        f"events/s over the run; {now['events']:,} read",
    )
    assert tile(tab, "coverage") == (
        f"{100 * now['click_coverage']:.2f} %",
        f"{now['clicks_late']:,} clicks too late",
    )
    assert counters["rejected"] == 4
    assert tile(tab, "dead")[0] == "4"
    event = datetime.fromisoformat(now["published"]["event_time"])
    behind = (datetime.fromisoformat(now["event_time"]) - event).total_seconds()
    value, words = tile(tab, "freshness")
    assert value.partition(" ")[0] == f"{behind:.{0 if behind == round(behind) else 1}f}"
    assert words.startswith("event time behind the learner; replay, ")
    assert tile(tab, "published")[0] == now["published"]["snapshot"]
    assert f"run {truth['run'][:8]} · publishes blend" == tab.text("#run")


def test_the_charts_have_the_numbers_of_the_windows(tab: Tab, truth: dict[str, Any]) -> None:
    windows = truth["windows"]
    assert len(windows) >= 4
    for chart, metric in (
        ("logloss", "logloss"),
        ("auc", "auc"),
        ("calibration", "pred_over_actual"),
    ):
        traces = tab.run(
            f"document.querySelector('#chart-{chart} .plot').data"
            ".filter((trace) => !trace.name.includes('provisional'))"
            ".map((trace) => [trace.name, trace.x, trace.y])"
        )
        assert traces == [
            [
                name,
                [window["end"] for window in windows],
                [window["models"][name][metric] for window in windows],
            ]
            for name in windows[0]["models"]
        ]
    band, *_ = tab.run(
        "document.querySelector('#chart-difference .plot').data"
        ".filter((trace) => trace.fill).map((trace) => trace.y)"
    )
    pairs = [window["pairs"]["river_ftrl"] for window in windows]
    assert pairs[0]["high"] is not None
    assert band[0] == pairs[0]["high"]
    assert band[-1] == pairs[0]["low"]
    (line,) = tab.run(
        "document.querySelector('#chart-difference .plot').data"
        ".filter((trace) => trace.name === 'blend minus river_ftrl').map((trace) => trace.y)"
    )
    assert line == [pair["logloss_difference"] for pair in pairs]
    (zero,) = tab.run("document.querySelector('#chart-difference .plot').layout.shapes")
    assert zero["y0"] == zero["y1"] == 0


def test_what_was_served_is_drawn_beside_what_was_progressive(
    tab: Tab, truth: dict[str, Any]
) -> None:
    served = [
        (each["event_time"], each["as_served"]["models"])
        for each in truth["reports"]
        if each["as_served"]["models"]["blend"]["count"]
    ]
    assert served
    traces = tab.run(
        "document.querySelector('#chart-served .plot').data.map((trace) =>"
        " [trace.name, [trace.x, trace.y]])"
    )
    assert dict(traces) == {
        words: [[time for time, _ in served], [models[name]["logloss"] for _, models in served]]
        for name, words in [
            *((name, f"{name} as served") for name in served[-1][1] if name != "progressive"),
            ("progressive", "blend progressive"),
        ]
    }


def test_a_chart_shows_the_same_as_a_table(tab: Tab, truth: dict[str, Any]) -> None:
    button = "document.querySelector('#chart-logloss .tools button')"
    tab.run(f"{button}.click()")
    assert tab.run(f"{button}.getAttribute('aria-pressed')") == "true"
    assert tab.run("document.querySelector('#chart-logloss .plot').hidden")
    expected = [
        [
            minutes(window["end"]),
            *(fixed(score["logloss"], 5) for score in window["models"].values()),
            "",
        ]
        for window in reversed(truth["windows"])
    ]
    assert table(tab, "#logloss-table")[-len(expected) :] == expected
    tab.run(f"{button}.click()")
    assert not tab.run("document.querySelector('#chart-logloss .plot').hidden")


def test_the_tables_have_snapshots_dead_letters_clicks_and_the_window_curve(
    tab: Tab, truth: dict[str, Any]
) -> None:
    now = truth["reports"][-1]
    snapshots = truth["snapshots"][::-1]
    rows = table(tab, "#snapshots")
    assert [row[0] for row in rows] == [each["name"] for each in snapshots]
    assert [row[1].split()[-1] for row in rows] == [each["verdict"] for each in snapshots]
    assert [bool(row[2]) for row in rows] == [each["loaded"] for each in snapshots]
    assert [row[3] for row in rows] == [f"{each['examples']:,}" for each in snapshots]
    assert [row[6] for row in rows] == ["; ".join(each["reasons"]) for each in snapshots]
    counters = now["counters"]
    reasons = {name[9:]: count for name, count in counters.items() if name.startswith("rejected.")}
    assert reasons
    assert {row[0]: row[1] for row in table(tab, "#dead-letters")} == {
        name: f"{count:,}" for name, count in reasons.items()
    }
    clicks = dict(row[:2] for row in table(tab, "#clicks"))
    assert clicks["joined"] == f"{counters['clicks_joined']:,}"
    assert clicks["too late"] == f"{now['clicks_late']:,}"
    (curve,) = tab.run(
        "document.querySelector('#chart-curve .plot').data.map((trace) => [trace.x, trace.y])"
    )
    assert curve[0] == [point["window_seconds"] for point in now["window_curve"]]
    assert curve[1] == pytest.approx([100 * point["lost_share"] for point in now["window_curve"]])
    assert dict(table(tab, "#counters-table")) == {
        name: f"{count:,}" for name, count in counters.items()
    }


def test_rolling_points_are_those_of_the_reports(tab: Tab, truth: dict[str, Any]) -> None:
    tab.run("document.querySelector('#by-rolling').click()")
    rolling = [each for each in truth["reports"] if each.get("rolling") and each["event_time"]]
    (blend,) = tab.run(
        "document.querySelector('#chart-auc .plot').data"
        ".filter((trace) => trace.name === 'blend').map((trace) => [trace.x, trace.y])"
    )
    assert blend == [
        [each["event_time"] for each in rolling],
        [each["rolling"]["models"]["blend"]["auc"] for each in rolling],
    ]
    tab.run("document.querySelector('#by-window').click()")


def test_values_appear_where_the_mouse_is(tab: Tab, truth: dict[str, Any]) -> None:
    window = truth["windows"][1]
    x, y = tab.run(
        "(() => { const plot = document.querySelector('#chart-auc .plot');"
        " plot.scrollIntoView({block: 'center'});"
        " const box = plot.getBoundingClientRect(), axis = plot._fullLayout.xaxis;"
        f" const x = axis.l2p(axis.d2l({json.dumps(window['end'])}));"
        " return [box.x + axis._offset + x, box.y + box.height / 2]; })()"
    )
    tab.move_to(x - 5, y)
    tab.move_to(x, y)
    tab.wait_for("document.querySelectorAll('#chart-auc .hoverlayer text').length > 0")
    shown = " ".join(
        tab.run("document.querySelector('#chart-auc .hoverlayer').textContent").split()
    )
    for name, score in window["models"].items():
        assert f"{name} {score['auc']:.4f}" in shown


def test_the_keyboard_reaches_a_model_and_hides_it(tab: Tab, truth: dict[str, Any]) -> None:
    lines = "document.querySelector('#chart-logloss .plot').data.map((trace) => trace.name)"
    tab.run("document.querySelector('#theme').focus()")
    for _ in range(6):
        tab.press("Tab")
        if tab.run("document.activeElement.closest('#legend') !== null"):
            break
    assert tab.run("document.activeElement.dataset.series") == "blend"
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    before = tab.run(lines)
    tab.press(" ")
    assert tab.run("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert set(before) - set(tab.run(lines)) <= {"blend", "blend (provisional)"}
    assert "blend" not in tab.run(lines)
    tab.press("Enter")
    assert tab.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert tab.run(lines) == before


def test_every_control_has_a_name_and_every_chart_a_description(tab: Tab) -> None:
    names = tab.run(
        "[...document.querySelectorAll('button, select')].map((each) =>"
        " each.getAttribute('aria-label') ?? each.closest('label')?.textContent ?? each.innerText)"
    )
    assert all(name.strip() for name in names)
    labels = tab.run(
        "[...document.querySelectorAll('.plot')].map((each) => each.getAttribute('aria-label'))"
    )
    assert len(labels) == 10
    assert labels[0].startswith("Logloss. Newest values: blend 0.")


def test_two_models_differ_in_colour_and_in_dash_or_marker(tab: Tab) -> None:
    looks = tab.run(
        "document.querySelector('#chart-logloss .plot').data"
        ".filter((trace) => !trace.name.includes('provisional'))"
        ".map((trace) => [trace.line.color, trace.line.dash + ' ' + trace.marker.symbol])"
    )
    colours, forms = zip(*looks, strict=True)
    assert len(set(colours)) == len(set(forms)) == len(looks) >= 7


def test_nothing_is_loaded_from_elsewhere_and_the_console_is_silent(tab: Tab, url: str) -> None:
    asked = tab.requests()
    assert f"{url}/plotly.min.js" in asked
    assert {each for each in asked if not each.startswith((f"{url}/", "data:,"))} == set()
    assert tab.complaints() == []


# -- colours and sizes ---------------------------------------------------------------------------


def ground(tab: Tab) -> str:
    return tab.run("getComputedStyle(document.body).backgroundColor")


def test_dark_and_light_follow_the_system_until_somebody_chooses(
    browser: Browser, url: str, port: Port
) -> None:
    light, dark = "rgb(244, 245, 247)", "rgb(14, 18, 23)"
    tab = browser.open(url, is_dark=True)
    tab.wait_for(DRAWN)
    assert ground(tab) == dark
    paper = "document.querySelector('#chart-logloss .plot').layout.paper_bgcolor"
    assert tab.run(paper) == "#161b22"
    tab.set_colours(is_dark=False)
    tab.wait_for(f"{paper} === '#ffffff'")
    assert ground(tab) == light
    for words in ("Theme: light", "Theme: dark"):
        tab.run("document.querySelector('#theme').click()")
        assert tab.text("#theme") == words
    assert (ground(tab), tab.run(paper)) == (dark, "#161b22")
    tab.call("Page.reload")
    tab.wait_for(f"{DRAWN} && document.documentElement.dataset.theme === 'dark'")
    assert ground(tab) == dark
    tab.close()


def test_a_phone_shows_everything_in_one_column_without_scrolling_sideways(
    browser: Browser, url: str, port: Port
) -> None:
    tab = browser.open(url, width=390, height=844, is_phone=True)
    tab.wait_for(DRAWN)
    assert tab.run("document.scrollingElement.scrollWidth") <= 390
    beyond = tab.run(
        "[...document.querySelectorAll('main *, header *')]"
        ".filter((each) => !each.closest('.scroll, .legend, svg, .plot'))"
        ".filter((each) => each.getBoundingClientRect().right > 391)"
        ".map((each) => each.outerHTML.slice(0, 100))"
    )
    assert beyond == []
    lefts = "[...document.querySelectorAll('.chart')].map((each) => each.offsetLeft)"
    assert len(set(tab.run(lefts))) == 1
    widths = tab.run("[...document.querySelectorAll('.main-svg')].map((each) => each.clientWidth)")
    assert max(widths) <= 390
    tab.close()


# -- states --------------------------------------------------------------------------------------


def live(truth: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The answer of the run as if it went on now: its last report is of this moment."""
    answer = copy.deepcopy(dict(truth))
    newest = {**answer["reports"][-1], "kind": "report", **fields}
    now = datetime.now(UTC)
    for place, report in enumerate(answer["reports"]):
        age = timedelta(seconds=10 * (len(answer["reports"]) - 1 - place))
        report["time"] = (now - age).isoformat()
    newest["time"] = answer["reports"][-1]["time"]
    answer["reports"][-1] = newest
    return {**answer, "ended": False}


def show(tab: Tab, port: Port, answer: Mapping[str, Any]) -> None:
    """Let the port answer this, and wait until it is drawn."""
    port.answer(answer)
    reports = answer.get("reports") or [{}]
    tab.wait_for(f"document.body.dataset.drawn === {json.dumps(reports[-1].get('time', ''))}")


def test_alarms_say_what_holds_and_since_when(tab: Tab, port: Port, truth: dict[str, Any]) -> None:
    listed = {
        "name": "behind_baseline",
        "since": (datetime.now(UTC) - timedelta(minutes=30)).isoformat(),
        "text": "blend is worse than ftrl",
    }
    show(tab, port, live(truth, stalled=["clicks:0"], alarms=[listed]))
    assert tab.text("#state-name") == "stalled"
    first, second = tab.texts("#alarm-list li")
    assert first.startswith("behind baseline blend is worse than ftrl since ")
    assert ", 30 m" in first
    assert second.startswith("stalled The clicks of clicks:0 are overdue")
    assert tab.run("document.title").startswith("▲2 stalled")
    show(tab, port, live(truth))
    assert tab.text("#state-name") == "learning"
    assert tab.run("document.querySelector('#alarms').hidden")
    assert tab.text("#contact").startswith("live · report ")


def test_the_health_of_fields_is_a_table(tab: Tab, port: Port, truth: dict[str, Any]) -> None:
    field = {
        "missing_rate": 0.0125,
        "unseen_rate": None,
        "distinct": 12345,
        "occupancy": 0.031,
        "collision_rate": 0.0004,
        "psi": 0.0213,
        "of_later": 1.5,
    }
    sizes = {"rows": 1048576, "occupancy": 0.0625, "collision_rate": 0.01}
    show(tab, port, live(truth, fields={"app_id": field, "os": {"distinct": 3}}, table=sizes))
    assert table(tab, "#fields") == [
        ["app_id", "1.25 %", "–", "12,345", "3.10 %", "0.04 %", "0.021", "1.500"],
        ["os", "–", "–", "3", "–", "–", "–", "–"],
    ]
    assert tab.texts("#fields thead th")[-1] == "of later"
    assert "table of 1,048,576 rows, 6.25 % learned, 1.00 % collisions" in tab.text(
        "#fields .about"
    )


def test_a_run_that_waits_says_for_what(tab: Tab, port: Port, truth: dict[str, Any]) -> None:
    waiting = {
        "until": "2025-01-01T00:10:30.000Z",
        "reached": "2025-01-01T00:08:30.000Z",
        "held_by": [],
        "ready": 0,
    }
    show(tab, port, live(truth, waiting=waiting, pending=1234, examples=0))
    assert tab.text("#state-name") == "waiting"
    assert tab.text("#state-words") == (
        "No example yet: 1,234 impressions wait for their clicks. The first are learned when event "
        "time is 2025-01-01 00:10:30; it is 00:08:30, 2 m to go."
    )


def test_a_run_that_waits_counts_labelled_examples_apart(
    tab: Tab, port: Port, truth: dict[str, Any]
) -> None:
    waiting: dict[str, Any] = {
        "until": "2025-01-01T00:10:30.000Z",
        "reached": None,
        "held_by": [],
        "ready": 0,
    }
    for labelled, words in (
        (1234, "1,234 labelled examples wait for those before them"),
        (
            34,
            "1,200 impressions wait for their clicks, 34 labelled examples for those before them",
        ),
    ):
        live_waiting = {**waiting, "labelled": labelled}
        show(tab, port, live(truth, waiting=live_waiting, pending=1234, examples=0))
        assert tab.text("#state-words").startswith(f"No example yet: {words}. The first")


def test_a_provisional_window_is_hollow_and_dotted(
    tab: Tab, port: Port, truth: dict[str, Any]
) -> None:
    answer = live(truth)
    rolling = answer["reports"][-1]["rolling"]
    answer["windows"] = answer["windows"][:-1]
    assert rolling["provisional"]
    assert rolling["end"] > answer["windows"][-1]["end"]
    show(tab, port, answer)
    drawn = tab.run(
        "document.querySelector('#chart-logloss .plot').data"
        ".filter((trace) => trace.name === 'blend (provisional)')"
        ".map((trace) => [trace.mode, trace.line?.dash, trace.x.at(-1), trace.y.at(-1),"
        " trace.marker.color])"
    )
    value = rolling["models"]["blend"]["logloss"]
    assert drawn == [
        ["lines+markers", "dot", rolling["end"], value, "#ffffff"],
        ["markers", None, rolling["end"], value, "#ffffff"],
    ]
    assert "hollow: provisional" in tab.text("#chart-logloss .about")


def test_names_and_reasons_from_outside_are_text(
    tab: Tab, port: Port, truth: dict[str, Any]
) -> None:
    answer = live(
        truth,
        left_out={HOSTILE: "diverged"},
        alarms=[{"name": HOSTILE, "since": "no time", "text": HOSTILE}],
        counters={"rejected": 1, f"rejected.{HOSTILE}": 1, HOSTILE: 2},
        fields={HOSTILE: {"missing_rate": 0.5, HOSTILE: 1.0}},
    )
    answer |= {"model": HOSTILE, "run": HOSTILE}
    score = answer["reports"][-1]["models"]["fm"]
    for scope in (answer["reports"][-1], answer["reports"][-1]["rolling"], *answer["windows"]):
        scope["models"][HOSTILE] = score
        scope["pairs"] = {HOSTILE: scope["pairs"]["fm"]}
    answer["snapshots"] = [
        {"name": HOSTILE, "verdict": HOSTILE, "reasons": [HOSTILE], "loaded": True}
    ]
    show(tab, port, answer)
    assert tab.run("document.title").startswith("▲")
    assert tab.run("document.querySelectorAll('main img, main b').length") == 0
    shown = tab.run("document.body.textContent")
    assert shown.count(HOSTILE) >= 10
    assert HOSTILE in tab.run("document.querySelector('#legend').textContent")
    tab.run(
        "Plotly.Fx.hover(document.querySelector('#chart-auc .plot'), [{curveNumber: 0,"
        " pointNumber: 0}])"
    )
    assert tab.run("document.querySelectorAll('.hoverlayer image, .hoverlayer img').length") == 0
    assert tab.complaints() == []


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        None,
        {"reports": None, "windows": {}, "snapshots": 3, "model": 7, "run": []},
        {"reports": [None, {}, []], "windows": [None, {"end": "x"}], "snapshots": [None, {}]},
        {"reports": [{"kind": "report", "models": None, "rolling": 3, "counters": []}]},
        {"reports": [{"time": "x", "models": {"a": None}, "waiting": {"until": 3, "ready": None}}]},
    ],
    ids=["object", "list", "null", "kinds", "empty", "odd", "times"],
)
def test_an_odd_answer_is_drawn_as_far_as_it_is_known(tab: Tab, port: Port, answer: object) -> None:
    port.answer(answer)
    newest = (answer.get("reports") or [{}])[-1] if isinstance(answer, dict) else {}
    time = newest.get("time", "") if isinstance(newest, dict) else ""
    tab.wait_for(f"document.body.dataset.drawn === {json.dumps(time)}")
    assert tab.run("document.querySelector('#no-answer').hidden")
    assert tab.text("#state-name") in ("starting", "learning", "waiting")


def test_any_missing_or_odd_figure_leaves_the_rest(
    tab: Tab, port: Port, truth: dict[str, Any]
) -> None:
    script = """(async (answer) => {
      const figures = await import("./figures.js");
      const odd = [undefined, null, true, "text", [], {}, -1, ["x"], [null]];
      const failures = [];
      const paths = (value, path) => value === null || typeof value !== "object" ? [path]
        : [path, ...Object.keys(value).flatMap((key) => paths(value[key], [...path, key]))];
      const use = (known) => {
        figures.state(known); figures.alarms(known); figures.tiles(known, Date.now());
        figures.modelRows(known); figures.references(known); figures.deadLetters(known);
        figures.windowCurve(known); figures.overdueWords(known, Date.now());
        for (const points of [figures.windowPoints(known), figures.rollingPoints(known)]) {
          for (const name of figures.modelNames(known)) {
            figures.modelSeries(points, name, "auc"); figures.pairSeries(points, name);
          }
        }
        for (const name of figures.servedNames(known)) figures.servedSeries(known, name);
        figures.reportSeries(known, figures.rate);
        figures.reportSeries(known, (report) => figures.freshness(report).seconds);
      };
      let tried = 0;
      for (const path of paths(answer, []).filter((path) => path.length)) {
        for (const value of odd) {
          const changed = structuredClone(answer);
          const last = path.at(-1);
          path.slice(0, -1).reduce((where, key) => where[key], changed)[last] = value;
          tried += 1;
          try { use(figures.understood(changed)); }
          catch (error) { failures.push(`${path.join(".")} = ${JSON.stringify(value)}: ${error}`); }
        }
      }
      return [tried, failures.slice(0, 20)];
    })"""
    small = {**truth, "reports": truth["reports"][-2:], "windows": truth["windows"][-1:]}
    keep = ("blend", "fm", "river_ftrl")
    for scope in (*small["reports"], *small["windows"]):
        scope["models"] = {name: scope["models"][name] for name in keep}
    for report in small["reports"]:
        for key in ("profile", "last_half", "last_quarter", "as_served_last_half", "ledger"):
            report.pop(key, None)
        report["alarms"] = [{"name": "a", "since": report["time"], "text": "t"}]
        report["left_out"], report["stalled"] = {"fm": "x"}, ["c:0"]
    tried, failures = tab.run(f"{script}({json.dumps(small)})")
    assert tried > 1000
    assert failures == []


def test_a_thousand_reports_and_two_thousand_windows_are_drawn(
    tab: Tab, port: Port, truth: dict[str, Any]
) -> None:
    answer = live(truth)
    first, newest = truth["windows"][0], answer["reports"][-1]
    begin = datetime.fromisoformat(first["start"])

    def at(minutes: float) -> str:
        return (begin + timedelta(minutes=minutes)).isoformat()

    answer["windows"] = [
        {**first, "start": at(10 * place), "end": at(10 * place + 10)} for place in range(2000)
    ]
    slim = {key: newest[key] for key in ("kind", "lag", "pending", "seconds", "models")}
    answer["reports"] = [
        *({**slim, "time": at(place), "event_time": at(place)} for place in range(999)),
        newest,
    ]
    show(tab, port, answer)
    assert tab.run("document.querySelector('#chart-auc .plot').data[0].x.length") == 2000
    tab.run("document.querySelector('#chart-auc .tools button').click()")
    assert len(table(tab, "#auc-table")) == 500
    assert tab.text("#auc-table caption") in (
        "The newest 500 of 2,000",
        "The newest 500 of 2,001",
    )
    tab.run("document.querySelector('#chart-auc .tools button').click()")


def test_one_model_alone_has_no_difference_and_no_lines_of_others(
    tab: Tab, port: Port, truth: dict[str, Any]
) -> None:
    answer = live(truth)
    for scope in (*answer["reports"], answer["reports"][-1]["rolling"], *answer["windows"]):
        scope["models"] = {"blend": scope["models"]["blend"]}
        scope["pairs"] = {}
    show(tab, port, answer)
    assert len(table(tab, "#models-table")) == 3
    assert tab.text("#chart-difference .empty").startswith("No two models")
    assert tab.run("document.querySelector('#pair').disabled")


# -- a run that does not answer ------------------------------------------------------------------


def test_a_run_that_answers_but_writes_no_reports_is_overdue(
    tab: Tab, port: Port, truth: dict[str, Any]
) -> None:
    answer = live(truth)
    newest = answer["reports"][-1]
    newest["time"] = (datetime.now(UTC) - timedelta(minutes=12)).isoformat()
    answer["reports"] = [newest]
    show(tab, port, answer)
    tab.wait_for("!document.querySelector('#no-answer').hidden")
    words = tab.text("#no-answer")
    assert words.startswith("The run answers, but its newest report is 12 m")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (503, "The server answers with status 503. It last answered "),
        (401, "The server asks for its token again: load the page anew. It last answered "),
    ],
)
def test_a_server_that_refuses_is_said_to(tab: Tab, port: Port, status: int, words: str) -> None:
    port.answer({}, status)
    tab.wait_for("!document.querySelector('#no-answer').hidden")
    assert tab.text("#no-answer").startswith(words)
    port.answer_truly()
    tab.wait_for("document.querySelector('#no-answer').hidden")


def test_a_run_that_goes_away_is_said_with_the_age_of_its_data_until_it_is_back(
    browser: Browser, state: Path
) -> None:
    port = Port(state)
    with HttpServer(port, FREE) as server:
        tab = browser.open(server.address.url)
        tab.wait_for(DRAWN)
    tab.wait_for("document.querySelector('#contact').dataset.contact === 'failing'")
    words = tab.text("#no-answer")
    assert words.startswith("The run does not answer. It last answered ")
    assert "the figures below are " in words
    assert tab.text("#contact").startswith("no answer · report ")
    assert len(table(tab, "#models-table")) >= 7  # what is known stays
    with HttpServer(port, server.address):
        tab.wait_for("document.querySelector('#no-answer').hidden")
    tab.close()


def test_a_hidden_page_asks_for_nothing(tab: Tab, port: Port) -> None:
    hide = (
        "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    tab.run(hide % "true")
    tab.wait_for("document.querySelector('#contact').textContent.startsWith('paused')")
    tab.run("new Promise((done) => setTimeout(done, 500))")  # an answer on its way
    before = port.asked
    tab.run("new Promise((done) => setTimeout(done, 4500))")
    assert port.asked == before
    tab.run(hide % "false")
    tab.wait_for("!document.querySelector('#contact').textContent.startsWith('paused')")
    assert port.asked > before
