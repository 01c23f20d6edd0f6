"""Reports in which values are missing or odd."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any


def altered(report: Mapping[str, Any], paths: Iterable[tuple[str, ...]], put: object) -> Any:
    """Return a copy of a report with `put` at these paths, or nothing there if it is "absent"."""
    changed = copy.deepcopy(dict(report))
    for *parents, last in paths:
        where: Any = changed
        for key in parents:
            where = where.get(key) if isinstance(where, dict) else None
        if isinstance(where, dict) and put == "absent":
            where.pop(last, None)
        elif isinstance(where, dict):
            where[last] = put
    return changed
