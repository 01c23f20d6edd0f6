"""Fields, the columns of an impression's features; their cross products; and the schema of both.

>>> import msgspec
>>> schema = Schema(fields=(Field("app", "categorical"), Field("age", "numeric")), table_bits=20)
>>> msgspec.json.encode(schema.fields)
b'[["app","categorical"],["age","numeric"]]'
>>> schema.value_fields, msgspec.structs.replace(schema, numeric_encoding="value").value_fields
((), (1,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from stream_ctr.messages import nearest


class Field(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A column of an impression's features. `kind` decides how its values become table rows."""

    name: str
    kind: Literal["categorical", "numeric"]


Cross = Annotated[tuple[str, ...], Meta(min_length=2)]


class Schema(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that turns features into table rows. A server needs nothing else to hash them.

    Raises `ValueError` when a field or a cross product is listed twice, or when a cross product
    has a wrong member.
    """

    fields: tuple[Field, ...]
    table_bits: Annotated[int, Meta(ge=4, le=31)]
    numeric_encoding: Literal["buckets", "value", "log_value"] = "buckets"
    buckets_per_octave: Annotated[float, Meta(gt=0, le=64)] = 2.0
    hash_seed: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] = 0
    crosses: Annotated[tuple[Cross, ...], Meta(max_length=256)] = ()

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"a field is listed twice: {', '.join(repeated)}")
        for members in self.crosses:
            require_distinct_members(members)
        require_distinct_crosses(self.crosses)
        require_members(self.crosses, self.fields, self.numeric_encoding)

    @property
    def value_fields(self) -> tuple[int, ...]:
        """The indices of the fields whose embedding is multiplied by a value."""
        if self.numeric_encoding == "buckets":
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
    for index, names in enumerate(crosses):
        if any(sorted(names) == sorted(other) for other in crosses[:index]):
            raise ValueError(f"a cross product is listed twice: {shown_cross(names)}")


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


def shown_cross(names: Sequence[str]) -> str:
    """Return the cross product for a message, cut to 120 characters.

    >>> shown_cross(["age", "category"])
    "'age*category'"
    """
    return repr("*".join(names))[:120]
