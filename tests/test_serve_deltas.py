"""A prediction server answers while deltas are applied, and each answer names its state."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from support.delta_runs import DeltaRun
from support.patience import wait_until
from support.prediction_servers import ask, ask_arrow, metric, serving, stream_of, table_of
from support.served import ROWS

from stream_ctr.serve.metrics import Metrics
from stream_ctr.serve.waiting import WaitingRequests
from stream_ctr.snapshots.followed_deltas import REFUSALS
from stream_ctr.snapshots.subscriber import Subscriber

PREFIX = "stream_ctr_serve"


@pytest.fixture
def run(tmp_path: Path) -> DeltaRun:
    made = DeltaRun(tmp_path)
    made.learn(2)
    made.snapshot()
    return made


def learn_delta(run: DeltaRun) -> int:
    """Let the run write a delta; return its sequence."""
    run.learn()
    return run.delta().header.rank.sequence


def truth(run: DeltaRun, answer: Mapping[str, Any]) -> tuple[float, ...]:
    """Return what must be served in the state that an answer names."""
    if answer["delta"] is None:
        return run.truths[answer["snapshot"]]
    return run.truths[answer["epoch"], answer["delta"]]


@pytest.mark.slow
def test_no_request_fails_and_each_answer_is_that_of_its_state_over_fifty_deltas(
    run: DeltaRun,
) -> None:
    stopped = threading.Event()
    answers: list[dict[str, Any]] = []

    def ask_on(client: httpx.Client) -> None:
        while not stopped.is_set():
            response = ask(client, ROWS)
            assert response.status_code == 200, response.text
            answers.append(response.json())

    with serving(run.state) as (client, subscriber), ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask_on, client) for _ in range(2)]
        try:
            for number in range(50):
                sequence = learn_delta(run)
                if number in (20, 40):
                    run.learn()
                    run.snapshot()
                    sequence += 1
            wait_until(lambda: any(answer["delta"] == sequence for answer in answers))
        finally:
            stopped.set()
        for each in asked:
            each.result()
        assert not subscriber.failures
        assert metric(client, f"{PREFIX}_deltas_total", outcome="applied") == 52
    assert len({answer["delta"] for answer in answers}) > 10
    for answer in answers:
        assert tuple(answer["probabilities"]) == pytest.approx(truth(run, answer), abs=1e-6)


def test_json_arrow_and_the_description_name_the_last_delta(run: DeltaRun) -> None:
    with serving(run.state) as (client, subscriber):
        before = client.get("/model").json()
        assert (before["delta"], before["deltas"]["applied"]) == (None, 0)
        assert ask(client, ROWS).json()["delta"] is None
        given = pa.table({"app": ["maps"]})
        metadata = table_of(ask_arrow(client, stream_of(given))).schema.metadata
        assert b"stream_ctr.delta" not in metadata
        sequence = learn_delta(run)
        wait_until(lambda: subscriber.deltas.applied == 1)
        document = ask(client, ROWS).json()
        assert (document["delta"], document["epoch"]) == (sequence, 3)
        metadata = table_of(ask_arrow(client, stream_of(given))).schema.metadata
        assert metadata[b"stream_ctr.delta"] == str(sequence).encode()
        header = run.deltas[-1].header
        after = client.get("/model").json()
        assert (after["delta"], after["examples"]) == (sequence, header.examples)
        assert after["event_time_ms"] == header.newest_event_ms
        assert after["positions"] == header.positions
        assert after["deltas"]["applied"] == 1
        assert after["deltas"]["behind"] is None


def test_metrics_count_deltas_by_outcome_and_show_how_fresh_they_are(run: DeltaRun) -> None:
    with serving(run.state) as (client, subscriber):
        subscriber.deltas._started_ms = 0.0  # the deltas of the test are old
        learn_delta(run)
        wait_until(lambda: subscriber.deltas.applied == 1)
        header = run.deltas[-1].header
        assert metric(client, f"{PREFIX}_delta_rows_total") == sum(header.rows.values())
        assert metric(client, f"{PREFIX}_delta_closed_to_loaded_seconds_count") == 8
        assert metric(client, f"{PREFIX}_delta_event_to_loaded_seconds_count") == 1
        assert metric(client, f"{PREFIX}_delta_closed_to_loaded_seconds_bucket", le="+Inf") == 8
        assert metric(client, f"{PREFIX}_delta_sequence") == 1
        assert metric(client, f"{PREFIX}_deltas_behind") == 0
        run.learn()
        run.delta(write=False)  # it is lost
        learn_delta(run)
        wait_until(lambda: metric(client, f"{PREFIX}_deltas_behind") == 1)
        assert metric(client, f"{PREFIX}_deltas_total", outcome="gap") == 1
        text = client.get("/metrics").text
        outcomes = set(re.findall(r'deltas_total{outcome="(\w+)"}', text))
        assert outcomes == {"applied", *(kind.removeprefix("delta_") for kind in REFUSALS)}
        run.learn()
        run.snapshot()
        wait_until(lambda: metric(client, f"{PREFIX}_deltas_behind") == 0)
        answer = ask(client, ROWS).json()
        assert tuple(answer["probabilities"]) == pytest.approx(truth(run, answer), abs=1e-6)


def test_the_page_of_serving_lists_every_metric_of_a_server(run: DeltaRun) -> None:
    subscriber = Subscriber(run.state)
    subscriber.next(0.0)
    learn_delta(run)
    subscriber.next(0.0)
    text = Metrics(subscriber, WaitingRequests(1), lambda: True).text().decode()
    served = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    page = Path(__file__).parents[1].joinpath("docs", "serving.md").read_text()
    listed = set(re.findall(rf"`({PREFIX}_\w+)(?:{{\w+}})?`", page))
    own = {name for name in served if name.startswith(PREFIX) and not name.endswith("_created")}
    assert own == listed
