"""Deltas with sensible headers, chains of them, and their records on a topic."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import structs

from stream_ctr.evaluate.gate import Verdict
from stream_ctr.snapshots.contract import Sign
from stream_ctr.snapshots.delta import (
    Closed,
    Delta,
    DeltaHeader,
    DeltaPosition,
    DeltaRank,
    decode_header,
    encode_header,
    encode_payload,
    header_sha256,
)
from stream_ctr.snapshots.delta_topic import CHUNK_BYTES, records
from support.manifests import RUN, TIME_MS

BASE = "00000001-20250101T101500Z"
BASE_SHA256 = hashlib.sha256(b"the manifest of the base").hexdigest()
IDENTITY = hashlib.sha256(b"fields and models").hexdigest()
SMALL_PAYLOAD = encode_payload({"model": {"omega": np.array([0.5, 0.5])}}, "fp32")

HEADER = DeltaHeader(
    run=RUN,
    model="default",
    rank=DeltaRank(3, 1),
    base=BASE,
    base_sha256=BASE_SHA256,
    parent=BASE_SHA256,
    identity_sha256=IDENTITY,
    precision="fp32",
    verdict=Verdict(),
    examples=1100,
    oldest_event_ms=TIME_MS,
    newest_event_ms=TIME_MS + 5000,
    watermark_ms=TIME_MS + 1000,
    positions={"clicks:0": 1300},
    closed=(Closed(TIME_MS + 6000, 60), Closed(TIME_MS + 7000, 40)),
    learned_ms=TIME_MS + 8000,
    created_ms=TIME_MS + 9000,
    rows={"model": 0},
    payload_sha256=hashlib.sha256(SMALL_PAYLOAD).hexdigest(),
    payload_bytes=len(SMALL_PAYLOAD),
)


@dataclass(frozen=True, slots=True)
class Made:
    """A delta, with the bytes of its header."""

    header: DeltaHeader
    header_bytes: bytes
    payload: bytes

    @property
    def sha256(self) -> str:
        return header_sha256(self.header_bytes)

    @property
    def position(self) -> DeltaPosition:
        return DeltaPosition(self.header.rank, self.sha256)

    @property
    def delta(self) -> Delta:
        """The delta as a source returns it."""
        return Delta(self.header, self.sha256, self.payload)


def header(**changes: Any) -> DeltaHeader:
    """Return a header with these fields changed."""
    return structs.replace(HEADER, **changes)


def made(payload: bytes = SMALL_PAYLOAD, sign: Sign | None = None, **changes: Any) -> Made:
    """Return a delta with this payload, whose header has these fields changed."""
    unsigned = header(
        payload_sha256=hashlib.sha256(payload).hexdigest(), payload_bytes=len(payload), **changes
    )
    data = encode_header(unsigned, sign)
    return Made(decode_header(data), data, payload)


def chain(
    count: int,
    *,
    epoch: int = 3,
    first: int = 1,
    parent: str = BASE_SHA256,
    payloads: Sequence[bytes] = (),
    sign: Sign | None = None,
    **changes: Any,
) -> list[Made]:
    """Return a chain of so many deltas, of ranks from (epoch, first) on."""
    links: list[Made] = []
    for index in range(count):
        payload = payloads[index] if payloads else SMALL_PAYLOAD
        link = made(
            payload,
            sign,
            rank=DeltaRank(epoch, first + index),
            parent=links[-1].sha256 if links else parent,
            **{"examples": 1000 + 100 * (first + index), **changes},
        )
        links.append(link)
    return links


def large(chunks: int, seed: int = 0) -> bytes:
    """Return bytes for a payload of so many chunks, the last of which is short."""
    size = (chunks - 1) * CHUNK_BYTES + 1000
    return np.random.default_rng(seed).bytes(size)


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as a topic holds it."""

    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    key: bytes | None = b"default"
    partition: int = 0
    offset: int = 0


def stored(link: Made, key: bytes = b"default") -> list[Stored]:
    """Return the records of a delta, in the order in which they are sent."""
    return [
        Stored(value, tuple(headers), key, offset=offset)
        for offset, (value, headers) in enumerate(
            records(link.header_bytes, link.header, link.payload)
        )
    ]
