"""The report of `stream-ctr paper`: its numbers by hand, its files in a browser."""

from __future__ import annotations

import html
import html.parser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt  # comes with rich

from stream_ctr.models import MODELS
from stream_ctr.paper import aggregate, facts, figures, intervals, published, report
from stream_ctr.paper.page import (
    Block,
    Code,
    Column,
    Details,
    Facts,
    Heading,
    Listing,
    Note,
    Picture,
    Strong,
    Table,
    Text,
    markdown,
)
from stream_ctr.paper.page import html as html_of

TITLES = ["LR", "FM", "FNN", "IPNN", "OPNN", "PNN*", "LR & DNN", "FM & DNN", "DeepFM"]
DEEP = [name for name in MODELS if name not in ("lr", "fm")]
TEST_EXAMPLES = 2000
LOGLOSS = {"lr": 0.4778, "fm": 0.4608, "fnn": 0.4574, "ipnn": 0.4532, "opnn": 0.4526, "pnn": 0.4505, "lr_dnn": 0.4567, "fm_dnn": 0.4538,
           "deepfm": 0.4508}  # fmt: skip
SECONDS = {
    "lr": 1.9,
    "fm": 14.0,
    "fnn": 160.0,
    "ipnn": 141.0,
    "opnn": 88.0,
    "pnn": 171.0,
    "lr_dnn": 79.0,
    "fm_dnn": 95.0,
    "deepfm": 82.0,
}

DATA: dict[str, Any] = {
    "name": "criteo_sample.txt", "format": "criteo", "impressions": 7200, "clicks": 1843, "ctr": 1843 / 7200, "fields": 39,
    "categorical": 26, "numeric": 13, "crosses": 0, "train": 5832, "validation": 648, "test": TEST_EXAMPLES, "split": "random",
    "best_possible_logloss": None, "constant_logloss": 0.5689, "simulated": None,
    "numeric_encoding": facts.encoded({"numeric_encoding": "buckets", "buckets_per_octave": 2.0}), "whole": facts.whole("criteo", 7200),
    "notes": ["3 events were no events"],
}  # fmt: skip
SIMULATED = {**DATA, "name": "the simulated app store", "format": "simulated", "simulated": 7, "best_possible_logloss": 0.4489,
             "whole": None, "impressions": 1_000_000}  # fmt: skip
MADE: dict[str, Any] = {
    "command": "stream-ctr paper --data criteo_sample.txt --format criteo --out report", "quick": False, "seeds": 3, "study_seeds": 2,
    "device": "cpu", "accelerator": None, "python": "3.11.7",
    "settings": {"dropout": 0.5, "hidden": [400, 400, 400], "batch_size": 128, "epochs": 10, "embedding_dim": 10, "table_bits": 20,
                 "table_optimizer": "adam", "dense_learning_rate": 0.001, "precision": "bfloat16", "ftrl": {"alpha": 0.1, "beta": 1.0},
                 "streaming": {"table_optimizer": "adagrad", "dropout": 0.0, "hidden": [64, 32], "batch_size": 128,
                               "pretrain_examples": 720}},
    "seconds_total": 5321.0,
}  # fmt: skip


MACHINE = {"processor": "AMD EPYC 9R14", "cores": 2}


def of_part(found: list[dict[str, Any]], *parts: str) -> list[dict[str, Any]]:
    return [run for run in found if run["part"] in parts]


def outcome(system: str, seed: int, rng: np.random.Generator, **changed: Any) -> dict[str, Any]:
    network = system != "lr"
    logloss = LOGLOSS[system] + 0.0006 * float(rng.standard_normal())
    told = {
        "system": system, "seed": seed, "activation": MODELS[system].activation, "dropout": 0.5, "hidden": [400, 400, 400],
        "batch_size": 128, "epochs": 1.25, "best_epoch": 0.75, "auc": 1.157 - 0.79 * logloss,
        "logloss": logloss, "train_logloss": logloss - 0.01,
        "validation": checks(logloss + 0.002), "machine": MACHINE, "version": "0.1.0", "torch": "2.13.0",
        "seconds": SECONDS[system] * (1 + 0.05 * float(rng.random())), "device": "cpu",
        "seconds_pretraining": 14.0 if system == "fnn" else 0.0, "seconds_per_epoch": SECONDS[system] / 2,
        "examples_per_second": 4e6 / SECONDS[system], "parameters": 477_000 if network else 1,
    }  # fmt: skip
    if system == "fnn":
        told["validation_pretraining"] = checks(0.461)
    return told | changed


def checks(best: float) -> list[dict[str, float]]:
    """Of a validation that is at its best after three quarters of an epoch."""
    return [
        {"epoch": 0.25 * i, "auc": 0.79, "logloss": best + 0.001 * abs(i - 3)} for i in range(1, 6)
    ]


def runs(
    out: Path, *, seeds: int = 3, study_seeds: int = 2, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Runs like those of the runner, their test losses below `out`: parts of every kind, all systems, every value of the paper."""
    rng = np.random.default_rng(7)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    shared = rng.exponential(0.3, TEST_EXAMPLES)
    found = []
    for seed in range(seeds):
        for system in MODELS:
            run = outcome(system, seed, rng, device="cpu" if system == "lr" else device)
            losses = (
                shared + run["logloss"] - shared.mean() + 0.02 * rng.standard_normal(TEST_EXAMPLES)
            )
            run["losses"] = f"runs/{system}-{seed}.npy"
            np.save(out / run["losses"], losses.astype(np.float32))
            found.append({"part": "table2", "value": "", **run})
    for system in MODELS:
        run = outcome(system, 0, rng)
        paired = {
            "logloss_difference": run["logloss"] - 0.4508,
            "low": run["logloss"] - 0.4512,
            "high": run["logloss"] - 0.4504,
        }
        found.append(
            {
                "part": "streaming",
                "value": "",
                **run,
                "last_half": {"auc": 0.79, "logloss": 0.46},
                "paired": paired,
            }
        )
    for part, values in published.VALUES.items():
        for value in values:
            found += [
                {"part": part, "value": value, **outcome(s, seed, rng)}
                for seed in range(study_seeds)
                for s in DEEP
            ]
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a whole report, and what `write` returned."""
    out = tmp_path_factory.mktemp("report")
    return out, report.write(out, runs(out), data=DATA, made=MADE)


def written_with(
    out: Path, found: list[dict[str, Any]], data: Mapping[str, Any] = DATA, **made: Any
) -> dict[str, Any]:
    return report.write(out, found, data=data, made=MADE | made)


# -- what the paper says -------------------------------------------------------------------------


def test_the_models_have_the_properties_of_the_papers_table_1() -> None:
    by_title = {system.title: system for system in MODELS.values()}
    for title, said in published.TABLE1.items():
        ours = by_title[title]
        assert (ours.pretraining, ours.high_order, ours.low_order, ours.engineering) == tuple(
            said
        ), title


def test_the_papers_own_percentages_follow_from_its_table_2() -> None:
    """Section 3.2: against LR, DeepFM wins 0.86 % and 4.18 % of AUC, 1.15 % and 5.60 % of logloss, on Company* and Criteo."""
    for rows, auc, logloss in ((published.COMPANY, 0.86, 1.15), (published.CRITEO, 4.18, 5.60)):
        assert list(rows) == TITLES
        assert 100 * (rows["DeepFM"].auc / rows["LR"].auc - 1) == pytest.approx(auc, abs=0.02)
        assert 100 * (1 - rows["DeepFM"].logloss / rows["LR"].logloss) == pytest.approx(
            logloss, abs=0.03
        )


# -- numbers -------------------------------------------------------------------------------------


def of_table2(system: str, seed: int, **scores: Any) -> dict[str, Any]:
    return {
        "part": "table2",
        "value": "",
        **outcome(system, seed, np.random.default_rng(0)),
        **scores,
    }


def test_means_and_spreads_are_over_the_seeds_of_one_system() -> None:
    found = [
        of_table2("fm", seed, auc=auc, seconds=s)
        for seed, (auc, s) in enumerate([(0.70, 10.0), (0.72, 14.0), (0.74, 18.0)])
    ]
    rows = aggregate.table2([*found, of_table2("lr", 0, auc=0.5)], lambda run: np.zeros(10))
    assert rows["FM"]["auc"] == pytest.approx(0.72)
    assert rows["FM"]["auc_std"] == pytest.approx(0.02)  # (0.02^2 + 0 + 0.02^2) / 2 is its square
    assert rows["FM"]["seconds"] == pytest.approx(14.0)
    assert (rows["LR"]["auc"], rows["LR"]["auc_std"], rows["LR"]["runs"]) == (0.5, None, 1)
    assert (rows["PNN*"]["auc"], rows["PNN*"]["runs"]) == (None, 0)


def test_a_difference_is_paired_by_seed_and_by_example() -> None:
    kept = {
        ("deepfm", 0): [0.1, 0.2],
        ("deepfm", 2): [0.3, 0.4],
        ("fm", 2): [0.4, 0.7],
        ("fm", 0): [0.2, 0.1],
        ("fm", 1): [9.0, 9.0],
    }
    found = [of_table2(system, seed, losses="x") for system, seed in kept]
    rows = aggregate.table2(found, lambda run: np.array(kept[run["system"], run["seed"]]))
    # seed 0: (+0.1 - 0.1) / 2 = 0; seed 2: (+0.1 + 0.3) / 2 = 0.2; FM's seed 1 has nothing to be compared with
    assert rows["FM"]["minus_deepfm"] == {
        "logloss_difference": pytest.approx(0.1),
        "low": None,
        "high": None,
        "seeds": 2,
    }
    assert rows["DeepFM"]["minus_deepfm"] is None


def test_the_interval_of_one_seed_is_that_of_the_test_examples() -> None:
    noise = np.random.default_rng(3).standard_normal((1, 100_000))
    told = intervals.paired_difference(0.5 + noise, np.zeros_like(noise))
    half = 1.96 / np.sqrt(100_000)  # standard deviation 1
    assert told["low"] is not None
    assert told["high"] is not None
    assert (told["high"] - told["low"]) / 2 == pytest.approx(
        half, rel=0.2
    )  # 128 blocks tell a spread to a few percent


def test_the_interval_of_three_seeds_that_differ_is_students() -> None:
    """No spread over examples: the 97.5 % quantile of Student's t with 2 degrees of freedom is 4.303."""
    losses = np.array([[0.1], [0.2], [0.3]]) * np.ones((3, 1000))
    told = intervals.paired_difference(losses, np.zeros_like(losses))
    half = 4.303 * 0.1 / np.sqrt(3)
    assert told["logloss_difference"] == pytest.approx(0.2)
    assert told["high"] == pytest.approx(0.2 + half, rel=0.1)
    assert told["low"] == pytest.approx(0.2 - half, abs=0.1 * half)


@pytest.mark.slow
def test_the_interval_of_equal_systems_leaves_zero_out_about_once_in_twenty_times() -> None:
    """Two systems that are equally good: three seeds each, a spread over seeds and one over examples; the interval must hold both."""
    rng = np.random.default_rng(11)
    missed = 0
    for _ in range(300):
        examples = 0.04 * rng.standard_normal(
            (1, 500)
        )  # what is the same for all seeds: the test part
        losses = (
            examples + 0.002 * rng.standard_normal((3, 1)) + 0.01 * rng.standard_normal((3, 500))
        )
        missed += (
            intervals.verdict(intervals.paired_difference(losses, np.zeros((3, 500)))) != "same"
        )
    assert 2 <= missed <= 24  # 15 on average, if it is exact; wider is honest, narrower is not


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "worse"), (-0.2, -0.1, "better"), (-0.1, 0.1, "same"), (None, None, "unknown")],
)
def test_a_system_is_told_apart_only_when_its_interval_leaves_zero_out(
    low: float | None, high: float | None, verdict: str
) -> None:
    assert intervals.verdict({"low": low, "high": high}) == verdict


def test_a_systems_time_is_the_median_over_seeds_beside_lrs() -> None:
    found = [
        of_table2("lr", seed, seconds=s, seconds_per_epoch=1.0)
        for seed, s in enumerate([90.0, 2.0, 1.0])
    ]
    found += [
        of_table2("fm", seed, seconds=s, seconds_per_epoch=4.0)
        for seed, s in enumerate([5.0, 6.0, 80.0])
    ]
    found.append(
        of_table2("fm", 0, seconds=1.5, seconds_per_epoch=0.5, device="cuda", part="figure6")
    )
    times = aggregate.times(found)
    assert aggregate.relative_times(times)["cpu"]["FM"] == {
        "median": 3.0,
        "least": 2.5,
        "most": 40.0,
    }
    assert aggregate.relative_times(times)["cuda"] == {
        "FM": {"median": 0.75, "least": 0.75, "most": 0.75}
    }
    assert aggregate.relative_times(times, "seconds_per_epoch")["cpu"]["FM"]["median"] == 4.0


@pytest.mark.parametrize(("epoch", "said"), [(0.02, True), (0.2, False)])
def test_multiples_of_a_short_epoch_of_lr_are_said_to_be_rough(
    epoch: float, said: bool, tmp_path: Path
) -> None:
    found = [
        run | {"seconds_per_epoch": epoch} if run["system"] == "lr" else run
        for run in of_part(runs(tmp_path), "table2")
    ]
    told = written_with(tmp_path, found)
    assert told["figure6"]["cpu"]["FM"]["seconds_per_epoch"]["median"] == pytest.approx(14 / 2)
    assert aggregate.relative_times(told["figure6"], "seconds_per_epoch")["cpu"]["FM"][
        "median"
    ] == pytest.approx(7 / epoch)
    assert (tmp_path / "figures" / "figure6.svg").exists()
    assert (f"An epoch of LR takes {epoch} s here" in (tmp_path / "report.md").read_text()) == said


def test_times_are_of_one_machine_and_all_machines_are_named(tmp_path: Path) -> None:
    other = {"processor": "Ampere Altra", "cores": 64}
    found = of_part(runs(tmp_path), "table2")
    found = [
        run | {"machine": other, "seconds": 1e6} if run["system"] == "deepfm" else run
        for run in found
    ]
    told = written_with(tmp_path, found)
    assert "DeepFM" not in told["figure6"]["cpu"]
    assert [where["machine"] for where in told["machines"]] == [MACHINE, other]
    text = (tmp_path / "report.md").read_text()
    assert "AMD EPYC 9R14, 2 cores" in text
    assert "Ampere Altra, 64 cores" in text


def test_a_study_chooses_by_validation_and_not_by_the_test_part(tmp_path: Path) -> None:
    """The lowest test logloss is at relu, the lowest validation logloss at tanh."""
    found = [of_table2("ipnn", 0, part="figure7", value=value, logloss=test, validation=checks(validation))
             for value, test, validation in (("relu", 0.40, 0.46), ("tanh", 0.41, 0.45))]  # fmt: skip
    told = written_with(tmp_path, found)
    assert told["figure7"]["tanh"]["IPNN"]["validation_logloss"] == 0.45
    text = (tmp_path / "report.md").read_text()
    assert "Lowest logloss on validation: IPNN at tanh." in text
    assert "| IPNN | 0.40000 | **0.41000** |" in text


def test_who_beats_lr_is_said_by_an_interval_and_not_by_order(tmp_path: Path) -> None:
    """FM is below LR by far less than the two seeds of each differ, DeepFM by far more."""
    kept = {"lr": (0.500, 0.500), "fm": (0.489, 0.509), "deepfm": (0.400, 0.401)}
    found = [
        of_table2(system, seed, logloss=of[seed], losses=f"{system}-{seed}.npy")
        for system, of in kept.items()
        for seed in (0, 1)
    ]
    for run in found:
        np.save(tmp_path / run["losses"], np.full(200, run["logloss"], np.float32))
    told = written_with(tmp_path, found, seeds=2)
    assert told["table2"]["FM"]["minus_lr"]["logloss_difference"] == pytest.approx(-0.001, abs=1e-6)
    assert told["table2"]["LR"]["minus_lr"] is None
    assert (told["against_lr"]["FM"], told["against_lr"]["DeepFM"]) == ("same", "better")
    text = (tmp_path / "report.md").read_text()
    assert "Lower logloss than LR's, interval below zero: DeepFM." in text
    assert "Not told apart from LR, interval around zero: FM." in text


@pytest.mark.parametrize("systems", [["lr"], ["fm"], ["lr", "fm"], ["fnn", "ipnn"], ["deepfm"]])
@pytest.mark.slow
def test_a_report_of_some_systems_holds_those_alone(tmp_path: Path, systems: list[str]) -> None:
    told = written_with(tmp_path, [run for run in runs(tmp_path) if run["system"] in systems])
    assert list(told["table2"]) == TITLES
    text = (tmp_path / "report.md").read_text()
    rows = re.findall(
        r"^\| ([^|]+) \|",
        text.partition("## Table 2")[2].partition("## Table 1")[0],
        flags=re.MULTILINE,
    )
    named = {MODELS[system].title for system in systems}
    assert {row for row in rows if row in [title.replace("*", r"\*") for title in TITLES]} == named
    assert ("DeepFM's" in text) == ("deepfm" in systems)


def test_what_fnn_had_from_its_fm_stands_beside_it(tmp_path: Path) -> None:
    told = written_with(tmp_path, [of_table2("fnn", 0, validation=checks(0.4634))])
    assert told["table2"]["FNN"]["pretraining"] == {"validation_logloss": 0.461, "epochs": 0.75}
    text = (tmp_path / "report.md").read_text()
    assert (
        "0.46100, after 0.75 epochs. That of the network on its embeddings is 0.46340: 0.00240 above it."
        in text
    )


def test_a_dropout_that_is_not_the_papers_is_said_to_be_given(tmp_path: Path) -> None:
    said = "The dropout of Table 2, 0.1, was given by hand"
    for dropout in (0.1, 0.5):
        written_with(
            tmp_path,
            of_part(runs(tmp_path), "table2"),
            settings={**MADE["settings"], "dropout": dropout},
        )
        assert (said in (tmp_path / "report.md").read_text()) == (dropout == 0.1)


def test_a_log_in_criteos_format_is_not_called_criteos(tmp_path: Path) -> None:
    written_with(tmp_path, of_part(runs(tmp_path), "table2"))
    text = (tmp_path / "report.md").read_text()
    assert "The log is in Criteo's format and has 7,200 rows" in text
    assert "sample of" not in text


# -- report.json ---------------------------------------------------------------------------------


def test_report_json_keeps_its_contract(written: tuple[Path, dict[str, Any]]) -> None:
    out, returned = written
    told = json.loads((out / "report.json").read_text())
    assert told == json.loads(json.dumps(returned))
    assert told["format"] == 1
    assert list(told["table2"]) == TITLES
    for row in told["table2"].values():
        assert all(
            isinstance(row[name], float)
            for name in ("auc", "auc_std", "logloss", "logloss_std", "seconds", "epochs")
        )
        assert (
            row["published"]["criteo"].keys()
            == row["published"]["company"].keys()
            == {"auc", "logloss"}
        )
    assert told["order"] == sorted(TITLES, key=lambda title: told["table2"][title]["logloss"])
    for other, kind in (("DeepFM", "minus_deepfm"), ("LR", "minus_lr")):
        assert [name for name, row in told["table2"].items() if row[kind] is None] == [other]
        assert told["table2"]["FM"][kind].keys() == {"logloss_difference", "low", "high", "seeds"}
    assert told["figure6"]["cpu"]["LR"]["over_lr"] == 1.0
    for part, values in published.VALUES.items():
        assert list(told[part]) == list(values)
        assert all(list(told[part][value]) == TITLES[2:] for value in values)
    assert list(told["streaming"]) == TITLES
    assert (told["missing"], told["failed"]) == ([], [])


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(
    written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    first, _ = written
    written_with(tmp_path, runs(tmp_path))
    names = [
        "report.json",
        "report.md",
        "report.html",
        *(f"figures/{path.name}" for path in sorted((first / "figures").iterdir())),
    ]
    assert len(names) == 10
    for name in names:
        assert (tmp_path / name).read_bytes() == (first / name).read_bytes(), name


@pytest.mark.slow
def test_what_failed_or_was_not_run_is_named(tmp_path: Path) -> None:
    found = [
        run
        for run in runs(tmp_path)
        if run["part"] != "figure9" and not (run["system"] == "opnn" and run["part"] == "table2")
    ]
    found = [run for run in found if not (run["part"] == "figure8" and run["value"] == "0.9")]
    found.append(
        {"part": "table2", "value": "", "system": "opnn", "seed": 1, "failed": "no finite loss"}
    )
    told = written_with(tmp_path, found)
    assert told["table2"]["OPNN"]["auc"] is None
    assert told["missing"] == [
        "Table 2: no run of OPNN.",
        "Figure 8: not run at 0.9.",
        "Figure 9: not run.",
    ]
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "no finite loss" in text
        assert all(missing in text for missing in told["missing"])


def test_a_system_that_a_whole_figure_lacks_is_named_once(tmp_path: Path) -> None:
    found = [
        run for run in runs(tmp_path, seeds=1) if run["part"] in ("table2", "figure7", "streaming")
    ]
    found = [
        run
        for run in found
        if run["part"] != "figure7"
        or (run["system"] != "fnn" and (run["system"], run["value"]) != ("pnn", "tanh"))
    ]
    told = aggregate.missing(found)
    assert told[:2] == ["Figure 7: no run of FNN.", "Figure 7, tanh: no run of PNN*."]
    assert told[2:] == [f"Figure {number}: not run." for number in (8, 9, 10, 11)]


def test_a_point_alone_is_no_study(tmp_path: Path) -> None:
    found = [of_table2(system, 0, part="figure7", value="relu") for system in ("fnn", "opnn")]
    written_with(tmp_path, [*found, of_table2("opnn", 0, part="figure7", value="tanh")])
    (tmp_path / "one").mkdir()
    written_with(tmp_path / "one", found)
    assert "| FNN |" not in (tmp_path / "report.md").read_text().partition("## Figure 7")[2]
    assert "## Figure 7" not in (tmp_path / "one" / "report.md").read_text()


def test_a_report_of_nothing_is_a_report_that_says_so(tmp_path: Path) -> None:
    told = written_with(tmp_path, [])
    assert list(told["table2"]) == TITLES
    assert told["order"] == []
    assert "No run of Table 2 has ended." in (tmp_path / "report.html").read_text()


def test_a_figure_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    told = written_with(tmp_path, [of_table2("fm", 0, auc=float("nan"))])
    assert told["table2"]["FM"]["auc"] is None
    assert json.loads((tmp_path / "report.json").read_text())["table2"]["FM"]["auc"] is None


@pytest.mark.parametrize(
    ("data", "there", "absent"), [(DATA, "0.45083", "0.02618"), (SIMULATED, "0.02618", "0.45083")]
)
def test_the_papers_numbers_of_the_matching_data_stand_beside_ours(
    tmp_path: Path, data: dict[str, Any], there: str, absent: str
) -> None:
    written_with(tmp_path, of_part(runs(tmp_path, seeds=1), "table2"), data)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert re.findall(rf"{there}(?= \||</td>)", text)
        assert not re.findall(rf"{absent}(?= \||</td>)", text)
        assert ("The log is simulated" in text) == (data is SIMULATED)


def test_of_other_data_the_paper_has_no_numbers(tmp_path: Path) -> None:
    written_with(
        tmp_path,
        of_part(runs(tmp_path, seeds=1), "table2"),
        {**DATA, "format": "avazu", "whole": None},
    )
    text = (tmp_path / "report.md").read_text()
    assert "The paper has no numbers on this data." in text
    assert "| 0.45083 |" not in text


def test_who_learned_nothing_is_named(tmp_path: Path) -> None:
    written_with(
        tmp_path, of_part(runs(tmp_path, seeds=1), "table2"), {**DATA, "constant_logloss": 0.47}
    )
    assert (
        "No better than the best constant, whose test logloss is 0.47000: LR."
        in (tmp_path / "report.html").read_text()
    )


def test_one_seed_is_called_one_seed(tmp_path: Path) -> None:
    told = written_with(tmp_path, of_part(runs(tmp_path, seeds=1), "table2"), seeds=1)
    assert told["table2"]["LR"]["auc_std"] is None
    text = (tmp_path / "report.md").read_text()
    assert "One seed" in text
    assert "±" not in text


# -- the page ------------------------------------------------------------------------------------

NASTY = '<script>alert(1)</script> & "quotes" | pipe ` tick *star* ![x](http://x.invalid/y.png)'


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_comes_from_data_is_text_and_nothing_else(tmp_path: Path) -> None:
    found = [
        *of_part(runs(tmp_path, seeds=1), "table2"),
        {"part": "table2", "value": NASTY, "system": "lr", "seed": 9, "failed": NASTY},
    ]
    written_with(
        tmp_path, found, {**DATA, "name": NASTY, "notes": [NASTY], "whole": NASTY}, command=NASTY
    )
    page = Tags((tmp_path / "report.html").read_text())
    assert page.text.count(NASTY) >= 5
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


EVERYWHERE: list[Block] = [
    Heading(NASTY, 1), Heading(NASTY), Text(NASTY), Note(NASTY), Listing([NASTY]), Facts([(NASTY, NASTY)]), Code(NASTY),
    Details(NASTY, [Table(NASTY, [Column(NASTY, NASTY), Column("b", "c")], [[NASTY, Strong(NASTY)]])]),
    Picture("x", NASTY, "<svg></svg>", ["<svg></svg>"]),
]  # fmt: skip


def test_a_block_shows_its_text_letter_by_letter_in_both_forms() -> None:
    forms = {
        "html": html_of(NASTY, EVERYWHERE),
        "markdown": MarkdownIt("commonmark").enable("table").render(markdown(EVERYWHERE)),
    }
    for form, page in forms.items():
        tags = Tags(page)
        assert tags.text.count(NASTY) >= 14 - (form == "markdown"), form
        pictures = [attributes["src"] for tag, attributes in tags.tags if tag == "img"]
        assert pictures == (["figures/x.svg"] if form == "markdown" else [])
        assert not {"script", "iframe"} & {tag for tag, _ in tags.tags}
        assert len([tag for tag, _ in tags.tags if tag in ("th", "td")]) == (
            6 if form == "html" else 4
        )


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "+ a",
        "1. a",
        "12) a",
        "# a",
        "=== a",
        "---",
        "> a",
        "a  b",
        "~~a~~",
        "a_b_c",
        "&amp; a",
        "$a$",
    ],
)
def test_a_line_of_markdown_is_no_more_than_its_text(text: str) -> None:
    page = Tags(
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown([Text(text)]))
    )
    assert [tag for tag, _ in page.tags] == ["p"]
    assert page.text.split() == text.split()


def test_the_html_asks_for_nothing_outside_of_itself(written: tuple[Path, dict[str, Any]]) -> None:
    page = (written[0] / "report.html").read_text()
    for _, attributes in Tags(page).tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
                assert str(value).startswith(("#", "data:,")), (name, value)
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page


def test_every_id_of_the_page_is_there_once_and_every_link_leads_to_one(
    written: tuple[Path, dict[str, Any]],
) -> None:
    tags = Tags((written[0] / "report.html").read_text()).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    links = {
        str(value).removeprefix("#")
        for _, of in tags
        for name, value in of.items()
        if name.endswith("href") and str(value)[0] == "#"
    }
    assert len(ids) == len(set(ids))
    assert links <= set(ids)


def test_a_picture_is_well_formed_small_and_white(written: tuple[Path, dict[str, Any]]) -> None:
    pictures = sorted((written[0] / "figures").iterdir())
    assert [path.stem for path in pictures] == [
        "figure10",
        "figure11",
        "figure6",
        "figure7",
        "figure8",
        "figure9",
        "table2",
    ]
    for path in pictures:
        assert path.stat().st_size < 100_000
        root = ElementTree.parse(path).getroot()
        assert root[0].attrib["fill"] == "#ffffff"
        assert "<text" not in path.read_text()  # letters are outlines


def test_the_markdown_links_the_pictures_that_there_are(
    written: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = written
    linked = re.findall(r"\]\((figures/[^)]*)\)", (out / "report.md").read_text())
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (out / "figures").iterdir())


def test_every_row_of_a_markdown_table_has_the_cells_of_its_head(
    written: tuple[Path, dict[str, Any]],
) -> None:
    text = (written[0] / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 20
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_a_fence_is_longer_than_the_ticks_within() -> None:
    assert markdown([Code("echo ````")]) == "`````\necho ````\n`````\n"


def test_names_at_the_ends_of_lines_do_not_meet() -> None:
    places = figures.apart([0.5] * 7, gap=0.06)
    assert all(b - a >= 0.06 - 1e-9 for a, b in zip(places, places[1:], strict=False))
    assert 0 <= places[0] <= places[-1] <= 1


# -- in a browser --------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
browser_only = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: the report is not opened in a browser"
)

PROBE = """<!doctype html><title>probe</title><pre id=told></pre><script>
const told = {};
function measure(width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = "report.html";
  frame.onload = () => {
    const page = frame.contentDocument, root = page.scrollingElement;
    const inside = svg => { const box = svg.getBoundingClientRect(); return box.width > 150 && box.right <= width && box.height > 100; };
    told[width] = {
      scrolls: root.scrollWidth, rows: [...page.querySelectorAll("table")].map(table => table.tBodies[0].rows.length),
      systems: [...page.querySelectorAll("#table-2-performance ~ .scroll tbody")][0].rows.length,
      pictures: page.querySelectorAll("svg").length, seen: [...page.querySelectorAll("svg")].filter(inside).length,
      columns: getComputedStyle(page.querySelector("#figure-7-activation-function ~ figure .panels")).gridTemplateColumns.split(" ")
        .filter(track => track != "0px").length,
      cut: [...page.querySelectorAll("p, li, h1, h2, dd, pre, figcaption, caption span")]
        .filter(e => e.getBoundingClientRect().right > width + 1).map(e => e.textContent),
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    };
    document.getElementById("told").textContent = JSON.stringify(told);
  };
  document.body.append(frame);
}
[400, 1400].forEach(measure);
</script>"""


@pytest.fixture(scope="module")
def opened(
    written: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """What a browser says of the page at 400 and at 1400 pixels, and what it wrote to its console."""
    assert CHROMIUM is not None
    folder = tmp_path_factory.mktemp("browser")
    shutil.copy(written[0] / "report.html", folder)
    (folder / "probe.html").write_text(PROBE)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [CHROMIUM, "--headless", *sandbox, "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files",
         "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=1500,1000",
         "--virtual-time-budget=20000", "--dump-dom", f"file://{folder / 'probe.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    told = re.search(r"<pre id=\"told\">(.*?)</pre>", done.stdout)
    assert told, done.stderr[-2000:]
    return json.loads(html.unescape(told[1])), done.stderr


@browser_only
@pytest.mark.slow
def test_a_browser_shows_all_rows_and_pictures_at_any_width(
    opened: tuple[dict[str, Any], str],
) -> None:
    told, _ = opened
    for width in ("400", "1400"):
        assert told[width]["systems"] == 9
        assert sorted(told[width]["rows"]) == [7] * 15 + [9] * 5
        assert told[width]["pictures"] == told[width]["seen"] == 12
        assert told[width]["scrolls"] <= int(width), "the page is wider than its window"
        assert told[width]["cut"] == []
    assert told["400"]["columns"] == 1
    assert told["1400"]["columns"] == 2


@browser_only
@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_of_and_nothing_to_ask_for(
    opened: tuple[dict[str, Any], str],
) -> None:
    told, console = opened
    assert re.findall(r".*:CONSOLE.*", console) == []
    assert told["400"]["requests"] == told["1400"]["requests"] == []
