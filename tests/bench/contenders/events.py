"""Reads the events of a topic as a user would: one Python object each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kafka import KafkaConsumer, TopicPartition


def read(servers: str, topic: str, at_most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (partition, event) up to the present end of the topic, or `at_most` events (0: all)."""
    consumer = KafkaConsumer(
        bootstrap_servers=servers, auto_offset_reset="earliest", enable_auto_commit=False
    )
    try:
        partitions = [
            TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))
        ]
        consumer.assign(partitions)
        left = sum(consumer.end_offsets(partitions).values())
        left = min(left, at_most) if at_most else left
        while left > 0:
            for record in consumer:
                yield record.partition, json.loads(record.value)
                left -= 1
                if not left:
                    return
    finally:
        consumer.close()
