"""Tests of `stream_ctr.paper.aggregate`: from runs to the numbers of a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.paper_runs import all_runs, select, table2_run

from stream_ctr.paper import aggregate


def test_means_and_spreads_are_over_the_seeds_of_one_system() -> None:
    seeds = enumerate([(0.70, 10.0), (0.72, 14.0), (0.74, 18.0)])
    fm = [table2_run("fm", seed, auc=auc, seconds=seconds) for seed, (auc, seconds) in seeds]
    rows = aggregate.table2([*fm, table2_run("lr", 0, auc=0.5)], lambda run: np.zeros(10))
    assert rows["FM"]["auc"] == pytest.approx(0.72)
    assert rows["FM"]["auc_std"] == pytest.approx(0.02)  # the root of (0.02^2 + 0 + 0.02^2) / 2
    assert rows["FM"]["seconds"] == pytest.approx(14.0)
    assert (rows["LR"]["auc"], rows["LR"]["auc_std"], rows["LR"]["runs"]) == (0.5, None, 1)
    assert (rows["PNN*"]["auc"], rows["PNN*"]["runs"]) == (None, 0)


def test_a_difference_is_paired_by_seed_and_by_example() -> None:
    losses = {
        ("deepfm", 0): [0.1, 0.2],
        ("deepfm", 2): [0.3, 0.4],
        ("fm", 2): [0.4, 0.7],
        ("fm", 0): [0.2, 0.1],
        ("fm", 1): [9.0, 9.0],
    }
    runs = [table2_run(system, seed, losses="x") for system, seed in losses]
    rows = aggregate.table2(runs, lambda run: np.array(losses[run["system"], run["seed"]]))
    # Seed 0: (0.1 - 0.1) / 2 = 0. Seed 2: (0.1 + 0.3) / 2 = 0.2. DeepFM has no seed 1.
    assert rows["FM"]["minus_deepfm"] == {
        "logloss_difference": pytest.approx(0.1),
        "low": None,
        "high": None,
        "seeds": 2,
    }
    assert rows["DeepFM"]["minus_deepfm"] is None


def test_a_systems_time_is_the_median_over_seeds_relative_to_lrs() -> None:
    lr_seconds = enumerate([90.0, 2.0, 1.0])
    fm_seconds = enumerate([5.0, 6.0, 80.0])
    runs = [table2_run("lr", i, seconds=s, seconds_per_epoch=1.0) for i, s in lr_seconds]
    runs += [table2_run("fm", i, seconds=s, seconds_per_epoch=4.0) for i, s in fm_seconds]
    on_gpu = table2_run("fm", 0, seconds=1.5, seconds_per_epoch=0.5, device="cuda")
    runs.append({**on_gpu, "part": "figure6"})
    times = aggregate.times(runs)
    ratios = aggregate.relative_times(times)
    assert ratios["cpu"]["FM"] == {"median": 3.0, "least": 2.5, "most": 40.0}
    assert ratios["cuda"] == {"FM": {"median": 0.75, "least": 0.75, "most": 0.75}}
    per_epoch = aggregate.relative_times(times, "seconds_per_epoch")
    assert per_epoch["cpu"]["FM"]["median"] == 4.0


def test_a_system_missing_from_a_whole_figure_is_named_once(tmp_path: Path) -> None:
    found = [
        run
        for run in select(all_runs(tmp_path, seeds=1), "table2", "figure7", "streaming")
        if run["part"] != "figure7"
        or (run["system"] != "fnn" and (run["system"], run["value"]) != ("pnn", "tanh"))
    ]
    missing = aggregate.missing(found)
    assert missing[:2] == ["Figure 7: no run of FNN.", "Figure 7, tanh: no run of PNN*."]
    assert missing[2:] == [f"Figure {number}: not run." for number in (8, 9, 10, 11)]
