"""A log as labelled examples on disk: read once as a stream is, joined and hashed, then used any number of times and in any order.

    DIR/data/   ids.bin int32 [N, F] · values.bin float32 [N, V] · labels.bin uint8 [N] · time.bin int64 ms [N]
                true_probability.bin float64 [N] (NaN: unknown) · data.json, written last: without it the rest is not there

Columns are written while the log is read and mapped, not loaded: Criteo's 45 million rows take 8 GB of disk and hardly any memory. An
example's index is its place in event-time order.
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
from stream_ctr.join.joiner import Examples
from stream_ctr.learn.step import Batch

TRAINING, VALIDATION, TEST = range(3)
_SAMPLE = 3
_HELD_OUT = 0.1
_CHUNK_BYTES = 512 << 20
_MANY = 1 << 20
_ABOUT = "data.json"
_DTYPES: Mapping[str, npt.DTypeLike] = {
    "ids": np.int32, "values": np.float32, "labels": np.uint8, "time": np.int64, "true_probability": np.float64,
}  # fmt: skip
Rows = npt.NDArray[np.int64]


class Dataset:
    """N examples, mapped from `directory`. `about` is what was written with them: `rows`, the widths of columns, `identity` and more.

    Raises `DataError` when the files are not as they were written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.about: dict[str, Any] = json.loads((directory / _ABOUT).read_text())
            shapes = _shapes(self.about["rows"], self.about["fields"], self.about["value_fields"])
            columns = {
                name: _mapped(directory / f"{name}.bin", _DTYPES[name], shape)
                for name, shape in shapes.items()
            }
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"what was read before into {directory} is damaged ({error}); --restart reads it again"
            ) from None
        self.ids, self.values, self.labels = columns["ids"], columns["values"], columns["labels"]
        self.time, self.true_probability = columns["time"], columns["true_probability"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Rows | slice) -> Batch:
        """Copies of ids, labels and values, as a learner takes them."""
        copied = np.copy if isinstance(rows, slice) else np.asarray  # an index by rows is a copy
        return (
            copied(self.ids[rows]),
            copied(self.labels[rows]),
            copied(self.values[rows]) if self.values.shape[1] else None,
        )

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.ids.shape[1], self.values.shape[1])


def row_bytes(fields: int, value_fields: int) -> int:
    """On disk, of an example.

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


def _mapped(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    mapped = np.memmap(path, dtype, "r", shape=shape) if np.prod(shape) else np.empty(shape, dtype)
    return np.asarray(mapped)  # indexing a memmap costs more than what is indexed


# -- made once -----------------------------------------------------------------------------------


def existing(directory: Path) -> Dataset | None:
    """What an earlier run has written completely. Raises `DataError` when there is something else instead."""
    if (directory / _ABOUT).exists():
        return Dataset(directory)
    require_own(directory)
    return None


def require_own(directory: Path) -> None:
    """Raises `DataError` when there is something in it that is none of the files which are written here."""
    if foreign := sorted(path.name for path in directory.glob("*") if not _is_own(path)):
        raise DataError(
            f"{directory} holds other files, such as {foreign[0]}, and they are left alone: use another --out"
        )


def _is_own(path: Path) -> bool:
    own = {f"{name}.bin" for name in _DTYPES} | {_ABOUT}
    return path.is_file() and (path.name in own or path.name.startswith(f".{_ABOUT}."))


def remove(directory: Path) -> None:
    """What was written here. Raises `DataError`, with nothing removed, when there is something else."""
    require_own(directory)
    for path in directory.glob("*"):
        path.unlink()
    if directory.is_dir():
        directory.rmdir()


def write(
    directory: Path, examples: Iterable[Examples], *, identity: Mapping[str, Any], limit: int | None = None,
    about: Callable[[], Mapping[str, Any]] = dict,
) -> Dataset:  # fmt: skip
    """The first `limit` of `examples` as columns in `directory`, which is there when all is written and not before. What `about` says when
    all is read is kept with them."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        widths = _write_columns(unfinished, examples, limit)
    except OSError as error:
        raise DataError(f"cannot write {unfinished}: {error.strerror}") from None
    write_json(unfinished / _ABOUT, {**widths, "identity": dict(identity), **about()})
    os.replace(unfinished, directory)
    return Dataset(directory)


def _write_columns(
    directory: Path, examples: Iterable[Examples], limit: int | None
) -> dict[str, int]:
    files: dict[str, IO[bytes]] = {name: (directory / f"{name}.bin").open("wb") for name in _DTYPES}
    rows = fields = value_fields = 0
    try:
        for part in examples:
            part = part if limit is None else part[: limit - rows]
            (fields, value_fields), rows = (
                (part.ids.shape[1], part.values.shape[1]),
                rows + len(part),
            )
            columns = {
                "ids": part.ids,
                "values": part.values,
                "labels": part.label,
                "time": part.time,
            }
            for name, column in {**columns, "true_probability": part.true_probability}.items():
                files[name].write(np.ascontiguousarray(column, _DTYPES[name]).data)
            if rows == limit:
                break
    finally:
        for file in files.values():
            file.close()
    return {"rows": rows, "fields": fields, "value_fields": value_fields}


def write_json(path: Path, content: object) -> None:
    """All of it or nothing, whenever the process ends."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False))
    os.replace(unfinished, path)


# -- split ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """Which part each example belongs to, uint8 [N]: `TRAINING`, `VALIDATION` (a tenth of what is not test) or `TEST` (a tenth).

    `random` goes by a hash of the example's index and the seed, so that the same examples are in it on any machine; `time` takes the last
    in event time.

    >>> split = Split.of(1000, "time")
    >>> [split.count(part) for part in (TRAINING, VALIDATION, TEST)], split.rows(TEST)[[0, -1]].tolist()
    ([810, 90, 100], [900, 999])
    """

    part: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, rows: int, how: str, *, seed: int = 0) -> Split:
        part = np.full(rows, TRAINING, np.uint8)
        if how == "time":
            test = rows - round(rows * _HELD_OUT)
            part[test - round(test * _HELD_OUT) :] = VALIDATION
            part[test:] = TEST
        else:
            for start in range(0, rows, _MANY):
                index = np.arange(start, min(start + _MANY, rows), dtype=np.uint64)
                part[start : start + len(index)][_chosen(index, seed, VALIDATION)] = VALIDATION
                part[start : start + len(index)][_chosen(index, seed, TEST)] = TEST
        return cls(part)

    def rows(
        self, part: int, start: int = 0, stop: int | None = None, *, share: float = 1.0
    ) -> Rows:
        """Indices of its examples, ascending; with a `share` those of a sample, which is the same whenever it is asked for."""
        rows = start + np.flatnonzero(self.part[start:stop] == part)
        return rows if share >= 1.0 else rows[_chosen(rows.astype(np.uint64), 0, _SAMPLE, share)]

    def count(self, part: int, share: float = 1.0) -> int:
        """How many there are, or there are in the sample."""
        if share >= 1.0:
            return int(np.count_nonzero(self.part == part))
        return sum(
            len(self.rows(part, start, start + _MANY, share=share))
            for start in range(0, len(self.part), _MANY)
        )


def _chosen(
    index: npt.NDArray[np.uint64], seed: int, part: int, share: float = _HELD_OUT
) -> npt.NDArray[np.bool_]:
    """Of each its own share of them, whichever are in the others."""
    salt = mix64(np.array([seed * 4 + part + 1], np.uint64))
    return mix64(mix64(index + np.uint64(1)) ^ salt) < np.uint64(int(share * 2.0**64))


def shuffled(
    split: Split,
    part: int,
    *,
    seed: tuple[int, ...],
    batch_size: int,
    row_bytes: int,
    share: float = 1.0,
) -> Iterator[Rows]:
    """The indices of a part's examples, or of a sample of them, in batches, in an order that is another one for each seed.

    Chunks of the data, as many rows as half a gigabyte holds, come in random order and are shuffled within, so that memory is bounded by
    a chunk; data of one chunk are shuffled as a whole. The last batch may be short.
    """
    rng = np.random.default_rng(seed)
    length = max(1, _CHUNK_BYTES // row_bytes)
    starts = np.arange(0, len(split.part), length)
    rest = np.empty(0, np.int64)
    for start in rng.permutation(starts).tolist():
        rows = np.concatenate(
            [rest, rng.permutation(split.rows(part, start, start + length, share=share))]
        )
        whole = len(rows) - len(rows) % batch_size
        yield from (rows[at : at + batch_size] for at in range(0, whole, batch_size))
        rest = rows[whole:]
    if len(rest):
        yield rest


def about_test(data: Dataset, split: Split) -> dict[str, float | None]:
    """What the loglosses of the test part are to be compared with: that of the best constant and that of the true probabilities, None
    where they are unknown."""
    rows = split.rows(TEST)
    labels, p = np.array(data.labels[rows]), np.array(data.true_probability[rows])
    of_label = np.where(labels == 1, p, 1.0 - p)
    best = None if np.isnan(p).any() else float(-np.log(np.maximum(of_label, 1e-15)).mean())
    return {"best_possible_logloss": best, "constant_logloss": entropy(float(labels.mean()))}
