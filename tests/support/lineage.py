"""Fingerprints of what a run leaves behind, to compare it with another run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import read_pointer

# A model small enough to start, learn and be written quickly. One thread adds sums in one order.
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

# The process of the baseline takes a second to start.
QUICK = [*SMALL, "-X", "baseline.enabled=false"]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A snapshot without its name, times, parent, sequence and epoch.

    `tensors` maps each file stem to the SHA-256 of all its arrays.
    """

    examples: int
    ledger: tuple[int, int]
    weights_sha256: str
    tensors: dict[str, str]
    metrics: dict[str, Any]
    positions: dict[str, int]

    def same(self, other: Fingerprint, *stems: str) -> bool:
        """Return whether the arrays of these files are equal, bit for bit."""
        return all(self.tensors[stem] == other.tensors[stem] for stem in stems)


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of the snapshot at `path`."""
    manifest, tensors = snapshot.load(path)
    assert manifest.weights_sha256 == snapshot.weights_sha256(tensors["model"])
    return Fingerprint(
        manifest.examples,
        (manifest.ledger.count, manifest.ledger.sum),
        manifest.weights_sha256,
        {stem: snapshot.weights_sha256(named) for stem, named in tensors.items()},
        manifest.metrics,
        manifest.positions,
    )


def newest(state: Path) -> Fingerprint | None:
    """Return the fingerprint of the newest snapshot, or None if there is none."""
    path = snapshot.newest(state / "snapshots")
    return fingerprint(path) if path else None


def published(state: Path) -> Manifest | None:
    """Return the manifest of the published snapshot, or None if nothing was published.

    The snapshot must verify, and its manifest must be the one that the pointer names.
    """
    pointer = read_pointer(state / "latest.json")
    if pointer is None:
        return None
    return snapshot.verify(Path(pointer.path), manifest_sha256=pointer.manifest_sha256)


def reports(state: Path) -> list[dict[str, Any]]:
    """Return all complete reports. The last line of the file may be incomplete."""
    complete, _, _ = (state / "reports.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def last_report(state: Path) -> dict[str, Any]:
    """Return the last complete report."""
    return reports(state)[-1]
