"""A chain of deltas that no run has learned: what a trainer would write, for servers to apply."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from stream_ctr.evaluate.gate import Verdict
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Sign
from stream_ctr.snapshots.delta import (
    Changes,
    Closed,
    DeltaHeader,
    DeltaRank,
    Precision,
    encode_header,
    header_sha256,
    identity_sha256,
)
from stream_ctr.snapshots.pointer import read_pointer

_NO_DIGEST = "0" * 64


class Link(NamedTuple):
    """A header and its bytes."""

    header: DeltaHeader
    data: bytes


class ChainWriter:
    """The headers of a chain, each with the digest of the one before.

    `first` is a header of this chain in all that stays the same; its parent is that of the first
    link.
    """

    def __init__(self, first: DeltaHeader, sign: Sign | None = None) -> None:
        self._last = first
        self._parent = first.parent
        self._sign = sign

    @classmethod
    def unattached(cls, *, precision: Precision, sign: Sign | None = None) -> Self:
        """Return a chain from a snapshot that does not exist."""
        first = _header("0" * 32, "default", "none", _NO_DIGEST, _NO_DIGEST, precision, epoch=1)
        return cls(first, sign)

    @classmethod
    def on_published(
        cls, state: Path, *, precision: Precision = "fp32", sign: Sign | None = None
    ) -> Self:
        """Return a chain from the published snapshot of a state directory."""
        pointer = read_pointer(state / "latest.json")
        assert pointer, f"nothing is published in {state}"
        manifest = snapshot.read_manifest(state / "snapshots" / pointer.snapshot)
        first = _header(
            manifest.run,
            manifest.model,
            pointer.snapshot,
            pointer.manifest_sha256,
            identity_sha256(manifest),
            precision,
            epoch=pointer.epoch + 1,
        )
        return cls(first, sign)

    @property
    def precision(self) -> Precision:
        return self._last.precision

    @staticmethod
    def sha256(payload: bytes) -> str:
        return hashlib.sha256(payload).hexdigest()

    def link(
        self,
        changes: Changes,
        payload: bytes,
        payload_sha256: str,
        closed: Sequence[Closed] = (),
        created_ms: int | None = None,
    ) -> Link:
        """Return the next link, for a payload with these changes."""
        now_ms = int(time.time() * 1000)
        last = self._last
        header = DeltaHeader(
            run=last.run,
            model=last.model,
            rank=DeltaRank(last.rank.epoch, last.rank.sequence + 1),
            base=last.base,
            base_sha256=last.base_sha256,
            parent=self._parent,
            identity_sha256=last.identity_sha256,
            precision=last.precision,
            verdict=Verdict(),
            examples=last.examples + sum(each.examples for each in closed),
            oldest_event_ms=closed[0].at_ms if closed else now_ms,
            newest_event_ms=closed[-1].at_ms if closed else now_ms,
            watermark_ms=now_ms,
            positions={},
            closed=tuple(closed),
            learned_ms=created_ms or now_ms,
            created_ms=created_ms or now_ms,
            rows={stem: len(named["rows"]) for stem, named in changes.items() if "rows" in named},
            payload_sha256=payload_sha256,
            payload_bytes=len(payload),
        )
        data = encode_header(header, self._sign)
        self._last, self._parent = header, header_sha256(data)
        return Link(header, data)


def _header(
    run: str,
    model: str,
    base: str,
    base_sha256: str,
    identity: str,
    precision: Precision,
    *,
    epoch: int,
) -> DeltaHeader:
    return DeltaHeader(
        run=run,
        model=model,
        rank=DeltaRank(epoch, 0),
        base=base,
        base_sha256=base_sha256,
        parent=base_sha256,
        identity_sha256=identity,
        precision=precision,
        verdict=Verdict(),
        examples=1 << 40,
        oldest_event_ms=0,
        newest_event_ms=0,
        watermark_ms=0,
        positions={},
        closed=(),
        learned_ms=0,
        created_ms=0,
        rows={},
        payload_sha256=_NO_DIGEST,
        payload_bytes=0,
    )
