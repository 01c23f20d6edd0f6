"""The README is a short introduction: its length, its commands and its figures are checked here.

`test_docs.py` runs its commands and examples.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
from support import pages
from support.pages import ROOT

from stream_ctr.cli.main import main
from stream_ctr.config import load
from stream_ctr.events.infer import infer_fields

README = pages.read("README.md")


def test_the_readme_has_about_seven_hundred_words() -> None:
    text = re.sub(r"<!--.*?-->", "", pages.prose("README.md"))
    assert 600 <= len(text.split()) <= 800


def test_the_readme_has_the_command_that_starts_the_demo_and_the_one_that_tests() -> None:
    commands = [line for block in pages.blocks("README.md", "sh") for line in pages.commands(block)]
    install = ".venv/bin/pip install -c constraints.txt -e '.[embedded]'"
    assert f"python3 -m venv .venv && {install} && .venv/bin/stream-ctr demo" in commands
    assert "make install test" in commands


def test_the_fields_of_the_file_shown_are_those_of_the_events_shown(tmp_path: Path) -> None:
    (tmp_path / "shown.toml").write_text(pages.blocks("README.md", "toml")[0].text)
    fields = load(tmp_path / "shown.toml", environ={}).features.fields()
    lines = pages.blocks("README.md", "json")[0].text.encode().splitlines()
    assert set(infer_fields(pa.array(lines, pa.large_binary()))) == set(fields)


def test_every_command_stands_on_a_page() -> None:
    text = "".join(map(pages.read, pages.pages()))
    for name in main.commands:
        assert re.search(rf"stream-ctr {name}\b", text), name


def test_speed_and_quality_are_those_of_the_measured_run() -> None:
    cases = json.loads((ROOT / "docs" / "quality.json").read_text())["cases"]
    (case,) = (found for found in cases if found["name"] == "simulated-1m, seed 0")
    for result in case["results"]:
        if result["contender"].startswith("defaults"):
            figures = f"{result['events_per_second']:,.0f} | {result['last_half']['logloss']:.5f} |"
            assert f"| {result['contender']} | {figures}" in README
    last_half = case["last_half"]
    assert f"| exact FTRL, in the same run | | {last_half['logloss']:.5f} |" in README
    bounds = (last_half["constant_logloss"], last_half["best_possible_logloss"])
    assert f"| {bounds[0]:.5f}, {bounds[1]:.5f} |" in README
    joined = re.search(r"joined examples takes ([\d,]+) events/s", README)
    assert joined
    assert f"| {joined[1]} |" in (ROOT / "docs" / "performance.md").read_text()
