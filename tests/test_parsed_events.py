"""Parsed events: parts joined in order, and events taken by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from stream_ctr.events.parsed_events import (
    CLICK,
    IMPRESSION,
    UNKNOWN_KIND,
    InvalidRecord,
    ParsedEvents,
    kind_codes,
)


def events(places: list[tuple[int, int]], apps: pa.Array | None = None) -> ParsedEvents:
    """Return events at these (row, within), whose time says their place too."""
    n = len(places)
    row, within = np.array(places, np.int64).reshape(-1, 2).T
    return ParsedEvents(
        row=row,
        within=within,
        kind=np.zeros(n, np.int8),
        kind_text=pa.array(["impression"] * n, pa.string()),
        impression_id=pa.array([f"{r}.{w}" for r, w in places], pa.string()),
        time=100 * row + within,
        has_time=np.ones(n, np.bool_),
        has_features=np.ones(n, np.bool_),
        label=np.full(n, np.nan),
        true_probability=np.full(n, 0.5),
        features={"app": pa.array(["x"] * n, pa.string()) if apps is None else apps},
        has_unknown_fields=row % 2 == 0,
    )


def places(found: ParsedEvents) -> list[tuple[int, int]]:
    """Return (row, within) of each event, after a check that all columns kept together."""
    result: list[Any] = list(zip(found.row.tolist(), found.within.tolist(), strict=True))
    assert found.impression_id.to_pylist() == [f"{r}.{w}" for r, w in result]
    assert found.time.tolist() == [100 * r + w for r, w in result]
    assert found.has_unknown_fields.tolist() == [r % 2 == 0 for r, _ in result]
    assert len(found) == len(found.features["app"]) == len(result)
    return result


def test_parts_are_joined_in_order_of_records_and_of_events_in_a_record() -> None:
    first, second, third = events([(0, 0), (3, 0)]), events([(2, 1), (2, 0)]), events([(1, 0)])
    expected = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    assert places(ParsedEvents.concatenate([first, second, third])) == expected
    in_order = events([(0, 0), (1, 0), (1, 1)])
    assert ParsedEvents.concatenate([in_order]).row is in_order.row


def test_of_parts_with_and_without_a_dictionary_all_become_one() -> None:
    coded = pa.array(["maps", "mail"]).dictionary_encode()
    plain = pa.array(["chat", None])
    parts = [events([(0, 0), (1, 0)], coded), events([(2, 0), (3, 0)], plain)]
    app = ParsedEvents.concatenate(parts).features["app"]
    assert pa.types.is_dictionary(app.type)
    assert app.to_pylist() == ["maps", "mail", "chat", None]


def test_events_are_taken_by_index() -> None:
    some = events([(0, 0), (1, 0), (2, 0)])
    assert places(some.take(np.array([2, 0]))) == [(2, 0), (0, 0)]
    assert places(some.take(np.array([], np.int64))) == []


def test_kinds_other_than_impression_and_click_are_unknown() -> None:
    codes = kind_codes(pa.array(["impression", "click", "Click", "", None]))
    unknown = [UNKNOWN_KIND] * 3
    assert codes.tolist() == [IMPRESSION, CLICK, *unknown]
    assert codes.dtype == np.int8


def test_an_invalid_record_has_a_reason_and_a_message() -> None:
    error = InvalidRecord("not_json", "trailing bytes")
    assert (error.reason, error.message, str(error)) == ("not_json",) + ("trailing bytes",) * 2
