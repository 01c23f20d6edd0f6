"""The batches that every contender of the training cases learns, and their common options."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from answers import answer, steps
from torch import Tensor

_WARM_UP_STEPS = 3


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="directory written by zipf.write")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--embedding-dim", type=int, default=10)
    parser.add_argument("--hidden", type=int, nargs="+", default=[400, 400, 400])
    parser.add_argument("--seconds", type=float, default=4.0, help="of one repetition")
    parser.add_argument("--device", default="cpu")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    if arguments.device != "cpu":  # like ours on a GPU
        torch.set_float32_matmul_precision("high")
    return arguments


def field_sizes(data: Path) -> list[int]:
    """Return the number of rows of each field."""
    sizes: list[int] = json.loads((data / "sizes.json").read_text())
    return sizes


def batches(
    data: Path, batch: int, *, which: str = "ids", device: str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (ids int32 [B, F], labels float32 [B]) without end; they stay on the device."""
    return itertools.cycle(full_batches(data, batch, which=which, device=device))


def full_batches(
    data: Path, batch: int, *, which: str = "ids", device: str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """Return all full batches."""
    ids = torch.from_numpy(np.load(data / f"{which}.npy"))
    labels = torch.from_numpy(np.load(data / "labels.npy")).float()
    n = len(ids) - len(ids) % batch
    id_batches = ids[:n].to(device).split(batch)  # type: ignore[no-untyped-call]
    label_batches = labels[:n].to(device).split(batch)  # type: ignore[no-untyped-call]
    return list(zip(id_batches, label_batches, strict=True))


def measured(
    step: Callable[[], object],
    arguments: argparse.Namespace,
    *,
    note: str,
    count: float | None = None,
) -> None:
    """Warm up, then answer with steps that count `count` each, or else the batch size."""

    def finish() -> None:
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    for _ in range(_WARM_UP_STEPS):
        step()

    def measure() -> dict[str, float]:
        examples = count or arguments.batch
        return steps(step, examples=examples, seconds=arguments.seconds, finish=finish)

    answer(measure, note=note)
