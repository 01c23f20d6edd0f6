"""Fields: the columns of an impression's features, and their cross products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stream_ctr.messages import nearest


@dataclass(frozen=True, slots=True)
class Field:
    """A column of an impression's features. `kind` says how its values become table rows (see `features.Hasher`)."""

    name: str
    kind: Literal["categorical", "numeric"]


def cross(names: object) -> object:
    """The fields of a cross product, written "age*category"; a list of names is taken as it is.

    >>> cross("age * category")
    ('age', 'category')
    """
    return tuple(part.strip() for part in names.split("*")) if isinstance(names, str) else names


def require_members(
    crosses: Sequence[Sequence[str]], fields: Sequence[Field], numeric_encoding: str
) -> None:
    """Raises `ValueError` when a cross product has a member that is no field, or a number that is not in buckets."""
    kinds = {field.name: field.kind for field in fields}
    for names in crosses:
        for name in names:
            if name not in kinds:
                raise ValueError(
                    f"{shown_cross(names)} has {name!r:.80}, which is no field{nearest(name, kinds)}"
                )
            if kinds[name] == "numeric" and numeric_encoding != "buckets":
                raise ValueError(
                    f"{shown_cross(names)} has the number {name!r:.80}, which has one row with numeric_encoding = {numeric_encoding!r}; "
                    "only buckets of it can be crossed"
                )


def shown_cross(names: Sequence[str]) -> str:
    return repr("*".join(names))[:120]
