"""The benchmark of freshness: the stream, who serves which impression, and a quick run."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bench import freshness
from bench.drifting import Change, DriftingStream, examples_of
from bench.freshness import Blended, Schedule
from bench.kept import Kept
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.learn.learner import make_learner
from stream_ctr.logs.simulate import START_MS, Drift
from stream_ctr.train.as_served import AsServed

SCRIPT = Path(__file__).parent / "bench" / "freshness.py"


# -- freshness -----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=40).map(sorted),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.005, 0.05]),
    st.integers(0, 30),
    st.integers(0, 20),
)
def test_each_impression_is_served_by_the_newest_publication_in_force(
    times: list[int], size: int, seconds: float, window_ms: int, transfer_ms: int
) -> None:
    time = START_MS + np.array(times, np.int64)
    ends = np.arange(size, len(time) + 1, size)
    if not len(ends):
        return
    found = Schedule.every(seconds, time, ends, window_ms=window_ms, transfer_ms=transfer_ms)
    served = np.full(len(time), -1)
    for k, batches in enumerate(found.batches.tolist()):
        served[found.first[k] : found.first[k + 1]] = batches
    for row, at in enumerate(time.tolist()):
        in_force = [
            sum(int(time[end - 1]) + window_ms <= published for end in ends.tolist())
            for published in found.at_ms.tolist()
            if published + transfer_ms <= at
        ]
        assert served[row] == (in_force[-1] if in_force else -1)


@pytest.mark.slow
def test_the_logits_are_those_of_the_metrics_as_served() -> None:
    options = freshness.defaults(quick=True)
    options.warm_up, options.scored, options.rate = 1.0, 1.0, 60.0
    schema, specs = freshness.described(options)
    stream = DriftingStream(Change(), seconds=120, rate=60.0, seed=3)
    examples = examples_of(stream, freshness.hasher_of(schema), window_ms=5000)
    ends = freshness.batch_ends(len(examples), 64)
    schedule = Schedule.every(20, examples.time, ends, window_ms=5000, transfer_ms=1000)
    model = Blended(specs)
    blend = tuple(specs)
    served = AsServed(
        specs,
        blend=blend,
        share=1.0,
        delay_ms=6000,
        every_ms=20_000,
        make=partial(make_learner, threads=1),
    )
    number = iter(range(len(schedule.at_ms)))

    def predict(ids: freshness.Ids) -> dict[str, freshness.Logits]:
        k = next(number)
        copy = served.freeze(
            model.learners, blend=model.blend, examples=k, event_ms=int(schedule.at_ms[k]) - 5000
        )
        assert copy
        assert copy.from_ms == schedule.at_ms[k] + 1000
        found = copy.slot.predict(copy.names, ids, np.empty((len(ids), 0), np.float32))
        served.decide(copy, published=False, evidence=None)  # frees its place
        return {"ours": model.predict(ids), "theirs": found["blend"]}

    everything = np.ones(len(examples), np.bool_)
    logits = freshness.serve_while_learning(
        examples, model, ends, [(schedule, predict)], everything
    )
    scored = np.isfinite(logits["ours"])
    assert scored.sum() == len(examples) - schedule.first[0]
    np.testing.assert_array_equal(logits["ours"][scored], logits["theirs"][scored])
    assert len(set(np.round(logits["ours"][scored], 9))) > 100


@pytest.mark.parametrize(("drift", "low", "high"), [("rate", 0.1, 0.45), ("none", 0.9, 1.1)])
def test_the_law_changes_at_the_time_of_the_change(drift: Drift, low: float, high: float) -> None:
    middle = START_MS + 20_000
    stream = DriftingStream(Change(drift, at_ms=(middle,)), seconds=40, rate=400, seed=1)
    (block, *rest) = stream.impressions_in_order()
    time = np.concatenate([each["time"].to_numpy() for each in (block, *rest)])
    p = np.concatenate([each["true_probability"].to_numpy() for each in (block, *rest)])
    assert len(time) == 16_000
    assert (np.diff(time) >= 0).all()
    assert low < p[time >= middle].mean() / p[time < middle].mean() < high


def test_a_gradual_change_comes_back_to_the_law_it_began_with() -> None:
    turn = Change("weights", turn_hours=1.0)
    hour = START_MS + 3_600_000 * np.array([0, 0.25, 0.5, 1])
    np.testing.assert_allclose(np.cos(turn.angle(hour)), [1, 0, -1, 1], atol=1e-12)


def test_two_scripts_keep_their_cases_in_one_file(tmp_path: Path) -> None:
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    page.write_text("<!-- a -->\n<!-- /a -->\n<!-- b -->\n<!-- /b -->\n")
    first = Kept("first", {"a": lambda found: f"a is {found}"}, kept, page)
    second = Kept("second", {"b": lambda found: f"b is {found}"}, kept, page)
    assert first.add("a", 1) == "a is 1"
    second.add("b", 2)
    first.add("a", 3)
    assert {case: each["results"] for case, each in first.read().items()} == {"a": 3, "b": 2}
    written = page.read_text()
    assert "a is 3" in written
    assert "b is 2" in written
    page.write_text("<!-- b -->\n<!-- /b -->\n")
    second.render()
    assert "b is 2" in page.read_text()


@pytest.mark.slow
def test_a_quick_run_of_freshness_fills_its_block(tmp_path: Path) -> None:
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    page.write_text("<!-- freshness -->\n<!-- /freshness -->\n")
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(kept), "--page", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(kept.read_text())["cases"]["freshness"]["results"]
    assert [*results["cases"]] == ["none", "weights-1"]
    for (seed,) in results["cases"].values():
        assert seed["best_possible"] < seed["logloss"]["progressive"] < seed["constant"] * 1.5
        assert [*seed["logloss"]] == [*freshness.INTERVALS, freshness.PROGRESSIVE]
    assert freshness.table(results) in page.read_text()
