"""Text for messages that quote input: short, on one line, without terminal control characters."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from datetime import UTC, datetime

_SHOWN_CHARACTERS = 200
_UTF8_BYTES = 4  # of a character, at most
_LONGEST_WORD = 100
_MOST_WORDS = 5000
_LATEST_MS = 253_402_300_799_999  # 9999-12-31T23:59:59.999Z


def one_line(text: object, longest: int = _SHOWN_CHARACTERS) -> str:
    r"""Return `text` for a message, with escapes for control characters, cut to `longest`.

    A cut text ends with "...".

    >>> one_line("column \x1b[31m" + 300 * "x", 20)
    'column \\x1b[31mxxxxx...'
    """
    shown = "".join(map(_escaped, str(text)[: longest + 1]))
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


def is_utf8(text: str) -> bool:
    r"""Return whether a text that the system gave, such as a path, is UTF-8.

    >>> is_utf8("caf\xe9"), is_utf8("caf\udce9")  # Python's text for the byte 0xe9 in a path
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(data: bytes | str, longest: int = _SHOWN_CHARACTERS) -> str:
    r"""Return `data` on one line for a terminal, with escapes for control characters.

    At most `longest` characters are shown, followed by the length if that is greater. Bytes are
    decoded as UTF-8, and invalid bytes become escapes.

    >>> printable(b"\x1b[2Jcaf\xc3\xa9\r\n\xff")
    '\\x1b[2Jcafé\\r\\n\\xff'
    >>> printable("a\u202eb" + 100 * "c", 5)
    'a\\u202ebcc... (103 characters)'
    """
    if isinstance(data, str):
        text = data
        unit = "characters"
    else:
        text = data[: _UTF8_BYTES * longest].decode("utf-8", "backslashreplace")
        unit = "bytes"
    shown = "".join(map(_escaped, text[:longest]))
    return shown if len(data) <= longest else f"{shown}... ({len(data):,} {unit})"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def rfc3339(milliseconds: int | None) -> str | None:
    """Format epoch milliseconds, or return None for none and for those after the year 9999.

    >>> rfc3339(1_735_689_600_046)
    '2025-01-01T00:00:00.046Z'
    """
    if milliseconds is None or milliseconds > _LATEST_MS:
        return None
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_minute(milliseconds: int) -> str:
    """Format epoch milliseconds to the minute.

    >>> utc_minute(1_735_689_600_046)
    '2025-01-01T00:00Z'
    """
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%dT%H:%MZ}"


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return a suggestion of the most similar word for the end of a message, or "".

    >>> nearest("lear", ["learn", "join"])
    "; did you mean 'learn'?"
    >>> nearest("x", ["learn", "join"])
    ''
    """
    match = nearest_word(word, words, cutoff=cutoff)
    return f"; did you mean {match!r}?" if match is not None else ""


def nearest_word(word: str, words: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the most similar word, or None if none is similar.

    Comparing takes the square of the length, so long words and all after the first thousands are
    left out: what is compared may come from strangers.

    >>> nearest_word("lear", ["learn", "join"])
    'learn'
    """
    if len(word) > _LONGEST_WORD:
        return None
    short = (each for each in words if len(each) <= _LONGEST_WORD)
    compared = list(itertools.islice(short, _MOST_WORDS))
    return next(iter(difflib.get_close_matches(word, compared, n=1, cutoff=cutoff)), None)
