"""The metrics of a run for Prometheus.

prometheus-client, because it is Prometheus' own library and knows the formats of exposition. A
collector builds everything from one `View` when it is asked, so that the loop counts nothing twice.

Names follow the conventions: base units, `_total`, `_seconds`, `_ratio`, `_info`. Labels have few
values: names of models, fields, stages and alarms, reasons of a fixed set. No id is a label.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from stream_ctr import __version__
from stream_ctr.monitor.recent_reports import RecentReports, View
from stream_ctr.monitor.snapshot_list import SnapshotList, Snapshots

PREFIX = "stream_ctr_"
Labels = tuple[str, ...]
Sample = tuple[Labels, float]
_MOST_SERIES = 2000  # of a metric: fields have names without end, servers of metrics have not
_TOMBSTONE = "tombstone"
_REJECTED = "rejected."

# Counters of reports, by the name that they have there. Those of several models have one for each,
# under `name.model`, and that of the published model under `name`.
COUNTERS = {
    "records": "Records read",
    "records_lost": "Records that the topic did not hold any more when they were to be read",
    "fields_unknown": "Events with a feature that is no field",
    "impressions": "Impressions that arrived",
    "impressions_late": "Impressions that arrived after the end of their label window",
    "impressions_duplicate": "Impressions that arrived again",
    "impressions_spilled": "Impressions whose features were moved to disk",
    "impressions_evicted": "Pending impressions dropped because the memory bound has no room",
    "clicks": "Clicks that arrived",
    "clicks_joined": "Clicks that found their impression in time",
    "clicks_early": "Clicks joined that happened before their impression",
    "clicks_late": "Clicks after the end of their label window",
    "clicks_duplicate": "Second clicks of an impression",
    "clicks_unmatched": "Clicks whose impression never came",
    "clicks_evicted": "Clicks dropped with their impression, or while they waited for it",
    "ids_forgotten_early": "Ids forgotten before the duplicate horizon, to keep the memory bound",
    "labelled": "Examples that arrived with their label",
    "labelled_late": "Examples with their label that arrived behind the watermark",
    "labelled_duplicate": "Examples with their label that arrived again",
    "labelled_evicted": "Examples with their label dropped because the memory bound has no room",
    "examples_before_publication": "Examples that no published snapshot could have scored",
    "publications_refused": "Snapshots that the gate refused to publish",
    "publications_failed": "Snapshots that were written and could not be published",
    "publications_passed_over": "Copies of the weights for which there was no room",
    "snapshots_failed": "Snapshots that could not be written",
    "deltas_written": "Deltas that were published",
    "deltas_refused": "Deltas that the gate withheld, whose rows wait for the next one",
    "deltas_failed": "Deltas that could not be written",
    "deltas_unsent": "Deltas on disk that a topic or mirror did not get at once",
    "delta_rows": "Rows in deltas",
    "delta_bytes": "Bytes of deltas",
    "mirror_failed": "Attempts to copy a snapshot or deltas to snapshots.url that failed",
}
MODEL_COUNTERS = {
    "examples_skipped": "Examples that a model could not learn",
    "batches_skipped": "Batches whose step was not finite",
    "examples_unlearned": "Examples that a rollback took back",
    "rollbacks": "Returns of a model to an earlier snapshot",
    "left_out": "Models that diverged and are left out",
}
FIELDS = {
    "missing_rate": ("field_missing_ratio", "Share of impressions without a value of the field"),
    "unseen_rate": ("field_unseen_ratio", "Share of values that were never learned before"),
    "collision_rate": ("field_collision_ratio", "Share of values that share a row of the table"),
    "distinct": ("field_distinct_values", "Distinct values of the field, an estimate"),
    "psi": ("field_psi", "Population stability index against the reference window"),
}
SCORES = {
    "logloss": ("model_logloss", "Mean log loss in nats per impression"),
    "auc": ("model_auc", "Area under the ROC curve"),
    "ne": ("model_normalized_entropy", "Log loss over the entropy of the click-through rate"),
    "pred_over_actual": ("model_calibration_ratio", "Predicted over actual clicks"),
    "count": ("model_scored_impressions", "Impressions that the figures of the model cover"),
}
DIFFERENCES = {
    "logloss_difference": ("logloss_difference", "of the published model minus that of another"),
    "low": ("logloss_difference_low", "lower end of its 95 % interval"),
    "high": ("logloss_difference_high", "upper end of its 95 % interval"),
}
_QUANTILES = {"0.5": "p50", "0.9": "p90", "0.99": "p99"}
_SCOPES = {"whole": (), "rolling": ("rolling",), "as_served": ("as_served",)}


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one answer is built from. `now` is the time of day in epoch seconds."""

    view: View
    snapshots: Snapshots
    beat_age: float | None
    now: float
    report: Mapping[str, Any] = field(default_factory=dict)


class Family(NamedTuple):
    """A metric: its name without the prefix and `_total`, and how its samples are found."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: Labels
    samples: Callable[[Scrape], Iterable[Sample]]

    @property
    def sample_name(self) -> str:
        """The name that a query uses."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    def build(self, samples: Iterable[Sample]) -> Metric:
        """Return the metric with these samples."""
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        metric = kind(f"{PREFIX}{self.name}", self.help, labels=self.labels)
        for index, (labels, value) in enumerate(samples):
            if index == _MOST_SERIES:
                break
            metric.add_metric(labels, value)
        return metric


class RunCollector(Collector):
    """Collect the metrics of a run from its newest reports and the snapshots on its disk.

    `wall_clock` returns epoch seconds.
    """

    def __init__(
        self,
        recent: RecentReports,
        snapshots: SnapshotList,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._recent = recent
        self._snapshots = snapshots
        self._wall_clock = wall_clock

    def describe(self) -> Iterator[Metric]:
        """Yield every metric without samples: a registry compares their names."""
        for family in FAMILIES:
            yield family.build(())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that have a sample now."""
        view = self._recent.view
        scrape = Scrape(
            view,
            self._snapshots.read(),
            self._recent.beat_age,
            self._wall_clock(),
            view.latest or {},
        )
        for family in FAMILIES:
            if samples := list(family.samples(scrape)):
                yield family.build(samples)


class Exposition:
    """The answer to a scrape: the metrics of the run, and those of its process."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)

    def encode(self, accept: str = "") -> tuple[bytes, str]:
        """Return the metrics in the format that `accept`, a header, prefers, and its media type."""
        encoder, media_type = choose_encoder(accept)
        return encoder(self._registry), media_type


def sample_names() -> set[str]:
    """Return the names of all samples that a run can have.

    >>> sorted(name for name in sample_names() if "lag" in name)
    ['stream_ctr_lag_records']
    """
    return {family.sample_name for family in FAMILIES}


# -- reading reports, which may be of another version ----------------------------------------------


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else.

    >>> number(3), number(True), number("3"), number(None)
    (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(known: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the object at the end of these keys, an empty one if there is none."""
    for key in keys:
        found = known.get(key)
        known = found if isinstance(found, Mapping) else {}
    return known


def seconds(moment: object) -> float | None:
    """Return the epoch seconds of a time in RFC 3339, or None for anything else.

    >>> seconds("2025-01-01T00:00:00.500Z"), seconds(None)
    (1735689600.5, None)
    """
    try:
        return datetime.fromisoformat(str(moment)).timestamp()
    except ValueError:
        return None


def _one(value: float | None) -> Iterator[Sample]:
    if value is not None:
        yield (), value


def _value(key: str) -> Callable[[Scrape], Iterator[Sample]]:
    return lambda scrape: _one(number(scrape.report.get(key)))


def _moment(*keys: str) -> Callable[[Scrape], Iterator[Sample]]:
    """Return a time of the report in epoch seconds."""
    *before, last = keys
    return lambda scrape: _one(seconds(mapping(scrape.report, *before).get(last)))


def _length(key: str) -> Callable[[Scrape], Iterator[Sample]]:
    """Return the number of entries of a list or an object."""

    def samples(scrape: Scrape) -> Iterator[Sample]:
        found = scrape.report.get(key)
        if isinstance(found, Sequence | Mapping) and not isinstance(found, str):
            yield (), len(found)

    return samples


def _delay(*keys: str) -> Callable[[Scrape], Iterator[Sample]]:
    """Return how far a time of the report lies behind the report."""

    def samples(scrape: Scrape) -> Iterator[Sample]:
        *before, last = keys
        then = seconds(mapping(scrape.report, *before).get(last))
        reported = seconds(scrape.report.get("time"))
        if then is not None and reported is not None:
            yield (), max(0.0, reported - then)

    return samples


def _freshness(scrape: Scrape) -> Iterator[Sample]:
    """Yield the age of the newest example in the published snapshot."""
    if pointer := scrape.snapshots.pointer:
        yield (), max(0.0, scrape.now - pointer.event_time_ms / 1000)


def _ages(scrape: Scrape) -> Iterator[Sample]:
    """Yield the percentiles of the ages of recent examples at each stage."""
    stages = mapping(scrape.report, "freshness")
    for stage in stages:
        for quantile, key in _QUANTILES.items():
            if (age := number(mapping(stages, stage).get(key))) is not None:
                yield (stage, quantile), age


def _published(scrape: Scrape) -> Iterator[Sample]:
    if pointer := scrape.snapshots.pointer:
        yield (), pointer.created_ms / 1000


def _build(scrape: Scrape) -> Iterator[Sample]:
    yield (__version__, platform.python_version()), 1.0


def _run(scrape: Scrape) -> Iterator[Sample]:
    if scrape.view.model:
        yield (scrape.view.model,), 1.0


def _ended(scrape: Scrape) -> Iterator[Sample]:
    if scrape.view.latest is not None:
        yield (), float(scrape.view.ended)


def _beat(scrape: Scrape) -> Iterator[Sample]:
    yield from _one(scrape.beat_age)


def _refused(scrape: Scrape) -> Iterator[Sample]:
    refused, withheld = scrape.report.get("refused"), scrape.report.get("withheld")
    if isinstance(refused, Sequence):
        yield (), float(bool(refused) or bool(withheld))


def _verdicts(scrape: Scrape) -> Iterator[Sample]:
    """Yield how many snapshots on disk have each verdict, zeros included."""
    for verdict in ("published", "refused", "kept"):
        count = sum(each.on_disk and each.verdict == verdict for each in scrape.snapshots.listed)
        yield (verdict,), count


def _written(scrape: Scrape) -> Iterator[Sample]:
    yield (), max((each.sequence for each in scrape.snapshots.listed), default=0)


def _dead_letters(scrape: Scrape) -> Iterator[Sample]:
    counters = mapping(scrape.report, "counters")
    for name in counters:
        reason = name.removeprefix(_REJECTED)
        count = number(counters[name])
        if name.startswith(_REJECTED) and reason != _TOMBSTONE and count is not None:
            yield (reason,), count


def _counter(name: str) -> Callable[[Scrape], Iterator[Sample]]:
    """Return a counter; 0 if the report has others, so that its first increase is seen."""

    def samples(scrape: Scrape) -> Iterator[Sample]:
        if counters := mapping(scrape.report, "counters"):
            yield (), number(counters.get(name)) or 0.0

    return samples


def _model_counter(name: str) -> Callable[[Scrape], Iterator[Sample]]:
    def samples(scrape: Scrape) -> Iterator[Sample]:
        counters = mapping(scrape.report, "counters")
        if counters and scrape.view.model:
            yield (scrape.view.model,), number(counters.get(name)) or 0.0
        for key in counters:
            model = key.removeprefix(f"{name}.")
            count = number(counters[key])
            if model != key and model != scrape.view.model and count is not None:
                yield (model,), count

    return samples


def _scopes(scrape: Scrape) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for scope, keys in _SCOPES.items():
        if figures := mapping(scrape.report, *keys):
            yield scope, figures


def _scores(key: str) -> Callable[[Scrape], Iterator[Sample]]:
    def samples(scrape: Scrape) -> Iterator[Sample]:
        for scope, figures in _scopes(scrape):
            models = mapping(figures, "models")
            for model in models:
                if (value := number(mapping(models, model).get(key))) is not None:
                    yield (model, scope), value

    return samples


def _references(key: str) -> Callable[[Scrape], Iterator[Sample]]:
    def samples(scrape: Scrape) -> Iterator[Sample]:
        for scope, figures in _scopes(scrape):
            if (value := number(figures.get(key))) is not None:
                yield (scope,), value

    return samples


def _differences(key: str) -> Callable[[Scrape], Iterator[Sample]]:
    def samples(scrape: Scrape) -> Iterator[Sample]:
        for scope, figures in _scopes(scrape):
            pairs = mapping(figures, "pairs")
            for other in pairs:
                if (value := number(mapping(pairs, other).get(key))) is not None:
                    yield (other, scope), value

    return samples


def _blend_weights(scrape: Scrape) -> Iterator[Sample]:
    weights = mapping(scrape.report, "blend", "weights")
    for member in weights:
        if (value := number(weights[member])) is not None:
            yield (member,), value


def _stages(scrape: Scrape) -> Iterator[Sample]:
    profile = mapping(scrape.report, "profile")
    for thread in ("reader", "trainer"):
        stages = mapping(profile, thread)
        for stage in stages:
            if (spent := number(mapping(stages, stage).get("seconds"))) is not None:
                yield (thread, stage), spent


def _alarms(scrape: Scrape) -> Iterator[Sample]:
    alarms = scrape.report.get("alarms")
    names = {
        str(alarm["name"])
        for alarm in (alarms if isinstance(alarms, Sequence) else ())
        if isinstance(alarm, Mapping) and "name" in alarm
    }
    for name in sorted(names):
        yield (name,), 1.0


def _fields(key: str) -> Callable[[Scrape], Iterator[Sample]]:
    def samples(scrape: Scrape) -> Iterator[Sample]:
        fields = mapping(scrape.report, "fields")
        for name in fields:
            if (value := number(mapping(fields, name).get(key))) is not None:
                yield (name,), value

    return samples


FAMILIES: tuple[Family, ...] = (
    Family("build_info", "gauge", "Versions, always 1", ("version", "python"), _build),
    Family("run_info", "gauge", "The published model, always 1", ("model",), _run),
    Family("ended", "gauge", "1 if the run has ended, else 0", (), _ended),
    Family("loop_beat_age_seconds", "gauge", "Time since the loop last went round", (), _beat),
    Family("report_timestamp_seconds", "gauge", "Time of the newest report", (), _moment("time")),
    Family(
        "event_timestamp_seconds", "gauge", "Newest event time learned", (), _moment("event_time")
    ),
    Family("examples", "counter", "Examples learned", (), _value("examples")),
    Family("events", "counter", "Events read", (), _value("events")),
    Family("lag_records", "gauge", "Records that are not read yet", (), _value("lag")),
    Family(
        "watermark_delay_seconds",
        "gauge",
        "Time of the newest report minus the watermark",
        (),
        _delay("watermark"),
    ),
    Family(
        "event_delay_seconds",
        "gauge",
        "Time of the newest report minus the newest event time learned",
        (),
        _delay("event_time"),
    ),
    Family(
        "freshness_seconds",
        "gauge",
        "Age of the newest example in the published snapshot",
        (),
        _freshness,
    ),
    Family(
        "example_age_seconds",
        "gauge",
        "Age of recent examples at a stage of their way",
        ("stage", "quantile"),
        _ages,
    ),
    Family(
        "published_timestamp_seconds",
        "gauge",
        "Time when the published snapshot was written",
        (),
        _published,
    ),
    Family("pending_impressions", "gauge", "Impressions that wait", (), _value("pending")),
    Family("pending_bytes", "gauge", "Memory of the join", (), _value("pending_bytes")),
    Family(
        "broker_silent_seconds",
        "gauge",
        "Time since a broker last answered",
        (),
        _value("silent_seconds"),
    ),
    Family(
        "stalled_partitions",
        "gauge",
        "Partitions whose clicks are overdue, so that learning waits",
        (),
        _length("stalled"),
    ),
    Family(
        "click_coverage_ratio",
        "gauge",
        "Share of the clicks that found their impression in time",
        (),
        _value("click_coverage"),
    ),
    Family("models_left_out", "gauge", "Models that diverged", (), _length("left_out")),
    Family("publishing_refused", "gauge", "1 if the gate publishes nothing, else 0", (), _refused),
    Family("snapshots", "gauge", "Snapshots on disk", ("verdict",), _verdicts),
    Family("snapshots_written", "counter", "Number of the newest snapshot", (), _written),
    Family(
        "dead_letters",
        "counter",
        "Records and events that were rejected",
        ("reason",),
        _dead_letters,
    ),
    *(Family(name, "counter", help, (), _counter(name)) for name, help in COUNTERS.items()),
    *(
        Family(f"model_{name}", "counter", help, ("model",), _model_counter(name))
        for name, help in MODEL_COUNTERS.items()
    ),
    *(
        Family(name, "gauge", help, ("model", "scope"), _scores(key))
        for key, (name, help) in SCORES.items()
    ),
    Family(
        "constant_logloss",
        "gauge",
        "Log loss of the best constant prediction",
        ("scope",),
        _references("constant_logloss"),
    ),
    Family(
        "best_possible_logloss",
        "gauge",
        "Log loss of the true probabilities, where a stream has them",
        ("scope",),
        _references("best_possible_logloss"),
    ),
    *(
        Family(name, "gauge", f"Log loss {help}", ("other", "scope"), _differences(key))
        for key, (name, help) in DIFFERENCES.items()
    ),
    Family("blend_weight_ratio", "gauge", "Weight in the blend", ("member",), _blend_weights),
    Family("stage_seconds", "counter", "Time by thread and stage", ("thread", "stage"), _stages),
    Family("alarm", "gauge", "1 while the alarm holds", ("name",), _alarms),
    *(
        Family(name, "gauge", help, ("field",), _fields(key))
        for key, (name, help) in FIELDS.items()
    ),
)
"""Every metric that a run can have, in the order of the answer."""
