"""Deltas as files of a state directory, beside its snapshots.

    deltas/00000003-00000012.json          the header
    deltas/00000003-00000012.safetensors   the payload
    deltas/index.json                      the deltas that are kept, in the order of their ranks

A delta is written payload first, then header, then index, each by a rename after its bytes are on
disk. It is there once the index lists it. So a crash leaves an index whose files are all there, and
files at most that no index lists, which the next `clean` removes. Removing goes the other way: the
index first, then the files.

The index is sealed and not signed. Whoever may write to the directory can hide deltas, and cannot
make one: each header is signed.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from stream_ctr import state_files
from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.summary import Count
from stream_ctr.failpoint import failpoint
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import NewerFormat, RunId, Sha256, decode, encode
from stream_ctr.snapshots.delta import (
    DeltaHeader,
    DeltaPosition,
    DeltaRank,
    header_sha256,
)

FORMAT = 1
FOLDER = "deltas"
"""The folder of a state directory that holds its deltas."""
INDEX = "index.json"
LARGEST_INDEX_BYTES = 8 << 20
MOST_DELTAS = 1 << 12
"""The most deltas that are kept; an index of so many stays below `LARGEST_INDEX_BYTES`."""

_OWN_NAMES = re.compile(r"\d{8,}-\d{8,}\.(?:json|safetensors)")
_log = logging.getLogger(__name__)


class DeltaEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """A delta that is kept: its rank, the SHA-256 of its header, its bytes with the header.

    `base` is the snapshot with which its chain begins.
    """

    rank: DeltaRank
    sha256: Sha256
    bytes: Count
    base: str


class DeltaIndex(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of `index.json`: the deltas of a run that are kept, by rank."""

    format: Count = FORMAT
    run: RunId
    deltas: tuple[DeltaEntry, ...]


def header_name(rank: DeltaRank) -> str:
    """Return the name of the file that holds the header of a delta.

    >>> header_name(DeltaRank(3, 12))
    '00000003-00000012.json'
    """
    return f"{rank.name}.json"


def payload_name(rank: DeltaRank) -> str:
    """Return the name of the file that holds the payload of a delta.

    >>> payload_name(DeltaRank(3, 12))
    '00000003-00000012.safetensors'
    """
    return f"{rank.name}.safetensors"


def encode_index(index: DeltaIndex) -> bytes:
    """Return the bytes of an index. Raises `SnapshotError` if `decode_index` would refuse them."""
    data = encode(index, indent=None)
    decode_index(data)  # a frozen type does not check the values that it is made with
    return data


def decode_index(data: bytes, name: str = INDEX) -> DeltaIndex:
    """Return the index of these bytes.

    Raises `NewerFormat`, `OlderFormat`, or `SnapshotError` that names the file.
    """
    index = decode(data, DeltaIndex, newest=FORMAT, name=name)
    ranks = [entry.rank for entry in index.deltas]
    if any(rank >= following for rank, following in zip(ranks, ranks[1:], strict=False)):
        raise SnapshotError(f"{name} is damaged: its deltas are not in the order of their ranks")
    return index


def read_index(path: Path) -> DeltaIndex | None:
    """Return the index in the file at `path`, or None if there is none.

    Raises `SnapshotError` as `decode_index` does, and if the file cannot be read.
    """
    try:
        data = files.read_document(path, LARGEST_INDEX_BYTES)
    except files.Missing:
        return None
    return decode_index(data, str(path))


def to_keep(
    entries: Sequence[DeltaEntry],
    snapshots: Mapping[str, DeltaPosition | None],
    *,
    most_bytes: int,
) -> tuple[DeltaEntry, ...]:
    """Return the deltas that a server needs that begins with one of these snapshots.

    `snapshots` maps the names of those that are kept to the deltas at their cuts. Without any, all
    deltas are needed. Of those that are needed, the newest stay that have `most_bytes` together,
    because a chain without its beginning leads on from a later snapshot, and one without its end
    from none. The newest delta always stays.

    >>> links = [DeltaEntry(DeltaRank(1, number), "0" * 64, 10, "A") for number in (1, 2, 3, 4)]
    >>> at_2 = DeltaPosition(DeltaRank(1, 2), "0" * 64)
    >>> [entry.rank.sequence for entry in to_keep(links, {"A": None, "B": at_2}, most_bytes=100)]
    [1, 2, 3, 4]
    >>> [entry.rank.sequence for entry in to_keep(links, {"B": at_2}, most_bytes=100)]
    [3, 4]
    >>> [entry.rank.sequence for entry in to_keep(links, {"A": None}, most_bytes=25)]
    [3, 4]
    """
    needed = [
        entry
        for entry in entries
        if not snapshots
        or entry is entries[-1]
        or any(_needs(name, position, entry) for name, position in snapshots.items())
    ]
    kept: list[DeltaEntry] = []
    for entry in reversed(needed):
        most_bytes -= entry.bytes
        if kept and (most_bytes < 0 or len(kept) == MOST_DELTAS):
            break
        kept.append(entry)
    return tuple(reversed(kept))


def _needs(name: str, position: DeltaPosition | None, entry: DeltaEntry) -> bool:
    """Return whether a server that begins with this snapshot may apply this delta."""
    if entry.base == name:
        return True
    # A later chain of the same epoch counts too: which chain the position is of may be unknown.
    return (
        position is not None
        and entry.rank.epoch == position.rank.epoch
        and entry.rank > position.rank
    )


class DeltaStore:
    """The deltas in the folder `deltas` of a state directory.

    Only the holder of the directory writes there. Threads take turns. An index that is damaged
    counts as none, with a warning: deltas serve the present, and no run resumes from them.

    Raises `NewerFormat` if a newer version wrote the index, and `SnapshotError` if it cannot be
    read.
    """

    def __init__(self, directory: Path) -> None:
        self.folder = directory / FOLDER
        self._lock = threading.Lock()
        self._index = self._read()

    @property
    def index(self) -> DeltaIndex | None:
        """The deltas that are kept, None before the first one is written."""
        return self._index

    def write(
        self,
        header_bytes: bytes,
        header: DeltaHeader,
        payload: bytes,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a delta, the newest of its run; it is on disk when this returns.

        `header_bytes` are those of `header`. The deltas of another run are removed first. `check`
        is called before the index lists the delta, and may raise.

        Raises `SnapshotError`, with nothing left behind, if the disk is full or a delta of this
        rank or a higher one is there.
        """
        with self._lock:
            entries = self._entries_before(header)
            expired = entries[: max(0, len(entries) - MOST_DELTAS + 1)]
            entry = DeltaEntry(
                header.rank,
                header_sha256(header_bytes),
                len(header_bytes) + len(payload),
                header.base,
            )
            try:
                with files.naming(self.folder, "cannot make"):
                    state_files.make_folder(self.folder)
                files.replace_durably(self.folder / payload_name(header.rank), payload)
                failpoint("delta.payload")
                files.replace_durably(self.folder / header_name(header.rank), header_bytes)
                failpoint("delta.header")
                check()
                self._replace_index(header.run, (*entries[len(expired) :], entry))
                failpoint("delta.index")
            except BaseException:
                if entry not in self._listed:
                    with contextlib.suppress(SnapshotError):
                        self._remove([entry])
                raise
            self._remove(expired)

    def retain(
        self, snapshots: Mapping[str, DeltaPosition | None], *, most_bytes: int
    ) -> list[str]:
        """Remove the deltas that `to_keep` leaves out; return their names, oldest first."""
        with self._lock:
            if self._index is None:
                return []
            kept = to_keep(self._listed, snapshots, most_bytes=most_bytes)
            staying = {*kept}
            expired = [entry for entry in self._listed if entry not in staying]
            if expired:
                self._replace_index(self._index.run, kept)
                failpoint("delta.retain")
                self._remove(expired)
            return [entry.rank.name for entry in expired]

    def clean(self) -> list[str]:
        """Remove what a crash left: unfinished files, and deltas that the index does not list.

        Returns their names. Only the holder of the state directory may call this.
        """
        with self._lock, files.naming(self.folder, "cannot remove what is unfinished in"):
            removed = state_files.remove_all(self.folder, files.TEMPORARY)
            if self.folder.is_dir():
                listed = {name for entry in self._listed for name in _names(entry)}
                for path in sorted(self.folder.iterdir()):
                    if _OWN_NAMES.fullmatch(path.name) and path.name not in listed:
                        files.remove(path)
                        removed.append(path.name)
            return removed

    @property
    def _listed(self) -> tuple[DeltaEntry, ...]:
        return self._index.deltas if self._index else ()

    def _read(self) -> DeltaIndex | None:
        try:
            return read_index(self.folder / INDEX)
        except NewerFormat:
            raise
        except SnapshotError as error:
            if isinstance(error.__cause__, OSError):
                raise
            _log.warning("the deltas so far are not used: %s", error)
            return None

    def _entries_before(self, header: DeltaHeader) -> tuple[DeltaEntry, ...]:
        """Return the entries that stay when this delta is written."""
        if self._index and self._index.run != header.run:
            former = self._listed
            self._replace_index(header.run, ())
            self._remove(former)
        if self._listed and self._listed[-1].rank >= header.rank:
            raise SnapshotError(
                f"delta {header.rank.name} cannot be written: {self._listed[-1].rank.name} is "
                f"in {self.folder} already"
            )
        return self._listed

    def _replace_index(self, run: str, entries: tuple[DeltaEntry, ...]) -> None:
        index = DeltaIndex(run=run, deltas=entries)
        files.replace_durably(self.folder / INDEX, encode_index(index))
        self._index = index

    def _remove(self, entries: Iterable[DeltaEntry]) -> None:
        with files.naming(self.folder, "cannot remove deltas in"):
            for entry in entries:
                for name in _names(entry):
                    files.remove(self.folder / name)
                    files.remove(self.folder / f"{files.TEMPORARY}{name}")
            files.remove(self.folder / f"{files.TEMPORARY}{INDEX}")


def _names(entry: DeltaEntry) -> tuple[str, str]:
    return header_name(entry.rank), payload_name(entry.rank)
