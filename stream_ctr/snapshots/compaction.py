"""Compaction: a snapshot and the deltas that follow it become one snapshot that serves.

    published snapshot + deltas 1, 2, ..., k  ->  a snapshot at the position of delta k

The new snapshot has the form of an export (see `export`): the weights of each model as serving
reads them, and ONNX graphs. LR is held as weights instead of the pairs that it learns with, and the
optimiser's part of each row of a table is 0. Deltas do not carry what only learning needs, so no
run resumes from it. Its manifest says what the last delta says: the position in the chain, the
examples, event time, positions and verdict. The rest of it, counters and metrics among them, is
that of the snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import msgspec
import numpy.typing as npt

from stream_ctr.errors import SnapshotError
from stream_ctr.learn.blend import Blend
from stream_ctr.learn.dense_part import PARTS
from stream_ctr.learn.linear_model import ServedLinear
from stream_ctr.learn.served_network import require_weights
from stream_ctr.learn.served_weights import (
    INTERCEPT,
    ROWS,
    VALUES,
    require_changes,
    served_weights,
    serving_sha256,
)
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Sign, Verify
from stream_ctr.snapshots.delta import Delta, DeltaPosition, decode_payload, identity_sha256
from stream_ctr.snapshots.delta_chain import Apply, Chain, Stale
from stream_ctr.snapshots.delta_sources import FileDeltas
from stream_ctr.snapshots.export import Build, graphs_of
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import Pointer, read_pointer, require_signature

Named: TypeAlias = Mapping[str, Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Compacted:
    """The snapshot at `path`: that of `base` after `deltas` deltas.

    `left_out` says of each delta that is kept and was not applied, but should have been, why not.
    """

    path: Path
    base: str
    deltas: int
    position: DeltaPosition | None
    left_out: tuple[str, ...]


def compact(
    directory: Path,
    out: Path,
    build: Build,
    *,
    signature: Verify | None = None,
    sign: Sign | None = None,
) -> Compacted:
    """Write the published snapshot of a state directory, with all deltas after it, to `out`.

    `build` makes the ONNX graph of a network. `signature` must accept the pointer, the manifest and
    the deltas, and `sign` signs the new manifest. Deltas after a gap, or after one that is damaged,
    are left out.

    Raises `SnapshotError` if nothing is published there, if the snapshot does not verify, if a
    delta does not fit it, or if `out` exists or cannot be written.
    """
    pointer = _published(directory, signature)
    path = directory / "snapshots" / pointer.snapshot
    manifest, tensors = snapshot.load(
        path, stems=_model_stems, manifest_sha256=pointer.manifest_sha256, signature=signature
    )
    models = _Models(path, manifest, tensors)
    links = _Links(directory, manifest, pointer, signature)
    for delta in links:
        models.apply(delta)
    compacted = models.tensors()
    described = _described(manifest, compacted, links.last, models.serving_sha256(compacted))
    try:
        graphs = graphs_of(manifest, compacted, partial(_checked, build))
    except (KeyError, ValueError, RuntimeError) as error:
        raise _not_fitting(f"snapshot {path}", error) from None
    written = snapshot.write(
        out.parent, tensors=compacted, manifest=described, graphs=graphs, sign=sign, name=out.name
    )
    return Compacted(
        written, manifest.snapshot, links.applied, described.delta, tuple(links.left_out)
    )


def _published(directory: Path, signature: Verify | None) -> Pointer:
    """Return the pointer to the published snapshot."""
    pointer = read_pointer(directory / "latest.json")
    if pointer is None:
        raise SnapshotError(f"{directory} has no latest.json: nothing was published there")
    if signature:
        require_signature(pointer, signature)
    return pointer


def _model_stems(manifest: Manifest) -> list[str]:
    """Return the stems of the weights of all models that the snapshot holds."""
    names = [None, *manifest.beside]
    stems = [snapshot.stems(name)[0] for name in names]
    return [stem for stem in stems if snapshot.file_name(stem) in manifest.files]


@dataclass
class _Links:
    """The deltas of a state directory that follow a snapshot, one after another."""

    directory: Path
    manifest: Manifest
    pointer: Pointer
    signature: Verify | None
    applied: int = 0
    last: Delta | None = None
    left_out: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Delta]:
        source = FileDeltas(self.directory, signature=self.signature)
        chain = Chain()
        chain.begin(
            self.pointer.manifest_sha256,
            self.manifest.delta,
            run=self.manifest.run,
            model=self.manifest.model,
            identity_sha256=identity_sha256(self.manifest),
            epoch=self.pointer.epoch,
            examples=self.manifest.examples,
        )
        while found := source.poll(0.0):
            for delta in found:
                if isinstance(delta, SnapshotError):
                    self.left_out.append(str(delta))
                    continue
                judgement = chain.judge(delta.header, delta.sha256)
                if isinstance(judgement, Apply):
                    yield delta
                    chain.applied(delta.header, delta.sha256)
                    self.applied += 1
                    self.last = delta
                elif not isinstance(judgement, Stale):
                    self.left_out.append(judgement.text)


class _Models:
    """The weights of a snapshot's models, which deltas change."""

    def __init__(self, path: Path, manifest: Manifest, tensors: Named) -> None:
        self._specs = {
            snapshot.stems(None if name == manifest.published else name)[0]: spec
            for name, spec in manifest.specs.items()
        }
        self._blend = snapshot.stems()[0] if manifest.blend else None
        self._members = manifest.blend
        self._tensors: dict[str, State] = {}
        self._linear: dict[str, ServedLinear] = {}
        try:
            for stem, weights in tensors.items():
                self._begin(stem, cast(State, weights))
        except (ValueError, RuntimeError) as error:
            raise _not_fitting(f"snapshot {path}", error) from None

    def _begin(self, stem: str, weights: State) -> None:
        if stem == self._blend:
            Blend(self._members).load_weights(weights)
            self._tensors[stem] = weights
        elif self._specs[stem].model == "lr":
            self._linear[stem] = ServedLinear(self._specs[stem], weights)
        else:
            if self._specs[stem].model in PARTS:
                require_weights(self._specs[stem], weights)
            width = served_weights(self._specs[stem], weights)[VALUES].shape[1]
            weights["table"][:, width:] = 0.0
            if INTERCEPT in weights:
                weights[INTERCEPT][1:] = 0.0
            self._tensors[stem] = weights

    def apply(self, delta: Delta) -> None:
        """Apply a delta that follows. Raises `SnapshotError` if it does not fit."""
        header = delta.header
        name = f"delta {header.rank.name}"
        changes = decode_payload(delta.payload, header.precision, name)
        try:
            for stem in (*self._tensors, *self._linear):
                if stem not in changes:
                    raise ValueError(f"it has nothing of {snapshot.file_name(stem)}")
                self._change(stem, cast(State, changes[stem]))
        except ValueError as error:
            raise _not_fitting(name, error) from None

    def _change(self, stem: str, changes: State) -> None:
        if stem == self._blend:
            Blend(self._members).load_weights(changes)
            self._tensors[stem] = changes
            return
        if stem in self._linear:
            self._linear[stem] = self._linear[stem].updated(changes)
            self._linear[stem].absorb()
            return
        require_changes(self._specs[stem], changes)
        weights = self._tensors[stem]
        rows, values = changes[ROWS], changes[VALUES]
        weights["table"][rows, : values.shape[1]] = values
        for tensor, array in changes.items():
            if tensor == INTERCEPT:
                weights[tensor][:1] = array
            elif tensor not in (ROWS, VALUES):
                weights[tensor] = array

    def tensors(self) -> dict[str, State]:
        """Return the weights of each model by its stem, as a snapshot holds them."""
        return {**self._tensors, **{stem: made.served() for stem, made in self._linear.items()}}

    def serving_sha256(self, tensors: Mapping[str, State]) -> dict[str, str]:
        """Return the digest of what serving reads of each model."""
        return {
            stem: serving_sha256(
                weights if stem == self._blend else served_weights(self._specs[stem], weights)
            )
            for stem, weights in tensors.items()
        }


def _described(
    manifest: Manifest, tensors: Named, last: Delta | None, digests: dict[str, str]
) -> Manifest:
    """Return the manifest of a snapshot after its last delta."""
    described = msgspec.structs.replace(
        manifest,
        files={},
        served=(),
        serving_sha256=digests,
        weights_sha256=snapshot.weights_sha256(
            snapshot.published_weights(manifest, cast(snapshot.Tensors, tensors))
        ),
    )
    if last is None:
        return described
    header = last.header
    return msgspec.structs.replace(
        described,
        delta=DeltaPosition(header.rank, last.sha256),
        epoch=header.rank.epoch,
        examples=header.examples,
        event_time_ms=max(manifest.event_time_ms, header.newest_event_ms),
        created_ms=header.created_ms,
        positions=header.positions,
        gate=header.verdict,
    )


def _checked(build: Build, spec: LearnerSpec, weights: Tensors) -> bytes:
    if spec.model in PARTS:
        require_weights(spec, weights)
    return build(spec, weights)


def _not_fitting(subject: str, error: Exception) -> SnapshotError:
    return SnapshotError(
        f"{subject} does not describe a model that this version can build: {one_line(error, 500)}"
    )
