"""A real Prometheus scrapes a real run, evaluates the rules, and answers the dashboard.

It runs with the files of deploy/, in which only addresses, times and the token's file are changed.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.commands import own_topics, succeed
from support.finished_runs import TINY
from support.forks import start
from support.patience import wait_until
from support.prometheus import DASHBOARD, DEPLOY, RULES, expressions_of, metrics_of

pytestmark = pytest.mark.slow
SECRET = "0123456789abcdef-the-token"
VARIABLES = {
    "$__rate_interval": "1m",
    "$job": "stream-ctr",
    "$instance": ".*",
    "$scope": "whole",
    "$other": "ftrl",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Prometheus:
    """A server of Prometheus, asked over its interface."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer. Fails if Prometheus calls the request wrong."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, query: str) -> float | None:
        """Return the value of a query with one series, or None without one."""
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else None

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready").is_success
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def run(embedded_broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a run on a topic, which goes on as long as the tests; with a token."""
    folder = tmp_path_factory.mktemp("run")
    token = folder / "token"
    token.touch(0o600)
    token.write_text(SECRET)
    topic = "scraped"
    servers = ("--bootstrap-servers", embedded_broker)
    succeed("simulate", "--impressions", "3000", "--seed", "3", "--out", folder / "log.jsonl")
    succeed("replay", folder / "log.jsonl", "--topic", topic, *servers)
    address = f"127.0.0.1:{free_port()}"
    process = start(
        *("run", "--topic", topic, *servers, "--state", str(folder / "state"), *TINY),
        *("-X", "schedule.report_every=300ms", *own_topics(topic)),
        *("--http", address, "--http-token-file", str(token)),
    )
    try:
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def prometheus(run: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(RULES, folder)
    (folder / "token").write_text(SECRET)
    text = (DEPLOY / "prometheus.yaml").read_text()
    for old, new in (
        ("trainer:9100", run),
        ("/run/secrets/http-token", str(folder / "token")),
        ("scrape_interval: 15s", "scrape_interval: 1s\n  scrape_timeout: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "prometheus.yaml").write_text(text)
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    server = Prometheus(f"http://{address}")
    try:
        wait_until(server.is_ready, explain=(folder / "prometheus.log").read_text)
        yield server
    finally:
        process.terminate()
        process.wait()


def test_the_target_is_up(prometheus: Prometheus) -> None:
    def trainer() -> dict[str, Any]:
        targets = prometheus.ask("targets", state="active")["activeTargets"]
        return next((each for each in targets if each["labels"]["job"] == "stream-ctr"), {})

    wait_until(lambda: trainer().get("health") == "up", explain=trainer)
    assert prometheus.value('up{job="stream-ctr"}') == 1


def test_the_figures_arrive(prometheus: Prometheus) -> None:
    wait_until(lambda: (prometheus.value("stream_ctr_examples_total") or 0) > 1000)
    assert prometheus.value("stream_ctr_lag_records") == 0
    assert prometheus.value('stream_ctr_model_auc{model="blend", scope="whole"}') is not None
    wait_until(lambda: prometheus.value("stream_ctr_freshness_seconds") is not None)


def test_every_rule_is_loaded_and_evaluated_without_an_error(prometheus: Prometheus) -> None:
    def found() -> list[dict[str, Any]]:
        return [each for group in prometheus.ask("rules")["groups"] for each in group["rules"]]

    wait_until(lambda: all(each["health"] == "ok" for each in found()), explain=found)
    assert {each["name"] for each in found()} == set(re.findall(r"alert: (\w+)", RULES.read_text()))
    assert {each["lastError"] for each in found() if "lastError" in each} <= {""}


def test_a_rule_that_holds_becomes_an_alert(prometheus: Prometheus) -> None:
    """The simulated events are of 2025, so what is published is old."""

    def alerts() -> set[str]:
        return {each["labels"]["alertname"] for each in prometheus.ask("alerts")["alerts"]}

    wait_until(lambda: "StreamCtrStale" in alerts(), explain=alerts)
    assert "StreamCtrDown" not in alerts()


def test_every_query_of_the_dashboard_is_valid_and_most_have_an_answer(
    prometheus: Prometheus,
) -> None:
    wait_until(lambda: (prometheus.value("stream_ctr_examples_total") or 0) > 1000)
    # A rate has an answer after two scrapes.
    wait_until(lambda: prometheus.value("rate(stream_ctr_events_total[5m])") is not None)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    unanswered = set()
    for query in expressions_of(panels):
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        if not prometheus.ask("query", query=query)["result"]:
            unanswered |= metrics_of(query)
    assert unanswered <= {
        "stream_ctr_alarm",
        *(
            "stream_ctr_field_psi",
            "stream_ctr_field_missing_ratio",
            "stream_ctr_field_unseen_ratio",
        ),
        *("stream_ctr_dead_letters_total", "stream_ctr_model_logloss"),
    }
