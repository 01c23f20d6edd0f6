"""The source through kafka-python: what no other client does as it does."""

from __future__ import annotations

from contextlib import closing

import pytest
from kafka import KafkaAdminClient
from support.sources import numbered, poll_until, write

from stream_ctr.connectors.kafka import (
    KafkaReadFailed,
    KafkaSink,
    KafkaSource,
    client_options,
    codecs,
    ensure_topic,
    stored_records,
    topic_partitions,
)


@pytest.mark.slow
def test_small_topics_hold_no_batch_that_expands_beyond_the_limit(
    kafka_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "MAX_BATCH_BYTES", 1 << 20)
    client = client_options(kafka_broker, {"max.request.size": str(1 << 30)})
    ensure_topic(client, topic)
    with closing(KafkaSink(client, compression="zstd")) as sink:
        sink.send(topic, bytes(3 << 20))
    with pytest.raises(KafkaReadFailed, match="the batch expands to more than 1 MiB"):
        list(stored_records(client, topic))


@pytest.mark.slow
def test_no_request_asks_for_a_deleted_topic_to_be_created(
    embedded_broker: str, topic: str
) -> None:
    client = client_options(embedded_broker, {})
    write(embedded_broker, topic, numbered(5))
    source = KafkaSource([topic], client=client, group="g")
    with closing(source), closing(KafkaAdminClient(bootstrap_servers=embedded_broker)) as admin:
        poll_until(source, lambda: source.positions() == {0: 5})
        admin.delete_topics([topic])
        for _ in range(5):
            source.poll(0.1)
        cluster = source._reader._consumer._cluster  # type: ignore[attr-defined]
        assert not cluster.metadata_request().allow_auto_topic_creation
    assert topic_partitions(client, topic) is None
