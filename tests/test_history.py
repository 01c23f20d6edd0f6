"""Inputs one after another teach what one log of all their records would, wherever a run dies."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from support.histories import assert_equally_learned, cuts, learn

from stream_ctr.logs.simulate import Simulation

OFTEN = {"schedule": {"snapshot_examples": 256}}
SAME = ("examples", "ledger", "models", "counters", "as_served", "window_curve", "pending")


@pytest.fixture(scope="module")
def records() -> pa.LargeBinaryArray:
    batches = [batch.value for batch in Simulation(2000, seed=3).batches()]
    return pa.concat_arrays(batches)


@pytest.fixture(scope="module")
def whole(records: pa.LargeBinaryArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("whole")
    learn(state, cuts(records, []), in_event_time=True, **OFTEN)
    return state


def last_report(state: Path) -> dict:
    return json.loads((state / "reports.jsonl").read_text().splitlines()[-1])


def assert_went_on_as_one(state: Path, whole: Path) -> None:
    assert_equally_learned(state, whole)
    ours, theirs = last_report(state), last_report(whole)
    for name in SAME:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("read_ahead", [0, 500])
def test_logs_one_after_another_in_one_run_equal_the_whole(records, whole, tmp_path, read_ahead):
    logs = cuts(records, [300, 301, 1500], seed=7)
    learn(tmp_path, logs, in_event_time=True, input={"read_ahead": read_ahead}, **OFTEN)
    assert_went_on_as_one(tmp_path, whole)


def test_one_run_for_each_log_equals_the_whole(records, whole, tmp_path):
    *first, last = cuts(records, [300, 1500], seed=7)
    for log in first:
        report = learn(tmp_path, [log], keep_open=True, in_event_time=True, **OFTEN)
        assert report["kind"] == "final"
        assert report["pending"] > 0
    learn(tmp_path, [last], in_event_time=True, **OFTEN)
    assert_went_on_as_one(tmp_path, whole)
