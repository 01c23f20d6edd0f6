"""The description of what a server serves."""

from __future__ import annotations

from typing import Any

from stream_ctr.snapshots.subscriber import Subscriber


def describe(subscriber: Subscriber, model: str | None) -> dict[str, Any]:
    """Return the loaded snapshot, what the model expects, and how far it has learned.

    Raises `SnapshotError` before the first snapshot.
    """
    manifest = subscriber.scorer.manifest
    health = subscriber.health
    return {
        "model": model or manifest.published,
        "snapshot": manifest.snapshot,
        "run": manifest.run,
        "sequence": manifest.sequence,
        "examples": manifest.examples,
        "event_time_ms": manifest.event_time_ms,
        "created_ms": manifest.created_ms,
        "loaded_seconds": health.loaded_seconds,
        "fields": [{"name": field.name, "kind": field.kind} for field in manifest.schema.fields],
        "crosses": [list(names) for names in manifest.schema.crosses],
        "table_bits": manifest.schema.table_bits,
        "positions": manifest.positions,
        "refusal": health.refusal,
    }
