"""Bodies of requests to rows, and probabilities to bodies of answers.

A body comes from a stranger. It is limited in bytes before it is read here, in rows, and in what it
unfolds to. What is left is judged by the model's own rules (`events.feature_rows`).

    JSON    {"rows": [{field: value, ...}, ...]}  or  {"columns": {field: [value, ...], ...}}
    Arrow   an IPC stream of record batches with a column for each field

In JSON, the last of several members of one name counts, as in an event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from msgspec import UNSET, UnsetType

from stream_ctr.events import arrow_events
from stream_ctr.events.parsed_events import InvalidRecord
from stream_ctr.serve.answers import ARROW, Answer, Refused

Rows = Sequence[Mapping[str, object]] | pa.Table
Floats = npt.NDArray[np.float64]

_FORM = '{"rows": [{"field": value, ...}, ...]} or {"columns": {"field": [value, ...], ...}}'
_METADATA = "stream_ctr."


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[dict[str, Any]] | UnsetType = UNSET
    columns: dict[str, list[Any]] | UnsetType = UNSET


class _Predictions(msgspec.Struct, frozen=True):
    probabilities: list[float]
    snapshot: str
    delta: int | None
    epoch: int
    run: str
    model: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest request: `body_bytes` as it is sent, and `rows`."""

    body_bytes: int = 4 << 20
    rows: int = 10_000

    def require_body(self, size: int) -> None:
        """Raise `Refused` for a body of more than `body_bytes`."""
        if size > self.body_bytes:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too_large",
                f"the body has more than {self.body_bytes} bytes; send fewer rows a request",
            )

    def require_rows(self, rows: int) -> None:
        """Raise `Refused` for more than `rows`."""
        if rows > self.rows:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too_many_rows",
                f"the request has {rows} rows, more than {self.rows}; send fewer a request",
            )


@dataclass(frozen=True, slots=True)
class Served:
    """The names of what predicts: the snapshot, its run, and the model in it.

    `delta` is the sequence of the last delta that was applied to the snapshot, None without any,
    and `epoch` that of the process that wrote it.
    """

    snapshot: str
    run: str
    model: str
    delta: int | None = None
    epoch: int = 0


def read_json(body: bytes, limits: Limits) -> Sequence[Mapping[str, object]]:
    """Return the rows of a JSON body. Raises `Refused` if it is malformed or has too many.

    >>> read_json(b'{"rows": [{"app": "maps"}, {}]}', Limits())
    [{'app': 'maps'}, {}]
    >>> read_json(b'{"columns": {"app": ["maps", null], "age": [31, 2]}}', Limits())
    [{'app': 'maps', 'age': 31}, {'app': None, 'age': 2}]
    """
    try:
        request = msgspec.json.decode(body, type=_Request)
    except RecursionError:
        raise _malformed("JSON is nested too deep") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _malformed(f"{error}; the form is {_FORM}") from None
    if request.rows is not UNSET and request.columns is UNSET:
        rows = request.rows
    elif request.columns is not UNSET and request.rows is UNSET:
        rows = _transposed(request.columns)
    else:
        raise _malformed(f"give either rows or columns; the form is {_FORM}")
    limits.require_rows(len(rows))
    return rows


def _transposed(columns: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    lengths = set(map(len, columns.values()))
    if len(lengths) > 1:
        raise _malformed(f"columns have {min(lengths)} to {max(lengths)} values, and must agree")
    values = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


def read_arrow(body: bytes, limits: Limits) -> pa.Table:
    """Return the rows of an Arrow IPC stream.

    Every offset, index and text is validated, and what it unfolds to is known before anything is
    allocated. Raises `Refused` if it is no complete stream, or too large.
    """
    try:
        batches = arrow_events.read_batches(pa.py_buffer(body), max_record_bytes=limits.body_bytes)
    except InvalidRecord as error:
        if error.reason == "not_arrow":
            raise _malformed(f"the body is not an Arrow IPC stream: {error.message}") from None
        raise Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", f"the stream has {error.message}"
        ) from None
    limits.require_rows(sum(map(len, batches)))
    return pa.Table.from_batches(batches) if batches else pa.table({})


def _malformed(message: str) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, "malformed", message)


def json_answer(probabilities: Floats, served: Served) -> Answer:
    """Return probabilities [n] as JSON, null for one that is not a number.

    >>> json_answer(np.array([0.25]), Served("s1", "r", "fm", delta=7, epoch=3)).body
    b'{"probabilities":[0.25],"snapshot":"s1","delta":7,"epoch":3,"run":"r","model":"fm"}'
    """
    document = _Predictions(
        probabilities.tolist(),
        served.snapshot,
        served.delta,
        served.epoch,
        served.run,
        served.model,
    )
    return Answer(HTTPStatus.OK, msgspec.json.encode(document), rows=len(probabilities))


def arrow_answer(probabilities: Floats, served: Served) -> Answer:
    """Return probabilities [n] as an Arrow IPC stream with a column `probability`.

    The metadata of its schema has `stream_ctr.snapshot`, `stream_ctr.epoch`, `stream_ctr.run` and
    `stream_ctr.model`, and `stream_ctr.delta` if one was applied.

    >>> answer = arrow_answer(np.array([0.25]), Served("s1", "r", "fm"))
    >>> table = pa.ipc.open_stream(answer.body).read_all()
    >>> table.to_pydict(), table.schema.metadata[b"stream_ctr.snapshot"]
    ({'probability': [0.25]}, b's1')
    """
    names = {
        "snapshot": served.snapshot,
        **({} if served.delta is None else {"delta": str(served.delta)}),
        "epoch": str(served.epoch),
        "run": served.run,
        "model": served.model,
    }
    schema = pa.schema(
        [pa.field("probability", pa.float64(), nullable=False)],
        metadata={f"{_METADATA}{key}": name for key, name in names.items()},
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(probabilities)], schema=schema))
    body = sink.getvalue().to_pybytes()
    return Answer(HTTPStatus.OK, body, ARROW, rows=len(probabilities))
