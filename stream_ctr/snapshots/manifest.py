"""The manifest: the contents of a snapshot's `manifest.json`, as one frozen type.

A manifest is decoded once, when a snapshot is opened, after its seal (see `contract`). docs/schemas
has its JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from stream_ctr.evaluate.gate import Measured, Verdict
from stream_ctr.evaluate.summary import Count, Summary
from stream_ctr.events.field import Schema
from stream_ctr.learn.spec import BLEND, LearnerSpec
from stream_ctr.snapshots.contract import Epoch, RunId, Sha256
from stream_ctr.snapshots.delta import DeltaPosition

FORMAT = 6
_LARGEST_SUM = (1 << 64) - 1


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """The digest and the size of one file of a snapshot."""

    sha256: Sha256
    bytes: Count


class LedgerEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """The number of examples that were trained, and the sum of their hashes modulo 2 ** 64."""

    count: Count
    # The bounds of Meta itself are those of 64 bits with a sign.
    sum: Annotated[int, Meta(extra_json_schema={"minimum": 0, "maximum": _LARGEST_SUM})]

    def __post_init__(self) -> None:
        if not 0 <= self.sum <= _LARGEST_SUM:
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
    """The counts of an additional model, as `GuardState` has them, and why it was left out.

    `left_out` is empty for a model that learns.
    """

    skipped: Count = 0
    learned: Count = 0
    rollbacks: Count = 0
    left_out: str = ""


class ServedCopy(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Weights that were published, and that impressions without a label yet were served with.

    They are those after `examples` examples, and were in force from the event time `from_ms` on.
    Their files are named `served.<examples>.*`. `evidence` is that of their verdict.
    """

    examples: Count
    from_ms: int
    evidence: Measured | None = None


class Input(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An input of a run: a log, or the topics that are read together, with their partitions.

    `partitions` are named as positions are. `ended` is true for a log that was read to its end, so
    that another input may follow it.
    """

    kind: Literal["log", "topics"]
    partitions: tuple[str, ...]
    ended: bool = False


class Origin(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The snapshot of another run that the weights of a run began with.

    `directory_sha256` is the digest of the absolute path of the folder that held it.
    """

    snapshot: str
    manifest_sha256: Sha256
    directory_sha256: Sha256
    examples: Count


class RunIdentity(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The part of a manifest that rebuilds the models, and with which a resumed run must agree.

    `model` is the name under which snapshots are published. The published model is the one that
    `learner` specifies, or the mixture of the additional models that `blend` names. `beside`
    specifies the additional models. `config` holds the sections of the configuration that a state
    directory keeps. `origin` is present if the run began with the weights of another one.

    Raises `ValueError` if a model does not fit the schema, and unless one model is published.
    """

    model: str
    schema: Schema
    learner: LearnerSpec | UnsetType = UNSET
    blend: tuple[str, ...] = ()
    beside: dict[str, LearnerSpec]
    join: JoinSpec
    baseline: BaselineSpec
    config: dict[str, dict[str, Any]]
    origin: Origin | UnsetType = UNSET

    def __post_init__(self) -> None:
        if bool(self.blend) == isinstance(self.learner, LearnerSpec):
            raise ValueError("a run publishes either one model or a blend")
        if not set(self.blend) <= set(self.beside):
            raise ValueError("a blend mixes models of its run")
        value_fields = self.schema.value_fields
        for spec in self.specs.values():
            if spec.fields != len(self.schema.fields) or spec.value_fields != value_fields:
                raise ValueError(f"the fields of {spec.model} and of the schema do not agree")
            if spec.crosses != len(self.schema.crosses):
                raise ValueError(
                    f"the cross products of {spec.model} and of the schema do not agree"
                )
            if spec.table_bits != self.schema.table_bits:
                raise ValueError(
                    f"the table of {spec.model} has 2^{spec.table_bits} rows, "
                    f"the hashes of the schema reach 2^{self.schema.table_bits}"
                )

    @property
    def published(self) -> str:
        """The name of the published model."""
        return self.learner.model if isinstance(self.learner, LearnerSpec) else BLEND

    @property
    def specs(self) -> dict[str, LearnerSpec]:
        """The specification of each model that learns; a published one comes first."""
        specs = dict(self.beside)
        if isinstance(self.learner, LearnerSpec):
            specs = {str(self.learner.model): self.learner, **specs}
        return specs


class Manifest(RunIdentity, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The description of a snapshot: all of its state but the arrays.

    Times are epoch milliseconds. `run` is the id of the run that wrote it. `positions` maps
    "topic:partition" to the next offset to read, of each of the `inputs` that the run has read so
    far, in their order; `leader_epochs` to the leader epoch of the record before it, where brokers
    have one. `bad_records` is the sum of the shares of the records that were rejected, by which
    `input.max_bad_share` is judged. `metrics` are those of the whole run. `weights_sha256` is equal
    if every bit of the published weights is. `serving_sha256` maps the file stem of each model to
    the digest of what serving reads of it (see `learn.served_weights`), which is equal after the
    deltas that lead to a snapshot. `delta` is the delta at exactly this state, None if no chain of
    deltas leads here. `files` is filled in when the snapshot is written.
    `served` lists the earlier weights that it holds, for the metrics of what was served;
    `served_verdict` is the last verdict on weights that were published in memory only, and
    `served_at` the number of examples when that was last done.
    """

    format: Count = FORMAT
    run: RunId
    snapshot: str
    sequence: Count
    epoch: Epoch
    parent: str | None
    created_ms: Count
    examples: Count
    ledger: LedgerEntry
    positions: dict[str, Count]
    leader_epochs: dict[str, Count] = {}
    inputs: tuple[Input, ...] = ()
    topic_ids: dict[str, str | None]
    event_time_ms: int
    event_time_range: tuple[str | None, str | None]
    first_event_ms: int | None
    counters: dict[str, Count]
    bad_records: Annotated[float, Meta(ge=0)]
    guard: GuardState
    guards_beside: dict[str, AdditionalGuardState]
    gate: Verdict
    metrics: Summary
    weights_sha256: Sha256
    serving_sha256: dict[str, Sha256] = {}
    delta: DeltaPosition | None = None
    served: tuple[ServedCopy, ...] = ()
    served_at: Count = 0
    served_verdict: Verdict = Verdict()
    files: dict[str, FileEntry] = {}
