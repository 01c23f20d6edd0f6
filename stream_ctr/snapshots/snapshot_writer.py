"""Writes snapshots behind the learner's back: what was copied between two batches goes to disk in a thread, while learning goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.errors import SnapshotError, StreamCtrError
from stream_ctr.snapshots import snapshot

_log = logging.getLogger(__name__)


class NotFinite(SnapshotError):
    """The model's weights are not finite: that is no snapshot to go on from."""


@dataclass(slots=True)
class Cut:
    """Everything as it was between two batches. `tensors`: file stem -> name -> array."""

    tensors: dict[str, dict[str, npt.NDArray[Any]]]
    manifest: dict[str, Any]
    positions: dict[int, int]
    segments: snapshot.Segments


@dataclass(frozen=True, slots=True)
class Written:
    """A snapshot that is on disk, without those models beside the published one that are `not_finite`."""

    path: Path
    manifest: dict[str, Any]
    positions: dict[int, int]
    not_finite: tuple[str, ...] = ()


class SnapshotWriter:
    """One snapshot at a time, in a thread. `check` is asked before one becomes visible, and may raise."""

    def __init__(
        self,
        root: Path,
        *,
        sign: Callable[[bytes], bytes] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._root, self._sign, self._check = root, sign, check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._writing: Future[Written] | None = None

    @property
    def busy(self) -> bool:
        """Whether a snapshot was begun that `take` has not returned."""
        return self._writing is not None

    def begin(self, cut: Cut) -> None:
        assert self._writing is None
        self._writing = self._thread.submit(self._write, cut)

    def take(self, *, wait: bool) -> Written | None:
        """The snapshot that was begun, when it is on disk. Raises `SnapshotError` when it could not be written, and what `check` raises."""
        if self._writing is None or not (wait or self._writing.done()):
            return None
        done, self._writing = self._writing, None
        return done.result()

    def after(self, work: Callable[[], None]) -> None:
        """Do this too, after what was begun; what goes wrong is logged."""
        self._thread.submit(self._attempt, work)

    def close(self) -> None:
        """Finish what was begun."""
        self._thread.shutdown()

    def _write(self, cut: Cut) -> Written:
        model = cut.tensors["model"]
        if not _finite(model):
            raise NotFinite("the model's weights are not finite; no snapshot was written")
        not_finite = tuple(
            name
            for name in cut.manifest["beside"]
            if not _finite(cut.tensors.get(snapshot.stems(name)[0], {}))
        )
        left = {stem for name in not_finite for stem in snapshot.stems(name)}
        manifest = {**cut.manifest, "weights_sha256": snapshot.weights_sha256(model)}
        name = snapshot.new_id(manifest["sequence"], manifest["event_time_ms"])
        path = snapshot.write(
            self._root, tensors={stem: arrays for stem, arrays in cut.tensors.items() if stem not in left}, manifest=manifest,
            snapshot_id=name, segments=cut.segments, sign=self._sign, check=self._check,
        )  # fmt: skip
        return Written(path, manifest, cut.positions, not_finite)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (
            StreamCtrError
        ) as error:  # a thread has nobody to raise to; the next snapshot tries again
            _log.error("old snapshots are not removed: %s", error)


def _finite(tensors: Mapping[str, npt.NDArray[Any]]) -> bool:
    return all(np.isfinite(array).all() for array in tensors.values())
