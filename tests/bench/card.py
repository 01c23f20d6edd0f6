"""What to measure first on a machine with a GPU. `make card` runs all of it.

    python tests/bench/card.py repeat aligned rows copy

    repeat    10,000 steps twice, from the same start: are the models equal, bit for bit?
    steps     20 steps on batches of 4,096 examples, for nsys: the gap between graphs, their nodes
    aligned   the first layer of the paper's network with rows of 390 numbers and of 392
    rows      a step at 2^20 rows, which nearly fit the cache of an H100, at 2^26 and at 2^27
    copy      the copy of a table of 2^26 rows to the host, as a snapshot makes it: to pinned memory
              and to other memory

Prints one JSON object a line, with the card, the release of torch and the commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stream_ctr.learn.device import choose_device
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import LearnerSpec

FIELDS = 39
Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], None]
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Card:
    """A device; with `quick`, sizes are small enough for a test on a CPU."""

    device: torch.device
    quick: bool = False

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def wait(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Return the time of one of `repeats` calls, after a few others."""
        for _ in range(3):
            call()
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats


def learner(card: Card, *, bits: int, batch: int, optimizer: str = "online") -> NetworkLearner:
    """Return the paper's DeepFM."""
    optimizers: Any = optimizer
    spec = LearnerSpec(
        fields=FIELDS,
        table_bits=bits,
        batch_size=batch,
        table_optimizer=optimizers,
        precision="bf16" if card.device.type == "cuda" else "fp32",
        hidden=(16,) if card.quick else (400, 400, 400),
    )
    return NetworkLearner(spec, device=str(card.device))


def batches(count: int, size: int, *, bits: int) -> list[Batch]:
    """Return batches whose ids have a few hot rows and a long tail."""
    rng = np.random.default_rng(0)
    return [
        (
            (rng.zipf(1.2, (size, FIELDS)) % (1 << bits)).astype(np.int32),
            rng.integers(0, 2, size).astype(np.uint8),
            None,
        )
        for _ in range(count)
    ]


def repeat(card: Card) -> Iterator[Facts]:
    bits, size = card.size(20, 8), card.size(4096, 16)
    kept = batches(16, size, bits=bits)
    for optimizer in ("online", "adagrad", "adam"):
        states = []
        for _ in range(2):
            made = learner(card, bits=bits, batch=size, optimizer=optimizer)
            for step in range(card.size(10_000, 3)):
                made.learn(*kept[step % 16], following=kept[(step + 1) % 16])
            states.append(made.weights() | made.optimizer_state())
        first, second = states
        different = [
            name for name, array in first.items() if not np.array_equal(array, second[name])
        ]
        yield {"optimizer": optimizer, "equal": not different, "different": different}


def steps(card: Card) -> Iterator[Facts]:
    yield {"seconds": step_seconds(card, bits=card.size(20, 8), size=card.size(4096, 16), count=20)}


def step_seconds(card: Card, *, bits: int, size: int, count: int) -> float:
    """Return the time of one of `count` steps."""
    made = learner(card, bits=bits, batch=size)
    kept = batches(8, size, bits=bits)
    numbers = iter(range(1 << 30))

    def step() -> None:
        number = next(numbers)
        made.learn(*kept[number % 8], following=kept[(number + 1) % 8])

    return card.seconds(step, count)


def aligned(card: Card) -> Iterator[Facts]:
    for inputs in (390, 392):
        for size in (4096, 65_536):
            batch = card.size(size, 16)
            yield {"inputs": inputs, "batch": batch, **product_seconds(card, inputs, batch)}


def product_seconds(card: Card, inputs: int, batch: int) -> Facts:
    """Return the times of a layer's three products, from `inputs` to 400 numbers."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=card.device)

    x, weight, dz = random(batch, inputs), random(400, inputs), random(batch, 400)
    return {
        "forward_seconds": card.seconds(lambda: x @ weight.t(), 100),
        "to_the_input_seconds": card.seconds(lambda: dz @ weight, 100),
        "to_the_weight_seconds": card.seconds(lambda: dz.t() @ x, 100),
    }


def rows(card: Card) -> Iterator[Facts]:
    for bits in (card.size(each, 8) for each in (20, 26, 27)):
        for size in (card.size(each, 16) for each in (4096, 65_536)):
            seconds = step_seconds(card, bits=bits, size=size, count=card.size(50, 2))
            yield {
                "bits": bits,
                "batch": size,
                "seconds": seconds,
                "examples_per_second": size / seconds,
            }


def copy(card: Card) -> Iterator[Facts]:
    made = learner(card, bits=card.size(26, 8), batch=16)
    for name, call in (
        ("pinned", lambda: made.weights(reuse=True)),
        ("other", lambda: made.table.rows.to("cpu", copy=True)),
    ):
        yield {"memory": name, "seconds": card.seconds(call, card.size(5, 2))}


CASES: dict[str, Callable[[Card], Iterator[Facts]]] = {
    case.__name__: case for case in (repeat, steps, aligned, rows, copy)
}


def machine(card: Card) -> Facts:
    is_gpu = card.device.type == "cuda"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "card": torch.cuda.get_device_name(card.device) if is_gpu else "none: the CPU",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=sorted(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to test the cases")
    arguments = parser.parse_args()
    card = Card(choose_device(arguments.device), arguments.quick)
    described = machine(card)
    for name in arguments.cases:
        for facts in CASES[name](card):
            print(json.dumps({"case": name, **facts, **described}), flush=True)


if __name__ == "__main__":
    main()
