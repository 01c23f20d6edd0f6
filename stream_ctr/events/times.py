"""Event times: integers, timestamps and text become epoch milliseconds, by one rule everywhere.

- A number counts seconds, milliseconds, microseconds or nanoseconds since 1970: the unit that puts
  it between 1973 and 2100. No number is between them in two units, so the rule needs no state, and
  a resumed run reads a record as the first run did. A given `unit` is the only one.
- Text is RFC 3339, or such a number. Text without a zone needs a `zone`.
- A typed timestamp or date without a zone is in the given `zone`, or in UTC.

Fractions of a millisecond are rounded down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

TimeUnit = Literal["s", "ms", "us", "ns"]

# 1973-03-03 and 2100-01-01 in epoch milliseconds. A time outside of them is zero, or from a broken
# clock.
EARLIEST_MS = 100_000_000_000
LATEST_MS = 4_102_444_800_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PER_SECOND: Mapping[TimeUnit, int] = {
    "s": 1,
    "ms": 1_000,
    "us": 1_000_000,
    "ns": 1_000_000_000,
}
_UNIT_WORDS: Mapping[TimeUnit, str] = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}
_OUT_OF_RANGE = -1
_LARGEST_SECONDS = np.iinfo(np.int64).max // 1_000
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d"
_DAY = r"(19[7-9]\d|20\d\d)-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
_ZONED = rf"^{_DAY}[T ]{_CLOCK}:[0-5]\d(\.\d{{1,9}})?(Z|[+-]{_CLOCK})$"
_LOCAL = rf"^{_DAY}([T ]{_CLOCK}(:[0-5]\d(\.\d{{1,9}})?)?)?$"
_INTEGER = r"^\d{1,19}$"
_DECIMAL = r"^\d{1,19}\.\d*$"
_LOCAL_PATTERN = re.compile(_LOCAL)


@dataclass(frozen=True, slots=True)
class TimeFormat:
    """What the times of an input leave open.

    `unit` is that of numbers; empty: the unit that puts a number between 1973 and 2100. `zone` is
    the IANA name of the time zone of times without one; empty: text needs a zone, and timestamps
    are in UTC.

    >>> times = TimeFormat(zone="Europe/Berlin")
    >>> texts = pa.array(["2025-01-01 01:00", "1735689600", "2025-01-01T00:00Z"])
    >>> times.epoch_ms(texts).to_pylist()
    [1735689600000, 1735689600000, 1735689600000]
    """

    unit: TimeUnit | Literal[""] = ""
    zone: str = ""

    @property
    def expected(self) -> str:
        """What a time must be, for messages."""
        epoch = f"epoch {_UNIT_WORDS[self.unit]}" if self.unit else "epoch time in s, ms, us or ns"
        if self.zone:
            return f"{epoch}, RFC 3339, or a time in {self.zone}"
        return f"{epoch}, or RFC 3339 with a zone (input.time_zone names that of times without)"

    def from_integers(self, ticks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return epoch milliseconds of integers [n].

        An integer that is not between 1973 and 2100 stays as it is, or becomes -1 if it would be a
        time in milliseconds. Both are out of range.

        >>> ticks = [1735689600, 1735689600000, 1735689600000000, 1735689600000000000, 17]
        >>> TimeFormat().from_integers(np.array(ticks)).tolist()
        [1735689600000, 1735689600000, 1735689600000, 1735689600000, 17]
        >>> TimeFormat("s").from_integers(np.array([1735689600, 1735689600000])).tolist()
        [1735689600000, -1]
        """
        if self.unit in ("", "ms") and _are_milliseconds(ticks):
            return ticks
        ms = np.where(_in_unit(ticks, "ms"), _OUT_OF_RANGE, ticks)
        for unit in (self.unit,) if self.unit else _PER_SECOND:
            within = _in_unit(ticks, unit)
            ms[within] = _integers_to_ms(ticks[within], unit)
        return ms

    def from_numbers(self, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return epoch milliseconds of numbers [n], -1 where one is not between 1973 and 2100.

        >>> TimeFormat().from_numbers(np.array([1735689600.25, np.nan])).tolist()
        [1735689600250, -1]
        """
        ms = np.full(len(numbers), _OUT_OF_RANGE, np.int64)
        for unit in (self.unit,) if self.unit else _PER_SECOND:
            within = _in_unit(numbers, unit)
            # The product of a decimal fraction may lie a little below the whole millisecond.
            exact = numbers[within] * (1_000 / _PER_SECOND[unit])
            ms[within] = np.floor(np.round(exact, 3)).astype(np.int64)
        return ms

    def from_text(self, text: pa.Array) -> pa.Int64Array:
        """Return epoch milliseconds of texts [n], null where a text is not a time.

        >>> TimeFormat().from_text(pa.array(["2025-01-01T00:00:00Z", "2025-01-01"])).to_pylist()
        [1735689600000, None]
        """
        text = text.cast(pa.string())
        zoned = pc.match_substring_regex(text, _ZONED)
        if pc.all(zoned).as_py():
            return _cast_texts(text, pa.timestamp("ns", "UTC"), _floor_ms)
        ms = _cast_texts(pc.if_else(zoned, text, None), pa.timestamp("ns", "UTC"), _floor_ms)
        # RFC 3339 has seconds; ISO 8601 may leave them out.
        zoned = pc.match_substring_regex(text, rf"^{_DAY}[T ]{_CLOCK}(Z|[+-]{_CLOCK})$")
        short = _cast_texts(pc.if_else(zoned, text, None), pa.timestamp("ns", "UTC"), _floor_ms)
        ms = pc.coalesce(ms, short)
        if self.zone:
            local = pc.if_else(pc.match_substring_regex(text, _LOCAL), text, None)
            ms = pc.coalesce(ms, _cast_texts(local, pa.timestamp("ns"), self._from_local))
        integers = pc.if_else(pc.match_substring_regex(text, _INTEGER), text, None)
        ms = pc.coalesce(ms, _cast_texts(integers, pa.int64(), self._present_integers))
        decimals = pc.if_else(pc.match_substring_regex(text, _DECIMAL), text, None)
        return pc.coalesce(ms, _cast_texts(decimals, pa.float64(), self._present_numbers))

    def epoch_ms(self, column: pa.Array) -> pa.Int64Array:
        """Return times as whole epoch milliseconds; null is missing.

        A number that is out of range becomes another one that is. Raises an `ArrowException` when a
        text is not a time, or when a column of this type holds none.
        """
        kind = column.type
        if pa.types.is_dictionary(kind):
            return self.epoch_ms(column.dictionary).take(column.indices)
        if pa.types.is_null(kind):
            return column.cast(pa.int64())
        if pa.types.is_timestamp(kind):
            return self._from_timestamps(column)
        if pa.types.is_date(kind):
            return self._from_timestamps(column.cast(pa.timestamp("ms")))
        if pa.types.is_uint64(kind):
            column = column.cast(pa.int64())
        if pa.types.is_integer(kind):
            return self._present_integers(column.cast(pa.int64()))
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return self._present_numbers(column.cast(pa.float64(), safe=False))
        ms = self.from_text(column)
        if ms.null_count > column.null_count:
            raise pa.ArrowInvalid("not a time")
        return ms

    def parse(self, value: object) -> int | None:
        """Return epoch milliseconds of one number or text, or None if it is not a time.

        >>> TimeFormat().parse("2025-01-01T00:00:00.0019Z"), TimeFormat().parse("2025-01-01")
        (1735689600001, None)
        """
        if isinstance(value, bool):
            return None
        if isinstance(value, int):
            within = -(1 << 63) <= value < 1 << 63
            return int(self.from_integers(np.array([value], np.int64))[0]) if within else None
        if isinstance(value, float):
            return int(self.from_numbers(np.array([value]))[0])
        if not isinstance(value, str):
            return None
        found: int | None = self.from_text(pa.array([value]))[0].as_py()
        return found if found is not None else _rare_iso_ms(value)

    def lacks_zone(self, value: object) -> bool:
        """Return whether a text would be a time if `zone` named the zone that it lacks."""
        return not self.zone and isinstance(value, str) and bool(_LOCAL_PATTERN.match(value))

    def _from_timestamps(self, column: pa.Array) -> pa.Int64Array:
        return self._from_local(column) if column.type.tz is None else _floor_ms(column)

    def _from_local(self, column: pa.Array) -> pa.Int64Array:
        """Return epoch ms of timestamps without a zone. Repeated hours count as the earlier one."""
        if self.zone in ("", "UTC"):
            return _floor_ms(column)
        local = _floor_ms(column).cast(pa.timestamp("ms"))
        zoned = pc.assume_timezone(local, self.zone, ambiguous="earliest", nonexistent="latest")
        return zoned.cast(pa.int64())

    def _present_integers(self, column: pa.Int64Array) -> pa.Int64Array:
        ticks = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
        return _masked(self.from_integers(ticks), column)

    def _present_numbers(self, column: pa.DoubleArray) -> pa.Int64Array:
        numbers = pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False)
        return _masked(self.from_numbers(numbers), column)


def _rare_iso_ms(text: str) -> int | None:
    """Return epoch milliseconds of a form of ISO 8601 that RFC 3339 lacks, or None."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment - _EPOCH) // timedelta(milliseconds=1) if moment.tzinfo else None


DETECTED = TimeFormat()
"""The format of an input that says nothing about its times."""


def infer_unit(ticks: npt.NDArray[np.int64 | np.float64]) -> TimeUnit | None:
    """Return the unit in which most of these numbers are between 1973 and 2100, if there is one.

    >>> infer_unit(np.array([1735689600, 1735689601])), infer_unit(np.array([3, 4]))
    ('s', None)
    """
    counts = {unit: int(np.count_nonzero(_in_unit(ticks, unit))) for unit in _PER_SECOND}
    unit = max(counts, key=lambda unit: counts[unit])
    return unit if counts[unit] * 2 > len(ticks) else None


def unit_words(unit: TimeUnit) -> str:
    """Return the name of a unit.

    >>> unit_words("us")
    'microseconds'
    """
    return _UNIT_WORDS[unit]


def require_zone(name: str) -> str:
    """Return the name of a time zone. Raises `ValueError` when this machine does not know it.

    >>> require_zone("Mars/Olympus")
    Traceback (most recent call last):
    ValueError: no time zone 'Mars/Olympus'; names are as in UTC or Europe/Berlin
    """
    try:
        if name and name != "UTC":
            ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        raise ValueError(
            f"no time zone {name!r:.80}; names are as in UTC or Europe/Berlin"
        ) from None
    return name


def _are_milliseconds(ticks: npt.NDArray[np.int64]) -> bool:
    return not len(ticks) or bool(ticks.min() >= EARLIEST_MS and ticks.max() < LATEST_MS)


def _in_unit(ticks: npt.NDArray[np.int64 | np.float64], unit: TimeUnit) -> npt.NDArray[np.bool_]:
    per_second = _PER_SECOND[unit]
    earliest = EARLIEST_MS * per_second // 1_000
    latest = LATEST_MS * per_second // 1_000
    return (ticks >= earliest) & (ticks < latest)


def _integers_to_ms(ticks: npt.NDArray[np.int64], unit: TimeUnit) -> npt.NDArray[np.int64]:
    per_second = _PER_SECOND[unit]
    return ticks * (1_000 // per_second) if per_second <= 1_000 else ticks // (per_second // 1_000)


def _floor_ms(column: pa.Array) -> pa.Int64Array:
    ticks = column.cast(pa.int64())
    if column.type.unit == "ms":
        return ticks
    whole = pc.fill_null(ticks, 0).to_numpy(zero_copy_only=False)
    if column.type.unit == "s":
        whole = np.clip(whole, -_LARGEST_SECONDS, _LARGEST_SECONDS)
    return _masked(_integers_to_ms(whole, column.type.unit), ticks)


def _masked(ms: npt.NDArray[np.int64], like: pa.Array) -> pa.Int64Array:
    return pa.array(ms, mask=~np.asarray(like.is_valid()) if like.null_count else None)


def _cast_texts(
    text: pa.StringArray, to: pa.DataType, to_ms: Callable[[pa.Array], pa.Int64Array]
) -> pa.Int64Array:
    """Return `to_ms(text.cast(to))`, null where a text cannot be cast."""
    if text.null_count == len(text):
        return pa.nulls(len(text), pa.int64())
    try:
        return to_ms(text.cast(to))
    except pa.ArrowInvalid:
        # A 30th of February, say. Arrow does not tell which text failed, so halve to find it.
        half = len(text) // 2
        if not half:
            return pa.nulls(1, pa.int64())
        return pa.concat_arrays(
            [_cast_texts(text[:half], to, to_ms), _cast_texts(text[half:], to, to_ms)]
        )
