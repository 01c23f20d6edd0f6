"""The snapshots of a state directory with their verdicts, read from the disk.

A manifest never changes, so each is read once and remembered by the name of its snapshot, also
after the snapshot was removed. `latest.json` says which one is published.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stream_ctr.errors import SnapshotError
from stream_ctr.messages import one_line, rfc3339
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import Pointer, read_pointer

MOST_SNAPSHOTS = 50
_LOOK_SECONDS = 1.0
_LONGEST_REASON = 400
_NO_EXAMPLE = "it has learned no example"
Verdict = Literal["published", "refused", "kept"]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a manifest says: `rank` is (epoch, sequence), times are epoch milliseconds."""

    name: str
    rank: tuple[int, int]
    examples: int
    event_time_ms: int
    created_ms: int
    refused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    """A snapshot. Times are RFC 3339; `loaded` is true for the one that `latest.json` names.

    `verdict` is `published` if it was published or could have been, as one after it was; `refused`
    if the gate refused it, with its `reasons`; and `kept` if it serves only to resume.
    """

    name: str
    sequence: int
    examples: int
    event_time: str | None
    written: str | None
    verdict: Verdict
    reasons: tuple[str, ...]
    loaded: bool
    on_disk: bool


@dataclass(frozen=True, slots=True)
class Snapshots:
    """Snapshots, the newest last, and the pointer to the published one, None without one."""

    listed: tuple[Listed, ...] = ()
    pointer: Pointer | None = None

    def to_json_objects(self) -> list[dict[str, Any]]:
        """Return the snapshots as JSON has them."""
        return [asdict(each) for each in self.listed]


class SnapshotList:
    """List the snapshots of a state directory. It looks at the disk once a second at most."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._facts: dict[str, _Facts] = {}
        self._read = Snapshots()
        self._read_at: float | None = None

    def read(self) -> Snapshots:
        """Return the newest snapshots. The same object is returned while nothing has changed."""
        now = self._clock()
        if self._read_at is None or now - self._read_at >= _LOOK_SECONDS:
            self._read_at = now
            found = self._look()
            if found != self._read:
                self._read = found
        return self._read

    def _look(self) -> Snapshots:
        root = self._directory / "snapshots"
        try:
            names = snapshot.snapshot_ids(root)[-MOST_SNAPSHOTS:]
        except SnapshotError:
            names = []
        for name in names:
            if name not in self._facts and (facts := _facts(root / name)):
                self._facts[name] = facts
        newest = sorted(self._facts.values(), key=lambda facts: facts.rank)[-MOST_SNAPSHOTS:]
        self._facts = {facts.name: facts for facts in newest}
        pointer = _pointer(self._directory)
        return Snapshots(tuple(_listed(each, pointer, set(names)) for each in newest), pointer)


def _facts(path: Path) -> _Facts | None:
    """Return what the manifest at `path` says, or None if it cannot be read."""
    try:
        manifest = snapshot.read_manifest(path)
    except SnapshotError:
        return None
    return _Facts(
        name=path.name,
        rank=(manifest.epoch, manifest.sequence),
        examples=manifest.examples,
        event_time_ms=manifest.event_time_ms,
        created_ms=manifest.created_ms,
        refused=tuple(one_line(reason, _LONGEST_REASON) for reason in manifest.gate.reasons),
    )


def _pointer(directory: Path) -> Pointer | None:
    try:
        return read_pointer(directory / "latest.json")
    except SnapshotError:
        return None


def _listed(facts: _Facts, pointer: Pointer | None, on_disk: set[str]) -> Listed:
    verdict, reasons = _verdict(facts, pointer)
    return Listed(
        name=facts.name,
        sequence=facts.rank[1],
        examples=facts.examples,
        event_time=rfc3339(facts.event_time_ms if facts.examples else None),
        written=rfc3339(facts.created_ms),
        verdict=verdict,
        reasons=reasons,
        loaded=pointer is not None and pointer.snapshot == facts.name,
        on_disk=facts.name in on_disk,
    )


def _verdict(facts: _Facts, pointer: Pointer | None) -> tuple[Verdict, tuple[str, ...]]:
    if not facts.examples:
        return "kept", (_NO_EXAMPLE,)
    if facts.refused:
        return "refused", facts.refused
    if pointer is None or facts.rank > pointer.rank:
        return "kept", ("it is written, and not published yet",)
    return "published", ()
