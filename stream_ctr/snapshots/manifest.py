"""The manifest: what a snapshot's `manifest.json` holds, as one frozen type.

A manifest is decoded once, when a snapshot is opened. What does not decode is a damaged snapshot;
what a newer version wrote is an error of its own (see `snapshot.load`).
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from stream_ctr.evaluate.gate import Verdict
from stream_ctr.events.field import Schema
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.snapshots.pointer import Count, Sha256

FORMAT = 1


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """The digest and the size of one file of a snapshot."""

    sha256: Sha256
    bytes: Count


class LedgerEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """How many examples were trained, and the sum of their hashes modulo 2 ** 64."""

    count: Count
    sum: int

    def __post_init__(self) -> None:
        if not 0 <= self.sum < 1 << 64:  # Meta has no bounds of 64 bits without a sign
            raise ValueError(f"a ledger's sum is a number of 64 bits, got {self.sum}")


class JoinSpec(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The times of the join, in milliseconds."""

    label_window_ms: Count
    early_click_wait_ms: Count
    duplicate_horizon_ms: Count
    allowed_lateness_ms: Count


class BaselineSpec(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """River's logistic regression, and the share of the impressions that it learns."""

    enabled: bool
    sample_rate: float
    alpha: float
    beta: float
    l1: float
    l2: float
    intercept_learning_rate: float
    value_fields: tuple[int, ...]


class GuardState(Struct, frozen=True, forbid_unknown_fields=True):
    """Batches skipped and learned in a row, and rollbacks since the model last recovered."""

    skipped: Count = 0
    learned: Count = 0
    rollbacks: Count = 0


class AdditionalGuardState(Struct, frozen=True, forbid_unknown_fields=True):
    """The same of an additional model, and why it was left out of the run, empty if it was not."""

    skipped: Count = 0
    learned: Count = 0
    rollbacks: Count = 0
    left_out: str = ""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a snapshot says about itself besides its arrays. Times are epoch milliseconds.

    `model` is the name under which the snapshot is published, `learner` the published model and
    `beside` the additional ones. `positions` maps "topic:partition" to the next offset to read.
    `config` holds the sections of the configuration that a state directory keeps.
    `weights_sha256` is equal when every bit of the published weights is.
    """

    format: Count = FORMAT
    snapshot: str
    model: str
    schema: Schema
    learner: LearnerSpec
    beside: dict[str, LearnerSpec]
    join: JoinSpec
    baseline: BaselineSpec
    config: dict[str, dict[str, Any]]
    sequence: Count
    epoch: Count
    parent: str | None
    created_ms: Count
    examples: Count
    ledger: LedgerEntry
    positions: dict[str, Count]
    topic_ids: dict[str, str | None]
    event_time_ms: Count
    event_time_range: tuple[str | None, str | None]
    first_event_ms: int | None
    counters: dict[str, Count]
    guard: GuardState
    guards_beside: dict[str, AdditionalGuardState]
    gate: Verdict
    metrics: dict[str, Any]
    weights_sha256: Sha256
    files: dict[str, FileEntry]
