"""Parameters that only `make long` and `make faults` run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def only_long(values: Iterable[Any]) -> list[Any]:
    """Return these values of a parameter, marked as long. A tuple is one of several parameters."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)
        for value in values
    ]
