"""Mutations of bytes that programs read: numbers at their limits, cut, doubled and joined parts."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

MOST_BYTES = 1 << 18
_MOST_STEPS = 6
_NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 1000, 4096),
    *(1 << 15, 1 << 16, (1 << 20) + 1, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 32),
    *(1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63), 1_735_689_600_000),
]
_FORMATS = ["<b", "<h", "<i", "<q", ">h", ">i", ">q"]
TOKENS = [
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\r\n", b"\t", b"\0", b" ", b"-"),
    *(b"\x80", b"\xff\xff\xff\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"0.5", b"1e-400", b"1e30"),
    *(b"9" * 30, b"9" * 400, b"9" * 4301, b"[" * 300, b'{"":' * 300),
    *(b'"\\ud800"', b'"\\u0000"', b'"2025-01-01T00:00:00Z"', b'"x":{"y":[1]},'),
    *("\u202e\u00e9\U0001f600".encode(), b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"),
]


class Mutations:
    """Bytes without end: mutations of those in `pool`, which the caller may extend.

    >>> mutations = Mutations([b"abc"], seed=1)
    >>> len({mutations.next() for _ in range(100)}) > 50
    True
    """

    def __init__(self, pool: Sequence[bytes], *, seed: int, tokens: Sequence[bytes] = ()) -> None:
        self.pool = list(pool)
        self._random = random.Random(seed)
        self._tokens = [*TOKENS, *tokens]

    def next(self) -> bytes:
        """Return the next bytes."""
        choose = self._random
        data = choose.choice(self.pool)
        for _ in range(choose.randint(1, _MOST_STEPS)):
            data = choose.choice(_STEPS)(self, data)[:MOST_BYTES]
        return data

    def _span(self, data: bytes) -> tuple[int, int]:
        """Return where a part begins and ends, short ones more often."""
        start = self._random.randrange(len(data) + 1)
        return start, start + int(self._random.random() ** 4 * (len(data) - start + 1))

    def flip(self, data: bytes) -> bytes:
        if not data:
            return data
        index = self._random.randrange(len(data))
        return (
            data[:index] + bytes([data[index] ^ 1 << self._random.randrange(8)]) + data[index:][1:]
        )

    def number(self, data: bytes) -> bytes:
        """Write a number over the bytes at some place, most often an aligned one."""
        format = self._random.choice(_FORMATS)
        size = struct.calcsize(format)
        start = self._random.randrange(len(data) + 1)
        if self._random.random() < 0.8:
            start -= start % size
        number = self._random.choice(_NUMBERS)
        if start + size <= len(data) and self._random.random() < 0.4:
            (found,) = struct.unpack_from(format, data, start)
            number = found + self._random.choice([-8, -1, 1, 8])
        written = (number % (1 << 8 * size)).to_bytes(size, "big" if format[0] == ">" else "little")
        return data[:start] + written + data[start + size :]

    def token(self, data: bytes) -> bytes:
        start, end = self._span(data)
        end = self._random.choice([start, end])
        return data[:start] + self._random.choice(self._tokens) + data[end:]

    def drop(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:start] + data[end:]

    def double(self, data: bytes) -> bytes:
        start, end = self._span(data)
        times = self._random.choice([2, 2, 2, 3, 10, 1000])
        return data[:start] + data[start:end] * times + data[end:]

    def move(self, data: bytes) -> bytes:
        start, end = self._span(data)
        to, _ = self._span(data)
        return data[:to] + data[start:end] + data[to + end - start :]

    def join(self, data: bytes) -> bytes:
        """Continue with the rest of other bytes."""
        other = self._random.choice(self.pool)
        start, _ = self._span(data)
        rest, _ = self._span(other)
        return data[:start] + other[rest:]


_STEPS = [
    *(Mutations.flip, Mutations.number, Mutations.number, Mutations.token),
    *(Mutations.drop, Mutations.double, Mutations.move, Mutations.join),
]
