"""The columns of a table by their meaning, and their values as those of events.

`find_columns` resolves the names of a layout against the columns of a file. The functions for
values convert a column of any type that can have the meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.events.field import Field
from stream_ctr.logs.layout import ColumnNames, Layout
from stream_ctr.logs.tables import Table
from stream_ctr.messages import nearest, one_line

Shape = Literal["events", "impressions", "examples", "shown", "clicked", "unlabelled"]
"""What the rows of a file are.

Of a pair of files, one has the impressions that were `shown`, the other those that were `clicked`.
Rows that are `unlabelled` can only be scored.
"""

TRUE_PROBABILITY = "true_probability"
_SHOWN_COLUMNS = 12
_LARGEST_WHOLE = float(1 << 53)
_MISSING_NUMBERS = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "none", "\\N", "-")
_LABELS: Mapping[str, int] = {
    **dict.fromkeys(("0", "0.0", "false", "f", "no", "n"), 0),
    **dict.fromkeys(("1", "1.0", "true", "t", "yes", "y"), 1),
}


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns of a file by their meaning; "" where there is none.

    `shape` says what a row is.
    """

    shape: Shape
    time: str = ""
    id: str = ""
    label: str = ""
    kind: str = ""
    click_time: str = ""
    features: str = ""
    true_probability: str = ""

    @property
    def used(self) -> list[str]:
        """The columns that have a meaning."""
        names = (
            *(self.time, self.id, self.label, self.kind, self.click_time),
            *(self.features, self.true_probability),
        )
        return list(dict.fromkeys(name for name in names if name))


_ROLES: Mapping[Shape, tuple[str, ...]] = {
    "events": ("time", "id", "kind", "label", "features", TRUE_PROBABILITY),
    "impressions": ("time", "id", "click_time", "features", TRUE_PROBABILITY),
    "examples": ("time", "id", "label", "features"),
    "shown": ("time", "id", "features", TRUE_PROBABILITY),
    "clicked": ("time", "id"),
    "unlabelled": ("time", "id", "features", TRUE_PROBABILITY),
}
_REQUIRED: Mapping[Shape, tuple[str, ...]] = {
    "events": ("kind", "id", "time"),
    "impressions": ("click_time", "time"),
    "examples": ("label",),
    "shown": ("id", "time"),
    "clicked": ("id", "time"),
    "unlabelled": (),
}


def find_columns(table: Table, layout: Layout, shape: Shape | None = None) -> Columns:
    """Return the columns of `table` under this layout. Without a `shape`, the columns tell it.

    Raises `ConfigError` when a named column does not exist, and `DataError` when a column is absent
    or cannot be what it should be.
    """
    named = _present(layout.columns, table) if layout.only_scored else layout.columns
    for role in _ROLES[shape] if shape else named.__slots__:
        if name := getattr(named, role, ""):
            _require_column(table, name, f"input.columns.{role}")
    shape = shape or _shape(table, named, "unlabelled" if layout.only_scored else None)
    fields = {field.name for field in layout.fields}
    found = {}
    for role in _ROLES[shape]:
        name = getattr(named, role, "") or _default(table, role)
        if role in ("features", TRUE_PROBABILITY) and name in fields:
            name = ""  # it is the name of a feature
        found[role] = name
    for role in _REQUIRED[shape]:
        if not found[role]:
            raise DataError(
                f"{table.name} holds no events: there is no column {_default_name(role)} "
                f"(input.columns.{role} names it); {shown_columns(table)}"
            )
    for role, name in found.items():
        _require_type(table, name, role)
    return Columns(shape, **found)


def _present(named: ColumnNames, table: Table) -> ColumnNames:
    """Return the named columns without those that the table lacks."""
    roles = {role: getattr(named, role) for role in named.__slots__}
    return ColumnNames(**{role: name for role, name in roles.items() if name in table.types})


def _shape(table: Table, named: ColumnNames, otherwise: Shape | None) -> Shape:
    """Return what the rows are: by the columns that are named, or else by those that exist."""
    kinds: tuple[tuple[str, Shape], ...] = (
        ("kind", "events"),
        ("click_time", "impressions"),
        ("label", "examples"),
    )
    for role, shape in kinds:
        if getattr(named, role):
            return shape
    for role, shape in kinds:
        if _default(table, role):
            return shape
    if otherwise:
        return otherwise
    raise DataError(
        f"{table.name} holds no events: there is no column of kinds, labels or click times; "
        "name it in [input.columns] as kind, label or click_time, or let `stream-ctr init` guess; "
        f"{shown_columns(table)}"
    )


def _default_name(role: str) -> str:
    return {"id": "impression_id"}.get(role, role)


def _default(table: Table, role: str) -> str:
    name = _default_name(role)
    return name if name in table.types else ""


def shown_columns(table: Table) -> str:
    """Return the columns of a table for the end of a message."""
    names = [one_line(name, 40) for name in table.types]
    more = ", ..." if len(names) > _SHOWN_COLUMNS else ""
    return f"it has {', '.join(names[:_SHOWN_COLUMNS])}{more}"


def _require_column(table: Table, name: str, key: str) -> None:
    """Raise `ConfigError` unless the table has one column of this name."""
    if name in table.types:
        return
    if name in table.repeated:
        raise DataError(f"{table.name}: column {one_line(name)} appears twice")
    raise ConfigError(
        f"{key} names {one_line(name)!r}, which is no column of {table.name}"
        f"{nearest(name, table.types)}; {shown_columns(table)}"
    )


# -- types ---------------------------------------------------------------------------------------


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_number(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def is_moment(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_category(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return is_text(kind) or is_number(kind) or is_moment(kind) or bool(pa.types.is_boolean(kind))


def _is_integer(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return bool(pa.types.is_integer(kind) or pa.types.is_decimal(kind))


_ACCEPTED: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "time": (lambda kind: is_text(kind) or is_number(kind) or is_moment(kind), "a time"),
    "click_time": (lambda kind: is_text(kind) or is_number(kind) or is_moment(kind), "a time"),
    "id": (lambda kind: is_text(kind) or _is_integer(kind), "text or integers"),
    "kind": (is_text, "text"),
    "label": (
        lambda kind: is_text(kind) or is_number(kind) or bool(pa.types.is_boolean(kind)),
        "0 or 1",
    ),
    "features": (lambda kind: bool(pa.types.is_struct(kind)), "a struct"),
    TRUE_PROBABILITY: (lambda kind: is_text(kind) or is_number(kind), "a number"),
    "numeric": (
        lambda kind: is_text(kind) or is_number(kind) or bool(pa.types.is_boolean(kind)),
        "a number",
    ),
    "categorical": (_is_category, "text, a number, a boolean or a date"),
}


def _require_type(table: Table, name: str, role: str) -> None:
    kind = table.types.get(name)
    if kind is None or pa.types.is_null(kind):
        return
    accepts, expected = _ACCEPTED[role]
    if not accepts(kind):
        raise DataError(
            f"{table.name}: column {one_line(name)} is {one_line(kind)}; as {role} it must be "
            f"{expected}"
        )


# -- fields --------------------------------------------------------------------------------------


def feature_types(table: Table, columns: Columns) -> dict[str, pa.DataType | None]:
    """Return the columns, or the members of the struct, that may be features, and their types."""
    if columns.features:
        struct = table.types[columns.features]
        return {} if struct is None else {member.name: member.type for member in struct}
    used = columns.used
    return {name: kind for name, kind in table.types.items() if name not in used}


def require_fields(table: Table, columns: Columns, fields: Sequence[Field]) -> None:
    """Raise an error unless each field is a column that can be of its kind.

    A field of a sparse table may be absent.
    """
    types = feature_types(table, columns) if columns.features else table.types
    for field in fields:
        if field.name in types:
            kind = types[field.name]
            if kind is None or pa.types.is_null(kind):
                continue
            accepts, expected = _ACCEPTED[field.kind]
            if not accepts(kind):
                raise DataError(
                    f"{table.name}: column {one_line(field.name)} is {one_line(kind)}; "
                    f"a {field.kind} field is {expected}"
                )
        elif not table.sparse:
            if field.name in table.repeated:
                raise DataError(f"{table.name}: column {one_line(field.name)} appears twice")
            raise ConfigError(
                f"features.{field.kind} names {one_line(field.name)!r}, which is no column of "
                f"{table.name}{nearest(field.name, types)}; {shown_columns(table)}"
            )


def typed_fields(table: Table, columns: Columns) -> tuple[Field, ...]:
    """Return all columns that may be features, of the kind that their type suggests.

    Raises `DataError` when a column cannot be a feature, or when two have the same name.
    """
    for name in sorted(table.repeated):
        raise DataError(
            f"{table.name}: column {one_line(name)} appears twice. The section [features] can name "
            "the columns to use"
        )
    return tuple(
        _typed_field(table, name, kind) for name, kind in feature_types(table, columns).items()
    )


def _typed_field(table: Table, name: str, kind: pa.DataType | None) -> Field:
    if kind is not None and kind != pa.uint64() and is_number(kind):
        return Field(name, "numeric")
    if kind is None or _is_category(kind):
        return Field(name, "categorical")
    raise DataError(
        f"{table.name}: column {one_line(name)} is {one_line(kind)}; a feature is text, a number, "
        "a boolean or a date. The section [features] can name the columns to use"
    )


# -- values --------------------------------------------------------------------------------------


def labels(column: pa.Array) -> pa.Int8Array:
    """Return labels as 0 and 1. Raises `pa.ArrowInvalid` for any other value; null stays null.

    >>> labels(pa.array(["1", "0.0", None, "true", "No"])).to_pylist()
    [1, 0, None, 1, 0]
    """
    texts = as_text(column)
    words = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    index = pc.index_in(words, value_set=pa.array(list(_LABELS)))
    if index.null_count > texts.null_count:
        raise pa.ArrowInvalid("not 0 or 1")
    return pa.array(list(_LABELS.values()), pa.int8()).take(index)


def ids(column: pa.Array) -> pa.StringArray:
    """Return ids as text, null where one is empty.

    >>> ids(pa.array([7, None])).to_pylist()
    ['7', None]
    """
    texts = as_text(column)
    return pc.if_else(pc.equal(pc.binary_length(texts), 0), None, texts)


def categories(column: pa.Array) -> pa.Array:
    """Return the values of a categorical field: text, integers, booleans, or a dictionary of text.

    Numbers with a fraction, dates and timestamps become text.

    >>> categories(pa.array([3.0, 0.5, None])).to_pylist()
    ['3', '0.5', None]
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        words = as_text(column.dictionary)
        return pa.DictionaryArray.from_arrays(column.indices.cast(pa.int32()), words)
    plain = pa.types.is_boolean(kind) or (pa.types.is_integer(kind) and kind != pa.uint64())
    return column if plain else as_text(column)


def numbers(column: pa.Array) -> pa.Array:
    """Return the values of a numeric field: integers or float64; NaN and infinities are null.

    Text that says that there is no number, such as NA, is null. Raises an `ArrowException` when
    another text is not a number.

    >>> numbers(pa.array(["1.5", " 2", "NA", None])).to_pylist()
    [1.5, 2.0, None, None]
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return numbers(column.dictionary).take(column.indices)
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return column
    if is_text(kind):
        column = _text_numbers(column.cast(pa.string()))
    column = column.cast(pa.float64(), safe=False)
    finite = pc.is_finite(column)
    return column if pc.all(finite, min_count=0).as_py() else pc.if_else(finite, column, None)


def _text_numbers(text: pa.StringArray) -> pa.DoubleArray:
    try:
        return text.cast(pa.float64())
    except pa.ArrowInvalid:
        text = pc.utf8_trim_whitespace(text)
        missing = pc.is_in(text, pa.array(_MISSING_NUMBERS))
        return pc.if_else(missing, None, text).cast(pa.float64())


def as_text(column: pa.Array) -> pa.StringArray:
    """Return values as text; whole numbers have no fraction, and NaN is null."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_text(column.dictionary).take(column.indices)
    if pa.types.is_floating(kind):
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), _LARGEST_WHOLE))
        integers = pc.if_else(whole, column, None).cast(pa.int64()).cast(pa.string())
        return pc.coalesce(integers, column.cast(pa.string()))
    if pa.types.is_decimal(kind):
        text = column.cast(pa.string())
        return pc.replace_substring_regex(text, r"^(-?\d+)(\.0*)$", r"\1")
    return column.cast(pa.string())
