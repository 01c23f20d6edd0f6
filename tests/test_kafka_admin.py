"""Topics of a cluster: created and looked up."""

from __future__ import annotations

from stream_ctr.connectors.kafka import client_options, ensure_topic, topic_partitions
from stream_ctr.connectors.kafka.admin import partition_counts


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
