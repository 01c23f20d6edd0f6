"""Logs cut from one stream, and runs that read them one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stream_ctr.connectors.memory import BatchSource
from stream_ctr.snapshots import snapshot
from stream_ctr.train.inputs import Inputs
from stream_ctr.train.resume import continued
from stream_ctr.train.source import Source
from support.trainers import Sections, final_state, finish, trainer


class Died(Exception):
    """The process dies here, and writes nothing more."""


class Cut(BatchSource):
    """A part of a stream as a log, polled in chunks of sizes that a seed decides.

    The first time that the record `dies_at` comes next, the run dies.
    """

    def __init__(
        self, name: str, values: pa.LargeBinaryArray, *, seed: int = 0, dies_at: int | None = None
    ) -> None:
        self.dies_at = dies_at
        self.length = len(values)

        def batches() -> Iterator[pa.LargeBinaryArray]:
            rng = np.random.default_rng(seed)
            at = 0
            while at < len(values):
                if self.dies_at is not None and at >= self.dies_at:
                    self.dies_at = None
                    raise Died
                chunk = values[at : at + int(rng.integers(1, 400))]
                yield chunk
                at += len(chunk)

        super().__init__(batches, name=name)


def cuts(stream: pa.LargeBinaryArray, at: Sequence[int], *, seed: int = 0) -> list[Cut]:
    """Cut a stream at these records into logs, which are named by their numbers."""
    bounds = itertools.pairwise([0, *at, len(stream)])
    return [
        Cut(f"log{number}", stream[first:end], seed=seed + number)
        for number, (first, end) in enumerate(bounds)
    ]


def learn(
    state: Path, sources: Sequence[Source], *, keep_open: bool = False, **options: Any
) -> dict[str, Any]:
    """Learn these inputs in a state directory, or go on with them; return the last report."""
    newest = snapshot.newest(state / "snapshots")
    manifest = snapshot.read_manifest(newest) if newest else None
    inputs: Inputs = continued(sources, manifest, newest)
    built = trainer(state, inputs, keep_open=keep_open, **options)
    if newest:
        built.restore(newest)
    return finish(built)


def learned(state: Path, sections: Sections | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Return the state in the newest snapshot, without what names the inputs.

    The last verdict depends on how far the input was read ahead.
    """
    return {
        stem: {
            name: array
            for name, array in tensors.items()
            if not name.startswith("watermarks.") and name != "judge.clicks"
        }
        for stem, tensors in final_state(state).items()
    }


def assert_equally_learned(one: Path, other: Path) -> None:
    a, b = learned(one), learned(other)
    assert a.keys() == b.keys()
    for stem in a:
        assert a[stem].keys() == b[stem].keys(), stem
        for name in a[stem]:
            assert np.array_equal(a[stem][name], b[stem][name]), f"{stem} {name}"
