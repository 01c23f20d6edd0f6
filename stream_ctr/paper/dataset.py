"""A log as labelled examples on disk, read once and then used many times and in any order.

The log is decoded, hashed and joined as a stream is. The directory holds

    ids.bin               int32 [N, F]
    values.bin            float32 [N, V]
    labels.bin            uint8 [N]
    time.bin              int64 milliseconds [N]
    true_probability.bin  float64 [N], NaN where it is unknown
    data.json             the metadata; it exists only when all the rest is complete

Columns are written while the log is read, and are mapped instead of loaded: the 45 million rows of
Criteo take 8 GB of disk and hardly any memory. The index of an example is its place in event-time
order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import DataError
from stream_ctr.evaluate.metrics import entropy
from stream_ctr.events.features import mix64
from stream_ctr.join.examples import Examples
from stream_ctr.learn.step import Batch

TRAINING, VALIDATION, TEST = range(3)
_SAMPLE = 3  # the salt of a sample, next to those of the parts
_HELD_OUT_SHARE = 0.1
_CHUNK_BYTES = 512 << 20
_ROWS_AT_ONCE = 1 << 20
_METADATA = "data.json"
_DTYPES: Mapping[str, npt.DTypeLike] = {
    "ids": np.int32,
    "values": np.float32,
    "labels": np.uint8,
    "time": np.int64,
    "true_probability": np.float64,
}
Rows = npt.NDArray[np.int64]


class Dataset:
    """N examples, mapped from `directory`.

    `metadata` is the content of data.json: `rows`, the widths of the columns, `identity`, and what
    the writer added. Raises `DataError` if the files do not match it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.metadata: dict[str, Any] = json.loads((directory / _METADATA).read_text())
            shapes = _shapes(
                self.metadata["rows"], self.metadata["fields"], self.metadata["value_fields"]
            )
            columns = {
                name: _map(directory / f"{name}.bin", _DTYPES[name], shape)
                for name, shape in shapes.items()
            }
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"the data in {directory} is damaged ({error}); --restart reads the log again"
            ) from None
        self.ids = columns["ids"]
        self.values = columns["values"]
        self.labels = columns["labels"]
        self.time = columns["time"]
        self.true_probability = columns["true_probability"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Rows | slice) -> Batch:
        """Return copies of ids, labels and values, as a learner takes them."""
        copied = np.copy if isinstance(rows, slice) else np.asarray  # an index by rows is a copy
        return (
            copied(self.ids[rows]),
            copied(self.labels[rows]),
            copied(self.values[rows]) if self.values.shape[1] else None,
        )

    @property
    def row_bytes(self) -> int:
        """The bytes of an example on disk."""
        return row_bytes(self.ids.shape[1], self.values.shape[1])


def row_bytes(fields: int, value_fields: int) -> int:
    """Return the bytes of an example on disk.

    >>> row_bytes(39, 0)
    173
    """
    return sum(
        np.dtype(_DTYPES[name]).itemsize * int(np.prod(shape[1:]))
        for name, shape in _shapes(1, fields, value_fields).items()
    )


def _shapes(rows: int, fields: int, value_fields: int) -> dict[str, tuple[int, ...]]:
    return {
        "ids": (rows, fields),
        "values": (rows, value_fields),
        "labels": (rows,),
        "time": (rows,),
        "true_probability": (rows,),
    }


def _map(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    mapped = np.memmap(path, dtype, "r", shape=shape) if np.prod(shape) else np.empty(shape, dtype)
    return np.asarray(mapped)  # indexing a memmap costs more than the copy of the rows


# -- writing -------------------------------------------------------------------------------------


def open_existing(directory: Path) -> Dataset | None:
    """Return the dataset that an earlier run has completed, or None.

    Raises `DataError` if the directory holds other files or the dataset is damaged.
    """
    if (directory / _METADATA).exists():
        return Dataset(directory)
    require_only_own_files(directory)
    return None


def require_only_own_files(directory: Path) -> None:
    """Raise `DataError` if the directory holds a file that this module does not write."""
    foreign = sorted(path.name for path in directory.glob("*") if not _is_own(path))
    if foreign:
        raise DataError(
            f"{directory} holds other files, such as {foreign[0]}, which are left alone: "
            "use another --out"
        )


def _is_own(path: Path) -> bool:
    own = {f"{name}.bin" for name in _DTYPES} | {_METADATA}
    return path.is_file() and (path.name in own or path.name.startswith(f".{_METADATA}."))


def remove(directory: Path) -> None:
    """Delete the dataset in `directory`, and the directory.

    Raises `DataError`, and deletes nothing, if the directory holds other files.
    """
    require_only_own_files(directory)
    for path in directory.glob("*"):
        path.unlink()
    if directory.is_dir():
        directory.rmdir()


def write(
    directory: Path,
    examples: Iterable[Examples],
    *,
    identity: Mapping[str, Any],
    limit: int | None = None,
    describe: Callable[[], Mapping[str, Any]] = dict,
) -> Dataset:
    """Write the first `limit` examples as columns into `directory` and return them.

    The directory appears when everything is written, not before. `describe` is called after the
    last example; its result is kept in the metadata next to `identity`. Raises `DataError` if a
    file cannot be written.
    """
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        widths = _write_columns(unfinished, examples, limit)
    except OSError as error:
        raise DataError(f"cannot write {unfinished}: {error.strerror}") from None
    write_json(unfinished / _METADATA, {**widths, "identity": dict(identity), **describe()})
    os.replace(unfinished, directory)
    return Dataset(directory)


def _write_columns(
    directory: Path, examples: Iterable[Examples], limit: int | None
) -> dict[str, int]:
    """Write the columns and return the number of rows and the widths."""
    files: dict[str, IO[bytes]] = {name: (directory / f"{name}.bin").open("wb") for name in _DTYPES}
    rows = 0
    fields = 0
    value_fields = 0
    try:
        for part in examples:
            part = part if limit is None else part[: limit - rows]
            rows += len(part)
            fields = part.ids.shape[1]
            value_fields = part.values.shape[1]
            _append(files, part)
            if rows == limit:
                break
    finally:
        for file in files.values():
            file.close()
    return {"rows": rows, "fields": fields, "value_fields": value_fields}


def _append(files: Mapping[str, IO[bytes]], examples: Examples) -> None:
    columns = {
        "ids": examples.ids,
        "values": examples.values,
        "labels": examples.label,
        "time": examples.time,
        "true_probability": examples.true_probability,
    }
    for name, column in columns.items():
        files[name].write(np.ascontiguousarray(column, _DTYPES[name]).data)


def write_json(path: Path, content: object) -> None:
    """Write `content` so that the file is complete or absent, whenever the process ends."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False))
    os.replace(unfinished, path)


# -- split ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """The part that each example belongs to, uint8 [N].

    `TEST` is a tenth, `VALIDATION` a tenth of the rest, `TRAINING` what remains. A random split
    hashes the index of an example with the seed, so that every machine gets the same parts. A split
    by time takes the last examples in event-time order.

    >>> split = Split.of(1000, "time")
    >>> [split.count(part) for part in (TRAINING, VALIDATION, TEST)]
    [810, 90, 100]
    >>> split.rows(TEST)[[0, -1]].tolist()
    [900, 999]
    """

    part: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, rows: int, how: str, *, seed: int = 0) -> Split:
        """Return the split of `rows` examples; `how` is "random" or "time"."""
        part = np.full(rows, TRAINING, np.uint8)
        if how == "time":
            test = rows - round(rows * _HELD_OUT_SHARE)
            part[test - round(test * _HELD_OUT_SHARE) :] = VALIDATION
            part[test:] = TEST
        else:
            for start in range(0, rows, _ROWS_AT_ONCE):
                index = np.arange(start, min(start + _ROWS_AT_ONCE, rows), dtype=np.uint64)
                chunk = part[start : start + len(index)]
                chunk[_sampled(index, seed, VALIDATION)] = VALIDATION
                chunk[_sampled(index, seed, TEST)] = TEST
        return cls(part)

    def rows(
        self, part: int, start: int = 0, stop: int | None = None, *, share: float = 1.0
    ) -> Rows:
        """Return the indices of a part's examples in [start, stop), ascending.

        With a `share` below 1 they are those of a sample, which is the same in every call.
        """
        rows = start + np.flatnonzero(self.part[start:stop] == part)
        return rows if share >= 1.0 else rows[_sampled(rows.astype(np.uint64), 0, _SAMPLE, share)]

    def count(self, part: int, share: float = 1.0) -> int:
        """Return the number of examples in a part, or in the sample of it."""
        if share >= 1.0:
            return int(np.count_nonzero(self.part == part))
        return sum(
            len(self.rows(part, start, start + _ROWS_AT_ONCE, share=share))
            for start in range(0, len(self.part), _ROWS_AT_ONCE)
        )


def _sampled(
    index: npt.NDArray[np.uint64], seed: int, salt: int, share: float = _HELD_OUT_SHARE
) -> npt.NDArray[np.bool_]:
    """Return which examples belong to a sample, independently for each seed and salt."""
    mixed_salt = mix64(np.array([seed * 4 + salt + 1], np.uint64))
    return mix64(mix64(index + np.uint64(1)) ^ mixed_salt) < np.uint64(int(share * 2.0**64))


def shuffled(
    split: Split,
    part: int,
    *,
    seed: tuple[int, ...],
    batch_size: int,
    row_bytes: int,
    share: float = 1.0,
) -> Iterator[Rows]:
    """Yield the indices of a part's examples, or of a sample of them, in shuffled batches.

    Each seed gives another order. Chunks of half a gigabyte come in random order and are shuffled
    within, so that a chunk bounds the memory; data of one chunk is shuffled as a whole. The last
    batch may be short.
    """
    rng = np.random.default_rng(seed)
    length = max(1, _CHUNK_BYTES // row_bytes)
    starts = np.arange(0, len(split.part), length)
    rest = np.empty(0, np.int64)
    for start in rng.permutation(starts).tolist():
        chunk = rng.permutation(split.rows(part, start, start + length, share=share))
        rows = np.concatenate([rest, chunk])
        full = len(rows) - len(rows) % batch_size
        yield from (rows[first : first + batch_size] for first in range(0, full, batch_size))
        rest = rows[full:]
    if len(rest):
        yield rest


def reference_loglosses(data: Dataset, split: Split) -> dict[str, float | None]:
    """Return the loglosses to compare those of the test part with.

    They are that of the true probabilities, None if these are unknown, and that of the best
    constant.
    """
    rows = split.rows(TEST)
    labels = np.array(data.labels[rows])
    p = np.array(data.true_probability[rows])
    p_of_label = np.where(labels == 1, p, 1.0 - p)
    unknown = np.isnan(p).any()
    best = None if unknown else float(-np.log(np.maximum(p_of_label, 1e-15)).mean())
    return {"best_possible_logloss": best, "constant_logloss": entropy(float(labels.mean()))}
