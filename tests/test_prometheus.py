"""Prometheus gets the figures of the reports, under names that follow its conventions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.observed import last_of, observed_run, recent_reports  # noqa: F401 - a fixture

from stream_ctr.join.join_state import COUNTERS as JOIN_COUNTERS
from stream_ctr.monitor import prometheus
from stream_ctr.monitor.prometheus import FAMILIES, Exposition, RunCollector
from stream_ctr.monitor.recent_reports import RecentReports
from stream_ctr.monitor.snapshot_list import SnapshotList
from stream_ctr.snapshots.pointer import read_pointer

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
NOW = 1_800_000_000.0


def exposition(recent: RecentReports, state: Path) -> Exposition:
    collector = RunCollector(recent, SnapshotList(state), wall_clock=lambda: NOW)
    return Exposition(collector)


def samples_of(recent: RecentReports, state: Path) -> Samples:
    text = exposition(recent, state).encode()[0].decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, /, **labels: str) -> float:
    return samples[f"stream_ctr_{name}", frozenset(labels.items())]


def labels_of(samples: Samples, name: str) -> list[dict[str, str]]:
    return [dict(labels) for found, labels in samples if found == f"stream_ctr_{name}"]


def made(**keys: Any) -> RecentReports:
    recent = RecentReports()
    recent.add({"kind": "report", "run": "a" * 32, "models": {"deepfm": {}}, **keys})
    return recent


# -- what a real run says ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(observed_run: Path) -> Samples:  # noqa: F811
    return samples_of(recent_reports(observed_run), observed_run)


@pytest.fixture(scope="module")
def report(observed_run: Path) -> dict[str, Any]:  # noqa: F811
    return last_of(observed_run)


def test_the_figures_of_the_run_are_those_of_its_report(
    samples: Samples, report: dict[str, Any]
) -> None:
    assert value(samples, "examples_total") == report["examples"] > 0
    assert value(samples, "events_total") == report["events"]
    assert value(samples, "lag_records") == report["lag"]
    assert value(samples, "pending_bytes") == report["pending_bytes"] > 0
    assert value(samples, "click_coverage_ratio") == report["click_coverage"]
    assert value(samples, "clicks_late_total") == report["clicks_late"]
    assert value(samples, "ended") == 1
    assert value(samples, "run_info", model="blend") == 1


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model_logloss", "logloss"),
        ("model_auc", "auc"),
        ("model_calibration_ratio", "pred_over_actual"),
        ("model_scored_impressions", "count"),
    ],
)
@pytest.mark.parametrize("scope", ["whole", "rolling", "as_served"])
def test_every_model_has_its_scores(
    samples: Samples, report: dict[str, Any], name: str, key: str, scope: str
) -> None:
    figures = report if scope == "whole" else report[scope]
    known = {model: score[key] for model, score in figures["models"].items()}
    shown = {
        labels["model"]: value(samples, name, **labels)
        for labels in labels_of(samples, name)
        if labels["scope"] == scope
    }
    assert shown == {model: figure for model, figure in known.items() if figure is not None}
    assert shown or (scope == "as_served" and key != "count")  # few were served


def test_the_differences_have_their_intervals(samples: Samples, report: dict[str, Any]) -> None:
    for other, pair in report["pairs"].items():
        labels = {"other": other, "scope": "whole"}
        assert value(samples, "logloss_difference", **labels) == pair["logloss_difference"]
        for end in ("low", "high"):
            if pair[end] is not None:
                assert value(samples, f"logloss_difference_{end}", **labels) == pair[end]


def test_dead_letters_are_counted_by_reason(samples: Samples, report: dict[str, Any]) -> None:
    shown = {
        labels["reason"]: value(samples, "dead_letters_total", **labels)
        for labels in labels_of(samples, "dead_letters_total")
    }
    assert sum(shown.values()) == report["counters"]["rejected"] > 0


def test_stages_have_their_seconds(samples: Samples, report: dict[str, Any]) -> None:
    for thread in ("reader", "trainer"):
        for stage, spent in report["profile"][thread].items():
            labels = {"thread": thread, "stage": stage}
            assert value(samples, "stage_seconds_total", **labels) == spent["seconds"]


def test_freshness_is_the_age_of_the_newest_example_that_is_published(
    samples: Samples,
    observed_run: Path,  # noqa: F811
) -> None:
    pointer = read_pointer(observed_run / "latest.json")
    assert pointer
    assert value(samples, "freshness_seconds") == NOW - pointer.event_time_ms / 1000
    assert value(samples, "published_timestamp_seconds") == pointer.created_ms / 1000


def test_snapshots_are_counted_by_verdict(samples: Samples) -> None:
    assert value(samples, "snapshots", verdict="published") == value(
        samples, "snapshots_written_total"
    )
    assert value(samples, "snapshots", verdict="refused") == 0
    assert value(samples, "publishing_refused") == 0


def test_every_counter_of_a_report_is_a_metric(report: dict[str, Any]) -> None:
    known = {*prometheus.COUNTERS, *prometheus.MODEL_COUNTERS, "rejected"}
    assert {name.partition(".")[0] for name in report["counters"]} <= known
    assert set(JOIN_COUNTERS) <= known


def test_the_process_is_measured_too(observed_run: Path) -> None:  # noqa: F811
    text = exposition(recent_reports(observed_run), observed_run).encode()[0].decode()
    assert "process_resident_memory_bytes " in text
    assert "process_cpu_seconds_total " in text


def test_openmetrics_is_spoken_to_those_who_ask(observed_run: Path) -> None:  # noqa: F811
    metrics = exposition(recent_reports(observed_run), observed_run)
    body, media_type = metrics.encode("application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert metrics.encode("text/plain")[1].startswith("text/plain")


# -- conventions ---------------------------------------------------------------------------------


def test_names_follow_the_conventions_of_prometheus() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert not family.name.endswith("_total")
        assert not re.search(r"(^|_)(ms|millis|kb|mb|minutes|percent)(_|$)", family.name)
        assert family.help
        assert not family.help.endswith(".")
    names = [family.sample_name for family in FAMILIES]
    assert len(names) == len(set(names))


def test_no_id_is_a_label() -> None:
    labels = {label for family in FAMILIES for label in family.labels}
    bounded = {"model", "other", "member", "scope", "reason", "verdict", "thread", "stage"}
    bounded.add("quantile")
    assert labels == bounded | {"field", "name", "version", "python"}


def test_a_metric_has_a_bounded_number_of_series(tmp_path: Path) -> None:
    many = {f"field{number}": {"psi": 0.1} for number in range(10_000)}
    samples = samples_of(made(fields=many), tmp_path)
    assert len(labels_of(samples, "field_psi")) == 2000


def test_the_page_of_metrics_lists_every_metric() -> None:
    page = Path(__file__).parents[1].joinpath("docs", "metrics.md").read_text()
    listed = re.findall(r"^\| `(stream_ctr_\w+)` \| ([^|]*) \| ([^|]+) \|$", page, re.MULTILINE)
    assert listed == [
        (family.sample_name, ", ".join(family.labels), family.help) for family in FAMILIES
    ]


# -- what is not always there --------------------------------------------------------------------


def test_a_run_without_a_report_has_its_version_and_no_figure(tmp_path: Path) -> None:
    samples = samples_of(RecentReports(), tmp_path)
    names = {name for name, _ in samples if name.startswith("stream_ctr_")}
    assert names == {
        "stream_ctr_build_info",
        "stream_ctr_snapshots",
        "stream_ctr_snapshots_written_total",
    }


def test_health_of_fields_and_alarms_are_shown_when_reports_have_them(tmp_path: Path) -> None:
    samples = samples_of(
        made(
            fields={"app": {"missing_rate": 0.25, "psi": None, "distinct": 12}},
            alarms=[{"name": "drift.app", "since": "2026-01-01T00:00:00Z", "text": "x"}],
        ),
        tmp_path,
    )
    assert value(samples, "field_missing_ratio", field="app") == 0.25
    assert value(samples, "field_distinct_values", field="app") == 12
    assert labels_of(samples, "field_psi") == []
    assert value(samples, "alarm", name="drift.app") == 1


def test_a_counter_that_did_not_count_yet_is_zero(tmp_path: Path) -> None:
    samples = samples_of(made(counters={"records": 5, "rollbacks.ftrl": 2}), tmp_path)
    assert value(samples, "records_total") == 5
    assert value(samples, "records_lost_total") == 0
    assert value(samples, "model_rollbacks_total", model="ftrl") == 2
    assert value(samples, "model_rollbacks_total", model="deepfm") == 0


def test_a_refusal_is_shown(tmp_path: Path) -> None:
    assert value(samples_of(made(refused=["worse"]), tmp_path), "publishing_refused") == 1
    assert value(samples_of(made(refused=[]), tmp_path), "publishing_refused") == 0


def test_delays_are_measured_against_the_report(tmp_path: Path) -> None:
    recent = made(time="2026-01-01T00:01:00.000Z", watermark="2026-01-01T00:00:48.500Z")
    samples = samples_of(recent, tmp_path)
    assert value(samples, "watermark_delay_seconds") == 11.5
    assert labels_of(samples, "event_delay_seconds") == []


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = (
    *("time", "models", "counters", "pairs", "rolling", "as_served", "profile", "blend"),
    *("alarms", "fields", "stalled", "refused", "left_out", "lag", "watermark", "examples"),
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_a_report_of_another_version_breaks_nothing(
    tmp_path_factory: pytest.TempPathFactory, keys: Mapping[str, Any]
) -> None:
    recent = RecentReports()
    try:
        recent.add({"kind": "report", **keys})
    except (OverflowError, ValueError):  # an integer that JSON has and msgspec does not write
        return
    samples_of(recent, tmp_path_factory.getbasetemp())
