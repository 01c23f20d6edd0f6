"""What a run left behind, in a form that can be compared with what another run left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import read_pointer

# A model small enough to start, learn and be written quickly; one thread, so that sums are added in one order.
SMALL = [
    part
    for pair in (
        "model.hidden=16,16",
        "model.embedding_dim=4",
        "model.table_bits=14",
        "learn.batch_size=128",
        "learn.threads=1",
        "join.label_window=60s",
    )
    for part in ("-X", pair)
]


QUICK = [*SMALL, "-X", "baseline.enabled=false"]  # its process takes a second to start


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A snapshot without its name, its times, its parent, its sequence and its epoch. `tensors`: file stem -> SHA-256 of all its arrays."""

    examples: int
    ledger: tuple[int, int]
    weights_sha256: str
    tensors: dict[str, str]
    metrics: dict[str, Any]
    positions: dict[str, int]

    def same(self, other: Fingerprint, *stems: str) -> bool:
        return all(self.tensors[stem] == other.tensors[stem] for stem in stems)


def fingerprint(path: Path) -> Fingerprint:
    manifest, tensors = snapshot.load(path)
    assert manifest.weights_sha256 == snapshot.weights_sha256(tensors["model"])
    ledger = manifest.ledger.count, manifest.ledger.sum
    digests = {stem: snapshot.weights_sha256(named) for stem, named in tensors.items()}
    return Fingerprint(
        manifest.examples,
        ledger,
        manifest.weights_sha256,
        digests,
        manifest.metrics,
        manifest.positions,
    )


def newest(state: Path) -> Fingerprint | None:
    path = snapshot.newest(state / "snapshots")
    return fingerprint(path) if path else None


def published(state: Path) -> Manifest | None:
    """What subscribers are pointed to, after all of it was found as the pointer says; None when nothing was published."""
    pointer = read_pointer(state / "latest.json")
    return (
        snapshot.verify(Path(pointer.path), manifest_sha256=pointer.manifest_sha256)
        if pointer
        else None
    )


def reports(state: Path) -> list[dict[str, Any]]:
    """All that are whole: one may just be written."""
    whole, _, _ = (state / "reports.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def last_report(state: Path) -> dict[str, Any]:
    return reports(state)[-1]
