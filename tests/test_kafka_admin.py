"""Topics of a cluster: created and looked up."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
)
from support.brokers import READER, SASL_PASSWORD, ApacheBroker
from support.commands import command, own_topics
from support.lineage import QUICK
from support.reliability import Outcome
from support.topics import produced

from stream_ctr.connectors.kafka import client_options, ensure_topic, topic_partitions
from stream_ctr.connectors.kafka.admin import partition_counts

LOGIN = {
    "security.protocol": "SASL_PLAINTEXT",
    "sasl.mechanism": "PLAIN",
    "sasl.username": READER,
    "sasl.password": SASL_PASSWORD,
}


def test_a_topic_is_created_once(broker: str, topic: str) -> None:
    client = client_options(broker, {})
    assert topic_partitions(client, topic) is None
    assert ensure_topic(client, topic, partitions=5)
    assert not ensure_topic(client, topic, partitions=7)
    assert topic_partitions(client, topic) == 5


def test_all_topics_are_counted(embedded_broker: str, topic: str) -> None:
    client = client_options(embedded_broker, {})
    for partitions in (1, 3):
        ensure_topic(client, f"{topic}-{partitions}", partitions=partitions)
    counts = partition_counts(client)
    assert (counts[f"{topic}-1"], counts[f"{topic}-3"]) == (1, 3)
    assert topic not in counts


def allow(servers: str, prefix: str) -> None:
    """Let `READER` read and write the topics, and use the groups, that begin with the prefix."""
    rights = [
        (ResourceType.TOPIC, ACLOperation.READ),
        (ResourceType.TOPIC, ACLOperation.WRITE),
        (ResourceType.GROUP, ACLOperation.READ),
    ]
    with closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        admin.create_acls(
            [
                ACL(
                    principal=f"User:{READER}",
                    host="*",
                    operation=operation,
                    permission_type=ACLPermissionType.ALLOW,
                    resource_pattern=ResourcePattern(kind, prefix, ACLResourcePatternType.PREFIXED),
                )
                for kind, operation in rights
            ]
        )


@pytest.mark.slow
@pytest.mark.parametrize("client_name", ["kafka-python", "confluent"])
@pytest.mark.security(
    "no more rights than reading and writing",
    how="a principal with READ and WRITE on its topics and READ on its group, without CREATE",
)
def test_a_principal_that_may_create_nothing_runs_where_every_topic_exists(
    client_name: str, apache: ApacheBroker, topic: str, tmp_path: Path, outcome: Outcome
) -> None:
    produced(apache.bootstrap_servers, topic, slice(500))
    allow(apache.bootstrap_servers, topic)
    properties = tmp_path / "client.properties"
    properties.write_text("".join(f"{name}={value}\n" for name, value in LOGIN.items()))
    run = ["run", "--topic", topic, "--bootstrap-servers", apache.sasl_servers, "--until-end"]
    run += ["--kafka-config", str(properties), "--client", client_name, *own_topics(topic), *QUICK]
    run += ["--state", str(tmp_path / "state"), "-X", f"input.group={topic}"]
    refused = command(*run)
    assert refused.exit_code == 4, refused.output
    assert f"topic '{topic}.dlq' does not exist" in refused.output
    assert "this client may not create it" in refused.output
    assert f"--create --topic {topic}.dlq --partitions 1" in refused.output
    administrator = client_options(apache.bootstrap_servers, {})
    for name in ("dlq", "metrics", "snapshots"):
        ensure_topic(administrator, f"{topic}.{name}", compacted=name == "snapshots")
    done = command(*run)
    assert done.exit_code == 0, done.output
    assert "behind" not in done.output, "the group's offsets are committed"
    outcome("runs where every topic exists; names a missing one and how to create it")
