"""The rows that a stream touches between two deltas, and the bytes of the deltas.

Each field of the 39 has the cardinality that it has in the Criteo log, and Zipf-distributed values
(see zipf.py): P(r) ~ 1 / (r + 2)^1.05. A value is hashed to one of N rows, as `Hasher` does. A
window is a second of the stream, or several. `Touched`, which a run uses, counts its rows; nothing
is learned.

Without the simulation, so many rows are expected after n examples:

    D = sum over fields f and values r of 1 - (1 - p_fr)^n        distinct values
    R = N (1 - (1 - 1/N)^D)                                       of which some share a row

>>> Law((3, 1)).expected_rows(rows=1 << 20, examples=1_000_000)
3.999994
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from bench import zipf
from stream_ctr.events.features import mix64
from stream_ctr.learn.dense_part import expected_shapes
from stream_ctr.learn.pairs import PairHasher, choose_columns
from stream_ctr.learn.spec import LARGEST_PAIR_BITS, LearnerSpec
from stream_ctr.learn.touched import Touched

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

ROW_BYTES = 4  # the number of a row, uint32, unless a bit of every row takes less
VALUE_BYTES = {"fp32": 4, "bf16": 2}
_FIELD_SHIFT = np.uint64(40)
_CHUNK = 16_384


class Law:
    """Examples of fields with these cardinalities."""

    def __init__(self, cardinalities: Sequence[int] = (*zipf.NUMERIC, *zipf.CATEGORICAL)) -> None:
        self.cardinalities = tuple(cardinalities)

    @cached_property
    def shares(self) -> list[Floats]:
        """The probability of each value of each field."""
        return [zipf.shares(size) for size in self.cardinalities]

    def draw(self, rng: np.random.Generator, n: int, *, rows: int) -> Ids:
        """Return the ids of n examples [n, F], in a table of so many rows, a power of two."""
        ids = np.empty((n, len(self.cardinalities)), np.int32)
        for field, cumulative in enumerate(self._cumulative):
            rank = np.searchsorted(cumulative[:-1], rng.random(n), side="right")
            value = rank.astype(np.uint64) | (np.uint64(field) << _FIELD_SHIFT)
            ids[:, field] = mix64(value) & np.uint64(rows - 1)
        return ids

    @cached_property
    def _cumulative(self) -> list[Floats]:
        return [np.cumsum(share) for share in self.shares]

    def expected_rows(self, *, rows: int, examples: float) -> float:
        """Return R, the number of rows that so many examples touch in a table of `rows` rows."""
        distinct = self.expected_values(examples)
        return round(float(-rows * np.expm1(distinct * np.log1p(-1 / rows))), 6)

    def expected_values(self, examples: float) -> float:
        """Return D, the number of distinct values that so many examples have."""
        return sum(
            float(-np.expm1(examples * np.log1p(-np.minimum(share, 1 - 1e-12))).sum())
            for share in self.shares
        )


def chunks(law: Law, *, rows: int, examples: int, seed: int = 0) -> Iterator[Ids]:
    """Yield the ids of so many examples, in parts that fit a cache."""
    rng = np.random.default_rng(seed)
    for first in range(0, examples, _CHUNK):
        yield law.draw(rng, min(_CHUNK, examples - first), rows=rows)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of `rows` rows, of which each has `values` numbers that serve."""

    name: str
    rows: int
    values: int
    pairs: bool = False

    def bytes(self, touched: float, precision: str) -> float:
        """Return the bytes of so many touched rows in a payload.

        >>> Table("DeepFM", 1 << 26, 11).bytes(1, "fp32")
        48
        >>> Table("DeepFM", 1 << 26, 11).bytes(1, "bf16")
        26
        >>> Table("LR", 1 << 10, 1).bytes(1000, "fp32")
        4128.0
        """
        numbers = min(touched * ROW_BYTES, self.rows / 8)
        return numbers + touched * self.values * VALUE_BYTES[precision]


def tables(bits: int, width: int) -> tuple[Table, ...]:
    """Return the tables of the default blend over 2 ** `bits` rows of `width` coordinates.

    The two logistic regressions over fields touch the rows that DeepFM touches. Those over pairs
    have a table of up to four times as many rows, and at most 2^24.
    """
    pair_rows = 1 << min(bits + 2, LARGEST_PAIR_BITS)
    return (
        Table("DeepFM", 1 << bits, width + 1),
        Table("LR over fields, each of two", 1 << bits, 1),
        Table("LR over pairs, each of two", pair_rows, 1, pairs=True),
    )


TIMES = (1, 2, 2)
"""The models of the default blend that have each of the `tables`."""


def touched_rows(
    law: Law, *, bits: int, rate: int, seconds: Sequence[int], seed: int = 0
) -> dict[str, dict[int, list[int]]]:
    """Return the numbers of touched rows, of `fields` and of `pairs`, by the length of the window.

    The stream lasts as long as the longest window; shorter ones are measured as often as they fit.
    """
    rows = 1 << bits
    pair_bits = min(bits + 2, LARGEST_PAIR_BITS)
    hasher = PairHasher(choose_columns(len(law.cardinalities)), table_bits=pair_bits)
    found: dict[str, dict[int, list[int]]] = {
        kind: {length: [] for length in seconds} for kind in ("fields", "pairs")
    }
    bitmaps = {
        kind: {length: Touched(size) for length in seconds}
        for kind, size in (("fields", rows), ("pairs", 1 << pair_bits))
    }
    for second in range(1, max(seconds) + 1):
        for ids in chunks(law, rows=rows, examples=rate, seed=seed * 1_000_000 + second):
            for kind, marked in (("fields", ids), ("pairs", hasher.rows(ids))):
                for bitmap in bitmaps[kind].values():
                    bitmap.mark(marked)
        for kind, by_length in bitmaps.items():
            for length, bitmap in by_length.items():
                if second % length == 0:
                    found[kind][length].append(len(bitmap.take()))
    return found


def dense_bytes(spec: LearnerSpec) -> int:
    """Return the bytes of all dense parameters and the intercept of a network, in each delta."""
    shapes = {name: shape for name, shape in expected_shapes(spec).items() if name != "table"}
    return sum(
        VALUE_BYTES["fp32"] * (1 if name == "intercept" else int(np.prod(shape)))
        for name, shape in shapes.items()
    )


def sizes(
    touched: Mapping[str, Mapping[int, Sequence[int]]], *, bits: int, width: int, dense: int
) -> list[dict[str, object]]:
    """Return for each table and window the mean rows and bytes of a delta, then those of a blend.

    The blend's bytes hold the `dense` bytes of its network too.
    """
    found: list[dict[str, object]] = []
    for length in touched["fields"]:
        total = dict.fromkeys(VALUE_BYTES, float(dense))
        for table, times in zip(tables(bits, width), TIMES, strict=True):
            rows = float(np.mean(touched["pairs" if table.pairs else "fields"][length]))
            size = {precision: table.bytes(rows, precision) for precision in VALUE_BYTES}
            total = {name: total[name] + times * size[name] for name in total}
            found.append(
                {"table": table.name, "of": table.rows, "seconds": length, "rows": rows, **size}
            )
        found.append({"table": "the default blend", "seconds": length, "rows": None, **total})
    return found
