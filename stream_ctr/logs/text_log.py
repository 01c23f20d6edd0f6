"""Logs that are text, plain or compressed with gzip or Zstandard: lines, and rows of delimited cells, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from stream_ctr.errors import DataError
from stream_ctr.logs.log import Log
from stream_ctr.logs.rows import Rows
from stream_ctr.messages import one_line

_BLOCK_BYTES = 4 << 20
_PIECE_BYTES = 1 << 12
_LONGEST_LINE_BYTES = 16 << 20
_HEAD_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextLog(Log):
    """A log of lines."""

    path: Path

    def line_blocks(self) -> Iterator[tuple[int, bytes]]:
        """Whole lines, some megabytes at a time: the number of the first, and the lines, each ended by a newline."""
        size = max(1, self.path.stat().st_size)
        number, rest, skipping = 1, b"", False
        damage: OSError | None = None
        with pa.OSFile(str(self.path)) as file, _decompressed(file, self.path) as text:
            while damage is None:
                chunk, damage = _read_chunk(text, _BLOCK_BYTES)
                if not chunk:
                    break
                chunk = chunk.removeprefix(_BYTE_ORDER_MARK) if number == 1 else chunk
                self.progress = min(1.0, file.tell() / size)
                if skipping:
                    _, newline, chunk = chunk.partition(b"\n")
                    skipping, number = not newline, number + len(newline)
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                if newline:
                    yield number, whole + newline
                    number += whole.count(b"\n") + 1
                if len(rest) > _LONGEST_LINE_BYTES:
                    self.rejected.add(
                        number, f"the line is longer than {_LONGEST_LINE_BYTES >> 20} MiB"
                    )
                    rest, skipping = b"", True
        if damage:
            self.rejected.add(
                number, f"the file is damaged here, what comes after is lost: {one_line(damage)}"
            )
        elif rest:
            yield number, rest + b"\n"

    def rows(
        self,
        columns: Sequence[str],
        delimiter: str,
        *,
        header: bytes | None,
        only: Sequence[str] = (),
    ) -> Iterator[Rows]:
        """Rows of text cells, none of them quoted. A first line equal to `header` is left out. `only`: the columns wanted.

        Every line that is no row of `len(columns)` cells in UTF-8 is rejected.
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
        wrong: list[tuple[int, str]] = []

        def note_wrong(row: pa.csv.InvalidRow) -> str:
            wrong.append(
                (
                    row.number - 1,
                    f"expected {row.expected_columns} columns, got {row.actual_columns}",
                )
            )
            return "skip"

        try:
            if b"\r" in data:  # Arrow takes a lone carriage return for the end of a line
                raise pa.ArrowInvalid("carriage return")
            _require_utf8(data)
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
        except pa.ArrowInvalid:
            return self._parse(
                number, self._without_bad_text(number, data), columns, delimiter, only
            )
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        filled = np.diff(ends, prepend=-1) > 1
        for at, reason in wrong:
            self.rejected.add(number + at, reason)
        kept = np.ones(len(ends), bool)
        kept[[at for at, _ in wrong]] = False
        return Rows(
            number + np.flatnonzero(kept & filled),
            table.filter(pa.array(filled[kept])),
            self.rejected,
        )

    def _without_bad_text(self, number: int, data: bytes) -> bytes:
        lines = data.split(b"\n")
        for at, line in enumerate(lines):
            try:
                if "\r" in line.decode("utf-8"):
                    raise ValueError("a carriage return inside the line")
            except ValueError as error:
                self.rejected.add(number + at, f"no text: {error}")
                lines[at] = b""
        return b"\n".join(lines)


def _require_utf8(data: bytes) -> None:
    """Raises `pa.ArrowInvalid` where it is not. (Arrow finds out too, but complains on the terminal about rows of the wrong length.)"""
    offsets = pa.py_buffer(np.array([0, len(data)], np.int64))
    pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, offsets, pa.py_buffer(data)]
    ).cast(pa.large_string())


def _read_chunk(text: pa.NativeFile, most: int) -> tuple[bytes, OSError | None]:
    """So many bytes, in small reads: what a damaged file yields before the damage is not lost with it."""
    pieces: list[bytes] = []
    size = 0
    try:
        while size < most and (piece := text.read(min(_PIECE_BYTES, most - size))):
            pieces.append(piece)
            size += len(piece)
    except OSError as error:
        return b"".join(pieces), error
    return b"".join(pieces), None


def _decompressed(file: pa.OSFile, path: Path) -> pa.NativeFile:
    codec = _codec(_first_bytes(path, 4))
    return pa.CompressedInputStream(file, codec) if codec else file


def _codec(magic: bytes) -> str | None:
    return "gzip" if magic[:2] == b"\x1f\x8b" else "zstd" if magic == b"\x28\xb5\x2f\xfd" else None


def head(path: Path) -> bytes:
    """The first bytes of the file at `path`, decompressed where they are compressed, without byte order mark.

    Raises `DataError` when there is no such file, when it cannot be read, and when there is nothing in it.
    """
    try:
        if not path.is_file():
            raise DataError(
                f"{path} is a directory, not a log"
                if path.is_dir()
                else f"{path} does not exist or is no regular file"
            )
        with pa.OSFile(str(path)) as file, _decompressed(file, path) as text:
            first, damage = _read_chunk(text, _HEAD_BYTES)
        if damage and not first:
            raise damage
    except OSError as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from None
    if not first.removeprefix(_BYTE_ORDER_MARK).strip():
        raise DataError(f"{path} is empty")
    return first.removeprefix(_BYTE_ORDER_MARK)


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
