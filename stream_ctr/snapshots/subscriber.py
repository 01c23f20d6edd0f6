"""Serving side: follow published snapshots, verify each before it is loaded, predict with the newest.

    with Subscriber("state") as model:
        model.wait(30)
        p = model.predict([{"app": "maps", "age": 31}])

A pointer names a snapshot directory and the SHA-256 of its manifest, which holds those of the files. A snapshot that does not verify,
or that is older than the one in use (by epoch, then by sequence), is refused and the one in use goes on serving.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.config import Features, Ftrl, Learn, Model
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field
from stream_ctr.learn.learner import make_learner, require_shapes
from stream_ctr.messages import nearest, one_line
from stream_ctr.models import MODELS
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.signing import PublicKey
from stream_ctr.snapshots.snapshot import Pointer

_log = logging.getLogger(__name__)
_FILE_POLL_SECONDS = 0.1
_LARGEST_BATCH = 1 << 20
_NAMES = (*MODELS, "ftrl")  # the latter is an `lr` that stands beside the others


class Scorer:
    """The model of one snapshot, ready to predict; with `model` one that was learned beside it.

    Raises `SnapshotError` when the snapshot does not verify or its tensors do not fit its manifest.
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
            files=lambda manifest: [_stem(manifest, model)],
            manifest_sha256=manifest_sha256,
            signature=signature,
        )
        (tensors,) = named.values()
        try:
            self.fields, hashing, learning = _described(self.manifest, model)
            self.hasher = Hasher(self.fields, **hashing)
            _require_bounds(tensors, learning)
            self.learner = make_learner(
                **learning, value_fields=self.hasher.value_fields, device=device, serving=True
            )
            self.learner.load_weights(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
            raise SnapshotError(
                f"snapshot {path} does not describe a model that this version can build: {one_line(error, 500)}"
            ) from None

    def predict(self, rows: Sequence[Mapping[str, object]]) -> npt.NDArray[np.float64]:
        """Click probabilities [n] of n impressions, each a mapping from field name to value; absent or None is missing."""
        columns = {
            field.name: pa.array([_text(row.get(field.name)) for row in rows], pa.string())
            if field.kind == "categorical"
            else pa.array([row.get(field.name) for row in rows], pa.float64())
            for field in self.fields
        }
        return self.predict_columns(columns)

    def predict_columns(self, features: Mapping[str, pa.Array]) -> npt.NDArray[np.float64]:
        """The same from columns: string arrays for categorical fields, float64 for numeric ones."""
        ids, values = self.hasher.rows(features)
        return metrics.probabilities(self.learner.predict(ids, values).astype(np.float64))


def _stem(manifest: Mapping[str, Any], model: str | None) -> str:
    """The file with the weights of `model`. Raises `SnapshotError` when there is none."""
    learner, beside = (
        part if isinstance(part, dict) else {}
        for part in (manifest.get("learner"), manifest.get("beside"))
    )
    if model is None or model == learner.get("model"):
        return snapshot.stems()[0]
    if model not in beside:
        there = ", ".join(one_line(str(name), 60) for name in (learner.get("model"), *beside))
        raise SnapshotError(f"the snapshot has no model {model!r:.80}; it has {there}")
    stem = snapshot.stems(model)[0]
    if snapshot.file_name(stem) not in manifest["files"]:
        raise SnapshotError(
            f"the snapshot was taken without the model {model!r:.80}, which had diverged"
        )
    return stem


def _described(
    manifest: Mapping[str, Any], model_name: str | None
) -> tuple[tuple[Field, ...], dict[str, Any], dict[str, Any]]:
    """Fields, and options of `Hasher` and of the learner of `model_name`, within the bounds of a configuration: whoever wrote the manifest
    may be nobody's run.

    Raises KeyError, TypeError or ValueError where they are not.
    """
    schema, learner = dict(manifest["schema"]), dict(manifest["learner"])
    if model_name is not None and model_name != learner["model"]:
        learner = dict(manifest["beside"][model_name])
    kinds = {
        kind: [name for name, its_kind in schema["fields"] if its_kind == kind]
        for kind in ("categorical", "numeric")
    }
    del schema["fields"]
    bits = schema.pop("table_bits")
    section = Features(**schema, **kinds)
    fields = tuple(Field(name, kind) for name, kind in manifest["schema"]["fields"])
    if len(fields) != len(section.fields()) or learner.pop("fields") != len(fields):
        raise ValueError("its fields do not agree")
    if learner.pop("crosses", 0) != len(section.crosses):
        raise ValueError("its cross products do not agree")
    learner.pop("value_fields")  # they follow from the fields
    of_model = {name: learner.pop(name) for name in list(learner) if name in Model.model_fields}
    model = Model(**of_model, name=learner.pop("model"))
    rates = (
        {"ftrl": Ftrl(**learner.pop("ftrl")).model_dump(exclude={"enabled"})}
        if model.name == "lr"
        else {}
    )
    if model.table_bits != bits:
        raise ValueError(f"its table has 2^{model.table_bits} rows, its hashes reach 2^{bits}")
    return (
        fields,
        {"table_bits": model.table_bits, **section.model_dump(exclude={"categorical", "numeric"})},
        {
            "model": model.name,
            "fields": len(fields),
            "crosses": len(section.crosses),
            **model.model_dump(exclude={"name", "beside"}),
            **rates,
            **Learn(**learner).model_dump(exclude={"device", "threads", "skips_before_rollback"}),
        },
    )


def _require_bounds(
    weights: Mapping[str, npt.NDArray[np.generic]], learning: Mapping[str, Any]
) -> None:
    """Before memory is taken for a model that a manifest only claims."""
    if learning["batch_size"] > _LARGEST_BATCH:
        raise ValueError(f"a batch of {learning['batch_size']}")
    require_shapes(weights, **learning)


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def verifier(public_key: str | Path | None) -> snapshot.Verify | None:
    """What accepts the signatures of the key in this PEM file. Raises `ConfigError` when it cannot be read."""
    return PublicKey(Path(public_key)).verify if public_key is not None else None


class Pointers(Protocol):
    """Where pointers come from."""

    def poll(self, timeout_seconds: float) -> list[Pointer]: ...


class FilePointers:
    """`latest.json` in a state directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "latest.json"
        self._seen: tuple[int, int] | None = None

    def poll(self, timeout_seconds: float) -> list[Pointer]:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                status = None
            if status and (status.st_mtime_ns, status.st_ino) != self._seen:
                self._seen = (status.st_mtime_ns, status.st_ino)
                pointer = snapshot.read_pointer(self._path)
                return [pointer] if pointer else []
            if time.monotonic() >= deadline:
                return []
            time.sleep(_FILE_POLL_SECONDS)


class TopicPointers:
    """The snapshot topic. `reader.poll(seconds)` yields (key, value) pairs of a compacted topic, value None for a withdrawn pointer."""

    def __init__(self, reader: Any, *, model_name: str = "default") -> None:
        self._reader, self._model_name = reader, model_name

    def poll(self, timeout_seconds: float) -> list[Pointer]:
        pointers = []
        for key, value in self._reader.poll(timeout_seconds):
            if key != self._model_name:
                continue
            if value is None:
                _log.warning(
                    "the pointer of model %r was withdrawn; the snapshot in use stays", key
                )
                continue
            try:
                pointers.append(snapshot.verify_pointer(json.loads(value)))
            except (ValueError, SnapshotError) as error:
                _log.warning("ignored a pointer of model %r: %s", key, error)
        # Only the newest counts, which a trainer that was taken over may have written before an older one of its own.
        return sorted(
            pointers, key=lambda pointer: (pointer["epoch"], pointer["sequence"]), reverse=True
        )


class Subscriber:
    """Predicts with the newest published snapshot, swapped in whole while calls go on; with `model` by one that is learned beside.

    `source` is a state directory, or anything with `poll` like `TopicPointers`. With `public_key`, a PEM file, snapshots that are not
    signed with its private key are refused. `predict` raises `SnapshotError` before the first one. A `model` that no run can have is a
    `ConfigError`; snapshots that were taken without it are passed over, with a warning.
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
        self._model, self._device, self._on_snapshot = model, device, on_snapshot
        self.pointer: Pointer | None = None
        self._scorer: Scorer | None = None
        self._loaded, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def next(self, timeout_seconds: float) -> Pointer | None:
        """Wait for a newer snapshot, load it, and return its pointer; None when none came in time."""
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
            _log.warning("ignored a pointer: %s", error)
            return []

    def _load(self, pointer: Pointer) -> bool:
        if self.pointer and (pointer["epoch"], pointer["sequence"]) < (
            self.pointer["epoch"],
            self.pointer["sequence"],
        ):
            _log.warning(
                "ignored snapshot %s of epoch %d: older than the one in use",
                pointer["snapshot"],
                pointer["epoch"],
            )
            return False
        try:
            self._scorer = Scorer(
                Path(pointer["path"]), model=self._model, manifest_sha256=pointer["manifest_sha256"], signature=self._signature,
                device=self._device,
            )  # fmt: skip
        except SnapshotError as error:
            _log.warning("ignored snapshot %s: %s", pointer["snapshot"], error)
            return False
        self.pointer = pointer
        self._loaded.set()
        if self._on_snapshot:
            self._on_snapshot(pointer)
        return True

    @property
    def scorer(self) -> Scorer:
        if self._scorer is None:
            raise SnapshotError("no snapshot was published yet; wait(seconds) waits for the first")
        return self._scorer

    def predict(self, rows: Sequence[Mapping[str, object]]) -> npt.NDArray[np.float64]:
        """See `Scorer.predict`."""
        return self.scorer.predict(rows)

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Until the first snapshot is loaded; whether it is."""
        return self._loaded.wait(timeout_seconds)

    def __enter__(self) -> Subscriber:
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closing.set()
        if self._thread:
            self._thread.join()

    def _follow(self) -> None:
        while not self._closing.is_set():
            self.next(0.5)
