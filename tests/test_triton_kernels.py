"""The Triton kernels against the compiled loops of the CPU.

They run on a CUDA GPU where there is one, else on the CPU in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import interpreter
from torch import Tensor

from stream_ctr.learn import table_kernels
from stream_ctr.learn.table import Rates, Table
from stream_ctr.learn.table_kernels import SortedIds
from stream_ctr.models.products import FieldSums, pairwise_inner_products

triton_kernels = pytest.importorskip(
    "stream_ctr.learn.triton_kernels", reason="Triton is for Linux only", exc_type=ImportError
)

triton = pytest.importorskip("triton")

if interpreter.INTERPRETED:
    interpreter.prepare_language_once()

UPDATES = {"_reduce", "_join", "_step_rows"}
KERNELS = {"_gather", "_compact", "_score", "_finite", "_write_back", *UPDATES}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = 6


@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize(
    ("k", "fields"), [(4, 3), (10, 5), (100, 20)]
)  # the last in more than one tile
@pytest.mark.parametrize("embeddings", [1, 2])
def test_gather_is_that_of_the_cpu_with_the_sums_of_fm(
    k: int, embeddings: int, fields: int, with_values: bool
) -> None:
    table = Table(
        bits=BITS, embedding_dim=k, embeddings=embeddings, initial_scale=0.5, device=DEVICE
    )
    width = table.width
    table.rows[:, width].normal_()
    ids = torch.from_numpy(
        np.random.default_rng(width).integers(0, 64, (7, fields)).astype(np.int32)
    )
    values = torch.randn(7, fields) if with_values else None
    w = torch.empty(7, fields)
    v = torch.empty(7, fields, width)
    scale = torch.empty(0, 0) if values is None else values
    table_kernels.gather(width)(
        table.rows.cpu().numpy(), ids.numpy(), scale.numpy(), w.numpy(), v.numpy()
    )
    found_w, found_v, total, pairs = (
        torch.full(shape, torch.nan, device=DEVICE)
        for shape in ((7, fields), (7, fields, width), (7, width), (7,))
    )
    triton_kernels.gather(
        table,
        ids.to(DEVICE),
        None if values is None else values.to(DEVICE),
        found_w,
        found_v,
        FieldSums(total, pairs),
    )
    assert torch.equal(found_w.cpu(), w)
    assert torch.equal(found_v.cpu(), v)
    assert torch.allclose(total.cpu(), v.sum(1), atol=1e-5)
    assert torch.allclose(pairs.cpu(), pairwise_inner_products(v), atol=1e-4)


class Updated(NamedTuple):
    before: Tensor
    after: Tensor
    expected: Tensor  # after a step of the CPU's loops


def updated(
    ids: npt.NDArray[np.int32],
    n: int,
    k: int,
    optimizer: str,
    *,
    embeddings: int = 1,
    steps: int = 4,
    skips: Sequence[float] = (0.0,),
) -> Updated:
    """Update a table with each of `skips` in turn; `steps` is the number of steps before."""
    betas = (1e-8, 1e-8) if optimizer == "adam" else (1.0, 0.5)
    rates = Rates(optimizer, 0.1, betas[0], 0.2, betas[1])
    table = Table(bits=BITS, embedding_dim=k, embeddings=embeddings, rates=rates, initial_scale=0.5)
    generator = torch.Generator().manual_seed(len(ids))
    width = table.width
    table.rows[:, width:].uniform_(0.5, 1.0, generator=generator)
    before = table.rows.clone()
    grad_w = torch.randn(*ids.shape, generator=generator) / len(ids)
    grad_v = torch.randn(*ids.shape, width, generator=generator) / len(ids)
    table.rows = before.to(DEVICE, copy=True)
    update = triton_kernels.Update(table, examples=ids.shape[0], fields=ids.shape[1])
    count = torch.tensor(n, dtype=torch.int32, device=DEVICE)
    correction = torch.tensor(rates.correction(steps), device=DEVICE)
    gradients = grad_w.to(DEVICE), grad_v.to(DEVICE)
    for skip in skips:
        update.sort(torch.from_numpy(ids).to(DEVICE))
        update(*gradients, count, torch.tensor(skip, device=DEVICE), correction)
    id_count = n * ids.shape[1]
    sorted_ids = SortedIds(np.empty(id_count, np.int32), np.empty(id_count, np.int32))
    spare = np.empty((2, id_count), np.int32)
    table_kernels.sort_ids(ids[:n].ravel(), BITS, sorted_ids, spare)
    expected = before.clone()
    table_kernels.update(k, embeddings, optimizer)(
        expected.numpy(),
        sorted_ids,
        0,
        id_count,
        grad_w.view(-1).numpy(),
        grad_v.view(-1, width).numpy(),
        rates.at_step(steps, examples=n),
    )
    return Updated(before, table.rows.cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
@pytest.mark.parametrize(("k", "embeddings"), [(4, 1), (20, 1), (5, 3)])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_update_is_that_of_the_cpu_wherever_the_runs_of_a_row_start_and_end(
    k: int, embeddings: int, optimizer: str, data: st.DataObject
) -> None:
    batch = 40
    n = data.draw(st.integers(1, 40))
    steps = data.draw(st.sampled_from([0, 1, 10_000]))
    rows = data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=6))
    drawn = data.draw(st.lists(st.sampled_from(rows), min_size=3 * batch, max_size=3 * batch))
    ids = np.array(drawn, np.int32).reshape(batch, 3)
    ids[n:] = 63
    before, after, expected = updated(ids, n, k, optimizer, embeddings=embeddings, steps=steps)
    assert torch.allclose(after, expected, rtol=1e-5, atol=1e-5)
    untouched = np.setdiff1d(np.arange(64), ids[:n])
    assert torch.equal(after[untouched], before[untouched])


@pytest.mark.slow
def test_a_row_in_every_example_is_summed_by_many_programs_the_same_way_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_kernels, "_CHUNKS", 4)  # added at a time
    ids = np.random.default_rng(0).integers(0, 64, (300, 2)).astype(np.int32)
    ids[:, 0] = 7  # in more than twice as many chunks
    first = updated(ids, 300, 4, "adagrad")
    assert torch.allclose(first.after, first.expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(updated(ids, 300, 4, "adagrad").after, first.after)


def test_an_update_to_be_skipped_changes_nothing() -> None:
    ids = np.arange(60, dtype=np.int32).reshape(20, 3) % 7
    once = updated(ids, 20, 4, "adagrad")
    found = updated(ids, 20, 4, "adagrad", skips=(1.0, 0.0, 1.0))
    assert torch.equal(found.after, once.after)
    assert not torch.equal(once.after, once.before)


# -- compiled without a GPU ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What is known of each kernel's code, at each shape, for A100 and H100."""
    if triton.knobs.nvidia.ptxas is None:
        pytest.skip("Triton has no ptxas here, so it cannot compile for a GPU")
    cache = tmp_path_factory.mktemp("triton")
    environment: dict[str, Any] = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "support" / "compile_kernels.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100_and_an_a100_as_it_is_launched(
    built: list[dict[str, Any]],
) -> None:
    assert {(each["kernel"], each["capability"]) for each in built} == {
        (kernel, capability) for kernel in KERNELS for capability in (80, 90)
    }
    for each in built:
        wide = each["constants"].get("COLUMNS", 0) > 1024
        assert each["compiled"], each
        assert each["shared"] <= (160_000 if wide else 100_000), each
        assert not each["atomic"], each


@pytest.mark.slow
def test_a_row_is_written_only_when_every_warp_has_read_its_state(
    built: list[dict[str, Any]],
) -> None:
    updates = [each for each in built if each["kernel"] in UPDATES]
    assert max(each["warps"] for each in updates) > 1
    assert [each for each in updates if not each["ordered"]] == []


@pytest.mark.slow
def test_the_gather_reads_whole_vectors(built: list[dict[str, Any]]) -> None:
    gathers = [each for each in built if each["kernel"] == "_gather"]
    assert [each for each in gathers if not each["wide_loads"]] == []
