"""kill -9 at random moments, while a producer goes on; the table of docs/reliability.md.

    python tests/faults/kill_rounds.py --rounds 50                     # Apache Kafka; half the rounds with one partition, half with four
    python tests/faults/kill_rounds.py --rounds 6 --broker embedded

A round starts the trainer on what the one before left, waits until its baseline's process is there, which is just before it resumes,
and kills it U(0.2, 5) s later. After the last round the producer stops and the trainer drains the topic. Then a run that nobody disturbs
reads the same topic into another directory and takes its snapshots after the same numbers of examples: each snapshot that a killed
trainer left, and the last one, must equal its counterpart, bit for bit.

Apache Kafka is taken from KAFKA_HOME (or ../shared/kafka). Linux only.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.brokers import ApacheBroker, find_kafka  # noqa: E402
from support.lineage import SMALL, Fingerprint, fingerprint, last_report, newest, published  # noqa: E402
from support.record import machine, print_table  # noqa: E402

from stream_ctr.cli import runs  # noqa: E402
from stream_ctr.cli.assembly import build_trainer  # noqa: E402
from stream_ctr.config import load  # noqa: E402
from stream_ctr.connectors import kafka  # noqa: E402
from stream_ctr.connectors.embedded import EmbeddedBroker, embedded_version  # noqa: E402
from stream_ctr.logs.simulate import Simulation  # noqa: E402
from stream_ctr.snapshots.publisher import Publisher  # noqa: E402

SNAPSHOT_EXAMPLES = 1024
EVENTS_A_SECOND = 1000
KILL_AFTER_SECONDS = (0.2, 5.0)
PATIENCE_SECONDS = 240.0
# What does not depend on how far ahead of the batch the topic had been read.
COMPARED = ("model", "optimizer", "ftrl.model", "baseline", "metrics")


@dataclass(frozen=True, slots=True)
class Round:
    """`left` is the newest snapshot after the kill, from which the next round goes on; `unfinished`: one was being written."""

    killed_after: float
    left: Fingerprint | None
    unfinished: bool


@dataclass(frozen=True, slots=True)
class Lineage:
    """The rounds of one topic, what the drained trainer ended with, and what the undisturbed run had at each snapshot and at its end."""

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
        """Ledger, positions, every tensor, the joiner's included, and the figures of the last report."""
        other = self.counterpart(self.last)
        return self.last == other and all(
            self.report[name] == self.clean_report[name]
            for name in ("ledger", "models", "counters")
        )

    def equal(self) -> bool:
        return self.end_equal() and all(
            self.ledger_equal(r.left) and self.weights_equal(r.left) for r in self.rounds
        )


def kill_rounds(
    servers: str, topic: str, directory: Path, *, partitions: int, rounds: int, rng: random.Random
) -> Lineage:
    client = kafka.client_options(servers, {})
    kafka.ensure_topic(client, topic, partitions=partitions)
    state = directory / "state"
    command = [
        sys.executable,
        "-m",
        "stream_ctr",
        "run",
        "--topic",
        topic,
        "--bootstrap-servers",
        servers,
        "--state",
        str(state),
        *SMALL,
    ]
    command += ["-X", f"metrics.topic={topic}.metrics", "-X", f"snapshots.topic={topic}.snapshots"]
    command += ["-X", f"schedule.snapshot_examples={SNAPSHOT_EXAMPLES}"]
    log = directory / "trainer.log"
    with producing(client, topic):
        done = [
            one_round(command, state, log, rng.uniform(*KILL_AFTER_SECONDS)) for _ in range(rounds)
        ]
    with log.open("ab") as output:
        subprocess.run(
            [*command, "--until-end"],
            stderr=output,
            stdout=output,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
    last = newest(state)
    assert last
    clean, clean_report = undisturbed(
        client, topic, directory / "clean", kept=runs.kept_config(state)
    )
    return Lineage(partitions, done, last, last_report(state), clean, clean_report)


@contextlib.contextmanager
def producing(client: Mapping[str, object], topic: str) -> Iterator[None]:
    """A producer that goes on until the block ends; then all that it sent is in the topic."""
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
    share = EVENTS_A_SECOND // 10
    try:
        sink = kafka.KafkaSink(client)
        partitions = kafka.topic_partitions(client, topic) or 1
        sent = itertools.count()
        for batch in Simulation(10_000_000, seed=11).batches():
            for start in range(0, len(batch), share):
                # In blocks over the partitions: a click is seldom in the partition of its impression, and partitions run apart.
                for value in batch.value.slice(start, share).to_pylist():
                    sink.send(topic, value, partition=next(sent) // 1024 % partitions)
                if stop.wait(0.1):
                    sink.flush(PATIENCE_SECONDS)
                    return
    except kafka.KafkaFailure as error:
        failure.append(error)
    finally:
        sink.close()


def one_round(command: list[str], state: Path, log: Path, kill_after: float) -> Round:
    with log.open("ab") as output:
        process = subprocess.Popen(command, stderr=output, stdout=output)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _resumes(process):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the trainer did not start: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        time.sleep(kill_after)
        if process.poll() is not None:
            raise RuntimeError(
                f"the trainer ended by itself with status {process.returncode}: {log.read_text()[-2000:]}"
            )
    finally:
        process.kill()
        process.wait()
    published(state)  # whatever subscribers are pointed to is whole
    unfinished = any((state / "snapshots").glob("tmp-*"))
    return Round(kill_after, newest(state), unfinished)


def _resumes(process: subprocess.Popen[bytes]) -> bool:
    return bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@dataclass
class Recorder(Publisher):
    """An publisher that keeps a fingerprint of each snapshot, by its number of examples."""

    directory: Path
    seen: dict[int, Fingerprint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.directory)

    def publish(self, path: Path, manifest: Mapping[str, object]) -> None:
        super().publish(path, manifest)
        taken = fingerprint(path)
        self.seen[taken.examples] = taken


def undisturbed(
    client: Mapping[str, object], topic: str, directory: Path, *, kept: Mapping[str, Any] | None
) -> tuple[dict[int, Fingerprint], dict[str, Any]]:
    """What a run to the end of the topic had at each of its snapshots, and its last report."""
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
            source=source,
            publisher=recorder,
            directory=directory,
        )
        assert trainer.baseline
        try:
            report = trainer.run()
        finally:
            trainer.baseline.close()
    finally:
        source.close()
    return recorder.seen, report


HEADER = ["round", "partitions", "killed after s", "resumed from", "ledger equal", "weights equal"]


def rows(lineage: Lineage, first: int = 1) -> list[list[object]]:
    said = {True: "yes", False: "NO"}
    table = []
    for number, r in enumerate(lineage.rounds, first):
        left = f"{r.left.examples:,} examples" if r.left else "the beginning"
        equal = (
            (said[lineage.ledger_equal(r.left)], said[lineage.weights_equal(r.left)])
            if r.left
            else ("-", "-")
        )
        table.append(
            [
                number,
                lineage.partitions,
                f"{r.killed_after:.2f}",
                left + (", the next half written" if r.unfinished else ""),
                *equal,
            ]
        )
    return table


@contextlib.contextmanager
def a_broker(name: str, directory: Path) -> Iterator[tuple[str, str]]:
    """(bootstrap servers, what it is)."""
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
        "--rounds", type=int, default=50, help="in all, shared among the numbers of partitions"
    )
    parser.add_argument("--partitions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--broker", choices=["apache", "embedded"], default="apache")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    body: list[list[object]] = []
    ends: list[str] = []
    equal = True
    with (
        tempfile.TemporaryDirectory() as name,
        a_broker(arguments.broker, Path(name) / "broker") as (servers, described),
    ):
        for at, partitions in enumerate(arguments.partitions):
            share = len(range(at, arguments.rounds, len(arguments.partitions)))
            directory = Path(name) / f"partitions-{partitions}"
            directory.mkdir()
            lineage = kill_rounds(
                servers,
                f"clicks-{partitions}",
                directory,
                partitions=partitions,
                rounds=share,
                rng=rng,
            )
            body += rows(lineage, len(body) + 1)
            ends.append(
                f"{partitions} partition{'s' * (partitions > 1)}: drained after {share} kills, {lineage.last.examples:,} examples; ledger, "
                f"weights, optimiser, baseline, metrics, joiner and positions {'equal' if lineage.end_equal() else 'NOT EQUAL'}"
            )
            equal = equal and lineage.equal()
    print(
        f"{len(body)} rounds of kill -9 on {described} while {EVENTS_A_SECOND:,} events/s are produced\n"
    )
    print_table(HEADER, body)
    print("\n".join(f"- {end}" for end in ends))
    print(f"\n{machine()}: python tests/faults/kill_rounds.py {shlex.join(sys.argv[1:])}")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
