"""Fit the encoding of numbers to the first records, so that no field is encoded poorly by default.

The logarithmic buckets of `features` suit counts. Numbers between 0 and 1, and numbers that lie
close together far away from 0, such as years or times, fall into one or two of them, and then the
model does not see them. Such a field gets `edges`: the quantiles of its first numbers, which put
about as many of them into each bucket. Within the edges the buckets follow the numbers; beyond
them they are logarithmic, so that numbers that drift out of the first range are still told apart.

The value encodings multiply an embedding by the number. There the scale of a field is the 95th
percentile of its first multipliers, so that most multipliers are at most 1, as those of a category.

What is fitted is part of the `Schema`. Nothing is fitted again later: a row keeps its meaning.

>>> edges_of(np.arange(256) / 256)[:3], edges_of(np.arange(256.0))
((0.060546875, 0.123046875, 0.185546875), ())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.events.decoder import Decoder, Events
from stream_ctr.events.field import Field, NumericEncoding

Floats = npt.NDArray[np.float64]

_MOST_BUCKETS = 16
_NUMBERS_A_BUCKET = 8  # at least, of the first records
_LEAST_NUMBERS = 32
# Logarithmic buckets do when they keep half of the information that numbers have, of which 3 bits,
# that of eight equal buckets, are asked for at most.
_BITS_ASKED_FOR = 3.0
_SHARE_KEPT = 0.5
_SCALE_QUANTILE = 0.95


class Fitted(NamedTuple):
    """What is fitted, by the name of a field: `bucket_edges` for buckets, else `value_scales`."""

    bucket_edges: dict[str, tuple[float, ...]]
    value_scales: dict[str, float]


NOTHING = Fitted({}, {})


def fit_numbers(
    parts: Sequence[pa.LargeBinaryArray],
    fields: Sequence[Field],
    *,
    most: int = 1000,
    window_ms: int | None = None,
    numeric_encoding: NumericEncoding = "buckets",
    buckets_per_octave: float = 2.0,
    max_record_bytes: int = 1 << 20,
) -> Fitted:
    """Fit the encoding of the numeric fields to the first impressions in parts of a log.

    At most `most` impressions of each part count, whether a record holds one or many. With
    `window_ms`, those count that come before the first event of a time so much later than the first
    impression's. A field whose numbers suit the logarithmic buckets has no edges.

    >>> records = [
    ...     b'{"kind":"impression","impression_id":"a","time":1735689600000,"features":'
    ...     b'{"share":%.3f,"age":%d}}' % (i / 200, i) for i in range(200)
    ... ]
    >>> fields = [Field("share", "numeric"), Field("age", "numeric")]
    >>> fitted = fit_numbers([pa.array(records, pa.large_binary())], fields)
    >>> {name: len(edges) for name, edges in fitted.bucket_edges.items()}
    {'share': 15}
    """
    decoder = Decoder(fields, max_record_bytes=max_record_bytes)
    decoded = [decoder.decode(values)[0] for values in parts]
    chosen = [_counted(events, most, window_ms) for events in decoded]
    numbers = {
        field.name: np.concatenate(
            [
                _present(_first(events, field.name, counted))
                for events, counted in zip(decoded, chosen, strict=True)
            ]
        )
        for field in fields
        if field.kind == "numeric"
    }
    if numeric_encoding != "buckets":
        scales = {name: scale_of(x, numeric_encoding) for name, x in numbers.items()}
        return Fitted({}, scales)
    edges = {name: edges_of(x, buckets_per_octave) for name, x in numbers.items()}
    return Fitted({name: found for name, found in edges.items() if found}, {})


def edges_of(x: Floats, buckets_per_octave: float = 2.0) -> tuple[float, ...]:
    """Return the edges between buckets that hold about as many of the numbers x each.

    There are at most 16 buckets, and a frequent number has one of its own. Returns no edges if the
    logarithmic buckets do, or if the numbers are fewer than 32 or all the same.
    """
    numbers, counts = np.unique(x, return_counts=True)
    if len(x) < _LEAST_NUMBERS or len(numbers) < 2:
        return ()
    default = np.sign(numbers) * np.floor(buckets_per_octave * np.log2(1.0 + np.abs(numbers)))
    _, bucket = np.unique(default, return_inverse=True)
    asked_for = min(_bits(counts), _BITS_ASKED_FOR)
    if _bits(np.bincount(bucket, weights=counts)) >= _SHARE_KEPT * asked_for:
        return ()
    return _quantiles(numbers, counts)


def _quantiles(numbers: Floats, counts: npt.NDArray[np.integer]) -> tuple[float, ...]:
    total = int(counts.sum())
    buckets = min(_MOST_BUCKETS, total // _NUMBERS_A_BUCKET)
    below = np.cumsum(counts) - counts  # how many are less than each number
    at = np.searchsorted(below, np.arange(1, buckets) * total / buckets, side="right") - 1
    frequent = np.flatnonzero(counts * buckets >= total)
    # An edge below each of these numbers, and above each frequent one.
    starts = np.unique(np.concatenate([at, frequent, frequent + 1]))
    starts = starts[(starts > 0) & (starts < len(numbers))]
    edges = np.unique(numbers[starts - 1] / 2 + numbers[starts] / 2)
    if len(edges) == 1:  # the distance between two edges is the unit beyond them
        edges = np.append(edges, edges[0] + (numbers[-1] - numbers[0]))
    is_usable = len(edges) > 1 and 0 < edges[-1] - edges[0] < np.inf
    return tuple(edges.tolist()) if is_usable else ()


def scale_of(x: Floats, numeric_encoding: NumericEncoding) -> float:
    """Return the 95th percentile of the multipliers of the numbers x that are not 0, else 1.

    >>> scale_of(np.array([0.0, -2.0, 2.0]), "value")
    2.0
    """
    sizes = np.abs(x[x != 0])
    if not len(sizes):
        return 1.0
    multipliers = np.log1p(sizes) if numeric_encoding == "log_value" else sizes
    scale = float(np.quantile(multipliers, _SCALE_QUANTILE))
    return scale if np.isfinite(scale) and scale > 0 else 1.0


def _counted(events: Events, most: int, window_ms: int | None) -> npt.NDArray[np.int64]:
    """Return the indices of the first impressions and examples, in the order of the records.

    The examples have the indices behind those of the impressions.
    """
    shown = (events.impressions, events.examples)
    row, within, time = (
        np.concatenate([getattr(part, name) for part in shown])
        for name in ("row", "within", "time")
    )
    order = np.lexsort((within, row))
    if window_ms is not None and len(order):
        end = _first_at(events, time[order[0]] + window_ms)
        if end:
            before = (row < end[0]) | ((row == end[0]) & (within < end[1]))
            order = order[before[order]]
    return order[:most]


def _first_at(events: Events, time_ms: int) -> tuple[int, int] | None:
    """Return (row, within) of the first event at or after this time, None if there is none."""
    places = []
    for part in events.kinds:
        late = np.flatnonzero(part.time >= time_ms)
        if len(late):
            first = late[np.lexsort((part.within[late], part.row[late]))[0]]
            places.append((int(part.row[first]), int(part.within[first])))
    return min(places, default=None)


def _first(events: Events, name: str, counted: npt.NDArray[np.int64]) -> pa.DoubleArray:
    """Return the field of the impressions and examples with these indices."""
    columns = [part.features[name] for part in (events.impressions, events.examples)]
    return pa.concat_arrays(columns).take(pa.array(counted))


def _present(column: pa.DoubleArray) -> Floats:
    x: Floats = column.drop_null().to_numpy(zero_copy_only=False)
    return x


def _bits(counts: npt.NDArray[np.number]) -> float:
    """Return the entropy in bits of what occurs so often."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
