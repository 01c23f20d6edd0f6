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

Following never ends by itself. What goes wrong is counted and logged, and the loaded model serves:

    what goes wrong                              counted as     then
    ------------------------------------------   ------------   ------------------------------------
    the source cannot be read                    `source`       it is read again, each second
    a pointer that is none, or is not signed     `pointer`      the next one is awaited
    a snapshot that is not there (yet), does     `snapshot`     it is tried again, less and less
      not verify, or cannot be built                            often, until a newer one is loaded
    `on_snapshot` raises                         `on_snapshot`  the model serves
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args, overload

import numpy as np
import numpy.typing as npt

from stream_ctr import extensions
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.events.feature_rows import OnInvalid, Table
from stream_ctr.learn.runtimes import Runtime, choose_runtime
from stream_ctr.learn.spec import BLEND, EXPERTS, SYSTEMS
from stream_ctr.messages import nearest, one_line
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.lineage import require_run_id
from stream_ctr.snapshots.pointer import Pointer, require_description, require_signature
from stream_ctr.snapshots.pointer_sources import FilePointers, PointerSource
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import verifier

_log = logging.getLogger(__name__)
Follow = Literal["never", "replace"]
_FOLLOWS: tuple[str, ...] = get_args(Follow)
_NAMES = (BLEND, *SYSTEMS, *EXPERTS)
_SOURCE_RETRY_SECONDS = 1.0
_FIRST_RETRY_SECONDS = 1.0
_LAST_RETRY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a subscriber follows, and what it could not load.

    `following` is true until it is closed, and while its thread runs if it has one. `snapshot` is
    the name of the loaded one, and `loaded_seconds` how long ago it was loaded; `polled_seconds` is
    how long ago the source was last read without an error. `awaited` is the name of a newer
    snapshot that could not be loaded and is tried again, and `refusal` says why, or why the last
    pointer was ignored. `failures` counts what went wrong, see `subscriber`; `refused` counts the
    pointers of other runs.
    """

    following: bool
    snapshot: str | None
    loaded_seconds: float | None
    polled_seconds: float | None
    awaited: str | None
    refusal: str | None
    failures: Mapping[str, int]
    refused: Mapping[str, int]

    @property
    def ok(self) -> bool:
        """Whether the newest snapshot that is known is loaded, and newer ones are looked for."""
        return self.following and self.snapshot is not None and self.refusal is None


@dataclass(slots=True)
class _Awaited:
    """A snapshot that could not be loaded, and when it is tried again."""

    pointer: Pointer
    due: float
    wait_seconds: float


class Subscriber:
    """Predict with the newest published snapshot, which is replaced while calls go on.

    `source` is a state directory or a `PointerSource`. `run` is the id of the run to follow; by
    default it is the first that is loaded. With `run_file`, that run is kept in this file, and a
    later subscriber with the same file follows it. With `follow="replace"` a run that was told to
    replace the followed one is followed from then on; by default its pointers are refused. With
    `model`, an additional model serves instead of the published one, and snapshots without it are
    ignored with a warning. With `public_key`, a PEM file, snapshots without a signature by its
    private key are ignored. `device`, `runtime` and `on_invalid` are those of `Scorer`. `predict`
    raises `SnapshotError` before the first snapshot.

    Raises `ConfigError` for a `model` that no run can have, for a `run` or `run_file` that names no
    run, if the file cannot be read, and if the runtime is not installed.
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
        runtime: Runtime | None = None,
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
        self.runtime = choose_runtime(runtime, device=device)
        """The library that computes the network of a loaded model."""
        self._on_snapshot = on_snapshot
        self._on_invalid: OnInvalid = on_invalid
        self.invalid: Counter[str] = Counter()
        """What was scored as missing since the start, by reason; see `Scorer.invalid`."""
        self.pointer: Pointer | None = None
        """The pointer to the loaded snapshot."""
        self.path: Path | None = None
        """The directory of the loaded snapshot on this machine."""
        self.failures: Counter[str] = Counter()
        """What went wrong since the start, by what it concerned."""
        self._scorer: Scorer | None = None
        self._awaited: _Awaited | None = None
        self._refusals: dict[str, SnapshotError] = {}
        self._loaded_at: float | None = None
        self._polled_at: float | None = None
        self._loaded = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self, timeout_seconds: float) -> Pointer | None:
        """Load the next newer snapshot; return its pointer, or None if none came in time.

        Whatever is wrong with a source, a pointer or a snapshot raises nothing: it is counted, and
        `refusal` says what it is.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            wait_seconds = max(0.0, min(1.0, deadline - time.monotonic()))
            for pointer in self._candidates(wait_seconds):
                if self._load(pointer):
                    return pointer
            if time.monotonic() >= deadline or self._closing.is_set():
                return None

    @property
    def health(self) -> Health:
        """The present state of following, for a health check or a metric."""
        now = time.monotonic()
        return Health(
            following=not self.closing and (self._thread is None or self._thread.is_alive()),
            snapshot=self.pointer.snapshot if self.pointer else None,
            loaded_seconds=now - self._loaded_at if self._loaded_at is not None else None,
            polled_seconds=now - self._polled_at if self._polled_at is not None else None,
            awaited=self._awaited.pointer.snapshot if self._awaited else None,
            refusal=str(self.refusal) if self.refusal else None,
            failures=dict(self.failures),
            refused=dict(self.refused),
        )

    def _candidates(self, wait_seconds: float) -> list[Pointer]:
        """Return the pointers to load: those that arrive, then the one that is due again."""
        awaited = self._awaited
        if awaited:
            wait_seconds = max(0.0, min(wait_seconds, awaited.due - time.monotonic()))
        try:
            candidates = self._followed(self._pointers.poll(wait_seconds))
        except Exception as error:  # noqa: BLE001 - file systems, clients, sources of others
            self._refuse("source", "what is published", error)
            self._closing.wait(min(wait_seconds, _SOURCE_RETRY_SECONDS))
            candidates = []
        else:
            self._polled_at = time.monotonic()
            self._refusals.pop("source", None)
        if awaited and awaited is self._awaited and time.monotonic() >= awaited.due:
            candidates.append(awaited.pointer)
        return candidates

    def _followed(self, found: Iterable[Pointer | SnapshotError]) -> list[Pointer]:
        """Return the pointers of the followed run, or of one that replaces it; refuse the rest."""
        followed = []
        for each in found:
            try:
                pointer = self._require_pointer(each)
            except SnapshotError as error:
                self._refuse("pointer", "a pointer", error)
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
            self._refusals["run"] = error
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
            path = self._pointers.locate(pointer)
            scorer = Scorer(
                path,
                model=self._model,
                manifest_sha256=pointer.manifest_sha256,
                signature=self._signature,
                device=self._device,
                runtime=self.runtime,
                on_invalid=self._on_invalid,
                invalid=self.invalid,
            )
            require_description(pointer, scorer.manifest)
            self._keep_run(pointer.run)
        except Exception as error:  # noqa: BLE001 - a model may be that of others
            self._refuse("snapshot", f"snapshot {pointer.snapshot}", error)
            self._await(pointer)
            return False
        self._scorer = scorer
        self.path = path
        self.pointer = pointer
        self.run = pointer.run
        self._loaded_at = time.monotonic()
        if self._awaited and not self._replaces(self._awaited.pointer, pointer):
            self._awaited = None
        awaited = self._refusals.get("snapshot") if self._awaited else None
        self._refusals = {"snapshot": awaited} if awaited else {}
        self._loaded.set()
        if self._on_snapshot:
            try:
                self._on_snapshot(pointer)
            except Exception as error:  # noqa: BLE001 - the caller's own function
                self._refuse("on_snapshot", f"on_snapshot for {pointer.snapshot}", error)
        return True

    def _await(self, pointer: Pointer) -> None:
        """Try a snapshot again later, unless a newer one is awaited.

        Its directory may arrive after its pointer: where it is copied from another machine, or
        where a file system shows it late.
        """
        awaited = self._awaited
        wait_seconds = _FIRST_RETRY_SECONDS
        if awaited and awaited.pointer == pointer:
            wait_seconds = min(2 * awaited.wait_seconds, _LAST_RETRY_SECONDS)
        elif awaited and self._replaces(awaited.pointer, pointer):
            return
        self._awaited = _Awaited(pointer, time.monotonic() + wait_seconds, wait_seconds)

    def _replaces(self, newer: Pointer, pointer: Pointer) -> bool:
        """Return whether a subscriber that has loaded `pointer` would still load `newer`."""
        if newer.run == pointer.run:
            return newer.rank > pointer.rank
        return self._follow_replacements and pointer.run in newer.replaces

    def _keep_run(self, run: str) -> None:
        """Write the run into the file, before its model serves: a restart must not choose anew."""
        if self._run_file and run != self._kept:
            files.replace_durably(self._run_file, f"{run}\n".encode())
            self._kept = run

    def _require_pointer(self, found: Pointer | SnapshotError) -> Pointer:
        """Return a pointer. Raises `SnapshotError` if it is none, or lacks its signature."""
        if isinstance(found, SnapshotError):
            raise found
        if self._signature:
            require_signature(found, self._signature)
        return found

    @property
    def refusal(self) -> SnapshotError | None:
        """Why the source, the last pointer or snapshot cannot be read; None if all is well."""
        return next(reversed(self._refusals.values()), None)

    def _refuse(self, concerned: str, subject: str, error: Exception) -> None:
        """Count, log and keep an error; what is tried again is logged once.

        One of a newer version, and one that nobody expects, need an operator.
        """
        expected = isinstance(error, SnapshotError | OSError)
        reason = error if isinstance(error, SnapshotError) else SnapshotError(_described(error))
        said = concerned != "pointer" and str(self._refusals.pop(concerned, "")) == str(reason)
        self._refusals[concerned] = reason
        self.failures[concerned] += 1
        if not said:
            level = logging.WARNING
            if isinstance(error, NewerFormat) or not expected:
                level = logging.ERROR
            cause = None if expected else error
            _log.log(level, "ignored %s: %s", subject, reason, exc_info=cause)

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


def _described(error: Exception) -> str:
    text = one_line(error, 400)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
