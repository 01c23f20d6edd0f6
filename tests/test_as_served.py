"""As served: the right weights for each impression, however polls fell and whatever crashed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trainers import SMALL, Partitions, Sections, finish, split, trainer

from stream_ctr import Scorer
from stream_ctr.events.features import hash_ids, mix64
from stream_ctr.join.examples import Examples
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.snapshots import snapshot
from stream_ctr.train.as_served import BEFORE_FIRST, MOST_COPIES, PASSED_OVER, AsServed, Copy

FM = LearnerSpec(model="fm", fields=2, embedding_dim=4, table_bits=8, batch_size=32)
LR = LearnerSpec(model="lr", fields=2, table_bits=8, batch_size=32)
SPECS = {"fm": FM, "lr": LR}
DELAY = 100


def examples(*times: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    n = len(times)
    return Examples(
        rng.integers(0, 2**63, n).astype(np.uint64),
        np.array(times, np.int64),
        rng.integers(0, 256, (n, 2)).astype(np.int32),
        np.empty((n, 0), np.float32),
        rng.integers(0, 2, n).astype(np.uint8),
        np.full(n, np.nan),
        np.array(times, np.int64),
    )


class Run:
    """Models that learn, and what would be served of them."""

    def __init__(self, share: float = 1.0) -> None:
        self.learners = {
            name: make_learner(spec, device="cpu", threads=1) for name, spec in SPECS.items()
        }
        for learner in self.learners.values():
            learner.track_changes()
        make = partial(make_learner, device="cpu", threads=1)
        self.served = AsServed(SPECS, share=share, delay_ms=DELAY, make=make)
        self.counters: Counter[str] = Counter()
        self.learned = 0

    def learn(self, batch: Examples) -> None:
        for learner in self.learners.values():
            learner.learn(batch.ids, batch.label)
        self.learned += len(batch)

    def freeze(self, event_ms: int) -> Copy | None:
        return self.served.freeze(self.learners, examples=self.learned, event_ms=event_ms)

    def publish(self, event_ms: int, *, published: bool = True) -> Copy:
        copy = self.freeze(event_ms)
        assert copy
        self.served.decide(copy, published=published, evidence=None)
        return copy

    def predict(self, batch: Examples) -> dict[str, np.ndarray]:
        return {name: learner.predict(batch.ids) for name, learner in self.learners.items()}

    def score(self, batch: Examples) -> dict[str, np.ndarray]:
        return {**self.served.score(batch, self.counters)}


def assert_same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, logits in one.items():
        np.testing.assert_allclose(logits, other[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_impression_is_scored_by_the_newest_publication_that_was_in_force_when_it_came() -> None:
    run = Run()
    batch = examples(1099, 1100, 1199, 1200, 1300)
    predictions = []
    for event_ms in (1000, 1100):
        run.learn(examples(*range(event_ms, event_ms + 20), seed=event_ms))
        run.publish(event_ms)
        predictions.append(run.predict(batch))
    run.learn(examples(*range(1150, 1180), seed=9))
    served = run.score(batch)
    for name in SPECS:
        assert np.isnan(served[name][0])
        first, second = predictions[0][name], predictions[1][name]
        expected = np.concatenate([first[1:3], second[3:]])
        np.testing.assert_allclose(served[name][1:], expected, rtol=1e-5, atol=1e-6)
        assert not np.allclose(first[1:3], second[1:3])
    assert run.counters == {BEFORE_FIRST: 1}


def test_what_was_refused_is_never_in_force() -> None:
    run = Run()
    batch = examples(1150, 1250)
    run.learn(examples(*range(20)))
    run.publish(1000)
    expected = run.predict(batch)
    run.learn(examples(*range(20), seed=3))
    refused = run.publish(1050, published=False)
    assert refused.refused
    assert_same(run.score(batch), expected)


def test_a_batch_waits_for_the_verdict_on_a_candidate_that_it_could_be_served_by() -> None:
    run = Run()
    run.freeze(1000)
    assert not run.served.awaits_verdict(examples(900, 1099))
    assert run.served.awaits_verdict(examples(900, 1100))
    run.served.decide_all(published=True)
    assert not run.served.awaits_verdict(examples(900, 1100))


def test_a_copy_goes_when_all_that_it_serves_is_learned_and_there_are_at_most_four() -> None:
    run = Run()
    for number in range(MOST_COPIES):
        assert run.publish(1000 + number)
    assert run.served.full
    assert run.freeze(1010) is None
    run.score(examples(1099 + MOST_COPIES))  # only the newest serves from here on
    assert len(run.served.copies()) == 1
    assert run.freeze(1010)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 32), st.sampled_from(["publish", "refuse", "replace"]))),
)
def test_a_copy_of_the_rows_that_changed_equals_one_of_all_weights(
    steps: list[tuple[int, str]],
) -> None:
    run = Run()
    fresh = {name: learner.weights() for name, learner in run.learners.items()}
    batch = examples(*range(5000, 5050), seed=77)
    for number, (learned, act) in enumerate(steps):
        if learned:
            run.learn(examples(*range(learned), seed=number))
        if act == "replace":
            for name, learner in run.learners.items():
                learner.load_weights(fresh[name])
            continue
        run.publish(number, published=act == "publish")
        if act == "publish":
            assert_same(run.score(batch), run.predict(batch))


def test_the_share_is_chosen_by_the_hash_of_the_id() -> None:
    run = Run(share=0.5)
    run.publish(0)
    batch = examples(*range(1000, 1400))
    scored = np.isfinite(run.score(batch)["fm"])
    assert np.array_equal(scored, mix64(batch.id_hash) < np.uint64(1 << 63))
    assert 150 < scored.sum() < 250


# -- in a run ------------------------------------------------------------------------------------

PUBLISHING: Sections = {
    "model": {**SMALL["model"], "name": "blend"},
    "schedule": {"snapshot_examples": 512},
    "snapshots": {"keep": 100, "gate_clicks": 0},
    "metrics": {"window": "60s", "served_share": 0.5},
}


def served_rows(directory: Path) -> dict[str, np.ndarray]:
    """Return the columns of all parts of the predictions, in order."""
    paths = sorted(directory.glob("*.parquet"), key=lambda path: path.name.split("-")[1])
    table = pa.concat_tables([pa.parquet.read_table(path) for path in paths])
    return {name: table[name].to_numpy() for name in table.column_names}


def run_to_end(directory: Path, source: Any, **sections: Any) -> dict[str, Any]:
    built = trainer(directory, source, predictions=directory / "p", **{**PUBLISHING, **sections})
    newest = snapshot.newest(directory / "snapshots")
    if newest:
        built.restore(newest)
    return finish(built)


@pytest.fixture(scope="module")
def published(stream: pa.LargeBinaryArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published") / "run"
    run_to_end(directory, Partitions(split(stream, 2), seed=1))
    return directory


def test_each_probability_is_the_one_that_a_subscriber_would_have_given(
    stream: pa.LargeBinaryArray, published: Path
) -> None:
    rows = served_rows(published / "p")
    events = [json.loads(value) for value in stream.to_pylist()]
    shown = {
        hash_ids(pa.array([event["impression_id"]]))[0]: event
        for event in events
        if event["kind"] == "impression"
    }
    root = published / "snapshots"
    manifests = [snapshot.read_manifest(root / name) for name in snapshot.snapshot_ids(root)]
    in_force = [manifest.event_time_ms + 60_000 + 30_000 for manifest in manifests]
    time = rows["event_time"].astype("datetime64[ms]").astype(np.int64)
    chosen = ~np.isnan(rows["served.deepfm"])
    assert chosen.sum() > 500
    number = np.searchsorted(in_force, time, side="right") - 1
    assert np.array_equal(chosen, (number >= 0) & (mix64(rows["id_hash"]) < np.uint64(1 << 63)))
    for index in np.unique(number[chosen]).tolist():
        at = np.flatnonzero(chosen & (number == index))
        features = [shown[rows["id_hash"][row]]["features"] for row in at]
        for model in ("blend", "deepfm", "ftrl", "ftrl_pairs"):
            scorer = Scorer(root / manifests[index].snapshot, model=model)
            np.testing.assert_allclose(
                rows[f"served.{model}"][at], scorer.predict(features), rtol=1e-4
            )


def test_polls_and_partitions_do_not_matter(
    tmp_path: Path, stream: pa.LargeBinaryArray, published: Path
) -> None:
    report = run_to_end(tmp_path / "other", Partitions(split(stream, 2), seed=7))
    last = json.loads((published / "reports.jsonl").read_text().splitlines()[-1])
    assert report["as_served"] == last["as_served"]
    assert report["as_served_last_half"] == last["as_served_last_half"]
    assert report["counters"][BEFORE_FIRST] == last["counters"][BEFORE_FIRST] > 0
    ours, theirs = served_rows(tmp_path / "other" / "p"), served_rows(published / "p")
    for name, column in ours.items():
        assert np.array_equal(column, theirs[name], equal_nan=column.dtype.kind == "f"), name
    progressive = report["as_served"]["models"]["progressive"]
    assert progressive["count"] == report["as_served"]["models"]["blend"]["count"] > 500


def test_a_batch_waits_for_the_snapshot_that_its_impressions_were_served_by(
    tmp_path: Path, stream: pa.LargeBinaryArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A snapshot is in force before the batch after it has been learned.
    soon: Sections = {"join": {"label_window": "2s", "allowed_lateness": "0s"}}
    write = snapshot.write

    def slowly(*args: Any, **options: Any) -> Path:
        time.sleep(0.1)
        return write(*args, **options)

    reports = [run_to_end(tmp_path / "fast", Partitions([stream]), **soon)]
    monkeypatch.setattr(snapshot, "write", slowly)
    source = Partitions([stream])
    all_at_once: Any = SimpleNamespace(permutation=np.arange, integers=lambda *_: 10**6)
    source._rng = all_at_once
    reports.append(run_to_end(tmp_path / "slow", source, **soon))
    fast, slow = reports
    assert fast["as_served"] == slow["as_served"]
    assert fast["as_served"]["models"]["blend"]["count"] > 2000


@pytest.mark.parametrize("keep", [1, 100])
def test_a_run_that_was_killed_and_goes_on_scores_as_one_that_was_not(
    tmp_path: Path, stream: pa.LargeBinaryArray, published: Path, keep: int
) -> None:
    parts = tmp_path / "parts"
    for seed, stop in enumerate((2500, 2000, None)):
        source = Partitions(split(stream, 2), seed=seed, stop_after=stop)
        snapshots = {**PUBLISHING["snapshots"], "keep": keep}
        built = trainer(
            parts, source, predictions=parts / "p", **{**PUBLISHING, "snapshots": snapshots}
        )
        newest = snapshot.newest(parts / "snapshots")
        if newest:
            built.restore(newest)
        if stop is None:
            report = finish(built)
            continue
        built.stop = _die  # type: ignore[method-assign]  # it dies instead of stopping
        with pytest.raises(KeyboardInterrupt):
            built.run()
        # Its last part may be one whose snapshot was never seen.
        assert list((parts / "p").glob("*.parquet"))
    last = json.loads((published / "reports.jsonl").read_text().splitlines()[-1])
    for name in ("as_served", "as_served_last_half", "models"):
        assert report[name] == last[name], name
    ours, theirs = served_rows(parts / "p"), served_rows(published / "p")
    for name, column in ours.items():
        assert np.array_equal(column, theirs[name], equal_nan=column.dtype.kind == "f"), name


def _die() -> None:
    raise KeyboardInterrupt


def test_a_log_is_published_in_event_time_however_often_it_is_stopped(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    sections: Sections = {
        "schedule": {"snapshot_every": "20s"},
        "metrics": {"window": "60s", "served_share": 0.5},
    }
    reports = []
    for name, stops in (("whole", (None,)), ("parts", (2500, 700, None))):
        for seed, stop in enumerate(stops):
            source = Partitions([stream], seed=seed, stop_after=stop)
            built = trainer(tmp_path / name, source, in_event_time=True, **sections)
            newest = snapshot.newest(tmp_path / name / "snapshots")
            if newest:
                built.restore(newest)
            report = finish(built)
        reports.append(report)
    whole, parts = reports
    assert whole["as_served"] == parts["as_served"]
    assert whole["as_served"]["models"]["deepfm"]["count"] > 500
    assert whole["counters"][BEFORE_FIRST] == parts["counters"][BEFORE_FIRST]
    assert whole["counters"].get(PASSED_OVER) == parts["counters"].get(PASSED_OVER) is not None


def test_nothing_is_in_force_that_the_gate_refuses(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    sections: Sections = {
        **PUBLISHING,
        "snapshots": {"gate_clicks": 20, "gate_calibration": 1e-9, "gate_logloss": 1e-9},
        "baseline": {"enabled": False},
    }
    free = finish(trainer(tmp_path / "free", Partitions([stream]), **PUBLISHING))
    gated = finish(trainer(tmp_path / "gated", Partitions([stream]), **sections))
    assert gated["counters"]["publications_refused"] > 0
    assert gated["models"] == free["models"]
    assert gated["as_served"]["models"]["deepfm"] != free["as_served"]["models"]["deepfm"]


def test_without_a_share_nothing_is_scored_as_served(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    report = finish(
        trainer(tmp_path, Partitions([stream.slice(0, 2000)]), metrics={"served_share": 0})
    )
    assert "as_served" not in report
    assert "serve" not in report["profile"]["trainer"]
