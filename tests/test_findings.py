"""Tests of `stream_ctr.paper.findings`: the results of Table 2 in sentences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.paper_runs import DATA, TITLES, all_runs, select, table2_run, write_report


def test_an_interval_and_not_the_order_decides_which_systems_beat_lr(tmp_path: Path) -> None:
    """FM is below LR by far less than two seeds of each differ, DeepFM by far more."""
    loglosses = {"lr": (0.500, 0.500), "fm": (0.489, 0.509), "deepfm": (0.400, 0.401)}
    runs = [
        table2_run(system, seed, logloss=by_seed[seed], losses=f"{system}-{seed}.npy")
        for system, by_seed in loglosses.items()
        for seed in (0, 1)
    ]
    for run in runs:
        np.save(tmp_path / run["losses"], np.full(200, run["logloss"], np.float32))
    report = write_report(tmp_path, runs, seeds=2)
    difference = report["table2"]["FM"]["minus_lr"]["logloss_difference"]
    assert difference == pytest.approx(-0.001, abs=1e-6)
    assert report["table2"]["LR"]["minus_lr"] is None
    assert (report["against_lr"]["FM"], report["against_lr"]["DeepFM"]) == ("same", "better")
    text = (tmp_path / "report.md").read_text()
    assert "Lower logloss than LR (interval below zero): DeepFM." in text
    assert "No clear difference from LR (interval includes zero): FM." in text


def test_systems_that_learned_nothing_are_named(tmp_path: Path) -> None:
    runs = select(all_runs(tmp_path, seeds=1), "table2")
    write_report(tmp_path, runs, {**DATA, "constant_logloss": 0.47})
    sentence = "Not better than predicting the best constant (test logloss 0.47000): LR."
    assert sentence in (tmp_path / "report.html").read_text()


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    report = write_report(tmp_path, [])
    assert list(report["table2"]) == TITLES
    assert report["order"] == []
    assert "No run of Table 2 has finished." in (tmp_path / "report.html").read_text()
