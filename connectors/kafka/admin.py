"""Topics of a cluster: create them and look them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kafka.errors import (
    ClusterAuthorizationFailedError,
    IncompatibleBrokerVersion,
    InvalidReplicationFactorError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
)

from stream_ctr.connectors.errors import KafkaFailure
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.client import open_admin
from stream_ctr.connectors.kafka.diagnosis import how_to_create, servers


def ensure_topic(
    client: Mapping[str, object],
    topic: str,
    *,
    partitions: int = 1,
    compacted: bool = False,
    retention_ms: int | None = None,
) -> bool:
    """Create the topic if it is missing, and return whether it was created.

    Its replication is the broker's default, and so is its retention without `retention_ms`. A topic
    that exists stays as it is, and needs no right but to describe it. Raises `KafkaUnreachable` and
    `KafkaFailure`.
    """
    configs = {"cleanup.policy": "compact"} if compacted else {}
    if retention_ms is not None:
        configs |= {"cleanup.policy": "delete", "retention.ms": str(retention_ms)}
    settings: dict[str, object] = {"num_partitions": partitions, "configs": configs}
    wait = {
        "timeout_ms": timeouts.milliseconds(timeouts.ANSWER_SECONDS),
        "wait_for_metadata": True,
    }
    with open_admin(client) as admin:
        if topic in _partition_counts(admin):
            return False
        try:
            try:
                admin.create_topics({topic: settings}, **wait)
            except (IncompatibleBrokerVersion, InvalidReplicationFactorError):
                admin.create_topics({topic: {**settings, "replication_factor": 1}}, **wait)
        except TopicAlreadyExistsError:
            return False
        except (TopicAuthorizationFailedError, ClusterAuthorizationFailedError) as error:
            raise KafkaFailure(
                f"topic {topic!r} does not exist on {servers(client)}, or may not be described, "
                f"and this client may not create it ({type(error).__name__}); "
                f"{how_to_create(client, topic, partitions)}"
            ) from error
    return True


def topic_partitions(client: Mapping[str, object], topic: str) -> int | None:
    """Return how many partitions the topic has; None when it does not exist.

    Raises `KafkaUnreachable` and `KafkaFailure`.
    """
    return partition_counts(client).get(topic)


def partition_counts(client: Mapping[str, object]) -> dict[str, int]:
    """Return how many partitions each topic of the cluster has.

    Raises `KafkaUnreachable` and `KafkaFailure`.
    """
    with open_admin(client) as admin:
        return _partition_counts(admin)


def _partition_counts(admin: Any) -> dict[str, int]:
    # All topics: to ask for one by name creates it where brokers create topics by themselves.
    return {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics()}
