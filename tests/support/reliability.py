"""Turns marked tests into the tables of docs/reliability.md.

A test marked `fault(row, injected=...)` is evidence for a row of the fault matrix, one marked `bad_input(what, via=...)` for a row of the
table of bad input, one marked `security(what, how=...)` for one of the table of promises that keep strangers out; its `outcome(...)` is
what stands there when it passes. `pytest --faults=docs/reliability.md` runs the long ones too and
writes the tables; it fails when a row has no evidence. With `--fault-rows 4,19` only the tests of these rows run, and all other lines stay.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.record import commit, fill, formatted

MATRIX = {
    1: "SIGKILL at a random moment",
    2: "SIGKILL at each step of writing a snapshot",
    3: "SIGTERM, SIGINT, twice",
    4: "broker restarts cleanly",
    5: "broker killed",
    6: "broker frozen",
    7: "network cut, reset, slow",
    8: "leader moves",
    9: "second trainer starts on the same state",
    10: "a paused trainer wakes after a takeover",
    11: "a step longer than max.poll.interval.ms",
    12: "duplicate events",
    13: "click before impression, disorder within lateness",
    14: "click at the edge of the window",
    15: "idle partition",
    16: "a partition wakes with old data",
    17: "wrong producer clocks",
    18: "the trainer's wall clock jumps",
    19: "disk full while writing",
    20: "torn, truncated, bit-flipped, swapped files",
    21: "state directory read-only, or lock held",
    22: "NaN, exploding gradients",
    23: "GPU out of memory",
    24: "one hot key",
    25: "join state over its bound",
    26: "slow or dying subscriber",
    27: "retention removed our offset",
    28: "topic recreated, partitions added",
    29: "pointer topic: withdrawn, old epoch, reordered",
    30: "process busy at schedule time",
    31: "aborted transaction in the input",
}


@dataclass
class Outcome:
    """What a test says of itself; `details(name, markdown)` fills the block of that name in the page as well."""

    text: str = ""
    times: int = 1
    broker: str = ""
    blocks: dict[str, str] = field(default_factory=dict)

    def __call__(self, text: str, *, times: int = 1, broker: str = "") -> None:
        self.text, self.times, self.broker = text, times, broker

    def details(self, name: str, markdown: str) -> None:
        self.blocks[name] = markdown


@dataclass
class _Evidence:
    row: Any
    injected: str
    passed: bool
    said: Outcome
    why_not: str


class Report:
    """Everything that the marked tests of a session have shown."""

    def __init__(self) -> None:
        self.faults: list[_Evidence] = []
        self.bad_input: list[_Evidence] = []
        self.security: list[_Evidence] = []
        self.figures: list[Outcome] = []

    def add(self, item: pytest.Item, result: pytest.TestReport, said: Outcome) -> None:
        why_not = ""
        if result.skipped:
            why_not = (
                result.longrepr[2] if isinstance(result.longrepr, tuple) else str(result.longrepr)
            )
        for mark in item.iter_markers("fault"):
            self.faults.append(
                _Evidence(mark.args[0], mark.kwargs["injected"], result.passed, said, why_not)
            )
        for mark in item.iter_markers("bad_input"):
            self.bad_input.append(
                _Evidence(mark.args[0], mark.kwargs["via"], result.passed, said, why_not)
            )
        for mark in item.iter_markers("security"):
            self.security.append(
                _Evidence(mark.args[0], mark.kwargs["how"], result.passed, said, why_not)
            )

        if item.get_closest_marker("figure"):
            self.figures.append(said)

    def failing(self, rows: Collection[int]) -> list[int]:
        """Which of these rows of the matrix no test passed, or one failed."""
        good = {e.row for e in self.faults if e.passed} - {
            e.row for e in self.faults if not e.passed and not e.why_not
        }
        return [row for row in MATRIX if row in rows and row not in good]

    def write(self, page: Path, rows: Collection[int]) -> None:
        """The lines of these rows of the matrix, and of whatever else has evidence; all others stay as they were."""
        text = page.read_text()
        seen = f"{commit()}, {time.strftime('%Y-%m-%d')}"
        asked = {
            row: lines for row, lines in self._matrix(seen).items() if int(row) in rows
        }  # a test may be evidence for another row too
        matrix = _merged(_lines(text, "matrix"), asked)
        header = ["#", "fault", "injected", "times", "outcome", "broker", "commit, date"]
        text = fill(
            text, "matrix", _formatted(header, sorted(matrix, key=lambda line: int(line[0])))
        )
        for name, evidence, columns in (
            ("bad-input", self.bad_input, ["input", "arrives as", "outcome", "commit, date"]),
            ("security", self.security, ["promise", "tried by", "outcome", "commit, date"]),
        ):
            text = fill(
                text, name, _formatted(columns, _merged(_lines(text, name), _table(evidence, seen)))
            )
        for said in [
            *self.figures,
            *(evidence.said for evidence in [*self.faults, *self.bad_input, *self.security]),
        ]:
            for name, block in said.blocks.items():
                text = fill(text, name, block)
        page.write_text(text)

    def _matrix(self, seen: str) -> dict[str, list[list[str]]]:
        """Row -> its lines."""
        lines: dict[str, list[list[str]]] = {}
        for row in dict.fromkeys(e.row for e in self.faults):
            for injected, same in _together([e for e in self.faults if e.row == row]):
                broker = ", ".join(dict.fromkeys(e.said.broker for e in same if e.said.broker))
                times = str(sum(e.said.times for e in same if e.passed))
                lines.setdefault(str(row), []).append(
                    [str(row), MATRIX[row], injected, times, _told(same), broker, seen]
                )
        return lines


def _table(evidence: Sequence[_Evidence], seen: str) -> dict[str, list[list[str]]]:
    lines: dict[str, list[list[str]]] = {}
    for what in dict.fromkeys(str(e.row) for e in evidence):
        for how, same in _together([e for e in evidence if e.row == what]):
            lines.setdefault(what, []).append([what, how, _told(same), seen])
    return lines


def _lines(text: str, name: str) -> list[list[str]]:
    """The rows of the table in a block."""
    block = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in block.splitlines()
        if line.startswith("|")
    ]
    return [line for line in cells[1:] if not line[0].startswith("---")]


def _merged(before: Sequence[list[str]], now: Mapping[str, list[list[str]]]) -> list[list[str]]:
    kept = [line for line in before if line[0] not in now]
    return [*kept, *(line for lines in now.values() for line in lines)]


def _formatted(header: list[str], rows: Sequence[list[str]]) -> str:
    return formatted(header, [list(row) for row in rows])


def _together(found: Sequence[_Evidence]) -> Iterator[tuple[str, list[_Evidence]]]:
    """Evidence with the same injection is one line of the table."""
    for injected in dict.fromkeys(e.injected for e in found):
        yield injected, [e for e in found if e.injected == injected]


def _told(evidence: Sequence[_Evidence]) -> str:
    failed = sum(not e.passed and not e.why_not for e in evidence)
    if failed:
        return f"FAILED ({failed} of {len(evidence)})"
    said = dict.fromkeys(e.said.text or "as expected" for e in evidence if e.passed)
    return "; ".join(said) or f"not tested here: {evidence[0].why_not}"
