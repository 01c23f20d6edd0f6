"""The paper's runs: what is read of a log, how it is split, what a run is, and that a command that was ended goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.patience import PATIENCE_SECONDS, started

from stream_ctr import config
from stream_ctr.cli.main import main
from stream_ctr.config import Config
from stream_ctr.connectors.memory import BatchSource
from stream_ctr.errors import DataError
from stream_ctr.events.features import Hasher
from stream_ctr.join.examples import Examples
from stream_ctr.logs.log import Log
from stream_ctr.logs.open import open_log
from stream_ctr.logs.simulate import FIELDS, Simulation
from stream_ctr.models import MODELS
from stream_ctr.paper import dataset, experiment, intervals, plan, published, reading, words, work
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, Dataset, Split
from stream_ctr.paper.experiment import Setting

SMALL = {"model": {"table_bits": 12, "embedding_dim": 4, "hidden": [8, 8]}}
SMALL_OPTIONS = (
    "-X",
    "model.table_bits=12",
    "-X",
    "model.embedding_dim=4",
    "-X",
    "model.hidden=8,8",
)
TIMES = (
    "seconds",
    "seconds_pretraining",
    "seconds_per_epoch",
    "examples_per_second",
    "seconds_whole",
)


def read(
    log: Log, directory: Path, *, limit: int | None = None, configured: Config | None = None
) -> Dataset:
    source = BatchSource(lambda: (batch.value for batch in log.batches()), name=log.identity)
    return reading.read(
        log,
        source,
        configured or config.load(overrides=SMALL),
        directory,
        limit=limit,
        console=Console(quiet=True),
    )


def events(log: Log) -> Iterator[dict[str, Any]]:
    for batch in log.batches():
        yield from (json.loads(value) for value in batch.value.to_pylist())


def criteo(path: Path, rows: int, *, seed: int = 0, bad: Sequence[int] = ()) -> Path:
    """A log in Criteo's format whose clicks depend on C1 alone; the lines `bad` are cut short."""
    rng = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        kind = int(rng.integers(4))
        cells = [
            str(int(rng.random() < 0.1 + 0.2 * kind)),
            *(str(int(n)) for n in rng.integers(0, 50, 13)),
            f"{kind:08x}",
        ]
        lines.append(
            "\t".join(
                [*cells, *(f"{int(n):08x}" for n in rng.integers(0, 30, 25))][
                    : 7 if row in bad else None
                ]
            )
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def shared_data(name: str) -> Path:
    path = (
        Path(os.environ.get("STREAM_CTR_DATA", Path(__file__).parents[2] / "shared" / "data"))
        / name
    )
    if not path.exists():
        pytest.skip(f"no {name} in ../shared/data or STREAM_CTR_DATA")
    return path


# -- dataset -------------------------------------------------------------------------------------


def test_the_data_of_a_log_are_its_impressions_in_order_with_the_label_that_a_dictionary_of_clicks_gives(
    tmp_path: Path,
) -> None:
    simulation = Simulation(2000, seed=4)
    told = list(events(simulation))
    shown = [event for event in told if event["kind"] == "impression"]
    clicked = {event["impression_id"] for event in told if event["kind"] == "click"}

    data = read(simulation, tmp_path / "data")

    assert data.time.tolist() == [event["time"] for event in shown]
    assert data.labels.tolist() == [int(event["impression_id"] in clicked) for event in shown]
    assert data.true_probability.tolist() == [event["true_probability"] for event in shown]
    assert data.about["notes"] == list(simulation.notes)  # nothing was late, nothing unmatched


def test_ids_are_those_that_the_hasher_gives_the_impression(tmp_path: Path) -> None:
    simulation = Simulation(300, seed=4)
    shown = [event["features"] for event in events(simulation) if event["kind"] == "impression"]
    columns = {
        f.name: pa.array(
            [x.get(f.name) for x in shown], pa.string() if f.kind == "categorical" else pa.float64()
        )
        for f in FIELDS
    }

    data = read(simulation, tmp_path / "data")

    assert np.array_equal(data.ids, Hasher(FIELDS, table_bits=12).rows(columns)[0])


def test_no_label_of_a_log_without_click_times_is_lost_and_bad_lines_are_counted(
    tmp_path: Path,
) -> None:
    path = criteo(tmp_path / "log.tsv", 5000, bad=[7, 4000])
    labels = [
        int(line[0])
        for row, line in enumerate(path.read_text().splitlines())
        if row not in (7, 4000)
    ]
    log = open_log(path, format="criteo", click_delay_seconds=reading.CLICK_DELAY_SECONDS)

    data = read(log, tmp_path / "data")

    assert data.labels.tolist() == labels
    assert any(note.startswith("2 lines cannot be read") for note in data.about["notes"])


@pytest.mark.parametrize(
    ("name", "column", "delimiter"), [("criteo/train.csv", 0, "\t"), ("avazu/train.csv", 1, ",")]
)
def test_every_click_of_the_public_samples_is_found(
    name: str, column: int, delimiter: str, tmp_path: Path
) -> None:
    path = shared_data(name)
    clicks = sum(line.split(delimiter)[column] == "1" for line in path.read_text().splitlines())
    log = open_log(path, click_delay_seconds=reading.CLICK_DELAY_SECONDS)
    assert int(read(log, tmp_path / "data").labels.sum()) == clicks > 1000


def test_a_log_of_events_is_joined_as_configured_and_its_fields_are_inferred(
    tmp_path: Path,
) -> None:
    simulation = Simulation(1500, seed=4)
    simulation.write_jsonl(tmp_path / "events.jsonl.gz")
    whole = read(simulation, tmp_path / "a")
    window = {"label_window": "6h", "allowed_lateness": "0s"}
    long = read(
        open_log(tmp_path / "events.jsonl.gz"),
        tmp_path / "b",
        configured=config.load(overrides={**SMALL, "join": window}),
    )
    short = read(
        open_log(tmp_path / "events.jsonl.gz"),
        tmp_path / "c",
        configured=config.load(overrides={**SMALL, "join": {"label_window": "5s"}}),
    )
    assert np.array_equal(long.labels, whole.labels)
    assert np.array_equal(np.sort(long.ids), np.sort(whole.ids))  # fields stand in another order
    assert 0 < short.labels.sum() < whole.labels.sum()
    assert any("clicks late" in note for note in short.about["notes"])


def test_numbers_that_multiply_are_kept_with_the_ids(tmp_path: Path) -> None:
    configured = config.load(overrides={**SMALL, "features": {"numeric_encoding": "value"}})
    simulation = Simulation(300, seed=4)
    shown = [event["features"] for event in events(simulation) if event["kind"] == "impression"]
    data = read(simulation, tmp_path / "data", configured=configured)
    assert data.values[:, 0].tolist() == pytest.approx([x.get("rating") or 1.0 for x in shown])


def test_a_second_reading_uses_what_the_first_wrote_unless_the_log_or_the_hashing_is_another(
    tmp_path: Path,
) -> None:
    first = read(Simulation(300, seed=4), tmp_path / "data")
    written = (tmp_path / "data" / "ids.bin").stat().st_mtime_ns
    assert np.array_equal(read(Simulation(300, seed=4), tmp_path / "data").ids, first.ids)
    assert (tmp_path / "data" / "ids.bin").stat().st_mtime_ns == written
    with pytest.raises(
        DataError,
        match="holds other data: it is of simulation-4, and this is simulation-5.*--restart",
    ):
        read(Simulation(300, seed=5), tmp_path / "data")
    with pytest.raises(DataError, match="holds other data: table_bits is 12 there and 13 here"):
        read(
            Simulation(300, seed=4),
            tmp_path / "data",
            configured=config.load(overrides={"model": {"table_bits": 13}}),
        )


def test_of_a_reading_that_breaks_off_nothing_is_taken_for_data(tmp_path: Path) -> None:
    def breaks_off() -> Iterator[Examples]:
        n = 10
        zeros = np.zeros(n, np.int64)
        yield Examples(
            zeros.astype(np.uint64),
            zeros,
            np.zeros((n, 2), np.int32),
            np.zeros((n, 0), np.float32),
            np.zeros(n, np.uint8),
            np.ones(n),
        )
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.write(tmp_path / "data", breaks_off(), identity={})
    assert dataset.existing(tmp_path / "data") is None


def test_data_that_are_not_as_they_were_written_are_an_error_that_says_how_to_have_them_anew(
    tmp_path: Path,
) -> None:
    read(Simulation(300, seed=4), tmp_path / "data")
    (tmp_path / "data" / "ids.bin").write_bytes(b"cut short")
    with pytest.raises(DataError, match="data is damaged .*--restart reads it again"):
        read(Simulation(300, seed=4), tmp_path / "data")


def test_a_configured_field_that_no_impression_has_is_named_and_of_none_at_all_nothing_is_learned(
    tmp_path: Path,
) -> None:
    path = criteo(tmp_path / "log.tsv", 300)

    def of_fields(*names: str) -> Dataset:
        configured = config.load(overrides={**SMALL, "features": {"categorical": names}})
        log = open_log(path, format="criteo", click_delay_seconds=reading.CLICK_DELAY_SECONDS)
        return read(log, tmp_path / "-".join(names), configured=configured)

    assert (
        of_fields("C1", "C1o").about["notes"][-1]
        == "no impression has C1o: are these fields spelled as in the log?"
    )
    assert not any("spelled" in note for note in of_fields("C1").about["notes"])
    with pytest.raises(
        DataError, match="no impression has C1o, C2o: are these fields spelled as in the log"
    ):
        of_fields("C1o", "C2o")


def test_a_limit_takes_the_first_impressions(tmp_path: Path) -> None:
    whole, few = (
        read(Simulation(2000, seed=4), tmp_path / "a"),
        read(Simulation(2000, seed=4), tmp_path / "b", limit=1234),
    )
    assert len(few) == 1234
    assert np.array_equal(few.ids, whole.ids[:1234])


# -- split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["random", "time"])
def test_a_split_leaves_out_nobody_and_has_81_9_and_10_of_a_hundred(how: str) -> None:
    split = Split.of(50_000, how)
    rows = [split.rows(part) for part in (TRAINING, VALIDATION, TEST)]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(50_000))
    assert [len(part) / 50_000 for part in rows] == pytest.approx([0.81, 0.09, 0.1], abs=0.005)


def test_a_split_by_time_trains_on_the_past_and_tests_on_the_future() -> None:
    split = Split.of(1000, "time")
    assert (
        split.rows(TRAINING).max()
        < split.rows(VALIDATION).min()
        <= split.rows(VALIDATION).max()
        < split.rows(TEST).min()
    )


def test_a_random_split_is_another_for_another_seed_and_independent_of_what_comes_later() -> None:
    one, other, longer = (
        Split.of(2000, "random"),
        Split.of(2000, "random", seed=1),
        Split.of(3_000_000, "random"),
    )
    both = set(one.rows(TEST).tolist()) & set(other.rows(TEST).tolist())
    assert len(both) < 50  # by chance a tenth of a tenth
    assert np.array_equal(one.part, longer.part[:2000])


@given(
    rows=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    chunk=st.integers(1, 300),
    seed=st.integers(0, 3),
    share=st.floats(0.1, 1),
)
def test_an_epoch_has_every_training_row_once_in_full_batches(
    rows: int, batch_size: int, chunk: int, seed: int, share: float
) -> None:
    split = Split.of(rows, "random")
    row_bytes = (512 << 20) // chunk
    batches = list(
        dataset.shuffled(
            split, TRAINING, seed=(seed, 0), batch_size=batch_size, row_bytes=row_bytes, share=share
        )
    )
    found = np.concatenate([*batches, np.empty(0, np.int64)])
    assert sorted(found.tolist()) == split.rows(TRAINING, share=share).tolist()
    assert len(found) == split.count(TRAINING, share)
    assert share < 1 or len(found) == (split.part == TRAINING).sum()
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_a_sample_is_of_old_and_new_rows_alike_and_of_the_same_rows_whenever_it_is_drawn() -> None:
    split = Split.of(2_500_000, "time")
    rows = split.rows(TRAINING, share=0.04)
    assert (
        len(rows)
        == split.count(TRAINING, 0.04)
        == pytest.approx(0.04 * split.count(TRAINING), rel=0.01)
    )
    assert np.histogram(rows, 10, (0, split.count(TRAINING)))[0].tolist() == pytest.approx(
        [len(rows) / 10] * 10, rel=0.05
    )
    assert np.array_equal(
        split.rows(TRAINING, 1_000_000, 1_100_000, share=0.04),
        rows[(rows >= 1_000_000) & (rows < 1_100_000)],
    )
    assert set(rows.tolist()) <= set(split.rows(TRAINING, share=0.05).tolist())


def test_epochs_have_different_orders_and_the_same_seed_the_same() -> None:
    split = Split.of(500, "random")

    def order(*seed: int) -> list[int]:
        return np.concatenate(
            list(dataset.shuffled(split, TRAINING, seed=seed, batch_size=64, row_bytes=100))
        ).tolist()

    assert order(0, 0) == order(0, 0) != order(0, 1) != order(1, 1)


# -- one run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return read(Simulation(6000, seed=2), tmp_path_factory.mktemp("simulated") / "data")


@pytest.fixture(scope="module")
def split(data: Dataset) -> Split:
    return Split.of(len(data), "random")


def setting(data: Dataset, split: Split, system: str = "deepfm", **changed: Any) -> Setting:
    wishes = plan.Wishes(epochs=4, device="cpu")
    return replace(
        plan.paper_setting(data, split, config.load(overrides=SMALL), wishes),
        system=system,
        **changed,
    )


def untimed(outcome: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outcome.items() if name not in TIMES}


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_order(examples: list[tuple[int, bool]]) -> None:
    logits, labels = (
        np.array([x for x, _ in examples], np.float64),
        np.array([y for _, y in examples], np.uint8),
    )
    pairs = [(p > n) + 0.5 * (p == n) for p in logits[labels == 1] for n in logits[labels == 0]]
    assert experiment.auc(logits, labels) == pytest.approx(
        np.mean(pairs) if pairs else np.nan, nan_ok=True
    )


@pytest.mark.parametrize("system", ["lr", "fnn", "deepfm"])
@pytest.mark.slow
def test_the_same_seed_gives_the_same_outcome_on_any_number_of_threads_and_another_another(
    system: str, data: Dataset, split: Split
) -> None:
    once = setting(data, split, system, epochs=2)
    threads = replace(once, learner={**once.learner, "threads": 3})
    (first, losses), (second, again), (other, _) = (
        experiment.train(s, data, split) for s in (once, threads, replace(once, seed=1))
    )
    assert untimed(first) == untimed(second)
    assert np.array_equal(losses, again)
    assert first["logloss"] != other["logloss"]


@pytest.mark.parametrize(
    ("system", "table_bits"), [("deepfm", 12), ("deepfm", 18), ("lr", 12)]
)  # all rows are kept, or those learned
def test_what_is_tested_are_the_weights_of_the_check_with_the_best_validation(
    system: str, table_bits: int, data: Dataset, split: Split
) -> None:
    fast = {
        "table_learning_rate": 0.05,
        "linear_learning_rate": 0.05,
        "ftrl": {"alpha": 1.0, "beta": 1.0, "l1": 0.0, "l2": 0.0},
    }
    long = setting(
        data,
        split,
        system,
        epochs=8,
        learner={**setting(data, split).learner, "table_bits": table_bits, **fast},
    )
    outcome, losses = experiment.train(long, data, split)
    validation = [check["logloss"] for check in outcome["validation"]]
    best = int(np.argmin(validation))
    assert [check["epoch"] for check in outcome["validation"]] == [
        (n + 1) / 4 for n in range(len(validation))
    ]
    assert (outcome["best_epoch"], outcome["epochs"]) == ((best + 1) / 4, len(validation) / 4)
    assert len(validation) == best + 5 < 32  # four checks that are no better, and no four before

    learner, steps = long.make(), -(-split.count(TRAINING) // long.batch_size)
    of_epoch = {"batch_size": long.batch_size, "row_bytes": data.row_bytes}
    batches = [
        rows
        for epoch in range(8)
        for rows in dataset.shuffled(split, TRAINING, seed=(0, epoch), **of_epoch)
    ]
    for rows in batches[: best // 4 * steps + -(-steps * (best % 4 + 1) // 4)]:
        learner.learn(*data[rows])
    p = 1 / (1 + np.exp(-experiment.predicted(learner, data, split.rows(TEST))[1]))
    assert losses == pytest.approx(
        -np.log(np.where(data.labels[split.rows(TEST)] == 1, p, 1 - p)), rel=1e-9
    )


def test_training_ends_when_the_checks_of_an_epoch_are_no_better(
    data: Dataset, split: Split
) -> None:
    outcome, _ = experiment.train(setting(data, split, "fnn", epochs=3), data, split)
    for checks in (outcome["validation"], outcome["validation_pretraining"]):
        losses = [check["logloss"] for check in checks]
        since = [
            n - int(np.argmin(losses[: n + 1])) for n in range(len(losses))
        ]  # checks since the best
        assert all(checks_since < 4 for checks_since in since[:-1])
        assert len(checks) == 12 or since[-1] == 4


@pytest.mark.slow
def test_the_test_part_decides_nothing_but_its_own_scores(
    data: Dataset, split: Split, tmp_path: Path
) -> None:
    shutil.copytree(data.directory, tmp_path / "other")
    labels = np.fromfile(tmp_path / "other" / "labels.bin", np.uint8)
    labels[split.rows(TEST)] ^= 1
    labels.tofile(tmp_path / "other" / "labels.bin")
    (one, _), (other, _) = (
        experiment.train(setting(data, split), d, split)
        for d in (data, Dataset(tmp_path / "other"))
    )
    assert one["validation"] == other["validation"]
    assert one["train_logloss"] == other["train_logloss"]
    assert one["auc"] == pytest.approx(1 - other["auc"])


def test_scores_of_the_test_part_are_those_of_its_losses(data: Dataset, split: Split) -> None:
    outcome, losses = experiment.train(setting(data, split, "fm"), data, split)
    assert len(losses) == split.count(TEST)
    assert outcome["logloss"] == pytest.approx(np.mean(losses))


@pytest.mark.slow
def test_fnn_is_first_the_fm_that_fm_is_and_its_time_counts(data: Dataset, split: Split) -> None:
    fm, _ = experiment.train(setting(data, split, "fm"), data, split)
    fnn, _ = experiment.train(setting(data, split, "fnn"), data, split)
    found, wanted = (
        [epoch["logloss"] for epoch in epochs]
        for epochs in (fnn["validation_pretraining"], fm["validation"])
    )
    assert found == pytest.approx(wanted, rel=1e-6)  # two modules, which add up in another order
    assert fnn["seconds"] > fnn["seconds_pretraining"] > 0
    assert (
        fnn["validation"][0]["logloss"] < fm["validation"][0]["logloss"] - 0.01
    )  # it begins where the FM ended


def test_lr_finds_what_decides_the_clicks(tmp_path: Path) -> None:
    log = open_log(
        criteo(tmp_path / "log.tsv", 4000),
        format="criteo",
        click_delay_seconds=reading.CLICK_DELAY_SECONDS,
    )
    of_log = read(log, tmp_path / "data")
    part = Split.of(len(of_log), "time")
    outcome, _ = experiment.train(setting(of_log, part, "lr"), of_log, part)
    assert outcome["auc"] > 0.65  # rates of 0.1, 0.3, 0.5 and 0.7 by C1, which alone give 0.71


def test_a_pass_predicts_each_example_before_it_learns_it(data: Dataset) -> None:
    of_stream = replace(
        plan.stream_setting(data, config.load(overrides=SMALL), plan.Wishes(device="cpu")),
        system="fm",
    )
    outcome = experiment.stream(of_stream, data)

    learner, logits = of_stream.make(), []
    for start in range(0, len(data), of_stream.batch_size):
        ids, labels, _ = data[slice(start, start + of_stream.batch_size)]
        logits.append(learner.predict(ids))
        learner.learn(ids, labels)
    p = 1 / (1 + np.exp(-np.concatenate(logits).astype(np.float64)))
    losses = -np.log(np.where(data.labels == 1, p, 1 - p))

    assert outcome["logloss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert outcome["last_half"]["logloss"] == pytest.approx(losses[3000:].mean(), rel=1e-6)
    assert sum(outcome["blocks"]) == pytest.approx(losses.sum(), rel=1e-6)
    assert outcome["blocks"][0] == pytest.approx(losses[: len(data) // 128].sum(), rel=1e-6)


def with_labels(
    data: Dataset, directory: Path, labels: np.ndarray[Any, np.dtype[np.uint8]]
) -> Dataset:
    shutil.copytree(data.directory, directory)
    labels.astype(np.uint8).tofile(directory / "labels.bin")
    return Dataset(directory)


def test_half_a_pass_without_clicks_has_no_auc_and_can_be_written(
    data: Dataset, tmp_path: Path
) -> None:
    early = with_labels(
        data,
        tmp_path / "early",
        np.arange(len(data)) % 7 == np.where(np.arange(len(data)) < 3000, 0, 7),
    )
    of_stream = replace(
        plan.stream_setting(data, config.load(overrides=SMALL), plan.Wishes(device="cpu")),
        system="lr",
    )
    outcome = experiment.stream(of_stream, early)
    dataset.write_json(tmp_path / "outcome.json", outcome)
    assert outcome["last_half"]["auc"] is None
    assert outcome["last_half"]["logloss"] > 0 < outcome["auc"]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_logit_that_is_not_finite_is_no_score(
    part: str, data: Dataset, split: Split, tmp_path: Path
) -> None:
    shutil.copytree(data.directory, tmp_path / "odd")
    ids, values = np.array(data.ids), np.ones((len(data), 1), np.float32)
    about = {
        **data.about,
        "value_fields": 1,
        "hashed": {**data.about["hashed"], "value_fields": [0]},
    }
    values[split.rows(TEST if part == "test" else VALIDATION)[0]] = 3e38
    ids.tofile(tmp_path / "odd" / "ids.bin")
    values.tofile(tmp_path / "odd" / "values.bin")
    (tmp_path / "odd" / "data.json").write_text(json.dumps(about))
    odd = Dataset(tmp_path / "odd")
    with pytest.raises(experiment.Diverged, match="not finite"):
        experiment.train(setting(odd, split, "fm"), odd, split)


def test_paired_is_the_first_less_the_reference() -> None:
    found = intervals.paired([3.0] * 20, [1.0] * 20, 40)
    assert found == {"logloss_difference": 1.0, "low": 1.0, "high": 1.0, "count": 40, "blocks": 20}


# -- the plan ------------------------------------------------------------------------------------


def planned(data: Dataset, **wishes: Any) -> plan.Plan:
    return plan.plan(
        data,
        config.load(overrides={"model": {"table_bits": 10}}),
        plan.Wishes(device="cpu", **wishes),
    )


def test_the_plan_has_all_systems_seeds_and_points_of_the_paper(data: Dataset) -> None:
    wanted = planned(data).wanted
    assert {(w.setting.system, w.setting.seed) for w in wanted if w.part == "table2"} == {
        (s, n) for s in MODELS for n in range(3)
    }
    assert [w.setting.system for w in wanted if w.part == "streaming"] == list(MODELS)
    for part, values in published.VALUES.items():
        found = {(w.value, w.setting.system) for w in wanted if w.part == part}
        assert found == {(value, system) for value in values for system in plan.DEEP}, part


def test_settings_are_the_papers_and_a_study_changes_one_of_them(data: Dataset) -> None:
    made = planned(data)
    default = made.settings
    assert (default.dropout, default.hidden, default.learner["embedding_dim"]) == (
        0.5,
        (400, 400, 400),
        10,
    )
    assert (default.learner["table_optimizer"], default.learner["table_learning_rate"]) == (
        "adam",
        0.001,
    )
    told = {
        w.setting.system: w.setting.told()["activation"] for w in made.wanted if w.part == "table2"
    }
    assert told == {system: "tanh" if system == "ipnn" else "relu" for system in MODELS}
    for wanted in made.wanted:
        if wanted.part.startswith("figure"):
            setting = wanted.setting
            changed = [
                setting.activation != "paper",
                setting.dropout != 0.5,
                setting.hidden != (400, 400, 400),
            ]
            assert sum(changed) <= 1


def test_another_dropout_is_that_of_training_and_not_of_the_stream(data: Dataset) -> None:
    made = planned(data, dropout=0.1)
    assert {w.setting.dropout for w in made.wanted if w.part == "table2"} == {0.1}
    assert {w.setting.dropout for w in made.wanted if w.part == "streaming"} == {0.0}


def test_what_two_figures_want_is_one_run(data: Dataset) -> None:
    made = planned(data)
    keys = {
        (w.part, w.value): made.key(w.setting)
        for w in made.wanted
        if w.setting.system == "deepfm" and w.setting.seed == 0
    }
    default = [
        ("table2", ""),
        ("figure7", "relu"),
        ("figure8", "0.5"),
        ("figure9", "400"),
        ("figure10", "3"),
        ("figure11", "constant"),
    ]
    assert len({keys[point] for point in default}) == 1
    assert len(made.distinct) == 9 * 3 + 9 + 7 * (1 + 5 + 3 + 3 + 3)


def test_studies_of_a_long_log_train_on_a_part_of_it(data: Dataset) -> None:
    made = planned(data, study_rows=1000)
    share = next(w.setting.share for w in made.wanted if w.part == "figure7")
    assert made.split.count(TRAINING, share) == pytest.approx(1000, abs=60)
    outcome, _ = experiment.train(setting(data, made.split, "fm", share=share), data, made.split)
    assert outcome["training_examples"] == made.split.count(TRAINING, share)
    assert all(w.setting.share == 1.0 for w in made.wanted if w.part == "table2")


def test_studies_may_have_more_seeds_than_table_2(data: Dataset) -> None:
    made = planned(data, seeds=1, study_seeds=3)
    assert {w.setting.seed for w in made.wanted if w.part == "figure7"} == {0, 1, 2}
    assert {w.setting.seed for w in made.wanted if w.part == "table2"} == {0}


def test_quick_has_every_part(data: Dataset) -> None:
    made = plan.plan(
        data,
        config.load(),
        plan.Wishes.of(quick=True, seeds=3, study_seeds=3, epochs=10, device="cpu"),
    )
    assert {w.part for w in made.wanted} == set(plan.PARTS) - {"figure6"}
    assert (made.wishes.seeds, made.wishes.study_seeds, made.wishes.epochs) == (2, 1, 3)


def test_with_a_gpu_the_times_on_the_cpu_are_measured_too(data: Dataset) -> None:
    made = planned(data)
    on_gpu = replace(made, settings=replace(made.settings, device="cuda"), wanted=[])
    found = [w for w in plan._wanted(on_gpu) if w.part == "figure6"]
    assert {w.setting.system for w in found} == set(MODELS) - {"lr"}
    assert {w.setting.device for w in found} == {"cpu"}


def test_what_the_configuration_sets_is_used(data: Dataset) -> None:
    chosen = config.load(
        overrides={
            "learn": {"batch_size": 77, "table_optimizer": "adagrad"},
            "model": {"dropout": 0.2},
        }
    )
    found = plan.paper_setting(
        data, Split.of(len(data), "random"), chosen, plan.Wishes(device="cpu")
    )
    assert (found.batch_size, found.learner["table_optimizer"], found.dropout) == (
        77,
        "adagrad",
        0.2,
    )


def test_the_estimate_counts_what_is_left_and_its_memory(data: Dataset, tmp_path: Path) -> None:
    made = plan.plan(
        data,
        config.load(overrides=SMALL),
        plan.Wishes(device="cpu", seeds=1, only=frozenset(["table2"])),
    )
    (tmp_path / "runs").mkdir()
    first = next(iter(made.distinct))
    (tmp_path / "runs" / f"{first}.json").write_text("{}")
    runs, seconds, room = work.estimate(made, tmp_path)
    assert runs == "9 runs, 1 of them done before"
    of_one = replace(made, wishes=replace(made.wishes, models=("fm",)))
    assert work.estimate(of_one, tmp_path)[0] == "1 run"
    assert "with 3 epochs a run" in seconds
    floats = 32  # of a row: 2 x 4 + 1 coordinates with two moments each, in lines of 16
    assert room.startswith(words.in_bytes(2 * 4 * floats * 2**12 + 64 * len(data)))


def test_memory_and_disk_are_told_before_the_log_is_read() -> None:
    rows = 1_000_000
    told = work.expected(
        config.load(overrides=SMALL),
        plan.Wishes(),
        rows,
        reading.expected_bytes(Simulation(rows), config.load(), rows),
    )
    fields, table = (
        len(FIELDS),
        2 * 4 * 32 * 2**12,
    )  # rows of 2 x 4 + 1 coordinates with two moments each, in lines of 16 floats
    disk = rows * (4 * fields + 1 + 8 + 8)
    assert (
        told
        == f"at most about 1,000,000 impressions to read; {(table + 64 * rows) / 1e6:.1f} MB of memory, {disk / 1e6:.1f} MB of disk"
    )


def test_a_run_that_diverges_is_told_and_stops_no_other(data: Dataset, tmp_path: Path) -> None:
    made = plan.plan(data, config.load(overrides={**SMALL, "learn": {"dense_learning_rate": 1e30}}), plan.Wishes(
        device="cpu", seeds=1, epochs=1, only=frozenset(["table2"])))  # fmt: skip
    work.run(made, tmp_path, console=Console(quiet=True))
    points = {point["system"]: point for point in work.points(made, tmp_path)}
    assert "finite" in points["deepfm"]["failed"]
    assert points["lr"]["auc"] > 0.5


# -- the command ---------------------------------------------------------------------------------


def paper(*arguments: object) -> Result:
    return CliRunner().invoke(
        main, ["paper", "--device", "cpu", *SMALL_OPTIONS, *map(str, arguments)]
    )


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def comparable(out: Path) -> dict[str, Any]:
    """The report without what a clock told, and without the command and its directory."""

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: without_times(v)
                for k, v in value.items()
                if k not in (*TIMES, "made", "figure6", "figure6_seconds")
            }
        return [without_times(v) for v in value] if isinstance(value, list) else value

    told: dict[str, Any] = without_times(report(out))
    return told


@pytest.mark.slow
def test_the_report_has_nine_systems(tmp_path: Path) -> None:
    result = paper(
        "--simulate", 1500, "--out", tmp_path, "--seeds", 2, "--epochs", 1, "--only", "table2"
    )
    assert result.exit_code == 0, result.output
    table2 = report(tmp_path)["table2"]
    assert list(table2) == [system.title for system in MODELS.values()]
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    for name, system in MODELS.items():
        of = [outcome["auc"] for outcome in found if outcome["system"] == name]
        assert (table2[system.title]["auc"], len(of)) == (pytest.approx(sum(of) / 2), 2)
        assert table2[system.title]["auc_std"] == pytest.approx(abs(of[0] - of[1]) / 2**0.5)
    assert all(
        outcome["machine"]["cores"] == os.cpu_count() and outcome["torch"] and outcome["version"]
        for outcome in found
    )
    assert report(tmp_path)["data"]["best_possible_logloss"] is not None
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_a_second_command_does_nothing_twice_and_restart_does_all(tmp_path: Path) -> None:
    arguments = (
        "--simulate",
        1000,
        "--out",
        tmp_path,
        "--seeds",
        1,
        "--epochs",
        1,
        "--only",
        "table2",
    )
    assert paper(*arguments).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert "9 runs, 9 of them done before" in paper(*arguments).output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == before
    (tmp_path / "mine.txt").touch()
    assert "9 runs\n" in paper(*arguments, "--restart").output
    assert (tmp_path / "mine.txt").exists()
    assert not any(path.stat().st_mtime_ns == at for path, at in before.items())


@pytest.mark.slow
def test_a_command_for_one_part_adds_to_the_report_and_takes_nothing_from_it(
    tmp_path: Path,
) -> None:
    small = ("--simulate", 1000, "--out", tmp_path, "--seeds", 1, "--epochs", 1)
    assert paper(*small, "--only", "table2").exit_code == 0
    first = report(tmp_path)
    again = paper(*small, "--only", "streaming", "--model", "lr", "--model", "deepfm")
    assert "2 runs\n" in again.output
    both = report(tmp_path)
    assert both["table2"] == first["table2"]
    assert {title for title, row in both["streaming"].items() if row["auc"] is not None} == {
        "LR",
        "DeepFM",
    }


def test_figure_6_is_of_the_runs_of_table_2(data: Dataset) -> None:
    assert {w.part for w in planned(data, only=frozenset(["figure6"])).asked} == {"table2"}


@pytest.mark.parametrize("kind", ["json", "npy"])
def test_an_outcome_that_is_damaged_is_named_and_done_again_when_it_is_deleted(
    kind: str, tmp_path: Path
) -> None:
    arguments = (
        "--simulate",
        1000,
        "--out",
        tmp_path,
        "--seeds",
        1,
        "--epochs",
        1,
        "--only",
        "table2",
        "--model",
        "lr",
        "--model",
        "fm",
    )
    paper(*arguments)
    first = comparable(tmp_path)
    (damaged,) = (tmp_path / "runs").glob(f"fm-*.{kind}")
    damaged.write_bytes(damaged.read_bytes()[:200])
    result = paper(*arguments)
    assert (result.exit_code, f"{damaged} is damaged; delete " in result.output) == (5, True)
    damaged.with_suffix(".json").unlink()
    assert "2 runs, 1 of them done before" in paper(*arguments).output
    assert comparable(tmp_path) == first


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    arguments = (
        "--simulate",
        1000,
        "--out",
        tmp_path,
        "--seeds",
        1,
        "--epochs",
        1,
        "--only",
        "table2",
        "--model",
        "lr",
    )
    assert paper(*arguments).exit_code == 0
    (tmp_path / "runs" / "mine.json").touch()
    (tmp_path / "figures" / "mine.svg").touch()
    assert paper(*arguments, "--restart").exit_code == 0
    assert (tmp_path / "runs" / "mine.json").exists()
    assert (tmp_path / "figures" / "mine.svg").exists()
    (tmp_path / "data" / "train.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    refused = paper(*arguments, "--restart")
    assert (refused.exit_code, sorted(tmp_path.rglob("*"))) == (5, before)
    assert "holds other files, such as train.txt" in refused.output


@pytest.mark.slow
def test_restart_removes_all_that_was_written(tmp_path: Path) -> None:
    assert (
        paper(
            "--simulate",
            1000,
            "--out",
            tmp_path,
            "--seeds",
            1,
            "--epochs",
            1,
            "--only",
            "table2,streaming",
        ).exit_code
        == 0
    )
    (tmp_path / "runs" / ".fm-0123456789abcdef.json.77").touch()  # of a process that was killed
    work.remove(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("restart", [(), ("--restart",)])
def test_a_log_that_lies_where_the_data_would_be_is_refused_before_it_is_read(
    restart: Sequence[str], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    path = criteo(tmp_path / "data" / "train.txt", 300)
    result = paper("--data", path, "--format", "criteo", "--out", tmp_path, *restart)
    assert result.exit_code == 5
    assert "holds other files, such as train.txt" in result.output
    assert path.exists()


def test_a_directory_is_one_commands_at_a_time(tmp_path: Path) -> None:
    with work.held(tmp_path):
        result = paper("--simulate", 1000, "--out", tmp_path)
        assert (result.exit_code, "in use by another stream-ctr paper" in result.output) == (
            5,
            True,
        )
    with work.held(tmp_path):
        pass


@pytest.mark.parametrize("where", ["runs", "report.html"])
def test_what_cannot_be_written_is_an_error_and_no_traceback(where: str, tmp_path: Path) -> None:
    (tmp_path / where).mkdir() if where == "report.html" else (tmp_path / where).touch()
    result = paper(
        "--simulate",
        1000,
        "--out",
        tmp_path,
        "--seeds",
        1,
        "--epochs",
        1,
        "--only",
        "table2",
        "--model",
        "lr",
    )
    assert result.exit_code == 5
    assert f"{tmp_path / where}: " in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--out", "{dir}"), 2, "--data LOG or --simulate N"),
        (("--simulate", 100, "--out", "{dir}"), 5, "100 impressions are too few"),
        (("--data", "{dir}/none.tsv", "--out", "{dir}"), 5, "none.tsv"),
        (
            ("--data", "{dir}/log.tsv", "--format", "critoe", "--out", "{dir}"),
            3,
            "unknown log format 'critoe'; did you mean 'criteo'?",
        ),
        (
            ("--simulate", 1000, "--out", "{dir}", "--only", "table3"),
            2,
            "'table3' is none of table2",
        ),
        (
            ("--simulate", 1000, "--out", "{dir}", "-X", "model.hiden=3"),
            3,
            "unknown key 'model.hiden'",
        ),
        (
            ("--simulate", 1000, "--out", "{dir}", "-X", "model.hidden="),
            3,
            "model.hidden has no layer",
        ),
        (
            ("--simulate", 1000, "--out", "{dir}", "-X", "join.max_memory=1KiB"),
            3,
            "join.max_memory = '1KiB': at least 1 MiB are needed",
        ),
        (
            ("--simulate", 1000, "--out", "{dir}", "--only", "figure7", "--model", "fm"),
            3,
            "nothing to do: Figures 7 to 11 are of networks",
        ),
        (
            ("--data", "{dir}/never.tsv", "--format", "criteo", "--out", "{dir}"),
            5,
            "no click among the 300 impressions of the log",
        ),
        (
            ("--data", "{dir}/shown.jsonl", "--out", "{dir}"),
            5,
            "A log of events must hold clicks as well as impressions",
        ),
        (
            ("--data", "{dir}/clicked.jsonl", "--out", "{dir}"),
            5,
            "nothing but clicks among the 300 impressions of the log",
        ),
        (
            ("--data", "{dir}/early.jsonl", "--split", "time", "--out", "{dir}"),
            5,
            "no click among the 27 impressions of the validation part",
        ),
        (
            ("--data", "{dir}/log.tsv", "--format", "events", "--out", "{dir}"),
            5,
            "record 1 is no event: ",
        ),
        (
            ("--data", "{dir}/seconds.jsonl", "--out", "{dir}"),
            5,
            "300 records cannot be read as events (time_",
        ),
        (
            ("--data", "{dir}/bare.jsonl", "--out", "{dir}"),
            5,
            "none of the first 300 records of the log is an impression with features\n",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: Sequence[object], code: int, told: str, tmp_path: Path
) -> None:
    criteo(tmp_path / "log.tsv", 300)
    never = criteo(tmp_path / "never.tsv", 300).read_text().splitlines()
    (tmp_path / "never.tsv").write_text("\n".join("0" + line[1:] for line in never) + "\n")
    shown = [
        {
            "kind": "impression",
            "impression_id": str(i),
            "time": 1_700_000_000_000 + i,
            "features": {"a": str(i % 3)},
        }
        for i in range(300)
    ]
    clicks = [
        {"kind": "click", "impression_id": event["impression_id"], "time": event["time"]}
        for event in shown
    ]
    both = list(zip(shown, clicks, strict=True))
    for name, lines in (
        ("shown", shown),
        ("clicked", [event for pair in both for event in pair]),
        (
            "early",
            [event for i, pair in enumerate(both) for event in pair[: 1 + (i < 200 and i % 2)]],
        ),
        ("bare", [{**event, "features": {}} for event in shown]),
        ("seconds", [{**event, "time": event["time"] // 1000} for event in shown]),
    ):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(event) + "\n" for event in lines)
        )
    result = paper(*(str(argument).format(dir=tmp_path) for argument in arguments))
    assert result.exit_code == code
    assert told in result.output


def test_other_data_in_the_directory_are_an_error_that_says_how_to_begin_anew(
    tmp_path: Path,
) -> None:
    paper("--simulate", 1000, "--out", tmp_path, "--only", "streaming")
    result = paper("--simulate", 1001, "--out", tmp_path, "--only", "streaming")
    assert result.exit_code == 5
    assert "--restart" in result.output


def begin(out: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "stream_ctr",
        "paper",
        "--device",
        "cpu",
        *SMALL_OPTIONS,
        "--out",
        str(out),
        *map(str, arguments),
    ]
    # A shell has what it runs in the background, and all that comes of it, ignore Ctrl-C.
    heeds_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return started(
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=heeds_ctrl_c,
        )
    )


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


WORK = ("--simulate", 8000, "--seeds", 1, "--epochs", 3, "--only", "table2,streaming")


@pytest.mark.slow
@pytest.mark.parametrize("outcomes", [0, 2, 8, 14])
def test_a_command_that_was_killed_goes_on_and_reports_what_an_undisturbed_one_does(
    outcomes: int, tmp_path: Path, undisturbed: Path
) -> None:
    process = begin(tmp_path / "out", *WORK)
    runs = tmp_path / "out" / "runs"
    wait_for(
        lambda: (
            len(list(runs.glob("*.json"))) >= outcomes and (outcomes or (tmp_path / "out").exists())
        ),
        process,
    )
    process.kill()
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert len(done) < 18

    assert paper("--out", tmp_path / "out", *WORK).exit_code == 0

    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert comparable(tmp_path / "out") == comparable(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert paper("--out", out, *WORK).exit_code == 0
    return out


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = begin(tmp_path, *WORK, "--seeds", 50)  # on no machine is it done by then
    wait_for(lambda: len(list((tmp_path / "runs").glob("*.json"))) >= 1, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert sum(row["auc"] is not None for row in report(tmp_path)["table2"].values()) >= 1
    assert "Traceback" not in told
    assert not [
        path for path in (tmp_path / "runs").iterdir() if path.suffix not in (".json", ".npy")
    ]


@pytest.mark.slow
def test_the_criteo_sample_in_quick_has_every_part(tmp_path: Path) -> None:
    result = paper(
        "--data",
        shared_data("criteo/train.csv"),
        "--format",
        "criteo",
        "--out",
        tmp_path,
        "--quick",
    )
    assert result.exit_code == 0, result.output
    told = report(tmp_path)
    assert set(told["table2"]) == {system.title for system in MODELS.values()}
    assert min(row["auc"] for row in told["table2"].values()) > 0.6
    assert "7,200 rows" in told["data"]["whole"]
    assert all(
        told[part]
        for part in (
            "figure6",
            "figure7",
            "figure8",
            "figure9",
            "figure10",
            "figure11",
            "streaming",
        )
    )
    assert not told["failed"]
