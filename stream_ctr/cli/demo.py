"""The demo: the whole system on one machine, with the same replay, run and subscriber as ever."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from stream_ctr.cli import runs
from stream_ctr.cli.client import client_options, connector_errors
from stream_ctr.cli.display import final_table
from stream_ctr.cli.replay import produce
from stream_ctr.cli.voice import say
from stream_ctr.config import Config
from stream_ctr.connectors import kafka
from stream_ctr.connectors.embedded import EmbeddedBroker
from stream_ctr.connectors.errors import EmbeddedUnavailable
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.subscriber import Subscriber
from stream_ctr.train.report import Report, to_json_object

_LOAD_SECONDS = 60.0


def run_demo(
    config: Config, *, impressions: int, seed: int, state: Path, keep: bool = True
) -> None:
    """Replay a simulated stream into an embedded broker, learn from it, and follow the snapshots.

    The result goes to standard output. Without the embedded broker the stream is read directly, and
    the output says so. Without `keep` the caller removes `state`, and the output says that.

    Impressions are not scored as served: hours of event time pass in seconds here, so that the age
    of what is served would depend on the machine.
    """
    metrics = config.metrics.model_copy(update={"served_share": 0.0})
    config = config.model_copy(update={"metrics": metrics})
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
            say(f"note: {error}; reading the same stream without a broker")
            report = runs.train_on_logs([simulation], config, lease)
        if report is None:  # stopped before it began
            return
        runs.require_published(report)  # else the subscriber would wait for it
        pointer = _wait_for(subscriber, str(report.snapshot))
    if not Console().is_terminal:  # on a terminal the run has shown it
        Console().print(final_table(to_json_object(report)))
    if pointer:
        print(
            f"subscriber: loaded {pointer.snapshot} {delays[-1]:.2f} s after it was taken, verified"
        )
    if not keep:
        print("state:      removed; --state DIR keeps its reports and snapshots")
        return
    print(f"reports:    {state / 'reports.jsonl'}")
    print(f"snapshot:   {state / 'snapshots' / str(report.snapshot)}")


def _wait_for(subscriber: Subscriber, snapshot: str) -> Pointer | None:
    """Wait until the subscriber has loaded `snapshot`; return the pointer that it has then."""
    deadline = time.monotonic() + _LOAD_SECONDS
    while time.monotonic() < deadline:
        if subscriber.pointer and subscriber.pointer.snapshot == snapshot:
            break
        time.sleep(0.05)
    return subscriber.pointer


def _through_kafka(
    servers: str, simulation: Simulation, config: Config, lease: Lease
) -> Report | None:
    client = client_options(servers, None, {})
    topic = config.input.topic
    with connector_errors():
        kafka.ensure_topic(client, topic)
        sink = kafka.KafkaSink(client)
        try:
            count, seconds = produce(simulation, sink, topic, None)
        finally:
            sink.close()
        say(
            f"replayed {count:,} simulated events into topic {topic!r} on {servers} "
            f"in {seconds:.1f} s; learning"
        )
        return runs.train_on_kafka(client, config, lease, until_end=True, fields=simulation.fields)
