"""The source through kafka-python: what no other client does as it does."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

import pytest
from kafka import KafkaAdminClient
from support.brokers import ApacheBroker
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome
from support.sources import all_rows, numbered, offsets, poll_until, values, write

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

_PEAK = """
import sys
from stream_ctr.connectors.kafka import KafkaSource, client_options
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))
before, lengths = peak(), []
client = client_options(sys.argv[1], {})
source = KafkaSource([sys.argv[2]], client=client, group="g", until_end=True)
while not source.finished:
    lengths += [value.as_buffer().size for value in source.poll(1.0).value]
print(*lengths, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.bad_input(
    "a value that decompresses past the limit",
    via="a batch of zstd, 12 kB on the wire and 400 MiB in memory",
)
def test_a_value_of_400_mib_in_12_kb_of_zstd_is_cut_and_held_twice_at_most(
    apache: ApacheBroker, topic: str, outcome: Outcome
) -> None:
    size = 400 << 20
    client = client_options(apache.bootstrap_servers, {"max.request.size": str(1 << 30)})
    ensure_topic(client, topic)
    with closing(KafkaSink(client, compression="zstd")) as sink:
        sink.send(topic, bytes(size))
        sink.flush(PATIENCE_SECONDS)
        sink.send(topic, b"after")
    (segment,) = apache.segments(topic)
    assert segment.stat().st_size < 14_000
    command = [sys.executable, "-c", _PEAK, apache.bootstrap_servers, topic]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cut, after, added_mib = map(int, done.stdout.split())
    assert (cut, after) == ((1 << 20) + 1, 5)
    assert added_mib < 2.5 * 400, "the batch is held twice while its pieces are joined"
    outcome(
        f"cut to 1 MiB and a byte; memory rose by {added_mib:,} MiB while the batch was expanded"
    )


@pytest.mark.slow
def test_a_batch_that_expands_beyond_the_limit_is_damage(
    kafka_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "MAX_BATCH_BYTES", 4 << 20)
    client = client_options(kafka_broker, {"max.request.size": str(1 << 30)})
    ensure_topic(client, topic, partitions=4)
    for partition, compression in enumerate(("zstd", "gzip", "lz4", "snappy")):
        with closing(KafkaSink(client, compression=compression)) as sink:
            for value in (bytes(3 << 20), bytes(5 << 20), b"after"):
                sink.send(topic, value, partition=partition)
                sink.flush(PATIENCE_SECONDS)
    expands = "the batch expands to more than 4 MiB"
    stops = "partition . of topic .* cannot be read on at offset 1"
    source = KafkaSource([topic], client=client, group="g", until_end=True)
    with closing(source), pytest.raises(KafkaReadFailed, match=f"{stops}: .*{expands}"):
        all_rows(source)
    with pytest.raises(KafkaReadFailed, match=expands):
        list(stored_records(client, topic))
    source = KafkaSource(
        [topic], client=client, group="g", until_end=True, on_lost="skip", max_record_bytes=10
    )
    with closing(source):
        found = all_rows(source)
        assert source.lost() == {0: 1, 1: 1, 2: 1, 3: 1}
    for partition in range(4):
        assert offsets(found, partition) == [0, 2]
        assert values(found, partition) == [bytes(11), b"after"]


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
