"""Contenders measured in turn: one repetition of each, then the next of each, so that what the machine does besides falls on all alike.

>>> ours, peer = Result("ours", [8.0, 12.0, 9.0]), Result("peer", [4.0, 4.0, 3.0])
>>> ours.median, ratio(ours, peer)
(9.0, 3.0)
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from bench.environments import NotRun, Own, Peer
from stream_ctr.connectors.embedded import dies_with_parent

PROGRAMS = Path(__file__).parent / "contenders"
ANSWER_SECONDS = 900.0
Measurement = Mapping[str, Any]
"""What one repetition yields: `count` things in `seconds`, or a `value`, and whatever else is worth keeping."""


class Running(Protocol):
    note: str

    def measure(self) -> Measurement: ...


class Contender(Protocol):
    @property
    def name(self) -> str: ...
    def start(self, stack: ExitStack) -> Running: ...


@dataclass(frozen=True, slots=True)
class Program:
    """A program in `contenders/`, in an environment: it sets up once, says that it is ready, and measures itself whenever it is asked."""

    name: str
    script: str
    arguments: Sequence[object]
    environment: Own | Peer = Own()
    note: str = ""

    def start(self, stack: ExitStack) -> Running:
        return stack.enter_context(_Process(self))


@dataclass(frozen=True, slots=True)
class Call:
    """A function of this program that measures."""

    name: str
    measure: Callable[[], Measurement]
    note: str = ""

    def start(self, stack: ExitStack) -> Running:
        return self


@dataclass(frozen=True, slots=True)
class Absent:
    """A contender of which it is known beforehand that it cannot run."""

    name: str
    reason: str

    def start(self, stack: ExitStack) -> Running:
        raise NotRun(self.reason)


class _Process:
    def __init__(self, program: Program) -> None:
        self._program = program
        self.note = program.note

    def __enter__(self) -> Self:
        program = self._program
        threads = str(os.cpu_count() or 1)
        variables = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            **program.environment.variables,
        }
        command = [
            str(program.environment.python()),
            str(PROGRAMS / f"{program.script}.py"),
            *map(str, program.arguments),
        ]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            dies_with_parent(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, **variables},
        )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        try:
            self.note = " ".join(filter(None, [self.note, self._answer().get("note", "")]))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def measure(self) -> Measurement:
        try:
            print("again", file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise NotRun(self._last_words()) from None
        return self._answer()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            if line.startswith("{"):  # libraries print, too
                self._answers.put(line)
        self._answers.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise NotRun(f"no answer within {ANSWER_SECONDS:g} s") from None
        if not line:
            raise NotRun(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        return f"ended with status {status}: {said[-1] if said else 'without a word'}"


@dataclass(slots=True)
class Result:
    """What a contender reached, `values` in the order of the rounds; with a `reason` why it was not run, none."""

    name: str
    values: list[float] = field(default_factory=list)
    note: str = ""
    reason: str = ""
    repetitions: list[Measurement] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def add(self, measured: Measurement) -> None:
        self.repetitions.append(measured)
        self.values.append(
            measured["value"] if "value" in measured else measured["count"] / measured["seconds"]
        )

    def as_json(self) -> dict[str, Any]:
        if self.reason:
            return {"contender": self.name, "not_run": self.reason}
        summary = {"median": self.median, "least": min(self.values), "most": max(self.values)}
        return {
            "contender": self.name,
            "note": self.note,
            **summary,
            "repetitions": self.repetitions,
        }


def compare(
    contenders: Sequence[Contender], *, rounds: int, say: Callable[[str], None] = lambda text: None
) -> list[Result]:
    """All are set up, then measured one after the other, `rounds` times. What cannot run has the reason in its result."""
    results = [Result(contender.name) for contender in contenders]
    with ExitStack() as stack:
        running: dict[int, Running] = {}
        for index, contender in enumerate(contenders):
            with _reason(results[index], say):
                running[index] = contender.start(stack)
                results[index].note = running[index].note
                say(f"{contender.name} is ready")
        for number in range(rounds):
            for index, contender in list(running.items()):
                if not results[index].reason:
                    with _reason(results[index], say):
                        results[index].add(contender.measure())
                        say(
                            f"round {number + 1} of {rounds}: {results[index].name}: {results[index].values[-1]:,.4g}"
                        )
    return results


class _reason:  # noqa: N801 - reads as a word in a `with`
    """`NotRun` becomes the reason in the result."""

    def __init__(self, result: Result, say: Callable[[str], None]) -> None:
        self._result, self._say = result, say

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, NotRun):
            return False
        self._result.reason = str(error)
        self._say(f"{self._result.name}: not run: {error}")
        return True


def ratio(ours: Result, peer: Result) -> float | None:
    """How many times the peer's value ours is: the median over the rounds of both. None when either has none."""
    each = [a / b for a, b in zip(ours.values, peer.values, strict=False)]
    return statistics.median(each) if each else None


def difference(ours: Result, peer: Result) -> float | None:
    """By how much our value is above the peer's, likewise."""
    each = [a - b for a, b in zip(ours.values, peer.values, strict=False)]
    return statistics.median(each) if each else None
