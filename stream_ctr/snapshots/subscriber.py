"""Serving: follow published snapshots, verify each before it is loaded, predict with the newest.

    with Subscriber("state") as model:
        model.wait(30)
        p = model.predict([{"app": "maps", "age": 31}])

A pointer names a snapshot directory and the SHA-256 of its manifest, which holds those of the
files. A snapshot that does not verify, or that is older than the loaded one (by epoch, then by
sequence), is refused, and the loaded one continues to serve.

A subscriber stays on the run that it loaded first:

    the pointer is of             `follow="never"`     `follow="replace"`
    ---------------------------   ------------------   ------------------
    the run that it follows       loaded if newer      loaded if newer
    a run that replaces that one  refused              loaded
    any other run                 refused              refused

The run that it follows is `run`, else the one in `run_file`, else the one that holds the name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, get_args, overload

import numpy as np
import numpy.typing as npt

from stream_ctr import extensions
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.events.feature_rows import OnInvalid, Table
from stream_ctr.learn.spec import BLEND, EXPERTS
from stream_ctr.messages import nearest
from stream_ctr.models import MODELS
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.lineage import require_run_id
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.pointer_sources import FilePointers, PointerSource
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import verifier

_log = logging.getLogger(__name__)
Follow = Literal["never", "replace"]
_FOLLOWS: tuple[str, ...] = get_args(Follow)
_NAMES = (BLEND, *MODELS, *EXPERTS)


class Subscriber:
    """Predict with the newest published snapshot, which is replaced while calls go on.

    `source` is a state directory or a `PointerSource`. `run` is the id of the run to follow; by
    default it is the first that is loaded. With `run_file`, that run is kept in this file, and a
    later subscriber with the same file follows it. With `follow="replace"` a run that was told to
    replace the followed one is followed from then on; by default its pointers are refused. With
    `model`, an additional model serves instead of the published one, and snapshots without it are
    ignored with a warning. With `public_key`, a PEM file, snapshots without a signature by its
    private key are ignored. `on_invalid` is that of `Scorer`. `predict` raises `SnapshotError`
    before the first snapshot.

    Raises `ConfigError` for a `model` that no run can have, for a `run` or `run_file` that names no
    run, and if the file cannot be read.
    """

    def __init__(
        self,
        source: str | Path | PointerSource,
        *,
        model: str | None = None,
        run: str | None = None,
        run_file: str | Path | None = None,
        follow: Follow = "never",
        device: str = "cpu",
        public_key: str | Path | None = None,
        on_snapshot: Callable[[Pointer], None] | None = None,
        on_invalid: OnInvalid = "error",
    ) -> None:
        known = (*_NAMES, *extensions.names())
        if model is not None and model not in known and not extensions.is_import_path(model):
            raise ConfigError(f"there is no model {model!r:.80}{nearest(model, known)}")
        if follow not in _FOLLOWS:
            raise ConfigError(f"follow is one of {', '.join(_FOLLOWS)}, got {follow!r:.80}")
        self._run_file = Path(run_file) if run_file is not None else None
        self._kept = _kept_run(self._run_file)
        self.run: str | None = _run_id(run) if run is not None else self._kept
        """The id of the run that is followed, None before the first snapshot."""
        self.refused: Counter[str] = Counter()
        """The number of pointers that were refused, by the run that they are of."""
        self._follow_replacements = follow == "replace"
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
            for pointer in self._followed(self._pointers.poll(wait_seconds)):
                if self._load(pointer):
                    return pointer
            if time.monotonic() >= deadline or self._closing.is_set():
                return None

    def _followed(self, found: Iterable[Pointer | SnapshotError]) -> list[Pointer]:
        """Return the pointers of the followed run, or of one that replaces it; refuse the rest."""
        followed = []
        for pointer in found:
            if isinstance(pointer, SnapshotError):
                self._refuse("a pointer", pointer)
                continue
            run = self.run or self._pointers.holder
            if pointer.run == run or (self._follow_replacements and run in pointer.replaces):
                followed.append(pointer)
            else:
                self._refuse_run(pointer, run)
        return followed

    def _refuse_run(self, pointer: Pointer, run: str | None) -> None:
        """Count a pointer of another run, and say once what to do."""
        self.refused[pointer.run] += 1
        how = f"start a subscriber with --run {pointer.run}"
        if run is None:
            relation = "holds the name no more, because it was withdrawn"
        elif run in pointer.replaces:
            relation = f"replaces run {run}, the one that is followed"
            how += " or with --follow replace"
        else:
            relation = f"is not run {run}, the one that is followed"
        error = SnapshotError(
            f"snapshot {pointer.snapshot} is of run {pointer.run}, which {relation}. "
            f"To serve it, {how}"
        )
        if self.pointer is None:
            self.refusal = error
        if self.refused[pointer.run] == 1:
            _log.warning("ignored: %s", error)

    def _load(self, pointer: Pointer) -> bool:
        loaded = self.pointer
        if loaded and pointer.run == loaded.run and pointer.rank < loaded.rank:
            _log.warning(
                "ignored snapshot %s of epoch %d: older than the loaded one",
                pointer.snapshot,
                pointer.epoch,
            )
            return False
        try:
            scorer = Scorer(
                Path(pointer.path),
                model=self._model,
                manifest_sha256=pointer.manifest_sha256,
                signature=self._signature,
                device=self._device,
                on_invalid=self._on_invalid,
                invalid=self.invalid,
            )
            if scorer.manifest.run != pointer.run:
                raise SnapshotError(
                    f"it is of run {scorer.manifest.run}, its pointer says {pointer.run}"
                )
            self._keep_run(pointer.run)
        except SnapshotError as error:
            self._refuse(f"snapshot {pointer.snapshot}", error)
            return False
        self._scorer = scorer
        self.pointer = pointer
        self.run = pointer.run
        self.refusal = None
        self._loaded.set()
        if self._on_snapshot:
            self._on_snapshot(pointer)
        return True

    def _keep_run(self, run: str) -> None:
        """Write the run into the file, before its model serves: a restart must not choose anew."""
        if self._run_file and run != self._kept:
            files.replace_durably(self._run_file, f"{run}\n".encode())
            self._kept = run

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


def _run_id(text: str) -> str:
    try:
        return require_run_id(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _kept_run(path: Path | None) -> str | None:
    """Return the run in this file, or None if there is no file yet."""
    if path is None:
        return None
    try:
        return _run_id(path.read_text().strip())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read the run in {path}: {error.strerror}") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} does not hold a run: {error}") from None
