"""`doctor` finds each fault that is made real, says what to do, and changes nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ConfigResource,
    ConfigResourceType,
    ResourcePattern,
    ResourceType,
)
from support.brokers import READER, SASL_PASSWORD, ApacheBroker
from support.commands import command
from support.learners import learner

from stream_ctr.cli import checks
from stream_ctr.cli.assembly import run_identity
from stream_ctr.config import load
from stream_ctr.connectors.embedded import free_port
from stream_ctr.connectors.kafka import client_options, ensure_topic
from stream_ctr.evaluate import sketch
from stream_ctr.events.field import Field
from stream_ctr.logs.simulate import Simulation

Event = dict[str, Any]


def pairs(n: int, *, now_ms: int, clicks: bool = True) -> Iterator[tuple[str, Event]]:
    """Yield impressions of the last minutes, each third with a click, as (id, event)."""
    for number in range(n):
        time_ms = now_ms - 60_000 + 100 * number
        shown = {"app": f"app{number % 7}", "age": 20 + number % 40}
        base = {"impression_id": f"i{number}"}
        yield f"i{number}", {**base, "kind": "impression", "time": time_ms, "features": shown}
        if clicks and number % 3 == 0:
            yield f"i{number}", {**base, "kind": "click", "time": time_ms + 50}


def produce(
    servers: str,
    topic: str,
    events: Sequence[tuple[str, Event | bytes]],
    *,
    partitions: int = 2,
    keyed: bool = True,
) -> None:
    """Send events to a topic of their own: to the partition of their id, or in turn."""
    ensure_topic(client_options(servers, {}), topic, partitions=partitions)
    with closing(KafkaProducer(bootstrap_servers=servers)) as producer:
        for number, (key, event) in enumerate(events):
            value = event if isinstance(event, bytes) else json.dumps(event).encode()
            producer.send(
                topic,
                value,
                key=key.encode() if keyed else None,
                partition=int(key[1:]) % partitions if keyed else number % partitions,
            )
        producer.flush()


def now_ms() -> int:
    return int(time.time() * 1000)


def doctor(*arguments: object, code: int = 0) -> dict[str, dict[str, str]]:
    """Return the worst finding of each check."""
    result = command("doctor", "--json", *arguments)
    assert result.exit_code == code, result.output
    order = ("ok", "warning", "error")
    worst: dict[str, dict[str, str]] = {}
    for line in map(json.loads, result.output.splitlines()):
        assert (line["level"] == "ok") == (line["fix"] == "")
        known = worst.get(line["check"])
        if not known or order.index(line["level"]) > order.index(known["level"]):
            worst[line["check"]] = line
    return worst


def faulty(found: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the checks that found something, but for a broker that a busy machine slows down."""
    return {
        check: line["level"]
        for check, line in found.items()
        if line["level"] != "ok" and "slow answer" not in str(line)
    }


@pytest.fixture
def at(tmp_path: Path) -> list[object]:
    return ["--state", tmp_path / "state", "-X", "model.table_bits=12"]


def offsets_and_topics(servers: str) -> tuple[object, ...]:
    with closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        return sorted(topic["name"] for topic in admin.describe_topics()), admin.list_groups()


def test_a_stream_that_is_well_has_no_finding_and_nothing_is_changed(
    embedded_broker: str, topic: str, at: list[object], tmp_path: Path
) -> None:
    produce(embedded_broker, topic, list(pairs(300, now_ms=now_ms())))
    before = offsets_and_topics(embedded_broker)
    found = doctor("--topic", topic, "--bootstrap-servers", embedded_broker, *at)
    assert faulty(found) == {}
    assert offsets_and_topics(embedded_broker) == before
    assert list(tmp_path.iterdir()) == []
    assert found[f"topic {topic}"]["text"] == "2 partitions"
    assert "inferred as" in found["fields"]["text"]
    assert "100 % of the clicks are in their impression's partition" in found["keys"]["text"]
    assert found["coverage"]["text"].startswith("100 % of 50 clicks")
    assert found["events"]["text"].startswith("300 impressions, 100 clicks")
    assert "1 broker, protocol of Kafka" in found["broker"]["text"]
    assert found["codecs"]["text"] == "the records use none"
    assert found[f"topic {topic}.dlq"]["text"] == "does not exist yet; a run creates it"


def test_text_has_a_line_for_each_finding_and_what_to_do(
    embedded_broker: str, topic: str, at: list[object]
) -> None:
    events = list(pairs(300, now_ms=now_ms(), clicks=False))
    produce(embedded_broker, topic, events)
    result = command("doctor", "--topic", topic, "--bootstrap-servers", embedded_broker, *at)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    at_events = lines.index("warning  events: 300 impressions, 0 clicks, 0 labelled examples")
    assert lines[at_events + 1].startswith("         -> is there a topic of clicks")
    assert lines[-1] == "a run can begin; 1 warning"


def test_clicks_in_another_partition_than_their_impression_are_found(
    embedded_broker: str, topic: str, at: list[object]
) -> None:
    produce(embedded_broker, topic, list(pairs(300, now_ms=now_ms())), keyed=False)
    found = doctor("--topic", topic, "--bootstrap-servers", embedded_broker, *at)
    assert faulty(found) == {"keys": "warning"}
    assert found["keys"]["text"].startswith("0 % of the records have a key")


def test_clicks_with_other_ids_than_impressions_are_found(
    embedded_broker: str, topic: str, at: list[object]
) -> None:
    events = [
        (key, {**event, "impression_id": f"x{key}"} if event["kind"] == "click" else event)
        for key, event in pairs(300, now_ms=now_ms())
    ]
    produce(embedded_broker, topic, events)
    found = doctor("--topic", topic, "--bootstrap-servers", embedded_broker, *at)
    assert faulty(found) == {"coverage": "warning"}
    assert found["coverage"]["text"].startswith("0 % of 50 clicks")


@pytest.mark.parametrize(("behind", "level"), [(30, "ok"), (90, "warning")])
def test_labelled_examples_that_come_far_behind_are_found(
    embedded_broker: str, topic: str, at: list[object], behind: int, level: str
) -> None:
    end = now_ms()

    def example(number: int, label: int) -> tuple[str, Event]:
        event = {"kind": "example", "impression_id": f"{number}.{label}", "label": label}
        times = {"time": end + 1000 * (number - 300), "features": {"app": f"a{number % 7}"}}
        return f"i{number}", {**event, **times}

    came = [
        (number + behind * (1 - label), number, label) for number in range(300) for label in (0, 1)
    ]
    produce(embedded_broker, topic, [example(number, label) for _, number, label in sorted(came)])
    found = doctor("--topic", topic, "--bootstrap-servers", embedded_broker, *at)["delays"]
    assert found["level"] == level
    # Each second example is in this partition, and one of the same moment precedes it.
    assert found["text"].startswith(f"labelled examples come up to {behind - 2}s behind")
    assert ("join.allowed_lateness = " in found["fix"]) == (level == "warning")


@pytest.mark.parametrize(("bad", "level", "code"), [(20, "warning", 0), (900, "error", 5)])
def test_malformed_records_are_counted_and_the_first_is_quoted(
    embedded_broker: str, topic: str, at: list[object], bad: int, level: str, code: int
) -> None:
    events: list[tuple[str, Event | bytes]] = [*pairs(300, now_ms=now_ms())]
    events += [(f"i{number}", b"{half") for number in range(bad)]
    produce(embedded_broker, topic, events)
    found = doctor("--topic", topic, "--bootstrap-servers", embedded_broker, *at, code=code)
    assert faulty(found) == {"records": level}
    assert "most often not_json" in found["records"]["text"]


def test_a_producer_whose_clock_is_ahead_is_found(
    embedded_broker: str, topic: str, at: list[object]
) -> None:
    produce(embedded_broker, topic, list(pairs(300, now_ms=now_ms() + 200_000)))
    found = doctor("--topic", topic, "--bootstrap-servers", embedded_broker, *at)
    assert faulty(found) == {"event times": "warning"}


def test_a_machine_whose_clock_is_behind_is_found(
    embedded_broker: str, topic: str, at: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    produce(embedded_broker, topic, list(pairs(300, now_ms=now_ms())))
    behind = time.time() - 3600
    monkeypatch.setattr("stream_ctr.cli.doctor.time.time", lambda: behind)
    found = doctor("--topic", topic, "--bootstrap-servers", embedded_broker, *at)
    assert faulty(found) == {"clock": "warning"}


def test_a_configured_field_that_no_record_has_is_named_with_the_nearest(
    embedded_broker: str, topic: str, at: list[object], tmp_path: Path
) -> None:
    produce(embedded_broker, topic, list(pairs(300, now_ms=now_ms())))
    config = tmp_path / "my.toml"
    config.write_text('[features]\ncategorical = ["apps"]\nnumeric = ["age"]\n')
    servers = ["--bootstrap-servers", embedded_broker]
    found = doctor("--topic", topic, *servers, "--config", config, *at)
    assert faulty(found) == {"fields": "warning"}
    assert "apps (did you mean 'app'?)" in found["fields"]["text"]


def test_an_empty_topic_is_a_warning_and_a_missing_one_an_error(
    embedded_broker: str, topic: str, at: list[object]
) -> None:
    servers = ["--bootstrap-servers", embedded_broker]
    found = doctor("--topic", topic, *servers, *at, code=4)
    assert faulty(found) == {f"topic {topic}": "error"}
    assert "device" in found
    ensure_topic(client_options(embedded_broker, {}), topic)
    assert faulty(doctor("--topic", topic, *servers, *at)) == {"records": "warning"}


def test_without_a_broker_the_machine_is_looked_at_all_the_same(
    topic: str, at: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_ctr.connectors.kafka.timeouts.BOOTSTRAP_SECONDS", 1.0)
    found = doctor("--topic", topic, "--bootstrap-servers", f"127.0.0.1:{free_port()}", *at, code=4)
    assert faulty(found) == {"broker": "error"}
    assert {"device", "memory", "state", "disk", "compiled loops"} <= found.keys()


def test_a_log_is_looked_at_without_a_broker(tmp_path: Path, at: list[object]) -> None:
    log = tmp_path / "log.jsonl"
    Simulation(6000, seed=3).write_jsonl(log)
    found = doctor("--source", log, *at)
    assert faulty(found) == {}
    assert not {"broker", "keys", "clock"} & found.keys()
    assert command("doctor", "--source", tmp_path / "absent.jsonl", *at).exit_code == 2
    assert command("doctor", "--source", log, "--topic", "clicks", *at).exit_code == 2


def test_a_log_that_is_none_is_an_error(tmp_path: Path, at: list[object]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(['{"kind":"view"}'] * 50))
    found = doctor("--source", log, "--format", "events", *at, code=5)
    assert faulty(found)["records"] == "error"


# -- with rights and configuration, which a real broker has ----------------------------------------


def set_config(servers: str, topic: str, **settings: str) -> None:
    named = {key.replace("_", "."): value for key, value in settings.items()}
    with closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=named)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "level", "code"),
    [
        ({"retention_ms": "600000"}, "error", 5),
        ({"retention_ms": "1800000"}, "warning", 0),
        ({"retention_ms": "86400000"}, "ok", 0),
        ({"cleanup_policy": "compact"}, "warning", 0),
    ],
)
def test_a_retention_that_is_shorter_than_the_label_window_is_found(
    apache: ApacheBroker,
    topic: str,
    at: list[object],
    settings: dict[str, str],
    level: str,
    code: int,
) -> None:
    servers = apache.bootstrap_servers
    produce(servers, topic, list(pairs(60, now_ms=now_ms())))
    set_config(servers, topic, **settings)
    found = doctor("--topic", topic, "--bootstrap-servers", servers, *at, code=code)
    assert found[f"retention of {topic}"]["level"] == level
    assert faulty(found).keys() <= {f"retention of {topic}"}


@pytest.mark.slow
def test_rights_that_the_client_lacks_are_found(
    apache: ApacheBroker, topic: str, at: list[object]
) -> None:
    produce(apache.bootstrap_servers, topic, list(pairs(60, now_ms=now_ms())))
    login = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": READER,
        "sasl.password": SASL_PASSWORD,
    }
    options = [part for pair in login.items() for part in ("-X", "=".join(pair))]
    own = ["-X", f"metrics.topic={topic}.m", "-X", f"snapshots.topic={topic}.s"]
    arguments = ["--topic", topic, "--bootstrap-servers", apache.sasl_servers, *options, *own, *at]
    assert faulty(doctor(*arguments, code=4))[f"topic {topic}"] == "error"  # it may not see it
    allow(apache.bootstrap_servers, topic, ACLOperation.DESCRIBE)
    found = doctor(*arguments, code=4)
    assert found[f"rights on {topic}"]["text"] == "this client may not read it"
    assert "records" not in found
    allow(apache.bootstrap_servers, topic, ACLOperation.READ)
    found = doctor(*arguments, code=4)
    assert found[f"rights on {topic}"]["level"] == "ok"
    assert found["records"]["level"] == "ok"
    assert found[f"topic {topic}.dlq"]["level"] == "error"
    assert "may not create topics" in found[f"topic {topic}.dlq"]["text"]
    ensure_topic(client_options(apache.bootstrap_servers, {}), f"{topic}.dlq")
    found = doctor(*arguments, code=4)
    assert found[f"rights on {topic}.dlq"]["text"] == "this client may not write to it"


def allow(servers: str, prefix: str, operation: ACLOperation) -> None:
    pattern = ResourcePattern(ResourceType.TOPIC, prefix, ACLResourcePatternType.PREFIXED)
    with closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        admin.create_acls(
            [
                ACL(
                    principal=f"User:{READER}",
                    host="*",
                    operation=operation,
                    permission_type=ACLPermissionType.ALLOW,
                    resource_pattern=pattern,
                )
            ]
        )
    time.sleep(1.0)


# -- the machine -----------------------------------------------------------------------------------


def machine(state: Path, **sections: Any) -> dict[str, checks.Finding]:
    config = load(environ={}, overrides=sections)
    return {finding.check: finding for finding in checks.check_machine(config, state, ())}


def test_a_table_that_has_no_room_in_memory_is_found_before_it_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = machine(tmp_path, model={"table_bits": 20})
    assert found["memory"].level == "ok"
    monkeypatch.setattr(checks, "available_memory", lambda: 2 << 30)
    found = machine(tmp_path, model={"table_bits": 20})
    assert found["memory"].level == "warning"
    assert "2,048.0 MiB" in found["memory"].text
    found = machine(tmp_path, model={"table_bits": 24})
    assert found["memory"].level == "error"


def test_the_bytes_of_tables_are_those_that_learners_allocate(tmp_path: Path) -> None:
    config = load(environ={}, overrides={"model": {"name": "deepfm", "table_bits": 12}})
    specs = run_identity(config, (Field("app", "categorical"),)).specs
    made = learner("deepfm", fields=1, table_bits=12)
    assert checks.table_bytes(specs["deepfm"]) == made.weights()["table"].nbytes


def test_the_memory_of_a_cgroup_bounds_that_of_the_machine(tmp_path: Path) -> None:
    assert checks.available_memory() > 1 << 28
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4194304 kB\n")
    assert checks.available_memory(tmp_path) == 4 << 30
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert checks.available_memory(tmp_path) == 4 << 30
    (group / "memory.max").write_text(f"{3 << 30}\n")
    (group / "memory.current").write_text(f"{1 << 30}\n")
    assert checks.available_memory(tmp_path) == 2 << 30


def test_a_disk_without_room_for_a_snapshot_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = machine(tmp_path, model={"table_bits": 12})
    assert found["disk"].level == "ok"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300 << 20))
    assert machine(tmp_path, model={"table_bits": 20})["disk"].level == "warning"
    assert machine(tmp_path, model={"table_bits": 22})["disk"].level == "error"


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    found = machine(tmp_path, learn={"device": "cuda:63"})
    assert found["device"].level == "error"
    assert found["device"].exit_code == 3


def test_a_cache_that_cannot_be_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.check_cache().level == "ok"
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(sketch, "cache_folder", lambda: str(blocked / "cache"))
    found = checks.check_cache()
    assert found.level == "warning"
    assert "NUMBA_CACHE_DIR" in found.fix
