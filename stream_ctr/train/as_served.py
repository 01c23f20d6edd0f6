"""As served: each impression is scored by the weights that were published when it arrived.

Progressive metrics predict an example just before it is learned: its label window has closed, and
the weights have learned from every impression before it. Nobody was served with these weights. When
the impression arrived, the newest labels were one label window old, and the published weights older
still. Here a share of the impressions is scored by those.

A snapshot can be published once its last example is learned, which takes until the watermark has
passed the end of that example's label window. So it is in force from

    in force from = event time of its last example + label window + allowed lateness

on, until the next one is. An impression at t is scored by the newest published snapshot with
`in force from` <= t. This is a function of the log and of the batch after which the snapshot was
taken: neither the polls nor the writing of the snapshot play a part, and a resumed run scores as
one that was not stopped.

A prediction depends on the weights and the features alone. So an impression need not be scored when
it arrives: it is when it is learned, by a frozen copy of the weights, and nothing has to wait in
the joiner. A copy stays until every impression that it serves is learned.

    candidate    frozen when a snapshot is taken; there is no verdict on it yet
    in force     it was published
    refused      by the gate, or it could not be written; never in force

With snapshots on disk the copy is that of each snapshot. A log is replayed far faster than it
happened, so under `--source` a copy is frozen each `every_ms` of event time, in memory only, and
not before the examples grew by a quarter or by 65,536 since the last one.

At most `MOST_COPIES` copies are kept. While all are needed, which is so when a label window is
longer than several intervals, a new one is passed over and counted, and the one before stays in
force.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.evaluate.gate import Measured
from stream_ctr.events.features import mix64
from stream_ctr.join.examples import Examples
from stream_ctr.learn.blend import Blend
from stream_ctr.learn.learner import Learner, MakeLearner, make_learner
from stream_ctr.learn.shard_writer import TableShards
from stream_ctr.learn.spec import BLEND, LearnerSpec
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import ServedCopy

MOST_COPIES = 4
BEFORE_FIRST = "examples_before_publication"
PASSED_OVER = "publications_passed_over"

_EXAMPLES_BETWEEN_COPIES = 65_536
# Few examples of a batch are scored, so the parts that they are computed in are small.
_BATCH_SIZE = 1024
_FILE_PREFIX = "served."

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Learners = Mapping[str, Learner]


class _Slot:
    """Learners for one copy, and the blend of them if that is published."""

    def __init__(
        self, specs: Mapping[str, LearnerSpec], blend: Sequence[str], make: MakeLearner
    ) -> None:
        self.learners = {
            name: make(
                # Its weights are copied: random ones would take half a second.
                msgspec.structs.replace(
                    spec, batch_size=min(_BATCH_SIZE, spec.batch_size), initial_scale=0.0
                )
            )
            for name, spec in specs.items()
        }
        self.blend = Blend(blend) if blend else None

    def copy(self, learners: Learners, blend: Blend | None) -> None:
        """Take over the weights of these models."""
        for name, learner in learners.items():
            learner.copy_weights_to(self.learners[name])
        if self.blend and blend:
            self.blend.load_weights(blend.weights())

    def predict(
        self, names: Sequence[str], ids: Ids, values: npt.NDArray[np.float32]
    ) -> dict[str, npt.NDArray[np.floating]]:
        """Return the logits [n] of these models, and of the blend."""
        logits = {name: self.learners[name].predict(ids, values) for name in names}
        if self.blend:
            logits[BLEND] = self.blend.predict(self.blend.stack(logits, len(ids)))
        return logits

    def weights(self, name: str) -> State:
        """Return the weights of a model."""
        if name == BLEND and self.blend:
            return self.blend.weights()
        return dict(self.learners[name].weights())

    def shards(self, name: str) -> TableShards | None:
        """Return the copy of a model's table that `weights` made on several ranks, if it did."""
        return None if name == BLEND and self.blend else self.learners[name].shards()

    def load(self, name: str, weights: Tensors) -> None:
        """Load the weights of a model. Raises `ValueError` if they do not fit."""
        (self.blend if name == BLEND and self.blend else self.learners[name]).load_weights(weights)


@dataclass(slots=True)
class Copy:
    """The weights of the models `names` after `examples` examples, in force from `from_ms` on."""

    examples: int
    from_ms: int
    names: tuple[str, ...]
    slot: _Slot = field(repr=False)
    evidence: Measured | None = None
    refused: bool = False

    def entry(self) -> ServedCopy:
        """Return the entry of a manifest."""
        return ServedCopy(examples=self.examples, from_ms=self.from_ms, evidence=self.evidence)

    def stems(self, published: str) -> dict[str, str]:
        """Return the stem of the file of each model, and of the blend."""
        names = (*self.names, *([BLEND] if self.slot.blend else []))
        return {name: stem_of(self.examples, name, published) for name in names}


def stem_of(examples: int, name: str, published: str) -> str:
    """Return the stem of the file that holds the copy of a model.

    >>> stem_of(4096, "deepfm", "deepfm"), stem_of(4096, "ftrl", "deepfm")
    ('served.4096.model', 'served.4096.ftrl.model')
    """
    return f"{_FILE_PREFIX}{examples}.{snapshot.stems(None if name == published else name)[0]}"


class AsServed:
    """Score a `share` of the examples by the copies that were in force.

    `specs` are those of the models that are scored, the published one first, or of the members of
    the `blend`, which is published then. A snapshot is in force `delay_ms` after its last example.
    With `every_ms` a copy is due each time so much event time has passed; with 0 the copies are
    those of the snapshots on disk. `make` makes the learners that hold the copies.
    """

    def __init__(
        self,
        specs: Mapping[str, LearnerSpec],
        *,
        blend: Sequence[str] = (),
        share: float,
        delay_ms: int,
        every_ms: int = 0,
        make: MakeLearner = make_learner,
    ) -> None:
        self.specs = dict(specs)
        self.blend = tuple(blend)
        self.share = share
        self.every_ms = every_ms
        self._delay_ms = delay_ms
        self._make = make
        self._threshold = None if share >= 1 else np.uint64(int(share * 2.0**64))
        self._slots: list[_Slot] = []
        self._in_force: list[Copy] = []  # the newest last
        self._candidates: list[Copy] = []

    @property
    def of_snapshots(self) -> bool:
        """Whether the copies are those of the snapshots on disk."""
        return not self.every_ms

    @property
    def names(self) -> tuple[str, ...]:
        """The models that are scored, the published one first."""
        return (*([BLEND] if self.blend else []), *self.specs)

    @property
    def published(self) -> str:
        """The name of the published model."""
        return self.names[0]

    # -- which weights are in force --------------------------------------------------------------

    def due(self, before_ms: int | None, now_ms: int | None, *, last: int, examples: int) -> bool:
        """Return whether a copy is due after a batch.

        The event time of the last example was `before_ms` before the batch, and is `now_ms` now.
        A replay passes days in minutes, so a copy also needs a quarter more `examples` than the
        `last` one had, or 65,536 more.
        """
        if not self.every_ms or before_ms is None or now_ms is None:
            return False
        enough = examples - last >= min(last // 4, _EXAMPLES_BETWEEN_COPIES)
        return enough and now_ms // self.every_ms > before_ms // self.every_ms

    @property
    def full(self) -> bool:
        """Whether there is no room for another copy."""
        return len(self._in_force) + len(self._candidates) >= MOST_COPIES

    @property
    def undecided(self) -> bool:
        """Whether there is a candidate."""
        return bool(self._candidates)

    def freeze(
        self, learners: Learners, *, blend: Blend | None = None, examples: int, event_ms: int
    ) -> Copy | None:
        """Copy the weights of these models after so many examples, the last one at `event_ms`.

        Returns a candidate, or None if there is no room.
        """
        if self.full:
            return None
        names = tuple(name for name in self.specs if name in learners)
        slot = self._free_slot()
        slot.copy({name: learners[name] for name in names}, blend)
        copy = Copy(examples, event_ms + self._delay_ms, names, slot)
        self._candidates.append(copy)
        return copy

    def decide(self, copy: Copy, *, published: bool, evidence: Measured | None) -> None:
        """Put a candidate in force, or refuse it."""
        if copy not in self._candidates:
            return
        self._candidates.remove(copy)
        copy.evidence = evidence
        copy.refused = not published
        if published:
            self._in_force.append(copy)

    def decide_all(self, *, published: bool, evidence: Measured | None = None) -> None:
        """Decide on every candidate."""
        for copy in [*self._candidates]:
            self.decide(copy, published=published, evidence=evidence)

    def awaits_verdict(self, batch: Examples) -> bool:
        """Return whether it must be decided on a candidate before the batch can be scored."""
        if not self._candidates:
            return False
        return self._candidates[0].from_ms <= int(batch.time.max())

    @property
    def evidence(self) -> Measured | None:
        """The evidence of the newest copy in force."""
        return self._in_force[-1].evidence if self._in_force else None

    def _free_slot(self) -> _Slot:
        used = {id(copy.slot) for copy in self.copies()}
        free = [slot for slot in self._slots if id(slot) not in used]
        if not free:
            free = [_Slot(self.specs, self.blend, self._make)]
            self._slots += free
        return free[0]

    # -- scoring ---------------------------------------------------------------------------------

    def score(self, batch: Examples, counters: Counter[str]) -> dict[str, Logits]:
        """Return the logits [n] of each model, NaN for the examples that are not scored.

        Examples that came before the first publication are counted in `counters`.
        """
        self._drop_before(int(batch.time.min()))
        starts = [copy.from_ms for copy in self._in_force]
        served_by = np.searchsorted(starts, batch.time, side="right") - 1
        before = int((served_by < 0).sum())
        if before:
            counters[BEFORE_FIRST] += before
        chosen = self._chosen(batch.id_hash)
        logits = {name: np.full(len(batch), np.nan, np.float32) for name in self.names}
        for number, copy in enumerate(self._in_force):
            rows = np.flatnonzero(chosen & (served_by == number))
            if len(rows):
                found = copy.slot.predict(copy.names, batch.ids[rows], batch.values[rows])
                for name, predicted in found.items():
                    logits[name][rows] = predicted
        return logits

    def _chosen(self, id_hash: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        if self._threshold is None:
            return np.ones(len(id_hash), np.bool_)
        return mix64(id_hash) < self._threshold

    def _drop_before(self, event_ms: int) -> None:
        """Forget the copies that serve no impression from this event time on."""
        ended = sum(later.from_ms <= event_ms for _, later in pairwise(self._in_force))
        del self._in_force[:ended]

    # -- state -----------------------------------------------------------------------------------

    def copies(self) -> list[Copy]:
        """Return the copies in force, and the candidates."""
        return [*self._in_force, *self._candidates]

    def load_state(self, entries: Sequence[ServedCopy], tensors: snapshot.Tensors) -> None:
        """Restore the copies that a snapshot lists.

        Raises `ValueError` if the tensors do not fit.
        """
        self._in_force = []
        self._candidates = []
        for entry in entries:
            stems = {name: stem_of(entry.examples, name, self.published) for name in self.names}
            held = {name: stem for name, stem in stems.items() if stem in tensors}
            slot = self._free_slot()
            for name, stem in held.items():
                with contextlib.suppress(ValueError):  # not finite: its logits are not, either
                    slot.load(name, tensors[stem])
            names = tuple(name for name in self.specs if name in held)
            self._in_force.append(Copy(entry.examples, entry.from_ms, names, slot, entry.evidence))
