"""Tests of `stream_ctr.paper.experiment`: one training, or one pass over a stream."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paper_data import (
    open_labelled,
    paper_setting,
    read_dataset,
    simulated_dataset,
    stream_setting,
    write_criteo_log,
)

from stream_ctr.paper import dataset, experiment
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, Dataset, Split
from stream_ctr.paper.experiment import Setting

TIMES = ("seconds", "seconds_pretraining", "seconds_per_epoch", "examples_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulated_dataset(tmp_path_factory.mktemp("simulated") / "data")


@pytest.fixture(scope="module")
def split(data: Dataset) -> Split:
    return Split.of(len(data), "random")


def untimed(outcome: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outcome.items() if name not in TIMES}


def losses_of(logits: npt.NDArray[np.float64], labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the log losses by their definition."""
    p = 1 / (1 + np.exp(-logits))
    losses: npt.NDArray[Any] = -np.log(np.where(labels == 1, p, 1 - p))
    return losses


# -- training ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_order(examples: list[tuple[int, bool]]) -> None:
    logits = np.array([logit for logit, _ in examples], np.float64)
    labels = np.array([label for _, label in examples], np.uint8)
    pairs = [(p > n) + 0.5 * (p == n) for p in logits[labels == 1] for n in logits[labels == 0]]
    share = np.mean(pairs) if pairs else np.nan
    assert experiment.auc(logits, labels) == pytest.approx(share, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["lr", "fnn", "deepfm"])
def test_an_outcome_depends_on_the_seed_and_not_on_the_threads(
    system: str, data: Dataset, split: Split
) -> None:
    setting = paper_setting(data, split, system, epochs=2)
    threads = replace(setting, learner={**setting.learner, "threads": 3})
    first, first_losses = experiment.train(setting, data, split)
    second, second_losses = experiment.train(threads, data, split)
    other_seed, _ = experiment.train(replace(setting, seed=1), data, split)
    assert untimed(first) == untimed(second)
    assert np.array_equal(first_losses, second_losses)
    assert first["logloss"] != other_seed["logloss"]


def fast_setting(data: Dataset, split: Split, system: str, table_bits: int) -> Setting:
    """Return a setting that overfits within eight epochs."""
    learner = {
        **paper_setting(data, split).learner,
        "table_bits": table_bits,
        "table_learning_rate": 0.05,
        "linear_learning_rate": 0.05,
        "ftrl": {"alpha": 1.0, "beta": 1.0, "l1": 0.0, "l2": 0.0},
    }
    return paper_setting(data, split, system, epochs=8, learner=learner)


# With 12 table bits all rows are copied, with 18 only those that are learned.
@pytest.mark.parametrize(("system", "table_bits"), [("deepfm", 12), ("deepfm", 18), ("lr", 12)])
def test_the_weights_of_the_best_check_are_tested(
    system: str, table_bits: int, data: Dataset, split: Split
) -> None:
    setting = fast_setting(data, split, system, table_bits)
    outcome, losses = experiment.train(setting, data, split)
    checks = outcome["validation"]
    best = int(np.argmin([check["logloss"] for check in checks]))
    assert [check["epoch"] for check in checks] == [(n + 1) / 4 for n in range(len(checks))]
    assert (outcome["best_epoch"], outcome["epochs"]) == ((best + 1) / 4, len(checks) / 4)
    assert len(checks) == best + 5 < 32  # four checks without improvement, and no four before

    learner = setting.make()
    steps = -(-split.count(TRAINING) // setting.batch_size)
    sizes = {"batch_size": setting.batch_size, "row_bytes": data.row_bytes}
    batches = [
        rows
        for epoch in range(8)
        for rows in dataset.shuffled(split, TRAINING, seed=(0, epoch), **sizes)
    ]
    for rows in batches[: best // 4 * steps + -(-steps * (best % 4 + 1) // 4)]:
        learner.learn(*data[rows])
    labels, logits = experiment.predict_rows(learner, data, split.rows(TEST))
    assert losses == pytest.approx(losses_of(logits, labels), rel=1e-9)


def test_training_stops_after_four_checks_without_improvement(data: Dataset, split: Split) -> None:
    outcome, _ = experiment.train(paper_setting(data, split, "fnn", epochs=3), data, split)
    for checks in (outcome["validation"], outcome["validation_pretraining"]):
        losses = [check["logloss"] for check in checks]
        since_best = [n - int(np.argmin(losses[: n + 1])) for n in range(len(losses))]
        assert all(count < 4 for count in since_best[:-1])
        assert len(checks) == 12 or since_best[-1] == 4


@pytest.mark.slow
def test_the_test_part_decides_nothing_but_its_own_scores(
    data: Dataset, split: Split, tmp_path: Path
) -> None:
    labels = np.array(data.labels)
    labels[split.rows(TEST)] ^= 1
    flipped = with_labels(data, tmp_path / "flipped", labels)
    outcome, _ = experiment.train(paper_setting(data, split), data, split)
    other, _ = experiment.train(paper_setting(data, split), flipped, split)
    assert outcome["validation"] == other["validation"]
    assert outcome["train_logloss"] == other["train_logloss"]
    assert outcome["auc"] == pytest.approx(1 - other["auc"])


def test_scores_of_the_test_part_are_those_of_its_losses(data: Dataset, split: Split) -> None:
    outcome, losses = experiment.train(paper_setting(data, split, "fm"), data, split)
    assert len(losses) == split.count(TEST)
    assert outcome["logloss"] == pytest.approx(np.mean(losses))


@pytest.mark.slow
def test_fnn_starts_as_the_same_fm_and_its_time_counts(data: Dataset, split: Split) -> None:
    fm, _ = experiment.train(paper_setting(data, split, "fm"), data, split)
    fnn, _ = experiment.train(paper_setting(data, split, "fnn"), data, split)
    found, wanted = (
        [check["logloss"] for check in checks]
        for checks in (fnn["validation_pretraining"], fm["validation"])
    )
    assert found == pytest.approx(wanted, rel=1e-6)  # the two modules sum in different orders
    assert fnn["seconds"] > fnn["seconds_pretraining"] > 0
    # The network starts where the FM ended.
    assert fnn["validation"][0]["logloss"] < fm["validation"][0]["logloss"] - 0.01


def test_lr_finds_what_decides_the_clicks(tmp_path: Path) -> None:
    path = write_criteo_log(tmp_path / "log.tsv", 4000)
    data = read_dataset(open_labelled(path), tmp_path / "data")
    split = Split.of(len(data), "time")
    outcome, _ = experiment.train(paper_setting(data, split, "lr"), data, split)
    assert outcome["auc"] > 0.65  # C1 alone gives 0.71: click rates of 0.1, 0.3, 0.5 and 0.7


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_logit_that_is_not_finite_has_no_score(
    part: str, data: Dataset, split: Split, tmp_path: Path
) -> None:
    directory = tmp_path / "odd"
    shutil.copytree(data.directory, directory)
    values = np.ones((len(data), 1), np.float32)
    values[split.rows(TEST if part == "test" else VALIDATION)[0]] = 3e38
    values.tofile(directory / "values.bin")
    hashed = {**data.metadata["hashed"], "value_fields": [0]}
    metadata = {**data.metadata, "value_fields": 1, "hashed": hashed}
    (directory / "data.json").write_text(json.dumps(metadata))
    odd = Dataset(directory)
    with pytest.raises(experiment.Diverged, match="not finite"):
        experiment.train(paper_setting(odd, split, "fm"), odd, split)


# -- one pass ------------------------------------------------------------------------------------


def test_a_pass_predicts_each_example_before_it_learns_it(data: Dataset) -> None:
    setting = stream_setting(data, "fm")
    outcome = experiment.stream(setting, data)

    learner = setting.make()
    logits = []
    for start in range(0, len(data), setting.batch_size):
        ids, labels, _ = data[slice(start, start + setting.batch_size)]
        logits.append(learner.predict(ids))
        learner.learn(ids, labels)
    losses = losses_of(np.concatenate(logits).astype(np.float64), data.labels)

    assert outcome["logloss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert outcome["last_half"]["logloss"] == pytest.approx(losses[3000:].mean(), rel=1e-6)
    assert sum(outcome["blocks"]) == pytest.approx(losses.sum(), rel=1e-6)
    assert outcome["blocks"][0] == pytest.approx(losses[: len(data) // 128].sum(), rel=1e-6)


def with_labels(data: Dataset, directory: Path, labels: npt.NDArray[Any]) -> Dataset:
    """Return a copy of the dataset with other labels."""
    shutil.copytree(data.directory, directory)
    labels.astype(np.uint8).tofile(directory / "labels.bin")
    return Dataset(directory)


def test_half_a_pass_without_clicks_has_no_auc_and_can_be_written(
    data: Dataset, tmp_path: Path
) -> None:
    rows = np.arange(len(data))
    clicks_early = with_labels(data, tmp_path / "early", (rows % 7 == 0) & (rows < 3000))
    outcome = experiment.stream(stream_setting(data, "lr"), clicks_early)
    dataset.write_json(tmp_path / "outcome.json", outcome)
    assert outcome["last_half"]["auc"] is None
    assert outcome["last_half"]["logloss"] > 0 < outcome["auc"]
