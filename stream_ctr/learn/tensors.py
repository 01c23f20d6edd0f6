"""Checks of the tensors that a learner loads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

State = dict[str, npt.NDArray[Any]]
Tensors = Mapping[str, npt.NDArray[np.generic]]


def require_names(weights: Collection[str], expected: Collection[str]) -> None:
    """Raise `ValueError` unless `weights` have the `expected` names.

    >>> require_names(["rows"], ["rows", "pairs"])
    Traceback (most recent call last):
    ValueError: tensor 'pairs' is missing
    """
    if odd := sorted({*weights} ^ {*expected}):
        reason = "missing" if odd[0] in expected else "not one of this model"
        raise ValueError(f"tensor {odd[0]!r} is {reason}")


def require_tensor(
    name: str, found: npt.NDArray[np.generic], dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> None:
    """Raise `ValueError` unless `found` has this type and shape and is finite throughout.

    >>> require_tensor("w", np.zeros(2), np.float64, (3,))
    Traceback (most recent call last):
    ValueError: tensor 'w' is float64 (2,), expected float64 (3,)
    """
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"tensor {name!r} is {found.dtype} {found.shape}, expected {np.dtype(dtype)} {shape}"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"tensor {name!r} holds values that are not finite")
