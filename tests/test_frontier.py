"""Quality against speed: the figures, the choice of rates, the page, and a tiny run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from bench import frontier, frontier_figure, frontier_page
from bench.environments import NotRun, Peer
from bench.frontier import Bench, Ours, Reference, Stream, Vowpal
from bench.frontier_page import groups
from bench.progressive import Pair, difference, part_figures, predicted, recovery

from stream_ctr.join.examples import Examples

SMALL = {
    "STREAM_CTR_MODEL__HIDDEN": "8",
    "STREAM_CTR_MODEL__EMBEDDING_DIM": "2",
    "STREAM_CTR_MODEL__TABLE_BITS": "12",
}
Floats = npt.NDArray[np.float64]


def draw(n: int, seed: int = 0) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Return logits [n] and labels [n] that follow them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 1.0, n)
    return logits, (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(np.uint8)


def loss(logits: Floats, labels: npt.NDArray[np.uint8]) -> Floats:
    p = 1 / (1 + np.exp(-logits))
    return -np.log(np.where(labels == 1, p, 1 - p))


# -- figures -------------------------------------------------------------------------------------


def test_the_figures_of_a_part_are_those_of_its_examples() -> None:
    logits, labels = draw(64 * 100)
    run = predicted("model", logits, labels)
    for part, rows in (
        ("whole", slice(0, None)),
        ("first_tenth", slice(0, 640)),
        ("last_half", slice(3200, None)),
    ):
        found = part_figures(run, "model", part)
        assert (found["from_example"], found["count"]) == (rows.start, len(labels[rows]))
        assert found["logloss"] == pytest.approx(loss(logits[rows], labels[rows]).mean())
        p = 1 / (1 + np.exp(-logits[rows]))
        assert found["pred_over_actual"] == pytest.approx(p.sum() / labels[rows].sum())


def test_a_difference_is_paired_and_its_interval_holds_it() -> None:
    logits, labels = draw(64 * 100)
    better = predicted("better", logits, labels)
    worse = predicted("worse", logits + 0.3, labels)
    pair = Pair(worse, "worse", better, "better")
    for part, rows in (("whole", slice(0, None)), ("last_half", slice(3200, None))):
        found = difference(pair, part)
        expected = (loss(logits + 0.3, labels) - loss(logits, labels))[rows].mean()
        assert found["logloss_difference"] == pytest.approx(expected)
        assert found["low"] < expected < found["high"]


@pytest.mark.parametrize("other", [draw(64 * 99), draw(64 * 100, seed=1)])
def test_other_examples_are_not_compared(other: tuple[Floats, npt.NDArray[np.uint8]]) -> None:
    run = predicted("one", *draw(64 * 100))
    with pytest.raises(ValueError, match="one and two did not predict the same examples"):
        Pair(run, "one", predicted("two", *other), "two")


def falling(correct_after: int | None) -> tuple[Floats, npt.NDArray[np.uint8], Floats]:
    """Return logits, labels and true probabilities of 6,400 examples.

    The rate falls from 1/2 to 1/8 at 3,200. The predictions follow `correct_after` examples later.
    From 3,200 on, every other block of 64 examples has no click.
    """
    i = np.arange(6400)
    true = np.where(i < 3200, 0.5, 0.125)
    labels = np.where(i < 3200, i % 2 == 0, (i % 4 == 0) & (i % 128 < 64))
    p = true.copy()
    p[3200 : None if correct_after is None else 3200 + correct_after] = 0.5
    return np.log(p) - np.log1p(-p), labels.astype(np.uint8), true


def test_a_model_has_recovered_when_its_calibration_is_back() -> None:
    logits, labels, true = falling(640)
    found = recovery(predicted("model", logits, labels), "model", 3200, true)
    assert found["resolution"] == 64
    assert found["rolling"] == 256
    assert found["examples"] == 640 + 256  # the first four blocks after it are calibrated
    assert found["by_true_probability"] == 640 + 64
    assert found["worst"] == pytest.approx(4.0)


def test_a_model_that_never_recovers_has_no_number_of_examples() -> None:
    logits, labels, true = falling(None)
    found = recovery(predicted("model", logits, labels), "model", 3200, true)
    assert (found["examples"], found["by_true_probability"]) == (None, None)
    unknown = recovery(predicted("model", *falling(640)[:2]), "model", 3200, np.full(6400, np.nan))
    assert unknown["by_true_probability"] is None


# -- logs and rates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "impressions", "drift", "change"),
    [
        ("simulated-20k", 20_000, "none", None),
        ("drift-1m", 1_000_000, "weights", None),
        ("falling-500", 500, "rate", 250),
    ],
)
def test_the_name_of_a_log_says_what_is_simulated(
    name: str, impressions: int, drift: str, change: int | None
) -> None:
    stream = Stream.named(name)
    assert (stream.impressions, stream.drift, stream.change) == (impressions, drift, change)


@pytest.mark.parametrize("name", ["simulated-0k", "drifting-20k", "criteo-20k"])
def test_a_log_that_does_not_exist_is_named_with_those_that_do(name: str) -> None:
    with pytest.raises(ValueError, match=f"no log '{name}': there are criteo, avazu, obd, and sim"):
        Stream.named(name)


class Fake:
    """A run of ours in which `ftrl` made these predictions."""

    def __init__(self, logits: Floats, labels: npt.NDArray[np.uint8]) -> None:
        self.run = predicted("ftrl", logits, labels)
        self.ftrl = "ftrl"
        self.report = {"events": 2 * len(labels)}


def reference(labels: npt.NDArray[np.uint8], logits: Floats) -> Reference:
    n = len(labels)
    ids = np.arange(2 * n, dtype=np.int32).reshape(n, 2)
    none = np.zeros((n, 0), np.float32)
    unknown = np.full(n, np.nan)
    number = np.arange(n)
    examples = Examples(number.astype(np.uint64), number, ids, none, labels, unknown, number)
    learned: Any = Fake(logits, labels)
    return Reference(learned, examples, change=None)


def bench(directory: Path, **options: Any) -> Bench:
    peer = Peer("vowpal", ("a-package==1.0",), directory / "cache", offline=True)
    return replace(
        Bench(directory, peer, quick=False, busy=False, only="", reports=None), **options
    )


def test_the_rate_is_chosen_on_the_first_fifth_and_the_best_one_in_hindsight_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = draw(6400)
    early, late = logits.copy(), logits + 0.2
    early[2000:] += 1.0  # good at first, bad later
    late[:1280] += 0.3
    made = {"--fast -l 1": early, "--fast -l 2": late}

    def predictions(options: str, text: Path, _: Bench) -> tuple[Floats, float]:
        assert text.read_text().splitlines()[1] == f"{1 if labels[1] else -1} | 2 3"
        return made[options], 2.0

    monkeypatch.setattr(frontier, "_predictions", predictions)
    contender = Vowpal("Vowpal", "--fast", ("-l 1", "-l 2"))
    chosen, hindsight = frontier.vowpal_results(
        [contender], reference(labels, logits), bench(tmp_path)
    )
    assert chosen["options"] == ["--fast", "-l", "1"]
    assert hindsight["options"] == ["--fast", "-l", "2"]
    assert hindsight["contender"] == "Vowpal, in hindsight"
    assert chosen["events_per_second"] == 6400.0
    for options, made_of in made.items():
        begin, whole, tenth, half = chosen["grid"][options]
        expected = loss(made_of, labels)
        assert begin == pytest.approx(expected[:1280].mean())
        assert whole == pytest.approx(expected.mean())
        assert tenth == pytest.approx(expected[:640].mean())
        assert half == pytest.approx(expected[3200:].mean())
    middle, low, high = hindsight["whole"]["above_ftrl"]
    assert middle == pytest.approx((loss(late, labels) - loss(logits, labels)).mean())
    assert low < middle < high


def test_vowpal_wabbit_that_cannot_be_installed_is_a_reason(tmp_path: Path) -> None:
    logits, labels = draw(640)
    contender = Vowpal("Vowpal", "", ("-l 1",))
    (result,) = frontier.vowpal_results([contender], reference(labels, logits), bench(tmp_path))
    assert result["not_run"].endswith("--offline installs nothing")


# -- the page ------------------------------------------------------------------------------------


def result(contender: str, speed: float, half: float, **more: Any) -> dict[str, Any]:
    scores = {
        "auc": 0.7,
        "pred_over_actual": 1.01,
        "above_ftrl": [half - 0.3, half - 0.31, half - 0.29],
    }
    figures = {
        part: {"logloss": half + more_loss, **scores}
        for part, more_loss in (("whole", 0.01), ("first_tenth", 0.05), ("last_half", 0.0))
    }
    return {"contender": contender, "events_per_second": speed, "options": [], **figures, **more}


def example_case(seed: int, *, half: float = 0.29) -> dict[str, Any]:
    bound = {"count": 3200, "ctr": 0.25, "constant_logloss": 0.4, "best_possible_logloss": 0.2}
    exact = {"logloss": 0.3, "auc": 0.68, "pred_over_actual": 1.0, **bound}
    grid = {"-l 0.1": [0.3, 0.31, 0.335, 0.2895], "-l 1": [0.4, 0.32, 0.345, 0.2885]}
    recovered = {"examples": None if seed else 512, "by_true_probability": 256, "worst": 3.0}
    return {
        "name": f"falling-6k, seed {seed}",
        "log": "falling-6k",
        "seed": seed,
        "default_batch": 4096,
        "examples": 6400,
        "whole": exact,
        "first_tenth": exact,
        "last_half": exact,
        "machine": "a machine",
        "command": "a command",
        "results": [
            result("defaults", 1000.0 + seed, half, recovery=recovered),
            result("batch 64", 500.0, 0.285),
            result("DeepFM, one step a batch, 512", 800.0, 0.295),
            {"contender": "River FTRL", "not_run": "it is tired"},
            result("Vowpal Wabbit", 9000.0, 0.2895, options=["-l", "0.1"], grid=grid),
            result("Vowpal Wabbit, in hindsight", 9000.0, 0.2895, options=["-l", "0.1"]),
        ],
    }


def test_a_table_has_means_over_the_seeds_and_between_which_bounds_they_lie() -> None:
    (group,) = groups([example_case(0), example_case(1, half=0.28)])
    lines = frontier_page.log_table(group).splitlines()
    recovered = "512; never (by true probabilities 256; 256); at worst 3.00"
    interval = "-0.01500 [-0.02207, -0.00793]"
    assert lines[2] == "| best constant |  | 0.40000 | 0.40000 | 0.40000 |  |  |  |  |"
    assert lines[4] == (
        "| **defaults** (batch 4,096) | 1,000 | 0.33500 | 0.29500 | 0.28500 | 0.7000 | 1.0100 "
        f"| {interval} | {recovered} |"
    )
    assert "| River FTRL | not run |  |  |  |  |  |  |  |" in lines
    assert lines[-1].startswith("| best possible |  | 0.20000 |")
    assert not any("in hindsight" in line for line in lines)  # it is the rate that was chosen


def test_a_busy_machine_measures_quality_and_no_speed() -> None:
    quiet, busy = example_case(0), example_case(1, half=0.31)
    busy["results"] = [{**each, "busy": True} for each in busy["results"]]
    (group,) = groups([quiet, busy])
    assert group.speed("defaults") == groups([quiet])[0].speed("defaults")
    assert group.mean("defaults", "last_half", "logloss") == pytest.approx(0.3)
    (group,) = groups([busy])
    assert group.speed("defaults") is None
    assert "| **defaults** (batch 4,096) |  | " in frontier_page.log_table(group)


def test_contenders_that_are_measured_later_join_those_of_the_case() -> None:
    later = {**example_case(0), "command": "another"}
    later["results"] = [result("Vowpal Wabbit", 1.0, 0.2), result("batch 64", 2.0, 0.3)]
    case = frontier.merged(example_case(0), later)
    figures = {each["contender"]: each.get("events_per_second") for each in case["results"]}
    assert list(figures)[:2] == ["defaults", "batch 64"]
    assert (figures["batch 64"], figures["Vowpal Wabbit"], figures["defaults"]) == (2.0, 1.0, 1000)
    text = frontier_page.block([case], None, None)
    assert "a machine: `a command`" in text
    assert "a machine: `another`" in text


def test_the_rate_that_is_best_in_hindsight_has_a_row_if_it_is_another() -> None:
    case = example_case(0)
    case["results"][-1]["options"] = ["-l", "1"]
    text = frontier_page.log_block(groups([case])[0])
    assert "| Vowpal Wabbit, in hindsight | 9,000 |" in text
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert notes == [
        "- River FTRL: not run: it is tired",
        "- Vowpal Wabbit: `-l 0.1`",
        "- Vowpal Wabbit, in hindsight: `-l 1`",
    ]


def test_goals_are_met_or_not() -> None:
    (group,) = groups([example_case(0)])
    assert [str(reached) for reached in frontier_page.goals(group).values()] == [
        "+0.0000 yes",  # .30 against .30 of exact FTRL
        "+0.0050 **no**",  # .34 against .335, the least of all rates
        "+0.0015 **no**",  # .29 against .2885
        "-0.0050 yes",
        "+0.0050 **no**",  # .30 against .295 of batch 64
        "1.0100 yes",
    ]
    table = frontier_page.goals_table([group]).splitlines()
    assert table[2].endswith("| 55.0 % |")


def test_what_was_not_measured_meets_no_goal() -> None:
    case = example_case(0)
    case["results"] = case["results"][1:2]
    (group,) = groups([case])
    assert {str(reached) for reached in frontier_page.goals(group).values()} == {""}


def test_what_was_served_stands_beside_the_progressive_figure_of_the_same() -> None:
    case = example_case(0)
    served = {"blend": {"logloss": 0.31}, "progressive": {"logloss": 0.29}}
    case["results"][0]["as_served"] = {"whole": served, "last_half": served}
    lines = frontier_page.log_table(groups([case])[0]).splitlines()
    assert lines[0].endswith("| as served, last half (the same, progressive) |")
    assert lines[4].endswith("| 0.31000 (0.29000) |")


def test_the_figure_is_the_same_for_the_same_figures() -> None:
    cases = [example_case(0), {**example_case(0), "log": "criteo"}]
    picture = frontier_figure.figure(cases)
    assert picture == frontier_figure.figure(cases)
    moved = [cases[0], {**cases[1], "results": [result("defaults", 2000.0, 0.3)]}]
    assert picture != frontier_figure.figure(moved)
    assert ElementTree.fromstring(picture).tag.endswith("svg")


# -- a run ---------------------------------------------------------------------------------------


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["frontier.py", *map(str, arguments)])
    frontier.main()


@pytest.mark.slow
def test_a_tiny_run_has_the_figures_of_its_report_and_renders_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in SMALL.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(frontier, "ours", lambda: [Ours("defaults"), Ours("x", ("--model", "y"))])
    monkeypatch.setattr(frontier, "warm_up", lambda contenders: None)
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- frontier -->\n<!-- /frontier -->\nAfter.\n")
    files = ["--json", tmp_path / "kept.json", "--page", page, "--figure", tmp_path / "kept.svg"]
    options = ["--quick", "--offline", "--cache", tmp_path, "--reports", tmp_path / "reports"]
    run_main(monkeypatch, "falling-3k", *options, *files)

    (case,) = json.loads((tmp_path / "kept.json").read_text())["cases"]
    (report,) = (json.loads(path.read_text()) for path in (tmp_path / "reports").iterdir())
    defaults, failed, *vowpal = case["results"]
    model = defaults["model"]
    for part, told in (("whole", report), ("last_half", report["last_half"])):
        for score in ("logloss", "auc", "pred_over_actual"):
            assert defaults[part][score] == pytest.approx(told["models"][model][score], abs=1e-6)
        if "ftrl" in told["pairs"]:
            middle, *_ = defaults[part]["above_ftrl"]
            paired = told["pairs"]["ftrl"]["logloss_difference"]
            assert middle == pytest.approx(paired, abs=2e-6)
    assert case["first_tenth"]["count"] == 320  # of 3,000, in blocks of 32 or 64
    assert case["whole"]["count"] == report["examples"] == 3000
    assert case["whole"]["best_possible_logloss"] < defaults["whole"]["logloss"]
    assert defaults["recovery"]["resolution"] == 64
    assert "unknown key" in failed["not_run"] or "y" in failed["not_run"]
    assert all("--offline installs nothing" in each["not_run"] for each in vowpal)

    filled = page.read_text()
    assert "**falling-3k**: 3,000 impressions" in filled
    assert "(kept.svg)" in filled
    page.write_text("<!-- frontier -->\nold\n<!-- /frontier -->\n")
    run_main(monkeypatch, "--render", *files)
    assert page.read_text() == filled.removeprefix("Before.\n").removesuffix("After.\n")

    run_main(monkeypatch, "falling-3k", "--missing", *options, *files)  # measures nothing
    assert len(json.loads((tmp_path / "kept.json").read_text())["cases"]) == 1


@pytest.mark.slow
def test_examples_of_another_log_are_not_those_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in SMALL.items():
        monkeypatch.setenv(variable, value)
    stream = Stream.named("simulated-500")
    log = stream.write(tmp_path, 0)
    learned = frontier.learn(log, Ours("defaults"), 0, tmp_path / "state")
    assert len(frontier.joined(log, learned)) == 500
    (tmp_path / "other").mkdir()
    other = stream.write(tmp_path / "other", 1)
    with pytest.raises(NotRun, match="not those of the run"):
        frontier.joined(other, learned)


def test_render_needs_figures_and_an_unknown_log_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--render"], "--render needs a --json file"),
        (["simulatd-2k"], "no log 'simulatd-2k'"),
    ):
        with pytest.raises(SystemExit):
            run_main(monkeypatch, *arguments)
        assert message in capsys.readouterr().err
