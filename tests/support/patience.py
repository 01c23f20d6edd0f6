"""Waiting in tests, and the processes that a test starts.

Waits poll their condition, so a long limit costs a fast machine nothing and spares a slow one a
false failure.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

PATIENCE_SECONDS = 240.0
_POLL_SECONDS = 0.02


def wait_until(
    condition: Callable[[], object],
    seconds: float = PATIENCE_SECONDS,
    explain: Callable[[], object] = lambda: "",
) -> None:
    """Wait until the condition holds. If it does not in time, the error contains `explain()`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds:g} s: {explain()}"
        time.sleep(_POLL_SECONDS)


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether the process has a handler for the signal now."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in status if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def end_of(text: str, characters: int = 8000) -> str:
    """Return the last characters of a text, and the number of characters that are left out."""
    left_out = len(text) - characters
    return text if left_out <= 0 else f"[{left_out:,} characters] ...{text[-characters:]}"


Process = TypeVar("Process", bound="subprocess.Popen[Any]")
_STARTED: list[subprocess.Popen[Any]] = []


def started(process: Process) -> Process:
    """Return the process, and kill it when the current test ends, passed or failed."""
    _STARTED.append(process)
    return process


def kill_started() -> None:
    """Kill the processes that were passed to `started`."""
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()
