"""Tests of `stream_ctr.paper.work`: estimates, the loop over runs, and their outcomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support.paper_data import SMALL, SMALL_ROW_FLOATS, simulated_dataset

from stream_ctr import config
from stream_ctr.config import Config
from stream_ctr.logs.simulate import FIELDS, Simulation
from stream_ctr.paper import plan, reading, words, work
from stream_ctr.paper.dataset import Dataset

ADAM_TABLES = 2 * 4 * SMALL_ROW_FLOATS * 2**12  # bytes of the table of SMALL and its best copy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulated_dataset(tmp_path_factory.mktemp("simulated") / "data")


def table2_plan(data: Dataset, configured: Config, *, epochs: int = 10) -> plan.Plan:
    options = plan.Options(device="cpu", seeds=1, epochs=epochs, only=frozenset(["table2"]))
    return plan.make_plan(data, configured, options)


def test_the_estimate_counts_what_is_left_and_its_memory(data: Dataset, tmp_path: Path) -> None:
    found = table2_plan(data, config.load(overrides=SMALL))
    (tmp_path / "runs").mkdir()
    first = next(iter(found.runs))
    (tmp_path / "runs" / f"{first}.json").write_text("{}")
    runs, time, room = work.estimate(found, tmp_path)
    assert runs == "9 runs, 1 of them done before"
    assert "with 3 epochs a run" in time
    assert room.startswith(words.byte_size(ADAM_TABLES + 64 * len(data)))
    one_system = replace(found, options=replace(found.options, models=("fm",)))
    assert work.estimate(one_system, tmp_path)[0] == "1 run"


def test_memory_and_disk_are_known_before_the_log_is_read() -> None:
    rows = 1_000_000
    disk = reading.expected_bytes(Simulation(rows), config.load(), rows)
    sentence = work.requirements(config.load(overrides=SMALL), plan.Options(), rows, disk)
    row_bytes = 4 * len(FIELDS) + 1 + 8 + 8
    assert sentence == (
        f"at most about 1,000,000 impressions to read; {(ADAM_TABLES + 64 * rows) / 1e6:.1f} MB "
        f"of memory, {rows * row_bytes / 1e6:.1f} MB of disk"
    )


def test_a_run_that_diverges_is_recorded_and_stops_no_other(data: Dataset, tmp_path: Path) -> None:
    configured = config.load(overrides={**SMALL, "learn": {"dense_learning_rate": 1e30}})
    found = table2_plan(data, configured, epochs=1)
    work.run(found, tmp_path, console=Console(quiet=True))
    results = {result["system"]: result for result in work.results(found, tmp_path)}
    assert "finite" in results["deepfm"]["failed"]
    assert results["lr"]["auc"] > 0.5
