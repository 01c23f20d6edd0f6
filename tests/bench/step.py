"""The time of a training step on a CPU by stage, and its bound; part of docs/performance.md.

    python tests/bench/step.py

*Products*: the three matrix products of a layer (forward, dL/dx, dL/dW) of 1,024 examples on one
core, by implementation. *Stages*: one step of the paper's DeepFM on 4,096 examples, with one lane
and no other load. *Bound*: the examples a second that two perfect lanes could learn if they did
nothing but these products.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import fill, machine, print_table  # noqa: E402

from bench import zipf  # noqa: E402
from stream_ctr.learn.learner import make_learner  # noqa: E402
from stream_ctr.learn.network_learner import NetworkLearner  # noqa: E402
from stream_ctr.learn.spec import LearnerSpec  # noqa: E402
from stream_ctr.learn.thread_pool import set_up_process  # noqa: E402
from stream_ctr.models import MODELS, layers  # noqa: E402

FIELDS = 39
K = 10
HIDDEN = (400, 400, 400)
BATCH = 4096
TABLE_BITS = 20
WIDTHS = [FIELDS * K, *HIDDEN, 1]
# Floating-point operations of an example: three products, each with a multiplication and an
# addition for every weight.
FLOP = 6 * sum(inputs * outputs for inputs, outputs in itertools.pairwise(WIDTHS))
WARM_UP = 5
PRODUCT_ROWS = 1024
PRODUCT_WIDTH = 400


def median_seconds(call: Callable[[], object], repetitions: int = 100) -> float:
    seconds = []
    for _ in range(WARM_UP + repetitions):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def products(rows: int = PRODUCT_ROWS, width: int = PRODUCT_WIDTH) -> dict[str, list[float]]:
    """Return the gigaflops of forward, dL/dx and dL/dW for each implementation."""
    gigaflop = 2 * rows * width * width / 1e9
    found = {}
    for name, dtype, linear in (
        ("torch, float32", torch.float32, torch.nn.functional.linear),
        ("oneDNN, float32", torch.float32, layers._linear),
        ("torch, bfloat16", torch.bfloat16, torch.nn.functional.linear),
        ("oneDNN, bfloat16", torch.bfloat16, layers._linear),
    ):
        x = torch.randn(rows, width).to(dtype)
        dz = torch.randn(rows, width).to(dtype)
        w = torch.randn(width, width).to(dtype)
        calls = [(x, w), (dz, w.t()), (dz.t(), x.t())]
        found[name] = [gigaflop / median_seconds(partial(linear, a, b, None)) for a, b in calls]
    return found


Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]


class Timed:
    """Wraps methods and adds up the seconds spent in them, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Replace a method by one that is timed."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        setattr(owner, method, timed)


@functools.cache
def zipf_batches() -> list[Batch]:
    """Return eight batches of (ids [B, F], labels [B])."""
    with tempfile.TemporaryDirectory() as directory:
        data = zipf.write(Path(directory), rows=1 << TABLE_BITS, examples=8 * BATCH)
        ids = np.load(data / "ids.npy")
        labels = np.load(data / "labels.npy")
    return [
        (ids[first : first + BATCH], labels[first : first + BATCH])
        for first in range(0, len(ids), BATCH)
    ]


def spec(**options: Any) -> LearnerSpec:
    """Return the learner of all measurements, with these options."""
    return LearnerSpec(
        fields=FIELDS,
        embedding_dim=K,
        hidden=HIDDEN,
        table_bits=TABLE_BITS,
        batch_size=BATCH,
        **options,
    )


def stages(precision: str, steps: int = 30) -> dict[str, float]:
    """Return the milliseconds of each stage by name; `a step` is the whole step."""
    learner = NetworkLearner(spec(model="deepfm", precision=precision), device="cpu", threads=1)
    batches = zipf_batches()
    for batch in batches:
        learner.learn(*batch)
    step = learner._step
    timed = Timed()
    timed.watch(learner, "learn", "a step")
    timed.watch(step, "_gathered", "gather")
    timed.watch(learner.model, "forward", "forward")
    timed.watch(step, "_sort", "sort the ids")
    timed.watch(step, "_update_rows", "step the rows")
    timed.watch(learner.adam, "step", "Adam")
    grad = torch.autograd.grad
    timed.watch(torch.autograd, "grad", "backward")
    for number in range(steps):
        learner.learn(*batches[number % len(batches)])
    torch.autograd.grad = grad
    spent = {name: 1000 * seconds / steps for name, seconds in timed.seconds.items()}
    total = spent.pop("a step")
    return {**spent, "what is between": total - sum(spent.values()), "a step": total}


def system_speed(model: str, precision: str, dropout: float, steps: int = 12) -> float:
    """Return the examples a second that a model learns, with as many lanes as there are cores.

    The extra pass that dropout requires for progressive validation is left out.
    """
    described = spec(model=model, precision=precision, dropout=dropout)
    learner = make_learner(described, device="cpu", progressive=False)
    batches = itertools.cycle(zipf_batches())
    return BATCH / median_seconds(lambda: learner.learn(*next(batches)), steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, help="put the output into the block `step` of a page")
    parser.add_argument(
        "--systems",
        action="store_true",
        help="measure the throughput of each of the nine models instead; not for the page",
    )
    arguments = parser.parse_args()
    if arguments.systems:
        measure_systems()
        return
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        measure()
    output = printed.getvalue()
    print(output)
    if arguments.page:
        block = re.sub(r"\n{3,}", "\n\n", output).strip()
        arguments.page.write_text(fill(arguments.page.read_text(), "step", block))


def measure() -> None:
    set_up_process()
    speed = products()
    print("Products of 1,024 examples with a layer of 400 x 400, one core, gigaflops\n")
    print_table(
        ["by", "forward", "dL/dx", "dL/dW"],
        [[name, *(f"{value:.0f}" for value in each)] for name, each in speed.items()],
    )
    by_precision = {precision: stages(precision) for precision in ("bf16", "fp32")}
    print(f"\nA step on {BATCH:,} examples, one lane, milliseconds\n")
    rows: list[list[object]] = [
        [name, *(f"{each[name]:.1f}" for each in by_precision.values())]
        for name in by_precision["bf16"]
    ]
    print_table(["", *by_precision], rows)
    bounds = ", ".join(
        f"{dtype} {bound(speed, dtype):,.0f} examples/s" for dtype in ("float32", "bfloat16")
    )
    print(
        f"\nBound: {FLOP / 1e6:.2f} Mflop an example in products; "
        f"two cores that do nothing else, with the faster of both: {bounds}"
    )
    print(f"\n\n{machine()}: python tests/bench/step.py")


def bound(speed: dict[str, list[float]], dtype: str) -> float:
    """Return the examples a second that two cores learn with the fastest product of each kind."""
    candidates = [found for name, found in speed.items() if name.endswith(dtype)]
    fastest = [max(each) for each in zip(*candidates, strict=True)]
    return 2e9 * statistics.harmonic_mean(fastest) / FLOP


def measure_systems() -> None:
    """Print a table of medians of a dozen steps. Other load on the machine affects it."""
    set_up_process()
    settings = list(itertools.product(("fp32", "bf16"), (0.0, 0.5)))
    print(f"Examples a second, batches of {BATCH:,}\n")
    speeds: list[list[object]] = [
        [system.title, *(f"{system_speed(name, *setting):,.0f}" for setting in settings)]
        for name, system in MODELS.items()
    ]
    print_table(
        ["", *(f"{precision}, dropout {dropout}" for precision, dropout in settings)], speeds
    )
    print(f"\n{machine()}: python tests/bench/step.py --systems")


if __name__ == "__main__":
    main()
