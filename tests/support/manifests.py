"""Manifests of small models, with any field changed."""

from __future__ import annotations

from typing import Any

import msgspec

from stream_ctr.evaluate.gate import Verdict
from stream_ctr.events.field import Field, Schema
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.snapshots.manifest import (
    BaselineSpec,
    GuardState,
    JoinSpec,
    LedgerEntry,
    Manifest,
)

T = 1_735_689_600_000

SCHEMA = Schema(fields=(Field("app", "categorical"), Field("age", "numeric")), table_bits=6)
LEARNER = LearnerSpec(fields=2, embedding_dim=4, hidden=(8,), table_bits=6, batch_size=8)
MANIFEST = Manifest(
    snapshot="00000001-20250101T000000Z",
    model="default",
    schema=SCHEMA,
    learner=LEARNER,
    beside={},
    join=JoinSpec(
        label_window_ms=600_000,
        early_click_wait_ms=30_000,
        duplicate_horizon_ms=3_600_000,
        allowed_lateness_ms=30_000,
    ),
    baseline=BaselineSpec(
        enabled=True,
        sample_rate=1.0,
        alpha=0.05,
        beta=1.0,
        l1=0.0,
        l2=1.0,
        intercept_learning_rate=0.01,
        value_fields=(),
    ),
    config={},
    sequence=1,
    epoch=1,
    parent=None,
    created_ms=T,
    examples=1000,
    ledger=LedgerEntry(1000, 7),
    positions={"clicks:0": 1100},
    topic_ids={},
    event_time_ms=T,
    event_time_range=("2025-01-01T00:00:00.000Z", "2025-01-01T00:00:00.000Z"),
    first_event_ms=T,
    counters={},
    guard=GuardState(),
    guards_beside={},
    gate=Verdict(),
    metrics={},
    weights_sha256="0" * 64,
)


def manifest(**changes: Any) -> Manifest:
    """Return a manifest with these fields changed."""
    return msgspec.structs.replace(MANIFEST, **changes)
