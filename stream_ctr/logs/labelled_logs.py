"""Logs of labelled impressions: Criteo, Avazu and Open Bandit.

These logs say which impressions were clicked, but not when. Criteo and Avazu also lack the times of
the impressions. The missing times are synthesized from a seed (`SyntheticTimes`), and every pass
gives the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import DataError
from stream_ctr.events.arrow_columns import mask, one_array
from stream_ctr.events.field import Field
from stream_ctr.events.times import TimeFormat
from stream_ctr.logs.log import (
    ClickDelays,
    LogBatch,
    impression_batch,
    in_time_order,
    merge_clicks,
)
from stream_ctr.logs.rows import Rejected, Rows
from stream_ctr.logs.text_log import TextLog, head
from stream_ctr.messages import one_line

DELAY_SIGMA = 1.3
"""Standard deviation of the logarithm of a synthetic click delay.

With a median of 30 s, 1 % of the delays are longer than 10 minutes.
"""

_HOUR_MS = 3_600_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_CRITEO_INTEGERS = tuple(f"I{i}" for i in range(1, 14))
_CRITEO_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
CRITEO_COLUMNS = ("label", *_CRITEO_INTEGERS, *_CRITEO_CATEGORIES)
AVAZU_COLUMNS = (
    *("id", "click", "hour", "C1", "banner_pos"),
    *("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)
_DERIVED_FROM_HOUR = ("hour_of_day", "day_of_week")
_NO_FEATURES_OF_OPEN_BANDIT = ("index", "timestamp", "click", "policy", "propensity_score")


@dataclass(frozen=True, slots=True)
class SyntheticTimes:
    """Parameters of the times that a log lacks.

    Impressions are spaced evenly at `rate` a second of event time, from `start_ms` (epoch
    milliseconds) on, or over all of `span` if it is given. Click delays are log-normal with median
    `click_delay_seconds`.
    """

    seed: int
    click_delay_seconds: float
    rate: float
    start_ms: int
    span: timedelta | None = None

    def spread_over(self, rows: int) -> SyntheticTimes:
        """Return the times with the rate at which so many rows take the span, if there is one.

        >>> times = SyntheticTimes(0, 30.0, rate=100.0, start_ms=0, span=timedelta(seconds=6))
        >>> times.spread_over(3).impression_time(np.arange(3)).tolist()
        [0, 2000, 4000]
        """
        if not self.span:
            return self
        return replace(self, rate=max(rows, 1) / self.span.total_seconds())

    def impression_time(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the epoch milliseconds of the impressions in these rows, which count from 0.

        >>> SyntheticTimes(0, 30.0, rate=4.0, start_ms=1000).impression_time(np.arange(3)).tolist()
        [1000, 1250, 1500]
        """
        return self.start_ms + (row * (1000 / self.rate)).astype(np.int64)

    def click_delays(self) -> ClickDelays:
        rng = np.random.default_rng([self.seed, 0])
        return ClickDelays(rng, self.click_delay_seconds, DELAY_SIGMA)

    def impression_note(self) -> str:
        start = datetime.fromtimestamp(self.start_ms / 1000, UTC).isoformat()
        if self.span:
            return (
                "no event times in this log: "
                f"impressions spread evenly over {_in_words(self.span)} from {start} on (--span)"
            )
        return (
            "no event times in this log: "
            f"impressions spaced evenly at {self.rate:g} a second from {start} on"
        )

    def click_note(self) -> str:
        return (
            "no click times in this log: delays drawn from a log-normal "
            f"with median {self.click_delay_seconds:g} s, seed {self.seed}"
        )


class CriteoLog(TextLog):
    """The log of the Criteo display advertising challenge.

    Fields are I1 to I13, numeric, and C1 to C26, categorical. Ids are `criteo-<line>`.
    """

    format = "criteo"

    def __init__(self, path: Path, times: SyntheticTimes) -> None:
        fields = _fields(_CRITEO_CATEGORIES, _CRITEO_INTEGERS)
        super().__init__(path, fields, (times.impression_note(), times.click_note()))
        self._times = times

    @property
    def identity(self) -> str:
        """The identity of the log, and the span that its times depend on."""
        span = self._times.span
        return f"{super().identity}~{_in_words(span)}" if span else super().identity

    def _read(self) -> Iterator[LogBatch]:
        times = self._times.spread_over(self.count_lines() if self._times.span else 0)
        return merge_clicks(self._impressions(times))

    def _impressions(self, times: SyntheticTimes) -> Iterator[pa.RecordBatch]:
        delays = times.click_delays()
        for rows in self.rows(CRITEO_COLUMNS, "\t", header=None):
            rows = rows.labelled("label")
            for name in _CRITEO_INTEGERS:
                rows = rows.parsed(name, _integers, "an integer")
            time = times.impression_time(rows.line - 1)
            click_time = delays.click_time(time, rows.equal("label", "1"))
            features = rows.features((*_CRITEO_CATEGORIES, *_CRITEO_INTEGERS))
            yield impression_batch(_ids("criteo", rows.line), time, click_time, features)


class AvazuLog(TextLog):
    """The log of the Avazu click-through rate challenge, with or without its header.

    Every column except id, click and hour is a categorical field. Two more are derived from the
    hour: hour_of_day and day_of_week (0 is Monday). The log knows the time of an impression to the
    hour; impressions are spread evenly over their hour in file order.
    """

    format = "avazu"

    def __init__(self, path: Path, times: SyntheticTimes) -> None:
        first_line = head(path).partition(b"\n")[0].rstrip(b"\r")
        self._header = first_line if first_line.startswith(b"id,") else None
        self._columns = AVAZU_COLUMNS
        if self._header:
            self._columns = _header_columns(path, first_line, reserved=_DERIVED_FROM_HOUR)
        if missing := {"id", "click", "hour"} - set(self._columns):
            raise DataError(
                f"{path} has no column {', '.join(sorted(missing))}: it cannot say who clicked when"
            )
        self._features = tuple(
            name for name in self._columns if name not in ("id", "click", "hour")
        )
        spread = (
            "event times are known to the hour only: "
            "impressions spread evenly over each hour in file order"
        )
        fields = _fields((*self._features, *_DERIVED_FROM_HOUR))
        super().__init__(path, fields, (spread, times.click_note()))
        self._times = times

    def _read(self) -> Iterator[LogBatch]:
        counts, ascending = self._count_hours()
        impressions = self._impressions(counts)
        return merge_clicks(impressions if ascending else in_time_order(impressions))

    def _count_hours(self) -> tuple[dict[str, int], bool]:
        """Return the number of impressions in each hour, and if the hours are in ascending order.

        This is a pass of its own: to spread the impressions of an hour, their number is needed.
        """
        counts: dict[str, int] = {}
        ascending = True
        latest = ""
        for rows in self.rows(self._columns, ",", header=self._header, only=["hour"]):
            runs = pc.run_end_encode(one_array(rows.columns["hour"].drop_null()))
            lengths = np.diff(runs.run_ends.to_numpy(), prepend=0).tolist()
            for hour, length in zip(runs.values.to_pylist(), lengths, strict=True):
                counts[hour] = counts.get(hour, 0) + length
                ascending &= hour >= latest
                latest = hour
        self.rejected = Rejected()  # the second pass finds the same lines
        return counts, ascending

    def _impressions(self, counts: Mapping[str, int]) -> Iterator[pa.RecordBatch]:
        delays = self._times.click_delays()
        seen = dict.fromkeys(counts, 0)
        for rows in self.rows(self._columns, ",", header=self._header):
            rows, starts = _with_hour_starts(rows)
            rows = rows.labelled("click").identified("id")
            hour = one_array(rows.columns["hour"]).dictionary_encode()
            hours = hour.dictionary.to_pylist()
            moments = [starts[text] for text in hours]
            codes = hour.indices.to_numpy()
            time = np.zeros(len(codes), np.int64)
            for code, (text, moment) in enumerate(zip(hours, moments, strict=True)):
                index = np.flatnonzero(codes == code)
                nth = seen[text] + np.arange(len(index))
                time[index] = _spread(moment, nth, counts[text])
                seen[text] += len(index)
            click_time = delays.click_time(time, rows.equal("click", "1"))
            hour_of_day = pa.array([str(moment.hour) for moment in moments], pa.string())
            day_of_week = pa.array([str(moment.weekday()) for moment in moments], pa.string())
            features = {
                **rows.features(self._features),
                "hour_of_day": hour_of_day.take(hour.indices),
                "day_of_week": day_of_week.take(hour.indices),
            }
            yield impression_batch(one_array(rows.columns["id"]), time, click_time, features)


def _with_hour_starts(rows: Rows) -> tuple[Rows, dict[str, datetime]]:
    """Return the rows whose hour is YYMMDDHH, and the start of each hour by its text."""
    starts = {
        text: start
        for text in pc.unique(rows.columns["hour"].drop_null()).to_pylist()
        if (start := _hour_start(text))
    }
    good = pc.is_in(rows.columns["hour"], pa.array(list(starts), pa.string()))
    return rows.keep(mask(good), "hour", "YYMMDDHH"), starts


def _hour_start(text: str) -> datetime | None:
    """Return the start of the hour YYMMDDHH, or None when the text is no hour.

    >>> _hour_start("14102100"), _hour_start("14102124")
    (datetime.datetime(2014, 10, 21, 0, 0, tzinfo=datetime.timezone.utc), None)
    """
    if len(text) != 8 or not text.isdecimal():
        return None
    try:
        return datetime.strptime(text, "%y%m%d%H").replace(tzinfo=UTC)
    except ValueError:
        return None


def _spread(hour_start: datetime, nth: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return the epoch milliseconds of the `nth` (from 0) of `count` impressions in an hour.

    >>> ((_spread(_EPOCH, np.arange(3), 3)) / 60_000).tolist()
    [10.0, 30.0, 50.0]
    """
    start_ms = (hour_start - _EPOCH) // timedelta(milliseconds=1)
    return start_ms + (2 * nth + 1) * _HOUR_MS // (2 * count)


class OpenBanditLog(TextLog):
    """A log of the Open Bandit Dataset. Ids are `obd-<line>`.

    Columns with `affinity` in their name are numeric fields, all others are categorical. Columns
    that describe the logging policy rather than the impression (policy, propensity_score) are not
    fields.
    """

    format = "obd"

    def __init__(self, path: Path, times: SyntheticTimes) -> None:
        self._header = head(path).partition(b"\n")[0].rstrip(b"\r")
        self._columns = _header_columns(path, self._header)
        if missing := {"timestamp", "click"} - set(self._columns):
            raise DataError(
                f"{path} is not an Open Bandit log: "
                f"its first line has no column {', '.join(sorted(missing))}"
            )
        features = [name for name in self._columns if name not in _NO_FEATURES_OF_OPEN_BANDIT]
        self._numeric = tuple(name for name in features if "affinity" in name)
        self._categorical = tuple(name for name in features if "affinity" not in name)
        fields = _fields(self._categorical, self._numeric)
        super().__init__(path, fields, (times.click_note(),))
        self._times = times

    def _read(self) -> Iterator[LogBatch]:
        return merge_clicks(in_time_order(self._impressions()))

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        delays = self._times.click_delays()
        for rows in self.rows(self._columns, ",", header=self._header):
            rows = rows.labelled("click")
            rows = rows.parsed("timestamp", TimeFormat().epoch_ms, "a time with its zone offset")
            rows = rows.keep(mask(pc.is_valid(rows.columns["timestamp"])), "timestamp", "a time")
            for name in self._numeric:
                rows = rows.parsed(name, _finite, "a finite number")
            time = one_array(rows.columns["timestamp"]).to_numpy()
            click_time = delays.click_time(time, rows.equal("click", "1"))
            features = rows.features((*self._categorical, *self._numeric))
            yield impression_batch(_ids("obd", rows.line), time, click_time, features)


def _in_words(span: timedelta) -> str:
    """Return a span as it is given.

    >>> _in_words(timedelta(days=7)), _in_words(timedelta(hours=36))
    ('7d', '36h')
    """
    seconds = span.total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"


def _header_columns(path: Path, header: bytes, reserved: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the column names in the first line.

    Raises `DataError` when a name appears twice, or is one of `reserved`.
    """
    try:
        names = header.decode("utf-8").split(",")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:1: the header is not text: {error}") from None
    names = [name or "index" for name in names]  # pandas leaves the name of its index blank
    counts = Counter([*names, *reserved])
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"{path}:1: column {one_line(repeated[0])} appears twice")
    return tuple(names)


def _fields(categorical: Iterable[str], numeric: Iterable[str] = ()) -> tuple[Field, ...]:
    return (
        *(Field(name, "categorical") for name in categorical),
        *(Field(name, "numeric") for name in numeric),
    )


def _ids(prefix: str, line: npt.NDArray[np.int64]) -> pa.StringArray:
    return pc.binary_join_element_wise(prefix, pa.array(line).cast(pa.string()), "-")


def _integers(text: pa.Array) -> pa.Array:
    return text.cast(pa.int64())


def _finite(text: pa.Array) -> pa.Array:
    numbers = text.cast(pa.float64())
    if not pc.all(pc.is_finite(numbers), min_count=0).as_py():
        raise pa.ArrowInvalid("not finite")
    return numbers
