"""What became of the fields of one run in another: which stay, come, go, or begin anew.

A field stays if its values are hashed in the same way: then each of them has the same row in both
runs, whichever other fields there are. A field with another kind or encoding, or with other edges,
begins anew: the rows that its old values share with new ones mean nothing any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field, Schema, shown_cross
from stream_ctr.messages import one_line

Rows = npt.NDArray[np.int64]

# Numbers beyond 2^64 are not looked for among the buckets of a field: there would be as many
# buckets again for each further 64 octaves, and each costs another field what it knows of a row.
_LARGEST_EXPONENT = 64


@dataclass(frozen=True, slots=True)
class FieldChanges:
    """What became of the fields of one schema in another.

    `changed` maps fields that are in both, and whose values are hashed in another way, to the
    reason. `rows` are the rows of the new table that the old values of these fields share with new
    ones.
    """

    stay: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    changed: dict[str, str]
    rows: Rows

    @property
    def sentences(self) -> list[str]:
        """A sentence for each kind of change, first the number of fields that stay."""
        total = len(self.stay) + len(self.new) + len(self.changed)
        said = [f"fields: {len(self.stay)} of {total} carry over"]
        if self.new:
            said.append(f"fields: new, they begin as in a fresh table: {listed(self.new)}")
        if self.gone:
            said.append(f"fields: gone, nothing reads their weights: {listed(self.gone)}")
        return said + [
            f"fields: {one_line(name, 60)} begins anew: {reason}"
            for name, reason in self.changed.items()
        ]


def compare_fields(old: Schema, new: Schema) -> FieldChanges:
    """Return what became of the fields of `old` in `new`.

    >>> fields = Field("app", "categorical"), Field("age", "numeric")
    >>> now = fields[0], Field("age", "categorical")
    >>> changes = compare_fields(*(Schema(fields=each, table_bits=8) for each in (fields, now)))
    >>> changes.stay, changes.changed
    (('app',), {'age': 'it was numeric and is categorical'})
    """
    before = {field.name: field for field in old.fields}
    names = [field.name for field in new.fields]
    stay, changed, rows = [], {}, [np.empty(0, np.int64)]
    for field in new.fields:
        if field.name not in before:
            continue
        was, now = _encoding(old, before[field.name]), _encoding(new, field)
        if was == now:
            stay.append(field.name)
        else:
            changed[field.name] = _reason(was, now)
            rows.append(_rows_of(field.name, _shared_texts(was, now), new))
    return FieldChanges(
        stay=tuple(stay),
        new=tuple(name for name in names if name not in before),
        gone=tuple(name for name in before if name not in names),
        changed=changed,
        rows=np.unique(np.concatenate(rows)),
    )


class _Encoding(NamedTuple):
    """How the values of a field become texts that are hashed, and multipliers."""

    kind: str  # categorical, or the numeric encoding
    per_octave: float = 0.0
    edges: tuple[float, ...] = ()
    scale: float = 0.0


def _encoding(schema: Schema, field: Field) -> _Encoding:
    if field.kind == "categorical":
        return _Encoding("categorical")
    if schema.has_values:
        return _Encoding(schema.numeric_encoding, scale=schema.value_scales.get(field.name, 0.0))
    edges = schema.bucket_edges.get(field.name, ())
    return _Encoding("buckets", schema.buckets_per_octave, tuple(edges))


def _reason(was: _Encoding, now: _Encoding) -> str:
    if (was.kind == "categorical") != (now.kind == "categorical"):
        kinds = ("categorical" if each.kind == "categorical" else "numeric" for each in (was, now))
        return "it was {} and is {}".format(*kinds)
    if was.kind != now.kind:
        return f"its numeric_encoding was {was.kind} and is {now.kind}"
    if was.per_octave != now.per_octave:
        return f"its buckets_per_octave were {was.per_octave:g} and are {now.per_octave:g}"
    return "its bucket edges are others" if was.edges != now.edges else "its scale is another"


def _shared_texts(was: _Encoding, now: _Encoding) -> list[str | None]:
    """Return the texts that both encodings may hash; None is a missing value."""
    kinds = {was.kind, now.kind}
    if "buckets" in kinds and kinds <= {"buckets", "categorical"}:
        most = max(
            len(each.edges) + math.ceil(each.per_octave * _LARGEST_EXPONENT) for each in (was, now)
        )
        return [str(bucket) for bucket in range(-most, most + 1)] + [None]
    return [None] if "buckets" in kinds else ["value", None]


def _rows_of(name: str, texts: Sequence[str | None], schema: Schema) -> Rows:
    """Return the rows of a field's texts."""
    hasher = Hasher(
        [Field(name, "categorical")], table_bits=schema.table_bits, hash_seed=schema.hash_seed
    )
    ids, _ = hasher.rows({name: pa.array(texts, pa.string())})
    return ids[:, 0].astype(np.int64)


def crosses_said(old: Schema, new: Schema, changes: FieldChanges) -> list[str]:
    """Return a sentence for each cross product that does not carry over as it is."""
    said = []
    for members in new.crosses:
        name = shown_cross(members)
        if members not in old.crosses:
            said.append(f"cross product {name}: new, its rows begin as in a fresh table")
        elif odd := [each for each in members if each in changes.changed]:
            said.append(
                f"cross product {name}: its rows stay, although {listed(odd)} changed: "
                "they cannot be told from others"
            )
    said += [
        f"cross product {shown_cross(members)}: gone, nothing reads its weights"
        for members in old.crosses
        if members not in new.crosses
    ]
    return said


def listed(names: Iterable[str]) -> str:
    """Return names for a sentence.

    >>> listed(["app", "age"])
    'app, age'
    """
    return ", ".join(one_line(name, 60) for name in names)
