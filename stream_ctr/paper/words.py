"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "\N{EN DASH}"


def number(value: float | None, digits: int = 4, *, significant: int = 0) -> str:
    """So many digits behind the point, or so many that count.

    >>> number(0.12345, 4), number(1234.5, significant=3), number(0.01234, significant=3), number(None)
    ('0.1235', '1,230', '0.0123', '–')
    """
    if value is None:
        return NONE
    if not significant:
        return f"{value:.{digits}f}"
    rounded = float(f"{value:.{significant}g}")
    return f"{rounded:,.0f}" if abs(value) >= 10 ** (significant - 1) else f"{rounded:g}"


def signed(value: float) -> str:
    return f"{value:+.5f}".replace("-", "\N{MINUS SIGN}")


def spread(mean: float | None, std: float | None, digits: int) -> str:
    return number(mean, digits) + (
        f" \N{PLUS-MINUS SIGN} {std:.{digits}f}" if std is not None else ""
    )


def count(value: float | None) -> str:
    """A number of things.

    >>> count(45840617), count(None)
    ('45,840,617', '–')
    """
    return NONE if value is None else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def plain(value: Any) -> str:
    """
    >>> plain([400, 400]), plain({"alpha": 0.1}), plain(True)
    ('400, 400', 'alpha 0.1', 'yes')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(of)}" for name, of in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return (
        {True: "yes", False: "no", None: "none"}.get(value, str(value))
        if value is None or isinstance(value, bool)
        else str(value)
    )


def duration(seconds: float) -> str:
    """
    >>> duration(42.3), duration(150), duration(7500)
    ('42 s', '2 min 30 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def in_bytes(count: float) -> str:
    """
    >>> in_bytes(7_930_000_000), in_bytes(1_245_600)
    ('7.9 GB', '1.2 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
