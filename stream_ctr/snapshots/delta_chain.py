"""A subscriber's place on a chain of deltas: which one it may apply next.

A pure state machine. Its state is the set of `heads`, the digests that the parent of the next delta
may be, and the rank of the last link that was applied:

    event                        heads become                            last rank becomes
    --------------------------   -------------------------------------   -------------------------
    a snapshot is loaded         its manifest's digest, and its delta's  its delta's, if it has one
    a delta is applied           the digest of its header                its own
    a snapshot is adopted whose  as before, and its manifest's digest    as before
      delta is the last applied

The first row that fits judges a delta:

    the delta                                                       verdict
    -------------------------------------------------------------   ---------
    is of another run, model name or schema                         `Refused`
    is of an epoch below one that was seen, or of the pointer       `Stale`
    has a rank that is not above the last rank                      `Stale`
    has a parent among the heads                                    `Apply`
    no rank is known, and the snapshot has learned its examples     `Stale`
    any other                                                       `Gap`

A chain has the epoch of the pointer to its base, or a later one. A rollback publishes a snapshot
under a later epoch, which makes the deltas that led on from it void. A run that is resumed begins a
chain on a snapshot from which the chain of the killed process goes on too. So an epoch ends all
earlier ones as soon as one of its deltas is seen: otherwise a reader that begins with that snapshot
follows the dead branch again and again.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from stream_ctr.messages import one_line
from stream_ctr.snapshots.delta import DeltaHeader, DeltaPosition, DeltaRank

MOST_LINKS = 1 << 16
"""The number of applied links that a chain remembers, for `Chain.holds`."""


class Apply(NamedTuple):
    """The delta follows what is loaded."""


class Stale(NamedTuple):
    """The rows of the delta are loaded already, or are superseded. `text` says why."""

    text: str


class Gap(NamedTuple):
    """A delta between what is loaded and this one is missing. `text` says which."""

    text: str


class Refused(NamedTuple):
    """The delta is not of this model. `reason` is "run", "model" or "schema"."""

    reason: str
    text: str


Judgement: TypeAlias = Apply | Stale | Gap | Refused


class Chain:
    """The deltas that a subscriber has applied since it loaded a snapshot.

    Nothing is judged before `begin`, which is called again for each snapshot that is loaded.
    """

    def __init__(self) -> None:
        self.rank: DeltaRank | None = None
        """The rank of the last link, None if the loaded snapshot has no delta and none came."""
        self.awaited: str | None = None
        """The digest of a manifest with which a chain of a later epoch begins, None without one.

        That snapshot must be loaded, though what is loaded may be ahead of it.
        """
        self._run = ""
        self._model = ""
        self._identity = ""
        self._heads: frozenset[str] = frozenset()
        self._links: dict[DeltaRank, str] = {}
        self._begun_at: tuple[int, int] = (0, 0)
        self._newest_epoch = 0

    def begin(
        self,
        manifest_sha256: str,
        position: DeltaPosition | None,
        *,
        run: str,
        model: str,
        identity_sha256: str,
        epoch: int,
        examples: int,
    ) -> None:
        """Begin at a snapshot that was loaded.

        `position`, `run`, `model` and `examples` are those of its manifest, `epoch` is that of its
        pointer, and `identity_sha256` is that of `delta.identity_sha256`.
        """
        self._newest_epoch = epoch if run != self._run else max(epoch, self._newest_epoch)
        self._run = run
        self._model = model
        self._identity = identity_sha256
        self._begun_at = (epoch, examples)
        self._heads = frozenset({manifest_sha256, *([position.sha256] if position else [])})
        self._links = {position.rank: position.sha256} if position else {}
        self.rank = position.rank if position else None
        self.awaited = None

    def judge(self, header: DeltaHeader, sha256: str) -> Judgement:
        """Return whether this delta may be applied now, and if not, why.

        `sha256` is the digest of its header. The verdict changes nothing that is applied; a gap is
        remembered.
        """
        if refused := self._refused(header):
            return refused
        if why := self._superseded(header, sha256):
            return Stale(f"delta {header.rank.name} {why}")
        if header.parent in self._heads:
            return Apply()
        # To load the base again helps only if something else was applied after it.
        if header.rank.epoch > self._epoch and header.base_sha256 not in self._heads:
            self.awaited = header.base_sha256
        self._newest_epoch = header.rank.epoch
        return Gap(
            f"delta {header.rank.name} does not follow {self._described()}: its parent is "
            f"{header.parent}"
        )

    def applied(self, header: DeltaHeader, sha256: str) -> None:
        """Go on to a delta that was applied; `judge` returned `Apply` for it.

        Raises `ValueError` for any other.
        """
        if header.parent not in self._heads or (self.rank and header.rank <= self.rank):
            raise ValueError(f"delta {header.rank.name} does not follow {self._described()}")
        self._heads = frozenset({sha256})
        self._links[header.rank] = sha256
        if len(self._links) > MOST_LINKS:
            del self._links[next(iter(self._links))]
        self.rank = header.rank
        self._newest_epoch = header.rank.epoch
        self.awaited = None

    def holds(self, position: DeltaPosition) -> bool:
        """Return whether this link is part of what is loaded."""
        return self._links.get(position.rank) == position.sha256

    def adopt(self, manifest_sha256: str, position: DeltaPosition) -> bool:
        """Take a snapshot as loaded if what is loaded contains it, and return whether it is so.

        A snapshot that a gap waits for is not: the chain behind the gap begins with it, and what is
        loaded is ahead of it.
        """
        if not self.holds(position) or self.awaited == manifest_sha256:
            return False
        if position.rank == self.rank:
            self._heads |= {manifest_sha256}
        return True

    def _refused(self, header: DeltaHeader) -> Refused | None:
        name = f"delta {header.rank.name}"
        if header.run != self._run:
            return Refused("run", f"{name} is of run {header.run}, and run {self._run} is followed")
        if header.model != self._model:
            return Refused(
                "model",
                f"{name} is of model {one_line(header.model, 80)!r}, "
                f"and {one_line(self._model, 80)!r} is loaded",
            )
        if header.identity_sha256 != self._identity:
            return Refused(
                "schema",
                f"{name} is of other fields or models than the loaded snapshot: its identity is "
                f"{header.identity_sha256}, that of the snapshot {self._identity}",
            )
        return None

    def _superseded(self, header: DeltaHeader, sha256: str) -> str | None:
        """Return why a delta is stale, or None if it is not."""
        if header.rank.epoch < self._newest_epoch:
            return f"is superseded by those of epoch {self._newest_epoch}"
        if self.rank and header.rank <= self.rank:
            if self._links.get(header.rank) == sha256:
                return "is loaded already"
            return f"comes before {self.rank.name}, which is loaded"
        epoch, examples = self._begun_at
        learned = header.rank.epoch == epoch and header.examples <= examples
        if self.rank is None and learned and header.parent not in self._heads:
            return f"is older than the loaded snapshot, of {examples:,} examples"
        return None

    @property
    def _epoch(self) -> int:
        return self.rank.epoch if self.rank else self._begun_at[0]

    def _described(self) -> str:
        return f"delta {self.rank.name}" if self.rank else "the loaded snapshot"
