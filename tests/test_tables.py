"""Tests of `stream_ctr.paper.tables`: Table 2 and its notes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.paper_runs import (
    DATA,
    SIMULATED,
    TITLES,
    all_runs,
    checks,
    select,
    table2_run,
    write_report,
)

from stream_ctr.models import MODELS


@pytest.mark.slow
@pytest.mark.parametrize("systems", [["lr"], ["fm"], ["lr", "fm"], ["fnn", "ipnn"], ["deepfm"]])
def test_a_report_of_some_systems_shows_only_those(tmp_path: Path, systems: list[str]) -> None:
    runs = [run for run in all_runs(tmp_path) if run["system"] in systems]
    report = write_report(tmp_path, runs)
    assert list(report["table2"]) == TITLES
    text = (tmp_path / "report.md").read_text()
    chapter = text.partition("## Table 2")[2].partition("## Table 1")[0]
    rows = set(re.findall(r"^\| ([^|]+) \|", chapter, flags=re.MULTILINE))
    escaped = {title.replace("*", r"\*") for title in TITLES}
    assert rows & escaped == {MODELS[system].title for system in systems}
    assert ("DeepFM's" in text) == ("deepfm" in systems)


def test_fnns_network_is_compared_with_its_fm(tmp_path: Path) -> None:
    report = write_report(tmp_path, [table2_run("fnn", 0, validation=checks(0.4634))])
    assert report["table2"]["FNN"]["pretraining"] == {"validation_logloss": 0.461, "epochs": 0.75}
    sentences = (
        "0.46100, after 0.75 epochs. The network on its embeddings reached 0.46340, which is "
        "0.00240 above it."
    )
    assert sentences in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("data", "shown", "absent"), [(DATA, "0.45083", "0.02618"), (SIMULATED, "0.02618", "0.45083")]
)
def test_the_papers_numbers_for_the_matching_data_are_shown(
    tmp_path: Path, data: dict[str, Any], shown: str, absent: str
) -> None:
    write_report(tmp_path, select(all_runs(tmp_path, seeds=1), "table2"), data)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert re.findall(rf"{shown}(?= \||</td>)", text)
        assert not re.findall(rf"{absent}(?= \||</td>)", text)
        assert ("The log is simulated" in text) == (data is SIMULATED)


def test_the_paper_has_no_numbers_for_other_data(tmp_path: Path) -> None:
    data = {**DATA, "format": "avazu", "whole": None}
    write_report(tmp_path, select(all_runs(tmp_path, seeds=1), "table2"), data)
    text = (tmp_path / "report.md").read_text()
    assert "The paper has no numbers for this data." in text
    assert "| 0.45083 |" not in text


def test_one_seed_is_called_one_seed(tmp_path: Path) -> None:
    report = write_report(tmp_path, select(all_runs(tmp_path, seeds=1), "table2"), seeds=1)
    assert report["table2"]["LR"]["auc_std"] is None
    text = (tmp_path / "report.md").read_text()
    assert "One seed" in text
    assert "±" not in text
