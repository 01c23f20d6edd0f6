"""Logs of labelled impressions: they say who clicked, never when. Criteo and Avazu leave out even when an impression was shown.

What they do not say is invented from a seed (`Invention`), the same in every pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import DataError
from stream_ctr.events.arrow_columns import epoch_ms, mask, one_array
from stream_ctr.events.field import Field
from stream_ctr.logs.log import (
    ClickDelays,
    LogBatch,
    impression_batch,
    in_time_order,
    merge_clicks,
)
from stream_ctr.logs.rows import Rejected
from stream_ctr.logs.text_log import TextLog, head
from stream_ctr.messages import one_line

DELAY_SIGMA = 1.3
"""Spread of invented click delays (standard deviation of their logarithm): with a median of 30 s, 1 % take longer than 10 minutes."""

_HOUR_MS = 3_600_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_CRITEO_INTEGERS = tuple(f"I{i}" for i in range(1, 14))
_CRITEO_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
CRITEO_COLUMNS = ("label", *_CRITEO_INTEGERS, *_CRITEO_CATEGORIES)
AVAZU_COLUMNS = (
    *(
        "id",
        "click",
        "hour",
        "C1",
        "banner_pos",
        "site_id",
        "site_domain",
        "site_category",
        "app_id",
        "app_domain",
        "app_category",
    ),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)
_OF_THE_HOUR = ("hour_of_day", "day_of_week")


class CriteoLog(TextLog):
    """The Criteo display advertising challenge: numeric I1 to I13, categorical C1 to C26. Ids are `criteo-<line>`."""

    format = "criteo"

    def __init__(self, path: Path, invention: Invention) -> None:
        at = datetime.fromtimestamp(invention.start_ms / 1000, UTC).isoformat()
        spacing = f"no event times in this log: impressions spaced evenly at {invention.rate:g} a second from {at} on"
        super().__init__(
            path, _fields(_CRITEO_CATEGORIES, _CRITEO_INTEGERS), (spacing, invention.click_note())
        )
        self.invention = invention

    def _read(self) -> Iterator[LogBatch]:
        return merge_clicks(self._impressions())

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        delays = self.invention.click_delays()
        for rows in self.rows(CRITEO_COLUMNS, "\t", header=None):
            rows = rows.labelled("label")
            for name in _CRITEO_INTEGERS:
                rows = rows.parsed(name, _integers, "an integer")
            time = self.invention.start_ms + (
                (rows.line - 1) * (1000 / self.invention.rate)
            ).astype(np.int64)
            features = rows.features((*_CRITEO_CATEGORIES, *_CRITEO_INTEGERS))
            yield impression_batch(
                _ids("criteo", rows.line),
                time,
                delays.click_time(time, rows.equal("label", "1")),
                features,
            )


class AvazuLog(TextLog):
    """The Avazu challenge: every column but id, click and hour is categorical, and so are hour_of_day and day_of_week (0: Monday)."""

    format = "avazu"

    def __init__(self, path: Path, invention: Invention) -> None:
        first = head(path).partition(b"\n")[0].rstrip(b"\r")
        self.header = first if first.startswith(b"id,") else None
        self.columns = _header_columns(path, first, *_OF_THE_HOUR) if self.header else AVAZU_COLUMNS
        missing = {"id", "click", "hour"} - set(self.columns)
        if missing:
            raise DataError(
                f"{path} has no column {', '.join(sorted(missing))}: it cannot say who clicked when"
            )
        self.features = tuple(name for name in self.columns if name not in ("id", "click", "hour"))
        spread = "event times are known to the hour only: impressions spread evenly over each hour in file order"
        super().__init__(
            path, _fields((*self.features, *_OF_THE_HOUR)), (spread, invention.click_note())
        )
        self.invention = invention

    def _read(self) -> Iterator[LogBatch]:
        counts, ascending = self._count_hours()
        impressions = self._impressions(counts)
        return merge_clicks(impressions if ascending else in_time_order(impressions))

    def _count_hours(self) -> tuple[dict[str, int], bool]:
        """Impressions in each hour, and whether the hours ascend: a pass of its own, for a spread needs the count beforehand."""
        counts: dict[str, int] = {}
        ascending, latest = True, ""
        for rows in self.rows(self.columns, ",", header=self.header, only=["hour"]):
            hours = pc.run_end_encode(one_array(rows.columns["hour"].drop_null()))
            for hour, ahead in zip(
                hours.values.to_pylist(),
                np.diff(hours.run_ends.to_numpy(), prepend=0).tolist(),
                strict=True,
            ):
                counts[hour] = counts.get(hour, 0) + ahead
                ascending &= hour >= latest
                latest = hour
        self.rejected = Rejected()
        return counts, ascending

    def _impressions(self, counts: Mapping[str, int]) -> Iterator[pa.RecordBatch]:
        delays = self.invention.click_delays()
        seen = dict.fromkeys(counts, 0)
        for rows in self.rows(self.columns, ",", header=self.header):
            starts = {
                hour: start
                for hour in pc.unique(rows.columns["hour"].drop_null()).to_pylist()
                if (start := _hour_start(hour))
            }
            good = pa.array(list(starts), pa.string())
            rows = (
                rows.only(mask(pc.is_in(rows.columns["hour"], good)), "hour", "YYMMDDHH")
                .labelled("click")
                .identified("id")
            )
            hour = one_array(rows.columns["hour"]).dictionary_encode()
            codes, moments = (
                hour.indices.to_numpy(),
                [starts[text] for text in hour.dictionary.to_pylist()],
            )
            time = np.zeros(len(codes), np.int64)
            for code, text in enumerate(hour.dictionary.to_pylist()):
                at = np.flatnonzero(codes == code)
                nth = seen[text] + np.arange(len(at))
                time[at] = (moments[code] - _EPOCH) // timedelta(milliseconds=1) + (
                    2 * nth + 1
                ) * _HOUR_MS // (2 * counts[text])
                seen[text] += len(at)
            features = {
                **rows.features(self.features),
                "hour_of_day": pa.array([str(moment.hour) for moment in moments], pa.string()).take(
                    hour.indices
                ),
                "day_of_week": pa.array(
                    [str(moment.weekday()) for moment in moments], pa.string()
                ).take(hour.indices),
            }
            yield impression_batch(
                one_array(rows.columns["id"]),
                time,
                delays.click_time(time, rows.equal("click", "1")),
                features,
            )


def _header_columns(path: Path, header: bytes, *ours: str) -> tuple[str, ...]:
    """The names in the first line, none of them twice, and none that is one of `ours`."""
    try:
        names = [
            name or "index" for name in header.decode("utf-8").split(",")
        ]  # pandas leaves that of its index column blank
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:1: the header is no text: {error}") from None
    if twice := [name for name, count in Counter([*names, *ours]).items() if count > 1]:
        raise DataError(f"{path}:1: column {one_line(twice[0])} is there twice")
    return tuple(names)


def _hour_start(text: str) -> datetime | None:
    """
    >>> _hour_start("14102100"), _hour_start("14102124")
    (datetime.datetime(2014, 10, 21, 0, 0, tzinfo=datetime.timezone.utc), None)
    """
    try:
        return (
            datetime.strptime(text, "%y%m%d%H").replace(tzinfo=UTC)
            if len(text) == 8 and text.isdecimal()
            else None
        )
    except ValueError:
        return None


class OpenBanditLog(TextLog):
    """An Open Bandit log. Ids are `obd-<line>`. Affinities are numeric, all else is categorical; what describes the logging policy
    rather than the impression (policy, propensity_score) is no feature.
    """

    format = "obd"

    def __init__(self, path: Path, invention: Invention) -> None:
        self.header = head(path).partition(b"\n")[0].rstrip(b"\r")
        self.columns = _header_columns(path, self.header)
        missing = {"timestamp", "click"} - set(self.columns)
        if missing:
            raise DataError(
                f"{path} is no Open Bandit log: its first line has no column {', '.join(sorted(missing))}"
            )
        features = [
            name
            for name in self.columns
            if name not in ("index", "timestamp", "click", "policy", "propensity_score")
        ]
        self.affinities = tuple(name for name in features if "affinity" in name)
        self.categories = tuple(name for name in features if "affinity" not in name)
        super().__init__(path, _fields(self.categories, self.affinities), (invention.click_note(),))
        self.invention = invention

    def _read(self) -> Iterator[LogBatch]:
        return merge_clicks(in_time_order(self._impressions()))

    def _impressions(self) -> Iterator[pa.RecordBatch]:
        delays = self.invention.click_delays()
        for rows in self.rows(self.columns, ",", header=self.header):
            rows = rows.labelled("click").parsed(
                "timestamp", epoch_ms, "a time with its zone offset"
            )
            rows = rows.only(mask(pc.is_valid(rows.columns["timestamp"])), "timestamp", "a time")
            for name in self.affinities:
                rows = rows.parsed(name, _finite, "a finite number")
            time = one_array(rows.columns["timestamp"]).to_numpy()
            features = rows.features((*self.categories, *self.affinities))
            yield impression_batch(
                _ids("obd", rows.line),
                time,
                delays.click_time(time, rows.equal("click", "1")),
                features,
            )


@dataclass(frozen=True, slots=True)
class Invention:
    """What is made up where a log is silent: median click delay, impressions per second of event time, first event time."""

    seed: int
    click_delay_seconds: float
    rate: float
    start_ms: int

    def click_note(self) -> str:
        return f"no click times in this log: delays drawn from a log-normal with median {self.click_delay_seconds:g} s, seed {self.seed}"

    def click_delays(self) -> ClickDelays:
        return ClickDelays(
            np.random.default_rng([self.seed, 0]), self.click_delay_seconds, DELAY_SIGMA
        )


def _fields(categorical: Iterable[str], numeric: Iterable[str] = ()) -> tuple[Field, ...]:
    return (
        *(Field(name, "categorical") for name in categorical),
        *(Field(name, "numeric") for name in numeric),
    )


def _ids(prefix: str, number: npt.NDArray[np.int64]) -> pa.StringArray:
    return pc.binary_join_element_wise(prefix, pa.array(number).cast(pa.string()), "-")


def _integers(text: pa.Array) -> pa.Array:
    return text.cast(pa.int64())


def _finite(text: pa.Array) -> pa.Array:
    numbers = text.cast(pa.float64())
    if not pc.all(pc.is_finite(numbers), min_count=0).as_py():
        raise pa.ArrowInvalid("not finite")
    return numbers
