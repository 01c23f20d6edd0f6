"""Each alert fires when it should and not just before, and asks for metrics that exist.

`promtool` runs the rules on series of made-up values; without it these tests are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.prometheus import DASHBOARD, DEPLOY, RULES, expressions_of, metrics_of

from stream_ctr.monitor.prometheus import sample_names

SELF = 'job="stream-ctr", instance="trainer:9100"'
RUNS = {"stream_ctr_ended": "0x600"}
OTHERS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
"""Metrics that Prometheus itself and prometheus-client export."""

Series = dict[str, str]


@dataclass(frozen=True)
class Case:
    """Values a minute, in promtool's notation, with which an alert fires at `minutes`, or not.

    `quiet` series come near to it: a smaller value, a shorter time, a run that has ended.
    """

    minutes: int
    fires: Series
    quiet: Series


CLOCK_STOPS = "0+60x30 1800x600"
"""The time of each minute, from 0, for half an hour; then it stays as it is."""

CASES = {
    "StreamCtrDown": Case(3, {"up": "0x10"}, {"up": "0 1 0 1 0 1"}),
    "StreamCtrSilent": Case(
        35,
        {"stream_ctr_report_timestamp_seconds": CLOCK_STOPS, **RUNS},
        {"stream_ctr_report_timestamp_seconds": CLOCK_STOPS, "stream_ctr_ended": "1x600"},
    ),
    "StreamCtrNoBroker": Case(
        3,
        {"stream_ctr_broker_silent_seconds": "61x5"},
        {"stream_ctr_broker_silent_seconds": "60x5"},
    ),
    "StreamCtrClicksStalled": Case(
        6, {"stream_ctr_stalled_partitions": "1x9"}, {"stream_ctr_stalled_partitions": "0 0 1x4"}
    ),
    "StreamCtrLagging": Case(
        30,
        {"stream_ctr_lag_records": "100000+10x40"},
        {"stream_ctr_lag_records": "900000-10x40"},
    ),
    "StreamCtrPublishingRefused": Case(
        15, {"stream_ctr_publishing_refused": "1x20"}, {"stream_ctr_publishing_refused": "0 1x20"}
    ),
    "StreamCtrNotPublishing": Case(
        67,
        {"stream_ctr_published_timestamp_seconds": "0x99", **RUNS},
        {"stream_ctr_published_timestamp_seconds": "0x60 3600x99", **RUNS},
    ),
    "StreamCtrStale": Case(
        11,
        {"stream_ctr_freshness_seconds": "7201x20", **RUNS},
        {"stream_ctr_freshness_seconds": "7201x20", "stream_ctr_ended": "1x600"},
    ),
    "StreamCtrDeadLetters": Case(
        15,
        {
            'stream_ctr_dead_letters_total{reason="json"}': "0+60x30",
            'stream_ctr_dead_letters_total{reason="no_time"}': "0+60x30",
            "stream_ctr_records_total": "0+11000x30",
        },
        {
            'stream_ctr_dead_letters_total{reason="json"}': "0+60x30",
            "stream_ctr_records_total": "0+11000x30",
        },
    ),
    "StreamCtrRecordsLost": Case(
        20,
        {"stream_ctr_records_lost_total": "0x10 5x20"},
        {"stream_ctr_records_lost_total": "5x30"},
    ),
    "StreamCtrEvictions": Case(
        20,
        {
            "stream_ctr_impressions_evicted_total": "0x10 9x20",
            "stream_ctr_labelled_evicted_total": "0x30",
            "stream_ctr_clicks_evicted_total": "0x30",
        },
        {
            "stream_ctr_impressions_evicted_total": "9x30",
            "stream_ctr_labelled_evicted_total": "0x30",
            "stream_ctr_clicks_evicted_total": "0x30",
        },
    ),
    "StreamCtrCalibrationOff": Case(
        31,
        {
            'stream_ctr_model_calibration_ratio{model="blend", scope="rolling"}': "0.79x40",
            'stream_ctr_run_info{model="blend"}': "1x40",
        },
        {  # that of a model which is not published, and of the whole run
            'stream_ctr_model_calibration_ratio{model="ftrl", scope="rolling"}': "0.79x40",
            'stream_ctr_model_calibration_ratio{model="blend", scope="whole"}': "0.79x40",
            'stream_ctr_model_calibration_ratio{model="blend", scope="rolling"}': "1.25x40",
            'stream_ctr_run_info{model="blend"}': "1x40",
        },
    ),
    "StreamCtrBaselineAhead": Case(
        31,
        {'stream_ctr_logloss_difference_low{other="river_ftrl", scope="rolling"}': "0.001x40"},
        {'stream_ctr_logloss_difference_low{other="river_ftrl", scope="rolling"}': "-0.001x40"},
    ),
    "StreamCtrModelDiverged": Case(
        20,
        {'stream_ctr_model_rollbacks_total{model="blend"}': "0x10 1x20"},
        {'stream_ctr_model_rollbacks_total{model="blend"}': "1x30"},
    ),
    "StreamCtrSnapshotsFailing": Case(
        20,
        {
            "stream_ctr_snapshots_failed_total": "0x30",
            "stream_ctr_publications_failed_total": "0x10 1x20",
        },
        {
            "stream_ctr_snapshots_failed_total": "2x30",
            "stream_ctr_publications_failed_total": "1x30",
        },
    ),
    "StreamCtrFieldDrift": Case(
        31,
        {'stream_ctr_field_psi{field="app"}': "0.26x40"},
        {'stream_ctr_field_psi{field="app"}': "0.25x40"},
    ),
    "StreamCtrAlarm": Case(
        11,
        {'stream_ctr_alarm{name="behind_baseline"}': "1x20"},
        {'stream_ctr_alarm{name="rolled_back"}': "1x20"},
    ),
}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: object) -> str:
    """Run promtool, and return what it says. Skips the test where it is not installed."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def test_the_rules_are_valid() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", RULES)


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    text = (DEPLOY / "prometheus.yaml").read_text()
    copy = tmp_path / "prometheus.yaml"
    copy.write_text(text.replace("/run/secrets/http-token", str(tmp_path / "token")))
    shutil.copy(RULES, tmp_path)
    assert "is valid prometheus config file" in promtool("check", "config", copy)


def test_every_alert_has_a_case_and_a_severity() -> None:
    assert {rule["alert"] for rule in rules()} == set(CASES)
    assert {rule["labels"]["severity"] for rule in rules()} == {"page", "warning"}
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_page_of_alerts_says_what_to_do_about_each() -> None:
    page = DEPLOY.parent.joinpath("docs", "metrics.md").read_text()
    listed = re.findall(r"^\| `(StreamCtr\w+)` \| (\w+) \| .+ \|$", page, re.MULTILINE)
    assert listed == [(rule["alert"], rule["labels"]["severity"]) for rule in rules()]


def own_labels(name: str) -> str:
    """Return a series with the labels that every series of a scrape has."""
    metric, _, labels = name.rstrip("}").partition("{")
    return f"{metric}{{{', '.join([SELF, *([labels] if labels else [])])}}}"


def rule_test(alert: str, minutes: int, series: Series, *, fires: bool) -> dict[str, Any]:
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    return {
        "interval": "1m",
        "input_series": [
            {"series": own_labels(name), "values": values} for name, values in series.items()
        ],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": f"{minutes}m",
                "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
            }
        ],
    }


def run_rules(tests: list[dict[str, Any]], folder: Path) -> str:
    path = folder / "tests.yaml"
    path.write_text(
        yaml.safe_dump(
            {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests},
            width=1000,
        )
    )
    return promtool("test", "rules", path)


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_once_and_not_before_its_time(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    tests = [
        rule_test(alert, case.minutes, case.fires, fires=True),
        rule_test(alert, case.minutes, case.quiet, fires=False),
    ]
    assert "SUCCESS" in run_rules(tests, tmp_path)


def test_a_run_that_works_raises_no_alert(tmp_path: Path) -> None:
    healthy = {
        "up": "1x120",
        **RUNS,
        "stream_ctr_report_timestamp_seconds": "0+60x120",
        "stream_ctr_loop_beat_age_seconds": "0.1x120",
        "stream_ctr_broker_silent_seconds": "0x120",
        "stream_ctr_stalled_partitions": "0x120",
        "stream_ctr_lag_records": "200x120",
        "stream_ctr_publishing_refused": "0x120",
        "stream_ctr_published_timestamp_seconds": "0+60x120",
        "stream_ctr_freshness_seconds": "700x120",
        'stream_ctr_dead_letters_total{reason="json"}': "3x120",
        "stream_ctr_records_total": "0+6000x120",
        "stream_ctr_records_lost_total": "0x120",
        "stream_ctr_impressions_evicted_total": "0x120",
        "stream_ctr_labelled_evicted_total": "0x120",
        "stream_ctr_clicks_evicted_total": "0x120",
        'stream_ctr_model_calibration_ratio{model="blend", scope="rolling"}': "1.02x120",
        'stream_ctr_run_info{model="blend"}': "1x120",
        'stream_ctr_logloss_difference_low{other="ftrl", scope="rolling"}': "-0.01x120",
        'stream_ctr_model_rollbacks_total{model="blend"}': "0x120",
        "stream_ctr_snapshots_failed_total": "0x120",
        "stream_ctr_publications_failed_total": "0x120",
        'stream_ctr_field_psi{field="app"}': "0.02x120",
    }
    tests = [rule_test(alert, 90, healthy, fires=False) for alert in CASES]
    assert "SUCCESS" in run_rules(tests, tmp_path)


# -- the metrics exist ---------------------------------------------------------------------------


def test_every_metric_of_the_rules_is_exported() -> None:
    asked = {name for rule in rules() for name in metrics_of(rule["expr"])}
    assert asked <= sample_names() | OTHERS
    assert len(asked) > len(CASES)


def test_every_metric_of_the_dashboard_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {name for query in expressions_of(dashboard) for name in metrics_of(query)}
    assert asked <= sample_names() | OTHERS
    assert len(asked) > 20


def test_the_dashboard_asks_the_chosen_source_only() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not taken & cells
        taken |= cells
