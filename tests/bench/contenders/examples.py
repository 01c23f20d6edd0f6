"""Batches of the examples that every contender of the training cases learns, and the options of such a contender."""

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
    parser.add_argument("--data", type=Path, required=True, help="what zipf.write has written")
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
    if arguments.device != "cpu":  # as ours has it on a GPU
        torch.set_float32_matmul_precision("high")
    return arguments


def field_sizes(data: Path) -> list[int]:
    sizes: list[int] = json.loads((data / "sizes.json").read_text())
    return sizes


def batches(
    data: Path, batch: int, *, which: str = "ids", device: str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids int32 [B, F], labels float32 [B]), again and again; on the device from the start."""
    return itertools.cycle(each(data, batch, which=which, device=device))


def each(
    data: Path, batch: int, *, which: str = "ids", device: str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    ids, labels = (
        torch.from_numpy(np.load(data / f"{which}.npy")),
        torch.from_numpy(np.load(data / "labels.npy")).float(),
    )
    whole = len(ids) - len(ids) % batch
    return list(
        zip(
            ids[:whole].to(device).split(batch), labels[:whole].to(device).split(batch), strict=True
        )
    )


def measured(
    step: Callable[[], object],
    arguments: argparse.Namespace,
    *,
    note: str,
    count: float | None = None,
) -> None:
    """Warm up, then answer with steps of `count` things each, of a batch of examples unless told."""

    def finish() -> None:
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    for _ in range(_WARM_UP_STEPS):
        step()
    answer(
        lambda: steps(
            step, examples=count or arguments.batch, seconds=arguments.seconds, finish=finish
        ),
        note=note,
    )
