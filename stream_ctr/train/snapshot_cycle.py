"""The way of a snapshot from the copy to its subscribers.

    begin      a copy of all state goes to the writer, a thread
    take       the snapshot is on disk, or could not be written
    publish    dead letters and offsets are with the broker; the pointer is written, unless the gate
               refuses the snapshot; old snapshots are removed

A full disk does not end a run: the next snapshot may succeed, and only the last one must.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stream_ctr.errors import SnapshotError
from stream_ctr.failpoint import failpoint
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.snapshots.snapshot_writer import Cut, Graphs, NotFinite, SnapshotWriter, Written
from stream_ctr.train.delta_cycle import DeltaPolicy
from stream_ctr.train.guard import Diverged
from stream_ctr.train.source import Source

_log = logging.getLogger("stream_ctr.train")
NO_EXAMPLE = "it has learned no example"


@dataclass(frozen=True, slots=True)
class SnapshotPolicy:
    """Where snapshots go, when, and how many stay.

    A snapshot is due each time `every_examples` were learned (0: by the schedule only), and the
    `keep` newest are kept. With `signing`, snapshots are signed, and none is resumed from without
    its signature. With `graphs`, they hold the ONNX graphs that it returns. With `deltas`, the rows
    that learning touches are published between snapshots too (see `delta_cycle`).
    """

    directory: Path
    every_examples: int = 0
    keep: int = 3
    signing: SigningKey | None = None
    graphs: Graphs | None = None
    deltas: DeltaPolicy | None = None

    @property
    def root(self) -> Path:
        """The folder of the snapshots."""
        return self.directory / "snapshots"

    @property
    def signature(self) -> Verify | None:
        """The check of a snapshot's signature, if snapshots are signed."""
        return self.signing.verify if self.signing else None


class SnapshotCycle:
    """Write, commit and publish one snapshot after another.

    `parent` is the name of the last snapshot on disk, `sequence` the number of the last one begun.
    `failure` is the error of the last attempt, None if it succeeded. `withheld` says why the last
    snapshot is not published, and is empty once a snapshot of this run is. `before` is called in
    the writer's thread before each snapshot is written.
    """

    def __init__(
        self,
        policy: SnapshotPolicy,
        *,
        source: Source,
        publisher: Publisher,
        counters: Counter[str],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy = policy
        self.parent: str | None = None
        self.sequence = 0
        self.failure: SnapshotError | None = None
        self.withheld: tuple[str, ...] = ()
        self.in_progress = False
        """Whether a snapshot is between its copy and the disk."""
        self._has_published = False
        self._before = before
        self._source = source
        self._publisher = publisher
        self._counters = counters
        self._writer = SnapshotWriter(
            policy.root,
            graphs=policy.graphs,
            sign=policy.signing.sign if policy.signing else None,
            check=publisher.check,
            before=self._sync_what_is_before,
        )

    @property
    def parent_path(self) -> Path | None:
        """The last snapshot on disk. It stays until another one is."""
        return self.policy.root / self.parent if self.parent else None

    def stage(self, segments: Callable[[], snapshot.Segments]) -> snapshot.Segments | None:
        """Keep the spilled segments as they are now, or return None if the disk is full."""
        try:
            return snapshot.stage(self.policy.root, segments())
        except SnapshotError as error:
            self._fail(error)
            return None

    def next_sequence(self) -> int:
        """Return the number of the snapshot that is begun now."""
        self.sequence = max(self.sequence + 1, snapshot.next_sequence(self.policy.root))
        self.in_progress = True
        return self.sequence

    def begin(self, cut: Cut) -> None:
        """Begin to write a snapshot."""
        self._publisher.deliver_dead_letters()
        self._writer.begin(cut)

    def take(self, *, wait: bool) -> Written | Diverged | None:
        """Return the snapshot that was begun if it is on disk.

        Returns `Diverged` if the published model's weights are not finite, and None if there is
        nothing yet or the snapshot could not be written, which is logged and counted.
        """
        if not self._writer.busy:
            return None
        try:
            written = self._writer.take(wait=wait)
        except NotFinite as error:
            self.in_progress = False
            self._counters["snapshots_failed"] += 1
            self.failure = error
            return Diverged(str(error))
        except SnapshotError as error:
            self.in_progress = False
            self._fail(error)
            return None
        if written:
            self.in_progress = False
            self.failure = None
            self.parent = written.path.name
            self._publisher.pass_dead_letters()
        return written

    def commit_and_publish(self, written: Written) -> bool:
        """Do what follows when a snapshot is on disk. It may be done twice.

        Returns whether the snapshot is published.
        """
        failpoint("commit.before")
        self._source.commit(written.positions)
        failpoint("commit.after")
        published = self._publish(written)
        # This snapshot is kept: those after it may not verify.
        keep = {written.path.name}
        self._writer.after(lambda: self._publisher.retain(self.policy.keep, keep))
        return published

    def begin_run(self) -> None:
        """Forget that the snapshot from which a run resumes was published: it is not this run's."""
        self._has_published = False

    def close(self) -> None:
        """Finish what was begun."""
        self._writer.close()

    def last_good(self, additional: str | None = None) -> Path | None:
        """Return the snapshot that a diverged model goes back to, or None.

        For the published model it is the published snapshot, else the last one on disk. For an
        `additional` model it is the newest one of this lineage that holds the model.
        """
        if additional:
            return snapshot.newest_with_model(
                self.policy.root, self.parent, additional, signature=self.policy.signature
            )
        published = self._publisher.published()
        name = published.snapshot if published else self.parent
        return self.policy.root / name if name else None

    def _sync_what_is_before(self) -> None:
        self._before()
        self._publisher.sync()

    def _publish(self, written: Written) -> bool:
        name = written.path.name
        manifest = written.manifest
        if not manifest.examples:  # random weights serve nobody
            self._withhold((NO_EXAMPLE,))
            return False
        if refused := manifest.gate.reasons:
            self._counters["publications_refused"] += 1
            _log.error("snapshot %s is not published: %s", name, "; ".join(refused))
            self._withhold(refused)
            return False
        try:
            self._publisher.publish(written.path, manifest)
        except (OSError, SnapshotError) as error:
            _log.error("snapshot %s is not published: %s", name, error)
            self._counters["publications_failed"] += 1
            self.failure = SnapshotError(f"snapshot {name} is written but not published: {error}")
            return False
        self._has_published = True
        self.withheld = ()
        return True

    def _withhold(self, reasons: tuple[str, ...]) -> None:
        if not self._has_published:
            self.withheld = reasons

    def _fail(self, error: SnapshotError) -> None:
        _log.error("%s", error)
        self._counters["snapshots_failed"] += 1
        self.failure = error
