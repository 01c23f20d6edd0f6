"""Text for messages that quote input: short, on one line, and without characters that steer a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN_CHARACTERS = 200


def one_line(text: object, longest: int = 200) -> str:
    r"""`text` for a message: what would steer a terminal is an escape, what is too long is cut.

    >>> one_line("column \x1b[31m" + 300 * "x", 20)
    'column \\x1b[31mxxxxx...'
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)[: longest + 1]
    )
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


def printable(data: bytes | str, longest: int = _SHOWN_CHARACTERS) -> str:
    r"""`data` for a terminal: one line of at most `longest` characters, where what would steer the terminal is written as an escape.

    >>> printable(b"\x1b[2Jcaf\xc3\xa9\r\n\xff")
    '\\x1b[2Jcafé\\r\\n\\xff'
    >>> printable("a\u202eb" + 100 * "c", 5)
    'a\\u202ebcc... (103 characters)'
    """
    text = (
        data if isinstance(data, str) else data[: 4 * longest].decode("utf-8", "backslashreplace")
    )
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest]
    )
    if len(data) <= longest:
        return shown
    return f"{shown}... ({len(data):,} {'characters' if isinstance(data, str) else 'bytes'})"


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`"; did you mean 'x'?"` for the word most like `word`, or nothing."""
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f"; did you mean {match[0]!r}?" if match else ""
