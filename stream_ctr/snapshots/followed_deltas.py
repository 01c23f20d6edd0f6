"""Deltas that a subscriber follows: which of them it applies, and what it makes of the others.

`delta_chain` judges a delta by its header. This is what follows from the verdict:

    the delta                                   counted as            then
    -----------------------------------------   -------------------   ----------------------------
    follows what is loaded                      `applied`             the next one is awaited
    was loaded with the snapshot, or comes      (not counted)         the next one is awaited
      again after the source was rewound
    comes once more, or is older                `delta_stale`         the next one is awaited
    is of another run, model name or schema     `delta_other_run`,    the next one is awaited
                                                `delta_other_model`,
                                                `delta_other_schema`
    is damaged, or lacks its signature          `delta_damaged`,      the next one leaves a gap
                                                `delta_unsigned`
    does not fit the model                      `delta_not_fitting`   the next one leaves a gap
    follows another delta, which did not come   `delta_gap`           a snapshot is awaited that
                                                                      leads on, or the missing one
    cannot be read now                          `delta_source`        the source is read again

The model that is loaded serves all the while. A delta is applied whole or not at all.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.messages import one_line
from stream_ctr.snapshots.delays import DelayHistogram, Delays
from stream_ctr.snapshots.delta import (
    Delta,
    DeltaHeader,
    DeltaRank,
    Unsigned,
    decode_payload,
    identity_sha256,
)
from stream_ctr.snapshots.delta_chain import Apply, Chain, Gap, Judgement, Refused
from stream_ctr.snapshots.delta_sources import DeltaSource, NotReadable
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.scorer import Scorer

_log = logging.getLogger(__name__)
_MILLISECONDS = 1000
_RETRY_SECONDS = 1.0

REFUSALS = (
    *("delta_gap", "delta_stale", "delta_other_run", "delta_other_model", "delta_other_schema"),
    *("delta_damaged", "delta_unsigned", "delta_not_fitting"),
)
"""The names under which deltas are counted that are not applied."""
_SAID_ONCE = {"delta_other_run", "delta_other_model"}


@dataclass(frozen=True, slots=True)
class AppliedDelta:
    """A delta that was applied: its header, what it took, and how old its rows were then.

    `seconds` are those of decoding and applying it.
    """

    header: DeltaHeader
    seconds: float
    delays: Delays


class FollowedDeltas:
    """The deltas of one source, applied to the models that a subscriber loads.

    Without a source there are none. `failures` is counted in. Only the subscriber's thread calls
    the methods; the attributes may be read by any.
    """

    def __init__(self, source: DeltaSource | None, failures: Counter[str]) -> None:
        self._source = source
        self._failures = failures
        self._chain = Chain()
        self._started_ms = _now_ms()
        self._catching_up = True
        self._skipped = False
        self._run = ""
        self._since_ms = 0
        self._said: set[str] = set()
        self.behind: str | None = None
        """Why the deltas that come are not applied now, None if they are."""
        self.rank: DeltaRank | None = None
        """The rank of the last delta that is part of the loaded model."""
        self.applied = 0
        """The number of deltas that were applied."""
        self.rows = 0
        """The number of rows in them."""
        self.applied_at: float | None = None
        """When the last one was applied, in seconds of `time.monotonic`."""
        self.event_delays = DelayHistogram()
        """From the newest event of a delta until it was applied; see `Delays`."""
        self.closed_delays = DelayHistogram()
        """From the closing of label windows until the examples were applied, by example."""

    @property
    def active(self) -> bool:
        """Whether deltas are followed."""
        return self._source is not None

    def begin(self, pointer: Pointer, manifest: Manifest) -> None:
        """Go on from a snapshot that was loaded."""
        if not self.active:
            return
        self._chain.begin(
            pointer.manifest_sha256,
            manifest.delta,
            run=manifest.run,
            model=manifest.model,
            identity_sha256=identity_sha256(manifest),
            epoch=pointer.epoch,
            examples=manifest.examples,
        )
        self.rank = self._chain.rank
        self._run = manifest.run
        self._since_ms = manifest.created_ms
        self._go_back()
        self._caught_up()

    def adopt(self, pointer: Pointer) -> bool:
        """Return whether the model has come past this snapshot, which need not be loaded then.

        One that a run goes back to, under a later epoch, must be.
        """
        position = pointer.delta
        if not self.active or position is None or pointer.epoch > position.rank.epoch:
            return False
        return self._chain.adopt(pointer.manifest_sha256, position)

    def expect(self, pointer: Pointer) -> bool:
        """Return whether deltas are likely to lead to this snapshot soon."""
        position = pointer.delta
        if not self.active or position is None or self.behind or self.rank is None:
            return False
        return self.rank.epoch == position.rank.epoch == pointer.epoch and self.rank < position.rank

    def leads_back(self, pointer: Pointer) -> bool:
        """Return whether a chain of a later epoch begins with the snapshot of `pointer`."""
        return self.active and self._chain.awaited == pointer.manifest_sha256

    def advance(self, scorer: Scorer, wait_seconds: float) -> Iterator[tuple[Scorer, AppliedDelta]]:
        """Yield a scorer for each delta that follows, after at most `wait_seconds`."""
        for found in self._poll(wait_seconds):
            if not self.active:
                return
            if isinstance(found, SnapshotError):
                self._refuse(_kind(found), str(found))
                self.behind = self.behind or str(found)
                continue
            judgement = self._chain.judge(found.header, found.sha256)
            if isinstance(judgement, Apply):
                started = time.perf_counter()
                updated = self._updated(scorer, found)
                if updated:
                    scorer = updated
                    applied = self._go_on(found, time.perf_counter() - started)
                    yield scorer, applied
                    self._count(applied)
            else:
                self._pass_over(found, judgement)
        if self._skipped and not self.behind:
            self._go_back()

    def stop(self, reason: str) -> None:
        """Follow no further deltas."""
        _log.warning("deltas are not followed: %s", reason)
        self.behind = reason
        self.close()

    def close(self) -> None:
        """Close the source."""
        source, self._source = self._source, None
        if source:
            source.close()

    def _poll(self, wait_seconds: float) -> list[Delta | SnapshotError]:
        if self._source is None:
            return []
        try:
            return list(self._source.poll(wait_seconds))
        except Exception as error:  # noqa: BLE001 - file systems, clients, sources of others
            time.sleep(min(wait_seconds, _RETRY_SECONDS))
            return [NotReadable(f"deltas cannot be read: {_described(error)}")]

    def _updated(self, scorer: Scorer, delta: Delta) -> Scorer | None:
        """Return the scorer after a delta, or None if it does not fit."""
        header = delta.header
        name = f"delta {header.rank.name}"
        try:
            changes = decode_payload(delta.payload, header.precision, name)
            return scorer.updated(changes, header)
        except ConfigError as error:  # a model on a GPU
            self.stop(str(error))
        except SnapshotError as error:
            self._refuse("delta_damaged", str(error))
            self.behind = self.behind or str(error)
        except Exception as error:  # noqa: BLE001 - tensors of strangers
            text = f"{name} does not fit the loaded model: {_described(error)}"
            self._refuse("delta_not_fitting", text)
            self.behind = self.behind or text
        return None

    def _go_on(self, delta: Delta, seconds: float) -> AppliedDelta:
        """Go on to a delta that was applied."""
        header = delta.header
        self._chain.applied(header, delta.sha256)
        self._catching_up = False
        self._caught_up()
        return AppliedDelta(header, seconds, Delays.of_delta(header, _now_ms()))

    def _count(self, applied: AppliedDelta) -> None:
        """Count a delta with which the model predicts now."""
        header, delays = applied.header, applied.delays
        self.rank = header.rank
        self.applied += 1
        self.rows += sum(header.rows.values())
        self.applied_at = time.monotonic()
        if header.created_ms < self._started_ms:
            return
        if delays.event_seconds is not None:
            self.event_delays.observe(delays.event_seconds)
        now_ms = header.created_ms + delays.copied_seconds * _MILLISECONDS
        for closed in header.closed:
            self.closed_delays.observe((now_ms - closed.at_ms) / _MILLISECONDS, closed.examples)

    def _pass_over(self, delta: Delta, judgement: Judgement) -> None:
        """Count a delta that is not applied."""
        if isinstance(judgement, Refused):
            self._refuse(f"delta_other_{judgement.reason}", judgement.text)
        elif isinstance(judgement, Gap):
            self._refuse("delta_gap", judgement.text)
            self.behind = self.behind or judgement.text
            self._skipped = True
            self._catching_up = False
        elif not self._catching_up and not isinstance(judgement, Apply):
            self._refuse("delta_stale", judgement.text)

    def _refuse(self, kind: str, text: str) -> None:
        """Count what is not applied, and say it once until a delta is applied again."""
        self._failures[kind] += 1
        if kind not in self._said:
            self._said.add(kind)
            _log.warning("ignored: %s", one_line(text, 600))

    def _caught_up(self) -> None:
        if self.behind:
            _log.info("deltas are applied again, after: %s", self.behind)
        self.behind = None
        self._said &= _SAID_ONCE

    def _go_back(self) -> None:
        """Have the source return again what it keeps and the model lacks."""
        self._skipped = False
        self._catching_up = True
        if self._source:
            after = (self._run, self.rank) if self.rank else None
            self._source.rewind(after, since_ms=self._since_ms)


def _kind(error: SnapshotError) -> str:
    if isinstance(error, Unsigned):
        return "delta_unsigned"
    return "delta_source" if isinstance(error, NotReadable) else "delta_damaged"


def _described(error: Exception) -> str:
    text = one_line(error, 400)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _now_ms() -> float:
    return time.time() * _MILLISECONDS
