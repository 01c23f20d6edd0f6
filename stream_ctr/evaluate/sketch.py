"""HyperLogLog: the number of distinct values in constant memory, mergeable.

A value is hashed to 64 bits. The first 12 bits choose one of m = 4096 registers, which keeps the
largest rank so far: the position of the first set bit in the other 52. Adding a value again changes
nothing, and the sketch of two sets together has the larger of each pair of registers. The standard
error is 1.04 / sqrt(m) = 1.6 % (Flajolet, Fusy, Gandouet and Meunier 2007). The estimate is that of
Ertl 2017 ("New cardinality estimation algorithms for HyperLogLog sketches", algorithm 6), which
needs no correction for small or large numbers.

>>> sketch = HyperLogLog(columns=1)
>>> sketch.add(0, np.arange(5000))
>>> sketch.add(0, np.arange(2000))
>>> bool(abs(sketch.estimates()[0] / 5000 - 1) < 0.05)
True
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

PRECISION = 12
"""The number of bits that choose a register."""
REGISTERS = 1 << PRECISION
_RANK_BITS = 64 - PRECISION

# MurmurHash3's 64-bit finaliser.
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_MIX_SHIFT = np.uint64(33)
_INDEX_SHIFT = np.uint64(_RANK_BITS)
_REST_SHIFT = np.uint64(PRECISION)
_SENTINEL = np.uint64(1 << (PRECISION - 1))
_TOP_BIT = np.uint64(1 << 63)
_ONE = np.uint64(1)


class HyperLogLog:
    """One sketch for each of C columns: `registers` uint8 [C, 4096]."""

    def __init__(self, columns: int) -> None:
        self.registers = np.zeros((columns, REGISTERS), np.uint8)

    def add(self, column: int, values: npt.NDArray[np.integer]) -> None:
        """Add integers [n] to the sketch of a column."""
        _add(self.registers[column], values.astype(np.uint64))

    def merge(self, other: HyperLogLog) -> None:
        """Become the sketch of the union."""
        np.maximum(self.registers, other.registers, out=self.registers)

    def estimates(self) -> npt.NDArray[np.float64]:
        """Return the estimated number of distinct values of each column [C]."""
        return np.array([_estimate(registers) for registers in self.registers])


def cache_folder() -> str:
    """Return the folder in which numba keeps the compiled loops of this package."""
    return str(_add.stats.cache_path)


def _estimate(registers: npt.NDArray[np.uint8]) -> float:
    counts = np.bincount(registers, minlength=_RANK_BITS + 2).tolist()
    if counts[0] == REGISTERS:
        return 0.0
    z = REGISTERS * _tau(1.0 - counts[_RANK_BITS + 1] / REGISTERS)
    for k in range(_RANK_BITS, 0, -1):
        z = 0.5 * (z + counts[k])
    z += REGISTERS * _sigma(counts[0] / REGISTERS)
    return REGISTERS**2 / (2.0 * math.log(2.0) * z)


def _sigma(x: float) -> float:
    """Return x + sum over k >= 1 of x^(2^k) 2^(k-1), for x < 1."""
    total = x
    weight = 1.0
    while True:
        x *= x
        before = total
        total += x * weight
        weight += weight
        if total == before:
            return total


def _tau(x: float) -> float:
    """Return (1 - x - sum over k >= 1 of (1 - x^(2^-k))^2 2^-k) / 3."""
    if x in (0.0, 1.0):
        return 0.0
    total = 1.0 - x
    weight = 1.0
    while True:
        x = math.sqrt(x)
        before = total
        weight *= 0.5
        total -= (1.0 - x) ** 2 * weight
        if total == before:
            return total / 3.0


# -- compiled ------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True, forceinline=True)
def update(registers, value):  # type: ignore[no-untyped-def]
    """Add one value (uint64) to `registers` [4096]."""
    h = (value ^ (value >> _MIX_SHIFT)) * _MIX_1
    h = (h ^ (h >> _MIX_SHIFT)) * _MIX_2
    h = h ^ (h >> _MIX_SHIFT)
    index = h >> _INDEX_SHIFT
    rest = (h << _REST_SHIFT) | _SENTINEL  # its first set bit is at most at place 53
    known = registers[index]
    # Most values are known: their rank is not above the register, which one comparison shows.
    if known > 0 and (rest >> np.uint64(64 - known)) != 0:
        return
    rank = 1
    while rest & _TOP_BIT == 0:
        rest = rest << _ONE
        rank += 1
    registers[index] = max(known, np.uint8(rank))


@numba.njit(cache=True, nogil=True)
def _add(registers, values):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        update(registers, values[i])
