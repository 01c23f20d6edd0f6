"""Topics filled through a real client."""

from __future__ import annotations

import itertools
from contextlib import closing

import pyarrow as pa

from stream_ctr.connectors.kafka import KafkaSink, client_options, ensure_topic
from stream_ctr.logs.simulate import Simulation


def produced(servers: str, topic: str, events: slice, partitions: int = 2) -> None:
    """Send some events of the simulation to a topic, which is created if it is not there."""
    client = client_options(servers, {})
    ensure_topic(client, topic, partitions=partitions)
    with closing(KafkaSink(client)) as sink:
        sink.send_batch(topic, simulated(events.stop)[events])


def simulated(count: int) -> pa.LargeBinaryArray:
    batches = itertools.islice(Simulation(10_000_000, seed=11).batches(), 1 + count // 1000)
    return pa.concat_arrays([batch.value for batch in batches])[:count]
