"""Manifests with sensible values, and changes to those of snapshots on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from msgspec import structs

from stream_ctr.evaluate.gate import Measured, Other, Verdict
from stream_ctr.evaluate.summary import EMPTY
from stream_ctr.events.field import Field, Schema
from stream_ctr.learn.spec import FtrlRates, LearnerSpec
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import seal
from stream_ctr.snapshots.manifest import (
    AdditionalGuardState,
    BaselineSpec,
    GuardState,
    JoinSpec,
    LedgerEntry,
    Manifest,
)

RUN = "0123456789abcdef0123456789abcdef"
TIME_MS = 1_735_726_500_000
SCHEMA = Schema(
    fields=(
        Field("app", "categorical"),
        Field("age", "numeric"),
        Field("os", "categorical"),
    ),
    table_bits=6,
    numeric_encoding="value",
    crosses=(("app", "os"),),
)
LEARNER = LearnerSpec(
    model="deepfm",
    fields=3,
    crosses=1,
    value_fields=(1,),
    embedding_dim=4,
    hidden=(8,),
    table_bits=6,
    batch_size=8,
)
MANIFEST = Manifest(
    model="default",
    schema=SCHEMA,
    learner=LEARNER,
    beside={"ftrl": structs.replace(LEARNER, model="lr", ftrl=FtrlRates())},
    join=JoinSpec(
        label_window_ms=60_000,
        early_click_wait_ms=5_000,
        duplicate_horizon_ms=60_000,
        allowed_lateness_ms=5_000,
    ),
    baseline=BaselineSpec(
        enabled=False,
        sample_rate=1.0,
        alpha=0.05,
        beta=1.0,
        l1=0.0,
        l2=1.0,
        intercept_learning_rate=0.01,
        value_fields=(1,),
    ),
    config={"features": {"categorical": ["app", "os"], "numeric": ["age"]}},
    run=RUN,
    snapshot="00000001-20250101T101500Z",
    sequence=1,
    epoch=3,
    parent=None,
    created_ms=TIME_MS + 1000,
    examples=1000,
    ledger=LedgerEntry(1000, 2**64 - 1),
    positions={"clicks:0": 1200},
    topic_ids={"clicks": None},
    event_time_ms=TIME_MS,
    event_time_range=("2025-01-01T10:00:00.000Z", "2025-01-01T10:15:00.000Z"),
    first_event_ms=TIME_MS - 900_000,
    counters={"records": 1200},
    bad_records=2.25,
    guard=GuardState(skipped=1, learned=2, rollbacks=0),
    guards_beside={"ftrl": AdditionalGuardState()},
    gate=Verdict(
        evidence=Measured(
            clicks=1000,
            count=5000,
            ne=0.9,
            logloss=0.4,
            constant_logloss=0.45,
            calibration=1.01,
            others={"ftrl": Other(logloss=0.41, difference=-0.01, calibration=1.0)},
        ),
    ),
    metrics=structs.replace(EMPTY, constant_logloss=0.5),
    weights_sha256="0" * 64,
)


def manifest(**changes: Any) -> Manifest:
    """Return a manifest with these fields changed.

    With a `sequence` and no `snapshot`, the snapshot's name has that sequence.
    """
    if "sequence" in changes:
        event_time_ms = changes.get("event_time_ms", TIME_MS)
        changes = {"snapshot": snapshot.new_id(changes["sequence"], event_time_ms), **changes}
    return structs.replace(MANIFEST, **changes)


def write_snapshot(
    root: Path, tensors: Mapping[str, Mapping[str, Any]] | None = None, **changes: Any
) -> Path:
    """Write a snapshot whose manifest has these fields changed; by default it holds no arrays."""
    return snapshot.write(root, tensors=tensors or {}, manifest=manifest(**changes))


def sealed(document: dict[str, Any]) -> bytes:
    """Return the bytes of a document whose seal is right, whatever else is wrong with it."""
    rest = {name: value for name, value in document.items() if name != "sha256"}
    return seal(json.dumps(rest).encode())


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the sealed JSON object in a file in place, and seal it again."""
    document = json.loads(path.read_text())
    change(document)
    path.write_bytes(sealed(document))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of the snapshot at `path`, which no pointer's digest then covers."""
    edit_json(path / "manifest.json", change)


def replace_file(path: Path, name: str, data: bytes) -> None:
    """Replace a file of the snapshot at `path`, and its digest in the manifest."""
    (path / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    edit_manifest(path, lambda document: document["files"].update({name: entry}))


def make_newer(path: Path) -> None:
    """Give the JSON object in a file the next format, and a key that this version does not know."""
    edit_json(path, lambda document: document.update(format=document["format"] + 1, new=True))
