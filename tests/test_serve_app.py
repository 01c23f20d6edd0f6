"""A prediction server answers with the model's probabilities, and refuses what is wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from support.manifests import RUN
from support.patience import wait_until
from support.prediction_servers import (
    PATIENT,
    ask,
    ask_arrow,
    metric,
    serving,
    stream_of,
    table_of,
)
from support.served import publish, write_served
from support.snapshots import flip_bit

from stream_ctr.serve import protocol
from stream_ctr.serve.answers import ARROW
from stream_ctr.serve.bodies import Limits
from stream_ctr.serve.server import Policy
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber

ROWS: list[dict[str, Any]] = [{"app": "maps", "age": 31}, {"os": "a"}, {"app": "mail", "age": None}]
SMALL = Policy(Limits(body_bytes=4000, rows=3), timeout_seconds=PATIENT.timeout_seconds)
Served = tuple[httpx.Client, Subscriber]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(tmp_path_factory.mktemp("served"))
    publish(write_served(directory / "snapshots"))
    return directory


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Served]:
    with serving(state, policy=SMALL) as served:
        yield served


@pytest.fixture
def client(server: Served) -> httpx.Client:
    return server[0]


def refused(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["reason"]


# -- predictions ---------------------------------------------------------------------------------


def test_rows_in_json_get_the_probabilities_of_the_snapshot(state: Path, server: Served) -> None:
    client, subscriber = server
    expected = Scorer(next((state / "snapshots").iterdir())).predict(ROWS)
    assert len(set(expected.tolist())) == 3
    assert subscriber.pointer
    document = ask(client, ROWS).json()
    assert document == {
        "probabilities": pytest.approx(expected, abs=1e-9),
        "snapshot": subscriber.pointer.snapshot,
        "delta": None,
        "epoch": 3,
        "run": RUN,
        "model": "deepfm",
    }
    columns = {"app": ["maps", None, "mail"], "age": [31, None, None], "os": [None, "a", None]}
    assert client.post("/predict", json={"columns": columns}).json() == document
    assert ask(client, []).json()["probabilities"] == []
    bare = client.post("/predict", content=json.dumps({"rows": ROWS}))
    assert "content-type" not in bare.request.headers
    assert bare.json() == document


def test_an_arrow_stream_is_answered_with_an_arrow_stream(server: Served) -> None:
    client, subscriber = server
    assert subscriber.pointer
    given = pa.table({name: [row.get(name) for row in ROWS] for name in ("app", "age", "os")})
    response = ask_arrow(client, stream_of(given))
    assert response.headers["content-type"] == ARROW
    table = table_of(response)
    assert table.column_names == ["probability"]
    assert table["probability"].to_pylist() == pytest.approx(
        ask(client, ROWS).json()["probabilities"], abs=1e-9
    )
    assert table.schema.metadata == {
        b"stream_ctr.snapshot": subscriber.pointer.snapshot.encode(),
        b"stream_ctr.epoch": b"3",
        b"stream_ctr.run": RUN.encode(),
        b"stream_ctr.model": b"deepfm",
    }
    words = pa.table({"app": pa.array(["maps", "mail"]).dictionary_encode()})
    assert len(table_of(ask_arrow(client, stream_of(words, compression="zstd")))) == 2
    assert len(table_of(ask_arrow(client, stream_of(words.slice(0, 0))))) == 0


def test_an_additional_model_is_served_under_its_name(state: Path) -> None:
    path = next((state / "snapshots").iterdir())
    expected = Scorer(path, model="ftrl").predict(ROWS).tolist()
    with serving(state, model="ftrl") as (client, _):
        document = ask(client, ROWS).json()
    assert document["probabilities"] == pytest.approx(expected)
    assert document["model"] == "ftrl"


# -- requests that are wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "reason", "row", "field"),
    [
        ([{"app": "a"}, {"ap": "maps"}], "unknown_field", 1, "ap"),
        ([{"app": "a"}, {"age": "31"}], "wrong_type", 1, "age"),
        ([{"app": ["a"]}], "wrong_type", 0, "app"),
        ([{"app": 10**30}], "wrong_type", 0, "app"),
        ([{"app": "a"}, {}], "no_field", 1, None),
        ([{"kind": "impression", "features": {"app": "a"}}], "wrapped_event", 0, None),
    ],
)
def test_invalid_features_are_422_with_reason_row_and_field(
    client: httpx.Client, rows: Any, reason: str, row: int, field: str | None
) -> None:
    response = ask(client, rows)
    document = response.json()
    assert response.status_code == 422
    assert (document["reason"], document.get("row"), document.get("field")) == (reason, row, field)
    assert f"row {row}" in document["error"]


def test_invalid_features_are_scored_as_missing_and_counted_when_asked(state: Path) -> None:
    with serving(state, on_invalid="score") as (client, _):
        lenient = ask(client, [{"app": "maps", "ap": 1, "age": "31"}]).json()
        assert lenient["probabilities"] == ask(client, [{"app": "maps"}]).json()["probabilities"]
        name = "stream_ctr_serve_invalid_features_total"
        assert metric(client, name, reason="unknown_field") == 1
        assert metric(client, name, reason="wrong_type") == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"row": []}',
        b'{"rows": {}}',
        b'{"rows": [1]}',
        b'{"rows": [{"age": NaN}]}',
        b'{"rows": [{"age": 1e999}]}',
        b'{"rows": [{"app": "\xff"}]}',
        b'{"rows": [], "columns": {}}',
        b"{}",
        b'{"columns": {"app": ["a"], "age": []}}',
        b'{"rows": []} {"rows": []}',
        b"[" * 900,
        b'{"rows": [{"app": ' + 430 * b"[" + 430 * b"]" + b"}]}",
    ],
)
def test_malformed_json_is_400(client: httpx.Client, body: bytes) -> None:
    response = client.post("/predict", content=body)
    if body.count(b"[") > 400 and response.status_code == 422:
        assert response.json()["reason"] == "wrong_type"  # a list, which Python can still show
    else:
        assert refused(response) == (400, "malformed")
    assert ask(client, ROWS).status_code == 200


def test_deep_nesting_of_any_depth_harms_nothing(state: Path) -> None:
    with serving(state) as (client, _):
        for depth in (10, 200, 950, 1_000, 5_000, 500_000):
            nested = b"[" * depth + b"]" * depth
            response = client.post("/predict", content=b'{"rows": [{"app": ' + nested + b"}]}")
            assert response.status_code in (400, 422)
        assert ask(client, ROWS).status_code == 200


def test_the_last_of_several_members_of_a_name_counts(client: httpx.Client) -> None:
    body = b'{"rows": [{"app": "mail", "app": "maps"}]}'
    found = client.post("/predict", content=body).json()["probabilities"]
    assert found == ask(client, [{"app": "maps"}]).json()["probabilities"]
    assert found != ask(client, [{"app": "mail"}]).json()["probabilities"]


def arrow_with_bad_offsets() -> bytes:
    """Return a stream whose texts end beyond their buffer."""
    good = stream_of(pa.table({"app": ["maps", "mail"]}))
    offsets = np.array([0, 4, 8], np.int32).tobytes()
    assert good.count(offsets) == 1
    return good.replace(offsets, np.array([0, 4, 1 << 30], np.int32).tobytes())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xff\xff\xff",
        b'{"rows": []}',
        stream_of(pa.table({"app": ["maps"]}))[:-8],
        stream_of(pa.table({"app": ["maps"]})) + b"x",
        arrow_with_bad_offsets(),
    ],
)
def test_a_damaged_arrow_stream_is_400(client: httpx.Client, body: bytes) -> None:
    assert refused(ask_arrow(client, body)) == (400, "malformed")
    assert ask(client, ROWS).status_code == 200


def test_a_compression_bomb_is_413_before_it_unfolds(state: Path) -> None:
    bomb = stream_of(pa.table({"app": ["x" * (200 << 20)]}), compression="zstd")
    assert len(bomb) < 1 << 20
    nulls = stream_of(pa.table({"app": pa.nulls(50_000_000)}))
    assert len(nulls) < 1000
    with serving(state) as (client, _):
        assert refused(ask_arrow(client, bomb)) == (413, "too_large")
        assert refused(ask_arrow(client, nulls)) == (413, "too_large")
        assert ask(client, ROWS).status_code == 200


def test_a_table_with_invalid_columns_is_422(client: httpx.Client) -> None:
    assert refused(ask_arrow(client, stream_of(pa.table({"ap": ["a"]})))) == (422, "unknown_field")
    nested = pa.table({"app": [["a"]]})
    assert refused(ask_arrow(client, stream_of(nested))) == (422, "wrong_type")


def test_too_many_bytes_or_rows_are_413(client: httpx.Client) -> None:
    assert refused(ask(client, [{"app": "x" * 4000}])) == (413, "too_large")
    assert refused(ask(client, [{"app": "a"}] * 4)) == (413, "too_many_rows")
    columns = pa.table({"app": ["a"] * 4})
    assert refused(ask_arrow(client, stream_of(columns))) == (413, "too_many_rows")
    chunked = client.post("/predict", content=iter([b'{"rows": [' + b" " * 2500, b" " * 2500]))
    assert refused(chunked) == (413, "too_large")
    assert ask(client, ROWS).status_code == 200


def test_other_types_paths_and_methods_are_refused(client: httpx.Client) -> None:
    typed = client.post("/predict", content="x", headers={"content-type": "text/csv"})
    assert refused(typed) == (415, "content_type")
    packed = client.post("/predict", content="x", headers={"content-encoding": "gzip"})
    assert refused(packed) == (415, "content_type")
    assert refused(client.get("/predict")) == (405, "method")
    assert client.get("/predict").headers["allow"] == "POST"
    assert refused(client.get("/predictions")) == (404, "path")
    assert refused(client.post("/metrics")) == (405, "method")
    assert client.get("/healthz", headers={"host": "rebound.example"}).status_code == 200
    assert client.get("/model", headers={"host": "rebound.example"}).status_code == 403


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_timeout_that_is_no_positive_number_is_400(client: httpx.Client, timeout: str) -> None:
    response = ask(client, ROWS, headers={"x-timeout-ms": timeout})
    assert refused(response) == (400, "timeout_header")


# -- connections ---------------------------------------------------------------------------------


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), 60)


def test_a_head_without_end_is_cut_off(client: httpx.Client) -> None:
    with connected(client) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            connection.sendall(b"y" * 50_000_000)
    assert ask(client, ROWS).status_code == 200


@pytest.mark.parametrize("begun", [b"", b"POST /pre"])
def test_a_connection_without_a_request_is_closed(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)
    with connected(client) as connection:
        connection.sendall(begun)
        assert connection.recv(100) == b""


def test_a_body_that_does_not_arrive_in_time_is_408(state: Path) -> None:
    with serving(state, policy=Policy(timeout_seconds=0.1)) as (client, _):
        with connected(client) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\n")
            connection.sendall(b"content-length: 10\r\n\r\n12345")
            answer = b"".join(iter(lambda: connection.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"slow_body"' in answer


# -- what is served ------------------------------------------------------------------------------


def test_the_model_is_described(client: httpx.Client) -> None:
    document = client.get("/model").json()
    assert document["snapshot"].startswith("00000001-")
    assert document["fields"] == [
        {"name": "app", "kind": "categorical"},
        {"name": "age", "kind": "numeric"},
        {"name": "os", "kind": "categorical"},
    ]
    assert document["crosses"] == [["app", "os"]]
    assert document["positions"] == {"clicks:0": 1200}
    assert document["event_time_ms"] == 1_735_726_500_000


def test_a_server_is_ready_once_a_model_is_loaded(tmp_path: Path) -> None:
    with serving(tmp_path, ready=False) as (client, _):
        assert client.get("/readyz").status_code == 503
        assert refused(client.get("/model")) == (503, "no_model")
        response = ask(client, ROWS)
        assert refused(response) == (503, "no_model")
        assert response.headers["retry-after"] == "1"
        assert metric(client, "stream_ctr_serve_ready") == 0
        publish(write_served(tmp_path / "snapshots"))
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert ask(client, ROWS).status_code == 200
        assert metric(client, "stream_ctr_serve_ready") == 1


def test_a_snapshot_that_does_not_verify_leaves_the_old_model_in_place(tmp_path: Path) -> None:
    publish(write_served(tmp_path / "snapshots"))
    with serving(tmp_path) as (client, subscriber):
        before = ask(client, ROWS).json()
        damaged = write_served(tmp_path / "snapshots", seed=2, sequence=2)
        flip_bit(damaged / "model.safetensors", 300)
        pointer = publish(next((tmp_path / "snapshots").glob("00000001-*")))
        assert pointer.snapshot == before["snapshot"]
        publish(damaged)
        wait_until(lambda: subscriber.refusal)
        assert ask(client, ROWS).json() == before
        assert client.get("/healthz").json()["healthy"] is False
        assert client.get("/readyz").status_code == 200
        assert metric(client, "stream_ctr_serve_subscriber_failures_total", concerned="snapshot")


def test_requests_rows_and_refusals_are_counted(state: Path) -> None:
    with serving(state) as (client, _):
        for _ in range(3):
            ask(client, ROWS)
        ask(client, [{"ap": 1}])
        prefix = "stream_ctr_serve"
        assert metric(client, f"{prefix}_requests_total", status="200") == 3
        assert metric(client, f"{prefix}_requests_total", status="422") == 1
        assert metric(client, f"{prefix}_rows_total") == 9
        assert metric(client, f"{prefix}_refusals_total", reason="unknown_field") == 1
        assert metric(client, f"{prefix}_request_duration_seconds_count") == 4
        assert metric(client, f"{prefix}_prediction_rows_sum") == 9
        assert metric(client, f"{prefix}_snapshot_sequence") == 1
        assert metric(client, f"{prefix}_snapshot_event_timestamp_seconds") == 1_735_726_500
