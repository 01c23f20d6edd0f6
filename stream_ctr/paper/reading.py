"""From a log to the dataset: decoded, hashed and joined as a stream is, so that what is learned here is what would be learned there.

Labelled logs say who clicked and not when, and a simulation knows all: both are read so that no click is late. The join of other logs is
that of the configuration. What is lost on the way is counted, and told with the data.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from stream_ctr.config import Config, in_milliseconds, size
from stream_ctr.errors import ConfigError, DataError
from stream_ctr.events.decoder import Decoder, infer_fields
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field
from stream_ctr.join import joining
from stream_ctr.join.joiner import Examples, LabelJoiner
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
"""Of logs that say who clicked and not when: a click follows at once."""
_LABELLED = (CriteoLog.format, AvazuLog.format, OpenBanditLog.format)
_LABELLED_WINDOW_MS = 60_000
_SIMULATED_WINDOW_MS = 6 * 3_600_000  # of ten million clicks ten come later
_INFER_RECORDS = 4000
_WORTH_A_WORD = 1 << 30

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
    """The dataset of the log, which `source` has the records of: the one in `directory` if it is of this log, else a new one.

    Raises `DataError` when the one that is there is of another log, was hashed otherwise, or is of another length.
    """
    fields = config.features.fields() or log.fields or _inferred(source)
    hashing = {
        "table_bits": config.model.table_bits,
        **config.features.model_dump(mode="json", exclude={"categorical", "numeric"}),
    }
    try:
        hasher = Hasher(fields, **hashing)
    except ValueError as error:
        raise ConfigError(f"features.crosses: {error}") from None
    joining = _joining(log, config)
    identity = {
        "log": log.identity, "format": log.format, "bytes": log.path.stat().st_size if log.path else 0,
        "impressions": log.impressions if isinstance(log, Simulation) else None, "limit": limit, "hashing": hashing, "join": joining,
        "fields": [[field.name, field.kind] for field in fields],
    }  # fmt: skip
    if found := dataset.existing(directory):
        _require_same(found.about["identity"], identity, directory)
        return found
    _require_room(
        expected_rows(log, limit)
        * dataset.row_bytes(len(fields) + len(hasher.crosses), len(hasher.value_fields)),
        directory,
    )
    joined = _joined(source, hasher, config, joining)
    hashed = {
        "fields": len(fields),
        "crosses": len(hasher.crosses),
        "value_fields": hasher.value_fields,
    }

    def about() -> dict[str, Any]:
        return {"hashed": hashed, "notes": [*log.notes, *joined.notes(), *_unseen(fields, joined)]}

    return dataset.write(
        directory, _watched(log, joined, console), identity=identity, limit=limit, about=about
    )


def expected_rows(log: Log, limit: int | None = None) -> int:
    """How many impressions there are at most, as far as the beginning tells; 0 where it does not: in a compressed or columnar file.

    >>> expected_rows(Simulation(1000)), expected_rows(Simulation(1000), limit=100)
    (1000, 100)
    """
    rows = log.impressions if isinstance(log, Simulation) else _lines(log)
    return rows if limit is None else min(rows, limit)


def expected_bytes(log: Log, config: Config, rows: int) -> int:
    """On disk; 0 where neither the configuration nor the format tells the fields."""
    fields = config.features.fields() or log.fields or ()
    crosses, values = len(config.features.crosses), sum(field.kind == "numeric" for field in fields)
    return (
        rows
        * dataset.row_bytes(
            len(fields) + crosses, values if config.features.numeric_encoding != "buckets" else 0
        )
        if fields
        else 0
    )


def _lines(log: Log) -> int:
    if log.path is None or not isinstance(log, TextLog):
        return 0
    with log.path.open("rb") as file:
        beginning = file.read(1 << 20)
    plain = beginning.startswith(head(log.path)[:64])
    return (
        round(log.path.stat().st_size * beginning.count(b"\n") / max(1, len(beginning)))
        if plain
        else 0
    )


def _require_room(wanted: int, directory: Path) -> None:
    """On disk, before hours are spent."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if wanted > free:
        raise DataError(
            f"{directory} will take about {wanted / 1e9:.1f} GB, and there are {free / 1e9:.1f} GB free; use another --out"
        )
    if wanted > _WORTH_A_WORD:
        _log.warning("%s will take about %.1f GB of disk", directory, wanted / 1e9)


def _inferred(source: Source) -> tuple[Field, ...]:
    """From the first impressions, after which the source is where it was."""
    start = source.positions()
    records = source.poll(0.25)
    source.seek(start)
    beginning = records.value[:_INFER_RECORDS]
    fields = infer_fields(beginning)
    if not fields:
        _, rejected = Decoder(()).decode(beginning)
        first = (
            f"; record {rejected.row[0] + 1} is no event: {rejected.message[0]}"
            if len(rejected)
            else ""
        )
        raise DataError(
            f"none of the first {len(beginning):,} records of the log is an impression with features{first}"
        )
    return fields


def _joining(log: Log, config: Config) -> dict[str, Any]:
    if log.format in _LABELLED:
        return {
            "label_window_ms": _LABELLED_WINDOW_MS,
            "early_click_wait_ms": 0,
            "lateness_ms": 0,
            "stall_clicks": 0.0,
        }
    if isinstance(log, Simulation):
        return {
            "label_window_ms": _SIMULATED_WINDOW_MS,
            "early_click_wait_ms": 0,
            "lateness_ms": 0,
            "stall_clicks": 0.0,
        }
    join = config.join
    return {
        "label_window_ms": in_milliseconds(join.label_window), "early_click_wait_ms": in_milliseconds(join.early_click_wait),
        "lateness_ms": in_milliseconds(join.allowed_lateness), "stall_clicks": join.stall_clicks,
    }  # fmt: skip


def _joined(source: Source, hasher: Hasher, config: Config, joining: dict[str, Any]) -> Joined:
    decoder = Decoder(
        hasher.fields, max_record_bytes=config.input.max_record_bytes, max_ahead_ms=in_milliseconds(config.input.max_ahead)
    )  # fmt: skip
    try:
        joiner = LabelJoiner(
            fields=len(hasher.fields) + len(hasher.crosses), value_fields=len(hasher.value_fields), id_bits=config.model.table_bits,
            label_window_ms=joining["label_window_ms"], early_click_wait_ms=joining["early_click_wait_ms"],
            duplicate_horizon_ms=in_milliseconds(config.join.duplicate_horizon), max_bytes=size(config.join.max_memory),
            over_bound=config.join.over_memory,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"join.max_memory = {config.join.max_memory!r}: {error}") from None
    watermarks = Watermarks(
        partitions=len(source.partitions),
        lateness_ms=joining["lateness_ms"],
        stall_clicks=joining["stall_clicks"],
    )
    return Joined(Ingest(source, decoder, hasher), joiner, watermarks)


def _unseen(fields: Sequence[Field], joined: Joined) -> Iterator[str]:
    """A note on fields that no impression had. Raises `DataError` when these are all."""
    unseen = [field.name for field in fields if field.name not in joined.with_fields]
    if not unseen or not joined.impressions:
        return
    said = f"no impression has {', '.join(unseen)}: are these fields spelled as in the log?"
    if len(unseen) == len(fields):
        raise DataError(said)
    yield said


def _require_same(found: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            difference = _difference(name, found.get(name), wanted[name])
            raise DataError(
                f"{directory} holds other data: {difference}. Use another --out, or --restart to begin anew in this one"
            )


def _difference(name: str, found: Any, wanted: Any) -> str:
    """In words.

    >>> _difference("hashing", {"table_bits": 12, "crosses": []}, {"table_bits": 20, "crosses": []})
    'table_bits is 12 there and 20 here'
    >>> _difference("limit", 20000, None)
    'the first 20,000 impressions there, as with --quick, and all here'
    """
    if name == "limit":
        there, here = (
            f"the first {most:,} impressions" if most else "all" for most in (found, wanted)
        )
        return f"{there} there{', as with --quick,' if found else ''} and {here} here"
    if isinstance(found, dict) and isinstance(wanted, dict):
        return next(
            f"{key} is {found.get(key)} there and {wanted[key]} here"
            for key in wanted
            if found.get(key) != wanted[key]
        )
    if name == "fields":
        return "its fields are others"
    return (
        f"the log's {name} is {found} there and {wanted} here"
        if name != "log"
        else f"it is of {found}, and this is {wanted}"
    )


def _watched(log: Log, joined: Joined, console: Console) -> Iterator[Examples]:
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


class Joined:
    """The examples of a log that ends, in event-time order, joined as the trainer joins them; and what became of the rest."""

    def __init__(self, ingest: Ingest, joiner: LabelJoiner, watermarks: Watermarks) -> None:
        self._ingest, self._joiner, self._watermarks = ingest, joiner, watermarks
        self.rejected: Counter[str] = Counter()
        self.with_fields: set[str] = set()  # that any impression had

    def __iter__(self) -> Iterator[Examples]:
        status = self._ingest.status()
        while not status.finished:
            poll = self._ingest.take(0.25)
            status = poll.status
            if poll.events:
                joining.push(poll.events, self._joiner, self._watermarks)
                self.rejected.update(poll.events.rejected.reason)
                self.with_fields |= poll.events.with_fields
            watermark = self._watermarks.overall(excused=status.idle)
            yield from _all(lambda watermark=watermark: self._joiner.advance(watermark))  # type: ignore[misc]
        yield from _all(self._joiner.drain)

    @property
    def impressions(self) -> int:
        return self._joiner.counts()["impressions"]

    def notes(self) -> list[str]:
        """What was lost on the way, a sentence each."""
        lost = (
            "impressions_late",
            "impressions_duplicate",
            "impressions_evicted",
            "clicks_late",
            "clicks_unmatched",
            "clicks_evicted",
        )
        counts = self._joiner.counts()
        found = [
            f"{count:,} records cannot be read as events ({reason})"
            for reason, count in sorted(self.rejected.items())
        ]
        return found + [
            f"{counts[name]:,} {name.replace('_', ' ')}" for name in lost if counts.get(name)
        ]


def _all(leave: Callable[[], Examples]) -> Iterator[Examples]:
    while len(examples := leave()):
        yield examples
