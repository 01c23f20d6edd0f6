"""Tests of `stream_ctr.paper.plan`: which runs the tables and figures need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.paper_data import paper_setting, simulated_dataset

from stream_ctr import config
from stream_ctr.models import MODELS
from stream_ctr.paper import experiment, plan, published
from stream_ctr.paper.dataset import TRAINING, Dataset, Split
from stream_ctr.paper.experiment import Setting


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulated_dataset(tmp_path_factory.mktemp("simulated") / "data")


def planned(data: Dataset, **options: Any) -> plan.Plan:
    configured = config.load(overrides={"model": {"table_bits": 10}})
    return plan.make_plan(data, configured, plan.Options(device="cpu", **options))


def settings(found: plan.Plan, part: str) -> list[Setting]:
    return [point.setting for point in found.points if point.part == part]


def test_the_plan_has_all_systems_seeds_and_points_of_the_paper(data: Dataset) -> None:
    found = planned(data)
    seeds = {(setting.system, setting.seed) for setting in settings(found, "table2")}
    assert seeds == {(system, seed) for system in MODELS for seed in range(3)}
    assert [setting.system for setting in settings(found, "streaming")] == list(MODELS)
    for part, values in published.VALUES.items():
        points = {(p.value, p.setting.system) for p in found.points if p.part == part}
        assert points == {(value, system) for value in values for system in plan.DEEP}, part


def test_settings_are_the_papers_and_a_study_changes_one_of_them(data: Dataset) -> None:
    found = planned(data)
    usual = found.paper_setting
    assert (usual.dropout, usual.hidden) == (0.5, (400, 400, 400))
    assert usual.learner["embedding_dim"] == 10
    assert usual.learner["table_optimizer"] == "adam"
    assert usual.learner["table_learning_rate"] == 0.001
    activations = {s.system: s.summary()["activation"] for s in settings(found, "table2")}
    assert activations == {name: "tanh" if name == "ipnn" else "relu" for name in MODELS}
    for point in found.points:
        if point.part.startswith("figure"):
            changes = [
                point.setting.activation != "paper",
                point.setting.dropout != 0.5,
                point.setting.hidden != (400, 400, 400),
            ]
            assert sum(changes) <= 1


def test_the_dropout_option_does_not_apply_to_the_stream(data: Dataset) -> None:
    found = planned(data, dropout=0.1)
    assert {setting.dropout for setting in settings(found, "table2")} == {0.1}
    assert {setting.dropout for setting in settings(found, "streaming")} == {0.0}


def test_figures_share_the_runs_of_the_default_setting(data: Dataset) -> None:
    found = planned(data)
    keys = {
        (point.part, point.value): found.key(point.setting)
        for point in found.points
        if point.setting.system == "deepfm" and point.setting.seed == 0
    }
    defaults = [
        ("table2", ""),
        ("figure7", "relu"),
        ("figure8", "0.5"),
        ("figure9", "400"),
        ("figure10", "3"),
        ("figure11", "constant"),
    ]
    assert len({keys[point] for point in defaults}) == 1
    assert len(found.runs) == 9 * 3 + 9 + 7 * (1 + 5 + 3 + 3 + 3)


def test_studies_of_a_long_log_train_on_a_part_of_it(data: Dataset) -> None:
    found = planned(data, study_rows=1000)
    share = settings(found, "figure7")[0].share
    assert found.split.count(TRAINING, share) == pytest.approx(1000, abs=60)
    setting = paper_setting(data, found.split, "fm", share=share)
    outcome, _ = experiment.train(setting, data, found.split)
    assert outcome["training_examples"] == found.split.count(TRAINING, share)
    assert all(setting.share == 1.0 for setting in settings(found, "table2"))


def test_studies_may_have_more_seeds_than_table_2(data: Dataset) -> None:
    found = planned(data, seeds=1, study_seeds=3)
    assert {setting.seed for setting in settings(found, "figure7")} == {0, 1, 2}
    assert {setting.seed for setting in settings(found, "table2")} == {0}


def test_quick_has_every_part(data: Dataset) -> None:
    quick = plan.Options.create(quick=True, seeds=3, study_seeds=3, epochs=10, device="cpu")
    found = plan.make_plan(data, config.load(), quick)
    assert {point.part for point in found.points} == set(plan.PARTS) - {"figure6"}
    options = found.options
    assert (options.seeds, options.study_seeds, options.epochs) == (2, 1, 3)


def test_figure_6_uses_the_runs_of_table_2(data: Dataset) -> None:
    found = planned(data, only=frozenset(["figure6"]))
    assert {point.part for point in found.requested} == {"table2"}


def test_with_a_gpu_the_times_on_the_cpu_are_measured_too(data: Dataset) -> None:
    found = planned(data)
    on_gpu = replace(found, paper_setting=replace(found.paper_setting, device="cuda"))
    timed = settings(on_gpu, "figure6")
    assert {setting.system for setting in timed} == set(MODELS) - {"lr"}
    assert {setting.device for setting in timed} == {"cpu"}


def test_the_configuration_overrides_the_paper(data: Dataset) -> None:
    configured = config.load(
        overrides={
            "learn": {"batch_size": 77, "table_optimizer": "adagrad"},
            "model": {"dropout": 0.2},
        }
    )
    split = Split.of(len(data), "random")
    found = plan.make_paper_setting(data, split, configured, plan.Options(device="cpu"))
    assert found.batch_size == 77
    assert found.learner["table_optimizer"] == "adagrad"
    assert found.dropout == 0.2
