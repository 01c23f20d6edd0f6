"""Equal weights and ledgers for any number of ranks, from Apache Kafka with eight partitions.

One process, 1, 2 and 4 ranks learn the same topic. One more run is killed after its second
snapshot, when it has learned about two fifths of the impressions with 2 ranks, goes on with 4 until
it is killed again, and ends with 1. All must end with the same `weights_sha256` and ledger.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from support.brokers import ApacheBroker, KafkaMissing, find_kafka
from support.lineage import newest
from support.record import formatted

from bench import rank_runs
from bench.environments import NotRun
from bench.rank_runs import Result, Run
from bench.rank_throughput import SHARE_OF_RIVER, extra
from bench.streams import STREAMS, replay
from stream_ctr.failpoint import VARIABLE

PARTITIONS = 8
TOPIC = "events"
RANKS = (0, 1, 2, 4)
CHANGED = (2, 4, 1)
KILLED_AT = "snapshot.rename:2"
_SHARE_OF_SNAPSHOT = 5


def measure(options: argparse.Namespace) -> Result:
    """Return the digests of each run. Raises `RuntimeError` if they differ."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            installation = find_kafka()
        except KafkaMissing as error:
            return {"not_run": str(error)}
        with ApacheBroker(installation, directory / "kafka") as broker:
            log = STREAMS[options.stream](options.many_impressions)
            log.write_jsonl(directory / "log.jsonl")
            servers = broker.bootstrap_servers
            replay(directory / "log.jsonl", servers, TOPIC, "--partitions", str(PARTITIONS))
            arguments = run_arguments(servers, options)
            found = {
                rank_runs.described(ranks): learned(directory, ranks, arguments) for ranks in RANKS
            }
            found[words(CHANGED)] = changed(directory, arguments)
    rank_runs.require_same(found, "all runs")
    return {
        "broker": f"Apache Kafka {installation.version}",
        "impressions": options.many_impressions,
        "runs": {name: each.as_json() for name, each in found.items()},
    }


def run_arguments(servers: str, options: argparse.Namespace) -> list[object]:
    """Return the arguments of all runs, with several snapshots of about equally many examples."""
    every = options.many_impressions // _SHARE_OF_SNAPSHOT
    return [
        *("--topic", TOPIC, "--bootstrap-servers", servers, "--until-end"),
        *("-X", "metrics.topic=", "-X", "snapshots.topic=", "-X", "learn.threads=1"),
        *("-X", f"baseline.sample_rate={SHARE_OF_RIVER}", "-X", "metrics.served_share=0"),
        *("-X", f"schedule.snapshot_examples={every}", "-X", "schedule.snapshot_every=1d"),
        *extra(options),
    ]


def learned(directory: Path, ranks: int, arguments: Sequence[object]) -> Run:
    """Learn the topic from the beginning to the end."""
    with rank_runs.new_state(directory) as state:
        rank_runs.run(ranks, state, arguments)
        return rank_runs.figures(state)


def changed(directory: Path, arguments: Sequence[object]) -> Run:
    """Learn the topic with another number of ranks after each of two kills."""
    with rank_runs.new_state(directory) as state:
        *killed, last = CHANGED
        for ranks in killed:
            with_kill(ranks, state, arguments)
        rank_runs.run(last, state, arguments)
        return rank_runs.figures(state)


def with_kill(ranks: int, state: Path, arguments: Sequence[object]) -> None:
    """Run until rank 0 is killed after its second snapshot.

    Raises `RuntimeError` if the run has not learned anything new before, or has ended.
    """
    before = newest(state)
    with rank_runs.started(
        ranks, ["run", "--state", state, *arguments], environment={VARIABLE: KILLED_AT}
    ) as (process,):
        if process.wait() == 0:
            raise RuntimeError(f"{ranks} ranks: the run ended before it was killed")
        message = process.message()
    after = newest(state)
    if after is None or (before is not None and after.examples <= before.examples):
        raise NotRun(f"{ranks} ranks left no newer snapshot: {message}")


def words(ranks: Sequence[int]) -> str:
    """Return how the number of ranks changes.

    >>> words((2, 4, 1))
    '2, then 4, then 1 ranks'
    """
    return f"{', then '.join(map(str, ranks))} ranks"


def table(results: Result) -> str:
    if "not_run" in results:
        return f"not measured: {results['not_run']}"
    rows: list[list[object]] = [
        [name, f"{run['examples']:,}", run["weights_sha256"], "{}, {}".format(*run["ledger"])]
        for name, run in results["runs"].items()
    ]
    header = ["run", "examples", "`weights_sha256`", "ledger: count, sum"]
    return (
        f"{results['impressions']:,} simulated impressions from {results['broker']}, {PARTITIONS} "
        f"partitions, the default blend. A run whose ranks change is killed at `{KILLED_AT}` "
        f"before each change:\n\n{formatted(header, rows)}"
    )
