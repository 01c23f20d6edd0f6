"""The pointer: a small JSON object that names the snapshot which subscribers load.

It is in `latest.json` of a state directory, and on the snapshot topic under the model's name.
docs/schemas has its JSON Schema.

A signature covers all keys but itself. Without it, whoever may write pointers could publish an old
snapshot, which is signed, once more under a later epoch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.summary import Count
from stream_ctr.failpoint import failpoint
from stream_ctr.messages import one_line
from stream_ctr.snapshots import files
from stream_ctr.snapshots.contract import Epoch, RunId, Sha256, Sign, Verify, decode, encode
from stream_ctr.snapshots.delta import DeltaPosition
from stream_ctr.snapshots.manifest import Manifest

FORMAT = 4

# No manifest begins like this, so no signature of one is that of a pointer.
_SIGNED = b"stream-ctr pointer\n"


class Pointer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The published snapshot of a run. Times are epoch milliseconds.

    `model` is the name under which the run publishes. `replaces` lists the runs that may not
    publish under the name any more: those that held it before and were replaced, and those that
    came in between. `path` is where the run wrote the snapshot: it is absolute, and ends in the
    snapshot's name. A reader may have the directory in another place (see `PointerSource.locate`).
    `manifest_sha256` is the digest of the bytes of its manifest. `epoch` grows with every run that
    holds the state directory and with every rollback; `sequence` grows with every snapshot of a
    state directory. Both order the pointers of one run, and say nothing about those of two.
    `delta` is that of the manifest: who has applied this delta has the weights of the snapshot. It
    is None after a rollback, which no delta leads to. Deltas of an epoch below that of the pointer
    are void. `url` is the place from which other machines load the snapshot, empty if there is
    none. `signature`, in hexadecimal digits, is empty if the run does not sign.

    Raises `ValueError` if `path` does not lead to a directory named `snapshot`.
    """

    format: Count = FORMAT
    snapshot: str
    path: str
    manifest_sha256: Sha256
    run: RunId
    replaces: tuple[RunId, ...] = ()
    model: str
    epoch: Epoch
    sequence: Count
    examples: Count
    event_time_ms: Count
    created_ms: Count
    delta: DeltaPosition | None = None
    url: Annotated[str, Meta(max_length=2000)] = ""
    signature: Annotated[str, Meta(pattern="^([0-9a-f]{128})?$", max_length=128)] = ""

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
    path: Path,
    manifest: Manifest,
    *,
    epoch: int | None = None,
    replaces: Sequence[str] = (),
    url: str = "",
    rollback: bool = False,
    sign: Sign | None = None,
) -> Pointer:
    """Return the pointer to the snapshot at `path`, whose run replaces the runs `replaces`.

    `epoch` replaces that of the manifest when a snapshot is published after one of a later epoch.
    A `rollback` takes back what deltas have brought, so its pointer has no `delta`.
    Raises `SnapshotError` if the manifest cannot be read or its numbers do not fit a pointer.
    """
    described = Pointer(
        snapshot=files.snapshot_name(path.name),
        path=str(path.absolute()),
        manifest_sha256=hashlib.sha256(files.read_manifest(path)).hexdigest(),
        run=manifest.run,
        replaces=tuple(replaces),
        model=manifest.model,
        epoch=manifest.epoch if epoch is None else epoch,
        sequence=manifest.sequence,
        examples=manifest.examples,
        event_time_ms=manifest.event_time_ms,
        created_ms=manifest.created_ms,
        delta=None if rollback else manifest.delta,
        url=url,
    )
    # A frozen type does not check the values that it is made with, decoding does.
    return signed(decode_pointer(encode_pointer(described)), sign)


def signed(pointer: Pointer, sign: Sign | None) -> Pointer:
    """Return the pointer with a signature over all of its other keys, or with none."""
    return replace(pointer, signature=sign(_signed_bytes(pointer)).hex() if sign else "")


def require_signature(pointer: Pointer, verify: Verify) -> None:
    """Raise `SnapshotError` unless the pointer has the signature of the expected key."""
    if not pointer.signature:
        raise SnapshotError(
            f"the pointer to snapshot {pointer.snapshot} is not signed, and a signature is required"
        )
    try:
        verify(_signed_bytes(pointer), bytes.fromhex(pointer.signature))
    except SnapshotError as reason:
        raise SnapshotError(f"the pointer to snapshot {pointer.snapshot}: {reason}") from None


def require_description(pointer: Pointer, manifest: Manifest) -> None:
    """Raise `SnapshotError` unless the pointer says of a snapshot what its manifest says.

    Only the epoch may differ: it is later when an older snapshot is published again.
    """
    for name in ("run", "snapshot", "sequence", "model"):
        found, given = getattr(manifest, name), getattr(pointer, name)
        if found != given:
            raise SnapshotError(
                f"its {name} is {one_line(found, 80)}, its pointer says {one_line(given, 80)}"
            )
    if pointer.epoch < manifest.epoch:
        raise SnapshotError(f"it is of epoch {manifest.epoch}, its pointer of {pointer.epoch}")


def _signed_bytes(pointer: Pointer) -> bytes:
    return _SIGNED + msgspec.json.encode(replace(pointer, signature=""))


def encode_pointer(pointer: Pointer) -> bytes:
    """Encode a pointer as one line of JSON, for a topic."""
    return encode(pointer, indent=None)


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
        files.write_durably(temporary, encode(pointer))
        failpoint("pointer.before")
        os.replace(temporary, path)
        failpoint("pointer.after")
        files.sync_directory(path.parent)


def read_pointer(path: Path) -> Pointer | None:
    """Return the pointer in the file at `path`, or None if nothing was published there.

    Raises `SnapshotError` as `decode_pointer` does, and if the file cannot be read.
    """
    try:
        data = files.read_document(path)
    except files.Missing:
        return None
    return decode_pointer(data, str(path))
