"""Waiting: for long, since a wait that looks again and again costs a quick machine nothing, and a slow one is no failure."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

PATIENCE_SECONDS = 240.0


def wait_until(
    condition: Callable[[], object],
    seconds: float = PATIENCE_SECONDS,
    told: Callable[[], object] = lambda: "",
) -> None:
    """Until it holds; when it does not in time, what is `told` is in the error."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds:g} s: {told()}"
        time.sleep(0.02)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process would handle the signal by itself now."""
    (mask,) = (
        line.split()[1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigCgt")
    )
    return bool(int(mask, 16) >> (number - 1) & 1)


def end_of(text: str, characters: int = 8000) -> str:
    """The last of a text that may be long, and how much of it is left out."""
    left_out = len(text) - characters
    return text if left_out <= 0 else f"[{left_out:,} characters] ...{text[-characters:]}"


Process = TypeVar("Process", bound="subprocess.Popen[Any]")
_STARTED: list[subprocess.Popen[Any]] = []


def started(process: Process) -> Process:
    """The process, which is killed when the test that started it ends, whatever comes of that."""
    _STARTED.append(process)
    return process


def end_what_was_started() -> None:
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()
