"""Requests that wait are scored together, and each answer is that of the snapshot it names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.patience import PATIENCE_SECONDS, wait_until
from support.prediction_servers import (
    PATIENT,
    Held,
    ask,
    ask_arrow,
    metric,
    serving,
    stream_of,
    table_of,
)
from support.served import publish, write_served

from stream_ctr.serve.answers import Answer
from stream_ctr.serve.bodies import Limits
from stream_ctr.serve.scoring import Answers, Scoring
from stream_ctr.serve.server import Policy
from stream_ctr.serve.waiting import Request, WaitingRequests
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber

Row = dict[str, Any]
SNAPSHOTS = 4
ROW: Row = {"app": "maps", "age": 31}

rows_of_a_request = st.lists(
    st.fixed_dictionaries(
        {"app": st.sampled_from(["maps", "mail", "music"])},
        optional={"age": st.integers(-5, 5), "os": st.sampled_from(["a", "b"])},
    ),
    max_size=5,
)
wrong = st.just([{"app": "maps"}, {"ap": "maps"}])


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Snapshots of one run, each with weights of its own."""
    root = Path(tmp_path_factory.mktemp("run")) / "snapshots"
    return [write_served(root, seed=number, sequence=number) for number in range(1, SNAPSHOTS + 1)]


@pytest.fixture(scope="module")
def scorers(snapshots: list[Path]) -> dict[str, Scorer]:
    return {path.name: Scorer(path) for path in snapshots}


# -- many requests at once -----------------------------------------------------------------------


@settings(max_examples=12)
@given(data=st.data())
def test_every_answer_is_the_prediction_of_the_snapshot_that_it_names(
    snapshots: list[Path], scorers: dict[str, Scorer], data: st.DataObject
) -> None:
    """Clients ask in JSON and Arrow, some wrongly, while all snapshots are published in turn."""
    given_rows = data.draw(st.lists(rows_of_a_request | wrong, min_size=8, max_size=40))
    arrow = data.draw(st.lists(st.booleans(), min_size=8, max_size=40))
    state = snapshots[0].parent.parent
    publish(snapshots[0])
    names: set[str] = set()

    def check(client: httpx.Client, index: int) -> None:
        rows = given_rows[index % len(given_rows)]
        if any("ap" in row for row in rows):
            response = ask(client, rows)
            assert (response.status_code, response.json()["row"]) == (422, 1)
            return
        if arrow[index % len(arrow)] and rows:
            table = pa.table(
                {name: [row.get(name) for row in rows] for name in ("app", "age", "os")}
            )
            found = table_of(ask_arrow(client, stream_of(table)))
            name = found.schema.metadata[b"stream_ctr.snapshot"].decode()
            probabilities = found["probability"].to_pylist()
        else:
            document = ask(client, rows).json()
            name, probabilities = document["snapshot"], document["probabilities"]
        names.add(name)
        assert probabilities == pytest.approx(scorers[name].predict(rows).tolist(), abs=1e-6)

    with serving(state) as (client, subscriber), ThreadPoolExecutor(8) as pool:
        for path in snapshots:
            publish(path)
            asked = [pool.submit(check, client, index) for index in range(40)]
            wait_until(lambda path=path: subscriber.pointer.snapshot == path.name)  # type: ignore[union-attr, misc]
            for each in asked:
                each.result()
        check(client, 0)
        last = ask(client, [ROW]).json()["snapshot"]
    assert last == snapshots[-1].name
    assert names <= scorers.keys()


def test_predictions_of_the_snapshots_differ(scorers: dict[str, Scorer]) -> None:
    """Otherwise the test above would notice no mix-up."""
    found = [scorer.predict([ROW])[0] for scorer in scorers.values()]
    assert np.diff(sorted(found)).min() > 1e-5


# -- the thread ----------------------------------------------------------------------------------


def request(rows: Sequence[Row], seconds: float = PATIENCE_SECONDS) -> Request:
    return Request(json.dumps({"rows": rows}).encode(), False, time.perf_counter() + seconds, print)


def scored(
    scorer: Callable[[], Scorer | None], requests: Sequence[Request], **options: Any
) -> dict[Request, Answer]:
    """Answer requests that all wait when the thread begins."""
    answers: dict[Request, Answer] = {}

    def deliver(found: Answers) -> None:
        answers.update(found)

    waiting = WaitingRequests(1000)
    assert all(waiting.put(each) for each in requests)
    with Scoring(waiting, scorer, deliver, **options):
        wait_until(lambda: len(answers) == len(requests))
    return answers


def test_requests_that_wait_are_predicted_together_and_get_their_own_rows(
    snapshots: list[Path],
) -> None:
    scorer = Scorer(snapshots[0])
    sizes: list[int] = []
    requests = [request([{"app": f"a{index}"}] * (index % 3)) for index in range(30)]
    answers = scored(lambda: scorer, requests, observe=lambda rows, seconds: sizes.append(rows))
    assert sizes == [30]
    for index, each in enumerate(requests):
        expected = scorer.predict([{"app": f"a{index}"}] * (index % 3))
        found = json.loads(answers[each].body)["probabilities"]
        assert found == pytest.approx(expected.tolist(), abs=1e-6)
        assert answers[each].rows == index % 3


def test_large_requests_are_not_joined(snapshots: list[Path]) -> None:
    sizes: list[int] = []
    scorer = Scorer(snapshots[0])
    requests = [request([{"app": "a" * 50_000}]) for _ in range(5)]
    scored(lambda: scorer, requests, observe=lambda rows, seconds: sizes.append(rows))
    assert sizes == [2, 2, 1]


def test_a_wrong_request_harms_none_that_is_scored_with_it(snapshots: list[Path]) -> None:
    scorer = Scorer(snapshots[0])
    good, unknown, malformed = request([ROW]), request([ROW, {"ap": 1}]), request([])
    malformed.body = b"{"
    many = request([ROW] * 3)
    answers = scored(lambda: scorer, [good, unknown, malformed, many], limits=Limits(rows=2))
    found = [answers[each].status for each in (good, unknown, malformed, many)]
    assert found == [200, 422, 400, 413]
    assert json.loads(answers[unknown].body)["row"] == 1


def test_a_fault_of_the_model_is_500_for_the_request_that_meets_it(
    snapshots: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Scorer(snapshots[0])
    ids = scorer.ids

    def faulty(rows: Any) -> Any:
        if any(row.get("app") == "fault" for row in rows):
            raise RuntimeError("the fault")
        return ids(rows)

    scorer.ids = faulty  # type: ignore[method-assign]
    good, bad = request([ROW]), request([{"app": "fault"}])
    answers = scored(lambda: scorer, [good, bad])
    assert (answers[good].status, answers[bad].status) == (200, 500)
    assert b"the fault" not in answers[bad].body
    assert "the fault" in caplog.text


def test_a_request_whose_deadline_has_passed_is_not_computed(snapshots: list[Path]) -> None:
    scorer = Scorer(snapshots[0])
    rows: list[int] = []
    late, good = request([ROW], seconds=-1.0), request([ROW] * 2)
    answers = scored(
        lambda: scorer, [late, good], observe=lambda number, seconds: rows.append(number)
    )
    assert (answers[late].status, answers[good].status) == (503, 200)
    assert rows == [2]


# -- back-pressure -------------------------------------------------------------------------------


def test_more_requests_than_may_wait_are_503_at_once(snapshots: list[Path]) -> None:
    publish(snapshots[0])
    policy = Policy(waiting=3, timeout_seconds=PATIENT.timeout_seconds)
    state = snapshots[0].parent.parent
    with serving(state, policy=policy) as (client, subscriber), ThreadPoolExecutor(8) as pool:
        held = Held(subscriber.scorer)
        asked = [pool.submit(ask, client, [ROW])]
        assert held.entered.wait(PATIENCE_SECONDS)
        asked += [pool.submit(ask, client, [ROW] * 2) for _ in range(3)]
        wait_until(lambda: metric(client, "stream_ctr_serve_waiting_requests") == 3)
        for _ in range(10):
            response = ask(client, [ROW])
            assert response.status_code == 503
            assert response.json()["reason"] == "full"
            assert response.headers["retry-after"] == "1"
        held.release.set()
        assert [each.result().status_code for each in asked] == [200] * 4
        assert held.sizes == [1, 6]
        assert metric(client, "stream_ctr_serve_requests_total", status="503") == 10


def test_a_request_that_waits_until_its_deadline_is_503_and_frees_its_place(
    snapshots: list[Path],
) -> None:
    publish(snapshots[0])
    state = snapshots[0].parent.parent
    with serving(state) as (client, subscriber), ThreadPoolExecutor(2) as pool:
        held = Held(subscriber.scorer)
        first = pool.submit(ask, client, [ROW])
        assert held.entered.wait(PATIENCE_SECONDS)
        response = ask(client, [ROW] * 2, headers={"x-timeout-ms": "50"})
        assert (response.status_code, response.json()["reason"]) == (503, "deadline")
        assert metric(client, "stream_ctr_serve_waiting_requests") == 0
        held.release.set()
        assert first.result().status_code == 200
        assert ask(client, [ROW]).status_code == 200
    assert held.sizes == [1, 1]


def test_the_subscriber_of_a_server_is_closed_with_it(snapshots: list[Path]) -> None:
    publish(snapshots[0])
    with serving(snapshots[0].parent.parent) as (_, subscriber):
        assert isinstance(subscriber, Subscriber)
        assert not subscriber.closing
    assert subscriber.closing
