"""Tests of `stream_ctr.paper.contents`: the page of a report, block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paper_runs import DATA, MACHINE, MADE, all_runs, select, write_report
from support.web_pages import SPECIAL, Tags


def test_a_dropout_other_than_the_papers_is_noted(tmp_path: Path) -> None:
    runs = select(all_runs(tmp_path), "table2")
    for dropout in (0.1, 0.5):
        write_report(tmp_path, runs, settings={**MADE["settings"], "dropout": dropout})
        text = (tmp_path / "report.md").read_text()
        assert ("uses a dropout of 0.1, which was set by hand" in text) == (dropout == 0.1)


def test_a_log_in_criteos_format_is_not_called_criteos(tmp_path: Path) -> None:
    write_report(tmp_path, select(all_runs(tmp_path), "table2"))
    text = (tmp_path / "report.md").read_text()
    assert "The log is in Criteo's format and has 7,200 rows" in text
    assert "sample of" not in text


def test_times_are_from_one_machine_and_all_machines_are_named(tmp_path: Path) -> None:
    other = {"processor": "Ampere Altra", "cores": 64}
    runs = [
        run | {"machine": other, "seconds": 1e6} if run["system"] == "deepfm" else run
        for run in select(all_runs(tmp_path), "table2")
    ]
    report = write_report(tmp_path, runs)
    assert "DeepFM" not in report["figure6"]["cpu"]
    assert [found["machine"] for found in report["machines"]] == [MACHINE, other]
    text = (tmp_path / "report.md").read_text()
    assert "AMD EPYC 9R14, 2 cores" in text
    assert "Ampere Altra, 64 cores" in text


@pytest.mark.slow
def test_failed_and_missing_runs_are_named(tmp_path: Path) -> None:
    runs = [
        run
        for run in all_runs(tmp_path)
        if run["part"] != "figure9"
        and (run["system"], run["part"]) != ("opnn", "table2")
        and (run["part"], run["value"]) != ("figure8", "0.9")
    ]
    failed = {"part": "table2", "value": "", "system": "opnn", "seed": 1}
    report = write_report(tmp_path, [*runs, {**failed, "failed": "no finite loss"}])
    assert report["table2"]["OPNN"]["auc"] is None
    assert report["missing"] == [
        "Table 2: no run of OPNN.",
        "Figure 8: not run at 0.9.",
        "Figure 9: not run.",
    ]
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "no finite loss" in text
        assert all(sentence in text for sentence in report["missing"])


def test_text_from_the_data_is_never_markup(tmp_path: Path) -> None:
    failed = {"part": "table2", "value": SPECIAL, "system": "lr", "seed": 9, "failed": SPECIAL}
    runs = [*select(all_runs(tmp_path, seeds=1), "table2"), failed]
    data = {**DATA, "name": SPECIAL, "notes": [SPECIAL], "whole": SPECIAL}
    write_report(tmp_path, runs, data, command=SPECIAL)
    page = Tags((tmp_path / "report.html").read_text())
    assert page.text.count(SPECIAL) >= 5
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
