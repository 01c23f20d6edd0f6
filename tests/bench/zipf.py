"""Hashed examples: 39 fields with the cardinalities of the Criteo log and Zipf-distributed values.

Labels come from a linear model. Every contender learns the same examples. A contender with one
table for all fields reads `ids` [n, F], scattered over the rows as a hash scatters them. One with a
table for each field reads `local` [n, F], indices into tables of `sizes` rows. The sizes sum to the
number of rows of the one table.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv

NUMERIC = (40,) * 13  # buckets of a number, two for each power of two
CATEGORICAL = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
FIELDS = len(NUMERIC) + len(CATEGORICAL)
_EXPONENT = 1.05
_SHIFT = 2.0
_WEIGHT_SCALE = 0.2
_BIAS = -1.5


def sizes(rows: int) -> npt.NDArray[np.int64]:
    """Return the rows of each field [F]: its cardinality, capped so that they sum to `rows`.

    >>> int(sizes(1 << 20).sum()), int(sizes(1 << 20).max()) == int(sizes(1 << 20)[15])
    (1048576, True)
    """
    cardinalities = np.array([*NUMERIC, *CATEGORICAL])
    low = 1
    high = int(cardinalities.max())
    while low < high:  # the largest cap that fits
        cap = (low + high + 1) // 2
        if np.minimum(cardinalities, cap).sum() <= rows:
            low = cap
        else:
            high = cap - 1
    cut = np.minimum(cardinalities, low)
    cut[np.argmax(cardinalities)] += rows - cut.sum()
    return cut


def write(directory: Path, *, rows: int, examples: int, seed: int = 0) -> Path:
    """Write examples into a directory and return it.

    The files are `ids.npy` and `local.npy` (int32 [n, F]), `labels.npy` (uint8 [n]) and
    `sizes.json`.
    """
    rng = np.random.default_rng(seed)
    field_rows = sizes(rows)
    first = np.concatenate([[0], np.cumsum(field_rows)[:-1]])
    local = np.stack(
        [rng.permutation(size)[ranks(rng, size, examples)] for size in field_rows.tolist()], axis=1
    ).astype(np.int32)
    ids = rng.permutation(rows).astype(np.int32)[local + first]
    weights = rng.normal(0.0, _WEIGHT_SCALE, rows)
    logits = _BIAS + weights[ids].sum(axis=1)
    labels = rng.random(examples) < 1 / (1 + np.exp(-logits))
    directory.mkdir(parents=True, exist_ok=True)
    for name, array in (("ids", ids), ("local", local), ("labels", labels.astype(np.uint8))):
        np.save(directory / f"{name}.npy", array)
    (directory / "sizes.json").write_text(json.dumps(field_rows.tolist()))
    return directory


def write_vowpal(data: Path, path: Path) -> Path:
    """Write the examples in Vowpal Wabbit's text format, one a line, and return the path."""
    ids = np.load(data / "ids.npy")
    labels = np.load(data / "labels.npy")
    columns = [
        pa.array(2 * labels.astype(np.int8) - 1),
        pa.array(["|"] * len(labels)),
        *map(pa.array, np.ascontiguousarray(ids.T)),
    ]
    options = csv.WriteOptions(include_header=False, delimiter=" ", quoting_style="none")
    csv.write_csv(pa.table(columns, names=[str(i) for i in range(len(columns))]), path, options)
    return path


def ranks(rng: np.random.Generator, size: int, n: int) -> npt.NDArray[np.int64]:
    """Draw n indices [n] below `size`; index r - 1 has P(r) ~ 1 / (r + shift)^exponent."""
    cumulative = np.cumsum(1 / (np.arange(1, size + 1) + _SHIFT) ** _EXPONENT)
    return np.searchsorted(cumulative[:-1], rng.random(n) * cumulative[-1], side="right")


def shares(size: int) -> npt.NDArray[np.float64]:
    """Return the probability of each index below `size` [size].

    >>> shares(2).round(4).tolist()
    [0.5749, 0.4251]
    """
    weight = 1 / (np.arange(1, size + 1) + _SHIFT) ** _EXPONENT
    return weight / weight.sum()
