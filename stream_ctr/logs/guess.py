"""Guess what the columns of a file mean, from a sample of its rows.

A guess goes by the values first and by the name second, and gives its reason. The rules:

- *Time*: all values are times, or numbers that are times between 2000 and 2040 in one unit. Numbers
  need a name that says time, because an id may look like one.
- *Kind*: all values are `impression`, `click` or `example`.
- *Click time*: a second time that is missing in some rows, or whose name says click.
- *Label*: the values are 0 and 1, false and true, or no and yes; of several such columns, the one
  whose name says so.
- *Id*: the name says id of an impression, an event or a row, and no two rows share a value.
- *Fields*: every other column that has more than one value. Text, booleans, ids, codes, whole
  numbers of 9 digits or more and whole numbers with few values are categorical; other numbers are
  numeric. A categorical column whose values all differ is left out, because nothing can be learned
  from a value that is seen once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_ctr.errors import DataError
from stream_ctr.events.field import Field
from stream_ctr.events.times import DETECTED, TimeFormat, infer_unit, unit_words
from stream_ctr.logs.columns import (
    Columns,
    as_text,
    feature_types,
    is_moment,
    labels,
    shown_columns,
    typed_fields,
)
from stream_ctr.logs.facts import Facts, Sample, read_sample
from stream_ctr.logs.layout import ColumnNames
from stream_ctr.logs.tables import Table
from stream_ctr.messages import nearest, one_line

_FEW_VALUES = 20
_ROWS_A_VALUE = 10  # that a value of a few has at least, on average
_LONG_INTEGER = 10**8
_LEAST_UNIQUE_ROWS = 100
_ODD_SHARE = 0.01  # of values that may be no times
_YEAR_2000_MS = 946_684_800_000
_YEAR_2040_MS = 2_208_988_800_000
_TIME_WORDS = frozenset(("ts", "time", "date", "datetime", "dt", "when", "at", "hour", "day"))
_LABEL_WORDS: Mapping[str, int] = {
    word: rank
    for rank, word in enumerate(
        ("label", "clicked", "click", "clk", "clicks", "target", "y", "response", "outcome")
        + ("converted", "conversion", "purchased", "purchase", "bought", "action", "engaged")
    )
}
_OUTCOME_WORDS = frozenset(
    ("click", "clicks", "clicked", "conversion", "conversions", "converted", "purchased")
    + ("attributed", "revenue", "payout", "dwell")
)
_ID_WORDS = frozenset(("id", "uuid", "guid", "key"))
_EVENT_WORDS = frozenset(("impression", "imp", "event", "request", "row", "view", "show", "ad"))
_CODE_WORDS = frozenset(
    ("id", "ids", "code", "key", "hash", "zip", "zipcode", "postcode", "type", "category", "class")
    + ("user", "customer", "visitor", "ad", "creative", "campaign", "advertiser", "publisher")
    + ("site", "app", "page", "slot", "placement", "item", "product", "brand", "shop", "seller")
    + ("device", "browser", "os", "carrier", "country", "region", "city", "segment", "channel")
)


@dataclass(frozen=True, slots=True)
class FieldGuess:
    """A column as a field, or None if it is left out, and the reason."""

    name: str
    field: Field | None
    reason: str


def guess_field(facts: Facts) -> FieldGuess:
    """Return the kind of field that a column is."""
    kind, reason = _guess_kind(facts)
    field = Field(facts.name, "numeric" if kind == "numeric" else "categorical") if kind else None
    return FieldGuess(facts.name, field, reason)


def _guess_kind(facts: Facts) -> tuple[str, str]:
    if not facts.usable:
        return "", f"{facts.type} cannot be a feature"
    if not facts.present:
        return "", "no values"
    if facts.distinct == 1:
        return "", f"always {facts.first}"
    kind, reason = _kind_of_values(facts)
    all_differ = facts.distinct == facts.present >= _LEAST_UNIQUE_ROWS
    if kind == "categorical" and all_differ:
        return "", f"{reason}, and all values differ"
    return kind, reason


def _kind_of_values(facts: Facts) -> tuple[str, str]:
    if facts.is_boolean:
        return "categorical", "booleans"
    if facts.numbers is None:
        return "categorical", "dates" if is_moment(facts.type) else "text"
    if not facts.is_whole:
        return "numeric", "numbers with fractions"
    if facts.words and facts.words[-1] in _CODE_WORDS:
        return "categorical", f"the name says {facts.words[-1]}"
    if facts.has_leading_zeros:
        return "categorical", "codes with leading zeros"
    if np.abs(facts.numbers).max() >= _LONG_INTEGER:
        return "categorical", "whole numbers of 9 digits or more"
    if facts.distinct <= min(_FEW_VALUES, facts.present / _ROWS_A_VALUE):
        return "categorical", f"{facts.distinct} different whole numbers"
    return "numeric", "whole numbers"


def guess_fields(table: Table, columns: Columns) -> tuple[tuple[Field, ...], tuple[str, ...]]:
    """Return the fields of a table whose layout names none, and a sentence about each guess."""
    if not table.untyped:
        return typed_fields(table, columns), ()
    sample = read_sample(table, list(feature_types(table, columns)))
    guesses = [guess_field(Facts(name, column)) for name, column in sample.columns.items()]
    fields = tuple(guess.field for guess in guesses if guess.field)
    return fields, tuple(_field_notes(guesses))


def _field_notes(guesses: Sequence[FieldGuess]) -> Iterator[str]:
    groups: dict[str, list[str]] = {"categorical": [], "numeric": [], "": []}
    for guess in guesses:
        groups[guess.field.kind if guess.field else ""].append(one_line(guess.name, 60))
    for kind in ("categorical", "numeric"):
        if groups[kind]:
            yield f"no fields configured; guessed as {kind}: {', '.join(groups[kind])}"
    if groups[""]:
        yield f"no fields configured; left out: {', '.join(groups[''])}"


# -- what the columns mean -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayoutGuess:
    """The layout of a file, and the reason for each column and field by its name.

    `reasons` is by the key of `ColumnNames`. `label_mean` is the share of labels that are 1.
    """

    columns: ColumnNames
    needs_zone: bool
    reasons: Mapping[str, str]
    fields: tuple[FieldGuess, ...]


def guess_layout(sample: Sample, named: ColumnNames) -> LayoutGuess:
    """Return the layout that a sample suggests; `named` columns are what they are named.

    Raises `DataError` when the sample has neither labels, kinds nor click times, when the labels
    are not 0 and 1 or all the same, and when no column is left as a field.
    """
    facts = {name: Facts(name, column) for name, column in sample.columns.items()}
    roles = _Roles(sample, facts, named)
    roles.find()
    fields = tuple(_guess_layout_fields(roles))
    if not any(guess.field for guess in fields):
        left_out = "; ".join(f"{one_line(guess.name, 40)}: {guess.reason}" for guess in fields)
        raise DataError(
            f"no column of {sample.table.name} can be a feature"
            + (f" ({left_out:.400})" if left_out else "")
        )
    return LayoutGuess(
        columns=ColumnNames(**roles.found),
        needs_zone=roles.needs_zone,
        reasons=roles.reasons,
        fields=fields,
    )


@dataclass(frozen=True, slots=True)
class _Moments:
    """A column as times: epoch ms of those that are present, and how they are written."""

    ms: npt.NDArray[np.int64]
    form: str
    lacks_zone: bool


class _Roles:
    """The columns of a sample by their meaning, found one after another.

    `found` maps keys of `ColumnNames` to columns; `reasons` says why.
    """

    def __init__(self, sample: Sample, facts: Mapping[str, Facts], named: ColumnNames) -> None:
        self.sample = sample
        self.facts = facts
        given = {role: getattr(named, role) for role in named.__slots__}
        self.found = {role: name for role, name in given.items() if name}
        self.reasons = dict.fromkeys(self.found, "named")
        self.needs_zone = False
        for role, name in self.found.items():
            if name not in facts:
                raise DataError(
                    f"input.columns.{role} names {one_line(name)!r}, which is no column of "
                    f"{sample.table.name}{nearest(name, facts)}; {shown_columns(sample.table)}"
                )
        self._moments = {name: found for name in facts if (found := _moments(facts[name]))}

    def find(self) -> None:
        self._find_features()
        self._find_kind()
        self._find_times()
        if "kind" not in self.found and "click_time" not in self.found:
            self._find_label()
        self._find_id()

    @property
    def shape(self) -> str:
        return next(role for role in ("kind", "click_time", "label") if role in self.found)

    def free(self) -> Iterator[Facts]:
        """Yield the columns that have no meaning yet."""
        used = set(self.found.values())
        return (facts for name, facts in self.facts.items() if name not in used)

    def _take(self, role: str, facts: Facts, reason: str) -> None:
        self.found[role] = facts.name
        self.reasons[role] = reason

    def _find_features(self) -> None:
        column = self.facts.get("features")
        if "features" not in self.found and column and pa.types.is_struct(column.type):
            self._take("features", column, "a struct")

    def _find_kind(self) -> None:
        if {"kind", "label", "click_time"} & self.found.keys():
            return
        for facts in self.free():
            kinds = set(pc.unique(facts.text).to_pylist()) if facts.distinct <= 3 else set()
            if kinds and kinds <= {"impression", "click", "example"}:
                self._take("kind", facts, f"the values are {' and '.join(sorted(kinds))}")
                return

    def _find_times(self) -> None:
        """Find the column of times, and that of click times."""
        candidates = [self.facts[name] for name in self._moments]
        candidates = [facts for facts in candidates if facts.name not in self.found.values()]
        clicks = [
            facts
            for facts in candidates
            if "click" in facts.name.lower() and facts.present < facts.rows
        ]
        if not {"kind", "label", "click_time"} & self.found.keys() and clicks:
            share = 1 - clicks[0].present / clicks[0].rows
            self._take("click_time", clicks[0], f"times, missing in {share:.1%} of the rows")
        if "time" not in self.found:
            shown = [
                facts for facts in candidates if facts not in clicks and facts.present == facts.rows
            ]
            if shown:
                best = max(shown, key=lambda facts: (_says_time(facts), facts.distinct))
                self._take("time", best, self._moments[best.name].form)
        for role in ("time", "click_time"):
            moments = self._moments.get(self.found.get(role, ""))
            if moments:
                self.needs_zone |= moments.lacks_zone
                self.reasons[role] += f", {_range(moments.ms)}"

    def _find_label(self) -> None:
        name = self.found.get("label")
        facts = self.facts[name] if name else self._guessed_label()
        self._take("label", facts, self._label_reason(facts))

    def _guessed_label(self) -> Facts:
        named = [facts for facts in self.free() if _says_label(facts)]
        binary = [facts for facts in self.free() if _binary(facts) is not None]
        best = [facts for facts in named if facts in binary]
        if best:
            return min(best, key=lambda facts: _label_rank(facts))
        if named:
            return min(named, key=lambda facts: _label_rank(facts))  # its values are refused below
        varied = [facts for facts in binary if facts.distinct == 2]
        if len(varied) == 1:
            return varied[0]
        choices = ", ".join(facts.shown for facts in varied[:5])
        which = f"one of {choices} may be it" if varied else "no column holds 0 and 1"
        raise DataError(
            f"{self.sample.table.name} has no column that says who clicked: {which}; name it with "
            "-X input.columns.label=NAME (0 or 1), click_time=NAME or kind=NAME; "
            f"{shown_columns(self.sample.table)}"
        )

    def _label_reason(self, facts: Facts) -> str:
        """Return what the labels are. Raises `DataError` if they are not 0 and 1, or all one."""
        ones = _binary(facts)
        name = self.sample.table.name
        if ones is None:
            values = pc.value_counts(facts.text).to_pylist() if facts.present else []
            shown = ", ".join(repr(each["values"])[:40] for each in values[:4])
            missing = "" if facts.present == facts.rows else "; some are missing"
            raise DataError(
                f"{name}: column {facts.shown} cannot be the label: labels are 0 and 1, and it has "
                f"{shown}{', ...' if len(values) > 4 else ''}{missing}"
            )
        mean = float(ones.mean())
        if mean in (0.0, 1.0):
            raise DataError(
                f"{name}: column {facts.shown} is {int(mean)} in all of the first {len(ones):,} "
                "rows: a model learns from rows of both labels"
            )
        return f"0 and 1; {mean:.2%} of the first {len(ones):,} rows are 1"

    def _find_id(self) -> None:
        if "id" in self.found:
            return
        ranked = [(rank, facts) for facts in self.free() if (rank := _id_rank(facts)) is not None]
        if self.shape == "kind":
            ranked = [(rank, facts) for rank, facts in ranked if self._repeats_by_kind(facts)]
        else:
            ranked = [(rank, facts) for rank, facts in ranked if facts.distinct == facts.rows]
        if ranked:
            _, best = min(ranked, key=lambda pair: pair[0])
            self._take("id", best, "no two rows share a value" if self.shape != "kind" else "an id")
        elif self.shape == "kind":
            raise DataError(
                f"{self.sample.table.name} has events and no column of ids by which clicks find "
                "their impressions; name it with -X input.columns.id=NAME; "
                f"{shown_columns(self.sample.table)}"
            )

    def _repeats_by_kind(self, facts: Facts) -> bool:
        """Return whether the values are ids of impressions, which differ between impressions."""
        kind = self.facts[self.found["kind"]].column
        shown = facts.column.filter(pc.equal(as_text(kind), "impression"))
        ids = Facts(facts.name, shown)
        return ids.distinct == len(shown)


def _moments(facts: Facts) -> _Moments | None:
    """Return a column as times, or None if its values or its name speak against it."""
    if facts.distinct < 2 or facts.is_boolean:
        return None
    lacks_zone = False
    if is_moment(facts.type):
        form = str(facts.type)
        ms = DETECTED.epoch_ms(facts.column.drop_null())
        lacks_zone = getattr(facts.type, "tz", None) is None
    elif facts.numbers is not None:
        unit = infer_unit(facts.numbers)
        if unit is None or facts.has_leading_zeros:
            return None
        form = f"epoch {unit_words(unit)}"
        ms = pa.array(TimeFormat(unit).from_numbers(facts.numbers))
    else:
        form = "RFC 3339"
        ms = DETECTED.from_text(facts.text)
        if ms.null_count > _ODD_SHARE * len(ms):
            form, lacks_zone = "times without a zone", True
            ms = TimeFormat(zone="UTC").from_text(facts.text)
    return _plausible(facts, ms, form, lacks_zone)


def _plausible(facts: Facts, column: pa.Int64Array, form: str, lacks_zone: bool) -> _Moments | None:
    ms = column.drop_null().to_numpy()
    within = (ms >= _YEAR_2000_MS) & (ms < _YEAR_2040_MS)
    if np.count_nonzero(within) < (1 - _ODD_SHARE) * facts.present:
        return None
    ms = ms[within]
    is_sorted = bool((np.diff(ms) >= 0).all())
    if facts.numbers is not None and not (_says_time(facts) or is_sorted):
        return None
    return _Moments(ms, form, lacks_zone)


def _range(ms: npt.NDArray[np.int64]) -> str:
    ends = (datetime.fromtimestamp(int(each) / 1000, UTC) for each in (ms.min(), ms.max()))
    return " to ".join(f"{end:%Y-%m-%d %H:%M:%S}" for end in ends)


def _says_time(facts: Facts) -> bool:
    return any(word in _TIME_WORDS or word.endswith(("time", "stamp")) for word in facts.words)


def _says_label(facts: Facts) -> bool:
    return bool(_LABEL_WORDS.keys() & set(facts.words)) and not _says_time(facts)


def _label_rank(facts: Facts) -> int:
    return min(_LABEL_WORDS[word] for word in facts.words if word in _LABEL_WORDS)


def _binary(facts: Facts) -> npt.NDArray[np.int8] | None:
    """Return the values as 0 and 1, or None if they are something else or missing."""
    if facts.text is None or not facts.present or facts.present < facts.rows:
        return None
    try:
        return np.asarray(labels(facts.column if facts.is_boolean else facts.text).to_numpy())
    except pa.ArrowInvalid:
        return None


def _id_rank(facts: Facts) -> int | None:
    """Return how little the name says that it is the id of an impression; None: not at all."""
    if facts.present < facts.rows or facts.text is None or is_moment(facts.type):
        return None
    if facts.numbers is not None and not facts.is_whole:
        return None
    said = set(facts.words)
    joined = "".join(facts.words)
    if joined in ("impressionid", "impid"):
        return 0
    if not (said & _ID_WORDS or joined.endswith("id")):
        return None
    return 1 if said & _EVENT_WORDS else 2 if len(facts.words) == 1 else 3


def _guess_layout_fields(roles: _Roles) -> Iterator[FieldGuess]:
    label = _outcome(roles)
    for facts in _feature_facts(roles):
        guess = guess_field(facts)
        if guess.field and not facts.name.strip():
            guess = FieldGuess(facts.name, None, "it has no name")
        elif guess.field and _counts_rows(facts):
            guess = FieldGuess(facts.name, None, "it counts the rows")
        elif guess.field and _OUTCOME_WORDS & set(facts.words):
            guess = FieldGuess(facts.name, None, "its name says what happened after the impression")
        elif guess.field and label is not None and _tells(facts, label):
            guess = FieldGuess(facts.name, None, "it tells the label exactly")
        yield guess


def _feature_facts(roles: _Roles) -> Iterator[Facts]:
    if "features" not in roles.found:
        yield from roles.free()
        return
    struct = roles.facts[roles.found["features"]].column.drop_null()
    for index, member in enumerate(struct.type):
        yield Facts(member.name, pc.struct_field(struct, [index]))


def _outcome(roles: _Roles) -> npt.NDArray[np.int8] | None:
    """Return the labels of the rows, where each row has one."""
    if roles.shape == "label":
        return _binary(roles.facts[roles.found["label"]])
    if roles.shape == "click_time":
        column = roles.facts[roles.found["click_time"]].column
        return np.asarray(column.is_valid()).astype(np.int8)
    return None


def _tells(facts: Facts, label: npt.NDArray[np.int8]) -> bool:
    """Return whether each of a few values, missing among them, comes with one label only."""
    if facts.distinct > _FEW_VALUES or facts.rows != len(label) or len(label) < _LEAST_UNIQUE_ROWS:
        return False
    codes = as_text(facts.column).dictionary_encode(null_encoding="encode").indices.to_numpy()
    count = np.bincount(codes)
    ones = np.bincount(codes, weights=label)
    return bool(((ones == 0) | (ones == count)).all())


def _counts_rows(facts: Facts) -> bool:
    found = facts.numbers
    return found is not None and len(found) > 2 and bool((np.diff(found) == 1).all())
