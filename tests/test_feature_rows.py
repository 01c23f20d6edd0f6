"""Features that are scored become the columns that training makes of the same events."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_ctr.errors import InvalidFeatures
from stream_ctr.events.arrow_events import one_event
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.feature_rows import FeatureRows
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field

FIELDS = (
    Field("app", "categorical"),
    Field("os", "categorical"),
    Field("age", "numeric"),
    Field("share", "numeric"),
)
HASHERS = (
    Hasher(FIELDS, table_bits=20, crosses=[("app", "age")]),
    Hasher(FIELDS, table_bits=20, numeric_encoding="log_value"),
)
Row = dict[str, object]


def hashed(columns: Mapping[str, pa.Array]) -> list[list[float]]:
    """Everything that a model reads of each impression: ids and multipliers, in both encodings."""
    parts = [part for hasher in HASHERS for part in hasher.rows(columns)]
    return np.concatenate(parts, axis=1, dtype=np.float64).tolist()


def ids(rows: Any, **options: Any) -> list[list[float]]:
    """What a model reads of everything that `rows` holds."""
    columns = FeatureRows(FIELDS, **options).columns(rows)
    return [row for block in columns for row in hashed(block)]


def trained_ids(features: Sequence[Row]) -> list[list[float]]:
    """What training reads of JSON events with these features."""
    records = [json.dumps({**EVENT, "features": one}).encode() for one in features]
    events, rejected = Decoder(FIELDS).decode(pa.array(records, pa.large_binary()))
    assert rejected.reason == []
    return hashed(events.impressions.features)


def trained_arrow_ids(features: pa.Table) -> list[list[float]]:
    """What training reads of an Arrow record with these features."""
    n = len(features)
    batch = features.combine_chunks().to_struct_array().combine_chunks()
    record = pa.RecordBatch.from_pydict(
        {
            "kind": pa.array(["impression"] * n),
            "impression_id": pa.array(["a"] * n),
            "time": pa.array([EVENT["time"]] * n, pa.int64()),
            "features": batch,
        }
    )
    values = [one_event([record], row) for row in range(n)]
    events, rejected = Decoder(FIELDS).decode(pa.array(values, pa.large_binary()))
    assert rejected.reason == []
    return hashed(events.impressions.features)


EVENT = {"kind": "impression", "impression_id": "a", "time": 1_735_689_600_000}
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CATEGORY = st.none() | TEXT | INT64 | st.booleans()
NUMBER = (
    st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20)
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"os": TEXT},  # at least one value
        optional={"app": CATEGORY, "age": NUMBER, "share": NUMBER},
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_dictionaries_get_the_rows_that_training_gives_to_json(rows: list[Row]) -> None:
    trained = trained_ids(rows)
    assert ids(rows) == trained
    assert [ids(row)[0] for row in rows] == trained


COLUMN = {
    "app": st.sampled_from(
        [
            (TEXT, pa.string()),
            (TEXT, pa.large_string()),
            (TEXT, pa.string_view()),
            (TEXT, pa.dictionary(pa.int8(), pa.string())),
            (INT64, pa.int64()),
            (st.integers(0, (1 << 64) - 1), pa.uint64()),
            (st.booleans(), pa.bool_()),
        ]
    ),
    "age": st.sampled_from(
        [
            (st.floats(), pa.float64()),
            (st.floats(width=32), pa.float32()),
            (INT64, pa.int64()),
            (st.integers(0, 255), pa.uint8()),
        ]
    ),
}


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_tables_get_the_rows_that_training_gives_to_arrow(data: Any, n: int) -> None:
    columns = {"os": pa.array(data.draw(st.lists(TEXT, min_size=n, max_size=n)))}
    for name, kinds in COLUMN.items():
        values, type = data.draw(kinds)
        drawn = data.draw(st.lists(st.none() | values, min_size=n, max_size=n))
        columns[name] = pa.array(drawn, type)
    table = pa.table(columns)
    trained = trained_arrow_ids(table)
    assert ids(table) == trained
    assert ids(pa.concat_tables([table[:1], table[1:]])) == trained
    assert ids(pl.from_arrow(table.cast(table.schema))) == trained
    assert [ids(batch)[0] for batch in table.to_batches(max_chunksize=1)] == trained


def test_one_value_has_one_row_in_whatever_form_it_comes() -> None:
    assert ids({"app": 3}) == ids({"app": "3"}) == ids({"app": np.int8(3)})
    assert ids({"app": True}) == ids({"app": "true"}) == ids({"app": np.bool_(True)})
    assert ids({"app": "a"}) == ids({"app": np.str_("a")})
    assert ids({"age": 3}) == ids({"age": 3.0}) == ids({"age": np.float32(3)})
    frame = pd.DataFrame({"app": ["3", 3, None, True], "age": [3, 3.0, 3, 3]})
    assert ids(frame) == ids(
        [{"app": "3", "age": 3}, {"app": "3", "age": 3}, {"age": 3}, {"app": "true", "age": 3}]
    )


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"app": ["a", None], "age": [1.0, math.nan], "os": ["x", "y"]}),
        pd.DataFrame({"app": pd.Categorical(["a", None]), "age": [1, None], "os": ["x", "y"]}),
        pd.DataFrame(
            {
                "app": pd.array(["a", pd.NA], "string"),
                "age": pd.array([1, pd.NA], "Int64"),
                "os": ["x", "y"],
            }
        ),
        pl.DataFrame({"app": ["a", None], "age": [1, None], "os": ["x", "y"]}),
        pl.DataFrame(
            {"app": ["a", None], "age": [1.0, math.nan], "os": ["x", "y"]},
            schema_overrides={"app": pl.Categorical},
        ),
        pa.table({"app": ["a", None], "age": [1.0, math.inf], "os": ["x", "y"]}),
        pa.record_batch({"app": ["a", None], "age": [1, None], "os": ["x", "y"]}),
        [{"app": "a", "age": 1, "os": "x"}, {"os": "y", "app": None}],
        ({"app": "a", "age": 1, "os": "x"}, {"os": "y", "age": None}),
    ],
)
def test_every_kind_of_table_holds_the_same(frame: Any) -> None:
    assert ids(frame) == ids([{"app": "a", "age": 1, "os": "x"}, {"os": "y"}])


@pytest.mark.parametrize("make", [pa.Table.from_pylist, pd.DataFrame, pl.DataFrame])
def test_a_table_of_many_blocks_keeps_its_order(
    make: Callable[[list[Row]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_ctr.events.feature_rows._BLOCK_ROWS", 3)
    rows: list[Row] = [{"app": f"a{row}", "age": row} for row in range(8)]
    assert ids(make(rows)) == ids(rows)
    late = pa.table({"age": pa.array([*[None] * 5, "x", "y"], pa.string()), "os": ["a"] * 7})
    with pytest.raises(InvalidFeatures, match=r"^row 5: "):
        ids(late)
    rows[7] = {"app": None, "age": None}
    with pytest.raises(InvalidFeatures, match=r"^row 7: a value of at least one field is needed"):
        ids(make(rows))


def test_nothing_gives_nothing() -> None:
    assert ids([]) == ids(pa.table({"app": pa.array([], pa.string())})) == []
    assert ids(pd.DataFrame({"app": []})) == []


INVALID: list[tuple[Any, str, str | None, int | None, str]] = [
    ({"ap": "maps", "age": 1}, "unknown_field", "ap", 0, "no field 'ap'; did you mean 'app'?"),
    ([{"app": "a"}, {"app": "a", 3: 1}], "unknown_field", "3", 1, "no field 3. The fields are app"),
    ({"kind": "impression", "features": {"app": "a"}}, "wrapped_event", None, 0, "a whole event"),
    ([{"app": "a"}, {"app": "a", "kind": "x"}], "wrapped_event", None, 1, "under its 'features'"),
    ([{"app": "a"}, {}], "no_field", None, 1, "at least one field is needed: app, os, age"),
    ({"app": None}, "no_field", None, 0, "at least one field"),
    ({"app": ["a"]}, "wrong_type", "app", 0, "'app' is categorical .*, got \\['a'\\] \\(list\\)"),
    ({"app": {"a": 1}}, "wrong_type", "app", 0, "categorical .*\\(dict\\)"),
    ({"app": 3.0}, "wrong_type", "app", 0, "categorical .*, got 3.0 \\(float\\)"),
    ({"app": math.nan}, "wrong_type", "app", 0, "categorical .*, got nan \\(float\\)"),
    ({"app": b"a"}, "wrong_type", "app", 0, "categorical .*\\(bytes\\)"),
    ({"app": 1 << 63}, "wrong_type", "app", 0, "64-bit integer"),
    ({"app": "\ud800"}, "wrong_type", "app", 0, "'app' is not UTF-8 \\(str\\)"),
    ([{"age": 1}, {"age": "31"}], "wrong_type", "age", 1, "must be a number, got '31' \\(str\\)"),
    ({"age": True}, "wrong_type", "age", 0, "a number, got True \\(bool\\)"),
    ({"age": math.nan}, "wrong_type", "age", 0, "a finite number or None, got nan \\(float\\)"),
    ({"age": -math.inf}, "wrong_type", "age", 0, "a finite number or None, got -inf"),
    ({"age": 10**400}, "wrong_type", "age", 0, "must be a number"),
    ({"age": [1]}, "wrong_type", "age", 0, "\\(list\\)"),
    ("maps", "wrong_type", None, None, "a dictionary by field name, .*got 'maps' \\(str\\)"),
    ([["app", "a"]], "wrong_type", None, 0, "a dictionary by field name, .*\\(list\\)"),
    (None, "wrong_type", None, None, "\\(NoneType\\)"),
    (np.zeros(3), "wrong_type", None, None, "\\(ndarray\\)"),
    (pa.table({"app": [1.5]}), "wrong_type", "app", 0, "must be a string, .*got double"),
    (pa.table({"age": [None, "1"]}), "wrong_type", "age", 1, "age must be a number, got string"),
    (pa.table({"app": [["a"]]}), "wrong_type", "app", 0, "got list<"),
    (pa.table({"ap": ["a"]}), "unknown_field", "ap", None, "did you mean 'app'"),
    (pa.table({"features": [{"app": "a"}]}), "wrapped_event", None, None, "a whole event"),
    (pd.DataFrame({"app": [7, None]}), "wrong_type", "app", 0, "got double"),
    (pd.DataFrame({"age": [1, "x"]}), "wrong_type", "age", 1, "got 'x' \\(str\\)"),
    (pl.DataFrame({"age": ["x"]}), "wrong_type", "age", 0, "must be a number"),
]


@pytest.mark.parametrize(("rows", "reason", "field", "row", "message"), INVALID)
def test_what_training_would_reject_or_leave_unread_is_an_error(
    rows: Any, reason: str, field: str | None, row: int | None, message: str
) -> None:
    with pytest.raises(InvalidFeatures, match=message) as caught:
        ids(rows)
    error = caught.value
    assert (error.reason, error.field, error.row) == (reason, field, row)
    assert isinstance(error, ValueError)
    assert str(error).startswith("" if row is None else f"row {row}: ")


def test_an_invalid_value_can_be_missing_instead_and_is_counted() -> None:
    rows = FeatureRows(FIELDS, on_invalid="score")
    given: list[Any] = [
        {"app": "a", "ap": 1, "o": 2, "age": "x"},
        {"kind": "impression", "features": {"app": "a"}},
        {"app": "b", "age": 5, "share": math.inf},
    ]
    [block] = rows.columns(given)
    cleaned = [{"app": "a"}, {"app": None}, {"app": "b", "age": 5}]
    assert hashed(block) == ids(cleaned, on_invalid="score")
    assert rows.invalid == {"unknown_field": 2, "wrapped_event": 1, "wrong_type": 2, "no_field": 1}


def test_a_table_counts_as_its_rows_do() -> None:
    as_rows = FeatureRows(FIELDS, on_invalid="score")
    as_table = FeatureRows(FIELDS, on_invalid="score")
    given: list[Any] = [{"app": "a", "ap": 1, "age": "x"}, {"app": None, "ap": 2, "age": "y"}]
    [one], [other] = as_rows.columns(given), as_table.columns(pa.Table.from_pylist(given))
    assert hashed(one) == hashed(other)
    assert as_rows.invalid == as_table.invalid == Counter(unknown_field=2, wrong_type=2, no_field=1)


def test_an_unknown_reaction_is_refused() -> None:
    with pytest.raises(ValueError, match="on_invalid is 'error' or 'score', got 'ignore'"):
        FeatureRows(FIELDS, on_invalid="ignore")  # type: ignore[arg-type]


def test_a_field_may_be_called_kind() -> None:
    fields = (Field("kind", "categorical"), Field("features", "numeric"))
    [columns] = FeatureRows(fields).columns({"kind": "a", "features": 1})
    assert columns["kind"].to_pylist() == ["a"]
