"""Resuming: whether a snapshot is one that this run may go on from.

A run resumes with the models, the fields, the join and the baseline that the snapshot was made
with, and from the topics and partitions whose positions it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.snapshots.manifest import Manifest, RunIdentity
from stream_ctr.train.source import Source

_log = logging.getLogger("stream_ctr.train")


def require_run(manifest: Manifest, run: str, path: Path) -> None:
    """Raise `ConfigError` unless the snapshot at `path` is of the run of the state directory."""
    if manifest.run != run:
        raise ConfigError(
            f"snapshot {path.name} is of run {manifest.run}, and the state directory is that of "
            f"run {run}: the snapshots of two runs were mixed. Move those of the other run away"
        )


def require_same_run(manifest: Manifest, identity: RunIdentity, source: Source, path: Path) -> None:
    """Raise `ConfigError` or `DataError` unless a run with this identity may resume from `path`."""
    _require_same_models(manifest, identity, path)
    for section in ("schema", "join", "baseline"):
        _require_same(getattr(manifest, section), getattr(identity, section), path)
    names = partition_names(source)
    if odd := sorted(set(names) ^ set(manifest.positions)):
        _require_same_partitions(odd, names, source)
        made, given = (", ".join(sorted(each)) for each in (manifest.positions, names))
        raise ConfigError(
            f"snapshot {path.name} was made from {made}, the input is {given}; "
            "use another --state directory for another input"
        )
    _require_same_topics(manifest.topic_ids, source)


def partition_names(source: Source) -> list[str]:
    """Return "topic:partition" of each partition, as positions are named in manifests."""
    return [f"{topic}:{partition}" for topic, partition in source.partitions]


def _require_same_models(saved: RunIdentity, wanted: RunIdentity, path: Path) -> None:
    made, asked = (_models(each) for each in (saved, wanted))
    if made != asked:
        raise ConfigError(
            f"snapshot {path.name} was made with the models {made}, not with {asked}; "
            "use another --state directory for other models"
        )
    # Weights are float32 in either precision, and a run may have to go on where there is no
    # bfloat16, so the precision may differ.
    for name, asked_for in wanted.specs.items():
        made_with = saved.specs[name]
        before = made_with.precision
        now = asked_for.precision
        _require_same(msgspec.structs.replace(made_with, precision=now), asked_for, path)
    if before != now:
        _log.warning(
            "snapshot %s was made with precision %s; from here on it is %s", path.name, before, now
        )


def _models(identity: RunIdentity) -> str:
    return ", ".join(dict.fromkeys([identity.published, *identity.specs]))


def _require_same(saved: msgspec.Struct, wanted: msgspec.Struct, path: Path) -> None:
    before, now = _plain(saved), _plain(wanted)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"snapshot {path.name} was made with {name} = {before.get(name)!r:.200}, "
                f"not {now.get(name)!r:.200}; "
                "use another --state directory for another configuration"
            )


def _plain(section: msgspec.Struct) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = msgspec.to_builtins(section)
    return plain


def _require_same_partitions(odd: Sequence[str], names: Sequence[str], source: Source) -> None:
    """Raise `DataError` if partitions of the same topics came or went.

    Clicks may have gone to other partitions before, so their impressions would not find them.
    """
    if {name.rpartition(":")[0] for name in odd} <= {topic for topic, _ in source.partitions}:
        changed = ", ".join(
            f"partition {name} {'was added' if name in names else 'is gone'}" for name in odd
        )
        raise DataError(
            f"{changed} since the snapshot was taken. To begin anew use another --state directory"
        )


def _require_same_topics(known: Mapping[str, str | None], source: Source) -> None:
    for topic, found in source.topic_ids().items():
        if known.get(topic) and found and known[topic] != found:
            raise DataError(
                f"topic {topic!r} was deleted and created again (its id was {known[topic]}, now it "
                f"is {found}): positions in the old one mean nothing in it. To begin anew use "
                "another --state directory; what was learned stays in this one"
            )
