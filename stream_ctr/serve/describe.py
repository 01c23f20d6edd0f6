"""The description of what a server serves."""

from __future__ import annotations

from typing import Any

from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber


def describe(subscriber: Subscriber, model: str | None) -> dict[str, Any]:
    """Return the loaded snapshot and delta, what the model expects, and how far it has learned.

    Raises `SnapshotError` before the first snapshot.
    """
    scorer, pointer = subscriber.scorer, subscriber.pointer
    manifest, health = scorer.manifest, subscriber.health
    return {
        "model": model or manifest.published,
        "snapshot": scorer.snapshot,
        "loaded_snapshot": manifest.snapshot,
        "run": manifest.run,
        "sequence": pointer.sequence if pointer else manifest.sequence,
        **_learned(scorer),
        "loaded_seconds": health.loaded_seconds,
        "deltas": {
            "applied": health.deltas,
            "last_seconds": health.delta_seconds,
            "behind": health.behind,
        },
        "fields": [{"name": field.name, "kind": field.kind} for field in manifest.schema.fields],
        "crosses": [list(names) for names in manifest.schema.crosses],
        "table_bits": manifest.schema.table_bits,
        "refusal": health.refusal,
    }


def _learned(scorer: Scorer) -> dict[str, Any]:
    """Return how far the model has learned: as its last delta says, or else its snapshot."""
    manifest, header = scorer.manifest, scorer.delta
    if header is None:
        return {
            "delta": None,
            "epoch": manifest.epoch,
            "examples": manifest.examples,
            "event_time_ms": manifest.event_time_ms,
            "created_ms": manifest.created_ms,
            "positions": manifest.positions,
        }
    return {
        "delta": header.rank.sequence,
        "epoch": header.rank.epoch,
        "examples": header.examples,
        "event_time_ms": header.newest_event_ms,
        "created_ms": header.created_ms,
        "positions": header.positions,
    }
