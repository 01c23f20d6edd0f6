"""Values of configuration files, written as TOML."""

from __future__ import annotations

import json
from collections.abc import Iterable


def quoted(text: str) -> str:
    r"""Return a string of TOML: one of JSON, and DEL is escaped too.

    >>> print(quoted('a "b"\x7f'))
    "a \"b\"\u007f"
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def listed(names: Iterable[str]) -> str:
    """Return a list of strings.

    >>> listed(["app", "os"])
    '["app", "os"]'
    """
    return f"[{', '.join(map(quoted, names))}]"
