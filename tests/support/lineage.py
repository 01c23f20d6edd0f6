"""Fingerprints of snapshots and reports, to compare the state of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from stream_ctr.evaluate.summary import Summary
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import read_pointer
from stream_ctr.snapshots.report_log import read_reports

Array = npt.NDArray[Any]

# Options of a small model, which starts, learns and is written quickly. With one thread, sums are
# always added in the same order.
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

# Without the baseline, whose process takes a second to start.
QUICK = [*SMALL, "-X", "baseline.enabled=false"]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The contents of a snapshot, without its name, times, parent, sequence and epoch.

    `tensors` maps the stem of each tensor file to the SHA-256 of all its arrays.
    """

    examples: int
    ledger: tuple[int, int]
    weights_sha256: str
    tensors: dict[str, str]
    metrics: Summary
    positions: dict[str, int]

    def same(self, other: Fingerprint, *stems: str) -> bool:
        """Return whether the tensor files with these stems are equal."""
        return all(self.tensors[stem] == other.tensors[stem] for stem in stems)


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of the snapshot in this directory."""
    manifest, tensors = snapshot.load(path)
    assert manifest.weights_sha256 == snapshot.weights_sha256(
        snapshot.published_weights(manifest, tensors)
    )
    ledger = manifest.ledger
    return Fingerprint(
        examples=manifest.examples,
        ledger=(ledger.count, ledger.sum),
        weights_sha256=manifest.weights_sha256,
        tensors={
            stem: snapshot.weights_sha256(_learned(arrays))
            for stem, arrays in tensors.items()
            if not stem.startswith("served.")
        },
        metrics=manifest.metrics,
        positions=manifest.positions,
    )


def _learned(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays without those that depend on how far the input was read ahead.

    The metrics of what was served depend on when snapshots were published, which a log and a topic
    decide differently. `judge.clicks` counts the clicks that had come at the last verdict.
    """
    return {
        name: array
        for name, array in arrays.items()
        if not name.startswith("served") and name != "judge.clicks"
    }


def newest(state: Path) -> Fingerprint | None:
    """Return the fingerprint of the newest snapshot of a state directory, or None."""
    path = snapshot.newest(state / "snapshots")
    return fingerprint(path) if path else None


def published(state: Path) -> Manifest | None:
    """Return the verified manifest of the published snapshot, or None if nothing was published."""
    pointer = read_pointer(state / "latest.json")
    if not pointer:
        return None
    return snapshot.verify(Path(pointer.path), manifest_sha256=pointer.manifest_sha256)


def reports(state: Path) -> list[dict[str, Any]]:
    """Return all complete reports. The last line may be half written."""
    return list(read_reports(state))


def last_report(state: Path) -> dict[str, Any]:
    """Return the last complete report."""
    return reports(state)[-1]
