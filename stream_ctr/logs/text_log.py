"""Text logs, plain or compressed, read in bounded memory.

`TextLog` reads a file as blocks of whole lines, or as rows of delimited cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from stream_ctr.errors import DataError
from stream_ctr.logs.compression import decompressed
from stream_ctr.logs.log import Log
from stream_ctr.logs.rows import Rejected, Rows
from stream_ctr.messages import one_line

_BLOCK_BYTES = 4 << 20
_PIECE_BYTES = 1 << 12
_LONGEST_LINE_BYTES = 16 << 20
_HEAD_BYTES = 1 << 16
_NEWLINE = ord("\n")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextLog(Log):
    """A log of lines."""

    path: Path

    def line_blocks(self) -> Iterator[tuple[int, bytes]]:
        """Yield whole lines in blocks of some megabytes: (number of the first line, lines).

        Every line ends with a newline, also the last one of the file. A line that is longer than
        16 MiB is rejected. Damage in a compressed file ends the pass and is rejected as a line.
        """
        size = max(1, self.path.stat().st_size)
        number = 1
        rest = b""
        skipping = False  # inside a line that is too long
        damage: OSError | None = None
        with pa.OSFile(str(self.path)) as file, decompressed(file, self.path) as text:
            while damage is None:
                chunk, damage = read_chunk(text, _BLOCK_BYTES)
                if not chunk:
                    break
                if number == 1:
                    chunk = chunk.removeprefix(BYTE_ORDER_MARK)
                chunk = self.as_lines(chunk)
                self.progress = min(1.0, file.tell() / size)
                if skipping:
                    _, newline, chunk = chunk.partition(b"\n")
                    skipping = not newline
                    number += len(newline)
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                if newline:
                    yield number, whole + newline
                    number += whole.count(b"\n") + 1
                if len(rest) > _LONGEST_LINE_BYTES:
                    longest = f"{_LONGEST_LINE_BYTES >> 20} MiB"
                    self.rejected.add(number, f"the line is longer than {longest}")
                    rest = b""
                    skipping = True
        if damage:
            reason = f"the file is damaged here, what comes after is lost: {one_line(damage)}"
            self.rejected.add(number, reason)
        elif rest:
            yield number, rest + b"\n"

    def as_lines(self, chunk: bytes) -> bytes:
        """Return the next decompressed bytes of the file as lines."""
        return chunk

    def count_lines(self) -> int:
        """Return the number of lines; it takes a pass over the file."""
        count = sum(data.count(b"\n") for _, data in self.line_blocks())
        self.rejected = Rejected()  # the next pass finds the same lines
        return count

    def rows(
        self,
        columns: Sequence[str],
        delimiter: str,
        *,
        header: bytes | None,
        only: Sequence[str] = (),
    ) -> Iterator[Rows]:
        """Yield the rows of the file, with text cells that are never quoted.

        A first line equal to `header` is skipped. `only` names the columns to read; empty means
        all. A line that is not `len(columns)` cells of UTF-8 text is rejected.
        """
        for number, data in self.line_blocks():
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n")
            if number == 1 and header is not None and data.partition(b"\n")[0] == header:
                data = data[len(header) :]
            yield self._parse(number, data, columns, delimiter, only)

    def _parse(
        self, number: int, data: bytes, columns: Sequence[str], delimiter: str, only: Sequence[str]
    ) -> Rows:
        try:
            table, wrong = _read_csv(data, columns, delimiter, only)
        except pa.ArrowInvalid:
            data = self._without_bad_text(number, data)
            return self._parse(number, data, columns, delimiter, only)
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE)
        filled = np.diff(ends, prepend=-1) > 1
        kept = np.ones(len(ends), bool)
        for index, reason in wrong:
            self.rejected.add(number + index, reason)
            kept[index] = False
        lines = number + np.flatnonzero(kept & filled)
        return Rows(lines, table.filter(pa.array(filled[kept])), self.rejected)

    def _without_bad_text(self, number: int, data: bytes) -> bytes:
        """Reject the lines that are not UTF-8 or contain a carriage return, and blank them out."""
        lines = data.split(b"\n")
        for index, line in enumerate(lines):
            try:
                if "\r" in line.decode("utf-8"):
                    raise ValueError("a carriage return inside the line")
            except ValueError as error:
                self.rejected.add(number + index, f"not text: {error}")
                lines[index] = b""
        return b"\n".join(lines)


def _read_csv(
    data: bytes, columns: Sequence[str], delimiter: str, only: Sequence[str]
) -> tuple[pa.Table, list[tuple[int, str]]]:
    """Return the rows with the right number of cells, and (line index, reason) of the others.

    A blank line is a row of nulls. Raises `pa.ArrowInvalid` when `data` is not UTF-8 or contains a
    carriage return.
    """
    if b"\r" in data:  # Arrow would read a lone carriage return as the end of a line
        raise pa.ArrowInvalid("carriage return")
    require_utf8(data)
    wrong: list[tuple[int, str]] = []

    def note_wrong(row: pa.csv.InvalidRow) -> str:
        reason = f"expected {row.expected_columns} columns, got {row.actual_columns}"
        wrong.append((row.number - 1, reason))
        return "skip"

    table = pa.csv.read_csv(
        pa.BufferReader(data),
        read_options=pa.csv.ReadOptions(
            column_names=list(columns), use_threads=False, block_size=len(data) + 1
        ),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter,
            quote_char=False,
            ignore_empty_lines=False,
            invalid_row_handler=note_wrong,
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
            include_columns=list(only) or None,
        ),
    )
    return table, wrong


def require_utf8(data: bytes) -> None:
    """Raise `pa.ArrowInvalid` when `data` is not UTF-8.

    Arrow's CSV reader checks this too, but it prints warnings about rows of the wrong length.
    """
    offsets = pa.py_buffer(np.array([0, len(data)], np.int64))
    text = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, offsets, pa.py_buffer(data)]
    )
    text.cast(pa.large_string())


def read_chunk(text: pa.NativeFile, most: int) -> tuple[bytes, OSError | None]:
    """Return up to `most` bytes, and the error when the file is damaged.

    The bytes are read in small pieces, so that those before the damage are not lost with it.
    """
    pieces: list[bytes] = []
    size = 0
    try:
        while size < most and (piece := text.read(min(_PIECE_BYTES, most - size))):
            pieces.append(piece)
            size += len(piece)
    except OSError as error:
        return b"".join(pieces), error
    return b"".join(pieces), None


def head(path: Path) -> bytes:
    """Return the first bytes of the file at `path`, decompressed, without a byte order mark.

    Raises `DataError` when the file does not exist, cannot be read, or is empty.
    """
    try:
        _require_file(path)
        with pa.OSFile(str(path)) as file, decompressed(file, path) as text:
            first, damage = read_chunk(text, _HEAD_BYTES)
        if damage and not first:
            raise damage
    except OSError as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from None
    first = first.removeprefix(BYTE_ORDER_MARK)
    if not first.strip():
        raise DataError(f"{path} is empty")
    return first


def _require_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise DataError(f"{path} is a directory, not a log")
    raise DataError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}")
