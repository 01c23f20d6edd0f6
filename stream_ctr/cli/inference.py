"""Inferring the fields from the first records of a source, if the configuration names none."""

from __future__ import annotations

import time
from collections.abc import Callable

import pyarrow as pa

from stream_ctr.errors import DataError
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.infer import infer_fields
from stream_ctr.messages import one_line
from stream_ctr.train.source import Source

_RECORDS = 1000
_SECONDS = 10.0
_MOST_RECORDS = 100_000  # without a single impression
_REMARKS = {
    "categorical": "",
    "numeric": " - numbers are taken as quantities; list ids in features.categorical",
}


def inferred_fields(
    source: Source,
    *,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    max_record_bytes: int,
) -> tuple[Field, ...]:
    """Return the fields of the first impressions; the source is then where it was.

    It looks at the first thousand records from the first impression on, or at those of ten seconds.
    Without impressions it waits for them. Returns nothing if `stopped` becomes true.

    Raises `DataError` if there are records and no impression among them.
    """
    start = source.positions()
    sample = _Sample(max_record_bytes)
    waiting = False
    while not source.finished and not stopped() and not sample.complete:
        records = source.poll(0.25)
        if len(records):
            sample.add(records.value)
        elif not source.until_end and not waiting:
            waiting = True
            say(
                "waiting for the first impressions, to infer their fields "
                "(or name them in a --config)"
            )
    if stopped():
        return ()
    if not sample.fields:
        topics = ", ".join(sorted({topic for topic, _ in source.partitions}))
        raise DataError(
            f"no impression with features among {sample.records:,} records of {topics}: "
            f"nothing to learn from{describe_records(sample.first)}"
        )
    source.seek(start)
    for kind, remark in _REMARKS.items():
        names = [one_line(field.name, 60) for field in sample.fields if field.kind == kind]
        if names:
            say(f"note: no fields configured; inferred as {kind}: {', '.join(names)}{remark}")
    return sample.fields


class _Sample:
    """The first records, from the first impression on."""

    def __init__(self, max_record_bytes: int) -> None:
        self.records = 0
        self.first: pa.LargeBinaryArray | None = None
        self.fields: tuple[Field, ...] = ()
        self._max_record_bytes = max_record_bytes
        self._values: list[pa.LargeBinaryArray] = []
        self._deadline = 0.0

    @property
    def complete(self) -> bool:
        if not self.fields:
            return self.records >= _MOST_RECORDS
        return sum(map(len, self._values)) >= _RECORDS or time.monotonic() > self._deadline

    def add(self, values: pa.LargeBinaryArray) -> None:
        self.records += len(values)
        # A copy: the rest of the poll need not be kept.
        head = values.take(pa.array(range(min(len(values), 4 * _RECORDS))))
        self.first = head if self.first is None else self.first
        if not self._values and not self._infer([head]):
            return
        self._values.append(head)
        if not self.fields:
            self._deadline = time.monotonic() + _SECONDS
        self.fields = self._infer(self._values)

    def _infer(self, values: list[pa.LargeBinaryArray]) -> tuple[Field, ...]:
        return infer_fields(pa.concat_arrays(values), max_record_bytes=self._max_record_bytes)


def describe_records(values: pa.LargeBinaryArray | None) -> str:
    """Return what records without any features are instead.

    >>> describe_records(pa.array([b'{"type":"impression"}'], pa.large_binary()))
    '. The first malformed record: kind must be impression or click, got None'
    """
    if values is None:
        return ""
    events, rejects = Decoder(()).decode(values)
    if len(rejects):
        return f". The first malformed record: {one_line(rejects.message[0])}"
    return (
        f". Of the first {len(values):,} {len(events.impressions):,} are impressions without "
        f"features, {len(events.clicks):,} are clicks"
    )
