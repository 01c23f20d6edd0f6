"""`stream-ctr demo`: the whole system on one machine. Nothing here is special: the same replay, the same run, the same subscriber."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from stream_ctr.cli import runs
from stream_ctr.cli.display import final_table
from stream_ctr.config import Config
from stream_ctr.connectors import kafka
from stream_ctr.connectors.embedded import EmbeddedBroker
from stream_ctr.connectors.errors import EmbeddedUnavailable
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.subscriber import Subscriber


def run_demo(config: Config, *, impressions: int, seed: int, state: Path) -> None:
    """Replay a simulated stream into an embedded broker, learn from it, follow the snapshots; print the result to standard output.

    Without the embedded broker the same stream is read without any, and the output says so.
    """
    simulation = Simulation(impressions, seed=seed)
    delays: list[float] = []

    def note_delay(pointer: Pointer) -> None:
        delays.append(time.time() - pointer.created_ms / 1000)

    with (
        runs.state_directory(state) as lease,
        Subscriber(state, on_snapshot=note_delay) as subscriber,
    ):
        try:
            with EmbeddedBroker() as broker:
                report = _through_kafka(broker.bootstrap_servers, simulation, config, lease)
        except EmbeddedUnavailable as error:
            runs.say(f"note: {error}; reading the same stream without a broker")
            report = runs.train_on_log(simulation, config, lease)
        deadline = time.monotonic() + 60.0
        while (pointer := subscriber.pointer) is None or pointer.snapshot != report["snapshot"]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    if not Console().is_terminal:  # there the run has shown it
        Console().print(final_table(report))
    if pointer:
        print(
            f"subscriber: loaded {pointer.snapshot} {delays[-1]:.2f} s after it was taken, verified"
        )
    print(f"reports:    {state / 'reports.jsonl'}")
    print(f"snapshot:   {state / 'snapshots' / report['snapshot']}")


def _through_kafka(
    servers: str, simulation: Simulation, config: Config, lease: Lease
) -> dict[str, Any]:
    client = runs.client(servers, None, {})
    with runs.connector_errors():
        kafka.ensure_topic(client, config.input.topic)
        sink = kafka.KafkaSink(client)
        try:
            count, seconds = runs.produce(simulation, sink, config.input.topic, None)
        finally:
            sink.close()
        runs.say(
            f"replayed {count:,} simulated events into topic {config.input.topic!r} on {servers} in {seconds:.1f} s; learning"
        )
        return runs.train_on_kafka(client, config, lease, until_end=True, fields=simulation.fields)
