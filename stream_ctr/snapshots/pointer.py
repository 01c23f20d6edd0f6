"""The pointer: a small JSON object that names the snapshot which subscribers load.

It is in `latest.json` of a state directory, and on the snapshot topic under the model's name.
docs/schemas has its JSON Schema.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.summary import Count
from stream_ctr.failpoint import failpoint
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import RunId, Sha256, decode
from stream_ctr.snapshots.manifest import Manifest

FORMAT = 2


class Pointer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The published snapshot of a run. Times are epoch milliseconds.

    `model` is the name under which the run publishes. `replaces` lists the runs that may not
    publish under the name any more: those that held it before and were replaced, and those that
    came in between. `path` is absolute and ends in the snapshot's name. `manifest_sha256` is the
    digest of the bytes of its manifest. `epoch` grows with every run that holds the state directory
    and with every rollback; `sequence` grows with every snapshot of a state directory. Both order
    the pointers of one run, and say nothing about those of two.

    Raises `ValueError` if `path` does not lead to a directory named `snapshot`.
    """

    format: Count = FORMAT
    snapshot: str
    path: str
    manifest_sha256: Sha256
    run: RunId
    replaces: tuple[RunId, ...] = ()
    model: str
    epoch: Count
    sequence: Count
    examples: Count
    event_time_ms: Count
    created_ms: Count

    def __post_init__(self) -> None:
        path = Path(self.path)
        if not path.is_absolute() or path.name != self.snapshot:
            raise ValueError(
                f"pointer path {self.path!r:.200} must be absolute and end in the snapshot's name "
                f"{self.snapshot!r:.200}"
            )
        try:
            files.snapshot_name(self.snapshot)
        except SnapshotError as reason:
            raise ValueError(reason) from None

    @property
    def rank(self) -> tuple[int, int]:
        """The order of publication within a run: by epoch, then by sequence."""
        return self.epoch, self.sequence


def pointer_for(
    path: Path, manifest: Manifest, *, epoch: int | None = None, replaces: Sequence[str] = ()
) -> Pointer:
    """Return the pointer to the snapshot at `path`, whose run replaces the runs `replaces`.

    `epoch` replaces that of the manifest when a snapshot is published after one of a later epoch.
    Raises `SnapshotError` if the manifest cannot be read or its numbers do not fit a pointer.
    """
    with files.opened(path / files.MANIFEST) as fd:
        digest = hashlib.sha256(files.read_all(fd)).hexdigest()
    described = {
        "format": FORMAT,
        "snapshot": files.snapshot_name(path.name),
        "path": str(path.absolute()),
        "manifest_sha256": digest,
        "run": manifest.run,
        "replaces": replaces,
        "model": manifest.model,
        "epoch": manifest.epoch if epoch is None else epoch,
        "sequence": manifest.sequence,
        "examples": manifest.examples,
        "event_time_ms": manifest.event_time_ms,
        "created_ms": manifest.created_ms,
    }
    return decode_pointer(msgspec.json.encode(described))


def encode_pointer(pointer: Pointer) -> bytes:
    """Encode a pointer as one line of JSON, for a topic."""
    return msgspec.json.encode(pointer)


def decode_pointer(data: bytes, name: str = "pointer") -> Pointer:
    """Decode a pointer. It says nothing about the snapshot, which `snapshot.load` verifies.

    Raises `NewerFormat` or `OlderFormat` for a pointer of another version, and `SnapshotError` for
    any other that is not a pointer.
    """
    return decode(data, Pointer, newest=FORMAT, name=name)


def write_pointer(path: Path, pointer: Pointer) -> None:
    """Replace the file at `path` in one step: a reader sees the old or the new pointer.

    This holds after a crash too.
    """
    temporary = path.with_name(f"{files.TEMPORARY}{path.name}")
    with files.naming(path, "cannot write pointer"):
        files.write_durably(temporary, files.to_json(pointer))
        failpoint("pointer.before")
        os.replace(temporary, path)
        failpoint("pointer.after")
        files.sync_directory(path.parent)


def read_pointer(path: Path) -> Pointer | None:
    """Return the pointer in the file at `path`, or None if nothing was published there.

    Raises `SnapshotError` as `decode_pointer` does.
    """
    if not path.exists():
        return None
    with files.opened(path) as fd:
        return decode_pointer(files.read_all(fd), str(path))
