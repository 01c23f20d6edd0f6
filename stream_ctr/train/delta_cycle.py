"""The way of a delta from the copy to its subscribers, and the chain that deltas form.

    take       the touched rows, the dense parameters and the mixture are copied between two batches
    decide     all batches before it are scored: the gate refuses it, or a thread writes it
    finish     it is on disk, or could not be written

One delta is on its way at a time. The rows of one that was refused or failed count as touched
again, so the next one brings them: values are absolute.

    the chain      when
    ------------   ---------------------------------------------------------------------------------
    begins         a snapshot is published that is on no chain, and since its cut no learner went
                   back and no delta was written; a run resumes from the published snapshot
    goes on        a snapshot is published whose delta, of exactly its state, was written
    ends           a learner went back or was left out; the delta of a cut could not be written, or
                   one is too large; `latest.json` names a snapshot that this run has not
                   published; the process ends

While no chain lives, each cut forgets the touched rows. So those since the cut of a snapshot are
touched when it is published, and the first delta of its chain has them. A chain has the epoch of
the pointer to its base or a later one: deltas of earlier epochs than a pointer's are void.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.freshness import Freshness, Unpublished
from stream_ctr.evaluate.gate import Clicks, Verdict
from stream_ctr.evaluate.summary import Count
from stream_ctr.failpoint import failpoint
from stream_ctr.join.joiner import click_fates
from stream_ctr.learn.learner import Learner
from stream_ctr.learn.tensors import State
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.delta import (
    MOST_CLOSED,
    ROWS,
    Closed,
    DeltaHeader,
    DeltaPosition,
    DeltaRank,
    Precision,
    identity_sha256,
)
from stream_ctr.snapshots.delta_store import DeltaStore
from stream_ctr.snapshots.delta_writer import DeltaWriter, Outlet, TooLarge, WrittenDelta
from stream_ctr.snapshots.manifest import Manifest, RunIdentity
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.train.state import TrainingState

_log = logging.getLogger("stream_ctr.train")

WRITTEN = "deltas_written"
REFUSED = "deltas_refused"
FAILED = "deltas_failed"
UNSENT = "deltas_unsent"
ROWS_WRITTEN = "delta_rows"
BYTES_WRITTEN = "delta_bytes"

_NO_DIGEST = "0" * 64  # until the payload is encoded

Token = tuple[tuple[str, int], ...]
"""The learners that learn, and how often each has gone back."""


@dataclass(frozen=True, slots=True)
class DeltaPolicy:
    """The rounding of values, who gets a delta besides the state directory, and how many stay.

    The newest deltas of `most_bytes` together stay, as long as they lead on from a snapshot.
    """

    precision: Precision = "fp32"
    outlets: Sequence[Outlet] = ()
    most_bytes: int = 16 << 30


class DeltaFigures(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The deltas of a run: how many, their rows and bytes, and the last one.

    `refused` were refused by the gate, `failed` could not be written, and of `unsent` an outlet,
    such as a topic, did not get one at once. `copy_seconds` is the time that learning waited for
    copies in this process. `base` is the snapshot with which the present chain begins, None while
    there is none, and `last` the last delta of it.
    """

    written: Count
    refused: Count
    failed: Count
    unsent: Count
    rows: Count
    bytes: Count
    copy_seconds: float
    base: str | None
    last: DeltaPosition | None


@dataclass(slots=True)
class Chain:
    """The chain that lives: its base, the pointer that is published now, and its last link."""

    base: str
    base_sha256: str
    epoch: int
    token: Token
    pointer: Pointer
    parent: str
    last: DeltaPosition | None = None


@dataclass(frozen=True, slots=True)
class TakenDelta:
    """A copy of what changed, on its way. `cut` is true for that of a snapshot."""

    chain: Chain
    changes: Mapping[str, State]
    news: Unpublished
    clicks: Clicks
    examples: int
    watermark_ms: int
    positions: Mapping[str, int]
    created_ms: int
    cut: bool


class DeltaCycle:
    """Take, judge, write and send one delta after another. Times are epoch milliseconds.

    `now_ms` returns the time of the clock.
    """

    def __init__(
        self,
        policy: DeltaPolicy,
        directory: Path,
        *,
        state: TrainingState,
        identity: RunIdentity,
        publisher: Publisher,
        freshness: Freshness,
        signing: SigningKey | None,
        now_ms: Callable[[], int],
    ) -> None:
        self._policy = policy
        self._state = state
        self._counters: Counter[str] = state.counters
        self._model = identity.model
        self._identity_sha256 = identity_sha256(identity)
        self._publisher = publisher
        self._freshness = freshness
        self._now_ms = now_ms
        self._store = DeltaStore(directory)
        self._root = directory / "snapshots"
        self._writer = DeltaWriter(
            self._store,
            outlets=policy.outlets,
            sign=signing.sign if signing else None,
            check=publisher.check,
            now_ms=now_ms,
        )
        self._chain: Chain | None = None
        self._last: DeltaRank | None = None  # of this process
        self._taken: TakenDelta | None = None
        self._token_at_cut: Token = ()
        self._written_since_cut = False  # by a chain that may end before the snapshot is published
        self._examples = -1  # at the last delta, refused ones too
        self._copy_seconds = 0.0
        self._refusing = False
        self._failing = False
        self._writer.after(self._store.clean)
        for learner in state.learners.values():
            learner.track_touched()

    @property
    def busy(self) -> bool:
        """Whether a delta is between its copy and the disk."""
        return self._taken is not None

    @property
    def ready(self) -> bool:
        """Whether a delta may be taken: a chain lives, nothing is on its way, and there is news."""
        return (
            self._chain is not None and not self.busy and self._state.ledger.count != self._examples
        )

    # -- the copy --------------------------------------------------------------------------------

    def take(
        self, positions: Mapping[str, int], *, reasons: Sequence[str] = ()
    ) -> TakenDelta | None:
        """Copy what changed since the last delta, or return None if the chain has ended.

        `positions` are those of the source after everything that was learned. With `reasons`, the
        delta is refused without a copy.
        """
        if not self._lives():
            return None
        self._examples = self._state.ledger.count
        if reasons:
            self._refuse(reasons)
            return None
        return self._copy(positions, cut=False)

    def cut(self, positions: Mapping[str, int], *, harmful: bool) -> TakenDelta | None:
        """Return the delta of a snapshot that is cut now, or None if it gets none.

        With `harmful`, the snapshot will not be published, and rows stay touched.
        """
        self._token_at_cut = self._token()
        self._written_since_cut = False
        if self._lives():
            return None if harmful else self._copy(positions, cut=True)
        self._forget_touched()
        return None

    def _copy(self, positions: Mapping[str, int], *, cut: bool) -> TakenDelta:
        assert self._chain
        began = time.perf_counter()
        changes = {stem: learner.take_changes() for stem, learner in self._learning()}
        if self._state.blend:
            changes[snapshot.stems()[0]] = self._state.blend.weights()
        self._copy_seconds += time.perf_counter() - began
        joiner = self._state.joiner
        counts = joiner.counts()
        joined, known = click_fates(counts)
        self._examples = self._state.ledger.count
        self._taken = TakenDelta(
            chain=self._chain,
            changes=changes,
            news=self._freshness.take(),
            clicks=Clicks(came=counts["clicks"], known=known, joined=joined),
            examples=self._state.ledger.count,
            watermark_ms=joiner.watermark,
            positions=positions,
            created_ms=self._now_ms(),
            cut=cut,
        )
        failpoint("delta.copied")
        return self._taken

    # -- the verdict and the disk ----------------------------------------------------------------

    def decide(self, taken: TakenDelta, verdict: Verdict) -> Callable[[], DeltaPosition | None]:
        """Refuse a delta whose batches are all scored, or begin to write it.

        Returns a function that waits for the delta and returns its position, None without one.
        """
        if taken.chain is not self._chain or verdict.reasons:
            if verdict.reasons:
                self._refuse(verdict.reasons)
            self._put_back(taken)
            return _no_position
        self._refusing = False
        self._last = self._next_rank(taken.chain)
        return self._writer.begin(taken.changes, self._header(taken, self._last, verdict))

    def finish(self, *, wait: bool) -> None:
        """Enter the delta that was begun if it is on disk, or take its rows back if that failed.

        With `wait`, wait for it.
        """
        taken = self._taken
        try:
            written = self._writer.take(wait=wait)
        except SnapshotError as error:
            assert taken
            self._fail(error)
            self._put_back(taken)
            if taken.cut:  # the snapshot will hold no position
                self._end("the delta of a snapshot could not be written")
            elif isinstance(error, TooLarge):  # the next one would be, too
                self._end("a delta is too large")
            return
        if written:
            assert taken
            self._enter(taken, written)

    def _enter(self, taken: TakenDelta, written: WrittenDelta) -> None:
        self._taken = None
        self._written_since_cut |= not taken.cut
        taken.chain.parent = written.position.sha256
        taken.chain.last = written.position
        self._failing = False
        self._counters[WRITTEN] += 1
        self._counters[UNSENT] += bool(written.unsent)
        self._counters[ROWS_WRITTEN] += sum(written.header.rows.values())
        self._counters[BYTES_WRITTEN] += written.header.payload_bytes
        self._freshness.publish(taken.news, written.at_ms)

    def _next_rank(self, chain: Chain) -> DeltaRank:
        """Return a rank above all others. One that could not be written is not used again."""
        last = self._last
        same = last is not None and last.epoch == chain.epoch
        return DeltaRank(epoch=chain.epoch, sequence=1 + (last.sequence if last and same else 0))

    def _header(self, taken: TakenDelta, rank: DeltaRank, verdict: Verdict) -> DeltaHeader:
        chain = taken.chain
        news = taken.news
        at_ms, examples = news.closed.points(MOST_CLOSED)
        return DeltaHeader(
            run=self._publisher.run,
            model=self._model,
            rank=rank,
            base=chain.base,
            base_sha256=chain.base_sha256,
            parent=chain.parent,
            identity_sha256=self._identity_sha256,
            precision=self._policy.precision,
            verdict=verdict,
            examples=taken.examples,
            oldest_event_ms=max(0, news.oldest_event_ms or 0),
            newest_event_ms=max(0, news.newest_event_ms or 0),
            watermark_ms=taken.watermark_ms,
            positions=dict(taken.positions),
            closed=tuple(
                Closed(at_ms=at, examples=count)
                for at, count in zip(at_ms.tolist(), examples.tolist(), strict=True)
            ),
            learned_ms=news.learned_ms,
            created_ms=taken.created_ms,
            rows={stem: len(named[ROWS]) for stem, named in taken.changes.items() if ROWS in named},
            payload_sha256=_NO_DIGEST,
            payload_bytes=0,
        )

    def _refuse(self, reasons: Sequence[str]) -> None:
        """Count a refusal. Only the first of several in a row is logged."""
        self._counters[REFUSED] += 1
        if not self._refusing:
            _log.warning("deltas are withheld: %s", "; ".join(reasons))
        self._refusing = True

    def _fail(self, error: SnapshotError) -> None:
        self._counters[FAILED] += 1
        if not self._failing:
            _log.error("deltas are not written, the rows wait: %s", error)
        self._failing = True

    def _put_back(self, taken: TakenDelta) -> None:
        self._taken = None
        for stem, learner in self._learning():
            if learner.touched is not None and stem in taken.changes:
                learner.touched.put_back(taken.changes[stem][ROWS])
        self._freshness.put_back(taken.news)

    # -- the chain -------------------------------------------------------------------------------

    def resume(self, manifest: Manifest) -> None:
        """Begin at the published snapshot of `manifest`, whose state was restored just now."""
        self._token_at_cut = self._token()
        self._forget_touched()
        self.follow(manifest)

    def settle_before_publication(self) -> None:
        """Finish what is on its way, and end the chain if it cannot go on."""
        self.finish(wait=True)
        self._lives()

    def follow(self, manifest: Manifest) -> None:
        """Go on with the chain, or begin another, after the snapshot of `manifest` was published.

        No other snapshot was cut since it was.
        """
        chain = self._chain
        pointer = self._publisher.last_published()
        if pointer is None or pointer.snapshot != manifest.snapshot:
            self._end("another snapshot was published meanwhile")
        elif chain and manifest.delta and pointer.epoch <= chain.epoch:
            chain.pointer = pointer
        elif self._token_at_cut == self._token() and not self._written_since_cut:
            self._begin(pointer)
        else:
            self._end("a model or a server went back since the snapshot was cut")
        self._retain()

    def _begin(self, pointer: Pointer) -> None:
        self._chain = Chain(
            base=pointer.snapshot,
            base_sha256=pointer.manifest_sha256,
            epoch=max(self._publisher.epoch, pointer.epoch),
            token=self._token(),
            pointer=pointer,
            parent=pointer.manifest_sha256,
        )
        _log.info("a chain of deltas begins with snapshot %s", pointer.snapshot)

    def _lives(self) -> bool:
        """End the chain if it cannot go on, and return whether it lives."""
        if not self._chain:
            return False
        if self._chain.token != self._token():
            self._end("a model went back or was left out")
        elif self._publisher.last_published() != self._chain.pointer:
            self._end("another snapshot was published, by a rollback")
        return self._chain is not None

    def _end(self, reason: str) -> None:
        if self._chain:
            _log.warning(
                "the chain of deltas ends: %s; the next published snapshot begins another", reason
            )
        self._chain = None

    def _retain(self) -> None:
        """Remove the deltas that lead on from no snapshot on disk."""
        root = self._root
        self._writer.after(
            lambda: self._store.retain(_positions(root), most_bytes=self._policy.most_bytes)
        )

    # -- the models ------------------------------------------------------------------------------

    def _learning(self) -> Iterator[tuple[str, Learner]]:
        """Yield each model that learns, with the stem of its file."""
        for name, learner in self._state.learning().items():
            yield snapshot.stems(self._state.guards[name].additional)[0], learner

    def _token(self) -> Token:
        return tuple((stem, learner.restored) for stem, learner in self._learning())

    def _forget_touched(self) -> None:
        for _, learner in self._learning():
            if learner.touched is not None:
                learner.touched.take()

    # -- the end, and figures --------------------------------------------------------------------

    def report(self) -> DeltaFigures:
        """Return the figures for a report."""
        counters = self._counters
        return DeltaFigures(
            written=counters[WRITTEN],
            refused=counters[REFUSED],
            failed=counters[FAILED],
            unsent=counters[UNSENT],
            rows=counters[ROWS_WRITTEN],
            bytes=counters[BYTES_WRITTEN],
            copy_seconds=round(self._copy_seconds, 4),
            base=self._chain.base if self._chain else None,
            last=self._chain.last if self._chain else None,
        )

    def close(self) -> None:
        """Finish what was begun."""
        self._writer.close()


def _no_position() -> None:
    """Return the position of a delta that is not written."""


def _positions(root: Path) -> dict[str, DeltaPosition | None]:
    """Return the position of each snapshot in `root` that can be read."""
    positions = {}
    for name in snapshot.snapshot_ids(root):
        with contextlib.suppress(SnapshotError):
            positions[name] = snapshot.read_manifest(root / name).delta
    return positions
