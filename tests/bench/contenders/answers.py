"""The protocol of a contender: one line of JSON when it is ready, then one for each request.

A request is a line on standard input. This module needs the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def answer(measure: Callable[[], Mapping[str, Any]], *, note: str = "") -> None:
    """Report that the contender is ready, then measure on each request until the input ends."""
    _write({"note": note})
    for _ in sys.stdin:
        _write(measure())


def _write(message: Mapping[str, Any]) -> None:
    # The line break before it ends a line that another thread may be printing.
    sys.stdout.write(f"\n{json.dumps(message)}\n")
    sys.stdout.flush()


class Stopwatch:
    """Measures wall-clock and processor seconds from its creation on."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._processor_began = time.process_time()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    def seconds(self) -> dict[str, float]:
        """Return `seconds` and `processor_seconds`, as a measurement has them."""
        return {
            "seconds": self.elapsed,
            "processor_seconds": time.process_time() - self._processor_began,
        }


def steps(
    step: Callable[[], object],
    *,
    examples: float,
    seconds: float,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Take steps of so many examples each for so many seconds, and return the measurement.

    `finish` waits for work that is still running, for example on a GPU.
    """
    finish()
    stopwatch = Stopwatch()
    taken = 0
    while stopwatch.elapsed < seconds:
        step()
        taken += 1
    finish()
    return {"count": taken * examples, **stopwatch.seconds()}


def on_one_core() -> None:
    """Bind this process and its future threads to one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
