"""The README is run, not only read."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from stream_ctr.cli.main import main
from stream_ctr.config import load
from stream_ctr.events.decoder import Decoder, infer_fields

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(block("python"), {}, "README.md", "README.md", 0)
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_events_shown_are_events_of_the_fields_that_the_file_shown_names(tmp_path):
    lines = block("json").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["impression", "click"]
    path = tmp_path / "c.toml"
    path.write_text(block("toml"))
    fields = load(path, environ={}).features.fields()
    values = pa.array([line.encode() for line in lines], pa.large_binary())
    events, rejects = Decoder(fields).decode(values)
    assert (len(events.impressions), len(events.clicks), len(rejects)) == (1, 1, 0)
    assert set(infer_fields(values)) == set(fields)


def test_every_command_is_in_the_readme_and_every_file_it_links_to_is_there():
    for name in main.commands:
        assert f"stream-ctr {name}" in README or f"`{name}`" in README, name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
