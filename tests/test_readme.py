"""The README is a short introduction: its length, its commands and its figures are checked here.

`test_docs.py` runs its commands and examples.
"""

from __future__ import annotations

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


def test_the_throughput_is_that_of_the_performance_page() -> None:
    measured = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"\| ([\d,]+) (?:examples|events) \| (\w{7}) \|", README)
    assert len(rows) >= 4
    for figure, commit in rows:
        assert f"| {figure} |" in measured
        assert f"commit {commit}" in measured
