"""Format numbers and settings for the reader of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ABSENT = "\N{EN DASH}"


def number(value: float | None, digits: int = 4, *, significant: int = 0) -> str:
    """Return `value` with `digits` decimals, or rounded to `significant` digits if that is not 0.

    >>> number(0.12345, 4), number(1234.5, significant=3), number(0.01234, significant=3)
    ('0.1235', '1,230', '0.0123')
    >>> number(None)
    '–'
    """
    if value is None:
        return ABSENT
    if not significant:
        return f"{value:.{digits}f}"
    rounded = float(f"{value:.{significant}g}")
    return f"{rounded:,.0f}" if abs(value) >= 10 ** (significant - 1) else f"{rounded:g}"


def signed(value: float) -> str:
    """Return `value` with its sign and five decimals; the minus sign is the typographic one.

    >>> signed(0.5), signed(-0.25)
    ('+0.50000', '−0.25000')
    """
    return f"{value:+.5f}".replace("-", "\N{MINUS SIGN}")


def spread(mean: float | None, std: float | None, digits: int) -> str:
    """Return a mean with its standard deviation, or the mean alone when `std` is None.

    >>> spread(0.75, 0.0125, 3), spread(0.75, None, 3)
    ('0.750 ± 0.013', '0.750')
    """
    text = number(mean, digits)
    return text if std is None else f"{text} \N{PLUS-MINUS SIGN} {std:.{digits}f}"


def count(value: float | None) -> str:
    """Return a whole number with thousands separators.

    >>> count(45840617), count(None)
    ('45,840,617', '–')
    """
    return ABSENT if value is None else f"{value:,.0f}"


def percent(share: float) -> str:
    """Return a share as a percentage with three significant digits.

    >>> percent(0.07847)
    '7.85 %'
    """
    return f"{100 * share:.3g} %"


def as_text(value: Any) -> str:
    """Return the value of a setting as text.

    >>> as_text([400, 400]), as_text({"alpha": 0.1}), as_text(True), as_text(None)
    ('400, 400', 'alpha 0.1', 'yes', 'none')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {as_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def duration(seconds: float) -> str:
    """Return a duration in the two largest units that apply.

    >>> duration(42.3), duration(150), duration(7500)
    ('42 s', '2 min 30 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def byte_size(size: float) -> str:
    """Return a number of bytes in a decimal unit.

    >>> byte_size(7_930_000_000), byte_size(1_245_600), byte_size(1_200)
    ('7.9 GB', '1.2 MB', '1 kB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"
