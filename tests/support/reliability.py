"""Turns marked tests into the tables of docs/reliability.md.

Three markers make a test evidence for a row of a table:

- `fault(row, injected=...)`: the fault matrix
- `bad_input(what, via=...)`: the table of bad input
- `security(what, how=...)`: the table of security promises

The test describes its result with `outcome(...)`; the row shows it if the test passes.
`pytest --faults=docs/reliability.md` also runs the long tests and writes the tables. It fails if a
row of the matrix has no evidence. With `--fault-rows 4,19` only the tests of these rows run, and
all other rows of the page stay unchanged.
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
    32: "offsets committed while nothing arrives",
    33: "log truncated after it was read",
    34: "the baseline's process is frozen",
    35: "power loss",
    36: "a partition far behind the others",
    37: "a rank of several killed",
    38: "a rank of several hangs",
}


@dataclass
class Outcome:
    """The result that a test describes. `details` also fills a block of the page."""

    text: str = ""
    times: int = 1
    broker: str = ""
    blocks: dict[str, str] = field(default_factory=dict)

    def __call__(self, text: str, *, times: int = 1, broker: str = "") -> None:
        self.text = text
        self.times = times
        self.broker = broker

    def details(self, name: str, markdown: str) -> None:
        """Put Markdown into the block `name` of the page."""
        self.blocks[name] = markdown


@dataclass
class _Evidence:
    """The result of one marked test for one row of a table."""

    row: Any
    injected: str
    passed: bool
    outcome: Outcome
    skip_reason: str

    @property
    def failed(self) -> bool:
        return not self.passed and not self.skip_reason


# Marker: its keyword for the second column of the table.
_MARKERS = {"fault": "injected", "bad_input": "via", "security": "how"}


class Report:
    """The evidence of the marked tests of a session."""

    def __init__(self) -> None:
        self.faults: list[_Evidence] = []
        self.bad_input: list[_Evidence] = []
        self.security: list[_Evidence] = []
        self.figures: list[Outcome] = []

    def add(self, item: pytest.Item, result: pytest.TestReport, outcome: Outcome) -> None:
        skip_reason = ""
        if result.skipped:
            cause = result.longrepr
            skip_reason = cause[2] if isinstance(cause, tuple) else str(cause)
        evidence_of = {
            "fault": self.faults,
            "bad_input": self.bad_input,
            "security": self.security,
        }
        for name, keyword in _MARKERS.items():
            for mark in item.iter_markers(name):
                evidence_of[name].append(
                    _Evidence(
                        row=mark.args[0],
                        injected=mark.kwargs[keyword],
                        passed=result.passed,
                        outcome=outcome,
                        skip_reason=skip_reason,
                    )
                )
        if item.get_closest_marker("figure"):
            self.figures.append(outcome)

    def failing(self, rows: Collection[int]) -> list[int]:
        """Return those of the rows that have no passed test, or a failed one."""
        passed = {evidence.row for evidence in self.faults if evidence.passed}
        failed = {evidence.row for evidence in self.faults if evidence.failed}
        return [row for row in MATRIX if row in rows and row not in passed - failed]

    def write(self, page: Path, rows: Collection[int]) -> None:
        """Write these rows of the matrix, and all other evidence, into the page.

        All other rows stay as they were.
        """
        text = page.read_text()
        seen = f"{commit()}, {time.strftime('%Y-%m-%d')}"
        # A test may be evidence for a row that was not asked for, too.
        requested = {row: lines for row, lines in self._matrix(seen).items() if int(row) in rows}
        matrix = _merged(_lines(text, "matrix"), requested)
        matrix.sort(key=lambda line: int(line[0]))
        header = ["#", "fault", "injected", "times", "outcome", "broker", "commit, date"]
        text = fill(text, "matrix", _formatted(header, matrix))
        for name, evidence, columns in (
            ("bad-input", self.bad_input, ["input", "arrives as", "outcome", "commit, date"]),
            ("security", self.security, ["promise", "tried by", "outcome", "commit, date"]),
        ):
            lines = _merged(_lines(text, name), _table(evidence, seen))
            text = fill(text, name, _formatted(columns, lines))
        for outcome in self._outcomes():
            for name, block in outcome.blocks.items():
                text = fill(text, name, block)
        page.write_text(text)

    def _outcomes(self) -> Iterator[Outcome]:
        yield from self.figures
        for evidence in (*self.faults, *self.bad_input, *self.security):
            yield evidence.outcome

    def _matrix(self, seen: str) -> dict[str, list[list[str]]]:
        """Return the lines of the matrix by their row number."""
        lines: dict[str, list[list[str]]] = {}
        for row in dict.fromkeys(evidence.row for evidence in self.faults):
            of_row = [evidence for evidence in self.faults if evidence.row == row]
            for injected, same in _by_injection(of_row):
                brokers = (evidence.outcome.broker for evidence in same)
                broker = ", ".join(dict.fromkeys(filter(None, brokers)))
                times = sum(evidence.outcome.times for evidence in same if evidence.passed)
                lines.setdefault(str(row), []).append(
                    [str(row), MATRIX[row], injected, str(times), _verdict(same), broker, seen]
                )
        return lines


def _table(evidence: Sequence[_Evidence], seen: str) -> dict[str, list[list[str]]]:
    """Return the lines of a table by their first cell."""
    lines: dict[str, list[list[str]]] = {}
    for row in dict.fromkeys(str(each.row) for each in evidence):
        for injected, same in _by_injection([each for each in evidence if each.row == row]):
            lines.setdefault(row, []).append([row, injected, _verdict(same), seen])
    return lines


def _lines(text: str, name: str) -> list[list[str]]:
    """Return the cells of the table in a block, without its header."""
    block = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in block.splitlines()
        if line.startswith("|")
    ]
    return [line for line in cells[1:] if not line[0].startswith("---")]


def _merged(before: Sequence[list[str]], now: Mapping[str, list[list[str]]]) -> list[list[str]]:
    """Return the lines before, with those of the same first cell replaced."""
    kept = [line for line in before if line[0] not in now]
    return [*kept, *(line for lines in now.values() for line in lines)]


def _formatted(header: list[str], rows: Sequence[list[str]]) -> str:
    return formatted(header, [list(row) for row in rows])


def _by_injection(evidence: Sequence[_Evidence]) -> Iterator[tuple[str, list[_Evidence]]]:
    """Yield groups of evidence with the same injection; each is one line of the table."""
    for injected in dict.fromkeys(each.injected for each in evidence):
        yield injected, [each for each in evidence if each.injected == injected]


def _verdict(evidence: Sequence[_Evidence]) -> str:
    """Return the outcome cell of a line."""
    failed = sum(each.failed for each in evidence)
    if failed:
        return f"FAILED ({failed} of {len(evidence)})"
    outcomes = (each.outcome.text or "as expected" for each in evidence if each.passed)
    return "; ".join(dict.fromkeys(outcomes)) or f"not tested here: {evidence[0].skip_reason}"
