"""How a contender answers: one line of JSON when it is ready, then one for every line that it is sent. Needs the standard library alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def answer(measure: Callable[[], Mapping[str, Any]], *, note: str = "") -> None:
    _say({"note": note})
    for _ in sys.stdin:
        _say(measure())


def _say(what: Mapping[str, Any]) -> None:
    """On a line of its own, whatever a library's thread prints at the same moment."""
    sys.stdout.write(f"\n{json.dumps(what)}\n")
    sys.stdout.flush()


def steps(
    step: Callable[[], object],
    *,
    examples: float,
    seconds: float,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Steps of so many examples each, for so many seconds; `finish` waits for what is still under way."""
    finish()
    began, processor, taken = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        step()
        taken += 1
    finish()
    return {
        "count": taken * examples,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
    }


def on_one_core() -> None:
    """This process and the threads that it will have."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
