"""Scan Avro records in compiled code: run the program of a schema over many records.

The scan finds the value of each member of each event, and checks every byte on the way: lengths,
counts, indices of unions and enums, booleans, the UTF-8 of all texts that are read, and that a
record ends where its bytes end. A record that breaks a rule is *damaged*, with the rule's code.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.events import avro_schema as ops
from stream_ctr.events.arrow_columns import ByteSpans
from stream_ctr.events.json_scan import FIRST_FEATURE, _multibyte_size

# Tags of values, as bits.
ABSENT = 0
IS_BOOLEAN = 1 << 0
IS_INTEGER = 1 << 1
IS_NUMBER = 1 << 2
IS_TEXT = 1 << 3
IS_SYMBOL = 1 << 4
IS_OTHER = 1 << 5  # bytes, or a record, array or map

GOOD = 0
DAMAGE = (
    "",
    "the record ends within a value",
    "a number has more bytes than its type",
    "a length or count is negative or exceeds the record",
    "a union has no branch of that number",
    "an enum has no symbol of that number",
    "a boolean is neither 0 nor 1",
    "a text is not UTF-8",
    "bytes are left over after the record",
)
_SHORT, _VARINT, _LENGTH, _BRANCH, _SYMBOL, _BOOLEAN, _UTF8, _LEFT_OVER = range(1, 9)
_VARINT_BITS = 64
_MORE = 0x80
_ASCII_END = 0x80


class Values(NamedTuple):
    """The values of M members in n records.

    `tag` [n, M] is the type of each. `integer` [n, M] is an integer, a boolean, the index of a
    symbol, the start of a text, or the bits of a double; `length` [n, M] is that of a text.
    `damage` [n] is an index into `DAMAGE`. `has_unknown` [n] marks records with a value that nobody
    reads.
    """

    tag: npt.NDArray[np.uint8]
    integer: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    damage: npt.NDArray[np.uint8]
    has_unknown: npt.NDArray[np.bool_]

    @classmethod
    def empty(cls, n: int, members: int) -> Values:
        """Return values for `scan` to fill."""
        return cls(
            np.zeros((n, members), np.uint8),
            np.zeros((n, members), np.int64),
            np.zeros((n, members), np.int32),
            np.zeros(n, np.uint8),
            np.zeros(n, np.bool_),
        )


@numba.njit(cache=True, nogil=True)
def scan(  # type: ignore[no-untyped-def]
    records: ByteSpans,
    code,
    jumps,
    names,
    name_ends,
    values: Values,
) -> None:
    """Run a program over n records; write into `values`, which `Values.empty` made.

    `names` and `name_ends` are those of the fields, as in `json_scan.Members`.
    """
    data, record_start, record_size = records
    tag, integer, length, damage, has_unknown = values
    remaining = np.zeros(ops.DEEPEST_LOOPS, np.int64)
    single = np.zeros(1, np.uint32)
    double = np.zeros(1, np.float64)
    for row in range(len(record_start)):
        position = record_start[row]
        end = position + record_size[row]
        by_key = ops.UNKNOWN
        pc = 0
        fault = GOOD
        while True:
            operation = code[pc, 0]
            slot = code[pc, 1]
            if operation == ops.END:
                break
            if slot == ops.BY_KEY and operation != ops.KEY:
                slot = by_key
            kind = ABSENT
            value = np.int64(0)
            size = np.int64(0)
            target = pc + 1
            if operation == ops.BOOLEAN:
                if position >= end:
                    fault = _SHORT
                    break
                if data[position] > 1:
                    fault = _BOOLEAN
                    break
                kind = IS_BOOLEAN
                value = np.int64(data[position])
                position += 1
            elif operation == ops.FLOAT or operation == ops.DOUBLE:
                size = np.int64(4 if operation == ops.FLOAT else 8)
                if position + size > end:
                    fault = _SHORT
                    break
                bits = np.uint64(0)
                for k in range(size):
                    bits |= np.uint64(data[position + k]) << np.uint64(8 * k)
                if operation == ops.FLOAT:
                    single[0] = np.uint32(bits)
                    double[0] = single.view(np.float32)[0]
                    value = double.view(np.int64)[0]
                else:
                    value = np.int64(bits)
                kind = IS_NUMBER
                position += size
                size = np.int64(0)
            elif operation == ops.FIXED:
                size = code[pc, 2]
                if size > end - position:
                    fault = _SHORT
                    break
                kind = IS_OTHER
                position += size
                size = np.int64(0)
            elif operation == ops.NULL or operation == ops.PRESENT:
                kind = IS_OTHER if operation == ops.PRESENT else ABSENT
            elif operation == ops.JUMP:
                pc = code[pc, 2]
                continue
            elif operation == ops.ENTER:
                remaining[code[pc, 2]] = 0
                pc += 1
                continue
            elif operation == ops.LOOP and remaining[code[pc, 2]] > 0:
                remaining[code[pc, 2]] -= 1
                pc += 1
                continue
            else:
                # All others begin with a number of variable length, in zigzag coding.
                coded = np.uint64(0)
                shift = 0
                fault = _SHORT
                while position < end:
                    byte = data[position]
                    position += 1
                    if shift == _VARINT_BITS - 1 and byte > 1:
                        fault = _VARINT
                        break
                    coded |= np.uint64(byte & (_MORE - 1)) << np.uint64(shift)
                    shift += 7
                    if byte < _MORE:
                        fault = GOOD
                        break
                if fault != GOOD:
                    break
                value = np.int64(coded >> np.uint64(1)) ^ -np.int64(coded & np.uint64(1))
                if operation == ops.INTEGER:
                    kind = IS_INTEGER
                elif operation == ops.STRING or operation == ops.BYTES or operation == ops.KEY:
                    if value < 0 or value > end - position:
                        fault = _LENGTH
                        break
                    size = value
                    value = position
                    position += size
                    if operation == ops.BYTES:
                        kind = IS_OTHER
                    elif slot != ops.SKIPPED and not _is_utf8(data, value, position):
                        fault = _UTF8
                        break
                    else:
                        kind = IS_TEXT
                    if operation == ops.KEY:
                        if slot == ops.BY_KEY:
                            by_key = _field(data, value, position, names, name_ends)
                        pc += 1
                        continue
                elif operation == ops.ENUM:
                    if value < 0 or value >= code[pc, 3]:
                        fault = _SYMBOL
                        break
                    kind = IS_SYMBOL
                    value += code[pc, 2]
                elif operation == ops.UNION:
                    if value < 0 or value >= code[pc, 3]:
                        fault = _BRANCH
                        break
                    pc = jumps[code[pc, 2] + value]
                    continue
                else:  # the items that follow in a loop; if negative, their bytes follow
                    if value < 0:
                        position = _skip_varint(data, position, end)
                        value = -value
                    # Each item has a byte at least.
                    if position < 0 or value < 0 or value > end - position:
                        fault = _LENGTH
                        break
                    if value == 0:
                        pc = code[pc, 3]
                    else:
                        remaining[code[pc, 2]] = value
                    continue
            if slot >= 0:
                tag[row, slot] = kind
                integer[row, slot] = value
                length[row, slot] = size
            elif slot == ops.UNKNOWN and kind != ABSENT:
                has_unknown[row] = True
            pc = target
        if fault == GOOD and position != end:
            fault = _LEFT_OVER
        damage[row] = fault


@numba.njit(cache=True, nogil=True)
def _skip_varint(data, position, end):  # type: ignore[no-untyped-def]
    """Return the position after a number, or -1."""
    while position < end:
        position += 1
        if data[position - 1] < _MORE:
            return position
    return -1


@numba.njit(cache=True, nogil=True)
def _is_utf8(data, position, end):  # type: ignore[no-untyped-def]
    while position < end:
        if data[position] < _ASCII_END:
            position += 1
            continue
        size = _multibyte_size(data, position, end)
        if size == 0:
            return False
        position += size
    return True


@numba.njit(cache=True, nogil=True)
def _field(data, start, end, names, name_ends):  # type: ignore[no-untyped-def]
    """Return the slot of the field with this name, or UNKNOWN."""
    for index in range(len(name_ends) - 1):
        first = name_ends[index]
        if name_ends[index + 1] - first != end - start:
            continue
        same = True
        for k in range(end - start):
            same &= data[start + k] == names[first + k]
        if same:
            return FIRST_FEATURE + index
    return ops.UNKNOWN
