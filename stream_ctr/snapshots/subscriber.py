"""Serving: follow published snapshots, verify each before it is loaded, predict with the newest.

    with Subscriber("state") as model:
        model.wait(30)
        p = model.predict([{"app": "maps", "age": 31}])

A pointer names a snapshot directory and the SHA-256 of its manifest, which holds those of the
files. A snapshot that does not verify, or that is older than the loaded one (by epoch, then by
sequence), is refused, and the loaded one goes on serving.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.events.features import Hasher
from stream_ctr.learn.learner import make_learner, require_shapes
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.messages import nearest, one_line
from stream_ctr.models import MODELS
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import Pointer, decode_pointer, read_pointer
from stream_ctr.snapshots.signing import PublicKey

_log = logging.getLogger(__name__)
_FILE_POLL_SECONDS = 0.1
_LARGEST_BATCH = 1 << 20
_NAMES = (*MODELS, "ftrl")  # `ftrl` is an `lr` beside the other models


class Scorer:
    """The model of one snapshot, ready to predict: the published one, or the additional `model`.

    Raises `SnapshotError` if the snapshot does not verify, or if its tensors do not fit its
    manifest.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: str | None = None,
        manifest_sha256: str | None = None,
        signature: snapshot.Verify | None = None,
        device: str = "cpu",
    ) -> None:
        self.manifest, named = snapshot.load(
            path,
            stems=lambda manifest: [_stem(manifest, model)],
            manifest_sha256=manifest_sha256,
            signature=signature,
        )
        (tensors,) = named.values()
        self.fields = self.manifest.schema.fields
        spec = self.manifest.spec(model)
        try:
            self.hasher = Hasher(**msgspec.structs.asdict(self.manifest.schema))
            _require_bounds(tensors, spec)
            self.learner = make_learner(spec, device=device, serving=True)
            self.learner.load_weights(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
            raise SnapshotError(
                f"snapshot {path} does not describe a model that this version can build: "
                f"{one_line(error, 500)}"
            ) from None

    def predict(self, rows: Sequence[Mapping[str, object]]) -> npt.NDArray[np.float64]:
        """Return the click probabilities [n] of n impressions.

        Each impression maps field names to values. An absent value or None is missing.
        """
        columns = {
            field.name: pa.array([_text(row.get(field.name)) for row in rows], pa.string())
            if field.kind == "categorical"
            else pa.array([row.get(field.name) for row in rows], pa.float64())
            for field in self.fields
        }
        return self.predict_columns(columns)

    def predict_columns(self, features: Mapping[str, pa.Array]) -> npt.NDArray[np.float64]:
        """Return the same from columns: strings for categorical fields, float64 for numeric ones."""
        ids, values = self.hasher.rows(features)
        return metrics.probabilities(self.learner.predict(ids, values).astype(np.float64))


def _stem(manifest: Manifest, model: str | None) -> str:
    """Return the stem of the file with the weights of `model`."""
    if model is None or model == manifest.learner.model:
        return snapshot.stems()[0]
    if model not in manifest.beside:
        present = ", ".join(
            one_line(name, 60) for name in (manifest.learner.model, *manifest.beside)
        )
        raise SnapshotError(f"the snapshot has no model {model!r:.80}; it has {present}")
    stem = snapshot.stems(model)[0]
    if snapshot.file_name(stem) not in manifest.files:
        raise SnapshotError(
            f"the snapshot was taken without the model {model!r:.80}, which had diverged"
        )
    return stem


def _require_bounds(weights: Mapping[str, npt.NDArray[np.generic]], spec: LearnerSpec) -> None:
    """Check a claimed model before memory is taken for it."""
    if spec.batch_size > _LARGEST_BATCH:
        raise ValueError(f"a batch of {spec.batch_size}")
    require_shapes(weights, spec)


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def verifier(public_key: str | Path | None) -> snapshot.Verify | None:
    """Return the check for signatures of the key in this PEM file, or None without a file.

    Raises `ConfigError` if the file cannot be read.
    """
    return PublicKey(Path(public_key)).verify if public_key is not None else None


class Pointers(Protocol):
    """A source of pointers."""

    def poll(self, timeout_seconds: float) -> list[Pointer]: ...


class FilePointers:
    """The pointers that appear in `latest.json` of a state directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "latest.json"
        self._seen: tuple[int, int] | None = None

    def poll(self, timeout_seconds: float) -> list[Pointer]:
        """Return the pointer if it changed, after at most `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                status = None
            if status and (status.st_mtime_ns, status.st_ino) != self._seen:
                self._seen = (status.st_mtime_ns, status.st_ino)
                pointer = read_pointer(self._path)
                return [pointer] if pointer else []
            if time.monotonic() >= deadline:
                return []
            time.sleep(_FILE_POLL_SECONDS)


class TopicPointers:
    """The pointers of one model on the snapshot topic.

    `reader.poll(seconds)` returns (key, value) pairs of a compacted topic; the value None
    withdraws a pointer.
    """

    def __init__(self, reader: Any, *, model_name: str = "default") -> None:
        self._reader = reader
        self._model_name = model_name

    def poll(self, timeout_seconds: float) -> list[Pointer]:
        """Return the pointers that arrived, newest first."""
        pointers = []
        for key, value in self._reader.poll(timeout_seconds):
            if key != self._model_name:
                continue
            if value is None:
                _log.warning("the pointer of model %r was withdrawn; the loaded one stays", key)
                continue
            try:
                pointers.append(decode_pointer(value))
            except SnapshotError as error:
                _log_refusal(f"ignored a pointer of model {key!r}", error)
        # Only the newest counts. A trainer that was taken over may have written one of its own
        # after it.
        return sorted(pointers, key=lambda pointer: pointer.rank, reverse=True)


class Subscriber:
    """Predict with the newest published snapshot, which is swapped in whole while calls go on.

    `source` is a state directory, or anything with a `poll` like that of `TopicPointers`. With
    `model`, an additional model serves instead of the published one; snapshots without it are
    passed over with a warning. With `public_key`, a PEM file, snapshots without a signature by its
    private key are refused. `predict` raises `SnapshotError` before the first snapshot.

    Raises `ConfigError` for a `model` that no run can have.
    """

    def __init__(
        self,
        source: str | Path | Pointers,
        *,
        model: str | None = None,
        device: str = "cpu",
        public_key: str | Path | None = None,
        on_snapshot: Callable[[Pointer], None] | None = None,
    ) -> None:
        if model is not None and model not in _NAMES:
            raise ConfigError(f"there is no model {model!r:.80}{nearest(model, _NAMES)}")
        self._signature = verifier(public_key)
        self._pointers: Pointers = (
            FilePointers(Path(source)) if isinstance(source, (str, Path)) else source
        )
        self._model = model
        self._device = device
        self._on_snapshot = on_snapshot
        self.pointer: Pointer | None = None
        self._scorer: Scorer | None = None
        self._loaded = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self, timeout_seconds: float) -> Pointer | None:
        """Wait for a newer snapshot and load it; return its pointer, or None if none came in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            for pointer in self._poll(max(0.0, min(1.0, deadline - time.monotonic()))):
                if self._load(pointer):
                    return pointer
            if time.monotonic() >= deadline or self._closing.is_set():
                return None

    def _poll(self, timeout_seconds: float) -> list[Pointer]:
        try:
            return self._pointers.poll(timeout_seconds)
        except SnapshotError as error:
            _log_refusal("ignored a pointer", error)
            return []

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
            )
        except SnapshotError as error:
            _log_refusal(f"ignored snapshot {pointer.snapshot}", error)
            return False
        self.pointer = pointer
        self._loaded.set()
        if self._on_snapshot:
            self._on_snapshot(pointer)
        return True

    @property
    def scorer(self) -> Scorer:
        """The loaded model. Raises `SnapshotError` before the first snapshot."""
        if self._scorer is None:
            raise SnapshotError("no snapshot was published yet; wait(seconds) waits for the first")
        return self._scorer

    def predict(self, rows: Sequence[Mapping[str, object]]) -> npt.NDArray[np.float64]:
        """Return click probabilities; see `Scorer.predict`."""
        return self.scorer.predict(rows)

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
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


def _log_refusal(subject: str, error: SnapshotError) -> None:
    """Log a refused snapshot or pointer; one of a newer version needs an operator."""
    level = logging.ERROR if isinstance(error, NewerFormat) else logging.WARNING
    _log.log(level, "%s: %s", subject, error)
