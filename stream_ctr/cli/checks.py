"""The checks of `stream-ctr doctor`. Each yields findings, and changes nothing outside.

level     meaning
-------   ------------------------------------------------------------
ok        as it should be
warning   a run works, but something is likely not what is meant
error     a run fails, or learns nothing of use
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.cli.assembly import run_identity
from stream_ctr.config import Config, format_duration, in_milliseconds, size
from stream_ctr.connectors import kafka
from stream_ctr.errors import BrokerError, ConfigError, DataError, StreamCtrError
from stream_ctr.evaluate import sketch
from stream_ctr.events.decoder import Decoder, Events
from stream_ctr.events.features import hash_ids
from stream_ctr.events.field import Field
from stream_ctr.events.infer import feature_names, infer_fields
from stream_ctr.events.times import TimeFormat
from stream_ctr.learn.device import choose_device
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.table import FLOAT_BYTES
from stream_ctr.learn.table_kernels import row_floats
from stream_ctr.messages import nearest_word, one_line
from stream_ctr.models.registered import system
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.files import mebibytes

Level = Literal["ok", "warning", "error"]
Array = npt.NDArray[np.int64]

_SLOW_SECONDS = 0.5
_MALFORMED_WARNING = 0.01
_LEAST_COVERAGE = 0.5
_LATE_WARNING = 0.01
_LEAST_CLICKS = 20  # that tell something about keys and coverage
_CLOCK_WARNING_MS = 5_000
_PROCESS_BYTES = 1 << 30  # of the libraries and all that does not grow with a table
_FTRL_FLOATS = 4  # z and n of a row, in float64
_MOST_NAMED = 12
_RIGHTS_IN_WORDS = {"READ": "read", "WRITE": "write to", "DESCRIBE": "describe"}


class Finding(NamedTuple):
    """The result of one check. `fix` says what to do, and is empty where all is well."""

    check: str
    level: Level
    text: str
    fix: str = ""
    exit_code: int = 0


def ok(check: str, text: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, fix: str) -> Finding:
    """Return a finding that something is likely wrong."""
    return Finding(check, "warning", text, fix)


def error(check: str, text: str, fix: str, kind: type[StreamCtrError] = ConfigError) -> Finding:
    """Return a finding that a run fails, with the exit code that it fails with."""
    return Finding(check, "error", text, fix, kind.exit_code)


# -- the cluster ---------------------------------------------------------------------------------


def check_cluster(facts: kafka.ClusterFacts, config: Config) -> Iterator[Finding]:
    """Look at the brokers, at the topics that a run reads, and at those that it writes."""
    text = (
        f"{facts.brokers} broker{'s' * (facts.brokers != 1)}, protocol of Kafka {facts.release}, "
        f"answers in {facts.seconds * 1000:.0f} ms"
    )
    if facts.seconds > _SLOW_SECONDS:
        yield warning("broker", text, "a slow answer delays every poll: look at the network")
    else:
        yield ok("broker", text)
    for topic in read_topics(config):
        found = facts.topics.get(topic)
        if found is None:
            fix = "create it, or name another with --topic"
            yield error(
                f"topic {topic}", "does not exist, or may not be described", fix, BrokerError
            )
            continue
        yield _check_partitions(topic, found)
        yield from _check_settings(topic, found, config)
        yield from _check_rights(topic, found.rights, "READ")
    for topic, compacted in written_topics(config).items():
        yield from _check_written(topic, facts, compacted=compacted)


def read_topics(config: Config) -> list[str]:
    """Return the topics that a run with this configuration reads."""
    topics = [config.input.topic, config.input.click_topic]
    return [topic for topic in dict.fromkeys(topics) if topic]


def written_topics(config: Config) -> dict[str, bool]:
    """Return the topics that a run writes to, and whether it wants each compacted."""
    topics = {f"{topic}.dlq": False for topic in read_topics(config)}
    if config.metrics.topic:
        topics[config.metrics.topic] = False
    if config.snapshots.topic:
        topics[config.snapshots.topic] = True
    return topics


def _check_partitions(topic: str, found: kafka.TopicFacts) -> Finding:
    text = f"{found.partitions} partition{'s' * (found.partitions != 1)}"
    if found.leaderless:
        listed = ", ".join(map(str, found.leaderless))
        fix = "a broker is down: a run waits for it"
        return error(f"topic {topic}", f"{text}; without a leader: {listed}", fix, BrokerError)
    return ok(f"topic {topic}", text)


def _check_settings(topic: str, found: kafka.TopicFacts, config: Config) -> Iterator[Finding]:
    settings = found.settings
    if not settings:
        yield ok(f"retention of {topic}", "not known: the broker does not show its configuration")
        return
    window = config.join.label_window + config.join.allowed_lateness
    kept_ms = int(settings.get("retention.ms", "-1"))
    policy = settings.get("cleanup.policy", "delete")
    check = f"retention of {topic}"
    if "compact" in policy:
        fix = "records with the same key are lost: cleanup.policy=delete"
        yield warning(check, f"the topic is compacted (cleanup.policy={policy})", fix)
    if "delete" not in policy or kept_ms < 0:
        yield ok(check, "records are kept forever")
        return
    kept = timedelta(milliseconds=kept_ms)
    text = f"records are kept for {kept}; the label window and the lateness are {window}"
    if kept < window:
        fix = "clicks are deleted before their window closes: raise retention.ms"
        yield error(check, text, fix, DataError)
    elif kept < 4 * window:
        fix = "a run that is down for longer loses records: raise retention.ms"
        yield warning(check, text, fix)
    else:
        yield ok(check, text)
    codec = settings.get("compression.type", "producer")
    yield ok(f"codec of {topic}", f"compression.type={codec}")


def may(rights: frozenset[str] | None, wanted: str) -> bool:
    """Return whether these rights include one, as far as the broker says.

    >>> may(frozenset({"READ", "DESCRIBE"}), "READ"), may(frozenset({"DESCRIBE"}), "READ")
    (True, False)
    """
    return rights is None or bool(rights & {wanted, "ALL"})


def _check_rights(topic: str, rights: frozenset[str] | None, wanted: str) -> Iterator[Finding]:
    check = f"rights on {topic}"
    if rights is None:
        yield ok(check, "not known: the broker does not list them")
    elif not may(rights, wanted):
        fix = f"grant {wanted} on topic {topic} to the principal of this client"
        yield error(check, f"this client may not {_RIGHTS_IN_WORDS[wanted]} it", fix, BrokerError)
    else:
        yield ok(check, f"this client may {_RIGHTS_IN_WORDS[wanted]} it")


def _check_written(topic: str, facts: kafka.ClusterFacts, *, compacted: bool) -> Iterator[Finding]:
    found = facts.topics.get(topic)
    if found is None:
        if not may(facts.rights, "CREATE"):
            fix = f"create topic {topic}, or grant CREATE on the cluster"
            text = "does not exist, and this client may not create topics"
            yield error(f"topic {topic}", text, fix, BrokerError)
        else:
            yield ok(f"topic {topic}", "does not exist yet; a run creates it")
        return
    for right in ("READ", "WRITE"):  # a run reads what runs before it wrote there
        yield from _check_rights(topic, found.rights, right)
    policy = found.settings.get("cleanup.policy")
    if compacted and policy and "compact" not in policy:
        fix = "pointers older than the retention are lost: cleanup.policy=compact"
        yield warning(f"topic {topic}", f"is not compacted (cleanup.policy={policy})", fix)


# -- a sample of the records ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Records:
    """n records, in order within each partition.

    `place` names the topic and the number of the partition of each, None for a log; `key` is None
    where a record has none. `received` [n] is the broker's time in epoch milliseconds, -1 if
    unknown. `codecs` are the names of their codecs, None if unknown.
    """

    values: pa.LargeBinaryArray
    received: Array
    place: Sequence[tuple[str, int]] | None = None
    key: Sequence[bytes | None] | None = None
    codecs: frozenset[str] | None = None

    @classmethod
    def of(cls, sample: kafka.Sample) -> Records:
        """Return a sample of topics as records."""
        return cls(
            sample.values,
            sample.received,
            list(zip(sample.topic, sample.partition, strict=True)),
            sample.key,
            sample.codecs,
        )


def fields_of(records: Records, config: Config) -> tuple[Field, ...]:
    """Return the fields that a run infers. Raises `DataError` if there are too many."""
    return infer_fields(records.values, max_record_bytes=config.input.max_record_bytes)


def check_records(
    records: Records, config: Config, *, now_ms: int, decoder: Decoder | None = None
) -> Iterator[Finding]:
    """Look at a sample: malformed records, fields, keys, coverage and clocks."""
    if not len(records.values):
        yield warning("records", "there are none yet", "is the producer running?")
        return
    limit = config.input.max_record_bytes
    fields = config.features.fields()
    try:
        found = fields_of(records, config)
    except DataError as reason:
        yield error("fields", str(reason), "list the fields in a --config", DataError)
        return
    decoder = decoder or Decoder(
        fields or found,
        max_record_bytes=limit,
        max_ahead_ms=in_milliseconds(config.input.max_ahead),
        time_format=TimeFormat(config.input.time_unit, config.input.time_zone),
        format=config.input.format,
    )
    events, rejects = decoder.decode(records.values, records.received)
    counted = [len(kind) for kind in events.kinds]
    yield from _check_codecs(records)
    yield _check_malformed(
        len(records.values), rejects.row, rejects.reason, rejects.message, config
    )
    yield from _check_fields(records.values, fields, found, config)
    yield from _check_kinds(*counted)
    yield from _check_delays(events, records.place, config)
    shown = events.impressions
    clicks = events.clicks
    joined = _joined(hash_ids(shown.impression_id), hash_ids(clicks.impression_id))
    yield from _check_coverage(joined, clicks.time, shown.time)
    if records.place is not None and records.key is not None:
        yield from _check_keys(records.place, records.key, joined, shown.row, clicks.row, config)
    rows = np.concatenate([kind.row for kind in events.kinds])
    times = np.concatenate([kind.time for kind in events.kinds])
    yield from _check_clocks(times, records.received[rows], records.received, now_ms, config)


def _check_codecs(records: Records) -> Iterator[Finding]:
    if records.codecs is not None:
        yield ok("codecs", f"the records use {', '.join(sorted(records.codecs)) or 'none'}")


def _check_malformed(
    n: int, rows: Array, reasons: Sequence[str], messages: Sequence[str], config: Config
) -> Finding:
    share = len(np.unique(rows)) / n
    if not len(rows):
        return ok("records", f"{n:,} records are well formed")
    (reason, _), *_ = Counter(reasons).most_common(1)
    first = one_line(messages[list(reasons).index(reason)])
    text = (
        f"{100 * share:.1f} % of {n:,} records are malformed, or hold malformed events; "
        f"most often {reason}: {first}"
    )
    if share > config.input.max_bad_share:
        fix = "a run ends with exit code 5: mend the producer, or input.time_unit, input.format"
        return error("records", text, fix, DataError)
    if share > _MALFORMED_WARNING:
        return warning("records", text, "mend the producer; they go to the dead letters")
    return ok("records", text)


def _check_fields(
    values: pa.LargeBinaryArray,
    configured: Sequence[Field],
    inferred: Sequence[Field],
    config: Config,
) -> Iterator[Finding]:
    if not configured:
        if not inferred:
            fix = "is it the topic of the impressions, and is input.format right?"
            yield error("fields", "no impression with features among the records", fix, DataError)
            return
        for kind in ("categorical", "numeric"):
            names = [one_line(field.name, 60) for field in inferred if field.kind == kind]
            if names:
                yield ok("fields", f"inferred as {kind}: {_some(names)}")
        return
    there = feature_names(values, max_record_bytes=config.input.max_record_bytes)
    missing = [field.name for field in configured if field.name not in there]
    if missing and there:
        hints = [
            f"{name} (did you mean {near!r}?)"
            if (near := nearest_word(name, sorted(there)))
            else name
            for name in missing
        ]
        fix = "are they spelled as in the events?"
        yield warning("fields", f"in no record of the sample: {_some(hints)}", fix)
    else:
        yield ok("fields", f"{len(configured)} configured")


def _check_kinds(impressions: int, clicks: int, examples: int) -> Iterator[Finding]:
    text = f"{impressions:,} impressions, {clicks:,} clicks, {examples:,} labelled examples"
    if impressions and not clicks:
        fix = (
            "is there a topic of clicks (--click-topic)? A model that sees no click learns nothing"
        )
        yield warning("events", text, fix)
    elif clicks and not impressions:
        yield warning("events", text, "is this the topic of clicks alone? --topic is that of both")
    else:
        yield ok("events", text)


def _check_delays(
    events: Events, place: Sequence[tuple[str, int]] | None, config: Config
) -> Iterator[Finding]:
    """Look at how far labelled examples come behind the latest event of their partition."""
    if not len(events.examples):
        return
    behind = _behind_ms(events, place)
    late = float((behind > in_milliseconds(config.join.allowed_lateness)).mean())
    longest = format_duration(timedelta(seconds=-(-int(behind.max()) // 1000)))
    text = f"labelled examples come up to {longest} behind the latest event of their partition"
    if late <= _LATE_WARNING:
        yield ok("delays", text)
        return
    share = f"{late:.0%}".replace("%", " %")
    fix = (
        "clicked ones may be learned long before the others of their time: "
        f"join.allowed_lateness = {longest}, or a little more"
    )
    yield warning("delays", f"{text}, {share} of them more than join.allowed_lateness", fix)


def _behind_ms(events: Events, place: Sequence[tuple[str, int]] | None) -> Array:
    """Return by how much each labelled example is older than an event before it [k]."""
    row, within, time = (
        np.concatenate([getattr(part, name) for part in events.kinds])
        for name in ("row", "within", "time")
    )
    numbers = {each: number for number, each in enumerate(dict.fromkeys(place or ()))}
    partition = np.array([numbers[place[each]] for each in row.tolist()]) if place else 0 * row
    behind = np.empty(len(time), np.int64)
    for number in np.unique(partition):
        own = np.flatnonzero(partition == number)
        own = own[np.lexsort((within[own], row[own]))]
        behind[own] = np.maximum.accumulate(time[own]) - time[own]
    return behind[len(time) - len(events.examples) :]


def _joined(shown: npt.NDArray[np.uint64], clicked: npt.NDArray[np.uint64]) -> Array:
    """Return the index of the impression of each click [m], -1 for none."""
    if not len(shown):
        return np.full(len(clicked), -1, np.int64)
    order = np.argsort(shown, kind="stable")
    at = np.minimum(np.searchsorted(shown[order], clicked), len(shown) - 1)
    return np.where(shown[order][at] == clicked, order[at], -1).astype(np.int64)


def _check_coverage(joined: Array, click_time: Array, shown_time: Array) -> Iterator[Finding]:
    """Look at the later half of the clicks: the impressions of the first may precede the sample."""
    if len(joined) < _LEAST_CLICKS or not len(shown_time):
        return
    late = np.argsort(click_time, kind="stable")[len(joined) // 2 :]
    share = float((joined[late] >= 0).mean())
    text = f"{share:.0%} of {len(late):,} clicks find their impression in the sample"
    text = text.replace("%", " %")
    if share < _LEAST_COVERAGE:
        fix = (
            "do clicks have the impression_id of their impression? If delays are long, the sample "
            "is too short to tell (--records)"
        )
        yield warning("coverage", text, fix)
    else:
        yield ok("coverage", text)


def _check_keys(
    place: Sequence[tuple[str, int]],
    key: Sequence[bytes | None],
    joined: Array,
    shown_row: Array,
    click_row: Array,
    config: Config,
) -> Iterator[Finding]:
    keyed = sum(each is not None for each in key) / len(key)
    pairs = np.flatnonzero(joined >= 0)
    text = f"{keyed:.0%} of the records have a key".replace("%", " %")
    if len(pairs) < _LEAST_CLICKS:
        yield ok("keys", text)
        return
    same = np.mean(
        [
            place[int(shown_row[joined[pair]])][1] == place[int(click_row[pair])][1]
            for pair in pairs.tolist()
        ]
    )
    text += f"; {same:.0%} of the clicks are in their impression's partition".replace("%", " %")
    partitions = len({number for _, number in place})
    if partitions > 1 and same < 1 and config.join.stall_clicks:
        fix = (
            "use impression_id as the key of both; otherwise a partition without clicks of its own "
            "may be taken for stalled (join.stall_clicks)"
        )
        yield warning("keys", text, fix)
    else:
        yield ok("keys", text)


def _check_clocks(
    times: Array, received: Array, all_received: Array, now_ms: int, config: Config
) -> Iterator[Finding]:
    known = received >= 0
    if not known.any():
        return
    ahead = times[known] - received[known]
    delay = float(np.median(-ahead)) / 1000
    share = float((ahead > _CLOCK_WARNING_MS).mean())
    text = f"events are {delay:,.1f} s older than their records (median)"
    if share > 0:
        bound = in_milliseconds(config.input.max_ahead) / 1000
        text = f"{share:.1%} of the events are ahead of their record's time".replace("%", " %")
        fix = f"a producer's clock is wrong; events more than {bound:g} s ahead are rejected"
        yield warning("event times", text, fix)
    else:
        yield ok("event times", text)
    newest = int(all_received.max())
    if newest - now_ms > _CLOCK_WARNING_MS:
        text = f"the newest record is {(newest - now_ms) / 1000:,.1f} s ahead of this machine"
        yield warning("clock", text, "the clock of this machine or of the broker is wrong (NTP)")
    else:
        age = timedelta(seconds=round((now_ms - newest) / 1000))
        yield ok("clock", f"the newest record is {age} old by the clock of this machine")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


# -- this machine --------------------------------------------------------------------------------


def check_machine(config: Config, state: Path, fields: Sequence[Field]) -> Iterator[Finding]:
    """Look at the device, the memory, the disk and the cache of compiled loops."""
    try:
        device = choose_device(config.learn.device)
        yield ok("device", f"{device} (learn.device = {config.learn.device})")
    except ConfigError as reason:
        yield error("device", str(reason), "learn.device = auto")
        return
    try:
        identity = run_identity(config, fields or (Field("field", "categorical"),))
    except StreamCtrError as reason:
        fix = "stream-ctr config shows the configuration in force"
        yield Finding("configuration", "error", str(reason), fix, reason.exit_code)
        return
    tables = {name: table_bytes(spec) for name, spec in identity.specs.items()}
    yield _check_memory(tables, config, on_gpu=device.type == "cuda")
    yield from _check_disk(sum(tables.values()), config, state)
    yield check_cache()


def table_bytes(spec: LearnerSpec) -> int:
    """Return the bytes of the table of a model."""
    if system(spec.model).module is None:
        bits = getattr(spec.pairs, "table_bits", spec.table_bits)
        return FLOAT_BYTES * _FTRL_FLOATS << bits
    embeddings = system(spec.model).embeddings
    floats = row_floats(spec.embedding_dim, embeddings=embeddings, optimizer=spec.table_optimizer)
    return FLOAT_BYTES * floats << spec.table_bits


def _check_memory(tables: Mapping[str, int], config: Config, *, on_gpu: bool) -> Finding:
    """Compare the tables and their copies with the memory, before anything is allocated.

    Each table has a copy for snapshots and, where impressions are scored as served, up to two more.
    """
    copies = 1 + (not on_gpu) + 2 * bool(config.metrics.served_share)
    total = sum(tables.values())
    need = copies * total + size(config.join.max_memory) + _PROCESS_BYTES
    available = available_memory()
    text = (
        f"tables of {mebibytes(total)} ({', '.join(tables)}), {copies} times with their copies, "
        f"and up to {config.join.max_memory} for the join: {mebibytes(need)} of "
        f"{mebibytes(available)} that are available"
    )
    fix = "lower model.table_bits or join.max_memory"
    if copies * total + _PROCESS_BYTES > available:
        return error("memory", text, fix, StreamCtrError)
    if need > available:
        return warning("memory", text, fix)
    return ok("memory", text)


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take: of the machine, and of its cgroup."""
    free = []
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            free.append(int(value.split()[0]) << 10)
    for limit, used in _CGROUP_FILES:
        bound = _text(root / limit).strip()
        if bound.isdigit():
            in_use = _text(root / used).strip()
            free.append(max(int(bound) - int(in_use or 0), 0))
    return min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


_CGROUP_FILES = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _check_disk(tables: int, config: Config, state: Path) -> Iterator[Finding]:
    folder = state
    while not folder.is_dir():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        fix = "give this user the right, or name another directory with --state"
        yield error("state", f"cannot write to {folder}", fix)
        return
    kept = snapshot.snapshot_ids(state / "snapshots")
    yield ok("state", f"{state}: {len(kept)} snapshots" if kept else f"{state} is new")
    free = shutil.disk_usage(folder).free
    missing = max(config.snapshots.keep + 1 - len(kept), 1)
    need = missing * tables
    text = (
        f"{mebibytes(free)} free; snapshots of {mebibytes(tables)} or more, of which "
        f"{config.snapshots.keep} are kept, take {mebibytes(need)} more"
    )
    if free < tables:
        yield error("disk", text, "free some, or lower model.table_bits", DataError)
    elif free < 2 * need:
        yield warning("disk", text, "free some, or lower snapshots.keep")
    else:
        yield ok("disk", text)


def check_cache() -> Finding:
    """Look at whether compiled loops can be kept for the next start."""
    folder = Path(sketch.cache_folder())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as reason:
        fix = "each start compiles anew: set NUMBA_CACHE_DIR to a directory that can be written"
        text = f"compiled loops cannot be kept in {folder}: {reason.strerror}"
        return warning("compiled loops", text, fix)
    return ok("compiled loops", f"kept in {folder}")
