"""CSV files: quoted cells, any delimiter, with or without a header.

A file is read in blocks of whole rows. The scanner finds where the rows end, because a quoted cell
may hold a newline, and Arrow parses the block. All cells are text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from stream_ctr.errors import DataError
from stream_ctr.events.times import DETECTED
from stream_ctr.logs.compression import decompressed
from stream_ctr.logs.rows import Rejected, Rows, runs_of
from stream_ctr.logs.tables import Table
from stream_ctr.logs.text_log import BYTE_ORDER_MARK, head, read_chunk, require_utf8
from stream_ctr.messages import one_line

DELIMITERS = (",", "\t", ";", "|")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""The first bytes of a file in UTF-16, as Excel writes it."""
_BLOCK_BYTES = 4 << 20
_LONGEST_ROW_BYTES = 16 << 20
_MOST_OPEN_QUOTES = 100
_SAMPLE_ROWS = 100

# States of the scanner, between two bytes.
_CELL_BEGINS = 0
_IN_CELL = 1
_IN_QUOTES = 2
_AFTER_QUOTE = 3
_QUOTE = ord('"')
_NEWLINE = ord("\n")


class CsvTable(Table):
    """The rows of a CSV file, with cells of text; a blank cell is null.

    Without a `delimiter`, it is guessed. `column_names` are those of a file without a header; a
    first row of just these names is skipped.
    """

    format = "csv"
    untyped = True

    def __init__(
        self,
        path: Path,
        *,
        name: str = "",
        delimiter: str = "",
        column_names: Sequence[str] = (),
    ) -> None:
        first = text_head(path)
        self.delimiter = delimiter or guess_delimiter(first)
        first_row = next(sample_rows(first, self.delimiter, 1), None)
        if first_row is None:
            raise DataError(f"{name or path} begins with lines that have no cell, so it is no CSV")
        names = column_names or tuple(cell.strip() for cell in first_row)
        self.has_header = list(names) == [cell.strip() for cell in first_row]
        super().__init__(path, [(name, pa.string()) for name in names], name=name)
        self._index = {column: index for index, column in enumerate(names)}
        self._columns = [str(index) for index in range(len(names))]

    def first_bytes(self) -> bytes:
        """Return the first hundred rows. They stay the same when rows are added to the file."""
        rows = sample_rows(text_head(self.path), self.delimiter, _SAMPLE_ROWS)
        return repr(list(rows)).encode()

    def batches(self, names: Sequence[str], rejected: Rejected) -> Iterator[Rows]:
        used = [self._columns[self._index[name]] for name in names] or self._columns[:1]
        for block in self._blocks(rejected):
            table, line = _parse(block, self._columns, self.delimiter, used, rejected)
            columns = table.rename_columns(list(names)) if names else table.select([])
            yield Rows(line, columns, rejected)

    def _blocks(self, rejected: Rejected) -> Iterator[_Block]:
        """Yield blocks of whole rows."""
        number = 1
        skipped_header = not self.has_header
        for data, ends in _row_blocks(self, rejected):
            block = _Block(data, ends, np.arange(number, number + len(ends)))
            number += len(ends)
            if not skipped_header:
                skipped_header = True
                block = block.without(np.array([0]))
            if len(block.ends):
                yield block


def text_head(path: Path) -> bytes:
    """Return the first bytes of a text file with the line ends of Unix.

    Raises `DataError` when the file is not UTF-8 text.
    """
    first = head(path)
    if first.startswith(UTF_16):
        raise DataError(f"{path} is UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8")
    if b"\0" in first:
        raise DataError(f"{path} is a binary file of no known format")
    if b"\r" in first and b"\n" not in first:
        raise DataError(f"{path} ends its lines with a carriage return alone; convert it to \\n")
    return first.replace(b"\r\n", b"\n")


def sample_rows(first: bytes, delimiter: str, most: int) -> Iterator[list[str]]:
    """Yield the first rows that are not blank; the last row of `first`, which may be cut, only if
    it is the only one.

    >>> list(sample_rows(b'a,"b\\nc"\\n1,2\\n3,', ",", 9))
    [['a', 'b\\nc'], ['1', '2']]
    """
    text = first.decode("utf-8", "replace")
    ends = row_ends(np.frombuffer(first, np.uint8), ord(delimiter))[0]
    if len(ends):
        text = first[: ends[-1]].decode("utf-8", "replace")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    yield from islice((row for row in rows if row), most)


def guess_delimiter(first: bytes) -> str:
    """Return the delimiter that divides most of the first rows into the same number of cells.

    >>> guess_delimiter(b"a;b,c;d\\n1;2,3;4\\n"), guess_delimiter(b"a\\n1\\n")
    (';', ',')
    """
    best = (0.0, 0, DELIMITERS[0])
    for delimiter in DELIMITERS:
        widths = [len(row) for row in sample_rows(first, delimiter, _SAMPLE_ROWS)]
        width = max(set(widths), key=widths.count, default=0)
        if width > 1:
            best = max(best, (widths.count(width) / len(widths), width, delimiter))
    return best[2]


def has_header(table: CsvTable) -> bool:
    """Return whether the first row of a table that was opened with it as a header is one.

    The names of a header are all there, all different, and neither numbers nor times.
    """
    names = next(sample_rows(text_head(table.path), table.delimiter, 1))
    if table.repeated or sum(not name.strip() for name in names) > 1:
        return False
    return not any(_is_value(name.strip()) for name in names)


def _is_value(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return DETECTED.parse(cell) is not None or DETECTED.lacks_zone(cell)
    return True


def made_names(table: CsvTable) -> tuple[str, ...]:
    """Return names for the columns of a file without a header: c1, c2, and so on."""
    width = len(next(sample_rows(text_head(table.path), table.delimiter, 1)))
    return tuple(f"c{index}" for index in range(1, width + 1))


# -- blocks --------------------------------------------------------------------------------------


class _Block:
    """n rows: their bytes, the end of each, which is behind its newline, and its number."""

    def __init__(
        self, data: bytes, ends: npt.NDArray[np.int64], number: npt.NDArray[np.int64]
    ) -> None:
        self.data = data
        self.ends = ends
        self.number = number

    def row(self, index: int) -> bytes:
        return self.data[self.ends[index - 1] if index else 0 : self.ends[index]]

    def without(self, indices: npt.NDArray[np.int64]) -> _Block:
        """Return the block without these rows."""
        kept = np.ones(len(self.ends), bool)
        kept[indices] = False
        bounds = np.append(0, self.ends)
        runs = (self.data[bounds[start] : bounds[start + n]] for start, n in runs_of(kept))
        sizes = np.diff(bounds)[kept]
        return _Block(b"".join(runs), np.cumsum(sizes), self.number[kept])


def _row_blocks(
    table: CsvTable, rejected: Rejected
) -> Iterator[tuple[bytes, npt.NDArray[np.int64]]]:
    """Yield whole rows in blocks of some megabytes, and where they end."""
    delimiter = ord(table.delimiter)
    size = max(1, table.path.stat().st_size)
    rest = b""
    rows = 0
    open_quotes = 0
    damage: OSError | None = None
    at_end = False
    with pa.OSFile(str(table.path)) as file, decompressed(file, table.path) as text:
        while not at_end:
            chunk, damage = read_chunk(text, _BLOCK_BYTES)
            at_end = damage is not None or not chunk
            if not rows and not rest:
                chunk = chunk.removeprefix(BYTE_ORDER_MARK)
            table.progress = min(1.0, file.tell() / size)
            # The end of the line may be divided between two chunks.
            data = rest + chunk
            held = b"\r" if data.endswith(b"\r") and not at_end else b""
            data = data.removesuffix(held).replace(b"\r\n", b"\n")
            if at_end and not damage and data and not data.endswith(b"\n"):
                data += b"\n"
            ends, state = row_ends(np.frombuffer(data, np.uint8), delimiter)
            whole = int(ends[-1]) if len(ends) else 0
            if len(ends):
                yield data[:whole], ends
                rows += len(ends)
            rest = data[whole:] + held
            while len(rest) > _LONGEST_ROW_BYTES or (at_end and rest and not damage):
                # The quote of the first line is never closed: the lines below may be good.
                what = "a quote is not closed" if state == _IN_QUOTES else "the row is too long"
                rejected.add(rows + 1, what)
                open_quotes += 1
                if open_quotes > _MOST_OPEN_QUOTES:
                    rejected.add(rows + 1, "the rest is not read: too many quotes are not closed")
                    return
                _, _, rest = rest.partition(b"\n")
                ends, state = row_ends(np.frombuffer(rest, np.uint8), delimiter)
                whole = int(ends[-1]) if len(ends) else 0
                # The line that was dropped keeps its number.
                yield b"\n" + rest[:whole], np.append(1, ends + 1)
                rows += 1 + len(ends)
                rest = rest[whole:]
    if damage:
        reason = f"the file is damaged here, what comes after is lost: {one_line(damage)}"
        rejected.add(rows + 1, reason)


@numba.njit(cache=True, nogil=True)
def _scan(
    data: npt.NDArray[np.uint8], delimiter: int, ends: npt.NDArray[np.int64]
) -> tuple[int, int]:
    """Write the ends of the rows into `ends`; return their number, and the state at the end."""
    state = _CELL_BEGINS
    found = 0
    for i in range(len(data)):
        c = data[i]
        if c == _QUOTE:
            if state in (_CELL_BEGINS, _AFTER_QUOTE):
                state = _IN_QUOTES
            elif state == _IN_QUOTES:
                state = _AFTER_QUOTE
        elif state != _IN_QUOTES:
            if c == delimiter:
                state = _CELL_BEGINS
            elif c == _NEWLINE:
                state = _CELL_BEGINS
                ends[found] = i + 1
                found += 1
            else:
                state = _IN_CELL
    return found, state


def row_ends(data: npt.NDArray[np.uint8], delimiter: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return the ends of the rows in `data`, behind their newlines, and the state at the end."""
    ends = np.empty(int(np.count_nonzero(data == _NEWLINE)), np.int64)
    found, state = _scan(data, delimiter, ends)
    return ends[:found], state


# -- cells ---------------------------------------------------------------------------------------


def _parse(
    block: _Block,
    columns: Sequence[str],
    delimiter: str,
    used: Sequence[str],
    rejected: Rejected,
) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Return the `used` columns of the rows that can be read, and the numbers of these rows."""
    block = _without_bad_text(block, rejected)
    if not len(block.ends):
        return pa.table({name: pa.array([], pa.string()) for name in used}), block.number
    wrong: list[int] = []

    def note_wrong(row: pa.csv.InvalidRow) -> str:
        reason = f"expected {row.expected_columns} columns, got {row.actual_columns}"
        rejected.add(int(block.number[row.number - 1]), reason)
        wrong.append(row.number - 1)
        return "skip"

    table = pa.csv.read_csv(
        pa.BufferReader(block.data),
        read_options=pa.csv.ReadOptions(
            column_names=list(columns), use_threads=False, block_size=len(block.data) + 1
        ),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter,
            newlines_in_values=True,
            ignore_empty_lines=False,
            invalid_row_handler=note_wrong,
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
            include_columns=list(used),
        ),
    )
    kept = np.ones(len(block.ends), bool)
    kept[wrong] = False
    filled = np.diff(block.ends, prepend=0) > 1
    return table.filter(pa.array(filled[kept])), block.number[kept & filled]


def _without_bad_text(block: _Block, rejected: Rejected) -> _Block:
    """Reject the rows that are not UTF-8 or contain a lone carriage return."""
    if b"\r" not in block.data:  # Arrow would read a carriage return as the end of a row
        try:
            require_utf8(block.data)
        except pa.ArrowInvalid:
            pass
        else:
            return block
    bad = []
    for index in range(len(block.ends)):
        try:
            if "\r" in block.row(index).decode("utf-8"):
                raise ValueError("a carriage return inside the row")
        except ValueError as error:
            rejected.add(int(block.number[index]), f"not text: {one_line(error)}")
            bad.append(index)
    return block.without(np.array(bad, np.int64))
