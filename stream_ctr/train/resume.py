"""Resuming: whether a snapshot is one that this run may go on from.

A run resumes with the models, the fields, the join and the baseline that the snapshot was made
with. Its inputs are those that the snapshot knows, and what may follow them:

| the snapshot's last input | the run is given | it |
|---|---|---|
| a log or topics | the same | reads on, also what was added to a log that had ended |
| a log that was read to its end | other logs, or topics | goes on with them |
| a log that was not read to its end | anything else | is refused: the log must be read first |
| topics | anything else | is refused: nothing follows them, because they have no end |
| topics | the same with other partitions | is refused: clicks may have changed partitions |
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Input, Manifest, RunIdentity
from stream_ctr.train.inputs import Inputs, input_name, partition_names
from stream_ctr.train.source import Source

_log = logging.getLogger("stream_ctr.train")


def require_run(manifest: Manifest, run: str, path: Path) -> None:
    """Raise `ConfigError` unless the snapshot at `path` is of this run, that of the directory."""
    if manifest.run != run:
        raise ConfigError(
            f"snapshot {path.name} is of run {manifest.run}, and the state directory is that of "
            f"run {run}: the snapshots of two runs were mixed. Move those of the other run away"
        )


def require_learning_state(manifest: Manifest, path: Path) -> None:
    """Raise `ConfigError` unless the snapshot at `path` holds what learning goes on from."""
    if snapshot.file_name(snapshot.stems()[1]) not in manifest.files:
        raise ConfigError(
            f"snapshot {path.name} holds what serving needs and no more, as `export` and `compact` "
            "write it: no run resumes from it. Move it out of the state directory"
        )


def require_same_run(manifest: Manifest, identity: RunIdentity, source: Inputs, path: Path) -> None:
    """Raise `ConfigError` or `DataError` unless a run with this identity may resume from `path`.

    `source` has the inputs of the snapshot, as `continued` puts them there.
    """
    _require_same(manifest.schema, identity.schema, path)
    _require_same_models(manifest, identity, path)
    _require_same(manifest.join, identity.join, path)
    _require_same(manifest.baseline, identity.baseline, path)
    known = tuple(name for each in known_inputs(manifest) for name in each.partitions)
    if known != source.names[: len(known)]:
        continued([source], manifest, path)  # says why not
        made, given = (input_name(names) for names in (known, source.names))
        raise ConfigError(
            f"snapshot {path.name} was made from {made}, the input is {given}; "
            "use another --state directory for another input"
        )
    _require_same_topics(manifest.topic_ids, source)


def known_inputs(manifest: Manifest) -> tuple[Input, ...]:
    """Return the inputs that a snapshot knows, the last one read last."""
    if manifest.inputs or not manifest.positions:
        return manifest.inputs
    # Manifests used to have positions only, of one input.
    kind: Literal["log", "topics"] = "topics" if manifest.topic_ids else "log"
    return (Input(kind=kind, partitions=tuple(manifest.positions)),)


def continued(sources: Sequence[Source], manifest: Manifest | None, path: Path | None) -> Inputs:
    """Return these sources as the inputs of a run that goes on from the snapshot at `path`.

    `manifest` is that of the snapshot, None for a new run. Raises `ConfigError` or `DataError` if
    the sources cannot follow the inputs of the snapshot.
    """
    given = [partition_names(source) for source in sources]
    _require_once(given)
    known = known_inputs(manifest) if manifest else ()
    if not known:
        return Inputs(sources)
    assert manifest
    assert path
    # The run may be given again what it has read already: a command that was interrupted.
    for first in range(len(known)):
        again = [each.partitions for each in known[first:]]
        if again == given[: len(again)]:
            _require_new(given[len(again) :], known, path)
            sources = sources[len(again) - 1 :]
            return Inputs(sources, ended=known[:-1], positions=manifest.positions)
    _require_same_partitions(given[0], known[-1])
    _require_new(given, known, path)
    _require_ended(known[-1], manifest, given, path)
    return Inputs(sources, ended=known, positions=manifest.positions)


def what_follows(inputs: Inputs) -> str | None:
    """Return after what a run goes on with what, None if it begins or reads on.

    >>> from stream_ctr.connectors.memory import BatchSource
    >>> day1 = Input(kind="log", partitions=("day1.csv#a5:0",), ended=True)
    >>> sources = [BatchSource(list, name="day2.csv#b6"), BatchSource(list, name="day3.csv#b6")]
    >>> what_follows(Inputs(sources, ended=[day1], positions={"day1.csv#a5:0": 120_000}))
    'goes on after day1.csv (120,000 records) with day2.csv and 1 more'
    """
    if not inputs.before or inputs.begun != inputs.before:
        return None
    last = inputs.before[-1]
    records = inputs.positions()[inputs.present.start]
    more = len(inputs.sources) - 1
    following = input_name(partition_names(inputs.sources[0]))
    if inputs.topic_ids():
        following = f"topic{'s' * (' and ' in following)} {following}"
    return (
        f"goes on after {input_name(last.partitions)} ({records:,} records) with {following}"
        + f" and {more} more" * bool(more)
    )


def _require_once(given: Sequence[tuple[str, ...]]) -> None:
    twice = [names for names, times in Counter(given).items() if times > 1]
    if twice:
        raise ConfigError(
            f"{input_name(twice[0])} is given twice: a log is told by its file name and its first "
            "line, so give each log once, and rename one of two that agree in both"
        )


def _require_new(given: Sequence[tuple[str, ...]], known: Sequence[Input], path: Path) -> None:
    read = [each.partitions for each in known]
    for names in given:
        if names in read:
            after = input_name(known[-1].partitions)
            raise ConfigError(
                f"{input_name(names)} was read before {after} (snapshot {path.name}); give "
                f"{after}, or what follows it. To read the logs in another order, use another "
                "--state directory"
            )


def _require_same_partitions(given: Sequence[str], last: Input) -> None:
    """Raise `DataError` if partitions of the same topics came or went.

    Clicks may have gone to other partitions before, so their impressions would not find them.
    """
    topics, topics_before = (
        {name.rpartition(":")[0] for name in names} for names in (given, last.partitions)
    )
    odd = sorted({*given} ^ {*last.partitions})
    if last.kind == "topics" and topics == topics_before and odd:
        changed = ", ".join(
            f"partition {name} {'was added' if name in given else 'is gone'}" for name in odd
        )
        raise DataError(
            f"{changed} since the snapshot was taken. To begin anew use another --state directory"
        )


def _require_ended(
    last: Input, manifest: Manifest, given: Sequence[tuple[str, ...]], path: Path
) -> None:
    if last.ended:
        return
    name = input_name(last.partitions)
    following = input_name(given[0])
    if last.kind == "topics":
        raise ConfigError(
            f"snapshot {path.name} was made from {name}, the input is {following}: nothing follows "
            "a topic, because it has no end; use another --state directory for another input"
        )
    read = manifest.positions[last.partitions[0]]
    if name == following:
        raise ConfigError(
            f"{name} was not read to its end (snapshot {path.name} has read {read:,} records), and "
            "now begins with another line; give the log as it was, or use another --state "
            "directory"
        )
    raise ConfigError(
        f"{name} was not read to its end (snapshot {path.name} has read {read:,} records), so "
        f"{following} cannot follow yet; run it to its end first, with --source {name}, or use "
        "another --state directory for another input"
    )


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


def _require_same_topics(known: Mapping[str, str | None], source: Inputs) -> None:
    for topic, found in source.topic_ids().items():
        if known.get(topic) and found and known[topic] != found:
            raise DataError(
                f"topic {topic!r} was deleted and created again (its id was {known[topic]}, now it "
                f"is {found}): positions in the old one mean nothing in it. To begin anew use "
                "another --state directory; what was learned stays in this one"
            )
