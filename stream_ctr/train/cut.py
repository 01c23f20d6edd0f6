"""A cut: all state as it is between two batches, on its way to a snapshot.

It is made in two steps. `take` copies what learning changes at once. `complete` adds the metrics,
the verdict and the baseline's state when every batch before the cut is scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate import summary
from stream_ctr.evaluate.gate import Clicks, Verdict
from stream_ctr.evaluate.scoreboard import Scoreboard
from stream_ctr.join.join_state import COUNTERS
from stream_ctr.join.joiner import click_fates
from stream_ctr.join.watermark import NOT_YET
from stream_ctr.learn.baseline import Marker
from stream_ctr.learn.shard_files import held_shards
from stream_ctr.learn.shard_writer import TableShards
from stream_ctr.messages import rfc3339
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import FileEntry, Manifest, RunIdentity
from stream_ctr.snapshots.snapshot_writer import Cut
from stream_ctr.train.as_served import Copy
from stream_ctr.train.ingest import SourceStatus
from stream_ctr.train.inputs import Inputs
from stream_ctr.train.state import TrainingState


def take(
    state: TrainingState,
    identity: RunIdentity,
    source: Inputs,
    status: SourceStatus,
    *,
    run: str,
    sequence: int,
    epoch: int,
    last_step: tuple[str, ...],
    segments: snapshot.Segments,
    copies: snapshot.Tensors,
    shards: Mapping[str, TableShards],
    now_ms: int,
) -> Cut:
    """Copy the state. `status` is that of the source after everything that was learned.

    `last_step` is what the published model's last step did wrong. `copies` are the weights that
    impressions without a label yet were served with, and `shards` those of their tables that ranks
    hold together. The snapshot is named after the event time of the last example. Before the first
    one that is the event time that the log has reached, and before the first event the clock's
    time, `now_ms`.
    """
    manifest = Manifest(
        **msgspec.structs.asdict(identity),
        **state.describe(),
        run=run,
        snapshot=snapshot.new_id(sequence, _event_time(state, now_ms)),
        sequence=sequence,
        epoch=epoch,
        parent=None,
        created_ms=0,
        positions={source.names[index]: at for index, at in status.positions.items()},
        leader_epochs={source.names[index]: at for index, at in status.leader_epochs.items()},
        inputs=status.inputs,
        topic_ids=source.topic_ids(),
        event_time_range=(rfc3339(state.first_event_ms), rfc3339(state.last_event_ms)),
        gate=state.scoreboard.judge.verdict(last_step=last_step),
        metrics=summary.EMPTY,
        weights_sha256="",
    )
    tensors = {**state.tensors(), **copies}
    shards = {**state.shards(), **shards}
    return Cut(tensors, manifest, dict(status.positions), segments, shards)


def _event_time(state: TrainingState, now_ms: int) -> int:
    if state.last_event_ms is not None:
        return state.last_event_ms
    reached_ms = int(state.watermarks.latest.max(initial=NOT_YET))
    return reached_ms if reached_ms > NOT_YET else now_ms


def complete(
    cut: Cut,
    scoreboard: Scoreboard,
    marker: Marker | None,
    *,
    copies: Sequence[Copy],
    parent: str | None,
    now_ms: int,
) -> Cut:
    """Add what is known when every batch before the cut is scored; the verdict has been passed.

    Of the `copies` that were made before the cut, those that were refused are left out.
    """
    published = cut.manifest.published
    refused = {stem for copy in copies if copy.refused for stem in copy.stems(published).values()}
    tensors = {stem: named for stem, named in cut.tensors.items() if stem not in refused}
    tensors["metrics"] = scoreboard.state_dict()
    served_judge = scoreboard.served_judge
    if marker:
        tensors["baseline"] = dict(marker.state)
    manifest = msgspec.structs.replace(
        cut.manifest,
        parent=parent,
        created_ms=now_ms,
        metrics=scoreboard.whole.summary(),
        gate=scoreboard.judge.verdict(last_step=cut.manifest.gate.last_step),
        served=tuple(copy.entry() for copy in copies if not copy.refused),
        served_verdict=served_judge.verdict() if served_judge else Verdict(),
    )
    shards = {stem: each for stem, each in cut.shards.items() if stem not in refused}
    return replace(cut, tensors=tensors, manifest=manifest, shards=shards)


def keep_copies(
    copies: Sequence[Copy], parent: Path | None, published: str, *, of_snapshots: bool
) -> tuple[snapshot.Tensors, dict[str, TableShards], snapshot.Segments]:
    """Return the tensors of copies, or their files where the snapshot `parent` holds them.

    Tables that ranks hold together come as shards instead of tensors. With `of_snapshots` a copy is
    that of the snapshot with as many examples.
    """
    examples, files = _files_of(parent) if copies else (0, {})
    tensors: snapshot.Tensors = {}
    shards: dict[str, TableShards] = {}
    links: dict[str, tuple[Path, str, int]] = {}
    for copy in copies:
        own = of_snapshots and copy.examples == examples
        for name, stem in copy.stems(published).items():
            held_as = snapshot.stems(None if name == published else name)[0] if own else stem
            if parent and snapshot.file_name(held_as) in files:
                links |= _linked(parent, files, held_as, stem)
                continue
            tensors[stem] = copy.slot.weights(name)
            if found := copy.slot.shards(name):
                shards[stem] = found
    return tensors, shards, links


def _linked(
    parent: Path, files: Mapping[str, FileEntry], held_as: str, stem: str
) -> dict[str, tuple[Path, str, int]]:
    """Return the files of a snapshot with the stem `held_as`, by their names with `stem`."""
    names = {snapshot.file_name(held_as): snapshot.file_name(stem)}
    for shard in held_shards(held_as, files):
        names[shard.name] = replace(shard, stem=stem).name
    return {
        name: (parent / held, files[held].sha256, files[held].bytes) for held, name in names.items()
    }


def _files_of(path: Path | None) -> tuple[int, Mapping[str, FileEntry]]:
    """Return the examples and the files of a snapshot, or nothing if it cannot be read."""
    try:
        manifest = snapshot.read_manifest(path) if path else None
    except SnapshotError:
        manifest = None
    return (manifest.examples, manifest.files) if manifest else (0, {})


def clicks(cut: Cut) -> Clicks:
    """Return the clicks that the join had counted when the state was copied."""
    counts = dict(zip(COUNTERS, cut.tensors["joiner"]["counters"].tolist(), strict=True))
    joined, known = click_fates(counts)
    return Clicks(came=counts["clicks"], known=known, joined=joined)
