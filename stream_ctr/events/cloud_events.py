"""CloudEvents in structured mode: JSON objects whose member `data` is the event.

    {"specversion": "1.0", "id": "a1", "source": "/ads", "type": "click",
     "time": "2025-01-01T00:00:04.200Z", "data": {"kind": "click"}}

The id and the time of the envelope stand in where the event has none. In binary mode the value of a
record is the event itself, so there is nothing to unwrap.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
"""

from __future__ import annotations

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import UNSET, Raw, UnsetType

from stream_ctr.events.parsed_events import InvalidRecord

PREFIX = "the data of a CloudEvent: "
_NULL = b"null"


class _Envelope(msgspec.Struct):
    specversion: Raw
    kind: Raw | UnsetType = UNSET
    data: Raw | UnsetType = UNSET
    id: Raw | UnsetType = UNSET
    time: Raw | UnsetType = UNSET


class _Data(msgspec.Struct):
    impression_id: Raw | UnsetType = UNSET
    time: Raw | UnsetType = UNSET


_envelopes = msgspec.json.Decoder(_Envelope)
_data = msgspec.json.Decoder(_Data)


def may_be_envelopes(values: pa.LargeBinaryArray) -> pa.BooleanArray:
    """Return which records mention the member that every CloudEvent has [n].

    >>> may_be_envelopes(pa.array([b'{"specversion":"1.0"}', b"{}"], pa.large_binary())).to_pylist()
    [True, False]
    """
    return pc.match_substring(values, '"specversion"')


def unwrap(value: bytes) -> bytes | None:
    """Return the event of a CloudEvent as JSON, None if the record is no CloudEvent.

    An object with a member `kind` is an event, whatever else it has. Raises `InvalidRecord` when a
    CloudEvent has no object as its data.

    >>> unwrap(b'{"specversion":"1.0","id":"a1","time":5,"data":{"kind":"click"}}')
    b'{"kind":"click","impression_id":"a1","time":5}'
    >>> unwrap(b'{"kind":"click"}')
    """
    try:
        envelope = _envelopes.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if not _is_absent(envelope.kind):
        return None
    data = b"" if isinstance(envelope.data, UnsetType) else bytes(envelope.data).strip()
    try:
        found = _data.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        expected = "a CloudEvent needs the event as its data, a JSON object"
        raise InvalidRecord("not_an_object", f"{expected}, got {data[:80]!r}") from None
    # Of several members of one name the last one counts, so these replace a null.
    members = [
        (b'"impression_id":', found.impression_id, envelope.id),
        (b'"time":', found.time, envelope.time),
    ]
    added = [
        name + bytes(stand_in)
        for name, present, stand_in in members
        if _is_absent(present) and not isinstance(stand_in, UnsetType)
    ]
    if not added:
        return data
    start = data[:-1].rstrip()
    return start + (b"" if start == b"{" else b",") + b",".join(added) + b"}"


def _is_absent(member: Raw | UnsetType) -> bool:
    return isinstance(member, UnsetType) or bytes(member).strip() == _NULL
