"""Capacity on paper: the formulas against figures that were worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bench import capacity, capacity_model, delta_sizes
from bench.capacity_model import Input, Inputs, Machine, Model, Resource, Stream

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "bench" / "capacity.py"


def unlike(examples: float) -> float:
    """The distinct rows of examples of one field that share no row."""
    return examples


def alike(examples: float) -> float:
    """The distinct rows of examples that all have the same ten rows."""
    return 10.0 if examples else 0.0


def inputs(**given: float | None) -> Inputs:
    """Inputs of round numbers, measured on two cores; `given` replaces some."""
    values: dict[str, float | None] = {
        "dense": 200_000,
        "turns": 400_000,
        "decode": 300_000,
        "join": 1_000_000,
        "ftrl": 5_360_000,
        "besides": 500_000,
        "waiting": 200,
        "events": 1.0,
    }
    measured = {
        name: Input(name, value, "", "by hand") for name, value in {**values, **given}.items()
    }
    return Inputs(**measured, cores=2)


# -- a step on the network -----------------------------------------------------------------------


def test_a_step_on_two_ranks_sends_what_is_counted_by_hand() -> None:
    # One field, K = 1: rows of 4 floats [V, w, n of V, n of w]; 1 layer of 1 -> 1 * 1 + 1 and the
    # output neuron 1 + 1, so P = 4. A batch of 512 has two parts of 256.
    model = Model(fields=1, embedding_dim=1, hidden=(1,))
    assert (model.floats, model.parameters) == (4, 4)
    found = capacity_model.traffic(model, 512, 2, unlike)
    slice_bytes = 4 * 4 / 2
    to_owner = 256 * 4 / 2 + 256 * (16 + 2) / 2 + 256 * 16 / 2 + 2 * slice_bytes
    assert found.sent[0, 1] == to_owner + 256 * 5
    assert found.sent[1, 0] == to_owner + 256 * 8
    assert found.turns.sum() == 0  # no row is on both ranks
    assert found.total == 2 * to_owner + 256 * 13
    assert found.seconds(8e3) == max(found.sent[0, 1], found.sent[1, 0]) / 1e3


def test_rows_that_both_ranks_step_are_passed_on_once_and_given_back_by_the_last_one() -> None:
    model = Model(fields=1, embedding_dim=1, hidden=(1,))
    found = capacity_model.traffic(model, 512, 2, alike)
    assert found.turns.tolist() == [[0, 10 * 16], [0, 0]]
    asked = 10 * 4 / 2
    lent = 10 * (16 + 2) / 2
    dense = 2 * 4 * 4 / 2
    assert found.sent[0, 1] == asked + lent + dense + 256 * 5
    assert found.sent[1, 0] == asked + lent + dense + 256 * 8 + 10 * 16 / 2
    assert found.busiest == found.sent[1, 0]
    assert found.total == found.sent.sum() + 160
    assert found.seconds(8e3) == (found.sent[1, 0] + 160) / 1e3


def test_a_row_skips_ranks_that_have_it_not() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 5000, (400, 3, 256))
    counted = np.mean(
        [len((set(first) & set(last)) - set(middle)) for first, middle, last in drawn.tolist()]
    )

    def uniform(examples: float) -> float:
        return 5000 * (1 - (1 - 1 / 5000) ** examples)

    assert capacity_model.passed_rows(uniform, 256, 256, 256) == pytest.approx(counted, rel=0.03)


def test_the_other_optimizers_send_gradients_of_entries_and_take_no_turns() -> None:
    online, adagrad = (
        capacity_model.traffic(Model(optimizer=name), 4096, 2, alike)
        for name in ("online", "adagrad")
    )
    assert adagrad.turns.sum() == 0
    entries = 2048 * 39 * 48 / 2
    fewer = 10 * 2 / 2 + 2048 * 4  # neighbours of rows; logits of float32
    given_back = 10 * 52 / 2
    assert adagrad.sent[1, 0] - online.sent[1, 0] == entries - fewer - given_back


@pytest.mark.parametrize("optimizer", ["online", "adagrad"])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_links_add_up_to_the_formula_of_the_learner(optimizer: str, ranks: int) -> None:
    law = delta_sizes.Law((40, 1000, 50_000) * 13)
    model = Model(optimizer=optimizer)
    found = capacity_model.traffic(model, 4096, ranks, law.expected_values)
    expected = capacity_model.bytes_of_step(model, 4096, ranks, law.expected_values)
    assert found.total == pytest.approx(expected, rel=0.005)
    assert found.total < expected  # which counts what is small, too


def test_more_ranks_than_parts_have_none_but_keep_rows_and_slices() -> None:
    found = capacity_model.traffic(Model(), 4096, 8, alike)
    assert capacity_model.examples_by_rank(4096, 8) == [0, 1024] * 4
    idle = found.sent[2]
    assert idle[3] == 10 * (52 + 2) / 8 + 4 * 477_601 / 8
    assert idle[2] == 0


def test_one_rank_needs_no_network() -> None:
    step = capacity_model.traffic(Model(), 4096, 1, alike)
    assert step.total == 0
    assert capacity_model.network_limit(step, Model(), 4096, 1e9, inputs()) is None


# -- sizes ---------------------------------------------------------------------------------------


def test_sizes_of_a_table_of_2_to_the_26_rows() -> None:
    rows = 1 << 26
    table, experts = 64 * rows, 2 * 16 * rows + 2 * 16 * 2**24
    assert capacity_model.expert_bytes(rows) == experts
    assert capacity_model.snapshot_bytes(Model(), rows) == table + experts
    own, first = capacity_model.memory_bytes(Model(), rows, 4)
    assert (own, first) == (2 * table / 4, 2 * table / 4 + 2 * experts)


def test_a_delta_has_the_rows_of_all_tables_and_the_dense_part() -> None:
    found = capacity_model.delta_bytes(Model(), 1 << 26, 1.0, alike)
    assert found == pytest.approx(10 * 48 + 2 * 10 * 8 + 2 * 229 * 8 + 4 * 477_601, abs=1)
    most = capacity_model.delta_bytes(Model(), 1 << 22, 1e9, lambda examples: 1 << 22)
    bitmaps = (3 * 2**22 + 2 * 2**24) / 8
    assert most == pytest.approx(bitmaps + 4 * (13 * 2**22 + 2 * 2**24 + 477_601), rel=1e-6)


def test_the_disk_of_rank_0_takes_its_snapshots_all_deltas_and_what_the_joiner_spills() -> None:
    stream = Stream(1 << 26, 100_000.0, alike)
    snapshot = 64 * 2**26 / 2 + capacity_model.expert_bytes(1 << 26)
    delta = capacity_model.delta_bytes(Model(), 1 << 26, 500_000.0, alike)
    spilled = 100_000 * 630 * 200 / 2 - 1e9
    expected = snapshot / 600 + delta / 5 + spilled / 630
    assert capacity_model.disk_bytes(inputs(), stream, 2) == pytest.approx(expected)


# -- what ends first -----------------------------------------------------------------------------


def by_name(found: list[Resource]) -> dict[str, Resource]:
    return {resource.name: resource for resource in found}


def test_limits_follow_the_number_of_ranks_where_there_is_work_for_all() -> None:
    stream = Stream(1 << 20, 100_000.0, alike)
    found = by_name(capacity_model.resources(inputs(), Machine(), stream, 4))
    assert found["dense compute"].most == 100_000 * 8  # 8 parts of 1,024, one for each core
    assert found["sub-batch turns"].most == 400_000
    assert found["FTRL experts"].most == 5_360_000 * 39 / 536
    assert found["decode"].most == 150_000 * 8
    assert found["join"].most == 1_000_000 * 4
    many = by_name(capacity_model.resources(inputs(), Machine(), stream, 64))
    assert many["dense compute"].most == 100_000 * 16  # a batch has 16 parts at most


def test_the_least_ranks_that_suffice_are_found_and_what_ends_first() -> None:
    def at(events: float) -> capacity_model.Verdict:
        stream = Stream(1 << 20, events, alike)
        return capacity_model.verdict(
            lambda ranks: capacity_model.resources(inputs(), Machine(), stream, ranks)
        )

    slow, middle, fast = at(150_000), at(350_000), at(1_000_000)
    assert (slow.enough, slow.ranks, slow.first.name) == (True, 1, "dense compute")
    assert (middle.enough, middle.ranks) == (True, 2)
    assert (fast.enough, fast.first.name) == (False, "FTRL experts")
    assert (
        capacity.ends_first(fast, Stream(1 << 20, 1_000_000, alike))
        == "FTRL experts, at 0.39 M events/s"
    )


def test_what_was_not_measured_ends_nothing_and_says_so() -> None:
    stream = Stream(1 << 20, 1e6, alike)
    found = by_name(capacity_model.resources(inputs(turns=None), Machine(), stream, 2))
    assert found["sub-batch turns"].share == 0
    assert capacity.share(found["sub-batch turns"]) == "not measured"


def test_experts_that_do_not_fit_rank_0_end_a_large_table_first() -> None:
    stream = Stream(1 << 34, 1000.0, alike)
    found = capacity_model.verdict(
        lambda ranks: capacity_model.resources(inputs(), Machine(), stream, ranks)
    )
    assert (found.enough, found.first.name) == (False, "memory of rank 0")
    assert by_name(found.resources)["memory of others"].share < 1


# -- the inputs and the page ---------------------------------------------------------------------


def test_the_inputs_are_those_of_the_kept_benchmarks_with_machine_and_commit() -> None:
    speed = capacity.read_cases(ROOT / "docs" / "performance.json")
    turns = {"stages": {"results": {"seconds": {"sub-batches": 2e-6}}, "machine": "2 x this"}}
    found = capacity.read_inputs(speed, turns)
    train = next(
        result["median"]
        for result in speed["train"]["results"]
        if result["contender"] == "ours, bf16"
    )
    assert (found.dense.value, found.cores) == (train, 2)
    assert speed["train"]["commit"] in found.dense.source
    assert found.waiting.value == pytest.approx(229, abs=1)
    assert (found.turns.value, found.turns.source) == (
        500_000,
        "`tests/bench/ranks.py stages`; 2 x this",
    )
    assert found.besides.value is None
    bound = {"memory": {"results": {"bound": [3.0, 1.0, 2.0]}, "machine": "2 x this"}}
    found = capacity.read_inputs(speed, bound)
    assert (found.turns.value, found.besides.value) == (None, 2.0)


def test_a_page_has_a_row_for_each_stream_and_its_formulas(tmp_path: Path) -> None:
    law = delta_sizes.Law((40, 1000, 50_000))
    found = capacity.page(inputs(), Machine(), law, "the command")
    assert found.count("| 2^34") == 1 + 2 * len(capacity.EVENTS)
    assert "| 2^26 | 4.29 GB | 268 MB |" in found
    assert "80 GB" in found
    assert "nvidia.com" in found
    for resource in capacity_model.resources(inputs(), Machine(), Stream(1 << 20, 1.0, alike), 2):
        assert f" {resource.name} |" in found
    assert found.endswith("Computed by `the command`")


@pytest.mark.slow
def test_the_command_fills_the_block_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- capacity -->\n<!-- /capacity -->\nAfter.\n")
    command = [sys.executable, str(SCRIPT), "--page", str(page), "--memory", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in page.read_text()
    assert "64 GiB of memory" in page.read_text()
    speed = json.loads((ROOT / "docs" / "performance.json").read_text())["cases"]
    assert speed[0]["machine"] in page.read_text()
