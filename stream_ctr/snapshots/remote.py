"""The files of a run, read at a place on another machine: pointers, snapshots and deltas.

    URL/latest.json              the pointer, read each second
    URL/snapshots/NAME/...       what serving needs of a snapshot, downloaded into a cache
    URL/deltas/index.json, ...   deltas, read as they are listed

This is the layout of a state directory, and of its mirror (see `mirror`). Everything that is read
is checked as it is in a state directory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.learn.runtimes import Runtime
from stream_ctr.messages import one_line
from stream_ctr.snapshots import files, snapshot
from stream_ctr.snapshots.base_topic import Scan, TopicPlace, topic_of
from stream_ctr.snapshots.cache import Needed, SnapshotCache
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.delta import (
    LARGEST_HEADER_BYTES,
    Delta,
    DeltaRank,
    decode_header,
    header_sha256,
    verified,
)
from stream_ctr.snapshots.delta_sources import POLL_BYTES, NotReadable
from stream_ctr.snapshots.delta_store import (
    FOLDER,
    INDEX,
    LARGEST_INDEX_BYTES,
    DeltaEntry,
    DeltaIndex,
    decode_index,
    header_name,
    payload_name,
)
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.places import Place, Unreachable, open_place
from stream_ctr.snapshots.pointer import Pointer, decode_pointer
from stream_ctr.snapshots.scorer import served_stems

POINTER = "latest.json"
_POINTER_SECONDS = 1.0
_INDEX_SECONDS = 0.25
_RETRY_SECONDS = 1.0
_SLEEP_SECONDS = 0.02


def served_files(model: str | None, runtime: Runtime) -> Needed:
    """Return the function that names the files which serving needs of a snapshot.

    They are the weights of `model`, by default the published one, and with the runtime onnx the
    graphs of its networks where the snapshot has them.
    """

    def needed(manifest: Manifest) -> list[str]:
        stems = served_stems(manifest, model)
        graphs = [snapshot.graph_name(stem) for stem in stems] if runtime == "onnx" else []
        return [
            *(name for stem in stems for name in snapshot.file_names(manifest, stem)),
            *(name for name in graphs if name in manifest.files),
        ]

    return needed


class Downloads:
    """Snapshots that are not on this machine, downloaded to a cache.

    They are at `place`, or where their pointers say. `scan` opens a consumer of a topic, for
    pointers to one.
    """

    def __init__(
        self,
        cache: SnapshotCache,
        *,
        place: Place | None = None,
        scan: Callable[[str], Scan] | None = None,
    ) -> None:
        self._cache = cache
        self._given = place
        self._scan = scan
        self._places: dict[str, Place] = {}

    def __call__(self, pointer: Pointer) -> Path:
        """Return the folder of a snapshot in the cache.

        Raises `SnapshotError` as `SnapshotCache.fetch` does, and if the pointer names no URL, or
        one that cannot be opened here.
        """
        return self._cache.fetch(self._given or self._place(pointer), pointer)

    def close(self) -> None:
        """End a download."""
        self._cache.close()

    def _place(self, pointer: Pointer) -> Place:
        url = pointer.url
        if not url:
            raise SnapshotError(
                f"snapshot {pointer.snapshot} is not on this machine: there is no "
                f"{one_line(pointer.path, 300)}, and its pointer names no URL (snapshots.url of "
                "the run)"
            )
        if (topic := topic_of(url)) and self._scan:
            return TopicPlace(partial(self._scan, topic), topic, pointer)
        if url not in self._places:
            try:
                self._places = {url: open_place(url)}
            except ConfigError as error:
                raise SnapshotError(str(error)) from None
        return self._places[url]


class UrlPointers:
    """The pointers that appear in `latest.json` of a place, and the snapshots beside it."""

    def __init__(
        self, place: Place, cache: SnapshotCache, *, every_seconds: float = _POINTER_SECONDS
    ) -> None:
        self._place = place
        self._cache = cache
        self._every_seconds = every_seconds
        self._due = 0.0
        self._seen = b""
        self.holder: str | None = None
        """The run of the pointer that was read last."""

    def poll(self, timeout_seconds: float) -> list[Pointer | SnapshotError]:
        """Return the pointer if it is another one than before, after at most `timeout_seconds`.

        A place that does not answer may take longer. Raises `SnapshotError` if it cannot be read.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = self._read()
            remaining_seconds = deadline - time.monotonic()
            if found or remaining_seconds <= 0:
                return found
            time.sleep(min(_SLEEP_SECONDS, remaining_seconds))

    def locate(self, pointer: Pointer) -> Path:
        """Return the folder of the snapshot in the cache, where it is downloaded to.

        Raises `SnapshotError` as `SnapshotCache.fetch` does.
        """
        return self._cache.fetch(self._place, pointer)

    def close(self) -> None:
        """End a download."""
        self._cache.close()

    def _read(self) -> list[Pointer | SnapshotError]:
        if time.monotonic() < self._due:
            return []
        try:
            data = self._place.read(POINTER, files.LARGEST_DOCUMENT_BYTES)
        except files.Missing:
            return []
        finally:
            self._due = time.monotonic() + self._every_seconds
        if data == self._seen:
            return []
        self._seen = data
        try:
            pointer = decode_pointer(data, f"{self._place.url}: {POINTER}")
        except SnapshotError as error:
            return [error]
        self.holder = pointer.run
        return [pointer]


class PlaceDeltas:
    """The deltas that the index of a place lists, each downloaded when it is due.

    With `signature`, headers that it refuses are errors. A delta that is damaged is named once, and
    tried again every second; those after it come meanwhile.
    """

    def __init__(
        self,
        place: Place,
        *,
        signature: Verify | None = None,
        every_seconds: float = _INDEX_SECONDS,
    ) -> None:
        self.counts: Counter[str] = Counter()
        """The number of refusals: "index", "damaged" or "away"."""
        self._place = place
        self._signature = signature
        self._every_seconds = every_seconds
        self._index_due = 0.0
        self._index_data = b""
        self._index: DeltaIndex | None = None
        self._returned: set[str] = set()
        self._after: tuple[str, DeltaRank] | None = None
        self._named: dict[str, str] = {}
        self._due: dict[str, float] = {}
        self._away = ""
        self._paused_until = 0.0

    def poll(self, timeout_seconds: float) -> list[Delta | SnapshotError]:
        """Return the next deltas in the order of their ranks, after at most `timeout_seconds`.

        A place that does not answer may take longer. It is an error once, for as long as it lasts.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = self._next()
            remaining_seconds = deadline - time.monotonic()
            if found or remaining_seconds <= 0:
                return found
            time.sleep(min(_SLEEP_SECONDS, remaining_seconds))

    def rewind(
        self, after: tuple[str, DeltaRank] | None = None, *, since_ms: int | None = None
    ) -> None:
        """Let all deltas come again, or those of a run after a rank."""
        self._returned.clear()
        self._due.clear()
        self._after = after

    def close(self) -> None:
        """Do nothing: no connection stays open."""

    def _next(self) -> list[Delta | SnapshotError]:
        found: list[Delta | SnapshotError] = []
        if time.monotonic() < self._paused_until:
            return found
        try:
            self._refresh()
            found.extend(self._downloads())
        except files.Missing:  # it has expired, which the next index shows
            self._paused_until = time.monotonic() + self._every_seconds
        except Unreachable as error:
            self._paused_until = time.monotonic() + _RETRY_SECONDS
            if str(error) != self._away:
                self.counts["away"] += 1
                found.append(NotReadable(f"deltas cannot be read now: {error}"))
            self._away = str(error)
        except SnapshotError as error:
            if self._named.get(INDEX) != str(error):
                self._named[INDEX] = str(error)
                self.counts["index"] += 1
                found.append(NotReadable(f"no deltas are read: {error}"))
        else:
            self._away = ""
        return found

    def _refresh(self) -> None:
        """Read the index again if it is due."""
        now = time.monotonic()
        if now < self._index_due:
            return
        self._index_due = now + self._every_seconds
        try:
            data = self._place.read(f"{FOLDER}/{INDEX}", LARGEST_INDEX_BYTES)
        except files.Missing:
            return
        if data == self._index_data:
            return
        self._index = decode_index(data, f"{self._place.url}: {FOLDER}/{INDEX}")
        self._index_data = data
        listed = {entry.sha256 for entry in self._index.deltas}
        self._returned &= listed
        self._named = {name: text for name, text in self._named.items() if name in listed}
        self._due = {name: due for name, due in self._due.items() if name in listed}

    def _downloads(self) -> Iterator[Delta | SnapshotError]:
        """Yield the deltas that are due, about `POLL_BYTES` of them."""
        index = self._index
        size = 0
        for entry in index.deltas if index else ():
            if not index or not self._wants(index.run, entry):
                continue
            try:
                yield self._download(entry)
            except (files.Missing, Unreachable):
                raise
            except SnapshotError as error:
                self._due[entry.sha256] = time.monotonic() + _RETRY_SECONDS
                if self._named.get(entry.sha256) != str(error):
                    self._named[entry.sha256] = str(error)
                    self.counts["damaged"] += 1
                    yield error
                continue
            self._returned.add(entry.sha256)
            size += entry.bytes
            if size >= POLL_BYTES:
                return

    def _wants(self, run: str, entry: DeltaEntry) -> bool:
        if self._after and self._after[0] == run and entry.rank <= self._after[1]:
            return False
        due = self._due.get(entry.sha256, 0.0)
        return entry.sha256 not in self._returned and time.monotonic() >= due

    def _download(self, entry: DeltaEntry) -> Delta:
        """Return a delta. Raises `SnapshotError` unless its files are those of the index."""
        name = f"delta {entry.rank.name} of {self._place.url}"
        header = self._place.read(f"{FOLDER}/{header_name(entry.rank)}", LARGEST_HEADER_BYTES)
        found = header_sha256(header)
        if found != entry.sha256:
            raise SnapshotError(
                f"the header of {name} has SHA-256 {found}, the index says {entry.sha256}"
            )
        size = decode_header(header, name=name, signature=self._signature).payload_bytes
        payload = self._place.read(f"{FOLDER}/{payload_name(entry.rank)}", size)
        return verified(header, payload, name=name)
