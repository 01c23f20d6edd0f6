"""Kafka as a source of records, through kafka-python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stream_ctr.connectors.kafka import inside
from stream_ctr.connectors.kafka.client import open_consumer
from stream_ctr.connectors.kafka.codecs import check_codecs
from stream_ctr.connectors.kafka.columns_reader import ColumnsReader
from stream_ctr.connectors.kafka.public_reader import PublicReader
from stream_ctr.connectors.kafka.reader import Reader, news_seconds
from stream_ctr.connectors.kafka.topic_source import OnLost, TopicSource


class KafkaSource(TopicSource):
    """All partitions of the topics as columns, from the beginning or from where `seek` leads.

    `until_end` ends at the end that the log had when the source was opened: later records are not
    seen, and `finished` becomes true. Without it the source goes on forever. A broker that goes
    away yields empty polls until it is back.

    `group` is the consumer group that `commit` writes to; nothing is ever read from it. `client`
    comes from `client_options`; a `group.id` in it is not used here.

    A value of more than `max_record_bytes` is cut to one byte more than that, so that it can be
    recognised and weighs little. Records that retention has deleted, or whose batch is damaged,
    are an error; with `on_lost="skip"` reading goes on after them and `lost` counts them. Every
    `topic_check_seconds` the source checks that its topics are still those that it began with.

    With a release of kafka-python that differs inside from the known ones, a warning says so and
    records come through its public interface, slower (`public_reader`).

    Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaCodecMissing`.
    """

    def __init__(
        self,
        topics: Sequence[str],
        *,
        client: Mapping[str, object],
        group: str,
        until_end: bool = False,
        max_record_bytes: int = 1 << 20,
        on_lost: OnLost = "stop",
        topic_check_seconds: float = 30.0,
    ) -> None:
        super().__init__(
            open_reader(topics, client=client, group=group, max_record_bytes=max_record_bytes),
            until_end=until_end,
            on_lost=on_lost,
            topic_check_seconds=news_seconds(client, topic_check_seconds),
        )


def open_reader(
    topics: Sequence[str], *, client: Mapping[str, object], group: str, max_record_bytes: int
) -> Reader:
    """Return the reader that the installed release of kafka-python allows.

    Raises `KafkaUnreachable`, `KafkaTopicMissing` and `KafkaCodecMissing`.
    """
    check_codecs()
    consumer = open_consumer(client)
    try:
        make = PublicReader if inside.why_not_columns(consumer) else ColumnsReader
        return make(consumer, topics, client=client, group=group, max_record_bytes=max_record_bytes)
    except BaseException:
        consumer.close()
        raise
