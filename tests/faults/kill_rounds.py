"""Rounds of kill -9 at random moments while a producer runs; the table of docs/reliability.md.

    python tests/faults/kill_rounds.py --rounds 50
    python tests/faults/kill_rounds.py --rounds 6 --broker embedded

A round starts the trainer on the state that the previous round left. It waits for the process of
the baseline, which starts just before the trainer resumes, and kills the trainer U(0.2, 5) s later.
After the last round the producer stops and the trainer drains the topic.

Then an undisturbed run reads the same topic into another directory and takes its snapshots after
the same numbers of examples. Each snapshot that a killed trainer left, and the last one, must equal
its counterpart bit for bit.

The rounds are shared between topics with one and with four partitions, or as --partitions says.
Apache Kafka is taken from KAFKA_HOME or ../shared/kafka. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support import forks  # noqa: E402
from support.brokers import ApacheBroker, find_kafka  # noqa: E402
from support.lineage import (  # noqa: E402
    SMALL,
    Fingerprint,
    fingerprint,
    last_report,
    newest,
    published,
)
from support.record import machine, print_table  # noqa: E402

from stream_ctr.cli import runs  # noqa: E402
from stream_ctr.cli.assembly import build_trainer  # noqa: E402
from stream_ctr.config import load  # noqa: E402
from stream_ctr.connectors import kafka  # noqa: E402
from stream_ctr.connectors.embedded import EmbeddedBroker, embedded_version  # noqa: E402
from stream_ctr.events.fit import NOTHING, Fitted  # noqa: E402
from stream_ctr.logs.simulate import Simulation  # noqa: E402
from stream_ctr.snapshots.manifest import Manifest  # noqa: E402
from stream_ctr.snapshots.publisher import Publisher  # noqa: E402
from stream_ctr.train.report import to_json_object  # noqa: E402

SNAPSHOT_EXAMPLES = 1024
EVENTS_A_SECOND = 1000
KILL_AFTER_SECONDS = (0.2, 5.0)
PATIENCE_SECONDS = 240.0
PRODUCER_TICK_SECONDS = 0.1
PRODUCER_BLOCK = 1024  # events sent to one partition before the next
# The tensor files that do not depend on how far the topic was read ahead of the batch.
COMPARED = ("model", "optimizer", "ftrl.model", "baseline", "metrics")


@dataclass(frozen=True, slots=True)
class Round:
    """One round.

    `left` is the newest snapshot after the kill, from which the next round resumes. `unfinished` is
    true if another snapshot was being written.
    """

    killed_after: float
    left: Fingerprint | None
    unfinished: bool


@dataclass(frozen=True, slots=True)
class Lineage:
    """The rounds of one topic, the end of the drained trainer, and the undisturbed run.

    `clean` has the snapshots of the undisturbed run by their number of examples.
    """

    partitions: int
    rounds: list[Round]
    last: Fingerprint
    report: Mapping[str, Any]
    clean: Mapping[int, Fingerprint]
    clean_report: Mapping[str, Any]

    def counterpart(self, left: Fingerprint) -> Fingerprint:
        return self.clean[left.examples]

    def ledger_equal(self, left: Fingerprint | None) -> bool:
        return left is None or left.ledger == self.counterpart(left).ledger

    def weights_equal(self, left: Fingerprint | None) -> bool:
        return left is None or left.same(self.counterpart(left), *COMPARED)

    def end_equal(self) -> bool:
        """Return whether both runs ended alike.

        Compares ledger, positions, every tensor including the joiner's, and the last reports.
        """
        other = self.counterpart(self.last)
        return self.last == other and all(
            self.report[name] == self.clean_report[name]
            for name in ("ledger", "models", "counters")
        )

    def equal(self) -> bool:
        return self.end_equal() and all(
            self.ledger_equal(each.left) and self.weights_equal(each.left) for each in self.rounds
        )


def kill_rounds(
    servers: str, topic: str, directory: Path, *, partitions: int, rounds: int, rng: random.Random
) -> Lineage:
    """Kill a trainer so many times, drain the topic, and run undisturbed for comparison."""
    client = kafka.client_options(servers, {})
    kafka.ensure_topic(client, topic, partitions=partitions)
    state = directory / "state"
    command = trainer_command(servers, topic, state)
    log = directory / "trainer.log"
    with producing(client, topic):
        done = [
            one_round(command, state, log, rng.uniform(*KILL_AFTER_SECONDS)) for _ in range(rounds)
        ]
    with log.open("ab") as output:
        drain = forks.start(*command, "--until-end", stderr=output, stdout=output)
    assert drain.wait(PATIENCE_SECONDS) == 0, log.read_text()[-2000:]
    last = newest(state)
    assert last
    clean, clean_report = undisturbed(
        client,
        topic,
        directory / "clean",
        kept=runs.kept_config(state),
        fitted=runs.kept_fit(state) or NOTHING,
    )
    return Lineage(partitions, done, last, last_report(state), clean, clean_report)


def trainer_command(servers: str, topic: str, state: Path) -> list[str]:
    options = {
        "metrics.topic": f"{topic}.metrics",
        "snapshots.topic": f"{topic}.snapshots",
        "schedule.snapshot_examples": SNAPSHOT_EXAMPLES,
    }
    command = ["run", "--topic", topic]
    command += ["--bootstrap-servers", servers, "--state", str(state), *SMALL]
    for name, value in options.items():
        command += ["-X", f"{name}={value}"]
    return command


@contextlib.contextmanager
def producing(client: Mapping[str, object], topic: str) -> Iterator[None]:
    """Run a producer until the block ends. All its events are in the topic afterwards."""
    stop = threading.Event()
    failure: list[BaseException] = []
    thread = threading.Thread(target=_produce, args=(client, topic, stop, failure))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]


def _produce(
    client: Mapping[str, object], topic: str, stop: threading.Event, failure: list[BaseException]
) -> None:
    share = round(EVENTS_A_SECOND * PRODUCER_TICK_SECONDS)
    try:
        sink = kafka.KafkaSink(client)
        partitions = kafka.topic_partitions(client, topic) or 1
        sent = itertools.count()
        for batch in Simulation(10_000_000, seed=11).batches():
            for start in range(0, len(batch), share):
                # Blocks alternate between the partitions. So a click is seldom in the partition of
                # its impression, and the partitions' event times diverge.
                for value in batch.value.slice(start, share).to_pylist():
                    sink.send(topic, value, partition=next(sent) // PRODUCER_BLOCK % partitions)
                if stop.wait(PRODUCER_TICK_SECONDS):
                    sink.flush(PATIENCE_SECONDS)
                    return
    except kafka.KafkaFailure as error:
        failure.append(error)
    finally:
        sink.close()


def one_round(command: list[str], state: Path, log: Path, kill_after: float) -> Round:
    """Start the trainer, kill it this many seconds after it resumes, and look at what is left."""
    with log.open("ab") as output:
        process = forks.start(*command, stderr=output, stdout=output)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _resumes(process):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the trainer did not start: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        time.sleep(kill_after)
        if process.poll() is not None:
            raise RuntimeError(
                f"the trainer ended by itself with status {process.returncode}: "
                f"{log.read_text()[-2000:]}"
            )
    finally:
        process.kill()
        process.wait()
    published(state)  # verifies the published snapshot
    unfinished = any((state / "snapshots").glob("tmp-*"))
    return Round(kill_after, newest(state), unfinished)


def _resumes(process: subprocess.Popen[bytes]) -> bool:
    """Return whether the trainer has started its child process, the baseline."""
    return bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@dataclass
class Recorder(Publisher):
    """A publisher that keeps a fingerprint of each snapshot, by its number of examples."""

    directory: Path
    seen: dict[int, Fingerprint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.directory)

    def publish(self, path: Path, manifest: Manifest) -> None:
        super().publish(path, manifest)
        taken = fingerprint(path)
        self.seen[taken.examples] = taken


def undisturbed(
    client: Mapping[str, object],
    topic: str,
    directory: Path,
    *,
    kept: Mapping[str, Any] | None,
    fitted: Fitted,
) -> tuple[dict[int, Fingerprint], dict[str, Any]]:
    """Run to the end of the topic and return (fingerprint of each snapshot, last report).

    Numbers are `fitted` as in the other runs, whose first records depend on the producer's pace.
    """
    config = load(
        environ={},
        base=kept,
        overrides={"schedule": {"snapshot_examples": SNAPSHOT_EXAMPLES}, "snapshots": {"keep": 1}},
    )
    directory.mkdir()
    recorder = Recorder(directory)
    source = kafka.KafkaSource([topic], client=client, group="undisturbed", until_end=True)
    try:
        trainer = build_trainer(
            config,
            fields=config.features.fields() or (),
            fitted=fitted,
            source=source,
            publisher=recorder,
            directory=directory,
        )
        assert trainer.baseline
        try:
            report = to_json_object(trainer.run())
        finally:
            trainer.baseline.close()
    finally:
        source.close()
    return recorder.seen, report


HEADER = ["round", "partitions", "killed after s", "resumed from", "ledger equal", "weights equal"]


def rows(lineage: Lineage, first: int = 1) -> list[list[object]]:
    """Return the rows of the table, numbered from `first`."""
    return [_row(lineage, each, number) for number, each in enumerate(lineage.rounds, first)]


def _row(lineage: Lineage, round_: Round, number: int) -> list[object]:
    left = round_.left
    resumed = f"{left.examples:,} examples" if left else "the beginning"
    unfinished = ", the next half written" if round_.unfinished else ""
    words = {True: "yes", False: "NO"}
    ledger = words[lineage.ledger_equal(left)] if left else "-"
    weights = words[lineage.weights_equal(left)] if left else "-"
    seconds = f"{round_.killed_after:.2f}"
    return [number, lineage.partitions, seconds, resumed + unfinished, ledger, weights]


@contextlib.contextmanager
def a_broker(name: str, directory: Path) -> Iterator[tuple[str, str]]:
    """Run a broker and yield (bootstrap servers, its name and version)."""
    if name == "embedded":
        with EmbeddedBroker() as embedded:
            yield embedded.bootstrap_servers, f"embedded Tansu {embedded_version()}"
        return
    installation = find_kafka()
    directory.mkdir()
    with ApacheBroker(installation, directory) as broker:
        yield broker.bootstrap_servers, f"Apache Kafka {installation.version}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=50,
        help="rounds in all, shared between the numbers of partitions",
    )
    parser.add_argument("--partitions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--broker", choices=["apache", "embedded"], default="apache")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    lineages: list[Lineage] = []
    with (
        tempfile.TemporaryDirectory() as name,
        a_broker(arguments.broker, Path(name) / "broker") as (servers, broker),
    ):
        for index, partitions in enumerate(arguments.partitions):
            directory = Path(name) / f"partitions-{partitions}"
            directory.mkdir()
            lineage = kill_rounds(
                servers,
                f"clicks-{partitions}",
                directory,
                partitions=partitions,
                rounds=len(range(index, arguments.rounds, len(arguments.partitions))),
                rng=rng,
            )
            lineages.append(lineage)
    print_summary(lineages, broker)
    sys.exit(0 if all(lineage.equal() for lineage in lineages) else 1)


def print_summary(lineages: Sequence[Lineage], broker: str) -> None:
    body: list[list[object]] = []
    for lineage in lineages:
        body += rows(lineage, len(body) + 1)
    load = f"while {EVENTS_A_SECOND:,} events/s are produced"
    print(f"{len(body)} rounds of kill -9 on {broker} {load}\n")
    print_table(HEADER, body)
    for lineage in lineages:
        print(f"- {_end(lineage)}")
    print(f"\n{machine()}: python tests/faults/kill_rounds.py {shlex.join(sys.argv[1:])}")


def _end(lineage: Lineage) -> str:
    partitions = f"{lineage.partitions} partition{'s' * (lineage.partitions > 1)}"
    drained = f"drained after {len(lineage.rounds)} kills, {lineage.last.examples:,} examples"
    equal = "equal" if lineage.end_equal() else "NOT EQUAL"
    return (
        f"{partitions}: {drained}; ledger, weights, optimiser, baseline, metrics, joiner "
        f"and positions {equal}"
    )


if __name__ == "__main__":
    main()
