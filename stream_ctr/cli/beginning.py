"""Where a new state begins: at the weights of another run's snapshot (`run --from`).

The first start verifies that snapshot and begins there. Once the new state has a snapshot of its
own, the same command resumes from it; one that names another origin is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from msgspec import UNSET

from stream_ctr.config import Config
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.events.field import Field
from stream_ctr.events.fit import NOTHING, Fitted
from stream_ctr.snapshots import files, snapshot
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.files import MANIFEST
from stream_ctr.snapshots.manifest import Manifest, Origin

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Beginning:
    """The snapshot of another run whose weights a new one begins with."""

    path: Path
    manifest: Manifest
    origin: Origin

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that the snapshot keeps; it lies below that of the new run."""
        return self.manifest.config

    def numbers(self, config: Config) -> set[str]:
        """Return the fields whose numbers the new run encodes as the snapshot's run did."""
        schema = self.manifest.schema
        features = config.features
        same = schema.numeric_encoding == features.numeric_encoding and (
            schema.has_values or schema.buckets_per_octave == features.buckets_per_octave
        )
        return {field.name for field in schema.fields if same and field.kind == "numeric"}

    def knows(self, fields: Sequence[Field], config: Config) -> bool:
        """Return whether the snapshot has the fit of all numeric `fields`."""
        return self.numbers(config).issuperset(_numeric(fields))

    def fit(self, fields: Sequence[Field], config: Config, *, others: Fitted = NOTHING) -> Fitted:
        """Return the fit of the numeric `fields`; of those that are new, from `others`."""
        schema = self.manifest.schema
        kept = self.numbers(config).intersection(_numeric(fields))
        new = set(_numeric(fields)) - kept
        return Fitted(
            _of(schema.bucket_edges, kept) | _of(others.bucket_edges, new),
            _of(schema.value_scales, kept) | _of(others.value_scales, new),
        )


def find_beginning(path: Path, state: Path, signature: Verify | None = None) -> Beginning | None:
    """Return where the new state begins, or None if it began there already.

    `path` is a snapshot, or a state directory, which stands for its newest snapshot.

    Raises `ConfigError` if the state has snapshots that began elsewhere, and `SnapshotError` if
    there is no valid snapshot at `path`.
    """
    if snapshot.snapshot_ids(state / "snapshots"):
        _require_origin(kept_manifest(state), path, state)
        return None
    found = _newest_or_itself(path, signature)
    manifest = snapshot.verify(found, signature=signature, any_name=True)
    if snapshot.file_name(snapshot.stems()[1]) not in manifest.files:
        raise SnapshotError(
            f"{found} was exported for serving and has no optimizer: "
            "--from takes the snapshot that it was made of"
        )
    return Beginning(found, manifest, _origin(found, manifest))


def kept_manifest(state: Path) -> Manifest | None:
    """Return the newest manifest of the earlier run in this directory that can be read, or None.

    All snapshots of a run agree on its schema and its origin, so any will do.
    """
    for name in reversed(snapshot.snapshot_ids(state / "snapshots")):
        with contextlib.suppress(SnapshotError):
            return snapshot.read_manifest(state / "snapshots" / name)
    return None


def _newest_or_itself(path: Path, signature: Verify | None) -> Path:
    if (path / MANIFEST).exists():
        return path
    root = path / "snapshots" if (path / "snapshots").is_dir() else path
    found = snapshot.newest(root, signature=signature)
    if found is None:
        raise SnapshotError(
            f"there is no snapshot in {path}: --from takes a snapshot, or the state directory of "
            "a run"
        )
    return found


def _origin(path: Path, manifest: Manifest) -> Origin:
    return Origin(
        snapshot=path.resolve().name,
        manifest_sha256=hashlib.sha256(files.read_manifest(path)).hexdigest(),
        directory_sha256=_digest(path.resolve().parent),
        examples=manifest.examples,
    )


def _of(values: Mapping[str, Value], names: Collection[str]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if name in names}


def _numeric(fields: Sequence[Field]) -> list[str]:
    return [field.name for field in fields if field.kind == "numeric"]


def _digest(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder)).hexdigest()


def _require_origin(kept: Manifest | None, path: Path, state: Path) -> None:
    """Raise `ConfigError` unless the run of a manifest began with the weights at `path`.

    A state directory goes on, so any of its snapshots is meant. Neither need exist any more.
    """
    if kept is None:  # resuming says what is wrong with the snapshots
        return
    if kept.origin is UNSET:
        raise ConfigError(
            f"the state directory {state} has snapshots of a run that began without --from; "
            "use another --state directory, or resume without --from"
        )
    origin = kept.origin
    resolved = path.resolve()
    same_folder = origin.directory_sha256 in {_digest(resolved), _digest(resolved / "snapshots")}
    same_snapshot = origin.snapshot == resolved.name and origin.directory_sha256 == _digest(
        resolved.parent
    )
    if not (same_folder or same_snapshot or _has_digest(path, origin.manifest_sha256)):
        raise ConfigError(
            f"the state directory {state} began with snapshot {origin.snapshot} of "
            f"{origin.examples:,} examples, not with {path}; use another --state directory for "
            "another origin, or resume without --from"
        )


def _has_digest(path: Path, sha256: str) -> bool:
    with contextlib.suppress(SnapshotError):
        return hashlib.sha256(files.read_manifest(path)).hexdigest() == sha256
    return False
