"""Read a log into a dataset: decode, hash and join it as a stream is, so that both learn the same.

Labelled logs say which impressions were clicked but not when, and a simulation knows every click.
Both are read so that no click is late. Other logs are joined as configured. Losses on the way are
counted, and become notes of the dataset.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from stream_ctr.config import Config, Features, in_milliseconds, size
from stream_ctr.errors import ConfigError, DataError
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field
from stream_ctr.events.fit import fit_numbers
from stream_ctr.events.infer import infer_fields
from stream_ctr.join.examples import Examples
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks
from stream_ctr.logs.labelled_logs import AvazuLog, CriteoLog, OpenBanditLog
from stream_ctr.logs.log import Log
from stream_ctr.logs.simulate import Simulation
from stream_ctr.logs.text_log import TextLog, head
from stream_ctr.paper import dataset
from stream_ctr.paper.dataset import Dataset
from stream_ctr.train.ingest import Ingest
from stream_ctr.train.source import Source

CLICK_DELAY_SECONDS = 0.001
"""The delay of a click in logs that do not say when it happened."""
_LABELLED = (CriteoLog.format, AvazuLog.format, OpenBanditLog.format)
_LABELLED_WINDOW_MS = 60_000
_SIMULATED_WINDOW_MS = 6 * 3_600_000  # ten of ten million clicks come later
_INFER_RECORDS = 4000
_NO_HASHING = {"categorical", "numeric", "fit_numbers"}  # keys of the features
_POLL_SECONDS = 0.25
_PREFIX_BYTES = 1 << 20
_SNIFFED_BYTES = 64
_WARN_BYTES = 1 << 30
# Counts of the joiner, with the words for them.
_LOSSES = {
    "impressions_late": "late impressions",
    "impressions_duplicate": "duplicate impressions",
    "impressions_evicted": "evicted impressions",
    "clicks_late": "late clicks",
    "clicks_unmatched": "unmatched clicks",
    "clicks_evicted": "evicted clicks",
}

_log = logging.getLogger(__name__)


def read(
    log: Log,
    source: Source,
    config: Config,
    directory: Path,
    *,
    limit: int | None = None,
    console: Console,
) -> Dataset:
    """Return the dataset of a log: the one in `directory` if it is of this log, else a new one.

    `source` yields the records of the log. `limit` is a number of impressions. Raises `DataError`
    if `directory` holds the dataset of another log, or of the same log with other options.
    """
    fields = config.features.fields() or log.fields or _inferred_fields(source)
    hashing = {
        "table_bits": config.model.table_bits,
        **config.features.model_dump(mode="json", exclude=_NO_HASHING),
        **_fit(source, fields, config.features),
    }
    hasher = _make_hasher(fields, hashing)
    join_options = _join_options(log, config)
    identity = {
        "log": log.identity,
        "format": log.format,
        "bytes": log.path.stat().st_size if log.path else 0,
        "impressions": log.impressions if isinstance(log, Simulation) else None,
        "limit": limit,
        "hashing": hashing,
        "join": join_options,
        "fields": [[field.name, field.kind] for field in fields],
    }
    if found := dataset.open_existing(directory):
        _require_same(found.metadata["identity"], identity, directory)
        return found
    columns = len(fields) + len(hasher.crosses)
    row_bytes = dataset.row_bytes(columns, len(hasher.value_fields))
    _require_room(expected_rows(log, limit) * row_bytes, directory)
    joined = _join(source, hasher, config, join_options)

    def describe() -> dict[str, Any]:
        hashed = {
            "fields": len(fields),
            "crosses": len(hasher.crosses),
            "value_fields": hasher.value_fields,
        }
        notes = [*log.notes, *joined.notes(), *_unseen_fields(fields, joined)]
        return {"hashed": hashed, "notes": notes}

    examples = _with_progress(log, joined, console)
    return dataset.write(directory, examples, identity=identity, limit=limit, describe=describe)


# -- estimates -----------------------------------------------------------------------------------


def expected_rows(log: Log, limit: int | None = None) -> int:
    """Return the largest number of impressions to expect, judged by the beginning of the log.

    It is 0 if unknown, as for a compressed or columnar file.

    >>> expected_rows(Simulation(1000)), expected_rows(Simulation(1000), limit=100)
    (1000, 100)
    """
    rows = log.impressions if isinstance(log, Simulation) else _expected_lines(log)
    return rows if limit is None else min(rows, limit)


def expected_bytes(log: Log, config: Config, rows: int) -> int:
    """Return the bytes of the dataset, 0 if neither configuration nor format names the fields."""
    fields = config.features.fields() or log.fields or ()
    if not fields:
        return 0
    buckets = config.features.numeric_encoding == "buckets"
    value_fields = 0 if buckets else sum(field.kind == "numeric" for field in fields)
    return rows * dataset.row_bytes(len(fields) + len(config.features.crosses), value_fields)


def _expected_lines(log: Log) -> int:
    if log.path is None or not isinstance(log, TextLog):
        return 0
    with log.path.open("rb") as file:
        beginning = file.read(_PREFIX_BYTES)
    compressed = not beginning.startswith(head(log.path)[:_SNIFFED_BYTES])
    if compressed:
        return 0
    return round(log.path.stat().st_size * beginning.count(b"\n") / max(1, len(beginning)))


def _require_room(wanted: int, directory: Path) -> None:
    """Raise `DataError` if the disk lacks room for the dataset, before hours are spent."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if wanted > free:
        raise DataError(
            f"{directory} will take about {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "use another --out"
        )
    if wanted > _WARN_BYTES:
        _log.warning("%s will take about %.1f GB of disk", directory, wanted / 1e9)


# -- fields, hashing and join --------------------------------------------------------------------


def _beginning(source: Source) -> pa.LargeBinaryArray:
    """Return the first records, and rewind the source."""
    start = source.positions()
    records = source.poll(_POLL_SECONDS)
    source.seek(start)
    return records.value[:_INFER_RECORDS]


def _fit(source: Source, fields: Sequence[Field], features: Features) -> dict[str, Any]:
    """Return what the numbers are fitted to, as arguments of a `Hasher`."""
    if not features.fit_numbers:
        return {}
    fitted = fit_numbers(
        [_beginning(source)],
        fields,
        numeric_encoding=features.numeric_encoding,
        buckets_per_octave=features.buckets_per_octave,
    )
    return {
        "bucket_edges": {name: list(edges) for name, edges in fitted.bucket_edges.items()},
        "value_scales": fitted.value_scales,
    }


def _inferred_fields(source: Source) -> tuple[Field, ...]:
    """Return the fields of the first impressions, and rewind the source."""
    beginning = _beginning(source)
    fields = infer_fields(beginning)
    if fields:
        return fields
    _, rejected = Decoder(()).decode(beginning)
    reason = ""
    if len(rejected):
        reason = f"; record {rejected.row[0] + 1} is no event: {rejected.message[0]}"
    raise DataError(
        f"none of the first {len(beginning):,} records of the log is an impression with "
        f"features{reason}"
    )


def _unseen_fields(fields: Sequence[Field], joined: JoinedLog) -> Iterator[str]:
    """Yield a note on fields that no impression had. Raises `DataError` if these are all."""
    unseen = [field.name for field in fields if field.name not in joined.with_fields]
    if not unseen or not joined.impressions:
        return
    note = f"no impression has {', '.join(unseen)}: are these fields spelled as in the log?"
    if len(unseen) == len(fields):
        raise DataError(note)
    yield note


def _make_hasher(fields: Sequence[Field], hashing: Mapping[str, Any]) -> Hasher:
    try:
        return Hasher(fields, **hashing)
    except ValueError as error:
        raise ConfigError(f"features.crosses: {error}") from None


def _join_options(log: Log, config: Config) -> dict[str, Any]:
    """Return the label window and the lateness, in milliseconds, as the log needs them."""
    if log.format in _LABELLED or isinstance(log, Simulation):
        labelled = log.format in _LABELLED
        return {
            "label_window_ms": _LABELLED_WINDOW_MS if labelled else _SIMULATED_WINDOW_MS,
            "early_click_wait_ms": 0,
            "lateness_ms": 0,
            "stall_clicks": 0.0,
        }
    join = config.join
    return {
        "label_window_ms": in_milliseconds(join.label_window),
        "early_click_wait_ms": in_milliseconds(join.early_click_wait),
        "lateness_ms": in_milliseconds(join.allowed_lateness),
        "stall_clicks": join.stall_clicks,
    }


def _join(
    source: Source, hasher: Hasher, config: Config, join_options: Mapping[str, Any]
) -> JoinedLog:
    decoder = Decoder(
        hasher.fields,
        max_record_bytes=config.input.max_record_bytes,
        max_ahead_ms=in_milliseconds(config.input.max_ahead),
    )
    try:
        joiner = LabelJoiner(
            fields=len(hasher.fields) + len(hasher.crosses),
            value_fields=len(hasher.value_fields),
            id_bits=config.model.table_bits,
            label_window_ms=join_options["label_window_ms"],
            early_click_wait_ms=join_options["early_click_wait_ms"],
            duplicate_horizon_ms=in_milliseconds(config.join.duplicate_horizon),
            max_bytes=size(config.join.max_memory),
            over_bound=config.join.over_memory,
        )
    except ValueError as error:
        raise ConfigError(f"join.max_memory = {config.join.max_memory!r}: {error}") from None
    watermarks = Watermarks(
        partitions=len(source.partitions),
        lateness_ms=join_options["lateness_ms"],
        stall_clicks=join_options["stall_clicks"],
    )
    return JoinedLog(Ingest(source, decoder, hasher), joiner, watermarks)


class JoinedLog:
    """The examples of a log, in event-time order, joined as the trainer joins them.

    It counts the records and events that become no example.
    """

    def __init__(self, ingest: Ingest, joiner: LabelJoiner, watermarks: Watermarks) -> None:
        self._ingest = ingest
        self._joiner = joiner
        self._watermarks = watermarks
        self.rejected: Counter[str] = Counter()
        self.with_fields: set[str] = set()  # the fields of any impression

    def __iter__(self) -> Iterator[Examples]:
        status = self._ingest.status()
        while not status.finished:
            poll = self._ingest.take(_POLL_SECONDS)
            status = poll.status
            if poll.events:
                self._joiner.push(poll.events, self._watermarks)
                self.rejected.update(poll.events.rejected.reason)
                self.with_fields |= poll.events.with_fields
            watermark = self._watermarks.overall(excused=status.idle)
            yield from _until_empty(partial(self._joiner.advance, watermark))
        yield from _until_empty(self._joiner.drain)

    @property
    def impressions(self) -> int:
        """The number of impressions and examples read."""
        counts = self._joiner.counts()
        return counts["impressions"] + counts["labelled"]

    def notes(self) -> list[str]:
        """Return a phrase for each kind of loss."""
        counts = self._joiner.counts()
        rejected = [
            f"{count:,} records cannot be read as events ({reason})"
            for reason, count in sorted(self.rejected.items())
        ]
        lost = [f"{counts[name]:,} {words}" for name, words in _LOSSES.items() if counts.get(name)]
        return rejected + lost


def _until_empty(take: Callable[[], Examples]) -> Iterator[Examples]:
    while len(examples := take()):
        yield examples


def _with_progress(log: Log, joined: JoinedLog, console: Console) -> Iterator[Examples]:
    rows = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"reading {log.name}", total=1.0)
        for examples in joined:
            rows += len(examples)
            progress.update(
                task,
                completed=log.progress,
                description=f"reading {log.name}: {rows:,} impressions",
            )
            yield examples


# -- an earlier dataset --------------------------------------------------------------------------


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], directory: Path) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            difference = _difference(name, found.get(name), wanted[name])
            raise DataError(
                f"{directory} holds other data: {difference}. Use another --out, or --restart to "
                "begin anew in this one"
            )


def _difference(name: str, found: Any, wanted: Any) -> str:
    """Return a phrase on what differs between two identities.

    >>> _difference("hashing", {"table_bits": 12, "crosses": []}, {"table_bits": 20, "crosses": []})
    'table_bits is 12 there and 20 here'
    >>> _difference("limit", 20000, None)
    'the first 20,000 impressions there, as with --quick, and all here'
    """
    if name == "limit":
        there, here = (
            f"the first {rows:,} impressions" if rows else "all" for rows in (found, wanted)
        )
        quick = ", as with --quick," if found else ""
        return f"{there} there{quick} and {here} here"
    if isinstance(found, dict) and isinstance(wanted, dict):
        key = next(key for key in wanted if found.get(key) != wanted[key])
        return f"{key} is {found.get(key)} there and {wanted[key]} here"
    if name == "fields":
        return "its fields are others"
    if name == "log":
        return f"it is of {found}, and this is {wanted}"
    return f"the log's {name} is {found} there and {wanted} here"
