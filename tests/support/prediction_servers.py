"""Prediction servers in a thread, on real sockets, and requests to them."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.ipc

from stream_ctr.http.address import Address
from stream_ctr.serve.answers import ARROW
from stream_ctr.serve.server import Policy, PredictionServer
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber
from support.patience import PATIENCE_SECONDS, wait_until

ANY_PORT = Address("127.0.0.1", 0)
PATIENT = Policy(timeout_seconds=PATIENCE_SECONDS)


@contextlib.contextmanager
def serving(
    state: Path, *, policy: Policy = PATIENT, ready: bool = True, **options: Any
) -> Iterator[tuple[httpx.Client, Subscriber]]:
    """Serve a state directory; yield a client of the server, and the server's subscriber."""
    subscriber = Subscriber(state, **options)
    server = PredictionServer(subscriber, ANY_PORT, model=options.get("model"), policy=policy)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://{server.address}", timeout=PATIENCE_SECONDS) as client:
            wait_until(lambda: _answers(client, "/readyz" if ready else "/healthz"))
            yield client, subscriber
    finally:
        server.stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def ask(
    client: httpx.Client, rows: Sequence[Mapping[str, object]], **options: Any
) -> httpx.Response:
    """Send rows as JSON."""
    return client.post("/predict", json={"rows": list(rows)}, **options)


def ask_arrow(client: httpx.Client, body: bytes) -> httpx.Response:
    """Send an Arrow stream."""
    return client.post("/predict", content=body, headers={"content-type": ARROW})


def stream_of(table: pa.Table, **options: Any) -> bytes:
    """Return a table as an Arrow IPC stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue()


def table_of(response: httpx.Response) -> pa.Table:
    """Return the Arrow stream of a response."""
    return pa.ipc.open_stream(response.content).read_all()


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """Return the value of a metric, 0 if it is absent."""
    shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
    wanted = f"{name}{{{shown}}}" if labels else name
    lines = (line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines())
    return next((float(value) for key, value in lines if key == wanted), 0.0)


class Held:
    """A scorer whose predictions wait until they are released."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.entered = threading.Event()
        self.release = threading.Event()
        self.sizes: list[int] = []
        predict_ids = scorer.predict_ids

        def predict(ids: Any, values: Any) -> Any:
            self.sizes.append(len(ids))
            self.entered.set()
            assert self.release.wait(PATIENCE_SECONDS)
            return predict_ids(ids, values)

        scorer.predict_ids = predict  # type: ignore[method-assign]
