"""A scanner of JSON: where the members of events stand, found in compiled code. What they mean is for `json_events` to say.

It passes no record that a strict parser would refuse. What it does not vouch for it leaves to that parser: what is no JSON, members that
are there twice or of a type that they may not have, names with escapes, surrogates, numbers longer than any that somebody measured.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

DEEPEST_NESTING = 256
"""Deeper than any event. The strict parser stops at about a thousand, depending on the stack it stands on."""
KIND, ID, TIME, FEATURES, PROBABILITY = range(5)
TOP = ("kind", "impression_id", "time", "features", "true_probability")
STRING, INTEGER, NUMBER, BOOLEAN, NULL, OBJECT, ARRAY = (1 << bit for bit in range(7))

# So no number that passes is beyond a double: below 10 ^ (200 + 99).
_LONGEST_NUMBER, _LONGEST_EXPONENT = 200, 2
_MOST_INTEGER_DIGITS = 18
_MOST_EXACT_DIGITS = 15
_EXACT_POWERS = np.array([10.0**k for k in range(23)])

_CONSTANTS = np.frombuffer(b"truefalsenull", np.uint8)

# What a byte of a string is: 0 itself, 1 the end of it, an escape, or no character at all, 2 the beginning of several bytes.
_CLASS = np.zeros(256, np.uint8)
_CLASS[:0x20] = _CLASS[[ord('"'), ord("\\")]] = 1
_CLASS[0x80:] = 2


@numba.njit(cache=True, nogil=True)
def scan(
    data: npt.NDArray[np.uint8],
    start: npt.NDArray[np.int64],
    size: npt.NDArray[np.int64],
    names: npt.NDArray[np.uint8],
    ends: npt.NDArray[np.int64],
    accepts: npt.NDArray[np.uint8],
    at: npt.NDArray[np.int64],
    length: npt.NDArray[np.int32],
    passed: npt.NDArray[np.bool_],
    unread: npt.NDArray[np.bool_],
    escaped: npt.NDArray[np.bool_],
) -> None:
    """Find the members of n records, of which row i is `size[i]` bytes from `start[i]` on.

    There are M members: those of `TOP`, then those of the features. Of each `names[ends[m]:ends[m + 1]]` is its name in UTF-8, and
    `accepts[m]` the types that its value may have, as bits. Written are `at` and `length` [n, M], of strings without their quotes (a length
    of -1: null or not there), `passed` [n], `unread` [n]: has a member of another name that is not null, and `escaped` [M]: one of
    the strings has escapes.
    """
    members = len(accepts)
    seen = np.full(members, -1)  # the last row that had it
    after = np.append(
        np.arange(1, members + 1), np.array([0, 5])
    )  # which member came after which, last time; the first of each object
    after[4], after[members - 1] = 0, min(5, members - 1)
    brackets = np.empty(DEEPEST_NESTING, np.uint8)
    for row in range(len(start)):
        end = start[row] + size[row]
        here = _space(data, start[row], end)
        if here == end or data[here] != 123:  # {
            continue
        brackets[0] = 123
        depth, opened, outer, before = 1, True, -1, members
        here = _space(data, here + 1, end)
        while here < end:
            if (
                not opened or data[here] == brackets[depth - 1] + 2
            ):  # } is two after {, ] two after [
                while depth > 0 and here < end and data[here] == brackets[depth - 1] + 2:
                    depth -= 1
                    here = _space(data, here + 1, end)
                if depth == 0:
                    passed[row] = here == end
                    break
                if here == end or data[here] != 44:  # ,
                    break
                here = _space(data, here + 1, end)
                if here == end:
                    break
            member, known = -1, depth == 1 or (depth == 2 and outer == 3)
            if brackets[depth - 1] == 123:
                if data[here] != 34:  # "
                    break
                here += 1
                if known:
                    if opened and depth == 2:
                        before = members + 1
                    elif depth == 1 and outer >= 0:
                        before = outer
                    member = after[before]
                if (
                    member >= 0
                    and member < members
                    and _begins(data, here, end, names, ends[member], ends[member + 1])
                ):
                    here += ends[member + 1] - ends[member]
                else:
                    first = here
                    here, escape = _string(data, here, end)
                    if here < 0 or escape:
                        break
                    low, high = (0, 5) if depth == 1 else (5, members)
                    member = (
                        _member(data, first, here, names, ends, low, high, member) if known else -1
                    )
                here = _space(data, here + 1, end)
                if here == end or data[here] != 58:  # :
                    break
                here = _space(data, here + 1, end)
                if here == end:
                    break
            opened = False
            byte, first = data[here], here
            if byte == 34:
                kind, first = STRING, here + 1
                here, escape = _string(data, first, end)
                if here < 0:
                    break
                last = here
                here += 1
                if escape and member >= 0:
                    escaped[member] = True
            elif byte == 45 or 48 <= byte <= 57:
                here, kind = _number(data, here, end)
                last = here
            elif byte == 123 or byte == 91:
                if depth == DEEPEST_NESTING:
                    break
                kind, opened = OBJECT if byte == 123 else ARRAY, True
                brackets[depth] = byte
                here, last = here + 1, here
            else:
                here, kind = _constant(data, here, end)
                last = here
            if here < 0:
                break
            if member >= 0:
                if not accepts[member] & kind or seen[member] == row:
                    break
                seen[member] = row
                after[before] = member
                before = member
                if kind != NULL:
                    at[row, member], length[row, member] = first, last - first
            elif known and kind != NULL:
                unread[row] = True
            if depth == 1:
                outer = member
            depth += opened
            here = _space(data, here, end)


@numba.njit(cache=True, nogil=True)
def texts(
    data: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Offsets [n + 1] and bytes of n texts; missing ones are empty."""
    offsets = np.empty(len(at) + 1, np.int32)
    offsets[0] = 0
    for i in range(len(at)):
        offsets[i + 1] = offsets[i] + max(length[i], 0)
    text = np.empty(offsets[-1], np.uint8)
    for i in range(len(at)):
        to, first = offsets[i], at[i]
        for k in range(length[i]):
            text[to + k] = data[first + k]
    return offsets, text


@numba.njit(cache=True, nogil=True)
def numbers(
    data: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """n JSON numbers, NaN where they are missing, and where they are not exact [n].

    Exact are those of up to 15 digits and a moderate size: they are the quotient or product of two doubles that are exact, which is rounded
    correctly (W. D. Clinger, "How to read floating point numbers accurately", 1990).
    """
    found, inexact = np.full(len(at), np.nan), np.zeros(len(at), np.bool_)
    for i in range(len(at)):
        if length[i] < 0:
            continue
        here, end = at[i], at[i] + length[i]
        negative = data[here] == 45
        here += negative
        mantissa, exponent, digits, fraction = np.int64(0), 0, 0, False
        while here < end and data[here] | 32 != 101:  # e
            if data[here] == 46:  # .
                fraction = True
            else:
                mantissa = 10 * mantissa + (data[here] - 48)
                digits += mantissa > 0
                exponent -= fraction
                if digits > _MOST_EXACT_DIGITS:
                    break
            here += 1
        fraction |= here < end
        if here < end and digits <= _MOST_EXACT_DIGITS:
            minus, power = data[here + 1] == 45, 0
            for k in range(here + 1, end):
                if data[k] >= 48:
                    power = 10 * power + (data[k] - 48)
            exponent += -power if minus else power
        if digits > _MOST_EXACT_DIGITS or not -22 <= exponent <= 22:
            inexact[i] = True
            continue
        x = np.float64(mantissa)
        x = x / _EXACT_POWERS[-exponent] if exponent < 0 else x * _EXACT_POWERS[exponent]
        found[i] = -x if negative and (fraction or mantissa > 0) else x  # the integer -0 is 0
    return found, inexact


@numba.njit(cache=True, nogil=True)
def integers(
    data: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """n integers of at most 18 digits; 0 where they are missing."""
    found = np.zeros(len(at), np.int64)
    for i in range(len(at)):
        x, negative = np.int64(0), length[i] > 0 and data[at[i]] == 45
        for here in range(at[i] + negative, at[i] + length[i]):
            x = 10 * x + (data[here] - 48)
        found[i] = -x if negative else x
    return found


# Each of these takes a position in `data` and gives the one after what it has passed, or -1.


@numba.njit(cache=True, nogil=True)
def _space(data: npt.NDArray[np.uint8], here: int, end: int) -> int:
    while (
        here < end
        and data[here] <= 32
        and (data[here] == 32 or data[here] == 10 or data[here] == 13 or data[here] == 9)
    ):
        here += 1
    return here


@numba.njit(cache=True, nogil=True)
def _begins(
    data: npt.NDArray[np.uint8],
    here: int,
    end: int,
    names: npt.NDArray[np.uint8],
    first: int,
    last: int,
) -> bool:
    """Whether this name stands here, and ends there."""
    size = last - first
    if here + size >= end or data[here + size] != 34:
        return False
    for k in range(size):  # noqa: SIM110 - numba has no all() of a generator
        if data[here + k] != names[first + k]:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _member(
    data: npt.NDArray[np.uint8],
    first: int,
    end: int,
    names: npt.NDArray[np.uint8],
    ends: npt.NDArray[np.int64],
    low: int,
    high: int,
    guess: int,
) -> int:
    """Which of the members from `low` to `high` has this name, -1: none. Names that are not there were left out: it is near the guess."""
    for k in range(high - low):
        member = guess + k if guess + k < high else guess + k - (high - low)
        if ends[member + 1] - ends[member] == end - first and _begins(
            data, first, end + 1, names, ends[member], ends[member + 1]
        ):
            return member
    return -1


@numba.njit(cache=True, nogil=True)
def _string(data: npt.NDArray[np.uint8], here: int, end: int) -> tuple[int, bool]:
    """Where the quote is that ends it, and whether it has escapes."""
    escape = False
    while here < end:
        kind = _CLASS[data[here]]
        if kind == 0:
            here += 1
        elif kind == 2:
            size = _character(data, here, end)
            if size == 0:
                break
            here += size
        elif data[here] == 34:
            return here, escape
        elif data[here] == 92:
            size = _escape(data, here, end)
            if size == 0:
                break
            here, escape = here + size, True
        else:
            break
    return -1, False


@numba.njit(cache=True, nogil=True)
def _character(data: npt.NDArray[np.uint8], here: int, end: int) -> int:
    """Bytes of the character here, which is none of ASCII; 0 where it is no UTF-8 (RFC 3629: shortest form, no surrogates)."""
    first = data[here]
    size = (
        2
        if 0xC2 <= first <= 0xDF
        else 3
        if 0xE0 <= first <= 0xEF
        else 4
        if 0xF0 <= first <= 0xF4
        else 0
    )
    if size == 0 or here + size > end:
        return 0
    lowest = 0xA0 if first == 0xE0 else 0x90 if first == 0xF0 else 0x80
    highest = 0x9F if first == 0xED else 0x8F if first == 0xF4 else 0xBF
    if not lowest <= data[here + 1] <= highest:
        return 0
    for k in range(2, size):
        if not 0x80 <= data[here + k] <= 0xBF:
            return 0
    return size


@numba.njit(cache=True, nogil=True)
def _escape(data: npt.NDArray[np.uint8], here: int, end: int) -> int:
    """Bytes of the escape here; 0 where it is none, or half of a pair."""
    if here + 1 >= end:
        return 0
    letter = data[here + 1]
    if letter != 117:  # u
        return 2 if letter in (34, 47, 92, 98, 102, 110, 114, 116) else 0  # " / \ b f n r t
    if here + 6 > end or (data[here + 2] | 32 == 100 and data[here + 3] > 55):  # d800 to dfff
        return 0
    for k in range(2, 6):
        byte = data[here + k]
        if not (48 <= byte <= 57 or 97 <= byte | 32 <= 102):
            return 0
    return 6


@numba.njit(cache=True, nogil=True)
def _digits(data: npt.NDArray[np.uint8], here: int, end: int) -> int:
    while here < end and 48 <= data[here] <= 57:
        here += 1
    return here


@numba.njit(cache=True, nogil=True)
def _number(data: npt.NDArray[np.uint8], here: int, end: int) -> tuple[int, int]:
    """What comes after the number here, and whether it is an `INTEGER` (one that text and 64 bits hold alike) or any `NUMBER`."""
    first = here
    here += data[here] == 45  # -
    begin = here
    here = _digits(data, here, end)
    digits = here - begin
    if digits == 0 or (data[begin] == 48 and digits > 1):
        return -1, NUMBER
    integer = digits <= _MOST_INTEGER_DIGITS and (begin == first or data[begin] != 48)  # -0 is 0
    if here < end and data[here] == 46:  # .
        integer, begin = False, here + 1
        here = _digits(data, begin, end)
        if here == begin:
            return -1, NUMBER
    if here < end and data[here] | 32 == 101:  # e
        integer, begin = False, here + 1
        begin += begin < end and (data[begin] == 45 or data[begin] == 43)
        here = _digits(data, begin, end)
        if not 1 <= here - begin <= _LONGEST_EXPONENT:
            return -1, NUMBER
    return (here if here - first <= _LONGEST_NUMBER else -1), (INTEGER if integer else NUMBER)


@numba.njit(cache=True, nogil=True)
def _constant(data: npt.NDArray[np.uint8], here: int, end: int) -> tuple[int, int]:
    for first, last, kind in ((0, 4, BOOLEAN), (4, 9, BOOLEAN), (9, 13, NULL)):
        if data[here] == _CONSTANTS[first]:
            if here + last - first > end:
                break
            for k in range(first, last):
                if data[here + k - first] != _CONSTANTS[k]:
                    return -1, kind
            return here + last - first, kind
    return -1, NULL
