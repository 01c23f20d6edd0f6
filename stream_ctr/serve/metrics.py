"""What Prometheus scrapes from a prediction server, with its client library.

Names, units and types follow https://prometheus.io/docs/practices/naming/. No id is a label: runs
and snapshots would be series without end, so numbers and times of the snapshot say which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector

from stream_ctr.serve.answers import Answer
from stream_ctr.serve.waiting import WaitingRequests
from stream_ctr.snapshots.delays import DelayHistogram
from stream_ctr.snapshots.followed_deltas import REFUSALS
from stream_ctr.snapshots.subscriber import Subscriber

_PREFIX = "stream_ctr_serve"
_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_MILLISECONDS = 1000
_CONCERNED = ("source", "pointer", "snapshot", "on_snapshot", "delta_source", "on_delta")
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts of requests, and the state of the subscriber when it is asked for."""

    def __init__(
        self, subscriber: Subscriber, waiting: WaitingRequests, is_ready: Callable[[], bool]
    ) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            f"{_PREFIX}_requests",
            "Requests for predictions, by status.",
            ["status"],
            registry=registry,
        )
        self._refusals = Counter(
            f"{_PREFIX}_refusals",
            "Requests without predictions, by reason.",
            ["reason"],
            registry=registry,
        )
        self._rows = Counter(f"{_PREFIX}_rows", "Rows that were predicted.", registry=registry)
        self._seconds = Histogram(
            f"{_PREFIX}_request_duration_seconds",
            "Seconds from the head of a request to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._together = Histogram(
            f"{_PREFIX}_prediction_rows",
            "Rows that were predicted together.",
            buckets=_ROWS,
            registry=registry,
        )
        self._prediction = Histogram(
            f"{_PREFIX}_prediction_duration_seconds",
            "Seconds of one prediction by the model.",
            buckets=_SECONDS,
            registry=registry,
        )
        registry.register(_State(subscriber, waiting, is_ready))
        ProcessCollector(registry=registry)

    def answered(self, answer: Answer, seconds: float) -> None:
        """Count an answer, and the seconds that it took."""
        self._requests.labels(str(int(answer.status))).inc()
        self._seconds.observe(seconds)
        if answer.reason:
            self._refusals.labels(answer.reason).inc()
        else:
            self._rows.inc(answer.rows)

    def predicted(self, rows: int, seconds: float) -> None:
        """Count one prediction of the model."""
        self._together.observe(rows)
        self._prediction.observe(seconds)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self._registry)


class _State:
    """Read the subscriber and the queue at each scrape."""

    def __init__(
        self, subscriber: Subscriber, waiting: WaitingRequests, is_ready: Callable[[], bool]
    ) -> None:
        self._subscriber = subscriber
        self._waiting = waiting
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        yield _gauge("waiting_requests", "Requests that wait for the model.", len(self._waiting))
        yield _gauge("waiting_requests_limit", "Requests that may wait for it.", self._waiting.most)
        yield _gauge("ready", "1 once a model is loaded.", self._is_ready())
        yield from self._of_subscriber()
        yield from self._of_snapshot()
        yield from self._of_deltas()

    def _of_subscriber(self) -> Iterator[Metric]:
        health = self._subscriber.health
        yield _gauge("following", "1 while newer snapshots are looked for.", health.following)
        yield _gauge("healthy", "1 if the newest known snapshot is loaded.", health.ok)
        if health.polled_seconds is not None:
            yield _gauge(
                "pointers_age_seconds",
                "Seconds since the published pointer was last read.",
                health.polled_seconds,
            )
        failures = CounterMetricFamily(
            f"{_PREFIX}_subscriber_failures",
            "Errors while following, by what they concern.",
            labels=["concerned"],
        )
        for concerned in _CONCERNED:
            failures.add_metric([concerned], health.failures.get(concerned, 0))
        yield failures
        yield CounterMetricFamily(
            f"{_PREFIX}_foreign_pointers",
            "Pointers of other runs, which were refused.",
            value=sum(health.refused.values()),
        )
        invalid = CounterMetricFamily(
            f"{_PREFIX}_invalid_features",
            "Invalid values, names and rows that were scored as missing, by reason.",
            labels=["reason"],
        )
        for reason, count in sorted(self._subscriber.invalid.copy().items()):
            invalid.add_metric([reason], count)
        yield invalid

    def _of_snapshot(self) -> Iterator[Metric]:
        pointer = self._subscriber.pointer
        if pointer is None:
            return
        loaded = self._subscriber.health.loaded_seconds or 0.0
        yield _gauge("snapshot_sequence", "Number of the served snapshot.", pointer.sequence)
        yield _gauge("snapshot_epoch", "Epoch of the served snapshot.", pointer.epoch)
        yield _gauge(
            "snapshot_examples", "Examples that the served snapshot has learned.", pointer.examples
        )
        yield _gauge(
            "snapshot_event_timestamp_seconds",
            "Event time up to which the served snapshot has learned.",
            pointer.event_time_ms / _MILLISECONDS,
        )
        yield _gauge(
            "snapshot_created_timestamp_seconds",
            "Time at which the served snapshot was taken.",
            pointer.created_ms / _MILLISECONDS,
        )
        yield _gauge("snapshot_age_seconds", "Seconds since it was loaded or adopted.", loaded)

    def _of_deltas(self) -> Iterator[Metric]:
        deltas, health = self._subscriber.deltas, self._subscriber.health
        outcomes = CounterMetricFamily(
            f"{_PREFIX}_deltas", "Deltas that came, by what became of them.", labels=["outcome"]
        )
        outcomes.add_metric(["applied"], health.deltas)
        for kind in REFUSALS:
            outcomes.add_metric([kind.removeprefix("delta_")], health.failures.get(kind, 0))
        yield outcomes
        yield CounterMetricFamily(
            f"{_PREFIX}_delta_rows", "Rows of the deltas that were applied.", value=deltas.rows
        )
        behind = bool(deltas.behind)
        yield _gauge("deltas_behind", "1 if the deltas that come cannot be applied.", behind)
        yield _histogram(
            "delta_closed_to_loaded_seconds",
            "Seconds from the end of an example's label window until it was served, by example.",
            deltas.closed_delays,
        )
        yield _histogram(
            "delta_event_to_loaded_seconds",
            "Seconds from the newest event of a delta until it was served.",
            deltas.event_delays,
        )
        yield from self._of_last_delta()

    def _of_last_delta(self) -> Iterator[Metric]:
        scorer = self._subscriber.scorer if self._subscriber.pointer else None
        header = scorer.delta if scorer else None
        if header is None:
            return
        yield _gauge("delta_sequence", "Number of the last applied delta.", header.rank.sequence)
        yield _gauge("delta_epoch", "Epoch of the last applied delta.", header.rank.epoch)
        yield _gauge(
            "delta_event_timestamp_seconds",
            "Event time up to which the served model has learned.",
            header.newest_event_ms / _MILLISECONDS,
        )
        yield _gauge(
            "delta_created_timestamp_seconds",
            "Time at which the last applied delta was taken.",
            header.created_ms / _MILLISECONDS,
        )


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", help, value=float(value))


def _histogram(name: str, help: str, histogram: DelayHistogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"{_PREFIX}_{name}", help)
    family.add_metric([], histogram.cumulative(), histogram.total_seconds)
    return family
