"""Kafka as a source and a sink of records.

Two clients read: kafka-python (`KafkaSource`) and, if it is installed, confluent-kafka
(`stream_ctr.connectors.kafka.confluent.ConfluentSource`). One class keeps count for both
(`topic_source`, `positions`); a `reader` fetches. kafka-python does everything else: it writes
(`sink`), creates topics (`admin`) and reads small topics (`pointers`).
"""

from stream_ctr.connectors.errors import (
    KafkaCodecMissing,
    KafkaDeliveryFailed,
    KafkaFailure,
    KafkaOptionError,
    KafkaReadFailed,
    KafkaRefused,
    KafkaTopicMissing,
    KafkaUnreachable,
    LogTruncated,
    PositionLost,
    TopicChanged,
)
from stream_ctr.connectors.kafka.admin import ensure_topic, topic_partitions
from stream_ctr.connectors.kafka.inspection import (
    ClusterFacts,
    Sample,
    TopicFacts,
    newest_records,
    survey,
)
from stream_ctr.connectors.kafka.options import client_options, parse_properties, read_properties
from stream_ctr.connectors.kafka.pointers import (
    PointerReader,
    RecordFollower,
    StoredRecord,
    stored_records,
)
from stream_ctr.connectors.kafka.sink import KafkaSink
from stream_ctr.connectors.kafka.source import KafkaSource
from stream_ctr.connectors.kafka.topic_scan import TopicScan

__all__ = [
    "ClusterFacts",
    "KafkaCodecMissing",
    "KafkaDeliveryFailed",
    "KafkaFailure",
    "KafkaOptionError",
    "KafkaReadFailed",
    "KafkaRefused",
    "KafkaSink",
    "KafkaSource",
    "KafkaTopicMissing",
    "KafkaUnreachable",
    "LogTruncated",
    "PointerReader",
    "PositionLost",
    "RecordFollower",
    "Sample",
    "StoredRecord",
    "TopicChanged",
    "TopicFacts",
    "TopicScan",
    "client_options",
    "ensure_topic",
    "newest_records",
    "parse_properties",
    "read_properties",
    "stored_records",
    "survey",
    "topic_partitions",
]
