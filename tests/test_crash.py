"""Dying anywhere and going on leaves what a run that was not disturbed leaves, bit for bit."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from faults.kill_rounds import HEADER, kill_rounds, rows
from support import forks
from support.lineage import SMALL, Fingerprint, last_report, newest, published
from support.long import only_long
from support.patience import PATIENCE_SECONDS
from support.record import formatted
from support.trainers import RIVER, Partitions, assert_equal_states, finish, split, trainer

from stream_ctr.cli.assembly import build_trainer
from stream_ctr.cli.main import main
from stream_ctr.config import load
from stream_ctr.connectors import Records, kafka
from stream_ctr.errors import ConfigError
from stream_ctr.failpoint import EXIT_CODE, FAILPOINTS, VARIABLE, parse
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import decode_pointer, read_pointer
from stream_ctr.snapshots.publisher import Publisher

ROOT = Path(__file__).parents[1]
# Snapshots at 1024, 2048 and 3072 examples and at the end; one is kept, so that each publication
# removes another.
OPTIONS = [*SMALL, "-X", "schedule.snapshot_examples=1024", "-X", "snapshots.keep=1"]
IMPRESSIONS = 4000

# Each failpoint but those of a topic: the first time, a middle one or the last one.
ONCE = ("poll.after", "join.after")  # a log this short is read by one poll
AT = {"learn.after": 20, "snapshot.file": 9}
# What a death there leaves differs little from what it leaves at a neighbour.
NEAR_ANOTHER = (
    *("join.after", "learn.before", "cut.before", "predictions.after", "snapshot.files"),
    *("commit.after", "retain.before", "retain.after"),
)


def once(name: str) -> str:
    return name if name in ONCE else f"{name}:{AT.get(name, 2)}"


EVERYWHERE = [
    *(
        once(name)
        for name in FAILPOINTS
        # See test_history for the seam, test_delta_store for deltas, test_run_on_ranks for ranks.
        if not name.startswith(("announce.", "seam.", "delta.", "ranks."))
        and name not in NEAR_ANOTHER
    ),
    "snapshot.rename:1",
    *only_long(
        (
            *(once(name) for name in NEAR_ANOTHER),
            "snapshot.file:1",
            "learn.after:2",
            "learn.after:32",
            "snapshot.file:2",
            "snapshot.rename:4",
            "commit.before:4",
        )
    ),
]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["run", *map(str, arguments)])
    assert result.exit_code == 0, result.output + (
        repr(result.exception) if result.exception else ""
    )
    return result


def die(failpoint: str, *arguments: object) -> None:
    """`stream-ctr run` in a process of its own that ends at the failpoint."""
    environment = {**os.environ, VARIABLE: failpoint}
    done = forks.run("run", *arguments, env=environment, timeout=PATIENCE_SECONDS)
    assert done.returncode == EXIT_CODE, done.stderr


def end(state: Path) -> Fingerprint:
    taken = newest(state)
    assert taken
    return taken


def assert_went_on_as_if_nothing_had_happened(state: Path, clean: Path) -> None:
    assert end(state) == end(clean)
    ours, theirs = last_report(state), last_report(clean)
    same = ("kind", "examples", "ledger", "models", "as_served", "counters", "window_curve")
    for name in same:
        assert ours[name] == theirs[name], name
    assert not list((state / "snapshots").glob("tmp-*"))
    pointed = published(state)
    assert pointed is not None
    assert pointed.examples == end(state).examples


def rows_of(predictions: Path) -> pa.Table:
    """Return all rows of a directory of predictions, whose parts follow each other."""
    assert not list(predictions.glob("tmp-*"))
    parts = sorted(predictions.glob("*.parquet"), key=lambda part: part.name.split("-")[1])
    ends = [int(part.stem.split("-")[2]) for part in parts]
    assert [int(part.name.split("-")[1]) for part in parts] == [0, *ends[:-1]]
    return pa.concat_tables([pa.parquet.read_table(part) for part in parts]).combine_chunks()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    Simulation(IMPRESSIONS, seed=5).write_jsonl(path)
    return path


@pytest.fixture(scope="module")
def clean(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("clean") / "state"
    predictions = ["--predictions", state.parent / "predictions"]
    run("--source", log, "--state", state, "--until-end", *OPTIONS, *predictions)
    return state


@pytest.mark.fault(2, injected="death at each failpoint, a log as input")
@pytest.mark.parametrize("failpoint", EVERYWHERE)
@pytest.mark.slow
def test_a_run_that_died_at_a_failpoint_and_went_on_equals_one_that_did_not(
    log, clean, tmp_path, failpoint, outcome
):
    state = tmp_path / "state"
    predictions = ["--predictions", tmp_path / "predictions"]
    arguments = ["--source", log, "--state", state, "--until-end", *OPTIONS, *predictions]
    die(failpoint, *arguments)
    published(state)  # whoever reads the pointer now finds a snapshot that is whole, or none yet
    left = newest(state)
    result = run(*arguments)
    assert ("resumed from snapshot" in result.output) == (left is not None)
    assert_went_on_as_if_nothing_had_happened(state, clean)
    assert rows_of(tmp_path / "predictions").equals(rows_of(clean.parent / "predictions"))
    outcome("old or new, never mixed; resumed, ledger and all state equal")


SEVERAL_MODELS = [
    *(part for name in ("deepfm", "fnn", "pnn", "lr") for part in ("--model", name)),
    *("-X", "model.pretrain_examples=2600"),
]


@pytest.fixture(scope="module")
def clean_with_several_models(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("several") / "state"
    run("--source", log, "--state", state, "--until-end", *OPTIONS, *SEVERAL_MODELS)
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    "failpoint", ["learn.after:20", *only_long(["snapshot.file:13", "snapshot.rename:3"])]
)
def test_the_same_with_several_models_of_which_one_ends_its_pre_training_meanwhile(
    log, clean_with_several_models, tmp_path, failpoint
):
    arguments = ["--source", log, "--state", tmp_path, "--until-end", *OPTIONS, *SEVERAL_MODELS]
    die(failpoint, *arguments)
    run(*arguments, "-X", "learn.threads=2")
    assert_went_on_as_if_nothing_had_happened(tmp_path, clean_with_several_models)
    assert {"fnn.model", "pnn.model", "lr.model"} < end(tmp_path).tensors.keys()


# Published each 20 s of event time, so that a label window has several publications.
OFTEN = ["-X", "schedule.snapshot_every=20s"]


@pytest.fixture(scope="module")
def clean_and_published_often(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("often") / "state"
    arguments = ["--source", log, "--state", state, "--until-end", *OPTIONS, *OFTEN]
    run(*arguments, "--predictions", state.parent / "predictions")
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    "failpoint",
    [
        "predictions.after:2",
        "snapshot.rename:2",
        *only_long(["learn.after:20", "snapshot.file:20"]),
    ],
)
def test_what_was_served_is_the_same_after_a_death(
    log, clean_and_published_often, tmp_path, failpoint
):
    clean, state = clean_and_published_often, tmp_path / "state"
    arguments = ["--source", log, "--state", state, "--until-end", *OPTIONS, *OFTEN]
    arguments += ["--predictions", tmp_path / "predictions"]
    die(failpoint, *arguments)
    run(*arguments)
    ours, theirs = last_report(state), last_report(clean)
    assert ours["as_served"]["models"]["deepfm"]["count"] > 200
    for name in ("models", "as_served", "as_served_last_half", "counters"):
        assert ours[name] == theirs[name], name
    assert rows_of(tmp_path / "predictions").equals(rows_of(clean.parent / "predictions"))


@pytest.mark.slow
def test_a_run_that_dies_again_and_again_equals_one_that_did_not(log, clean, tmp_path):
    arguments = ["--source", log, "--state", tmp_path, "--until-end", *OPTIONS]
    for failpoint in (
        "snapshot.rename",
        "pointer.before",
        "snapshot.files",
        "learn.after:9",
        "pointer.after",
    ):
        die(failpoint, *arguments)
        published(tmp_path)
    run(*arguments)
    assert_went_on_as_if_nothing_had_happened(tmp_path, clean)


@pytest.mark.fault(
    2, injected="death at each failpoint between a snapshot and its announcement, a topic as input"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "failpoint",
    [
        *("announce.before:4", "commit.after:2"),
        *only_long(
            (
                "announce.before:2",
                "announce.after:2",
                "commit.before:2",
                "pointer.after:2",
            )
        ),
    ],
)
def test_the_same_with_a_broker_to_commit_to_and_to_announce_to(
    kafka_broker, kafka_version, topic, log, clean, tmp_path, failpoint, outcome
):
    client = kafka.client_options(kafka_broker, {})
    kafka.ensure_topic(client, topic)
    sink = kafka.KafkaSink(client)
    for batch in Simulation(IMPRESSIONS, seed=5).batches():
        sink.send_batch(topic, batch.value)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    own = ["-X", f"metrics.topic={topic}.metrics", "-X", f"snapshots.topic={topic}.snapshots"]
    arguments = [
        "--topic",
        topic,
        "--bootstrap-servers",
        kafka_broker,
        "--state",
        tmp_path,
        "--until-end",
        *OPTIONS,
        *own,
    ]
    die(failpoint, *arguments)
    run(*arguments)
    ours, theirs = end(tmp_path), end(clean)
    assert (ours.examples, ours.ledger, ours.tensors) == (
        theirs.examples,
        theirs.ledger,
        theirs.tensors,
    )
    reader = kafka.PointerReader(client, f"{topic}.snapshots")
    pointers: Sequence[tuple[str, bytes | None]] = []
    while not reader.caught_up:
        pointers = [*pointers, *reader.poll(1.0)]
    reader.close()
    assert pointers[-1] == ("default", pointers[-1][1])
    assert read_pointer(tmp_path / "latest.json") == decode_pointer(pointers[-1][1] or b"")
    outcome(
        "resumed, ledger and all state equal; the topic ends with the newest pointer",
        broker=kafka_version,
    )


@pytest.mark.fault(
    1, injected="kill -9 after U(0.2, 5) s, again and again, while a producer goes on"
)
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("partitions", [1, pytest.param(4, marks=pytest.mark.long)])
def test_kill_9_at_random_moments_while_a_producer_goes_on(
    kafka_broker, kafka_version, topic, tmp_path, partitions, full, outcome
):
    """Three rounds; `make faults` does fifty."""
    rounds = 25 if full else 3
    lineage = kill_rounds(
        kafka_broker,
        topic,
        tmp_path,
        partitions=partitions,
        rounds=rounds,
        rng=random.Random(partitions),
    )
    assert len(lineage.rounds) == rounds
    assert lineage.equal(), [(r.killed_after, r.left) for r in lineage.rounds]
    assert lineage.last.examples > 3 * 1024
    outcome(
        "each resumed; after each and at the end ledger, weights, optimiser, baseline and metrics "
        "equal",
        times=rounds,
        broker=kafka_version,
    )
    outcome.details(f"kill-rounds-{partitions}", formatted(HEADER, rows(lineage)))


# -- holes that the rounds, or a look for them, have found ---------------------------------------


@pytest.fixture(scope="module")
def stream() -> pa.LargeBinaryArray:
    return pa.concat_arrays([batch.value for batch in Simulation(6000, seed=3).batches()])


class StoppedAtTheEnd(Partitions):
    """A topic that may grow, and a trainer that is stopped when it has read all there is."""

    until_end = False
    finished = False

    def poll(self, timeout_seconds: float) -> Records:
        records = super().poll(timeout_seconds)
        if self.caught_up().all():
            assert self.trainer
            self.trainer.stop()
        return records


@pytest.mark.slow
def test_a_run_with_nothing_left_to_read_still_learns_what_waited_and_keeps_it(tmp_path, stream):
    finish(trainer(tmp_path / "whole", Partitions(split(stream, 4)), **RIVER))
    stopped = finish(trainer(tmp_path / "parts", StoppedAtTheEnd(split(stream, 4)), **RIVER))
    resumed = trainer(tmp_path / "parts", Partitions(split(stream, 4)), **RIVER)
    resumed.restore(snapshot.newest(tmp_path / "parts" / "snapshots"))
    assert resumed.source.finished
    assert finish(resumed)["examples"] == 6000 > stopped["examples"]
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")


def test_the_snapshot_that_a_run_goes_on_from_stays_though_newer_ones_are_damaged(tmp_path, stream):
    values = [stream.slice(0, 3000)]
    finish(
        trainer(
            tmp_path,
            Partitions(values),
            schedule={"snapshot_examples": 1024},
            snapshots={"keep": 2},
        )
    )
    good, damaged = snapshot.snapshot_ids(tmp_path / "snapshots")
    (tmp_path / "snapshots" / damaged / "model.safetensors").write_bytes(b"")
    resumed = trainer(
        tmp_path, Partitions(values), schedule={"snapshot_examples": 1024}, snapshots={"keep": 1}
    )
    resumed.restore(snapshot.newest(tmp_path / "snapshots"))
    assert good in snapshot.snapshot_ids(tmp_path / "snapshots")


def test_a_partition_that_was_paused_half_read_goes_on_when_it_is_resumed_and_the_other_is_paused(
    broker, topic
):
    client = kafka.client_options(broker, {})
    kafka.ensure_topic(client, topic, partitions=2)
    sink = kafka.KafkaSink(client)
    for number in range(12_000):
        sink.send(topic, b"%d" % number, partition=0)
    sink.flush(PATIENCE_SECONDS)
    source = kafka.KafkaSource([topic], client=client, group="test")
    read = poll_until(source, lambda values: len(values) > 0)
    assert len(read) < 12_000  # the client has more of partition 0 in hand
    source.pause({0})
    assert not poll_until(source, lambda values: len(values) > 0, seconds=1.0)
    sink.send(topic, b"other", partition=1)
    sink.flush(PATIENCE_SECONDS)
    assert poll_until(source, lambda values: len(values) > 0) == [b"other"]
    source.pause({1})
    read += poll_until(source, lambda values: len(values) == 12_000 - len(read))
    assert read == [b"%d" % number for number in range(12_000)]
    source.close()
    sink.close()


def poll_until(
    source: kafka.KafkaSource,
    enough: Callable[[list[bytes]], bool],
    seconds: float = PATIENCE_SECONDS,
) -> list[bytes]:
    values: list[bytes] = []
    deadline = time.monotonic() + seconds
    while not enough(values) and time.monotonic() < deadline:
        values += source.poll(0.25).value.to_pylist()
    return values


class Unreliable:
    """A producer that sends nothing before it is flushed.

    `at_flush` is called first, with the records that wait.
    """

    def __init__(self, at_flush) -> None:
        self.waiting: list[str] = []
        self.delivered: list[str] = []
        self._at_flush = at_flush

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        time=None,
    ) -> None:
        if topic.endswith(".dlq"):
            self.waiting.append(dict(headers)["__stream_ctr.errors.offset"].decode())

    def flush(self, timeout_seconds: float) -> None:
        self._at_flush(self.waiting)
        self.delivered += self.waiting
        self.waiting = []


def test_a_snapshot_is_not_past_a_bad_record_before_the_broker_has_its_dead_letter(
    tmp_path, stream
):
    def nothing_waits_behind_a_snapshot(waiting: list[str]) -> None:
        left = newest(tmp_path)
        past = left.positions["clicks:0"] if left else 0
        assert not [offset for offset in waiting if int(offset) < past]

    values = pa.concat_arrays(
        [stream.slice(0, 4000), pa.array([b"junk"], pa.large_binary()), stream.slice(4000)]
    )
    sink = Unreliable(nothing_waits_behind_a_snapshot)
    source = Partitions([values])
    config = load(
        environ={},
        overrides={
            "model": {"hidden": (16, 16), "embedding_dim": 4, "table_bits": 12},
            "learn": {"batch_size": 128, "threads": 1},
            "join": {"label_window": "60s"},
            "schedule": {"snapshot_examples": 1024},
            "baseline": {"enabled": False},
        },
    )
    publisher = Publisher(tmp_path, sink=sink)
    finish(
        build_trainer(
            config,
            fields=Simulation(1, seed=0).fields,
            source=source,
            publisher=publisher,
            directory=tmp_path,
        )
    )
    assert sink.delivered == ["4000"]


# -- the failpoints themselves -------------------------------------------------------------------


def test_every_failpoint_has_one_place_and_every_place_is_in_the_table():
    found = [
        name
        for path in (ROOT / "stream_ctr").rglob("*.py")
        for name in re.findall(r'^ +failpoint\("([^"]+)"\)', path.read_text(), re.M)
    ]
    assert sorted(found) == sorted(FAILPOINTS)


def test_the_table_in_the_docs_is_the_one_in_the_code():
    written = dict(
        re.findall(
            r"^\| `([a-z.]+)` \| (.*) \|$", (ROOT / "docs" / "reliability.md").read_text(), re.M
        )
    )
    assert written == dict(FAILPOINTS)


@pytest.mark.parametrize(
    "text", ["nowhere", "learn.after:0", "learn.after:x", "learn.after:", ":3", "learn.after:1:2"]
)
def test_what_is_no_failpoint_is_refused(text):
    with pytest.raises(ConfigError, match=VARIABLE):
        parse(text)


@pytest.mark.slow
def test_a_run_with_an_unknown_failpoint_does_not_begin(log, tmp_path):
    command = [
        sys.executable,
        "-m",
        "stream_ctr",
        "run",
        "--source",
        str(log),
        "--state",
        str(tmp_path / "state"),
    ]
    environment: Mapping[str, str] = {**os.environ, VARIABLE: "snapshot.renamed"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.exit_code
    assert "did you mean 'snapshot.rename'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "state").exists()
