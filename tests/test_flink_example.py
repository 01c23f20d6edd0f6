"""The example in deploy/flink: its files agree with each other, and its labels with our join.

The test with Flink needs an interpreter that has PyFlink, in `FLINK_PYTHON`, and the connector for
Kafka, in `FLINK_KAFKA_CONNECTOR` or in `../shared/flink` beside the checkout.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from kafka import KafkaProducer
from support.commands import own_topics, read_records, succeed
from support.deployment import DEPLOY, ROOT, parsed
from support.event_records import as_values
from support.lineage import SMALL
from support.patience import PATIENCE_SECONDS, end_of

from stream_ctr.config import Config, in_milliseconds
from stream_ctr.connectors.embedded import dies_with_parent
from stream_ctr.connectors.kafka import client_options, ensure_topic
from stream_ctr.events.decoder import Decoder
from stream_ctr.logs.simulate import FIELDS, START_MS, Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.report_log import read_reports

EXAMPLE = DEPLOY / "flink"
SQL = (EXAMPLE / "examples.sql").read_text()
README = (EXAMPLE / "README.md").read_text()
JOIN = Config().join
TYPES = {"categorical": "STRING", "numeric": "DOUBLE"}


def columns(table: str) -> dict[str, str | dict[str, str]]:
    """Return the types of a table's columns, and of the members of a ROW, by name."""
    (definition,) = re.findall(rf"CREATE TABLE {table} \((.*?)\n\) WITH", SQL, re.DOTALL)
    found: dict[str, str | dict[str, str]] = {}
    for name, row, simple in re.findall(
        r"^  `?(\w+)`? (?:ROW<(.*?)\n  >|([A-Z]+)),?$", definition, re.DOTALL | re.MULTILINE
    ):
        found[name] = dict(re.findall(r"`?(\w+)`? ([A-Z]+)", row)) if row else simple
    return found


def options(table: str) -> dict[str, str]:
    (given,) = re.findall(rf"CREATE TABLE {table} .*?\n\) WITH \((.*?)\n\);", SQL, re.DOTALL)
    return dict(re.findall(r"'(\S+)' = '(\S+)'", given))


def selected(event: Mapping[str, Any], label: int) -> bytes:
    """Return the JSON that the sink writes for an impression: its columns, without nulls."""
    values = {**event, "kind": "example", "label": label}
    document = {}
    for name, kind in columns("examples").items():
        value = values.get(name)
        if isinstance(kind, dict):
            value = {member: value[member] for member in kind if value.get(member) is not None}
        if value is not None:
            document[name] = value
    return json.dumps(document, separators=(",", ":")).encode()


# -- the files -----------------------------------------------------------------------------------


def test_the_tables_have_the_members_of_events_and_the_fields_of_the_simulated_stream() -> None:
    events, examples = columns("events"), columns("examples")
    fields = {field.name: TYPES[field.kind] for field in FIELDS}
    assert examples == {
        "kind": "STRING",
        "impression_id": "STRING",
        "time": "BIGINT",
        "label": "INT",
        "features": fields,
        "true_probability": "DOUBLE",
    }
    assert events == {name: kind for name, kind in examples.items() if name != "label"}


def test_what_the_sink_writes_is_decoded_as_the_impression_with_its_label() -> None:
    shown = [event for event in simulated(200) if event["kind"] == "impression"]
    written = [selected(event, number % 2) for number, event in enumerate(shown)]
    impressions = [json.dumps(event).encode() for event in shown]
    read, bare = (
        as_values(Decoder(FIELDS).decode(pa.array(values, pa.large_binary())))
        for values in (written, impressions)
    )
    assert read["rejects"] == []
    assert read["with_unknown_fields"] == 0
    assert read["features_of_examples"] == bare["features"]
    assert [row[:3] for row in read["examples"]] == bare["impressions"]
    assert [row[3] for row in read["examples"]] == [n % 2 for n in range(len(shown))]


def test_the_sink_leaves_out_nulls_and_keys_records_by_the_impression() -> None:
    found = options("examples")
    assert found["value.json.encode.ignore-null-fields"] == "true"
    assert (found["key.format"], found["key.fields"]) == ("raw", "impression_id")


def test_the_lengths_of_time_are_the_defaults_of_the_join() -> None:
    window = in_milliseconds(JOIN.label_window)
    early = in_milliseconds(JOIN.early_click_wait)
    seconds = [1000 * int(number) for number in re.findall(r"INTERVAL '(\d+)' SECOND", SQL)]
    assert seconds == [in_milliseconds(JOIN.allowed_lateness), window + early, window]
    assert re.findall(r"`time` ([+-]) (\d+)", SQL) == [
        ("+", str(window)),
        ("-", str(early)),
        ("+", str(window)),
    ]
    assert "'table.exec.state.ttl' = '1 h'" in SQL
    assert timedelta(hours=1) == JOIN.duplicate_horizon


def test_the_commands_have_options_that_exist_and_files_that_are_there() -> None:
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
    ]
    ours = [parsed(shlex.split(line)[1:]) for line in lines if line.startswith("stream-ctr ")]
    topics = [options(table)["topic"] for table in ("events", "examples")]
    assert [each.get("topic") for each in ours] == [None, *topics]
    named = {word for line in lines for word in shlex.split(line) if word.startswith("deploy/")}
    assert "deploy/flink/submit.py" in named
    assert all((ROOT / word).exists() for word in named)
    submitted = (EXAMPLE / "submit.py").read_text()
    for option in re.findall(r"submit.py (.*)", README)[0].split():
        assert not option.startswith("--") or f'"{option}"' in submitted


# -- the same examples ---------------------------------------------------------------------------


class Arrival(NamedTuple):
    """An event, and when it came, in milliseconds."""

    came_ms: int
    event: dict[str, Any]


def simulated(impressions: int) -> Iterator[dict[str, Any]]:
    for batch in Simulation(impressions, seed=11).batches():
        yield from map(json.loads, batch.value.to_pylist())


def arrivals(impressions: int, *, late: bool, seed: int = 5) -> list[Arrival]:
    """Return impressions, a second apart, and clicks, in the order in which they came.

    All come up to 20 s out of order; some twice. Clicks are early, at the ends of the label window
    to the millisecond, and beyond them. With `late`, some events come up to 20 minutes late.
    """
    rng = np.random.default_rng(seed)
    window, early = (in_milliseconds(each) for each in (JOIN.label_window, JOIN.early_click_wait))
    delays = [0, 1, 20_000, 300_000, window - 1, window, window + 1, 2 * window]
    delays += [-1, -20_000, 1 - early, -early, -early - 1, -2 * early]
    found: list[Arrival] = []

    def come(event: dict[str, Any]) -> None:
        copies = 1 + int(rng.random() < 0.1)
        for copy in range(copies):
            delay = rng.integers(0, 20_000) + copy * rng.integers(0, 300_000)
            if late and rng.random() < 0.05:
                delay += rng.integers(0, 1_200_000)
            found.append(Arrival(event["time"] + int(delay), event))

    shown = (event for event in simulated(impressions) if event["kind"] == "impression")
    for number, event in enumerate(shown):
        time = START_MS + 3_600_000 + 1000 * number + int(rng.integers(0, 1000))
        come({**event, "time": time})
        for _ in range(rng.choice([0, 1, 2], p=[0.6, 0.3, 0.1])):
            clicked = time + int(rng.choice(delays))
            come({"kind": "click", "impression_id": event["impression_id"], "time": clicked})
    come({"kind": "click", "impression_id": "of no impression", "time": START_MS + 3_600_000})
    return sorted(found, key=lambda arrival: arrival.came_ms)


def produce(servers: str, topic: str, stream: Sequence[Arrival], *, partitions: int) -> None:
    """Send events by the key of their impression, and a few records that are none."""
    ensure_topic(client_options(servers, {}), topic, partitions=partitions)
    with closing(KafkaProducer(bootstrap_servers=servers, linger_ms=50)) as producer:
        for number, (_, event) in enumerate(stream):
            if number % 1000 == 500:
                for junk in (b"{half", b"[]", b'{"kind":"impression"}', b'{"kind":"view"}'):
                    producer.send(topic, junk, partition=0)
            key = event["impression_id"].encode()
            producer.send(topic, json.dumps(event).encode(), key=key)
        producer.flush()


def find_flink() -> tuple[str, Path]:
    """Return the interpreter with PyFlink and the connector, or skip the test."""
    python = os.environ.get("FLINK_PYTHON")
    if not python:
        pytest.skip("no Flink: set FLINK_PYTHON to an interpreter that has apache-flink==2.0.2")
    beside = ROOT.parent / "shared" / "flink"
    named = os.environ.get("FLINK_KAFKA_CONNECTOR")
    found = [Path(named)] if named else sorted(beside.glob("flink-sql-connector-kafka-*.jar"))
    if not found or not found[-1].is_file():
        pytest.skip(f"no Kafka connector in {named or beside}: set FLINK_KAFKA_CONNECTOR")
    return python, found[-1]


def label_in_flink(
    servers: str, events: str, examples: str, *, parallelism: int, sql: Path | None = None
) -> None:
    """Run the job to the end of its topic."""
    python, connector = find_flink()
    command = [python, EXAMPLE / "submit.py", "--connector", connector, "--until-end"]
    command += ["--bootstrap-servers", servers, "--events", events, "--examples", examples]
    command += ["--parallelism", parallelism, "--sql", sql or EXAMPLE / "examples.sql"]
    done = subprocess.run(
        dies_with_parent([str(word) for word in command]),
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, end_of(done.stdout + done.stderr)


def learned(servers: str, topic: str, state: Path) -> tuple[Manifest, Any]:
    """Learn a topic to its end; return the manifest of the last snapshot, and the last report."""
    kinds = {kind: ",".join(field.name for field in FIELDS if field.kind == kind) for kind in TYPES}
    chosen = [part for kind, names in kinds.items() for part in ("-X", f"features.{kind}={names}")]
    # Numbers are fitted to the first records of a topic, which are others where these are late.
    others = ("features.fit_numbers=false", "baseline.enabled=false")
    small = (option for option in SMALL if option.startswith(("model.", "learn.")))
    chosen += [part for option in (*others, *small) for part in ("-X", option)]
    succeed(
        *("run", "--topic", topic, "--bootstrap-servers", servers, "--until-end"),
        *("--state", state, *own_topics(topic), *chosen),
    )
    newest = snapshot.newest(state / "snapshots")
    assert newest
    *_, last = read_reports(state)
    return snapshot.read_manifest(newest), last


@pytest.mark.long
@pytest.mark.parametrize(("partitions", "late"), [(1, True), (4, False)])
def test_the_job_labels_as_our_own_join_and_teaches_the_same_model(
    kafka_broker: str, topic: str, tmp_path: Path, partitions: int, late: bool
) -> None:
    find_flink()
    stream = arrivals(4000, late=late)
    produce(kafka_broker, topic, stream, partitions=partitions)
    joined, report = learned(kafka_broker, topic, tmp_path / "joined")
    counters = report["counters"]
    hit = ("clicks_joined", "clicks_early", "clicks_late", "clicks_duplicate", "clicks_unmatched")
    assert all(counters[name] > 20 for name in (*hit, "impressions_duplicate"))
    assert (counters["impressions_late"] > 20) == late

    examples = f"{topic}.examples"
    ensure_topic(client_options(kafka_broker, {}), examples, partitions=partitions)
    label_in_flink(kafka_broker, topic, examples, parallelism=min(2, partitions))
    written = [json.loads(record.value or b"") for record in read_records(kafka_broker, examples)]
    assert len({each["impression_id"] for each in written}) == len(written)
    assert sum(each["label"] for each in written) == counters["clicks_joined"]

    labelled, report = learned(kafka_broker, examples, tmp_path / "labelled")
    assert report["counters"]["labelled"] == len(written)
    assert report["counters"]["labelled_late"] == report["counters"]["labelled_duplicate"] == 0
    assert labelled.ledger == joined.ledger
    assert labelled.weights_sha256 == joined.weights_sha256
