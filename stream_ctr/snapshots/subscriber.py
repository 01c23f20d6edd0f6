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

Between two snapshots the model follows deltas, the rows that learning has touched meanwhile, where
the run writes them (see `followed_deltas`). A snapshot that the model has come past by deltas is
adopted: it is the published one from then on, and is not loaded.

Following never ends by itself. What goes wrong is counted and logged, and the loaded model serves:

    what goes wrong                              counted as     then
    ------------------------------------------   ------------   ------------------------------------
    the source cannot be read                    `source`       it is read again, each second
    a pointer that is none, or is not signed     `pointer`      the next one is awaited
    a snapshot that is not there (yet), does     `snapshot`     it is tried again, less and less
      not verify, or cannot be built                            often, until a newer one is loaded
    `on_snapshot` raises                         `on_snapshot`  the model serves
    `on_delta` raises                            `on_delta`     the model serves
    a delta that is not applied                  `delta_*`      see `followed_deltas`
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, overload

import numpy as np
import numpy.typing as npt

from stream_ctr import extensions
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.events.feature_rows import OnInvalid, Table
from stream_ctr.learn.runtimes import Runtime, choose_runtime
from stream_ctr.learn.spec import BLEND, EXPERTS, SYSTEMS
from stream_ctr.messages import nearest, one_line
from stream_ctr.snapshots import files
from stream_ctr.snapshots.cache import SnapshotCache, default_cache
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.delays import Delays
from stream_ctr.snapshots.delta_sources import DeltaSource, FileDeltas
from stream_ctr.snapshots.followed_deltas import AppliedDelta, FollowedDeltas
from stream_ctr.snapshots.lineage import require_run_id
from stream_ctr.snapshots.places import local_directory, open_place
from stream_ctr.snapshots.pointer import Pointer, require_description, require_signature
from stream_ctr.snapshots.pointer_sources import FilePointers, PointerSource
from stream_ctr.snapshots.remote import PlaceDeltas, UrlPointers, served_files
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import verifier

_log = logging.getLogger(__name__)
Follow = Literal["never", "replace"]
_FOLLOWS: tuple[str, ...] = get_args(Follow)
_NAMES = (BLEND, *SYSTEMS, *EXPERTS)
_SOURCE_RETRY_SECONDS = 1.0
_FIRST_RETRY_SECONDS = 1.0
_LAST_RETRY_SECONDS = 60.0
_DELTA_WAIT_SECONDS = 0.1
_ABSORB_WAIT_SECONDS = 0.02  # predictions that began with the model before take milliseconds
_EXPECTED_SECONDS = 5.0  # that deltas may take to lead to a snapshot, before it is loaded


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a subscriber follows, and what it could not load.

    `following` is true until it is closed, and while its thread runs if it has one. `snapshot` is
    the name of the loaded one, and `loaded_seconds` how long ago it was loaded; `polled_seconds` is
    how long ago the source was last read without an error. `awaited` is the name of a newer
    snapshot that could not be loaded and is tried again, and `refusal` says why, or why the last
    pointer was ignored. `failures` counts what went wrong, see `subscriber`; `refused` counts the
    pointers of other runs.

    `delta` is the name of the last delta in the loaded model, None without any, and `deltas` counts
    those that were applied, the last one `delta_seconds` ago. `behind` says why deltas that come
    are not applied now.
    """

    following: bool
    snapshot: str | None
    loaded_seconds: float | None
    polled_seconds: float | None
    awaited: str | None
    refusal: str | None
    failures: Mapping[str, int]
    refused: Mapping[str, int]
    delta: str | None = None
    deltas: int = 0
    delta_seconds: float | None = None
    behind: str | None = None

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

    `source` is a state directory, a URL (see `places`) or a `PointerSource`. Files at a URL are
    downloaded to the folder `cache`, by default one in the user's cache directory.

    `run` is the id of the run to follow; by default it is the first that is loaded. With
    `run_file`, that run is kept in this file, and a later subscriber with the same file follows it.
    With `follow="replace"` a run that was told to replace the followed one is followed from then
    on; by default its pointers are refused. With `model`, an additional model serves instead of the
    published one, and snapshots without it are ignored with a warning. With `public_key`, a PEM
    file, snapshots without a signature by its private key are ignored. `device`, `runtime` and
    `on_invalid` are those of `Scorer`. `predict` raises `SnapshotError` before the first snapshot.

    `deltas` are followed between snapshots: by default those of the directory or URL, with False
    none. With another `source` they are followed where they are given. A model on a GPU follows
    snapshots only. `on_snapshot` is called for each snapshot that is loaded or adopted, `on_delta`
    for each delta that was applied, both by the thread that follows.

    Raises `ConfigError` for a `model` that no run can have, for a `run` or `run_file` that names no
    run, if the file cannot be read, if the runtime is not installed, and if the URL cannot be
    opened.
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
        deltas: DeltaSource | bool = True,
        on_delta: Callable[[AppliedDelta], None] | None = None,
        cache: str | Path | None = None,
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
        self._model = model
        self._device = device
        self.runtime = choose_runtime(runtime, device=device)
        """The library that computes the network of a loaded model."""
        self._pointers, deltas_there = self._sources(source, cache)
        self._on_snapshot = on_snapshot
        self._on_delta = on_delta
        self._on_invalid: OnInvalid = on_invalid
        self.invalid: Counter[str] = Counter()
        """What was scored as missing since the start, by reason; see `Scorer.invalid`."""
        self.pointer: Pointer | None = None
        """The pointer to the newest snapshot that is loaded or adopted."""
        self.path: Path | None = None
        """The directory of the loaded snapshot on this machine."""
        self.failures: Counter[str] = Counter()
        """What went wrong since the start, by what it concerned."""
        chosen = (deltas_there if deltas else None) if isinstance(deltas, bool) else deltas
        self.deltas = FollowedDeltas(chosen, self.failures)
        """The deltas that are followed."""
        self.adopted = False
        """Whether the snapshot of `pointer` was adopted, not loaded."""
        self.delays: Delays | None = None
        """The age of the model when the last snapshot or delta was loaded."""
        self._scorer: Scorer | None = None
        self._awaited: _Awaited | None = None
        self._expected: tuple[Pointer, float] | None = None
        self._source_due = 0.0
        self._absorbed = True
        self._refusals: dict[str, SnapshotError] = {}
        self._loaded_at: float | None = None
        self._polled_at: float | None = None
        self._loaded = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def _sources(
        self, source: str | Path | PointerSource, cache: str | Path | None
    ) -> tuple[PointerSource, DeltaSource | None]:
        """Return the source of pointers, and that of the deltas beside them."""
        if not isinstance(source, (str, Path)):
            return source, None
        directory = local_directory(source)
        if directory is not None:
            return FilePointers(directory), FileDeltas(directory, signature=self._signature)
        kept = SnapshotCache(
            Path(cache) if cache is not None else default_cache(),
            served_files(self._model, self.runtime),
            signature=self._signature,
        )
        place = open_place(source)
        return UrlPointers(place, kept), PlaceDeltas(place, signature=self._signature)

    def next(self, timeout_seconds: float) -> Pointer | None:
        """Load the next newer snapshot; return its pointer, or None if none came in time.

        Deltas that come meanwhile are applied. A snapshot that they have led past is adopted, and
        its pointer is returned too. Whatever is wrong with a source, a pointer, a snapshot or a
        delta raises nothing: it is counted, and `refusal` and `health` say what it is.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            wait_seconds = max(0.0, min(1.0, deadline - time.monotonic()))
            deltas = self._follows_deltas
            candidates = self._candidates(0.0 if deltas else wait_seconds)
            if deltas:
                self._advance(0.0 if candidates else wait_seconds)
                candidates += self._due()
            for pointer in candidates:
                if self._take(pointer):
                    return pointer
            if time.monotonic() >= deadline or self._closing.is_set():
                return None

    @property
    def _follows_deltas(self) -> bool:
        return self.deltas.active and self._scorer is not None

    def _advance(self, wait_seconds: float) -> None:
        """Apply the deltas that follow, after at most `wait_seconds`."""
        if not self._absorbed:
            self._absorbed = self.scorer.absorb()
        most = _DELTA_WAIT_SECONDS if self._absorbed else _ABSORB_WAIT_SECONDS
        for scorer, applied in self.deltas.advance(self.scorer, min(wait_seconds, most)):
            self._scorer = scorer
            self._absorbed = scorer.absorb()
            self.delays = applied.delays
            self._call("on_delta", applied.header.rank.name, self._on_delta, applied)

    def _due(self) -> list[Pointer]:
        """Return the pointers that are loaded now because of what deltas did."""
        retried = self._awaited.pointer if self._awaited else None
        if self.pointer and self.pointer != retried and self.deltas.leads_back(self.pointer):
            return [self.pointer]
        if self._expected is None:
            return []
        pointer, due = self._expected
        return [] if self.deltas.expect(pointer) and time.monotonic() < due else [pointer]

    def _take(self, pointer: Pointer) -> bool:
        """Load the snapshot, adopt it, or leave it to the deltas that lead to it.

        Return whether it was loaded or adopted.
        """
        if self._is_older(pointer):
            return False
        if self._scorer and self.deltas.adopt(pointer):
            self._scorer = self._scorer.following(pointer.snapshot)
            self._settle(pointer, adopted=True)
            return True
        return not self._expects(pointer) and self._load(pointer)

    def _expects(self, pointer: Pointer) -> bool:
        """Return whether deltas may still lead to this snapshot; it is looked at again later."""
        now = time.monotonic()
        due = self._expected[1] if self._expected else now + _EXPECTED_SECONDS
        expected = now < due and self.deltas.expect(pointer)
        self._expected = (pointer, due) if expected else None
        return expected

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
            delta=self.deltas.rank.name if self.deltas.rank else None,
            deltas=self.deltas.applied,
            delta_seconds=now - self.deltas.applied_at if self.deltas.applied_at else None,
            behind=self.deltas.behind,
        )

    def _candidates(self, wait_seconds: float) -> list[Pointer]:
        """Return the pointers to load: those that arrive, then the one that is due again."""
        awaited = self._awaited
        if awaited:
            wait_seconds = max(0.0, min(wait_seconds, awaited.due - time.monotonic()))
        candidates: list[Pointer] = []
        try:
            if time.monotonic() >= self._source_due:
                candidates = self._followed(self._pointers.poll(wait_seconds))
                self._polled_at = time.monotonic()
                self._refusals.pop("source", None)
        except Exception as error:  # noqa: BLE001 - file systems, clients, sources of others
            self._refuse("source", "what is published", error)
            if self._follows_deltas:
                self._source_due = time.monotonic() + _SOURCE_RETRY_SECONDS
            else:
                self._closing.wait(min(wait_seconds, _SOURCE_RETRY_SECONDS))
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

    def _is_older(self, pointer: Pointer) -> bool:
        loaded = self.pointer
        if not loaded or pointer.run != loaded.run or pointer.rank >= loaded.rank:
            return False
        _log.warning(
            "ignored snapshot %s of epoch %d: older than the loaded one",
            pointer.snapshot,
            pointer.epoch,
        )
        return True

    def _load(self, pointer: Pointer) -> bool:
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
        self._absorbed = True
        self.path = path
        self.deltas.begin(pointer, scorer.manifest)
        self.delays = Delays.of_snapshot(pointer, 1000 * time.time())
        self._settle(pointer, adopted=False)
        return True

    def _settle(self, pointer: Pointer, *, adopted: bool) -> None:
        """Go on from a snapshot that was loaded or adopted."""
        self.pointer = pointer
        self.adopted = adopted
        self.run = pointer.run
        self._loaded_at = time.monotonic()
        self._expected = None
        if self._awaited and not self._replaces(self._awaited.pointer, pointer):
            self._awaited = None
        awaited = self._refusals.get("snapshot") if self._awaited else None
        self._refusals = {"snapshot": awaited} if awaited else {}
        self._loaded.set()
        self._call("on_snapshot", pointer.snapshot, self._on_snapshot, pointer)

    def _call(
        self, name: str, subject: str, told: Callable[[Any], None] | None, news: object
    ) -> None:
        """Call a function of the caller, if there is one."""
        if told is None:
            return
        try:
            told(news)
        except Exception as error:  # noqa: BLE001 - the caller's own function
            self._refuse(name, f"{name} for {subject}", error)

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
        """Stop following, and end a download."""
        self._closing.set()
        if close := getattr(self._pointers, "close", None):
            close()
        if self._thread:
            self._thread.join()
            self.deltas.close()

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
