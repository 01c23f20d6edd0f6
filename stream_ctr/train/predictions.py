"""Predictions: a row for each learned example, in Parquet parts, so that people can check metrics.

    predictions/00000012-000000040960-000000081920.parquet      sequence, first example, end

A part holds the examples between two snapshots and is written before the second one becomes
visible. A run that resumes from a snapshot removes the parts beyond it and writes them again, so
each example is in exactly one part, also after `kill -9`.

| column | contents |
|---|---|
| `id_hash` | uint64, `features.hash_ids` of the impression id |
| `event_time` | timestamp in milliseconds, UTC |
| `label` | uint8, 1 for a click |
| `true_probability` | float64, null where it is unknown |
| `progressive.<model>` | float64, the probability from before the example was learned |
| `served.<model>` | float64, the probability that was served |

A probability is null where the model did not predict the example.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stream_ctr.errors import ConfigError
from stream_ctr.evaluate.metrics import probabilities
from stream_ctr.failpoint import failpoint
from stream_ctr.snapshots.files import sync_directory
from stream_ctr.train.scoring import LearnedBatch

_log = logging.getLogger(__name__)
_TEMPORARY = "tmp-"
_NAME = re.compile(r"(\d{8,})-(\d{12,})-(\d{12,})\.parquet")
_ROW_GROUP = 1 << 18  # rows that wait in memory
_STATE = b"stream_ctr.state"


class _Part:
    """An unfinished part: rows in a temporary file, and the newest ones in memory."""

    def __init__(self, directory: Path, schema: pa.Schema, first: int) -> None:
        self.first = first
        self.end = first
        self._schema = schema
        self._path = directory / f"{_TEMPORARY}{first:012d}.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[pa.RecordBatch] = []
        self._count = 0

    def add(self, rows: pa.RecordBatch) -> None:
        self._rows.append(rows)
        self._count += len(rows)
        self.end += len(rows)
        if self._count >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._writer:
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd")
        self._writer.write_table(pa.Table.from_batches(self._rows, schema=self._schema))
        self._rows = []
        self._count = 0

    def finish(self, sequence: int) -> None:
        """Give the part its name, when all of it is on disk."""
        if self.end == self.first:
            return
        if self._rows:
            self._flush()
        assert self._writer
        self._writer.close()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        failpoint("predictions.before")
        name = f"{sequence:08d}-{self.first:012d}-{self.end:012d}.parquet"
        os.rename(self._path, self._path.with_name(name))
        sync_directory(self._path.parent)
        failpoint("predictions.after")


class PredictionLog:
    """Write the predictions of `models`, and those of `served` as they were served.

    `directory` belongs to the run in the state directory `state`. Every method raises `ConfigError`
    if it cannot be written to; the run then ends, and goes on from its newest snapshot. So does the
    constructor if the directory holds the predictions of another run.
    """

    def __init__(
        self, directory: Path, *, state: Path, models: Sequence[str], served: Sequence[str] = ()
    ) -> None:
        self._directory = directory
        self._state = os.path.realpath(state).encode()
        self._schema = _schema(models, served).with_metadata({_STATE: self._state})
        with self._writing():
            directory.mkdir(parents=True, exist_ok=True)
        self._part = _Part(directory, self._schema, 0)
        self._sealed: list[_Part] = []
        self._sequence = 0
        for _, path in self._parts():
            self._require_own(path)

    def begin(self, examples: int) -> None:
        """Begin after so many examples, and remove what was written beyond them."""
        with self._writing():
            for path in self._directory.glob(f"{_TEMPORARY}*.parquet"):
                path.unlink()
            for end, path in self._parts():
                if end > examples:
                    _log.info("predictions in %s are written again", path)
                    path.unlink()
        self._part = _Part(self._directory, self._schema, examples)
        self._sealed = []

    def add(self, learned: LearnedBatch) -> None:
        """Add the predictions of a scored batch."""
        columns: dict[str, npt.NDArray[np.generic] | pa.Array] = {
            "id_hash": learned.id_hash,
            "event_time": learned.time,
            "label": learned.label,
            "true_probability": _with_nulls(learned.true_probability),
        }
        for name in self._schema.names[len(columns) :]:
            kind, _, model = name.partition(".")
            logits = _served(learned, model) if kind == "served" else _progressive(learned, model)
            columns[name] = _with_nulls(probabilities(logits.astype(np.float64)))
        arrays = [
            pa.array(column).cast(field.type)
            for field, column in zip(self._schema, columns.values(), strict=True)
        ]
        with self._writing():
            self._part.add(pa.record_batch(arrays, schema=self._schema))

    def seal(self, sequence: int) -> None:
        """Make the rows so far the part of the snapshot with this number."""
        self._sealed.append(self._part)
        self._sequence = sequence
        self._part = _Part(self._directory, self._schema, self._part.end)

    def write(self) -> None:
        """Write what was sealed. The thread that writes snapshots calls it."""
        with self._writing():
            while self._sealed:
                self._sealed[0].finish(self._sequence)
                del self._sealed[0]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"cannot write predictions to {self._directory}: {error.strerror or error}"
            ) from error

    def _parts(self) -> Iterator[tuple[int, Path]]:
        """Yield the end of each part and its path."""
        with self._writing():
            paths = sorted(self._directory.iterdir())
        for path in paths:
            if match := _NAME.fullmatch(path.name):
                yield int(match[3]), path

    def _require_own(self, path: Path) -> None:
        try:
            owner = (pq.read_schema(path).metadata or {}).get(_STATE)
        except (OSError, pa.ArrowInvalid) as error:
            raise ConfigError(f"{path} is not a part of predictions: {error}") from None
        if owner != self._state:
            raise ConfigError(
                f"{path.parent} holds the predictions of another run, "
                f"that in {(owner or b'?').decode(errors='replace')}; use another directory"
            )


def _schema(models: Sequence[str], served: Sequence[str]) -> pa.Schema:
    return pa.schema(
        [
            ("id_hash", pa.uint64()),
            ("event_time", pa.timestamp("ms", "UTC")),
            ("label", pa.uint8()),
            ("true_probability", pa.float64()),
            *((f"progressive.{model}", pa.float64()) for model in models),
            *((f"served.{model}", pa.float64()) for model in served),
        ]
    )


def _served(learned: LearnedBatch, model: str) -> npt.NDArray[np.floating]:
    """Return the logits [n] that a model was served with, NaN where it was not."""
    return learned.served.get(model, np.full(len(learned.time), np.nan, np.float32))


def _progressive(learned: LearnedBatch, model: str) -> npt.NDArray[np.floating]:
    """Return the progressive logits [n] of a model, NaN where it has none."""
    if model not in learned.logits:
        return np.full(len(learned.time), np.nan)
    if model not in learned.chosen:
        return learned.logits[model]
    logits = np.full(len(learned.time), np.nan)
    logits[learned.chosen[model]] = learned.logits[model]
    return logits


def _with_nulls(column: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(column, mask=np.isnan(column))
