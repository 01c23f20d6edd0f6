"""A thread that writes snapshots, so that learning goes on while they reach the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.errors import SnapshotError
from stream_ctr.learn.array_digests import ArrayDigest
from stream_ctr.learn.served_weights import (
    VALUES,
    served_parameters,
    served_weights,
    serving_sha256,
)
from stream_ctr.learn.shard_files import TABLE
from stream_ctr.learn.shard_writer import ShardsWritten, TableShards
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.delta import DeltaPosition
from stream_ctr.snapshots.manifest import Manifest, RunIdentity
from stream_ctr.snapshots.shards import StagedShards, segments_of
from stream_ctr.snapshots.writing_thread import WritingThread

Graphs: TypeAlias = Callable[[RunIdentity, Mapping[str, Mapping[str, Any]]], Mapping[str, bytes]]


class NotFinite(SnapshotError):
    """The published model's weights are not finite, so no run could resume from the snapshot."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A copy of all state between two batches. `tensors`: file stem -> name -> array."""

    tensors: dict[str, dict[str, npt.NDArray[Any]]]
    manifest: Manifest
    positions: dict[int, int]
    segments: snapshot.Segments
    shards: Mapping[str, TableShards] = field(default_factory=dict)
    """The tables that ranks hold together, by file stem; `tensors` lack them."""
    delta: Callable[[], DeltaPosition | None] = lambda: None
    """Waits for the delta at exactly this state, and returns its position, None without one."""


@dataclass(frozen=True, slots=True)
class Written:
    """A snapshot on disk. It lacks the additional models in `not_finite`."""

    path: Path
    manifest: Manifest
    positions: dict[int, int]
    not_finite: tuple[str, ...] = ()


class SnapshotWriter(WritingThread[Written]):
    """Write one snapshot at a time, in a thread.

    `graphs` returns the ONNX graphs of the models, by file stem, where snapshots hold them. `check`
    is called before a snapshot becomes visible and may raise. `sign` signs the bytes of the
    manifest. `before` is called first, and may raise `SnapshotError`.
    """

    def __init__(
        self,
        root: Path,
        *,
        graphs: Graphs | None = None,
        sign: Callable[[bytes], bytes] | None = None,
        check: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("snapshot")
        self._before = before
        self._graphs = graphs
        self._root = root
        self._sign = sign
        self._check = check

    def begin(self, cut: Cut) -> None:
        """Begin to write a snapshot. The one before must have been taken."""
        staged = StagedShards(self._root, cut.manifest.snapshot, cut.shards)
        self._begin(lambda: self._write_staged(cut, staged))

    def _write_staged(self, cut: Cut, staged: StagedShards) -> Written:
        try:
            _require_finite(_finite(cut.tensors["model"]))
            return self._write(cut, staged.written())
        finally:
            staged.remove()

    def _write(self, cut: Cut, shards: Mapping[str, ShardsWritten]) -> Written:
        published = shards.get("model")
        _require_finite(published is None or published.finite)
        self._before()
        not_finite = tuple(
            name
            for name in cut.manifest.beside
            if not _all_finite(snapshot.stems(name)[0], cut.tensors, shards)
        )
        omitted = {stem for name in not_finite for stem in snapshot.stems(name)}
        tensors = {stem: named for stem, named in cut.tensors.items() if stem not in omitted}
        manifest = msgspec.structs.replace(
            cut.manifest,
            weights_sha256=_weights_sha256(cut.manifest, cut.tensors, shards),
            serving_sha256=_serving_sha256(cut.manifest, tensors, shards),
            delta=None if not_finite else cut.delta(),  # a delta has every model
        )
        path = snapshot.write(
            self._root,
            tensors=tensors,
            manifest=manifest,
            segments={**cut.segments, **segments_of(shards, tensors)},
            graphs=self._graphs(manifest, tensors) if self._graphs else None,
            sign=self._sign,
            check=self._check,
        )
        return Written(path, manifest, cut.positions, not_finite)


def _weights_sha256(
    identity: RunIdentity,
    tensors: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    shards: Mapping[str, ShardsWritten],
) -> str:
    """Return the digest of the published weights, whose tables may be in shards."""
    known: dict[str, dict[str, npt.NDArray[Any] | ArrayDigest]] = {
        stem: {**named, **({TABLE: shards[stem].table} if stem in shards else {})}
        for stem, named in tensors.items()
    }
    return snapshot.weights_sha256(snapshot.published_weights(identity, known))


def _serving_sha256(
    identity: RunIdentity,
    tensors: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    shards: Mapping[str, ShardsWritten],
) -> dict[str, str]:
    """Return the digest of what serving reads of each model that is there, by its stem."""
    published = snapshot.stems()[0]
    digests = {published: serving_sha256(tensors[published])} if identity.blend else {}
    for name, spec in identity.specs.items():
        stem = snapshot.stems(None if name == identity.published else name)[0]
        if stem not in tensors:
            continue
        if stem in shards:
            served = served_parameters(tensors[stem])
            digests[stem] = serving_sha256({VALUES: shards[stem].served, **served})
        else:
            digests[stem] = serving_sha256(served_weights(spec, tensors[stem]))
    return digests


def _all_finite(
    stem: str,
    tensors: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    shards: Mapping[str, ShardsWritten],
) -> bool:
    return _finite(tensors.get(stem, {})) and (stem not in shards or shards[stem].finite)


def _require_finite(finite: bool) -> None:
    if not finite:
        raise NotFinite("the model's weights are not finite; no snapshot was written")


def _finite(tensors: Mapping[str, npt.NDArray[Any]]) -> bool:
    return all(np.isfinite(array).all() for array in tensors.values())
