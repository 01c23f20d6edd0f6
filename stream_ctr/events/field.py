"""Fields, the columns of an impression's features; their cross products; and the schema of both.

>>> import msgspec
>>> schema = Schema(fields=(Field("app", "categorical"), Field("age", "numeric")), table_bits=20)
>>> msgspec.json.encode(schema.fields)
b'[["app","categorical"],["age","numeric"]]'
>>> schema.value_fields, msgspec.structs.replace(schema, numeric_encoding="value").value_fields
((), (1,))
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

from msgspec import Meta, Struct

from stream_ctr.messages import nearest


class Field(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A column of an impression's features. `kind` decides how its values become table rows."""

    name: str
    kind: Literal["categorical", "numeric"]


Cross = Annotated[tuple[str, ...], Meta(min_length=2)]
Edges = Annotated[tuple[float, ...], Meta(min_length=2, max_length=256)]
Scale = Annotated[float, Meta(gt=0)]
NumericEncoding = Literal["buckets", "value", "log_value"]


class Schema(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that turns features into table rows. A server needs nothing else to hash them.

    `bucket_edges` and `value_scales` are those of numeric fields, by name, whose encoding was
    fitted to the first records (`fit`). A field without them is encoded as it is.

    Raises `ValueError` when a field or a cross product is listed twice, when a cross product has a
    wrong member, or when edges or scales are not those of a numeric field or do not fit the
    encoding.
    """

    fields: tuple[Field, ...]
    table_bits: Annotated[int, Meta(ge=4, le=31)]
    numeric_encoding: NumericEncoding = "buckets"
    buckets_per_octave: Annotated[float, Meta(gt=0, le=64)] = 2.0
    hash_seed: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] = 0
    crosses: Annotated[tuple[Cross, ...], Meta(max_length=256)] = ()
    bucket_edges: dict[str, Edges] = {}
    value_scales: dict[str, Scale] = {}

    def __post_init__(self) -> None:
        names = Counter(field.name for field in self.fields)
        repeated = sorted(name for name, times in names.items() if times > 1)
        if repeated:
            raise ValueError(f"a field is listed twice: {', '.join(repeated)}")
        for members in self.crosses:
            require_distinct_members(members)
        require_distinct_crosses(self.crosses)
        require_members(self.crosses, self.fields, self.numeric_encoding)
        require_fitted(
            self.bucket_edges, self.value_scales, self.fields, buckets=not self.has_values
        )

    @property
    def has_values(self) -> bool:
        """Whether the embedding of a number is multiplied by a value."""
        return self.numeric_encoding != "buckets"

    @property
    def value_fields(self) -> tuple[int, ...]:
        """The indices of the fields whose embedding is multiplied by a value."""
        if not self.has_values:
            return ()
        return tuple(index for index, field in enumerate(self.fields) if field.kind == "numeric")


def cross(names: object) -> object:
    """Return the fields of a cross product written as "age*category"; return a list unchanged.

    >>> cross("age * category")
    ('age', 'category')
    >>> cross(["age", "category"])
    ['age', 'category']
    """
    return tuple(part.strip() for part in names.split("*")) if isinstance(names, str) else names


def require_distinct_members(names: Sequence[str]) -> None:
    """Raises `ValueError` unless a cross product has two or more members, all different."""
    if len(names) < 2 or not all(names):
        raise ValueError(
            f'a cross product needs two or more fields, "age*category", got {shown_cross(names)}'
        )
    if len(set(names)) < len(names):
        raise ValueError(f"a cross product has a field twice: {shown_cross(names)}")


def require_distinct_crosses(crosses: Sequence[Sequence[str]]) -> None:
    """Raises `ValueError` when two cross products have the same members, in any order."""
    seen: set[tuple[str, ...]] = set()
    for names in crosses:
        members = tuple(sorted(names))
        if members in seen:
            raise ValueError(f"a cross product is listed twice: {shown_cross(names)}")
        seen.add(members)


def require_members(
    crosses: Sequence[Sequence[str]], fields: Sequence[Field], numeric_encoding: str
) -> None:
    """Raises `ValueError` when a member of a cross product cannot be crossed.

    A member must be one of the `fields`. It can be numeric only if `numeric_encoding` is "buckets".
    """
    kinds = {field.name: field.kind for field in fields}
    for names in crosses:
        for name in names:
            if name not in kinds:
                raise ValueError(
                    f"{shown_cross(names)} has {name!r:.80}, "
                    f"which is not a field{nearest(name, kinds)}"
                )
            if kinds[name] == "numeric" and numeric_encoding != "buckets":
                raise ValueError(
                    f"{shown_cross(names)} has the number {name!r:.80}, which has one row with "
                    f"numeric_encoding = {numeric_encoding!r}; only buckets of it can be crossed"
                )


def require_fitted(
    bucket_edges: Mapping[str, Sequence[float]],
    value_scales: Mapping[str, float],
    fields: Sequence[Field],
    *,
    buckets: bool,
) -> None:
    """Raises `ValueError` unless edges and scales are of numeric fields and of this encoding.

    Edges must rise, with a distance between the first and the last that is finite.
    """
    numeric = {field.name for field in fields if field.kind == "numeric"}
    for name in [*bucket_edges, *value_scales]:
        if name not in numeric:
            raise ValueError(f"{name!r:.80} has edges or a scale, and is no numeric field")
    if value_scales if buckets else bucket_edges:
        raise ValueError("edges are for numbers in buckets, and scales for other encodings")
    for name, edges in bucket_edges.items():
        rises = all(lower < upper for lower, upper in pairwise(edges))
        if len(edges) < 2 or not rises or not math.isfinite(edges[-1] - edges[0]):
            raise ValueError(f"the edges of {name!r:.80} must be two or more rising numbers")


def shown_cross(names: Sequence[str]) -> str:
    """Return the cross product for a message, cut to 120 characters.

    >>> shown_cross(["age", "category"])
    "'age*category'"
    """
    return repr("*".join(names))[:120]
