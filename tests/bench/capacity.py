r"""Capacity on paper: what tables and streams of given sizes need, and what ends first.

    python tests/bench/capacity.py                            # print the tables
    python tests/bench/capacity.py --page docs/scaling.md     # put them into the block `capacity`
    python tests/bench/capacity.py --cores 16 --memory 512    # for other machines

Nothing is measured here. Rates come from docs/performance.json and docs/scaling.json, which name
the machine and the commit of each; a rate that is not there is "not measured". The rest is
arithmetic (capacity_model.py), with the formula beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import fill, formatted  # noqa: E402

from bench import delta_sizes  # noqa: E402
from bench.capacity_model import (  # noqa: E402
    DELTA_SECONDS,
    RANKS,
    RATED,
    SNAPSHOTS_KEPT,
    Distinct,
    Input,
    Inputs,
    Machine,
    Model,
    Resource,
    Stream,
    Verdict,
    batch_of,
    bytes_of_step,
    delta_bytes,
    disk_bytes,
    expert_bytes,
    front_bytes,
    memory_bytes,
    network_limit,
    occupied,
    resources,
    snapshot_bytes,
    traffic,
    verdict,
    waiting_bytes,
)

ROWS = (1 << 26, 1 << 30, 1 << 34)
EVENTS = (100_000, 1_000_000, 10_000_000)  # a second
LINKS = (1e9, 1e10, 1e11)  # bits a second
LARGEST_ROWS = 1 << 31  # an id is an int32
H100_BYTES = 80e9
H100_SOURCE = "NVIDIA's data sheet, <https://www.nvidia.com/en-us/data-center/h100/>"
NOT_MEASURED = "not measured"
Cases = Mapping[str, Mapping[str, Any]]
"""Kept cases by name."""


# -- inputs ----------------------------------------------------------------------------------------


def read_cases(path: Path) -> dict[str, Any]:
    """Return the cases of a kept file by name, none if there is no file."""
    if not path.exists():
        return {}
    cases = json.loads(path.read_text())["cases"]
    return cases if isinstance(cases, dict) else {case["name"]: case for case in cases}


def read_inputs(speed: Cases, ranks: Cases) -> Inputs:
    """Return the inputs, from the cases of docs/performance.json and of docs/scaling.json."""
    waiting = difference(speed, "memory", "ours, all pending", "ours, none pending")
    return Inputs(
        dense=median(speed, "train", "ours, bf16", "examples/s"),
        turns=turns_input(ranks),
        besides=besides_input(ranks),
        decode=median(speed, "ingest-wide", "ours, kafka-python", "events/s"),
        join=median(speed, "join", "ours", "events/s"),
        ftrl=median(speed, "ftrl", "ours", "examples/s"),
        waiting=waiting,
        events=events_an_example(speed),
        cores=cores_of(speed["train"]["machine"]),
    )


def contender(speed: Cases, case: str, name: str) -> Mapping[str, Any]:
    results = speed.get(case, {"results": []})["results"]
    found: Mapping[str, Any] = next(
        (result for result in results if result["contender"] == name), {}
    )
    return found


def source_of(speed: Cases, case: str) -> str:
    return f"`{case}`; {speed[case]['machine']}" if case in speed else "not measured"


def median(speed: Cases, case: str, name: str, unit: str) -> Input:
    """Return the median of a contender."""
    value = contender(speed, case, name).get("median")
    return Input(f"{case}: {name}", value, unit, source_of(speed, case))


def difference(speed: Cases, case: str, name: str, without: str) -> Input:
    """Return the bytes of one of a million waiting impressions."""
    waiting, none = (contender(speed, case, each).get("median") for each in (name, without))
    value = None if waiting is None or none is None else waiting - none  # MB for a million
    return Input("a waiting impression", value, "bytes", source_of(speed, case))


def events_an_example(speed: Cases) -> Input:
    """Return the events an example of the simulated stream."""
    case = "pipeline-simulated"
    repetitions = contender(speed, case, "ours").get("repetitions", [])
    value = repetitions[0]["count"] / repetitions[0]["examples"] if repetitions else None
    return Input("events an example", value, "", source_of(speed, case))


def turns_input(ranks: Cases) -> Input:
    """Return the examples a second of the sub-batches alone, on one core."""
    name = "sub-batches alone"
    case = ranks.get("stages")
    if case is None:
        return Input(name, None, "examples/s", "`tests/bench/ranks.py stages`: not measured")
    seconds = case["results"]["seconds"]["sub-batches"]
    return Input(
        name, 1.0 / seconds, "examples/s", f"`tests/bench/ranks.py stages`; {case['machine']}"
    )


def besides_input(ranks: Cases) -> Input:
    """Return the examples a second of a run without a network: what rank 0 does besides."""
    name = "everything but the network, one process"
    case = ranks.get("memory")
    if case is None:
        return Input(name, None, "examples/s", "`tests/bench/ranks.py memory`: not measured")
    value = statistics.median(case["results"]["bound"])
    return Input(name, value, "examples/s", f"`tests/bench/ranks.py memory`; {case['machine']}")


def cores_of(machine: str) -> int:
    """Return the number of cores that a machine's description begins with.

    >>> cores_of("2 x AMD EPYC, Python 3.11.7")
    2
    """
    return int(machine.split()[0])


# -- the page --------------------------------------------------------------------------------------


def page(inputs: Inputs, machine: Machine, law: delta_sizes.Law, command: str) -> str:
    """Return the block of the page."""
    assumed = (
        f"A rank is taken to have a machine of its own, with {machine.cores} cores, "
        f"{machine.memory / 2**30:,.0f} GiB of memory, a disk of {machine.disk / 1e9:g} GB/s and "
        f"a link of {speed_of(machine.link)}. That is assumed, not measured, and so is that the "
        "rates of cores add up."
    )
    return "\n\n".join(
        (
            inputs_table(inputs),
            assumed,
            f"**Sizes**\n\n{sizes_table(machine)}",
            f"**A step on the network**, {power(ROWS[0])} rows\n\n{network_table(inputs, law)}",
            f"**The most examples a second**, {power(ROWS[0])} rows\n\n"
            f"{limits_table(inputs, machine, law)}",
            f"**Streams**\n\n{needs_table(inputs, machine, law)}\n\n"
            f"{shares_table(inputs, machine, law)}",
            FORMULAS,
            f"Computed by `{command}`",
        )
    )


def inputs_table(inputs: Inputs) -> str:
    measured = (inputs.dense, inputs.turns, inputs.ftrl, inputs.besides, inputs.decode, inputs.join)
    rows: list[list[object]] = [
        [each.name, with_unit(each), each.source]
        for each in (*measured, inputs.waiting, inputs.events)
    ]
    rows.append(["memory of an H100", f"{H100_BYTES / 1e9:.0f} GB", H100_SOURCE])
    return formatted(["input", "value", "source"], rows)


def with_unit(measured: Input) -> str:
    if measured.value is None:
        return NOT_MEASURED
    return f"{number(measured.value)} {measured.unit}".strip()


def sizes_table(machine: Machine) -> str:
    model = Model()
    rows: list[list[object]] = []
    for count in ROWS:
        size = model.row_bytes * count
        needed = [least_ranks(machine, count, first=first) for first in (False, True)]
        rows.append(
            [
                f"{power(count)}{'' if count <= LARGEST_ROWS else ' *'}",
                *(in_bytes(size), in_bytes(size / 16), in_bytes(expert_bytes(count))),
                *(ranks or "does not fit" for ranks in needed),
                math.ceil(size / H100_BYTES),
                in_bytes(snapshot_bytes(model, count)),
                in_bytes((SNAPSHOTS_KEPT + 1) * snapshot_bytes(model, count)),
            ]
        )
    header = ["rows", "table", "a rank of 16", "FTRL experts, on rank 0", "machines for the table"]
    header += ["with the experts on one", "H100s for the table", "a snapshot", "snapshots on disk"]
    note = (
        "\\* On paper only: an id is a 32-bit number, and `model.table_bits` ends at 31. "
        "Sharded runs are on processors; the number of cards is that whose memory holds the table."
    )
    return f"{formatted(header, rows)}\n\n{note}"


def least_ranks(machine: Machine, rows: int, *, first: bool) -> int | None:
    """Return the least ranks whose memory holds the table; with `first`, the experts too."""
    fitting = (
        ranks for ranks in RANKS if memory_bytes(Model(), rows, ranks)[int(first)] <= machine.memory
    )
    return next(fitting, None)


def network_table(inputs: Inputs, law: delta_sizes.Law) -> str:
    rows: list[list[object]] = []
    for optimizer in ("online", "adagrad"):
        model = Model(optimizer=optimizer)
        for ranks in RANKS[1:]:
            batch = batch_of(ranks, 1)
            distinct = distinct_rows(law, ROWS[0])
            step = traffic(model, batch, ranks, distinct)
            limits = [network_limit(step, model, batch, link, inputs) for link in LINKS]
            rows.append(
                [
                    *(optimizer, ranks, f"{batch:,}"),
                    in_bytes(bytes_of_step(model, batch, ranks, distinct)),
                    in_bytes(step.busiest),
                    in_bytes(float(step.turns.sum())),
                    *map(number, limits),
                ]
            )
    header = ["optimizer", "ranks", "batch", "bytes of a step", "on its busiest link"]
    header += ["of it between turns", *(f"examples/s at {speed_of(link)}" for link in LINKS)]
    return formatted(header, rows)


def limits_table(inputs: Inputs, machine: Machine, law: delta_sizes.Law) -> str:
    """Return the table of the most examples a second of each resource that has such a rate."""
    rows: list[list[object]] = []
    names: list[str] = []
    for ranks in RANKS:
        stream = stream_of(law, ROWS[0], inputs.events.value or 1.0)  # one example a second
        rated = resources(inputs, machine, stream, ranks)[:RATED]
        names = [resource.name for resource in rated]
        rows.append([ranks, *(most(resource) for resource in rated)])
    return formatted(["ranks", *names], rows)


def most(resource: Resource) -> str:
    """Return how many times what is needed there is."""
    if resource.most is None:
        return absent(resource)
    return number(resource.most / resource.needed)


def needs_table(inputs: Inputs, machine: Machine, law: delta_sizes.Law) -> str:
    rows: list[list[object]] = []
    for stream in streams(law):
        examples = stream.examples(inputs)
        ranks = verdict(lambda n, on=stream: resources(inputs, machine, on, n)).ranks  # type: ignore[misc]
        batch = batch_of(ranks, machine.cores)
        step = traffic(stream.model, batch, ranks, stream.distinct)
        a_second = examples / batch * step.busiest
        a_second += front_bytes(stream.model, examples, stream.events - examples, ranks)
        delta = delta_bytes(stream.model, stream.rows, examples * DELTA_SECONDS, stream.distinct)
        rows.append(
            [
                *(power(stream.rows), millions(stream.events), number(examples), ranks),
                in_bytes(bytes_of_step(stream.model, batch, ranks, stream.distinct)),
                in_bytes(a_second),
                *(f"{8 * a_second / link:.0%}" for link in LINKS),
                in_bytes(waiting_bytes(inputs, examples)),
                in_bytes(delta),
                in_bytes(disk_bytes(inputs, stream, ranks)),
            ]
        )
    header = ["rows", "events/s", "examples/s", "ranks", "network a step", "a second, busiest link"]
    header += [f"of {speed_of(link)}" for link in LINKS]
    header += [
        "waiting impressions",
        f"a delta each {DELTA_SECONDS:g} s",
        "written by rank 0 a second",
    ]
    return formatted(header, rows)


def shares_table(inputs: Inputs, machine: Machine, law: delta_sizes.Law) -> str:
    rows: list[list[object]] = []
    names: list[str] = []
    for stream in streams(law):
        found = verdict(lambda n, on=stream: resources(inputs, machine, on, n))  # type: ignore[misc]
        names = [resource.name for resource in found.resources]
        rows.append(
            [
                *(power(stream.rows), millions(stream.events), found.ranks),
                *map(share, found.resources),
                ends_first(found, stream),
            ]
        )
    note = (
        "Shares are what the stream needs of what so many ranks have. The number of ranks is the "
        "least that suffices or, where none does, the one that lacks the least: above 100 % the "
        "stream is too fast or too large, and more ranks do not help."
    )
    table = formatted(["rows", "events/s", "ranks", *names, "ends first"], rows)
    return f"{table}\n\n{note}"


def ends_first(found: Verdict, stream: Stream) -> str:
    """Return the name of the resource that ends first, and where, if it grows with the rate."""
    rated = [resource.name for resource in found.resources[:RATED]]
    at = ""
    if found.first.name in rated and found.first.share:
        at = f", at {stream.events / found.first.share / 1e6:.2g} M events/s"
    return f"{'enough; ' if found.enough else ''}{found.first.name}{at}"


def streams(law: delta_sizes.Law) -> list[Stream]:
    return [stream_of(law, rows, events) for rows in ROWS for events in EVENTS]


def stream_of(law: delta_sizes.Law, rows: int, events: float) -> Stream:
    return Stream(rows, events, distinct_rows(law, rows))


def distinct_rows(law: delta_sizes.Law, rows: int) -> Distinct:
    """Return the function from examples to their distinct rows in a table of so many rows."""
    return lambda examples: occupied(rows, values_of(law, examples))


@cache
def values_of(law: delta_sizes.Law, examples: float) -> float:
    return law.expected_values(examples)


def share(resource: Resource) -> str:
    """Return the share of a resource as text."""
    return absent(resource) if resource.most is None else f"{resource.share:.0%}"


def absent(resource: Resource) -> str:
    """Return what stands for a resource without a figure; a single rank needs no network."""
    return "" if resource.name == "network" else NOT_MEASURED


def power(rows: int) -> str:
    return f"2^{rows.bit_length() - 1}"


def millions(events: float) -> str:
    return f"{events / 1e6:g} M"


def in_bytes(size: float) -> str:
    """Return a size with its unit.

    >>> in_bytes(64 * 2**26), in_bytes(1500), in_bytes(0)
    ('4.29 GB', '1.5 kB', '0 B')
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    power = min(int(math.log10(size) // 3), len(units) - 1) if size >= 1 else 0
    return f"{size / 1000**power:.3g} {units[power]}"


def number(value: float | None) -> str:
    """Return a number with three significant digits or more, or that there is none."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def speed_of(link: float) -> str:
    return f"{link / 1e9:g} Gbit/s"


FORMULAS = """**Formulas.** N ranks, B examples of a batch, F fields, P parameters of the dense
part. The bytes between two ranks stand in `tests/bench/capacity_model.py`.

| figure | formula |
| --- | --- |
| table | 64 rows |
| FTRL experts | 16 (2 rows + 2 min(4 rows, 2^24)): pairs (z, n) of four logistic regressions |
| memory of rank 0; of others | 2 (table / N + experts) + waiting; 2 table / N + waiting |
| the factor 2 | the copy that a snapshot takes |
| a snapshot; on disk | table + experts; four of them: three are kept, one is being written |
| distinct rows D(n) | rows (1 - (1 - 1/rows)^V), V = sum over fields and values of 1 - (1 - p)^n |
| seconds of a step | 8 (busiest link without turns + all messages between turns) / link |
| network | 1 / (seconds of a step / B + 8 (bytes of an example's events on rank 0's link) / link) |
| dense compute | `train` / its cores x the cores that have a part of the batch |
| sub-batch turns | `stages`: one core steps the sub-batches of all ranks, one after another |
| FTRL experts, rate | `ftrl` x F / (2 F + 2 (F + 190)): the columns that four regressions read |
| rank 0 besides | `memory`: a run without a network; ranks take its decoding and joining over |
| decode; join | `ingest-wide` / its cores x the cores of N ranks; `join` x N |
| waiting | examples/s x 630 s x bytes of an impression; beyond `join.max_memory` on disk |
| a delta | 4 P + each table's min(4 D, rows / 8) + 4 D, DeepFM's 44 D; no pair comes twice |
| disk of rank 0 | (table / N + experts) / 600 s + a delta / 5 s + spilled impressions / 630 s |"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--page", type=Path, help="fill the block `capacity` of this page")
    add("--speed", type=Path, default=ROOT / "docs" / "performance.json")
    add("--ranks", type=Path, default=ROOT / "docs" / "scaling.json")
    add("--cores", type=int, default=2, help="of a rank's machine")
    add("--memory", type=float, default=256.0, help="of a rank's machine, GiB")
    add("--disk", type=float, default=1.0, help="of a rank's machine, GB/s")
    add("--link", type=float, default=10.0, help="of a rank's machine, Gbit/s")
    options = parser.parse_args()
    inputs = read_inputs(read_cases(options.speed), read_cases(options.ranks))
    machine = Machine(
        options.cores, options.memory * 2.0**30, options.disk * 1e9, options.link * 1e9
    )
    command = shlex.join(["python", "tests/bench/capacity.py", *sys.argv[1:]])
    text = page(inputs, machine, delta_sizes.Law(), command)
    print(text)
    if options.page:
        options.page.write_text(fill(options.page.read_text(), "capacity", text))


if __name__ == "__main__":
    main()
