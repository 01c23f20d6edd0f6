"""Trainers over small logs in memory, and comparisons of what they leave."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stream_ctr.cli.assembly import MakeFront, build_trainer
from stream_ctr.config import load
from stream_ctr.connectors import Records
from stream_ctr.events.field import Field
from stream_ctr.events.fit import NOTHING, Fitted
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.delta_writer import Outlet
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.train.report import to_json_object
from stream_ctr.train.trainer import Surroundings, Trainer

SIMULATED_FIELDS = Simulation(1, seed=0).fields or ()
Sections = dict[str, Any]
SMALL: Sections = {
    "input": {"read_ahead": 0},  # these tests steer the trainer by its polls
    "model": {"name": "deepfm", "hidden": (16, 16), "embedding_dim": 4, "table_bits": 12},
    # Batches of one size, which these tests count.
    "learn": {"batch_size": 128, "threads": 1, "table_optimizer": "adagrad"},
    "join": {"label_window": "60s"},
    "metrics": {"window": "60s"},
    # Its process takes a second to start; tests that need it ask for it.
    "baseline": {"enabled": False},
}
RIVER: Sections = {"baseline": {"enabled": True}}


class Partitions:
    """A log of several partitions, polled in chunks of less than `largest` that a seed decides.

    After `stop_after` records the trainer is stopped.
    """

    until_end = True

    def __init__(
        self,
        values: Sequence[pa.LargeBinaryArray],
        *,
        seed: int = 0,
        stop_after: int | None = None,
        largest: int = 400,
    ) -> None:
        self.partitions = tuple(("clicks", index) for index in range(len(values)))
        self._values = values
        self._at = [0] * len(values)
        self._rng = np.random.default_rng(seed)
        self._paused: frozenset[int] = frozenset()
        self._left = stop_after
        self._largest = largest
        self._own = np.ones(len(values), np.bool_)
        self.committed: dict[int, int] = {}
        self.trainer: Trainer | None = None

    @property
    def finished(self) -> bool:
        return bool(self.caught_up().all())

    def caught_up(self) -> np.ndarray:
        read = [at >= len(values) for at, values in zip(self._at, self._values, strict=True)]
        return np.array(read) | ~self._own

    def poll(self, timeout_seconds: float) -> Records:
        parts = []
        for p in self._rng.permutation(len(self._values)).tolist():
            if p in self._paused or not self._own[p]:
                continue
            n = int(min(self._rng.integers(1, self._largest), len(self._values[p]) - self._at[p]))
            offset = np.arange(self._at[p], self._at[p] + n)
            parts.append((np.full(n, p, np.int32), offset, self._values[p].slice(self._at[p], n)))
            self._at[p] += n
            if self._left is not None:
                self._left -= n
        if self._left is not None and self._left <= 0 and self.trainer:
            self.trainer.stop()
        n = sum(len(offset) for _, offset, _ in parts)
        if not n:
            return Records.empty()
        value = pa.concat_arrays([v for _, _, v in parts])
        return Records(
            np.concatenate([p for p, _, _ in parts]),
            np.concatenate([o for _, o, _ in parts]),
            np.full(n, -1),
            value,
        )

    def positions(self) -> dict[int, int]:
        return dict(enumerate(self._at))

    def seek(self, positions: Mapping[int, int]) -> None:
        for p, at in positions.items():
            self._at[p] = at

    def divide(self, own: Collection[int]) -> None:
        self._own[:] = False
        self._own[list(own)] = True

    def pause(self, partitions: frozenset[int]) -> None:
        self._paused = partitions

    def lag(self) -> int:
        return 0

    def silent_seconds(self) -> float:
        return 0.0

    def lost(self) -> dict[int, int]:
        return {}

    def leader_epochs(self) -> dict[int, int]:
        return {}

    def expect_epochs(self, leader_epochs: Mapping[int, int]) -> None:
        pass

    def topic_ids(self) -> dict[str, str | None]:
        return {}

    def commit(self, positions: Mapping[int, int]) -> None:
        self.committed = dict(positions)


@pytest.fixture(scope="module")
def stream() -> pa.LargeBinaryArray:
    return pa.concat_arrays([batch.value for batch in Simulation(6000, seed=3).batches()])


def split(stream: pa.LargeBinaryArray, partitions: int) -> list[pa.LargeBinaryArray]:
    """Split records by number: a click is seldom in the partition of its impression."""
    at = np.arange(len(stream))
    return [stream.take(pa.array(at[at % partitions == p])) for p in range(partitions)]


def trainer(
    directory: Path,
    source: Any,
    *,
    fields: Sequence[Field] = SIMULATED_FIELDS,
    surroundings: Surroundings | None = None,
    in_event_time: bool = False,
    keep_open: bool = False,
    predictions: Path | None = None,
    sink: Any = None,
    fitted: Fitted = NOTHING,
    delta_outlets: Sequence[Outlet] = (),
    front: MakeFront | None = None,
    **sections: Any,
) -> Trainer:
    """Build a small trainer; `sections` are those of the configuration."""
    directory.mkdir(exist_ok=True)
    config = load(environ={}, overrides={**SMALL, **sections})
    built = build_trainer(
        config,
        fields=fields,
        source=source,
        publisher=Publisher(directory, sink=sink),
        directory=directory,
        surroundings=surroundings,
        in_event_time=in_event_time,
        keep_open=keep_open,
        predictions=predictions,
        fitted=fitted,
        delta_outlets=delta_outlets,
        front=front,
    )
    source.trainer = built
    return built


def finish(built: Trainer) -> dict[str, Any]:
    """Run to the end; the last report as a JSON object."""
    try:
        return to_json_object(built.run())
    finally:
        if built.baseline:
            built.baseline.close()


def final_state(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    newest = snapshot.newest(directory / "snapshots")
    assert newest
    _, tensors = snapshot.load(newest)
    return tensors


def assert_equal_states(one: Path, other: Path) -> None:
    """Assert that the newest snapshots hold the same state, except for what was served.

    A run that stops publishes once more, so its successor serves something else.
    """
    a, b = (
        {
            stem: {name: tensors[name] for name in tensors if not name.startswith("served.")}
            for stem, tensors in final_state(directory).items()
            if not stem.startswith("served.")
        }
        for directory in (one, other)
    )
    for stem in sorted({*a, *b} - {"examples"}):
        assert a[stem].keys() == b[stem].keys(), stem
        for name in a[stem]:
            assert np.array_equal(a[stem][name], b[stem][name]), f"{stem} {name}"
