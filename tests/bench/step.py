"""Where the time of a step goes on a CPU, and what bounds it; the second half of docs/performance.md.

    python tests/bench/step.py

*Products*: the three matrix products of a layer (forward, dL/dx, dL/dW) of 1,024 examples on one core, by who computes them. *Stages*: one
step of the paper's DeepFM on 4,096 examples, one lane, with nothing beside it. *Bound*: the examples that two perfect lanes could learn
with these products alone.
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
from stream_ctr.learn.learner import NetworkLearner, make_learner  # noqa: E402
from stream_ctr.learn.thread_pool import set_up_process  # noqa: E402
from stream_ctr.models import MODELS, layers  # noqa: E402

FIELDS, K, HIDDEN, BATCH, TABLE_BITS = 39, 10, (400, 400, 400), 4096, 20
WIDTHS = [FIELDS * K, *HIDDEN, 1]
FLOP = 6 * sum(
    one * next_one for one, next_one in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
)  # of an example: three products


def median_seconds(call: Callable[[], object], repetitions: int = 100) -> float:
    seconds = []
    for _ in range(repetitions + 5):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[5:])


def products(rows: int = 1024, width: int = 400) -> dict[str, list[float]]:
    """Gigaflops of forward, dL/dx and dL/dW."""
    found = {}
    for name, dtype, linear in (
        ("torch, float32", torch.float32, torch.nn.functional.linear),
        ("oneDNN, float32", torch.float32, layers._linear),
        ("torch, bfloat16", torch.bfloat16, torch.nn.functional.linear),
        ("oneDNN, bfloat16", torch.bfloat16, layers._linear),
    ):
        x, dz, w = (
            torch.randn(*shape).to(dtype)
            for shape in ((rows, width), (rows, width), (width, width))
        )
        calls = [(x, w), (dz, w.t()), (dz.t(), x.t())]
        found[name] = [
            2 * rows * width * width / median_seconds(partial(linear, a, b, None)) / 1e9
            for a, b in calls
        ]
    return found


class Timed:
    """Stands in for methods and adds up their seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        setattr(owner, method, timed)


@functools.cache
def zipf_batches() -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]]:
    with tempfile.TemporaryDirectory() as directory:
        data = zipf.write(Path(directory), rows=1 << TABLE_BITS, examples=8 * BATCH)
        ids, labels = np.load(data / "ids.npy"), np.load(data / "labels.npy")
    return [
        (ids[first : first + BATCH], labels[first : first + BATCH])
        for first in range(0, len(ids), BATCH)
    ]


def stages(precision: str, steps: int = 30) -> dict[str, float]:
    """Milliseconds of each stage, by name; `a step` is all of it."""
    learner = NetworkLearner(
        "deepfm", fields=FIELDS, embedding_dim=K, hidden=HIDDEN, table_bits=TABLE_BITS, batch_size=BATCH, precision=precision,
        device="cpu", threads=1,
    )  # fmt: skip
    batches = zipf_batches()
    for batch in batches:
        learner.learn(*batch)
    timed, step = Timed(), learner._step
    for owner, method, name in (
        (learner, "learn", "a step"), (step, "_gathered", "gather"), (learner.model, "forward", "forward"),
        (step, "_sort", "sort the ids"), (step, "_update_rows", "step the rows"),
        (learner.adam, "step", "Adam"),
    ):  # fmt: skip
        timed.watch(owner, method, name)
    grad = torch.autograd.grad
    timed.watch(torch.autograd, "grad", "backward")
    for number in range(steps):
        learner.learn(*batches[number % len(batches)])
    torch.autograd.grad = grad
    spent = {name: 1000 * seconds / steps for name, seconds in timed.seconds.items()}
    rest = spent.pop("a step")
    return {**spent, "what is between": rest - sum(spent.values()), "a step": rest}


def system_speed(model: str, precision: str, dropout: float, steps: int = 12) -> float:
    """Examples a second that one of the nine learns, on as many lanes as there are cores, without the extra pass that dropout asks for."""
    learner = make_learner(
        model, fields=FIELDS, embedding_dim=K, hidden=HIDDEN, table_bits=TABLE_BITS, batch_size=BATCH, precision=precision, dropout=dropout,
        device="cpu", progressive=False,
    )  # fmt: skip
    batches = itertools.cycle(zipf_batches())
    return BATCH / median_seconds(lambda: learner.learn(*next(batches)), steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--page", type=Path, help="put what is printed into the block `step` of this page"
    )
    parser.add_argument(
        "--systems",
        action="store_true",
        help="how fast each of the nine learns, instead; not for the page",
    )
    arguments = parser.parse_args()
    if arguments.systems:
        measure_systems()
        return
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        measure()
    print(printed.getvalue())
    if arguments.page:
        arguments.page.write_text(
            fill(
                arguments.page.read_text(),
                "step",
                re.sub(r"\n{3,}", "\n\n", printed.getvalue()).strip(),
            )
        )


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
    print_table(
        ["", *by_precision],
        [
            [name, *(f"{each[name]:.1f}" for each in by_precision.values())]
            for name in by_precision["bf16"]
        ],
    )
    print(
        f"\nBound: {FLOP / 1e6:.2f} Mflop an example in products; two cores that do nothing else, with the faster of both: ",
        end="",
    )
    for name in ("float32", "bfloat16"):
        fastest = [
            max(each)
            for each in zip(
                *(found for by, found in speed.items() if by.endswith(name)), strict=True
            )
        ]
        print(
            f"{name} {2e9 * statistics.harmonic_mean(fastest) / FLOP:,.0f} examples/s",
            end=", " if name == "float32" else "\n",
        )
    print(f"\n\n{machine()}: python tests/bench/step.py")


def measure_systems() -> None:
    """Each number is the median of a dozen steps; other work on the machine is to be seen in it."""
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
