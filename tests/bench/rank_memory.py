"""Resident memory of each rank at a large table, and what rank 0 holds and does besides.

    table      a rank's resident memory with a table of 2 ** bits rows, less that with a small one,
               beside 2 x 64 bytes x rows / N, while DeepFM alone is learned: a run begins with
               room for the copy that each snapshot takes
    besides    rank 0 with the default blend, less rank 0 with DeepFM alone, at the large table: the
               FTRL experts and all else that the blend adds; what the joiner holds, by the report;
               and River's process
    bound      examples a second of a run in one process of everything but the network: the blend of
               logistic regressions, joined, measured and reported

Memory is sampled while a run learns, before any snapshot, and then, for the peak, while it stops
and writes one.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from support.lineage import reports
from support.record import formatted

from bench import rank_runs
from bench.capacity_model import Model, expert_bytes
from bench.environments import NotRun
from bench.rank_runs import Process, Result
from bench.rank_throughput import MODELS, SHARE_OF_RIVER, extra
from bench.streams import STREAMS

RANKS = (1, 2, 4)
SMALL_BITS = 12
LEAST_IMPRESSIONS = 60_000  # a run must go on while it is sampled
TOLERANCE = 0.10
COPIES = 2  # the table, and the copy that a snapshot takes
WITHOUT_NETWORK = (
    "--model",
    "blend",
    "--model",
    "lr",
    "-X",
    f"baseline.sample_rate={SHARE_OF_RIVER}",
)
BLEND, ALONE = "the default blend", "DeepFM alone"
_SAMPLES = 5
_SAMPLE_SECONDS = 0.2
_POLL_SECONDS = 0.05


def measure(options: argparse.Namespace) -> Result:
    """Return the memory of each rank, of rank 0 besides, and the rate of all but the network."""
    bits = options.bits
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = directory / "log.jsonl"
        impressions = max(options.impressions, LEAST_IMPRESSIONS)
        STREAMS[options.stream](impressions).write_jsonl(log)
        common = ["--source", log, *extra(options), "-X", "learn.threads=1"]
        common += ["-X", "schedule.report_every=200ms", "-X", "schedule.snapshot_every=1d"]
        sizes = {"large": bits, "small": SMALL_BITS}

        def held(ranks: int, model: str, size: str) -> Result:
            arguments = [*common, *MODELS[model], "-X", "metrics.served_share=0"]
            arguments += ["-X", f"model.table_bits={sizes[size]}"]
            return memory(directory, ranks, arguments, impressions // 20)

        return {
            "bits": bits,
            "impressions": impressions,
            "table": {
                str(ranks): {size: held(ranks, ALONE, size) for size in sizes} for ranks in RANKS
            },
            "besides": {model: held(2, model, "large") for model in (ALONE, BLEND)},
            "bound": bound(directory, log, options),
        }


def bound(directory: Path, log: Path, options: argparse.Namespace) -> list[float]:
    """Return the examples a second of a run without a network, in each round."""
    arguments = ["--source", log, *extra(options), *WITHOUT_NETWORK]
    found = []
    for _ in range(options.rounds):
        with rank_runs.new_state(directory) as state:
            rank_runs.run(0, state, arguments)
            found.append(rank_runs.figures(state).examples_per_second)
    return found


# -- sampling --------------------------------------------------------------------------------------


def memory(directory: Path, ranks: int, arguments: Sequence[object], examples: int) -> Result:
    """Return the resident bytes of each rank once a run has learned so many examples.

    The run is then stopped. Raises `NotRun` if it ends or writes a snapshot before, which takes
    copies of the rows.
    """
    with (
        rank_runs.new_state(directory) as state,
        rank_runs.started(ranks, ["run", "--state", state, *arguments]) as (process,),
    ):
        report = reached(state, process, examples)
        pids = rank_pids(process.popen.pid)
        sampled = [samples(pids, "VmRSS") for _ in range(_SAMPLES)]
        if list((state / "snapshots").glob("*")):
            raise NotRun("the run wrote a snapshot while it was sampled: give it more impressions")
        river = sum(map(status_bytes, children(pids[0])))
        process.popen.terminate()
        peak = peaks(pids, lambda: process.popen.poll() is None)
    return {
        "resident": [statistics.median(each) for each in zip(*sampled, strict=True)],
        "peak": peak,
        "joiner": report["pending_bytes"],
        "river": river,
        "examples": report["examples"],
    }


def reached(state: Path, process: Process, examples: int) -> Result:
    """Return the first report with so many examples."""
    while True:
        if process.popen.poll() is not None:
            raise NotRun(f"the run ended before {examples:,} examples: {process.message()}")
        with contextlib.suppress(FileNotFoundError, IndexError):
            newest = reports(state)[-1]
            if newest.get("examples", 0) >= examples:
                return newest
        time.sleep(_POLL_SECONDS)


def samples(pids: Sequence[int], key: str) -> list[int]:
    time.sleep(_SAMPLE_SECONDS)
    return [status_bytes(pid, key) for pid in pids]


def peaks(pids: Sequence[int], alive: Callable[[], bool]) -> list[int]:
    """Return the largest resident memory of each process until all have ended."""
    found = [0] * len(pids)
    while alive():
        for at, pid in enumerate(pids):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[at] = max(found[at], status_bytes(pid, "VmHWM"))
        time.sleep(_POLL_SECONDS)
    return found


def rank_pids(launcher: int) -> list[int]:
    """Return the processes of the ranks that `torchrun` has started, in their order."""
    by_rank: dict[int, int] = {}
    for pid in children(launcher):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        named = dict(each.split(b"=", 1) for each in variables if b"=" in each)
        if b"RANK" in named:
            by_rank[int(named[b"RANK"])] = pid
    return [by_rank[rank] for rank in sorted(by_rank)]


def children(parent: int) -> list[int]:
    """Return the processes that a process has started. Linux only."""
    return list(_children(parent))


def _children(parent: int) -> Iterator[int]:
    for task in Path(f"/proc/{parent}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def status_bytes(pid: int, key: str = "VmRSS") -> int:
    """Return a size of a process, from /proc/PID/status; 0 once it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


# -- the page --------------------------------------------------------------------------------------


def table(results: Result) -> str:
    return "\n\n".join((by_rank_table(results), besides_table(results), bound_line(results)))


def shares(results: Result) -> dict[int, list[float]]:
    """Return the memory of the table and its copy on each rank, over 2 x 64 bytes x rows / N.

    >>> sizes = {"large": {"resident": [160.0]}, "small": {"resident": [32.0]}}
    >>> shares({"bits": 0, "table": {"1": sizes}})
    {1: [1.0]}
    """
    whole = COPIES * Model().row_bytes << results["bits"]
    return {
        int(ranks): [
            (large - small) * int(ranks) / whole
            for large, small in zip(
                sizes["large"]["resident"], sizes["small"]["resident"], strict=True
            )
        ]
        for ranks, sizes in results["table"].items()
    }


def by_rank_table(results: Result) -> str:
    whole = Model().row_bytes << results["bits"]
    body: list[list[object]] = []
    for ranks, of_ranks in shares(results).items():
        sizes = results["table"][str(ranks)]
        for rank, part in enumerate(of_ranks):
            met = "met" if abs(part - 1.0) <= TOLERANCE else "missed"
            body.append(
                [
                    *(ranks, rank, mb(sizes["large"]["resident"][rank])),
                    mb(sizes["small"]["resident"][rank]),
                    *(mb(whole / ranks), f"{part - 1.0:+.1%} ({met})"),
                    mb(sizes["large"]["peak"][rank]),
                ]
            )
    header = ["ranks", "rank", "resident, MB", f"with 2^{SMALL_BITS} rows", "table / N"]
    header += [f"the difference beside {COPIES} x table / N, at most 10 %", "peak at the end, MB"]
    return f"A table of 2^{results['bits']} rows, DeepFM alone:\n\n{formatted(header, body)}"


def besides_table(results: Result) -> str:
    alone, blend = (results["besides"][model] for model in (ALONE, BLEND))
    experts = blend["resident"][0] - alone["resident"][0]
    most = expert_bytes(1 << results["bits"])
    body: list[list[object]] = [
        ["the default blend, less DeepFM alone", mb(experts)],
        ["FTRL experts, once every row is touched, by the formula", mb(most)],
        ["waiting impressions, within these", mb(blend["joiner"])],
        ["River, a process of its own", mb(blend["river"])],
    ]
    return f"Rank 0 of 2 besides:\n\n{formatted(['what', 'MB'], body)}"


def bound_line(results: Result) -> str:
    speed = statistics.median(results["bound"])
    return (
        f"Everything but the network, in one process: {speed:,.0f} examples/s (median). At that "
        "rate rank 0 is the bound, however many ranks share the network."
    )


def mb(size: float) -> str:
    return f"{size / 1e6:,.0f}"
