"""The population stability index: how far the values of a field are from those of a reference.

    PSI = sum over cells of (p - q) ln(p / q)

p and q are the shares of a cell in the window and in the reference; a cell holds the values whose
hash it has. A field is stable below 0.1 by convention, has shifted from 0.1 on, and has shifted
much from 0.25 on.

Chance alone makes PSI positive: two samples of n and m values of one law in k cells have an
expected PSI of about (k - 1) (1/n + 1/m) (Yurdakul 2018, "Statistical properties of population
stability index"). That is subtracted, so that the figure is near 0 without a shift, and may be a
little below. A cell that one of the two lacks counts as half a value there.

>>> same = np.array([500, 300, 200])
>>> abs(psi(same, 2 * same)) < 0.01
True
>>> round(psi(np.array([200, 300, 500]), same), 2)
0.54
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STABLE_BELOW = 0.1
SHIFTED_MUCH_FROM = 0.25


def psi(
    counts: npt.NDArray[np.number], reference: npt.NDArray[np.number], *, size: float | None = None
) -> float:
    """Return the index of the counts of k cells [k] against those of a reference [k].

    `size` is the number of values that the reference is worth, if its counts are weighted.
    Raises `ValueError` if either is empty.
    """
    n = float(counts.sum())
    m = float(reference.sum())
    if not (n and m):
        raise ValueError("the population stability index needs values on both sides")
    used = (counts > 0) | (reference > 0)
    k = int(used.sum())
    p = (counts[used] + 0.5) / (n + 0.5 * k)
    q = (reference[used] + 0.5) / (m + 0.5 * k)
    expected = (k - 1) * (1.0 / n + 1.0 / (m if size is None else size))
    return float(((p - q) * np.log(p / q)).sum() - expected)
