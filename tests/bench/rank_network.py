"""Two ranks on two hosts: the bytes of a step, and examples a second by the speed of the link.

The second host is a network namespace (hosts.py). On each link

    steps   training alone, the ids in memory of rank 0: the bytes that the link carried, counted by
            the kernel, beside those of the formula (capacity_model.py)
    run     `torchrun --nnodes 2 ... -m stream_ctr run` over a log, on each host; all runs end with
            the weights of one process

Both hosts share the processors, so a slower link costs what it costs beside two busy cores. The
kernel counts headers of packets and acknowledgements too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from support.record import formatted

from bench import delta_sizes, rank_runs, zipf
from bench.capacity_model import Model, bytes_of_step, traffic
from bench.contest import Program, Running
from bench.environments import NotRun
from bench.hosts import Link, TwoHosts, two_hosts
from bench.rank_runs import Result, Run
from bench.rank_throughput import MODELS, extra
from bench.streams import STREAMS

LINKS = (Link(), Link(1e10), Link(1e9), Link(1e10, 0.1), Link(1e9, 0.1))
OPTIMIZERS = ("online", "adagrad")
RANKS = 2


def measure(options: argparse.Namespace) -> Result:
    """Return the steps and the runs on each link, or why there are none."""
    try:
        with tempfile.TemporaryDirectory() as name, two_hosts() as hosts:
            return {
                "batch": options.batch,
                "impressions": options.impressions,
                "steps": {
                    optimizer: steps(Path(name), hosts, optimizer, options)
                    for optimizer in OPTIMIZERS
                },
                "runs": runs(Path(name), hosts, options),
            }
    except NotRun as error:
        return {"not_run": str(error)}


def links(hosts: TwoHosts) -> dict[Link, str]:
    """Return the reason why each link cannot be had here, empty if it can."""
    found = {}
    for link in LINKS:
        try:
            with hosts.limited(link):
                found[link] = ""
        except NotRun as error:
            found[link] = str(error)
    return found


# -- steps -----------------------------------------------------------------------------------------


def steps(directory: Path, hosts: TwoHosts, optimizer: str, options: argparse.Namespace) -> Result:
    """Return the bytes of a step, counted and by the formula, and the examples a second by link."""
    rows = 1 << options.train_bits
    data = zipf.write(directory / "steps", rows=rows, examples=16 * options.batch)
    arguments = ["--data", data, "--batch", options.batch, "--steps", options.steps]
    arguments += ["--hidden", *options.hidden, "--optimizer", optimizer, "--ranks", RANKS]
    arguments += ["--address", hosts.near, "--hosts", hosts.as_option()]
    found: Result = {"formula": by_formula(data, rows, optimizer, options), "links": {}}
    with ExitStack() as stack:
        program = Program("ours", "rank_learner", arguments).start(stack)
        for link, reason in links(hosts).items():
            found["links"][str(link)] = reason or on_link(hosts, link, program, options.rounds)
    return found


def on_link(hosts: TwoHosts, link: Link, program: Running, rounds: int) -> Result:
    """Return the medians over the rounds on this link."""
    speeds, sizes = [], []
    with hosts.limited(link):
        for _ in range(rounds):
            before = hosts.bytes_carried()
            measured = program.measure()
            sizes.append((hosts.bytes_carried() - before) / measured["steps"])
            speeds.append(measured["count"] / measured["seconds"])
    return {
        "bytes_a_step": statistics.median(sizes),
        "examples_per_second": statistics.median(speeds),
    }


def by_formula(data: Path, rows: int, optimizer: str, options: argparse.Namespace) -> Result:
    """Return the bytes of a step by the formula, and the examples a second that they allow."""
    law = delta_sizes.Law(zipf.sizes(rows).tolist())
    model = Model(hidden=tuple(options.hidden), optimizer=optimizer)
    # Each value has a row of its own in these data.
    step = traffic(model, options.batch, RANKS, law.expected_values)
    size = bytes_of_step(model, options.batch, RANKS, law.expected_values)
    limits = {str(link): options.batch / step.seconds(link.rate) for link in LINKS if link.rate}
    return {"bytes_a_step": size, "examples_per_second": limits}


# -- runs ------------------------------------------------------------------------------------------


def runs(directory: Path, hosts: TwoHosts, options: argparse.Namespace) -> Result:
    """Return the examples a second of whole runs by link, and of one rank without a link."""
    log = directory / "log.jsonl"
    STREAMS[options.stream](options.impressions).write_jsonl(log)
    common = ["--source", log, *MODELS["DeepFM alone"], "-X", "learn.threads=1", *extra(options)]
    found: Result = {}
    with rank_runs.new_state(directory) as state:
        rank_runs.run(0, state, common)
        plain = rank_runs.figures(state)
    for link, reason in links(hosts).items():
        if reason:
            found[str(link)] = reason
            continue
        with hosts.limited(link):
            measured = [on_hosts(directory, hosts, common) for _ in range(options.rounds)]
        for each in measured:
            rank_runs.require_same({"one process": plain, "two hosts": each}, str(link))
        found[str(link)] = statistics.median(each.examples_per_second for each in measured)
    return found


def on_hosts(directory: Path, hosts: TwoHosts, arguments: Sequence[object]) -> Run:
    with rank_runs.new_state(directory) as state:
        rank_runs.run(RANKS, state, arguments, hosts=hosts)
        return rank_runs.figures(state)


# -- the page --------------------------------------------------------------------------------------


def table(results: Result) -> str:
    if "not_run" in results:
        return f"not measured: {results['not_run']}"
    body: list[list[object]] = []
    for optimizer, measured in results["steps"].items():
        formula = measured["formula"]
        for link, found in measured["links"].items():
            body.append([optimizer, link, *step_cells(found, formula, link)])
    header = ["optimizer", "link", "bytes a step", "by the formula", "examples/s"]
    steps_table = formatted([*header, "most by the formula"], body)
    whole = formatted(
        ["link", "examples/s of a whole run, DeepFM alone"],
        [
            [link, f"not measured: {found}" if isinstance(found, str) else f"{found:,.0f}"]
            for link, found in results["runs"].items()
        ],
    )
    return (
        f"Training alone, two ranks on two hosts, batches of {results['batch']:,}:\n\n"
        f"{steps_table}\n\nWhole runs of {results['impressions']:,} impressions, with the weights "
        f"of one process:\n\n{whole}"
    )


def step_cells(found: Result | str, formula: Result, link: str) -> list[object]:
    if isinstance(found, str):
        return [f"not measured: {found}", "", "", ""]
    most = formula["examples_per_second"].get(link)
    size, expected = found["bytes_a_step"], formula["bytes_a_step"]
    return [
        f"{size / 1e6:.2f} MB",
        f"{expected / 1e6:.2f} MB ({size / expected - 1:+.1%})",
        f"{found['examples_per_second']:,.0f}",
        f"{most:,.0f}" if most else "",
    ]
