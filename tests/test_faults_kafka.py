"""Faults of Kafka while a trainer reads from it.

After each fault the run goes on and ends like an undisturbed one, or it says why it cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner
from faults.kill_rounds import EVENTS_A_SECOND, producing
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from support import forks
from support.brokers import ApacheBroker, Cluster, KafkaMissing, find_kafka
from support.lineage import SMALL, Fingerprint, last_report, newest
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome
from support.topics import produced, simulated

from stream_ctr.cli.main import main
from stream_ctr.connectors.kafka import KafkaSink, KafkaSource, client_options, ensure_topic

pytestmark = pytest.mark.slow


class Trainer:
    """`stream-ctr run` on a topic.

    While it is `running` it has its own process; `drain` runs it to the end of the topic in this
    one.
    """

    def __init__(
        self,
        servers: str,
        topic: str,
        state: Path,
        *options: str,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.state = state
        self.log = state.with_suffix(".log")
        # Without a topic for reports: one that a broker does not take is an error at the end.
        pairs = (
            "metrics.topic=",
            f"snapshots.topic={topic}.snapshots",
            "schedule.report_every=300ms",
            *options,
        )
        self._command = ["run", "--topic", topic, "--bootstrap-servers", servers]
        self._command += ["--state", str(state)]
        self._command += [*SMALL, *(part for pair in pairs for part in ("-X", pair))]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[Trainer]:
        """Run it in a process, which is killed at the end of the block."""
        with self.log.open("ab") as output:
            self._process = forks.start(
                *self._command, stdout=output, stderr=output, env=self._environment
            )
        try:
            yield self
        finally:
            self._process.kill()
            self._process.wait()

    def drain(self) -> int:
        """Read to the end of the topic, and return the exit code."""
        done = CliRunner().invoke(main, [*self._command, "--until-end"])
        with self.log.open("a") as output:
            output.write(done.output)
        return done.exit_code

    def ends(self) -> int:
        """Wait until it ends by itself, and return the exit code."""
        assert self._process
        return self._process.wait(PATIENCE_SECONDS)

    def terminate(self) -> int:
        """Send SIGTERM, and return the exit code."""
        assert self._process
        self._process.terminate()
        return self.ends()

    @property
    def output(self) -> str:
        """Everything that it has written to its log."""
        return self.log.read_text(errors="replace")

    @property
    def report(self) -> dict[str, Any]:
        """The last report; empty before the first."""
        with contextlib.suppress(OSError, IndexError, json.JSONDecodeError):
            return last_report(self.state)
        return {}

    @property
    def records(self) -> int:
        """The number of records that it has read, by its last report."""
        return int(self.report.get("counters", {}).get("records", 0))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds while it runs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self._process
            assert self._process.poll() is None, f"it ended by itself: {self.output[-3000:]}"
            assert time.monotonic() < deadline, (
                f"still waiting: {self.report} {self.output[-2000:]}"
            )
            time.sleep(0.05)

    def wait_for_more(self, records: int = 1) -> None:
        """Wait until it has read so many more records than now."""
        enough = self.records + records
        self.wait_for(lambda: self.records >= enough)

    @property
    def end(self) -> Fingerprint:
        """The newest snapshot."""
        snapshot = newest(self.state)
        assert snapshot
        return snapshot


def survive(
    fault: Callable[[Trainer], None],
    topic: str,
    directory: Path,
    *,
    produce_to: str,
    read_from: str = "",
    seconds_after: float = 1.0,
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> Trainer:
    """Check that a run that meets a fault ends like one on the same topic that meets none.

    A producer goes on during the fault, and the run must go on by itself to the end of what was
    produced. `fault` must leave the broker running.
    """
    client = client_options(produce_to, {})
    ensure_topic(client, topic, partitions=2)
    trainer = Trainer(
        read_from or produce_to, topic, directory / "state", *options, environment=environment
    )
    with trainer.running():
        with producing(client, topic):
            trainer.wait_for(lambda: trainer.report.get("examples", 0) > 0)
            fault(trainer)
            time.sleep(seconds_after)
        ends = end_of(client, topic)
        trainer.wait_for(lambda: trainer.records == sum(ends.values()))
        assert trainer.terminate() == 0, trainer.output[-3000:]
    assert trainer.end.positions == ends
    assert trainer.drain() == 0, trainer.output[-3000:]
    undisturbed = Trainer(
        produce_to, topic, directory / "undisturbed", "snapshots.model_name=undisturbed"
    )
    assert undisturbed.drain() == 0, undisturbed.output[-3000:]
    assert_alike(trainer, undisturbed)
    assert trainer.end.examples > EVENTS_A_SECOND
    return trainer


def assert_alike(trainer: Trainer, undisturbed: Trainer) -> None:
    end = trainer.end
    clean = undisturbed.end
    assert (end.examples, end.ledger) == (clean.examples, clean.ledger)
    assert end.positions == clean.positions
    assert end.weights_sha256 == clean.weights_sha256
    assert end.same(clean, "model", "optimizer", "baseline")
    assert trainer.report["models"] == undisturbed.report["models"]


def end_of(client: dict[str, object], topic: str) -> dict[str, int]:
    with closing(KafkaSource([topic], client=client, group="test")) as source:
        named = zip(source.partitions, source.ends().values(), strict=True)
        return {f"{name}:{partition}": end for (name, partition), end in named}


@pytest.fixture
def described(apache: ApacheBroker) -> str:
    return f"Apache Kafka {apache.installation.version}"


SAME = "went on by itself; ledger and weights equal"


@pytest.mark.fault(4, injected="SIGTERM to the broker, 3 s, start on the same logs")
def test_a_broker_that_restarts_costs_nothing(
    apache: ApacheBroker, topic: str, tmp_path: Path, outcome: Outcome, described: str
) -> None:
    def restart(_: Trainer) -> None:
        apache.stop()
        time.sleep(3)
        apache.start()

    survive(restart, topic, tmp_path, produce_to=apache.bootstrap_servers)
    outcome(SAME, broker=described)


@pytest.mark.fault(5, injected="kill -9 of the broker, start on the same logs")
def test_a_broker_that_is_killed_costs_nothing(
    apache: ApacheBroker, topic: str, tmp_path: Path, full: bool, outcome: Outcome, described: str
) -> None:
    times = 3 if full else 1

    def kill(trainer: Trainer) -> None:
        for _ in range(times):
            apache.kill()
            apache.start()
            trainer.wait_for_more()

    survive(kill, topic, tmp_path, produce_to=apache.bootstrap_servers)
    outcome(SAME, times=times, broker=described)


@pytest.mark.fault(6, injected="SIGSTOP to the broker for 60 s (quick: 12 s), SIGCONT")
@pytest.mark.long
def test_a_frozen_broker_raises_an_alarm_and_costs_nothing(
    apache: ApacheBroker, topic: str, tmp_path: Path, full: bool, outcome: Outcome, described: str
) -> None:
    seconds = 60 if full else 12
    silent = []

    def freeze(trainer: Trainer) -> None:
        apache.freeze()
        try:
            started = time.monotonic()
            trainer.wait_for(lambda: trainer.report.get("silent_seconds", 0) > 8)
            silent.append(time.monotonic() - started)
            time.sleep(max(0.0, seconds - silent[0]))
        finally:
            apache.thaw()

    trainer = survive(freeze, topic, tmp_path, produce_to=apache.bootstrap_servers)
    assert silent[0] > 5  # the last answers may have come a while before
    assert re.search(r"no broker has answered for \d+ s; waiting", trainer.output), trainer.output[
        -3000:
    ]
    assert "a broker answers again" in trainer.output
    outcome(
        f"alarm in the log and silent_seconds in the reports; {SAME} after {seconds} s",
        broker=described,
    )


@pytest.mark.fault(
    7, injected="a proxy that cuts for 3 s, resets three times, and lets 20 kB/s through for 5 s"
)
def test_a_network_that_is_cut_reset_and_slow_costs_nothing(
    apache: ApacheBroker, topic: str, tmp_path: Path, outcome: Outcome, described: str
) -> None:
    with apache.proxy() as proxy:

        def disturb(trainer: Trainer) -> None:
            proxy.cut()
            time.sleep(3)
            proxy.restore()
            for _ in range(3):
                trainer.wait_for_more()
                proxy.reset()
            proxy.slow(20_000)
            time.sleep(5)
            proxy.restore()

        survive(
            disturb,
            topic,
            tmp_path,
            produce_to=apache.bootstrap_servers,
            read_from=apache.proxied_servers,
        )
    outcome(SAME, broker=described)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        kafka = find_kafka()
    except KafkaMissing as error:
        pytest.skip(str(error))
    with Cluster(kafka, tmp_path_factory.mktemp("cluster")) as three:
        yield three


@pytest.mark.fault(
    8,
    injected="three brokers, kill -9 of the leader; "
    "then (not in the quick run) SIGTERM to the next one",
)
@pytest.mark.long
def test_a_leader_that_moves_costs_nothing(
    cluster: Cluster, topic: str, tmp_path: Path, full: bool, outcome: Outcome
) -> None:
    moved = []

    def move(trainer: Trainer) -> None:
        for end in (ApacheBroker.kill, ApacheBroker.stop) if full else (ApacheBroker.kill,):
            leader = cluster.leader_of(topic)
            end(leader)
            trainer.wait_for(lambda: cluster.leader_of(topic) is not leader)  # noqa: B023
            trainer.wait_for_more(EVENTS_A_SECOND)
            moved.append(leader.node)
            leader.start()

    survive(move, topic, tmp_path, produce_to=cluster.bootstrap_servers)
    installation = next(iter(cluster.brokers.values())).installation
    outcome(SAME, times=len(moved), broker=f"three of Apache Kafka {installation.version}")


@pytest.mark.fault(11, injected="a batch that takes 8 s; there is no group to fall out of")
@pytest.mark.long
def test_a_step_that_takes_long_teaches_nothing_twice(
    apache: ApacheBroker, topic: str, tmp_path: Path, outcome: Outcome, described: str
) -> None:
    def look_at_the_group(trainer: Trainer) -> None:
        trainer.wait_for(lambda: trainer.records > 4 * EVENTS_A_SECOND)
        with closing(KafkaAdminClient(bootstrap_servers=apache.bootstrap_servers)) as admin:
            assert not [group for group in admin.list_groups() if topic in str(group)], (
                "no consumer has joined a group"
            )

    options = [f"input.group={topic}"]
    environment = {"STREAM_CTR_FAILPOINT": "learn.after:8=sleep:8"}
    trainer = survive(
        look_at_the_group,
        topic,
        tmp_path,
        produce_to=apache.bootstrap_servers,
        options=options,
        environment=environment,
    )
    assert "silent" not in trainer.output
    outcome("no group, so no interval; ledger and weights equal", broker=described)


@pytest.fixture
def admin(apache: ApacheBroker) -> Iterator[KafkaAdminClient]:
    with closing(KafkaAdminClient(bootstrap_servers=apache.bootstrap_servers)) as client:
        yield client


def left_off(servers: str, topic: str, directory: Path) -> Trainer:
    """Return a trainer that has read 4,000 events, has written a snapshot and does not run."""
    produced(servers, topic, slice(0, 4000))
    trainer = Trainer(servers, topic, directory / "state")
    with trainer.running():
        trainer.wait_for(lambda: trainer.records == 4000)
        assert trainer.terminate() == 0, trainer.output[-3000:]
    return trainer


@pytest.mark.fault(
    27, injected="delete-records beyond the trainer's position while it does not run"
)
def test_records_that_retention_took_stop_the_run_with_numbers_or_are_counted(
    apache: ApacheBroker,
    admin: KafkaAdminClient,
    topic: str,
    tmp_path: Path,
    outcome: Outcome,
    described: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = left_off(apache.bootstrap_servers, topic, tmp_path)
    before = trainer.end
    produced(apache.bootstrap_servers, topic, slice(4000, 8000))
    position = before.positions[f"{topic}:1"]
    admin.delete_records({TopicPartition(topic, 1): position + 700})
    assert trainer.drain() == 5, trainer.output[-3000:]
    begins = f"partition 1 of topic '{topic}' begins at offset {position + 700}"
    assert f"{begins}, but {position} comes next: 700 were deleted" in trainer.output
    assert trainer.end == before
    skipping = Trainer(apache.bootstrap_servers, topic, tmp_path / "state", "input.on_lost=skip")
    assert skipping.drain() == 0, skipping.output[-3000:]
    assert skipping.records == 8000 - 700
    deleted = f"700 records of partition 1 of topic '{topic}' were deleted before they were read"
    assert deleted in caplog.text
    assert skipping.report["counters"]["records_lost"] == 700
    outcome(
        "exit code 5 with the number; with input.on_lost = skip it goes on and counts them",
        broker=described,
    )


@pytest.mark.fault(
    28,
    injected="topic deleted and created again, longer than before, while the trainer does not run",
)
def test_a_topic_created_again_between_two_runs_stops_the_second(
    apache: ApacheBroker,
    admin: KafkaAdminClient,
    topic: str,
    tmp_path: Path,
    outcome: Outcome,
    described: str,
) -> None:
    trainer = left_off(apache.bootstrap_servers, topic, tmp_path)
    before = trainer.end
    admin.delete_topics([topic])
    produced(apache.bootstrap_servers, topic, slice(0, 8000))
    assert trainer.drain() == 5, trainer.output[-3000:]
    assert f"topic '{topic}' was deleted and created again" in trainer.output
    assert trainer.end == before
    outcome("exit code 5 with the reason; nothing learned", broker=described)


@pytest.mark.fault(
    28, injected="topic deleted and created again, or given two partitions, while the trainer runs"
)
@pytest.mark.parametrize("change", ["created again", "added"])
def test_a_topic_that_changes_under_a_run_stops_it(
    change: str,
    apache: ApacheBroker,
    admin: KafkaAdminClient,
    topic: str,
    tmp_path: Path,
    outcome: Outcome,
    described: str,
) -> None:
    produced(apache.bootstrap_servers, topic, slice(0, 4000))
    trainer = Trainer(
        apache.bootstrap_servers, topic, tmp_path / "state", "metadata.max.age.ms=1000"
    )
    with trainer.running():
        trainer.wait_for(lambda: trainer.records == 4000)
        if change == "added":
            admin.create_partitions({topic: 4})
        else:
            admin.delete_topics([topic])
            produced(apache.bootstrap_servers, topic, slice(0, 8000))
        assert trainer.ends() == 5, trainer.output[-3000:]
    # On a slow machine the topic is away for so long that its deletion is reported.
    expected = {
        "added": "partitions 2, 3 were added to",
        "created again": "was deleted (and created again: its id was|while it was read)",
    }
    assert re.search(expected[change], trainer.output), trainer.output[-3000:]
    outcome("exit code 5 with the reason", broker=described)


@pytest.mark.fault(28, injected="two partitions added while the trainer does not run")
def test_partitions_added_between_two_runs_stop_the_second(
    apache: ApacheBroker,
    admin: KafkaAdminClient,
    topic: str,
    tmp_path: Path,
    outcome: Outcome,
    described: str,
) -> None:
    trainer = left_off(apache.bootstrap_servers, topic, tmp_path)
    admin.create_partitions({topic: 4})
    assert trainer.drain() == 5, trainer.output[-3000:]
    assert f"{topic}:3" in trainer.output or "partitions 2, 3 were added" in trainer.output
    outcome("stopped with the reason", broker=described)


@pytest.mark.fault(
    31,
    injected="transactions of 50 events, every third aborted, between others; one open at the end",
)
def test_events_of_aborted_transactions_are_not_learned(
    apache: ApacheBroker, topic: str, tmp_path: Path, outcome: Outcome, described: str
) -> None:
    client = client_options(apache.bootstrap_servers, {})
    events = simulated(6000).to_pylist()
    chunks = [events[start : start + 50] for start in range(0, len(events), 50)]
    ensure_topic(client, topic, partitions=1)
    producer = KafkaProducer(bootstrap_servers=apache.bootstrap_servers, transactional_id=topic)
    try:
        producer.init_transactions()
        for number, chunk in enumerate(chunks):
            producer.begin_transaction()
            for event in chunk:
                producer.send(topic, event)
            producer.flush()
            if number == len(chunks) - 1:
                break  # without an end
            (producer.abort_transaction if number % 3 == 1 else producer.commit_transaction)()
        reader = Trainer(apache.bootstrap_servers, topic, tmp_path / "state")
        assert reader.drain() == 0, reader.output[-3000:]
    finally:
        producer.close()
    committed = [
        event for number, chunk in enumerate(chunks[:-1]) if number % 3 != 1 for event in chunk
    ]
    plain = f"{topic}-plain"
    ensure_topic(client, plain, partitions=1)
    with closing(KafkaSink(client)) as sink:
        sink.send_batch(plain, pa.array(committed, pa.large_binary()))
    other = Trainer(apache.bootstrap_servers, plain, tmp_path / "plain")
    assert other.drain() == 0, other.output[-3000:]
    assert reader.records == len(committed)
    assert reader.end.ledger == other.end.ledger
    assert reader.end.same(other.end, "model", "optimizer", "baseline")
    assert reader.end.positions[f"{topic}:0"] > len(committed), (
        "markers and aborted records take offsets"
    )
    outcome(
        "not trained: ledger and weights of a topic that has the committed events alone",
        times=40,
        broker=described,
    )
