"""Contenders measured in turn: one repetition of each, then the next repetition of each.

Other load on the machine then falls on all contenders alike.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from bench.environments import Environment, NotRun, Own
from stream_ctr.connectors.embedded import dies_with_parent

PROGRAMS = Path(__file__).parent / "contenders"
ANSWER_SECONDS = 900.0
Measurement = Mapping[str, Any]
"""The result of one repetition: `count` and `seconds`, or a `value`, and other keys to keep."""


class Running(Protocol):
    """A contender that is ready."""

    @property
    def note(self) -> str: ...
    def measure(self) -> Measurement: ...


class Contender(Protocol):
    """A contender that is to be set up. `start` raises `NotRun` when it cannot run."""

    @property
    def name(self) -> str: ...
    def start(self, stack: ExitStack) -> Running: ...


@dataclass(frozen=True, slots=True)
class Program:
    """A program in `contenders/`, run in an environment.

    It sets up once, reports that it is ready, and then measures itself on each request.
    """

    name: str
    script: str
    arguments: Sequence[object]
    environment: Environment = Own()
    note: str = ""

    def start(self, stack: ExitStack) -> Running:
        return stack.enter_context(_Process(self))


@dataclass(frozen=True, slots=True)
class Call:
    """A function of this process that measures."""

    name: str
    measure: Callable[[], Measurement]
    note: str = ""

    def start(self, stack: ExitStack) -> Running:
        return self


@dataclass(frozen=True, slots=True)
class Absent:
    """A contender that cannot run, with the reason."""

    name: str
    reason: str

    def start(self, stack: ExitStack) -> Running:
        raise NotRun(self.reason)


def _programs(environment: Environment) -> Path:
    return environment.programs if isinstance(environment, Own) else PROGRAMS


class _Process:
    """A running `Program`. It answers each line on its standard input with one line of JSON."""

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
            str(_programs(program.environment) / f"{program.script}.py"),
            *map(str, program.arguments),
        ]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            dies_with_parent(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **variables},
            cwd=program.environment.directory,
        )
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
            raise NotRun(self._failure()) from None
        return self._answer()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            if line.startswith("{"):  # libraries print other lines
                self._answers.put(line)
        self._answers.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise NotRun(f"no answer within {ANSWER_SECONDS:g} s") from None
        if not line:
            raise NotRun(self._failure())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"ended with status {status}: {lines[-1] if lines else 'no message'}"


@dataclass(slots=True)
class Result:
    """The `values` of a contender, one for each round, or a `reason` why it did not run."""

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
    """Set up all contenders, then measure one after the other, `rounds` times.

    The result of a contender that cannot run has the reason. `say` receives progress messages.
    """
    results = [Result(contender.name) for contender in contenders]
    with ExitStack() as stack:
        running: list[tuple[Result, Running]] = []
        for contender, result in zip(contenders, results, strict=True):
            with _reason_kept(result, say):
                started = contender.start(stack)
                result.note = started.note
                running.append((result, started))
                say(f"{contender.name} is ready")
        for number in range(1, rounds + 1):
            for result, started in running:
                if result.reason:
                    continue
                with _reason_kept(result, say):
                    result.add(started.measure())
                    value = f"{result.values[-1]:,.4g}"
                    say(f"round {number} of {rounds}: {result.name}: {value}")
    return results


@contextmanager
def _reason_kept(result: Result, say: Callable[[str], None]) -> Iterator[None]:
    """Turn `NotRun` into the reason of the result."""
    try:
        yield
    except NotRun as error:
        result.reason = str(error)
        say(f"{result.name}: not run: {error}")


def ratio(ours: Result, peer: Result) -> float | None:
    """Return the median, over the rounds of both, of our value divided by the peer's, or None."""
    ratios = [a / b for a, b in zip(ours.values, peer.values, strict=False)]
    return statistics.median(ratios) if ratios else None


def difference(ours: Result, peer: Result) -> float | None:
    """Return the median, over the rounds of both, of our value minus the peer's, or None."""
    differences = [a - b for a, b in zip(ours.values, peer.values, strict=False)]
    return statistics.median(differences) if differences else None
