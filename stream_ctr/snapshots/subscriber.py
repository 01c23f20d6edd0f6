"""Serving: follow published snapshots, verify each before it is loaded, predict with the newest.

    with Subscriber("state") as model:
        model.wait(30)
        p = model.predict([{"app": "maps", "age": 31}])

A pointer names a snapshot directory and the SHA-256 of its manifest, which holds those of the
files. A snapshot that does not verify, or that is older than the loaded one (by epoch, then by
sequence), is refused, and the loaded one continues to serve.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self, overload

import numpy as np
import numpy.typing as npt

from stream_ctr import extensions
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.events.feature_rows import OnInvalid, Table
from stream_ctr.learn.spec import BLEND, EXPERTS
from stream_ctr.messages import nearest
from stream_ctr.models import MODELS
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.pointer_sources import FilePointers, PointerSource
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import verifier

_log = logging.getLogger(__name__)
_NAMES = (BLEND, *MODELS, *EXPERTS)


class Subscriber:
    """Predict with the newest published snapshot, which is replaced while calls go on.

    `source` is a state directory or a `PointerSource`. With `model`, an additional model serves
    instead of the published one, and snapshots without it are ignored with a warning. With
    `public_key`, a PEM file, snapshots without a signature by its private key are ignored.
    `on_invalid` is that of `Scorer`. `predict` raises `SnapshotError` before the first snapshot.

    Raises `ConfigError` for a `model` that no run can have.
    """

    def __init__(
        self,
        source: str | Path | PointerSource,
        *,
        model: str | None = None,
        device: str = "cpu",
        public_key: str | Path | None = None,
        on_snapshot: Callable[[Pointer], None] | None = None,
        on_invalid: OnInvalid = "error",
    ) -> None:
        known = (*_NAMES, *extensions.names())
        if model is not None and model not in known and not extensions.is_import_path(model):
            raise ConfigError(f"there is no model {model!r:.80}{nearest(model, known)}")
        self._signature = verifier(public_key)
        self._pointers: PointerSource = (
            FilePointers(Path(source)) if isinstance(source, (str, Path)) else source
        )
        self._model = model
        self._device = device
        self._on_snapshot = on_snapshot
        self._on_invalid: OnInvalid = on_invalid
        self.invalid: Counter[str] = Counter()
        """What was scored as missing since the start, by reason; see `Scorer.invalid`."""
        self.pointer: Pointer | None = None
        """The pointer to the loaded snapshot."""
        self.refusal: SnapshotError | None = None
        """Why the last pointer or snapshot was ignored, None if it was loaded."""
        self._scorer: Scorer | None = None
        self._loaded = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self, timeout_seconds: float) -> Pointer | None:
        """Load the next newer snapshot; return its pointer, or None if none came in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            wait_seconds = max(0.0, min(1.0, deadline - time.monotonic()))
            for pointer in self._pointers.poll(wait_seconds):
                if isinstance(pointer, SnapshotError):
                    self._refuse("a pointer", pointer)
                elif self._load(pointer):
                    return pointer
            if time.monotonic() >= deadline or self._closing.is_set():
                return None

    def _load(self, pointer: Pointer) -> bool:
        if self.pointer and pointer.rank < self.pointer.rank:
            _log.warning(
                "ignored snapshot %s of epoch %d: older than the loaded one",
                pointer.snapshot,
                pointer.epoch,
            )
            return False
        try:
            self._scorer = Scorer(
                Path(pointer.path),
                model=self._model,
                manifest_sha256=pointer.manifest_sha256,
                signature=self._signature,
                device=self._device,
                on_invalid=self._on_invalid,
                invalid=self.invalid,
            )
        except SnapshotError as error:
            self._refuse(f"snapshot {pointer.snapshot}", error)
            return False
        self.pointer = pointer
        self.refusal = None
        self._loaded.set()
        if self._on_snapshot:
            self._on_snapshot(pointer)
        return True

    def _refuse(self, subject: str, error: SnapshotError) -> None:
        """Log and keep the error. One of a newer version needs an operator."""
        self.refusal = error
        level = logging.ERROR if isinstance(error, NewerFormat) else logging.WARNING
        _log.log(level, "ignored %s: %s", subject, error)

    @property
    def scorer(self) -> Scorer:
        """The loaded model. Raises `SnapshotError` before the first snapshot."""
        if self._scorer is None:
            raise SnapshotError("no snapshot was published yet; wait(seconds) waits for the first")
        return self._scorer

    @overload
    def predict(self, rows: Mapping[str, object]) -> float: ...
    @overload
    def predict(self, rows: Sequence[Mapping[str, object]] | Table) -> npt.NDArray[np.float64]: ...
    def predict(
        self, rows: Mapping[str, object] | Sequence[Mapping[str, object]] | Table
    ) -> float | npt.NDArray[np.float64]:
        """Return click probabilities [n], or one for one dictionary; see `Scorer.predict`."""
        return self.scorer.predict(rows)

    @property
    def closing(self) -> bool:
        """True once `close` was called."""
        return self._closing.is_set()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the first snapshot is loaded; return whether it is."""
        return self._loaded.wait(timeout_seconds)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop following."""
        self._closing.set()
        if self._thread:
            self._thread.join()

    def _follow(self) -> None:
        while not self._closing.is_set():
            self.next(0.5)
