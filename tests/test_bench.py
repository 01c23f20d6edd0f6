"""The benchmarks: small runs that need no peer and no broker, and the tables of their results."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import port, systems, zipf
from bench.card import CASES, Card
from bench.comparison import Comparison, Goal, table
from bench.contest import Absent, Call, Contender, Program, Result, compare, ratio
from bench.environments import NotRun, Peer
from bench.streams import WideLog
from support.lineage import QUICK

from stream_ctr.logs.simulate import Simulation
from stream_ctr.models import MODELS

SPEED = Path(__file__).parent / "bench" / "speed.py"
CONTENDERS = Path(__file__).parent / "bench" / "contenders"


def speed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SPEED), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_quick_run_measures_prints_and_fills_the_page(tmp_path: Path) -> None:
    cases = ("train", "ftrl", "memory", "start")
    kept = tmp_path / "speed.json"
    page = tmp_path / "page.md"
    earlier = [{"name": "ftrl", "of": "an earlier run"}, {"name": "other"}]
    kept.write_text(json.dumps({"cases": earlier}))
    page.write_text("Before.\n" + "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in cases))
    options = ["--quick", "--offline", "--only", "ours", "--cache", str(tmp_path / "cache")]
    done = speed(*cases, *options, "--json", str(kept), "--page", str(page))
    assert done.returncode == 0, done.stderr
    measured = {case["name"]: case for case in json.loads(kept.read_text())["cases"]}
    assert measured.keys() == {*cases, "other"}
    command = "python tests/bench/speed.py train ftrl memory start --quick"
    for case in (measured[name] for name in cases):
        assert case["command"].startswith(command)
        assert case["commit"]
        assert case["versions"]["torch"]
        assert not any("not_run" in result for result in case["results"])
        assert all(len(result["repetitions"]) == 1 for result in case["results"])
        assert all(result["median"] > 0 for result in case["results"])
        assert case["title"] in done.stdout
        assert table(case) in page.read_text()
    unmeasured_peer = [None, None]
    assert [goal["met"] for goal in measured["train"]["goals"]] == unmeasured_peer

    one = tmp_path / "one.json"
    one.write_text(json.dumps({"cases": [measured["start"]]}))
    assert speed("--read", str(one)).stdout.strip() == table(measured["start"])


def test_an_unknown_case_is_an_error_that_lists_the_cases() -> None:
    done = speed("trian")
    assert done.returncode == 2
    assert "no case 'trian': there are train, train-10m, ingest" in done.stderr


def test_contenders_are_measured_in_turn_and_one_that_fails_keeps_its_reason() -> None:
    order: list[str] = []
    numbers = count(1)

    def working() -> dict[str, Any]:
        order.append("working")
        return {"count": 10 * next(numbers), "seconds": 2.0}

    def failing() -> dict[str, Any]:
        order.append("failing")
        if order.count("failing") == 2:
            raise NotRun("it is tired")
        return {"value": 1.0}

    contenders: list[Contender] = [
        Call("working", working),
        Absent("absent", "there is none"),
        Call("failing", failing),
    ]
    results = compare(contenders, rounds=3)
    assert order == ["working", "failing", "working", "failing", "working"]
    assert [result.reason for result in results] == ["", "there is none", "it is tired"]
    assert results[0].values == [5.0, 10.0, 15.0]
    assert results[0].median == 10.0


def test_a_missing_peer_is_not_installed_offline(tmp_path: Path) -> None:
    peer = Peer("peer", ("a-package==1.0",), tmp_path, offline=True)
    (result,) = compare([Program("peer", "vowpal", [], peer)], rounds=1)
    missing = f"a-package==1.0 is not installed in {tmp_path}"
    assert result.reason == f"{missing}, and --offline installs nothing"
    assert not list(tmp_path.iterdir())


def test_the_reason_of_a_program_that_fails_is_its_last_message() -> None:
    arguments = ["--impressions", "many", "--pending", "all"]
    (result,) = compare([Program("ours", "pending", arguments)], rounds=1)
    message = "pending.py: error: argument --impressions: invalid int value: 'many'"
    assert result.reason == f"ended with status 2: {message}"


def test_a_ratio_is_taken_within_each_round() -> None:
    ours = Result("ours", [10.0, 2.0, 30.0])  # the second round was slow for both
    peer = Result("peer", [5.0, 1.0, 10.0])
    assert ratio(ours, peer) == 2.0
    assert ratio(ours, Result("none")) is None


@pytest.mark.parametrize(
    ("goal", "text", "reached", "met"),
    [
        (Goal("ours", least=250_000), "at least 250,000", 9.0, False),
        (Goal("ours", most=9.0), "at most 9", 9.0, True),
        (Goal("ours", most=8.9), "at most 8.9", 9.0, False),
        (Goal("ours", least=4.5, times="peer"), "at least 4.5 x peer", 4.5, True),
        (Goal("ours", most=250.0, above="peer"), "at most 250 above peer", 7.0, True),
        (Goal("ours", least=1.0, times="absent"), "at least 1 x absent", None, None),
        (Goal("absent", least=1.0), "at least 1", None, None),
    ],
)
def test_goals(goal: Goal, text: str, reached: float | None, met: bool | None) -> None:
    results = [
        Result("ours", [8.0, 9.0, 10.0]),
        Result("peer", [2.0, 2.0, 2.0]),
        Result("absent", reason="there is none"),
    ]
    (judged,) = Comparison("case", "A case", "s", results, [goal]).as_json()["goals"]
    assert judged == {"contender": goal.contender, "goal": text, "reached": reached, "met": met}


def test_the_table_has_spread_ratio_verdict_and_reasons() -> None:
    results = [
        Result("ours", [8000.0, 9000.0], note="as it is"),
        Result("peer", [4000.0, 4500.0]),
        Result("absent", reason="no wheel fits"),
    ]
    goal = Goal("ours", least=3.0, times="peer")
    case = Comparison("case", "A case", "k/s", results, [goal], peer="peer").as_json()
    lines = table(case | {"machine": "a machine", "command": "a command"}).splitlines()
    assert lines[0] == "**A case**"
    assert "| ours | 8,500 | 8,000..9,000 | 2 | at least 3 x peer | no (2) |" in lines
    assert "| absent | not run |  |  |  |  |" in lines
    assert lines[-1] == "a machine: `a command`"
    assert [line for line in lines if line.startswith("- ")] == [
        "- ours: as it is",
        "- absent: not run: no wheel fits",
    ]


def test_a_case_that_no_contender_could_run_is_one_line() -> None:
    results = [Result("ours", reason="no GPU here"), Result("peer", reason="no GPU here")]
    case = Comparison("gpu", "On a GPU", "k/s", results).as_json()
    assert table(case) == "**On a GPU**\n\nnot measured: no GPU here"


def test_all_contenders_get_the_same_examples(tmp_path: Path) -> None:
    data = zipf.write(tmp_path, rows=1 << 12, examples=500)
    ids, local, labels = (np.load(data / f"{name}.npy") for name in ("ids", "local", "labels"))
    sizes = np.array(json.loads((data / "sizes.json").read_text()))
    assert sizes.sum() == 1 << 12
    assert (local < sizes).all()
    for field in range(zipf.FIELDS):  # a row of the shared table for each row of the field's own
        pairs = set(zip(ids[:, field].tolist(), local[:, field].tolist(), strict=True))
        assert len(pairs) == len(set(ids[:, field].tolist())) == len(set(local[:, field].tolist()))
    first = zipf.write_vowpal(data, data / "vowpal.txt").read_text().splitlines()[0].split(" ")
    assert first == ["1" if labels[0] else "-1", "|", *map(str, ids[0].tolist())]


def test_the_wide_stream_has_39_fields_and_clicks() -> None:
    log = WideLog(3000)
    events = [json.loads(value) for batch in log.batches() for value in batch.value.to_pylist()]
    impressions = [event for event in events if event["kind"] == "impression"]
    assert len(impressions) == 3000
    assert len(impressions[0]["features"]) == 39
    assert 100 < len(events) - 3000 < 200


# -- the nine models -----------------------------------------------------------------------------


class Scripted:
    """A trainee with known validation losses.

    After each epoch, its prediction for every example is wrong by the number that `models` has for
    the present model and epoch.
    """

    def __init__(self, *models: list[float]) -> None:
        self.models = list(models)
        self.epoch = 0
        self.kept: list[int] = []

    def batch(self, ids: Any, labels: Any) -> Any:
        return ids, labels

    def learn(self, batch: Any) -> None:
        self.epoch += 1  # all examples are one batch

    def predict(self, batch: Any) -> Any:
        wrong = self.models[0][self.epoch - 1]
        return np.where(batch[1] == 1, 1 - wrong, wrong)

    def keep(self) -> None:
        self.kept.append(self.epoch)

    def follow(self) -> bool:
        self.epoch = 0
        del self.models[0]
        return bool(self.models)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(CONTENDERS))
    return importlib.import_module("training")


def test_training_stops_after_the_best_epoch_which_counts(training: Any) -> None:
    labels = np.array([0, 1] * 6, np.uint8)
    parts = np.array([[0, 1, 2] * 4], np.uint8)
    data = training.Data(np.zeros((12, 1), np.int32), labels, [1], parts)
    trainee = Scripted([0.3, 0.2, 0.25, 0.1], [0.4, 0.45])
    arguments = argparse.Namespace(epochs=9, batch=12)
    best = training.trained(lambda *_: trainee, arguments, data, seed=0)
    # The third epoch of the first model is no better, so its fourth is not trained.
    assert trainee.kept == [1, 2, 1]
    assert best["epoch"] == 1
    assert best["logloss"] == pytest.approx(-np.log(0.6))


def test_scores_are_those_of_counting_pairs(training: Any) -> None:
    rng = np.random.default_rng(0)
    p = rng.integers(1, 9, 60) / 10
    labels = rng.integers(0, 2, 60).astype(np.uint8)
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a in p[labels == 1] for b in p[labels == 0]
    ]
    found = training.scores(p, labels)
    assert found["auc"] == pytest.approx(np.mean(pairs))
    losses = [-np.log(q if y else 1 - q) for q, y in zip(p, labels, strict=True)]
    assert found["logloss"] == pytest.approx(np.mean(losses))


def test_peers_get_our_features_renumbered_within_each_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        f"{n % 2}\t" + "\t".join([str(n % 3), *[""] * 12, *[f"{n % 4:08x}"] * 26])
        for n in range(40)
    ]
    (tmp_path / "criteo").mkdir()
    (tmp_path / "criteo" / "train.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(systems, "DATA", tmp_path)
    systems.write_sample(tmp_path / "sample", 3)
    ids, local, labels, parts = (
        np.load(tmp_path / "sample" / f"{name}.npy") for name in ("ids", "local", "labels", "parts")
    )
    assert labels.tolist() == [n % 2 for n in range(40)]
    assert parts.shape == (3, 40)
    sizes = json.loads((tmp_path / "sample" / "sizes.json").read_text())
    assert sorted(sizes) == [1] * 12 + [3] + [4] * 26
    for field, size in enumerate(sizes):
        assert set(local[:, field].tolist()) == set(range(size))
        assert len(set(zip(ids[:, field].tolist(), local[:, field].tolist(), strict=True))) == size


def quality_case(ours: list[float], peer: list[float]) -> dict[str, Any]:
    against = systems._against("quality", Result("ours", ours), Result("FuxiCTR", peer))
    results: list[dict[str, Any]] = [
        {
            "contender": name,
            "note": "",
            "repetitions": [{"auc": auc, "logloss": 0.5, "epoch": 2} for auc in values],
            "against": {"FuxiCTR": against},
        }
        for name, values in (("ours", ours), ("FuxiCTR", peer))
    ]
    results.append({"contender": "DeepCTR-Torch", "not_run": systems.NONE})
    return {"system": "fm", "results": results}


def test_an_auc_is_not_below_if_it_is_within_the_spread_over_the_seeds() -> None:
    within = quality_case([0.70, 0.72, 0.74], [0.71, 0.73, 0.75])
    table = systems.quality_table([within]).splitlines()
    scores = "0.7200 ± 0.0200 | 0.5000 ± 0.0000 | 2.0"
    assert table[2] == f"| FM | ours | {scores} | FuxiCTR -0.0100 [-0.0100, -0.0100] | yes |"
    assert len(table) == 4  # there is no row for a library without such a model
    below = quality_case([0.70, 0.72, 0.74], [0.73, 0.75, 0.77])
    assert systems.quality_table([below]).splitlines()[2].endswith("| no |")


def test_the_table_of_speeds_has_ratios_to_each_peer() -> None:
    results = [
        {"contender": "ours, auto", "median": 3000.0, "against": {"FuxiCTR": 3.0}},
        {"contender": "ours, fp32", "median": 2000.0, "against": {"FuxiCTR": 2.0}},
        {"contender": "FuxiCTR", "median": 1000.0, "against": {}},
        {"contender": "DeepCTR-Torch", "not_run": systems.NONE},
    ]
    table = systems.speed_table([{"system": "ipnn", "results": results}]).splitlines()
    assert table[2] == "| IPNN | 3,000 | 2,000 | 1,000 |  | 3.00; 2.00 |  |"


def test_each_system_has_a_counterpart() -> None:
    assert set(systems.COUNTERPARTS) == set(MODELS)
    assert all(systems.COUNTERPARTS.values())


@pytest.mark.slow
def test_systems_run_quickly_keep_their_figures_and_fill_the_page(tmp_path: Path) -> None:
    kept = tmp_path / "systems.json"
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- speed -->\n<!-- /speed -->\n")
    command = [sys.executable, str(SPEED.with_name("systems.py")), "speed", "--missing"]
    command += ["--quick", "--offline", "--cache", str(tmp_path / "cache")]
    command += ["--json", str(kept), "--page", str(page)]
    for names in (["lr"], ["lr", "fnn"]):
        full = [*command, "--systems", *names]
        done = subprocess.run(full, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    cases = {case["system"]: case for case in json.loads(kept.read_text())["cases"]}
    assert cases.keys() == {"lr", "fnn"}
    assert cases["lr"]["command"].endswith("--systems lr")  # --missing did not measure it again
    for case in cases.values():
        for result in case["results"]:
            if "ours" in result["contender"]:
                assert result["median"] > 0
            else:
                assert "--offline installs nothing" in result["not_run"]
    assert systems.block("speed", [cases["lr"], cases["fnn"]]) in page.read_text()


def test_what_to_measure_on_a_card_runs_at_small_sizes_without_one() -> None:
    small = Card(torch.device("cpu"), quick=True)
    found = {name: list(case(small)) for name, case in CASES.items()}
    assert [each["equal"] for each in found["repeat"]] == [True, True, True]
    assert {each["inputs"] for each in found["aligned"]} == {390, 392}
    assert [each["memory"] for each in found["copy"]] == ["pinned", "other"]
    assert all(each["seconds"] > 0 for each in (*found["rows"], *found["steps"]))


@pytest.mark.slow
def test_a_client_asks_a_run_for_its_metrics_and_reports_until_it_has_ended(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log.jsonl"
    Simulation(1500, seed=1).write_jsonl(log)
    without = port.learn(log, QUICK, every=None)
    with_port = port.learn(log, QUICK, every=0.1)
    assert (without.asked, without.bytes) == (0, 0)
    assert with_port.asked > 0
    assert with_port.bytes > 100 * with_port.asked
    assert with_port.weights_sha256 == without.weights_sha256
    assert min(with_port.events_per_second, without.events_per_second) > 0
