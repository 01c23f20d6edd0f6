"""The cost of deltas to the learner: a run with deltas beside one without, as in port.py.

A run learns a first log and ends. Then each round learns a second log three times, each time from a
copy of that state, in an order that changes from round to round: *without* deltas, *with* them, and
without them *again*. A resumed run begins a chain at once, so deltas are written from beginning to
end, and no snapshot before the end. Each figure is the events a second of the final report, which
leaves the start out. *cost* is the share of the time that deltas add, against the mean of the two
runs without them in its round; *noise* compares these two with each other. The median over the
rounds counts. All runs of a round must end with the same weights, and a run with deltas must have
written some.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support.lineage import last_report, newest
from support.record import commit, formatted

from bench.environments import ROOT
from bench.streams import STREAMS
from stream_ctr.logs.log import Log
from stream_ctr.snapshots.delta import decode_header

MOST_COST = 0.05
LARGEST_WITH_COPIES = 22
"""The bits of a table of which copies as served fit into memory."""
WITHOUT, WITH, AGAIN = "without", "with", "again"
_ORDERS = ((WITHOUT, WITH, AGAIN), (AGAIN, WITHOUT, WITH), (WITH, AGAIN, WITHOUT))
_BYTES_A_ROW = 200  # a row of DeepFM and its copy in a snapshot, the pairs of two LR
Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The figures of one run: `deltas` that it wrote, and the rows of all models in the last."""

    events_per_second: float
    weights_sha256: str
    deltas: int = 0
    rows: int = 0
    bytes: int = 0


def run(log: Path, state: Path, options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "stream_ctr", "run", "--source", str(log)]
    command += ["--state", str(state), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def learn(log: Path, begun: Path, options: Sequence[str]) -> Run:
    """Go on with this log from a copy of the state `begun`, and return the figures of the run."""
    with tempfile.TemporaryDirectory(dir=begun.parent) as name:
        state = Path(name) / "state"
        shutil.copytree(begun, state, copy_function=copied)
        run(log, state, options)
        found = newest(state)
        assert found
        headers = sorted((state / "deltas").glob("????????-????????.json"))
        last = decode_header(headers[-1].read_bytes()) if headers else None
        return Run(
            events_per_second=float(last_report(state)["events_per_second"]),
            weights_sha256=found.weights_sha256,
            deltas=last.rank.sequence if last else 0,
            rows=sum(last.rows.values()) if last else 0,
            bytes=last.payload_bytes if last else 0,
        )


def copied(source: str, target: str) -> None:
    """Copy a file; one of a snapshot, which never changes, becomes a link."""
    if "snapshots" in Path(source).parts:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def costs(runs: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Return the cost of deltas and the noise, as shares of the time of an event.

    >>> speeds = {"without": 100.0, "again": 100.0, "with": 80.0}
    >>> cost, noise = costs({name: {"events_per_second": each} for name, each in speeds.items()})
    >>> round(cost, 9), noise
    (0.25, 0.0)
    """
    seconds = {name: 1 / run["events_per_second"] for name, run in runs.items()}
    without = (seconds[WITHOUT] + seconds[AGAIN]) / 2
    return seconds[WITH] / without - 1, seconds[AGAIN] / seconds[WITHOUT] - 1


def measure(options: argparse.Namespace) -> Result:
    """Return the runs of each round, for each size of the table.

    Raises `RuntimeError` if weights differ, or if a run wrote no delta.
    """
    found: Result = {}
    for bits in options.bits:
        if reason := too_large(bits):
            found[str(bits)] = {"not_measured": reason}
            continue
        with tempfile.TemporaryDirectory() as name:
            found[str(bits)] = rounds(Path(name), bits, options)
    return found


def rounds(directory: Path, bits: int, options: argparse.Namespace) -> Result:
    """Return the runs of each round, and the options that all of them have."""
    common = ["-X", f"model.table_bits={bits}"]
    if bits > LARGEST_WITH_COPIES:
        common += ["-X", "metrics.served_share=0"]
    common += [word for pair in options.extra for word in ("-X", pair)]
    begun = directory / "begun"
    logs = [directory / name for name in ("first.jsonl", "second.jsonl")]
    split(STREAMS[options.stream](2 * options.impressions), logs)
    run(logs[0], begun, common)  # compiles, too
    deltas = ["-X", f"snapshots.delta_every={options.every}s"]
    measured = []
    for number in range(options.rounds):
        runs = {
            name: learn(logs[1], begun, [*common, *(deltas if name == WITH else [])])
            for name in _ORDERS[number % len(_ORDERS)]
        }
        if len({run.weights_sha256 for run in runs.values()}) > 1:
            raise RuntimeError(f"2^{bits} rows, round {number + 1}: the weights differ")
        if not runs[WITH].deltas:
            raise RuntimeError(f"2^{bits} rows, round {number + 1}: no delta was written")
        measured.append({name: asdict(run) for name, run in runs.items()})
    return {
        "stream": options.stream,
        "options": common,
        "commit": commit(),
        "rounds": measured,
    }


def split(log: Log, paths: Sequence[Path]) -> None:
    """Write the events of a log into files of about equally many, one after another."""
    lines: list[bytes] = []
    log.write_lines(lambda written: lines.append(bytes(written)))
    whole = b"".join(lines).splitlines(keepends=True)
    size = -(-len(whole) // len(paths))
    for number, path in enumerate(paths):
        path.write_bytes(b"".join(whole[number * size : (number + 1) * size]))


def too_large(bits: int) -> str:
    """Return why a table of so many rows does not fit this machine, empty if it does."""
    free = available_bytes()
    wanted = (1 << bits) * _BYTES_A_ROW
    if wanted < free:
        return ""
    return f"needs about {wanted / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(kib) << 10


def table(results: Result) -> str:
    rows: list[list[object]] = []
    for bits, found in results.items():
        if "not_measured" in found:
            rows.append([f"2^{bits}", found["not_measured"], *[""] * 9])
            continue
        measured = found["rounds"]
        cost, noise = (statistics.median(each) for each in zip(*map(costs, measured), strict=True))
        speeds = [
            f"{statistics.median(runs[name]['events_per_second'] for runs in measured):,.0f}"
            for name in (WITHOUT, AGAIN, WITH)
        ]
        last = measured[-1][WITH]
        goal = "met" if cost <= MOST_COST else "missed"
        rows.append(
            [
                *(f"2^{bits}", *speeds, f"{cost:+.1%} ({goal})", f"{noise:+.1%}"),
                *(last["deltas"], f"{last['rows']:,}", f"{last['bytes'] / 1e6:.1f}"),
                *(len(measured), found["commit"]),
            ]
        )
    header = ["rows of the table", "events/s without", "again", "with", "cost", "noise"]
    header += ["deltas", "rows of the last", "its MB", "rounds", "commit"]
    return formatted(header, rows)
