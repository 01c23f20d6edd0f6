"""Examples a second of whole runs over one log: one process, and ranks on the same two cores.

In each round every contender learns the log from the beginning once, in an order that changes from
round to round, and all must end with the same weights and ledger. Figures are those of the final
report, which leaves the start out. The first run of all compiles and is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.record import formatted

from bench import rank_runs
from bench.rank_runs import Result, Run
from bench.streams import STREAMS

SHARE_OF_RIVER = 0.0625
MODELS: Mapping[str, Sequence[str]] = {
    "DeepFM alone": (
        *("--model", "deepfm", "-X", "ftrl.enabled=false", "-X", "baseline.enabled=false"),
        *("-X", "metrics.served_share=0"),
    ),
    "the default blend": ("-X", f"baseline.sample_rate={SHARE_OF_RIVER}"),
}


@dataclass(frozen=True, slots=True)
class Contender:
    """A number of ranks, 0 for one process, and the threads of each."""

    ranks: int
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{rank_runs.described(self.ranks)}, {threads}{' each' if self.ranks > 1 else ''}"

    @property
    def options(self) -> list[str]:
        return ["-X", f"learn.threads={self.threads}"]


CONTENDERS = (Contender(0, 1), Contender(0, 2), Contender(1, 2), Contender(2, 1))
ONE_THREAD, PLAIN = CONTENDERS[:2]


def measure(options: argparse.Namespace) -> Result:
    """Return the runs of each round, for each model."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = directory / "log.jsonl"
        STREAMS[options.stream](options.impressions).write_jsonl(log)
        common = ["--source", log, *extra(options)]
        return {
            "stream": options.stream,
            "impressions": options.impressions,
            "models": {
                model: rounds(directory, model, [*common, *arguments], options.rounds)
                for model, arguments in MODELS.items()
            },
        }


def extra(options: argparse.Namespace) -> list[str]:
    return [word for pair in options.extra for word in ("-X", pair)]


def rounds(
    directory: Path, model: str, arguments: Sequence[object], count: int
) -> list[dict[str, Result]]:
    """Return the figures of each contender in each round."""
    learned(directory, PLAIN, arguments)  # compiles
    found = []
    for number in range(count):
        runs = {
            str(contender): learned(directory, contender, arguments)
            for contender in rotated(CONTENDERS, number)
        }
        rank_runs.require_same(runs, f"{model}, round {number + 1}")
        found.append({name: each.as_json() for name, each in runs.items()})
    return found


def rotated(contenders: Sequence[Contender], by: int) -> list[Contender]:
    """Return the contenders, beginning with another one.

    >>> [contender.threads for contender in rotated([Contender(0, 1), Contender(0, 2)], 1)]
    [2, 1]
    """
    first = by % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def learned(directory: Path, contender: Contender, arguments: Sequence[object]) -> Run:
    """Learn the log from the beginning."""
    with rank_runs.new_state(directory) as state:
        rank_runs.run(contender.ranks, state, [*arguments, *contender.options])
        return rank_runs.figures(state)


def table(results: Result) -> str:
    rows: list[list[object]] = []
    for model, measured in results["models"].items():
        for contender in map(str, CONTENDERS):
            speeds = [runs[contender]["examples_per_second"] for runs in measured]
            rows.append(
                [
                    *(model, contender, f"{statistics.median(speeds):,.0f}"),
                    f"{min(speeds):,.0f}..{max(speeds):,.0f}",
                    *(ratio(measured, contender, str(base)) for base in (ONE_THREAD, PLAIN)),
                ]
            )
    header = ["model", "run", "examples/s, median", "least..most"]
    header += [f"x {base}" for base in (ONE_THREAD, PLAIN)]
    return f"{formatted(header, rows)}\n\n{note(results)}"


def ratio(measured: Sequence[Mapping[str, Result]], contender: str, base: str) -> str:
    """Return the median over the rounds of the ratio to another contender.

    >>> rounds = [{"a": {"examples_per_second": 3.0}, "b": {"examples_per_second": 2.0}}]
    >>> ratio(rounds, "a", "b")
    '1.50'
    """
    ratios = [
        runs[contender]["examples_per_second"] / runs[base]["examples_per_second"]
        for runs in measured
    ]
    return f"{statistics.median(ratios):.2f}"


def note(results: Mapping[str, Any]) -> str:
    """Return what is below the table: the log and the digests, which are equal in every round."""
    lines = [f"{results['impressions']:,} impressions of the stream `{results['stream']}`."]
    for model, measured in results["models"].items():
        digest = next(iter(measured[0].values()))["weights_sha256"]
        lines.append(
            f"All runs of {model} ended with the same ledger and `weights_sha256` "
            f"{digest[:16]}..., in {len(measured)} rounds."
        )
    return "\n".join(lines)
