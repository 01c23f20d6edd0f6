"""A run that writes snapshots and deltas without a stream, and the truth about each of its states.

Its learners learn random batches. Every state is kept as a snapshot of its own, whose scorer says
what must be served in that state.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import UNSET, structs

from stream_ctr.errors import SnapshotError
from stream_ctr.learn.blend import Blend
from stream_ctr.learn.learner import Learner, make_learner
from stream_ctr.learn.served_weights import served_weights, serving_sha256
from stream_ctr.learn.spec import FtrlRates, LearnerSpec
from stream_ctr.learn.tensors import State
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Sign
from stream_ctr.snapshots.delta import (
    Closed,
    Delta,
    DeltaHeader,
    DeltaPosition,
    DeltaRank,
    Precision,
    encode_header,
    encode_payload,
    header_sha256,
    identity_sha256,
)
from stream_ctr.snapshots.delta_store import DeltaStore
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import Pointer, pointer_for, write_pointer
from stream_ctr.snapshots.scorer import Scorer
from support.manifests import LEARNER, TIME_MS, manifest
from support.served import ROWS

Truth = tuple[float, ...]
Named = tuple[int, int] | str
"""A state by epoch and sequence of its last delta, or by the name of its snapshot."""

SPECS = {
    "deepfm": LEARNER,
    "fnn": structs.replace(LEARNER, model="fnn", pretrain_examples=40),
    "ftrl": structs.replace(LEARNER, model="lr", ftrl=FtrlRates()),
}


def network_manifest(**changes: Any) -> Manifest:
    """Return the manifest of a run that publishes a DeepFM beside an LR."""
    return manifest(**changes)


def blend_manifest(**changes: Any) -> Manifest:
    """Return the manifest of a run that publishes a blend of a DeepFM, an FNN and an LR."""
    return structs.replace(
        manifest(), learner=UNSET, blend=tuple(SPECS), beside=SPECS, **_named(changes)
    )


def _named(changes: dict[str, Any]) -> dict[str, Any]:
    return {**changes, "snapshot": manifest(**changes).snapshot}


class DeltaRun:
    """A run whose state directory is `state`; `described` returns its manifests.

    A run that goes on from a published snapshot under another epoch is made by `resumed`.
    """

    def __init__(
        self,
        state: Path,
        *,
        described: Callable[..., Manifest] = network_manifest,
        epoch: int = 3,
        sign: Sign | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.state = state
        self.epoch = epoch
        self.store = DeltaStore(state)
        self.described = described
        self._sign = sign
        self._precision = precision
        self._identity = described(sequence=1)
        self._learners = {
            _stem(self._identity, name): make_learner(spec, device="cpu")
            for name, spec in self._identity.specs.items()
        }
        self._blend = Blend(self._identity.blend) if self._identity.blend else None
        self._random = np.random.default_rng(0)
        self._snapshots = 0
        self._sequence = 0
        self._examples = 0
        self._parent = ""
        self._base: Pointer | None = None
        self._position: DeltaPosition | None = None
        for learner in self._learners.values():
            learner.track_touched()
        self._states = 0
        self.truths: dict[Named, Truth] = {}
        """What must be served in each state."""
        self.deltas: list[Delta] = []

    def learn(self, batches: int = 1) -> None:
        """Learn batches of eight random examples."""
        for _ in range(batches):
            ids = self._random.integers(0, 64, (8, 4)).astype(np.int32)
            labels = self._random.integers(0, 2, 8).astype(np.uint8)
            values = self._random.random((8, 1)).astype(np.float32)
            logits = {
                name: np.asarray(self._learner(name).learn(ids, labels, values))
                for name in self._identity.specs
            }
            if self._blend:
                self._blend.learn(self._blend.stack(logits, 8), labels)
            self._examples += 8

    def snapshot(self, *, publish: bool = True, **changes: Any) -> Pointer:
        """Write a snapshot, at a delta of its own if a chain lives, and point to it."""
        if self._base is not None:
            self.delta()
        self._snapshots += 1
        path = self._write(self.state / "snapshots", self._position, **changes)
        self.truths[path.name] = served(Scorer(path))
        pointer = pointer_for(path, snapshot.read_manifest(path), sign=self._sign)
        if publish:
            self.publish(pointer)
        if self._base is None:
            self.begin(pointer)
        return pointer

    def publish(self, pointer: Pointer) -> None:
        """Point `latest.json` at a snapshot."""
        write_pointer(self.state / "latest.json", pointer)

    def begin(self, pointer: Pointer) -> None:
        """Begin a chain with a snapshot that was published."""
        self._base = pointer
        self._parent = pointer.manifest_sha256
        self._position = None
        for learner in self._learners.values():
            if learner.touched:
                learner.touched.take()

    def delta(self, *, write: bool = True, **changes: Any) -> Delta:
        """Make a delta of what was learned since the last one, and write it."""
        assert self._base
        made = {stem: learner.take_changes() for stem, learner in self._learners.items()}
        if self._blend:
            made["model"] = self._blend.weights()
        self._sequence += 1
        payload = encode_payload(made, self._precision)
        header = structs.replace(self._header(made, payload), **changes)
        data = encode_header(header, self._sign)
        delta = Delta(header, header_sha256(data), payload)
        if write:
            self.store.write(data, header, payload)
        self._parent = delta.sha256
        self._position = DeltaPosition(header.rank, delta.sha256)
        self.deltas.append(delta)
        self._states += 1
        state = self._write(self.state / "states", self._position)
        self.truths[header.rank.epoch, header.rank.sequence] = served(Scorer(state))
        return delta

    def resumed(self, pointer: Pointer, epoch: int) -> DeltaRun:
        """Return the run after a restart from a published snapshot, under a later epoch."""
        other = DeltaRun(
            self.state,
            described=self.described,
            epoch=epoch,
            sign=self._sign,
            precision=self._precision,
        )
        read, tensors = snapshot.load(self.state / "snapshots" / pointer.snapshot)
        for stem, learner in other._learners.items():
            learner.load_weights(tensors[stem])
            learner.load_optimizer_state(tensors[stem.replace("model", "optimizer")])
        if other._blend:
            other._blend.load_weights(tensors["model"])
            other._blend.load_optimizer_state(tensors["optimizer"])
        other._random = np.random.default_rng(epoch)
        other._snapshots = self._snapshots
        other._examples = read.examples
        other.truths = self.truths
        other.deltas = self.deltas
        other.begin(pointer)
        return other

    def digests(self) -> dict[str, str]:
        """Return the digest of what serving reads of each model now."""
        found = {
            stem: serving_sha256(served_weights(self._spec(stem), learner.weights()))
            for stem, learner in self._learners.items()
        }
        if self._blend:
            found["model"] = serving_sha256(self._blend.weights())
        return found

    def _learner(self, name: str) -> Learner:
        return self._learners[_stem(self._identity, name)]

    def _spec(self, stem: str) -> LearnerSpec:
        specs = self._identity.specs
        return next(specs[name] for name in specs if _stem(self._identity, name) == stem)

    def _header(self, made: dict[str, State], payload: bytes) -> DeltaHeader:
        assert self._base
        now_ms = TIME_MS + 1000 * self._sequence
        return DeltaHeader(
            run=self._identity.run,
            model=self._identity.model,
            rank=DeltaRank(self.epoch, self._sequence),
            base=self._base.snapshot,
            base_sha256=self._base.manifest_sha256,
            parent=self._parent,
            identity_sha256=identity_sha256(self._identity),
            precision=self._precision,
            verdict=self._identity.gate,
            examples=self._examples,
            oldest_event_ms=now_ms - 8000,
            newest_event_ms=now_ms - 5000,
            watermark_ms=now_ms - 6000,
            positions={"clicks:0": self._examples},
            closed=(Closed(now_ms - 3000, 6), Closed(now_ms - 1000, 2)),
            learned_ms=now_ms - 500,
            created_ms=now_ms,
            rows={stem: len(each["rows"]) for stem, each in made.items() if "rows" in each},
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            payload_bytes=len(payload),
        )

    def _write(self, root: Path, position: DeltaPosition | None, **changes: Any) -> Path:
        """Write the present state as a snapshot."""
        tensors: dict[str, State] = {}
        for stem, learner in self._learners.items():
            tensors[stem] = learner.weights()
            tensors[stem.replace("model", "optimizer")] = learner.optimizer_state()
        if self._blend:
            tensors["model"] = self._blend.weights()
            tensors["optimizer"] = self._blend.optimizer_state()
        described = self.described(
            sequence=1000 * self.epoch + self._states if root.name == "states" else self._snapshots,
            epoch=self.epoch,
            examples=self._examples,
            delta=position,
            serving_sha256=self.digests(),
            **changes,
        )
        return snapshot.write(root, tensors=tensors, manifest=described, sign=self._sign)


def _stem(identity: Manifest, name: str) -> str:
    return snapshot.stems(None if name == identity.published else name)[0]


def truth_of(run: DeltaRun, scorer: Scorer) -> Truth:
    """Return what must be served in the state that a scorer says it is in."""
    if scorer.delta is None:
        return run.truths[scorer.snapshot]
    rank = scorer.delta.rank
    return run.truths[rank.epoch, rank.sequence]


def served(model: Any) -> Truth:
    """Return what a scorer or subscriber predicts for `ROWS`."""
    predicted: npt.NDArray[np.float64] = model.predict(ROWS)
    return tuple(predicted.tolist())


class ListedDeltas:
    """A source of deltas that returns those that were put into it, one a poll.

    What is `kept` comes again after `rewind`.
    """

    def __init__(self, kept: Iterable[Delta] = ()) -> None:
        self.kept = list(kept)
        self.arrived: deque[Delta | SnapshotError] = deque()
        self.counts: Counter[str] = Counter()
        self.rewinds = 0
        self.closed = False

    def arrive(self, *found: Delta | SnapshotError) -> None:
        """Let these come next."""
        self.arrived.extend(found)

    def poll(self, timeout_seconds: float) -> Sequence[Delta | SnapshotError]:
        return [self.arrived.popleft()] if self.arrived else []

    def rewind(
        self, after: tuple[str, DeltaRank] | None = None, *, since_ms: int | None = None
    ) -> None:
        self.rewinds += 1
        self.arrived = deque(
            each
            for each in self.kept
            if not (after and each.header.run == after[0] and each.header.rank <= after[1])
        )

    def close(self) -> None:
        self.closed = True
