"""Tests of `stream_ctr.paper.studies`: Figures 6 to 11."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paper_runs import all_runs, checks, select, table2_run, write_report

from stream_ctr.paper import aggregate


@pytest.mark.parametrize(("epoch", "noted"), [(0.02, True), (0.2, False)])
def test_multiples_of_a_short_epoch_of_lr_are_called_rough(
    epoch: float, noted: bool, tmp_path: Path
) -> None:
    runs = [
        run | {"seconds_per_epoch": epoch} if run["system"] == "lr" else run
        for run in select(all_runs(tmp_path), "table2")
    ]
    times = write_report(tmp_path, runs)["figure6"]
    assert times["cpu"]["FM"]["seconds_per_epoch"]["median"] == pytest.approx(14 / 2)
    per_epoch = aggregate.relative_times(times, "seconds_per_epoch")
    assert per_epoch["cpu"]["FM"]["median"] == pytest.approx(7 / epoch)
    assert (tmp_path / "figures" / "figure6.svg").exists()
    text = (tmp_path / "report.md").read_text()
    assert (f"An epoch of LR takes {epoch} s here" in text) == noted


def test_a_study_chooses_by_validation_and_not_by_the_test_part(tmp_path: Path) -> None:
    """The lowest test logloss is at relu, the lowest validation logloss at tanh."""
    scores = {"relu": (0.40, 0.46), "tanh": (0.41, 0.45)}
    runs = [
        {
            **table2_run("ipnn", 0, logloss=test, validation=checks(validation)),
            "part": "figure7",
            "value": value,
        }
        for value, (test, validation) in scores.items()
    ]
    report = write_report(tmp_path, runs)
    assert report["figure7"]["tanh"]["IPNN"]["validation_logloss"] == 0.45
    text = (tmp_path / "report.md").read_text()
    assert "Lowest validation logloss: IPNN at tanh." in text
    assert "| IPNN | 0.40000 | **0.41000** |" in text


def test_a_system_at_one_value_only_is_not_in_a_study(tmp_path: Path) -> None:
    at_relu = [table2_run(name, 0, part="figure7", value="relu") for name in ("fnn", "opnn")]
    at_tanh = table2_run("opnn", 0, part="figure7", value="tanh")
    write_report(tmp_path, [*at_relu, at_tanh])
    (tmp_path / "one").mkdir()
    write_report(tmp_path / "one", at_relu)
    assert "| FNN |" not in (tmp_path / "report.md").read_text().partition("## Figure 7")[2]
    assert "## Figure 7" not in (tmp_path / "one" / "report.md").read_text()
