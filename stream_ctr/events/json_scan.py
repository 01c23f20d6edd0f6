"""Scan JSON event records in compiled code, and find where the value of each known member stands.

The scanner is the fast path of `json_events`. A record *passes* when the scanner vouches for every
byte of it. All other records go, one at a time, to the strict parser (`json_strict`), which reads
them or rejects them with a reason. The scanner itself rejects nothing.

**What passes.** One JSON object (RFC 8259) in valid UTF-8, with nothing but white space around it,
in which

- brackets nest at most `DEEPEST_NESTING` deep;
- no member name contains an escape;
- each known member, which is one of `TOP_MEMBERS` or a configured feature, occurs at most once, and
  its value has one of the types that the member accepts;
- no string contains an escaped surrogate, `\\ud800` to `\\udfff`;
- no number has more than 200 characters, or an exponent of more than two digits.

Most records that do not pass are bad. Some are good but unusual: a member that occurs twice, an
emoji written as a pair of escaped surrogates, a name with escapes, a very long number.

**Why both paths agree.** The strict parser accepts every record that passes, with the same result:

- *Grammar.* The scanner's grammar is that of RFC 8259 with the restrictions above.
- *Members.* A name without escapes is the name of a member if and only if their bytes are equal. No
  known member occurs twice, so it does not matter that the last one counts.
- *Values.* The scanner finds the bytes of a value and leaves their meaning to other code. Strings
  are copied; those with escapes are decoded by the strict parser's library. Integers have at most
  18 digits, so they fit in 64 bits. Numbers are converted without error (`parse_numbers`), or else
  by Arrow, which rounds correctly. A number below 10 ** (200 + 99) is always finite as a double.

tests/test_json_scan.py compares the two paths on generated records.

**The order of members.** A producer writes members in the same order in every record. So the
scanner remembers which member followed which, and compares the next name with that one first.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.events.arrow_columns import ByteSpans

DEEPEST_NESTING = 256
"""Deeper than any event. The strict parser stops at about 1000, depending on its stack."""

TOP_MEMBERS = ("kind", "impression_id", "time", "label", "features", "true_probability")
KIND, ID, TIME, LABEL, FEATURES, PROBABILITY = range(6)
FIRST_FEATURE = len(TOP_MEMBERS)

# The types of values, as bits. An INTEGER fits in 64 bits, and has the same text when it is written
# again. All other numbers are a NUMBER.
STRING = 1 << 0
INTEGER = 1 << 1
NUMBER = 1 << 2
BOOLEAN = 1 << 3
NULL = 1 << 4
OBJECT = 1 << 5
ARRAY = 1 << 6

# Any number that passes is below 10 ** (200 + 99), and so within the range of a double.
_MOST_NUMBER_CHARACTERS = 200
_MOST_EXPONENT_DIGITS = 2
_MOST_INTEGER_DIGITS = 18
_MOST_EXACT_DIGITS = 15
_MOST_EXACT_POWER = 22
_EXACT_POWERS = np.array([10.0**k for k in range(_MOST_EXACT_POWER + 1)])

TAB = ord("\t")
LINE_FEED = ord("\n")
CARRIAGE_RETURN = ord("\r")
SPACE = ord(" ")
QUOTE = ord('"')
BACKSLASH = ord("\\")
SLASH = ord("/")
COMMA = ord(",")
COLON = ord(":")
OPEN_BRACE = ord("{")
OPEN_BRACKET = ord("[")
TO_CLOSING = ord("}") - ord("{")  # from { to } as from [ to ]
MINUS = ord("-")
PLUS = ord("+")
POINT = ord(".")
DIGIT_0 = ord("0")
DIGIT_7 = ord("7")
DIGIT_9 = ord("9")
LETTER_A = ord("a")
LETTER_B = ord("b")
LETTER_D = ord("d")
LETTER_E = ord("e")
LETTER_F = ord("f")
LETTER_N = ord("n")
LETTER_R = ord("r")
LETTER_T = ord("t")
LETTER_U = ord("u")
LOWER_CASE = 0x20  # the bit that makes an ASCII letter lower case

_SHORT_ESCAPES = (QUOTE, SLASH, BACKSLASH, LETTER_B, LETTER_F, LETTER_N, LETTER_R, LETTER_T)

# The range of the bytes after the first one of a character in UTF-8 (RFC 3629).
_CONTINUATION_FIRST = 0x80
_CONTINUATION_LAST = 0xBF

# Classes of the bytes of a string.
_PLAIN = 0
_SPECIAL = 1  # the closing quote, an escape, or a control character, which no string may hold
_MULTIBYTE = 2  # the first byte of a character of several bytes, or no first byte
_BYTE_CLASS = np.zeros(256, np.uint8)
_BYTE_CLASS[:SPACE] = _SPECIAL
_BYTE_CLASS[[QUOTE, BACKSLASH]] = _SPECIAL
_BYTE_CLASS[0x80:] = _MULTIBYTE

_CONSTANTS = np.frombuffer(b"truefalsenull", np.uint8)

# Tested for as < 0, so that the compiler can drop its own checks for negative indices.
_UNKNOWN = -1  # a member that is not known
_INVALID = -1  # the position after something that does not pass


class Members(NamedTuple):
    """The M known members: those of `TOP_MEMBERS`, then the features.

    The name of member m is `names[name_ends[m] : name_ends[m + 1]]` in UTF-8. `accepted_types[m]`
    has the bits of the types that its value may have.
    """

    names: npt.NDArray[np.uint8]
    name_ends: npt.NDArray[np.int64]
    accepted_types: npt.NDArray[np.uint8]


class MemberSpans(NamedTuple):
    """Where the values of M members stand in n records.

    The value of member m in record i is `length[i, m]` bytes from `start[i, m]` on, without the
    quotes of a string. A length of -1 means that the member is null or absent. `has_unknown` marks
    records with a member of another name that is not null. `has_escapes[m]` is True when a string
    of member m contains escapes. All of this is meaningful only for records that `passed`.
    """

    start: npt.NDArray[np.int64]  # [n, M]
    length: npt.NDArray[np.int32]  # [n, M]
    passed: npt.NDArray[np.bool_]  # [n]
    has_unknown: npt.NDArray[np.bool_]  # [n]
    has_escapes: npt.NDArray[np.bool_]  # [M]

    @classmethod
    def empty(cls, n: int, members: int) -> MemberSpans:
        """Return spans for `scan` to fill."""
        return cls(
            start=np.empty((n, members), np.int64),
            length=np.full((n, members), -1, np.int32),
            passed=np.zeros(n, np.bool_),
            has_unknown=np.zeros(n, np.bool_),
            has_escapes=np.zeros(members, np.bool_),
        )


@numba.njit(cache=True, nogil=True)
def scan(records: ByteSpans, members: Members, found: MemberSpans) -> None:
    """Find the members of n records; write into `found`, which `MemberSpans.empty` made."""
    # Arrays in local variables: in a loop, Numba counts references on access to a tuple's arrays.
    data, record_start, record_size = records
    names, name_ends, accepted_types = members
    value_start, value_length, passed, has_unknown, has_escapes = found
    count = len(accepted_types)
    # `successor[m]` is the member that followed m last time. Its last two entries are the first
    # member of a record and the first feature. Until then, the order is that of `members`.
    successor = np.append(np.arange(1, count + 1), np.array([KIND, FIRST_FEATURE]))
    successor[FIRST_FEATURE - 1] = KIND
    successor[count - 1] = min(FIRST_FEATURE, count - 1)
    last_row = np.full(count, -1)  # the last row that had each member
    brackets = np.empty(DEEPEST_NESTING, np.uint8)
    for row in range(len(record_start)):
        end = record_start[row] + record_size[row]
        position = _skip_space(data, record_start[row], end)
        if position == end or data[position] != OPEN_BRACE:
            continue
        brackets[0] = OPEN_BRACE
        depth = 1
        opened = True  # the last token was an opening bracket
        top_member = _UNKNOWN  # the last member of the record itself
        previous = count  # the entry of `successor` that holds the guess for the next name
        position = _skip_space(data, position + 1, end)
        while position < end:
            # After a value come closing brackets, then a comma or the end of the record.
            if not opened or data[position] == brackets[depth - 1] + TO_CLOSING:
                while (
                    depth > 0
                    and position < end
                    and data[position] == brackets[depth - 1] + TO_CLOSING
                ):
                    depth -= 1
                    position = _skip_space(data, position + 1, end)
                if depth == 0:
                    passed[row] = position == end
                    break
                if position == end or data[position] != COMMA:
                    break
                position = _skip_space(data, position + 1, end)
                if position == end:
                    break

            # In an object, a name and a colon come before the value.
            is_known_level = depth == 1 or (depth == 2 and top_member == FEATURES)
            member = _UNKNOWN
            if brackets[depth - 1] == OPEN_BRACE:
                if data[position] != QUOTE:
                    break
                position += 1
                if is_known_level:
                    if depth == 2 and opened:
                        previous = count + 1
                    elif depth == 1 and top_member >= 0:
                        previous = top_member
                    member = successor[previous]
                if (
                    member >= 0
                    and member < count
                    and _is_name(
                        data, position, end, names, name_ends[member], name_ends[member + 1]
                    )
                ):
                    position += name_ends[member + 1] - name_ends[member]
                else:
                    start = position
                    position, escaped = _string(data, position, end)
                    if position < 0 or escaped:
                        break
                    if is_known_level:
                        first = 0 if depth == 1 else FIRST_FEATURE
                        last = FIRST_FEATURE if depth == 1 else count
                        name = data[start:position]
                        member = _find_member(name, names, name_ends, first, last, member)
                position = _skip_space(data, position + 1, end)
                if position == end or data[position] != COLON:
                    break
                position = _skip_space(data, position + 1, end)
                if position == end:
                    break

            # Then the value, or the bracket that opens it.
            opened = False
            escaped = False
            byte = data[position]
            start = position
            if byte == QUOTE:
                kind = STRING
                start = position + 1
                position, escaped = _string(data, start, end)
                length = position - start
                position += position >= 0
            elif byte == MINUS or DIGIT_0 <= byte <= DIGIT_9:
                position, kind = _number(data, position, end)
                length = position - start
            elif byte in (OPEN_BRACE, OPEN_BRACKET):
                if depth == DEEPEST_NESTING:
                    break
                kind = OBJECT if byte == OPEN_BRACE else ARRAY
                opened = True
                brackets[depth] = byte
                position += 1
                length = 0
            else:
                position, kind = _constant(data, position, end)
                length = position - start
            if position < 0:
                break

            if member >= 0:
                if not accepted_types[member] & kind or last_row[member] == row:
                    break
                last_row[member] = row
                successor[previous] = member
                previous = member
                if escaped:
                    has_escapes[member] = True
                if kind != NULL:
                    value_start[row, member] = start
                    value_length[row, member] = length
            elif is_known_level and kind != NULL:
                has_unknown[row] = True
            if depth == 1:
                top_member = member
            depth += opened
            position = _skip_space(data, position, end)


@numba.njit(cache=True, nogil=True)
def copy_texts(
    data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Copy n texts side by side. Return their offsets [n + 1] and bytes; absent ones are empty."""
    offsets = np.empty(len(start) + 1, np.int32)
    offsets[0] = 0
    for i in range(len(start)):
        offsets[i + 1] = offsets[i] + max(length[i], 0)
    text = np.empty(offsets[-1], np.uint8)
    for i in range(len(start)):
        target = offsets[i]
        source = start[i]
        for k in range(length[i]):
            text[target + k] = data[source + k]
    return offsets, text


@numba.njit(cache=True, nogil=True)
def parse_numbers(
    data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return n JSON numbers, NaN where they are absent, and which of them are not exact [n].

    Numbers of up to 15 digits and a power of ten within 22 are exact: they are the quotient or the
    product of two doubles that are exact, which is rounded correctly (W. D. Clinger, "How to read
    floating point numbers accurately", 1990). The caller must convert the others by other means.
    """
    numbers = np.full(len(start), np.nan)
    inexact = np.zeros(len(start), np.bool_)
    for i in range(len(start)):
        if length[i] < 0:
            continue
        position = start[i]
        end = position + length[i]
        negative = data[position] == MINUS
        position += negative
        mantissa = np.int64(0)
        exponent = 0
        digits = 0
        fraction = False
        while position < end and data[position] | LOWER_CASE != LETTER_E:
            if data[position] == POINT:
                fraction = True
            else:
                mantissa = 10 * mantissa + (data[position] - DIGIT_0)
                digits += mantissa > 0
                exponent -= fraction
                if digits > _MOST_EXACT_DIGITS:
                    break
            position += 1
        fraction |= position < end
        if position < end and digits <= _MOST_EXACT_DIGITS:
            power = 0
            for k in range(position + 1, end):
                if data[k] >= DIGIT_0:
                    power = 10 * power + (data[k] - DIGIT_0)
            exponent += -power if data[position + 1] == MINUS else power
        if digits > _MOST_EXACT_DIGITS or not -_MOST_EXACT_POWER <= exponent <= _MOST_EXACT_POWER:
            inexact[i] = True
            continue
        x = np.float64(mantissa)
        x = x / _EXACT_POWERS[-exponent] if exponent < 0 else x * _EXACT_POWERS[exponent]
        is_negative = negative and (fraction or mantissa > 0)  # the integer -0 is 0
        numbers[i] = -x if is_negative else x
    return numbers, inexact


@numba.njit(cache=True, nogil=True)
def parse_integers(
    data: npt.NDArray[np.uint8], start: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Return n integers of at most 18 digits, 0 where they are absent."""
    integers = np.zeros(len(start), np.int64)
    for i in range(len(start)):
        x = np.int64(0)
        negative = length[i] > 0 and data[start[i]] == MINUS
        for position in range(start[i] + negative, start[i] + length[i]):
            x = 10 * x + (data[position] - DIGIT_0)
        integers[i] = -x if negative else x
    return integers


@numba.njit(cache=True, nogil=True)
def _is_name(
    data: npt.NDArray[np.uint8],
    position: int,
    end: int,
    names: npt.NDArray[np.uint8],
    name_start: int,
    name_end: int,
) -> bool:
    """Return True when this name and a quote stand at `position`."""
    size = name_end - name_start
    if position + size >= end or data[position + size] != QUOTE:
        return False
    for k in range(size):  # noqa: SIM110 - numba has no all() of a generator
        if data[position + k] != names[name_start + k]:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _find_member(
    name: npt.NDArray[np.uint8],
    names: npt.NDArray[np.uint8],
    name_ends: npt.NDArray[np.int64],
    first: int,
    last: int,
    guess: int,
) -> int:
    """Return which of the members from `first` to before `last` has this name, or `_UNKNOWN`.

    Records leave out few members in a row, so the search begins at `guess`.
    """
    for k in range(last - first):
        member = guess + k if guess + k < last else guess + k - (last - first)
        name_start = name_ends[member]
        if name_ends[member + 1] - name_start == len(name):
            same = True
            for i in range(len(name)):
                same &= name[i] == names[name_start + i]
            if same:
                return member
    return _UNKNOWN


# Each of the functions below takes the position of a token in `data`, and returns the position
# after it, or _INVALID when the token does not pass.


@numba.njit(cache=True, nogil=True)
def _skip_space(data: npt.NDArray[np.uint8], position: int, end: int) -> int:
    while (
        position < end
        and data[position] <= SPACE
        and (
            data[position] == SPACE
            or data[position] == LINE_FEED
            or data[position] == CARRIAGE_RETURN
            or data[position] == TAB
        )
    ):
        position += 1
    return position


@numba.njit(cache=True, nogil=True)
def _string(data: npt.NDArray[np.uint8], position: int, end: int) -> tuple[int, bool]:
    """Return the position of the quote that closes a string, and whether the string has escapes.

    Unlike the others, it starts after the opening quote and stops at the closing one.
    """
    has_escapes = False
    while position < end:
        byte_class = _BYTE_CLASS[data[position]]
        if byte_class == _PLAIN:
            position += 1
        elif byte_class == _MULTIBYTE:
            size = _multibyte_size(data, position, end)
            if size == 0:
                break
            position += size
        elif data[position] == QUOTE:
            return position, has_escapes
        elif data[position] == BACKSLASH:
            size = _escape_size(data, position, end)
            if size == 0:
                break
            position += size
            has_escapes = True
        else:
            break
    return _INVALID, False


@numba.njit(cache=True, nogil=True)
def _multibyte_size(data: npt.NDArray[np.uint8], position: int, end: int) -> int:
    """Return the bytes of a character beyond ASCII, or 0 when it is not valid UTF-8.

    RFC 3629 allows only the shortest form, no surrogates, and nothing above U+10FFFF.
    """
    first = data[position]
    size = 0
    if 0xC2 <= first <= 0xDF:
        size = 2
    elif 0xE0 <= first <= 0xEF:
        size = 3
    elif 0xF0 <= first <= 0xF4:
        size = 4
    if size == 0 or position + size > end:
        return 0
    lowest = _CONTINUATION_FIRST
    highest = _CONTINUATION_LAST
    if first == 0xE0:
        lowest = 0xA0  # below: a shorter form
    elif first == 0xED:
        highest = 0x9F  # above: surrogates
    elif first == 0xF0:
        lowest = 0x90  # below: a shorter form
    elif first == 0xF4:
        highest = 0x8F  # above: beyond U+10FFFF
    if not lowest <= data[position + 1] <= highest:
        return 0
    for k in range(2, size):
        if not _CONTINUATION_FIRST <= data[position + k] <= _CONTINUATION_LAST:
            return 0
    return size


@numba.njit(cache=True, nogil=True)
def _escape_size(data: npt.NDArray[np.uint8], position: int, end: int) -> int:
    """Return the bytes of the escape, or 0 when it is not valid or a surrogate."""
    if position + 1 >= end:
        return 0
    letter = data[position + 1]
    if letter != LETTER_U:
        is_short = letter in _SHORT_ESCAPES
        return 2 if is_short else 0
    if position + 6 > end:
        return 0
    if data[position + 2] | LOWER_CASE == LETTER_D and data[position + 3] > DIGIT_7:  # d800 to dfff
        return 0
    for k in range(2, 6):
        digit = data[position + k]
        if not (DIGIT_0 <= digit <= DIGIT_9 or LETTER_A <= digit | LOWER_CASE <= LETTER_F):
            return 0
    return 6


@numba.njit(cache=True, nogil=True)
def _skip_digits(data: npt.NDArray[np.uint8], position: int, end: int) -> int:
    while position < end and DIGIT_0 <= data[position] <= DIGIT_9:
        position += 1
    return position


@numba.njit(cache=True, nogil=True)
def _number(data: npt.NDArray[np.uint8], position: int, end: int) -> tuple[int, int]:
    """Return the position after a number, and whether it is an `INTEGER` or a `NUMBER`."""
    start = position
    position += data[position] == MINUS
    digits_start = position
    position = _skip_digits(data, position, end)
    digits = position - digits_start
    leading_zero = digits > 0 and data[digits_start] == DIGIT_0
    if digits == 0 or (leading_zero and digits > 1):
        return _INVALID, NUMBER
    is_minus_zero = leading_zero and digits_start > start  # as text "-0", as an integer 0
    kind = INTEGER if digits <= _MOST_INTEGER_DIGITS and not is_minus_zero else NUMBER
    if position < end and data[position] == POINT:
        kind = NUMBER
        digits_start = position + 1
        position = _skip_digits(data, digits_start, end)
        if position == digits_start:
            return _INVALID, NUMBER
    if position < end and data[position] | LOWER_CASE == LETTER_E:
        kind = NUMBER
        digits_start = position + 1
        if digits_start < end and (data[digits_start] == MINUS or data[digits_start] == PLUS):
            digits_start += 1
        position = _skip_digits(data, digits_start, end)
        if not 1 <= position - digits_start <= _MOST_EXPONENT_DIGITS:
            return _INVALID, NUMBER
    if position - start > _MOST_NUMBER_CHARACTERS:
        return _INVALID, NUMBER
    return position, kind


@numba.njit(cache=True, nogil=True)
def _constant(data: npt.NDArray[np.uint8], position: int, end: int) -> tuple[int, int]:
    """Return the position after `true`, `false` or `null`, and its type."""
    for first, last, kind in ((0, 4, BOOLEAN), (4, 9, BOOLEAN), (9, 13, NULL)):
        if data[position] == _CONSTANTS[first]:
            if position + last - first > end:
                break
            for k in range(first, last):
                if data[position + k - first] != _CONSTANTS[k]:
                    return _INVALID, kind
            return position + last - first, kind
    return _INVALID, NULL
