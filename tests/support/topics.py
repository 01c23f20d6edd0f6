"""Topics filled with records through the sink."""

from __future__ import annotations

import itertools
from contextlib import closing

import pyarrow as pa

from stream_ctr.connectors.kafka import KafkaSink, client_options, ensure_topic
from stream_ctr.logs.simulate import Simulation

_BATCH_EVENTS = 1000  # at least so many are in a batch of the simulation


def produced(servers: str, topic: str, events: slice, partitions: int = 2) -> None:
    """Send some events of the simulation to a topic, which is created if it is missing."""
    client = client_options(servers, {})
    ensure_topic(client, topic, partitions=partitions)
    with closing(KafkaSink(client)) as sink:
        sink.send_batch(topic, simulated(events.stop)[events])


def sent(servers: str, topic: str, values: pa.LargeBinaryArray, partitions: int = 1) -> None:
    """Send records to a topic, one to each partition in turn; it is created if it is missing."""
    client = client_options(servers, {})
    ensure_topic(client, topic, partitions=partitions)
    with closing(KafkaSink(client)) as sink:
        for number in range(partitions):
            for value in values.to_pylist()[number::partitions]:
                sink.send(topic, value, partition=number)


def simulated(count: int) -> pa.LargeBinaryArray:
    """Return the first events of a simulation, always the same."""
    simulation = Simulation(10_000_000, seed=11)
    batches = itertools.islice(simulation.batches(), 1 + count // _BATCH_EVENTS)
    return pa.concat_arrays([batch.value for batch in batches])[:count]
