"""Tests of `stream_ctr.paper.report`: its files by hand, and its page in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.paper_runs import DATA, MADE, TITLES, all_runs, table2_run, write_report
from support.web_pages import Tags

from stream_ctr.paper import published, report

Written = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The folder of a complete report, and the value that `write` returned."""
    out = tmp_path_factory.mktemp("report")
    return out, report.write(out, all_runs(out), data=DATA, made=MADE)


# -- report.json ---------------------------------------------------------------------------------


def test_report_json_keeps_its_contract(written: Written) -> None:
    out, returned = written
    found = json.loads((out / "report.json").read_text())
    assert found == json.loads(json.dumps(returned))
    assert found["format"] == 1
    assert list(found["table2"]) == TITLES
    numbers = ("auc", "auc_std", "logloss", "logloss_std", "seconds", "epochs")
    for row in found["table2"].values():
        assert all(isinstance(row[name], float) for name in numbers)
        for data in ("criteo", "company"):
            assert row["published"][data].keys() == {"auc", "logloss"}
    assert found["order"] == sorted(TITLES, key=lambda title: found["table2"][title]["logloss"])
    for other, kind in (("DeepFM", "minus_deepfm"), ("LR", "minus_lr")):
        assert [name for name, row in found["table2"].items() if row[kind] is None] == [other]
        assert found["table2"]["FM"][kind].keys() == {"logloss_difference", "low", "high", "seeds"}
    assert found["figure6"]["cpu"]["LR"]["over_lr"] == 1.0
    for part, values in published.VALUES.items():
        assert list(found[part]) == list(values)
        assert all(list(found[part][value]) == TITLES[2:] for value in values)
    assert list(found["streaming"]) == TITLES
    assert (found["missing"], found["failed"]) == ([], [])


def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    returned = write_report(tmp_path, [table2_run("fm", 0, auc=float("nan"))])
    assert returned["table2"]["FM"]["auc"] is None
    assert json.loads((tmp_path / "report.json").read_text())["table2"]["FM"]["auc"] is None


# -- files ---------------------------------------------------------------------------------------


def page_names(out: Path) -> list[str]:
    pictures = sorted(f"figures/{path.name}" for path in (out / "figures").iterdir())
    names = ["report.md", "report.html", *pictures]
    assert len(names) == 9
    return names


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(written: Written, tmp_path: Path) -> None:
    out, _ = written
    write_report(tmp_path, all_runs(tmp_path))
    for name in ["report.json", *page_names(out)]:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.slow
def test_report_json_alone_renders_the_same_pages(written: Written, tmp_path: Path) -> None:
    out, _ = written
    shutil.copy(out / "report.json", tmp_path)
    report.render(tmp_path)
    for name in page_names(out):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_the_html_loads_nothing_from_outside(written: Written) -> None:
    page = (written[0] / "report.html").read_text()
    for _, attributes in Tags(page).tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
                assert str(value).startswith(("#", "data:,")), (name, value)
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page


def test_ids_are_unique_and_every_link_leads_to_one(written: Written) -> None:
    tags = Tags((written[0] / "report.html").read_text()).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    links = {
        str(value).removeprefix("#")
        for _, attributes in tags
        for name, value in attributes.items()
        if name.endswith("href") and str(value)[0] == "#"
    }
    assert len(ids) == len(set(ids))
    assert links <= set(ids)


def test_pictures_are_well_formed_small_and_white(written: Written) -> None:
    pictures = sorted((written[0] / "figures").iterdir())
    assert {path.stem for path in pictures} == {
        "table2",
        *(f"figure{number}" for number in range(6, 12)),
    }
    for path in pictures:
        assert path.stat().st_size < 100_000
        root = ElementTree.parse(path).getroot()
        assert root[0].attrib["fill"] == "#ffffff"
        assert "<text" not in path.read_text()  # letters are outlines


def test_the_markdown_links_every_picture(written: Written) -> None:
    out, _ = written
    linked = re.findall(r"\]\((figures/[^)]*)\)", (out / "report.md").read_text())
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (out / "figures").iterdir())


def test_rows_of_a_markdown_table_have_as_many_cells_as_its_head(written: Written) -> None:
    text = (written[0] / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 20
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


# -- in a browser --------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
browser_only = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: the report is not opened in a browser"
)

PROBE = """<!doctype html><title>probe</title><pre id=found></pre><script>
const found = {};
function measure(width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = "report.html";
  frame.onload = () => {
    const page = frame.contentDocument, root = page.scrollingElement;
    const isVisible = svg => {
      const box = svg.getBoundingClientRect();
      return box.width > 150 && box.right <= width && box.height > 100;
    };
    const table2 = page.querySelector("#table-2-performance ~ .scroll tbody");
    const panels = page.querySelector("#figure-7-activation-function ~ figure .panels");
    const texts = "p, li, h1, h2, dd, pre, figcaption, caption span";
    found[width] = {
      scrolls: root.scrollWidth,
      rows: [...page.querySelectorAll("table")].map(table => table.tBodies[0].rows.length),
      systems: table2.rows.length,
      pictures: page.querySelectorAll("svg").length,
      visible: [...page.querySelectorAll("svg")].filter(isVisible).length,
      columns: getComputedStyle(panels).gridTemplateColumns.split(" ")
        .filter(track => track != "0px").length,
      cut: [...page.querySelectorAll(texts)]
        .filter(e => e.getBoundingClientRect().right > width + 1).map(e => e.textContent),
      requests: frame.contentWindow.performance.getEntriesByType("resource")
        .map(entry => entry.name),
    };
    document.getElementById("found").textContent = JSON.stringify(found);
  };
  document.body.append(frame);
}
[400, 1400].forEach(measure);
</script>"""

Opened = tuple[dict[str, Any], str]


@pytest.fixture(scope="module")
def opened(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Measurements of the page at 400 and 1400 pixels, and the console of the browser."""
    assert CHROMIUM is not None
    folder = tmp_path_factory.mktemp("browser")
    shutil.copy(written[0] / "report.html", folder)
    (folder / "probe.html").write_text(PROBE)
    command = [
        CHROMIUM,
        "--headless",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--allow-file-access-from-files",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--window-size=1500,1000",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"file://{folder / 'probe.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<pre id=\"found\">(.*?)</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), done.stderr


@browser_only
@pytest.mark.slow
def test_a_browser_shows_all_rows_and_pictures_at_any_width(opened: Opened) -> None:
    found, _ = opened
    for width in ("400", "1400"):
        assert found[width]["systems"] == 9
        assert sorted(found[width]["rows"]) == [7] * 15 + [9] * 5
        assert found[width]["pictures"] == found[width]["visible"] == 12
        assert found[width]["scrolls"] <= int(width), "the page is wider than its window"
        assert found[width]["cut"] == []
    assert found["400"]["columns"] == 1
    assert found["1400"]["columns"] == 2


@browser_only
@pytest.mark.slow
def test_a_browser_logs_no_complaint_and_requests_nothing(opened: Opened) -> None:
    found, console = opened
    assert re.findall(r".*:CONSOLE.*", console) == []
    assert found["400"]["requests"] == found["1400"]["requests"] == []
