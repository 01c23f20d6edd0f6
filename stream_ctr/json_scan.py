"""A scanner of JSON events: the records whose members are what an event's members usually are, a byte at a time, in compiled code.

It reads no record that a strict parser would refuse, and none in another way. What it cannot vouch for it leaves to that parser: what is
no JSON or no event, members that are there twice, names with escapes, integers beyond 64 bits, nesting beyond 254, times in unusual
spellings. Numbers of up to 15 digits it turns into doubles itself, exactly (W. D. Clinger, "How to read floating point numbers
accurately", 1990: such an integer and powers of ten up to 10^22 are doubles, so one multiplication or division rounds correctly).

Texts are not copied while scanning: a text is where it stands, in the record or, where it had escapes, in `Scan.unescaped`.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.candidates import CLICK, IMPRESSION

_DEEPEST_SKIPPED = 254
_MOST_EXACT_DIGITS, _MOST_DIGITS = 15, 300
_EXACT_POWERS = np.array([10.0**k for k in range(23)])
_MISSING = -1
_NO_MOMENT = np.iinfo(np.int64).min
_DAY_MS = 86_400_000

# What a byte of a string is: 0 itself, 1 the end of it, an escape, or no character at all, 2 the beginning of several bytes.
_CLASS = np.zeros(256, np.uint8)
_CLASS[:0x20] = _CLASS[[ord('"'), ord("\\")]] = 1
_CLASS[0x80:] = 2

# The character for each letter after a backslash; 0: there is no such escape.
_ESCAPES = np.zeros(256, np.uint8)
for _letter, _meant in zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True):
    _ESCAPES[_letter] = _meant

_KIND, _ID, _TIME, _FEATURES, _PROBABILITY = range(5)
_TOP = np.frombuffer(b"kindimpression_idtimefeaturestrue_probability", np.uint8)
_TOP_AT = np.array([0, 4, 17, 21, 29, 45])
_IMPRESSION_TEXT, _CLICK_TEXT = np.frombuffer(b"impression", np.uint8), np.frombuffer(b"click", np.uint8)
_TRUE, _FALSE, _NULL = (np.frombuffer(word, np.uint8) for word in (b"true", b"false", b"null"))


class Names(NamedTuple):
    """The F fields looked for: UTF-8 of the names, their ends [F + 1], and of each its column in `Scan.number`, -1 when categorical."""

    text: npt.NDArray[np.uint8]
    at: npt.NDArray[np.int64]
    number: npt.NDArray[np.int64]


class Scan(NamedTuple):
    """What was found in n records. Of a record that is not `read` nothing else is told.

    Texts have `at` and `size` (-1: missing); a negative `at` is the place `-1 - at` in `unescaped`. `number` [n, V + 1] (NaN: missing) has
    the numeric fields and then true_probability; where `number_size` is not -1, the text there is to be turned into the number.
    """

    read: npt.NDArray[np.bool_]
    kind: npt.NDArray[np.int8]
    id_at: npt.NDArray[np.int64]
    id_size: npt.NDArray[np.int64]
    time: npt.NDArray[np.int64]
    has_features: npt.NDArray[np.bool_]
    unread: npt.NDArray[np.bool_]
    at: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    number: npt.NDArray[np.float64]
    number_at: npt.NDArray[np.int64]
    number_size: npt.NDArray[np.int64]
    unescaped: npt.NDArray[np.uint8]

    @classmethod
    def room_for(cls, records: int, fields: int, numbers: int, bytes_: int) -> Scan:
        n, v = records, numbers + 1
        return cls(
            read=np.zeros(n, np.bool_),
            kind=np.full(n, _MISSING, np.int8),
            id_at=np.zeros(n, np.int64),
            id_size=np.full(n, _MISSING),
            time=np.zeros(n, np.int64),
            has_features=np.zeros(n, np.bool_),
            unread=np.zeros(n, np.bool_),
            at=np.empty((n, fields), np.int64),
            size=np.full((n, fields), _MISSING),
            number=np.full((n, v), np.nan),
            number_at=np.empty((n, v), np.int64),
            number_size=np.full((n, v), _MISSING),
            unescaped=np.empty(bytes_, np.uint8),
        )


class _State(NamedTuple):
    """Scratch: bytes used of `Scan.unescaped` [1]; open brackets; of each field the last row that had it, and the field that came after it
    (at F: that came first), which is the first guess for a name."""

    used: npt.NDArray[np.int64]
    brackets: npt.NDArray[np.uint8]
    seen: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]


@numba.njit(cache=True, nogil=True)
def scan(data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], size: npt.NDArray[np.int64], names: Names, found: Scan) -> None:
    """Read the records of `size` bytes from `start` on."""
    fields = len(names.number)
    state = _State(
        np.zeros(1, np.int64),
        np.empty(_DEEPEST_SKIPPED, np.uint8),
        np.full(fields, -1),
        (np.arange(fields + 1) + 1) % (fields + 1),
    )
    for row in range(len(start)):
        found.read[row] = _scan_record(data, start[row], start[row] + size[row], row, names, found, state)


@numba.njit(cache=True, nogil=True)
def gather(
    data: npt.NDArray[np.uint8], unescaped: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Offsets [n + 1] and bytes of n texts; missing ones are empty."""
    n = len(at)
    offsets = np.empty(n + 1, np.int32)
    total = 0
    for i in range(n):
        offsets[i] = total
        total += max(size[i], 0)
    offsets[n] = total
    text = np.empty(total, np.uint8)
    for i in range(n):
        to = offsets[i]
        source, first = (data, at[i]) if at[i] >= 0 else (unescaped, -1 - at[i])
        for k in range(size[i]):
            text[to + k] = source[first + k]
    return offsets, text


# Kernels below take what they need of `Names`, `Scan` and `_State`; positions are indices into `data`, -1 means "not for us".


@numba.njit(cache=True, nogil=True)
def _scan_record(data, at, end, row, names, found, state):  # type: ignore[no-untyped-def]
    at = _space(data, at, end)
    if at >= end or data[at] != 123:  # {
        return False
    at, seen = _space(data, at + 1, end), 0
    if at < end and data[at] == 125:  # }
        return False
    while True:
        name, name_end, at = _name(data, at, end, found.unescaped, state.used)
        if at < 0:
            return False
        which = _top_member(data, name, name_end)
        if which >= 0:
            if seen >> which & 1:
                return False
            seen |= 1 << which
        at = _scan_member(data, at, end, row, which, names, found, state)
        if at < 0:
            return False
        at = _space(data, at, end)
        if at >= end:
            return False
        if data[at] == 125:
            break
        if data[at] != 44:  # ,
            return False
        at = _space(data, at + 1, end)
    complete = found.kind[row] >= 0 and found.id_size[row] > 0 and seen >> _TIME & 1
    return complete and _space(data, at + 1, end) == end


@numba.njit(cache=True, nogil=True)
def _scan_member(data, at, end, row, which, names, found, state):  # type: ignore[no-untyped-def]
    """The value of a member of the event; one past it."""
    byte = data[at]
    if which == _KIND:
        stop = _string_end(data, at + 1, end)[0] if byte == 34 else -1
        if stop >= 0:
            if _equal(data, at + 1, stop, _IMPRESSION_TEXT):
                found.kind[row] = IMPRESSION
            elif _equal(data, at + 1, stop, _CLICK_TEXT):
                found.kind[row] = CLICK
            else:
                return -1
        return stop + 1 if stop >= 0 else -1
    if which == _ID:
        if byte != 34:
            return -1
        at, found.id_at[row], found.id_size[row] = _text(data, at + 1, end, found.unescaped, state.used)
        return at
    if which == _TIME:
        at, found.time[row] = _time(data, at, end)
        return at
    if which == _FEATURES and byte == 123:
        found.has_features[row] = True
        return _scan_features(data, at + 1, end, row, names, found, state)
    if which == _FEATURES:
        return _word(data, at, end, _NULL)
    if which == _PROBABILITY:
        return _scan_number(data, at, end, row, found.number.shape[1] - 1, found)
    found.unread[row] |= byte != 110  # n, of null
    return _skip(data, at, end, found.unescaped, state)


@numba.njit(cache=True, nogil=True)
def _scan_features(data, at, end, row, names, found, state):  # type: ignore[no-untyped-def]
    at = _space(data, at, end)
    if at < end and data[at] == 125:
        return at + 1
    before = len(names.number)
    while True:
        name, name_end, at = _name(data, at, end, found.unescaped, state.used)
        if at < 0:
            return -1
        field = _field(data, name, name_end, names, state.after[before])
        if field < 0:
            found.unread[row] |= data[at] != 110
            at = _skip(data, at, end, found.unescaped, state)
        elif state.seen[field] == row:
            return -1
        else:
            state.seen[field] = row
            state.after[before] = before = field
            if names.number[field] >= 0:
                at = _scan_number(data, at, end, row, names.number[field], found)
            else:
                at = _scan_category(data, at, end, row, field, found, state)
        if at < 0:
            return -1
        at = _space(data, at, end)
        if at >= end:
            return -1
        if data[at] == 125:
            return at + 1
        if data[at] != 44:
            return -1
        at = _space(data, at + 1, end)


@numba.njit(cache=True, nogil=True)
def _scan_category(data, at, end, row, field, found, state):  # type: ignore[no-untyped-def]
    byte = data[at]
    if byte == 34:
        stop, found.at[row, field], found.size[row, field] = _text(data, at + 1, end, found.unescaped, state.used)
        return stop
    if byte == 110:
        return _word(data, at, end, _NULL)
    if byte == 116:
        stop = _word(data, at, end, _TRUE)
    elif byte == 102:
        stop = _word(data, at, end, _FALSE)
    else:
        stop, integer, mantissa, exponent, digits = _number(data, at, end)
        if not integer or digits > 18 or (mantissa == 0 and byte == 45):  # -0 is 0
            return -1
    found.at[row, field], found.size[row, field] = at, stop - at
    return stop


@numba.njit(cache=True, nogil=True)
def _scan_number(data, at, end, row, column, found):  # type: ignore[no-untyped-def]
    if data[at] == 110:
        return _word(data, at, end, _NULL)
    stop, integer, mantissa, exponent, digits = _number(data, at, end)
    if stop < 0:
        return -1
    if digits <= _MOST_EXACT_DIGITS and -22 <= exponent <= 22:
        x = np.float64(mantissa)
        x = x / _EXACT_POWERS[-exponent] if exponent < 0 else x * _EXACT_POWERS[exponent]
        found.number[row, column] = -x if data[at] == 45 and not (integer and mantissa == 0) else x
    else:
        found.number_at[row, column], found.number_size[row, column] = at, stop - at
    return stop


@numba.njit(cache=True, nogil=True)
def _time(data, at, end):  # type: ignore[no-untyped-def]
    """(one past it, epoch milliseconds)."""
    if data[at] == 34:
        stop = _string_end(data, at + 1, end)[0]
        moment = _moment(data, at + 1, stop) if stop >= 0 else _NO_MOMENT
        return (stop + 1 if moment != _NO_MOMENT else -1), moment
    stop, integer, mantissa, exponent, digits = _number(data, at, end)
    if not integer or digits > 18:
        return -1, 0
    return stop, -mantissa if data[at] == 45 else mantissa


# -- which member -------------------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _top_member(data, at, end):  # type: ignore[no-untyped-def]
    for which in range(5):
        if _equal(data, at, end, _TOP[_TOP_AT[which] : _TOP_AT[which + 1]]):
            return which
    return -1


@numba.njit(cache=True, nogil=True)
def _field(data, at, end, names, guess):  # type: ignore[no-untyped-def]
    """Index of the field of this name, -1 when there is none."""
    fields = len(names.number)
    if guess < fields and _equal(data, at, end, names.text[names.at[guess] : names.at[guess + 1]]):
        return guess
    for field in range(fields):
        if _equal(data, at, end, names.text[names.at[field] : names.at[field + 1]]):
            return field
    return -1


@numba.njit(cache=True, nogil=True)
def _equal(data, at, end, word):  # type: ignore[no-untyped-def]
    if end - at != len(word):
        return False
    for k in range(len(word)):  # noqa: SIM110 - numba has no all() of a generator
        if data[at + k] != word[k]:
            return False
    return True


# -- JSON ---------------------------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _space(data, at, end):  # type: ignore[no-untyped-def]
    while at < end and (data[at] == 32 or data[at] == 10 or data[at] == 13 or data[at] == 9):
        at += 1
    return at


@numba.njit(cache=True, nogil=True)
def _word(data, at, end, word):  # type: ignore[no-untyped-def]
    return at + len(word) if at + len(word) <= end and _equal(data, at, at + len(word), word) else -1


@numba.njit(cache=True, nogil=True)
def _name(data, at, end, unescaped, used):  # type: ignore[no-untyped-def]
    """(first, one past the last) byte of a member's name, and where its value begins."""
    if at >= end or data[at] != 34:
        return 0, 0, -1
    stop, escaped = _string_end(data, at + 1, end)
    colon = _space(data, stop + 1, end)
    if stop < 0 or escaped or colon >= end or data[colon] != 58:
        return 0, 0, -1
    value = _space(data, colon + 1, end)
    return at + 1, stop, value if value < end else -1


@numba.njit(cache=True, nogil=True)
def _string_end(data, at, end):  # type: ignore[no-untyped-def]
    """Where the string ends of which `at` is the first character, and whether it has escapes, which may be none."""
    escaped = False
    while at < end:
        kind = _CLASS[data[at]]
        if kind == 0:
            at += 1
        elif kind == 2:
            length = _character(data, at, end)
            if length == 0:
                return -1, False
            at += length
        elif data[at] == 34:
            return at, escaped
        elif data[at] == 92:
            escaped = True
            at += 2
        else:
            return -1, False
    return -1, False


@numba.njit(cache=True, nogil=True)
def _character(data, at, end):  # type: ignore[no-untyped-def]
    """Bytes of the character at `at`, which is none of ASCII; 0 where it is no UTF-8 (RFC 3629: shortest form, no surrogates)."""
    first = data[at]
    length = 2 if 0xC2 <= first <= 0xDF else 3 if 0xE0 <= first <= 0xEF else 4 if 0xF0 <= first <= 0xF4 else 0
    if length == 0 or at + length > end:
        return 0
    lowest = 0xA0 if first == 0xE0 else 0x90 if first == 0xF0 else 0x80
    highest = 0x9F if first == 0xED else 0x8F if first == 0xF4 else 0xBF
    if not lowest <= data[at + 1] <= highest:
        return 0
    for k in range(2, length):
        if not 0x80 <= data[at + k] <= 0xBF:
            return 0
    return length


@numba.njit(cache=True, nogil=True)
def _text(data, at, end, unescaped, used):  # type: ignore[no-untyped-def]
    """(one past its quote, `at`, `size`) of the string of which `at` is the first character."""
    stop, escaped = _string_end(data, at, end)
    if stop < 0 or not escaped:
        return (stop + 1 if stop >= 0 else -1), at, stop - at
    first = used[0]
    last = _unescape(data, at, stop, unescaped, first)
    if last < 0:
        return -1, 0, 0
    used[0] = last
    return stop + 1, -1 - first, last - first


@numba.njit(cache=True, nogil=True)
def _unescape(data, at, end, out, to):  # type: ignore[no-untyped-def]
    """Write what the string means; one past it, -1 where it has no meaning. That is never longer than what it stands in."""
    while at < end:
        if data[at] != 92:
            out[to] = data[at]
            at, to = at + 1, to + 1
        elif data[at + 1] != 117:  # u
            if _ESCAPES[data[at + 1]] == 0:
                return -1
            out[to] = _ESCAPES[data[at + 1]]
            at, to = at + 2, to + 1
        else:
            point = _four_digits(data, at + 2, end)
            at += 6
            if 0xD800 <= point < 0xDC00 and at + 1 < end and data[at] == 92 and data[at + 1] == 117:
                low = _four_digits(data, at + 2, end)
                if 0xDC00 <= low < 0xE000:
                    point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00)
                    at += 6
            if point < 0 or 0xD800 <= point < 0xE000:
                return -1
            to = _encode(point, out, to)
    return to


@numba.njit(cache=True, nogil=True)
def _four_digits(data, at, end):  # type: ignore[no-untyped-def]
    if at + 4 > end:
        return -1
    point = 0
    for k in range(4):
        byte = data[at + k]
        if 48 <= byte <= 57:
            digit = byte - 48
        elif 97 <= byte | 32 <= 102:
            digit = (byte | 32) - 87
        else:
            return -1
        point = point << 4 | np.int64(digit)
    return point


@numba.njit(cache=True, nogil=True)
def _encode(point, out, to):  # type: ignore[no-untyped-def]
    """The character in UTF-8; one past it."""
    if point < 0x80:
        out[to] = point
        return to + 1
    length = 2 if point < 0x800 else 3 if point < 0x10000 else 4
    for k in range(length - 1, 0, -1):
        out[to + k] = 0x80 | (point & 0x3F)
        point >>= 6
    out[to] = (0xF00 >> length & 0xFF) | point
    return to + length


@numba.njit(cache=True, nogil=True)
def _number(data, at, end):  # type: ignore[no-untyped-def]
    """(one past it, whether it has neither fraction nor exponent, mantissa, exponent, significant digits): the size is mantissa *
    10^exponent where that has at most 18 digits. The sign is left to the caller."""
    first = at
    at += at < end and data[at] == 45  # -
    mantissa, exponent, digits, integer = np.int64(0), np.int64(0), 0, True
    begin = at
    while at < end and 48 <= data[at] <= 57:
        digits += digits > 0 or data[at] != 48
        if digits <= 18:
            mantissa = 10 * mantissa + (data[at] - 48)
        at += 1
    bad = at == begin or (data[begin] == 48 and at > begin + 1)
    if at < end and data[at] == 46:  # .
        integer, at = False, at + 1
        begin = at
        while at < end and 48 <= data[at] <= 57:
            digits += digits > 0 or data[at] != 48
            if digits <= 18:
                mantissa = 10 * mantissa + (data[at] - 48)
            exponent -= 1
            at += 1
        bad |= at == begin
    if at < end and data[at] | 32 == 101:  # e
        integer, at = False, at + 1
        negative = at < end and data[at] == 45
        at += at < end and (data[at] == 45 or data[at] == 43)
        begin, power = at, np.int64(0)
        while at < end and 48 <= data[at] <= 57:
            power = min(10 * power + (data[at] - 48), 100_000)
            at += 1
        bad |= at == begin
        exponent += -power if negative else power
    if bad or at - first > _MOST_DIGITS:
        return -1, False, np.int64(0), np.int64(0), 0
    return at, integer, mantissa, exponent, digits


@numba.njit(cache=True, nogil=True)
def _skip(data, at, end, unescaped, state):  # type: ignore[no-untyped-def]
    """One past the value that begins at `at`, all of which is looked at."""
    brackets, depth = state.brackets, 0
    while True:
        byte = data[at]
        if byte == 123 or byte == 91:
            if depth == len(brackets):
                return -1
            brackets[depth] = byte
            depth, at = depth + 1, _space(data, at + 1, end)
            if at < end and data[at] != byte + 2:  # } is two after {, ] two after [
                at = _name(data, at, end, unescaped, state.used)[2] if byte == 123 else at
                if at < 0:
                    return -1
                continue
            depth, at = depth - 1, at + 1
        else:
            at = _scalar(data, at, end, unescaped, state.used)
        at, depth = _next_value(data, at, end, unescaped, state, depth)
        if at < 0 or depth == 0:
            return at


@numba.njit(cache=True, nogil=True)
def _next_value(data, at, end, unescaped, state, depth):  # type: ignore[no-untyped-def]
    """Where the next value inside the open brackets begins, of which some may close before it, and how many are open then."""
    while depth > 0 and at >= 0:
        at = _space(data, at, end)
        if at >= end:
            return -1, depth
        if data[at] == state.brackets[depth - 1] + 2:
            depth, at = depth - 1, at + 1
        elif data[at] == 44:
            at = _space(data, at + 1, end)
            if state.brackets[depth - 1] == 123:
                at = _name(data, at, end, unescaped, state.used)[2]
            return (at if at < end else -1), depth
        else:
            return -1, depth
    return (at if at <= end else -1), depth


@numba.njit(cache=True, nogil=True)
def _scalar(data, at, end, unescaped, used):  # type: ignore[no-untyped-def]
    byte = data[at]
    if byte == 34:
        stop, escaped = _string_end(data, at + 1, end)
        if stop < 0 or (escaped and _unescape(data, at + 1, stop, unescaped, used[0]) < 0):
            return -1
        return stop + 1
    if byte == 116:
        return _word(data, at, end, _TRUE)
    if byte == 102:
        return _word(data, at, end, _FALSE)
    if byte == 110:
        return _word(data, at, end, _NULL)
    stop, integer, mantissa, exponent, digits = _number(data, at, end)
    return stop if digits + exponent <= _MOST_DIGITS else -1  # else it may be too large for a double


# -- RFC 3339 -----------------------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _moment(data, at, end):  # type: ignore[no-untyped-def]
    """Epoch milliseconds, rounded down, of `YYYY-MM-DD?HH:MM:SS[.f](Z|+HH:MM|-HH:MM)` with ? T or a space, from 1970 to 2099."""
    if end - at < 20 or data[at + 4] != 45 or data[at + 7] != 45 or data[at + 13] != 58 or data[at + 16] != 58:
        return _NO_MOMENT
    year = _two_digits(data, at) * 100 + _two_digits(data, at + 2)
    month, day = _two_digits(data, at + 5), _two_digits(data, at + 8)
    seconds = _clock(data, at + 11) * 60 + _two_digits(data, at + 17)
    if not (1970 <= year < 2100 and 1 <= month <= 12 and 1 <= day <= _days_of(year, month)):
        return _NO_MOMENT
    if (data[at + 10] != 84 and data[at + 10] != 32) or seconds < 0 or _two_digits(data, at + 17) > 59:
        return _NO_MOMENT
    at, thousandths, unit = at + 19, 0, 100
    if data[at] == 46:  # .
        at += 1
        begin = at
        while at < end and 48 <= data[at] <= 57:
            thousandths, unit = thousandths + unit * (data[at] - 48), unit // 10
            at += 1
        if not 1 <= at - begin <= 9:
            return _NO_MOMENT
    offset = _offset(data, at, end)
    if offset == _NO_MOMENT:
        return _NO_MOMENT
    return _day_number(year, month, day) * _DAY_MS + (seconds - 60 * offset) * 1000 + thousandths


@numba.njit(cache=True, nogil=True)
def _offset(data, at, end):  # type: ignore[no-untyped-def]
    """Minutes east of Greenwich."""
    if at + 1 == end and data[at] == 90:  # Z
        return 0
    if at + 6 != end or data[at + 3] != 58 or (data[at] != 43 and data[at] != 45):
        return _NO_MOMENT
    minutes = _clock(data, at + 1)
    if minutes < 0:
        return _NO_MOMENT
    return minutes if data[at] == 43 else -minutes


@numba.njit(cache=True, nogil=True)
def _clock(data, at):  # type: ignore[no-untyped-def]
    """Minutes since midnight at `HH:MM`, below 0 where that is none."""
    hours, minutes = _two_digits(data, at), _two_digits(data, at + 3)
    return 60 * hours + minutes if 0 <= hours < 24 and 0 <= minutes < 60 else -100_000


@numba.njit(cache=True, nogil=True)
def _two_digits(data, at):  # type: ignore[no-untyped-def]
    """Far below 0 where they are none."""
    tens, ones = np.int64(data[at]) - 48, np.int64(data[at + 1]) - 48
    return 10 * tens + ones if 0 <= tens <= 9 and 0 <= ones <= 9 else -100_000


@numba.njit(cache=True, nogil=True)
def _days_of(year, month):  # type: ignore[no-untyped-def]
    if month == 2:
        return 29 if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else 28
    return 30 if month in (4, 6, 9, 11) else 31


@numba.njit(cache=True, nogil=True)
def _day_number(year, month, day):  # type: ignore[no-untyped-def]
    """Days since 1970-01-01."""
    before = year - 1
    days = 365 * (year - 1970) + (before // 4 - before // 100 + before // 400) - 477
    for earlier in range(1, month):
        days += _days_of(year, earlier)
    return days + day - 1
