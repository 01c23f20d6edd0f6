"""A cut: all state as it is between two batches, on its way to a snapshot.

It is made in two steps. `take` copies what learning changes at once. `complete` adds the metrics,
the verdict and the baseline's state when every batch before the cut is scored.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from stream_ctr.evaluate import summary
from stream_ctr.evaluate.gate import Clicks
from stream_ctr.evaluate.scoreboard import Scoreboard
from stream_ctr.join.join_state import COUNTERS
from stream_ctr.join.joiner import click_fates
from stream_ctr.learn.baseline import Marker
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest, RunIdentity
from stream_ctr.snapshots.snapshot_writer import Cut
from stream_ctr.train.report import rfc3339
from stream_ctr.train.resume import partition_names
from stream_ctr.train.source import Source
from stream_ctr.train.state import TrainingState


def take(
    state: TrainingState,
    identity: RunIdentity,
    source: Source,
    positions: Mapping[int, int],
    *,
    sequence: int,
    epoch: int,
    last_step: tuple[str, ...],
    segments: snapshot.Segments,
) -> Cut:
    """Copy the state. `last_step` is what the published model's last step did wrong."""
    manifest = Manifest(
        **msgspec.structs.asdict(identity),
        **state.describe(),
        snapshot=snapshot.new_id(sequence, state.last_event_ms or 0),
        sequence=sequence,
        epoch=epoch,
        parent=None,
        created_ms=0,
        positions={name: positions[at] for at, name in enumerate(partition_names(source))},
        topic_ids=source.topic_ids(),
        event_time_range=(rfc3339(state.first_event_ms), rfc3339(state.last_event_ms)),
        gate=state.scoreboard.judge.verdict(last_step=last_step),
        metrics=summary.EMPTY,
        weights_sha256="",
    )
    return Cut(state.tensors(), manifest, dict(positions), segments)


def complete(
    cut: Cut, scoreboard: Scoreboard, marker: Marker | None, *, parent: str | None, now_ms: int
) -> Cut:
    """Add what is known when every batch before the cut is scored; the verdict has been passed."""
    tensors = {**cut.tensors, "metrics": scoreboard.state_dict()}
    if marker:
        tensors["baseline"] = dict(marker.state)
    manifest = msgspec.structs.replace(
        cut.manifest,
        parent=parent,
        created_ms=now_ms,
        metrics=scoreboard.whole.summary(),
        gate=scoreboard.judge.verdict(last_step=cut.manifest.gate.last_step),
    )
    return Cut(tensors, manifest, cut.positions, cut.segments)


def clicks(cut: Cut) -> Clicks:
    """Return the clicks that the join had counted when the state was copied."""
    counts = dict(zip(COUNTERS, cut.tensors["joiner"]["counters"].tolist(), strict=True))
    joined, known = click_fates(counts)
    return Clicks(came=counts["clicks"], known=known, joined=joined)
