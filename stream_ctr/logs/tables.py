"""Files as tables: rows of named columns, read a batch at a time.

`Table` is the interface. Parquet and Arrow files are here, CSV in `csv_table`, JSON in
`json_table`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from stream_ctr.errors import DataError
from stream_ctr.logs.compression import codec, decompressed
from stream_ctr.logs.log import BATCH_ROWS
from stream_ctr.logs.rows import Rejected, Rows
from stream_ctr.messages import one_line

_ARROW_FILE = b"ARROW1\0\0"
_ARROW_STREAM = b"\xff\xff\xff\xff"  # the continuation marker of the first message
MAGIC: Mapping[bytes, str] = {b"PAR1": "parquet", _ARROW_FILE: "arrow", _ARROW_STREAM: "arrow"}
"""The first bytes of each binary format, and the name of the format."""


class Table:
    """Rows of named columns in a file, which can be read any number of times.

    `types` maps the name of each column to its type; None is a type that differs between rows.
    `repeated` has the names of several columns, which cannot be read. `progress` is the share of
    the file that the latest pass has read.
    """

    format: ClassVar[str]
    untyped: ClassVar[bool] = False
    """True if the file does not say what a column holds: numbers may be written as text."""
    sparse: ClassVar[bool] = False
    """True if a row may have columns that are not in `types`."""

    def __init__(
        self, path: Path, columns: Sequence[tuple[str, pa.DataType | None]], *, name: str = ""
    ) -> None:
        self.path = path
        self.name = name or str(path)
        counts = Counter(name for name, _ in columns)
        self.types = {name: kind for name, kind in columns if counts[name] == 1}
        self.repeated = frozenset(name for name, count in counts.items() if count > 1)
        self.progress = 0.0

    def batches(self, names: Sequence[str], rejected: Rejected) -> Iterator[Rows]:
        """Yield the rows with the columns `names`; rows that cannot be read go to `rejected`."""
        raise NotImplementedError

    def count_rows(self) -> int:
        """Return the number of rows, which may take a pass over the file."""
        return sum(int(rows.line[-1]) - int(rows.line[0]) + 1 for rows in self._numbered())

    def first_bytes(self) -> bytes:
        """Return bytes that tell the file from others of the same name."""
        return _ends(self.path)

    def _numbered(self) -> Iterator[Rows]:
        rejected = Rejected()
        return (rows for rows in self.batches((), rejected) if len(rows.line))


def _ends(path: Path) -> bytes:
    """Return the size of a file, and its first and last bytes, which differ between any two."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_END_BYTES)
        file.seek(max(0, size - _END_BYTES))
        return b"%d " % size + first + file.read()


_END_BYTES = 4096


class _TypedTable(Table):
    """A table of a file that knows the types of its columns."""

    def __init__(self, path: Path, *, name: str = "") -> None:
        name = name or str(path)
        if found := codec(path) if self.format == "parquet" else None:
            raise DataError(f"{name} is a Parquet file inside {found}: decompress it first")
        try:
            schema = self._schema(path)
            columns = [(column.name, column.type) for column in schema]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name} is not a {self.format} file: {one_line(error)}") from None
        super().__init__(path, columns, name=name)
        self._index = {column: index for index, (column, _) in enumerate(columns)}

    def batches(self, names: Sequence[str], rejected: Rejected) -> Iterator[Rows]:
        first = 1
        try:
            for batch in self._record_batches(names):
                line = np.arange(first, first + len(batch))
                yield Rows(line, pa.Table.from_batches([batch]), rejected).valid()
                first += len(batch)
        except (pa.ArrowException, OSError) as error:
            rejected.add(first, f"the rest cannot be read: {one_line(error)}")

    def _schema(self, path: Path) -> pa.Schema:
        raise NotImplementedError

    def _record_batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError


class ParquetTable(_TypedTable):
    """The columns of a Parquet file."""

    format = "parquet"

    def count_rows(self) -> int:
        with pa.parquet.ParquetFile(self.path) as file:
            return int(file.metadata.num_rows)

    def _schema(self, path: Path) -> pa.Schema:
        with pa.parquet.ParquetFile(path) as file:
            return file.schema_arrow

    def _record_batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with pa.parquet.ParquetFile(self.path) as file:
            rows = max(1, file.metadata.num_rows)
            rows_read = 0
            batches = file.iter_batches(
                batch_size=BATCH_ROWS, columns=list(names), use_threads=False
            )
            for batch in batches:
                rows_read += len(batch)
                self.progress = rows_read / rows
                # A name with a dot also reads members of a struct, which the selection leaves out.
                yield batch.select(list(names))


class ArrowTable(_TypedTable):
    """The columns of an Arrow IPC file or stream."""

    format = "arrow"

    def _schema(self, path: Path) -> pa.Schema:
        with pa.OSFile(str(path)) as file, decompressed(file, path) as data:
            self._skipped = len(_ARROW_FILE) * (data.read(len(_ARROW_FILE)) == _ARROW_FILE)
        with pa.OSFile(str(path)) as file, decompressed(file, path) as data:
            return self._stream(data).schema

    def _record_batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        columns = [self._index[name] for name in names]
        # A memory map would end the process if the file shrank while it is read.
        with pa.OSFile(str(self.path)) as file, decompressed(file, self.path) as data:
            size = max(1, file.size())
            for batch in self._stream(data):
                self.progress = min(1.0, file.tell() / size)
                used = batch.select(columns)
                for column in used.columns:
                    _require_sound(column)
                for start in range(0, len(batch), BATCH_ROWS):
                    yield used.slice(start, BATCH_ROWS)

    def _stream(self, data: pa.NativeFile) -> pa.RecordBatchReader:
        """Return a reader that yields one batch after another.

        An IPC file is an IPC stream between the magic `ARROW1` and a footer.
        """
        data.read(self._skipped)
        return pa.ipc.open_stream(data)


def _require_sound(column: pa.Array) -> None:
    """Raise `pa.ArrowInvalid` when an offset or index of the column points out of bounds.

    Arrow does not check these when it reads a file.
    """
    column.validate(full=True)
    if pa.types.is_dictionary(column.type):
        _require_sound(column.dictionary)
    if pa.types.is_struct(column.type):
        for index in range(column.type.num_fields):
            _require_sound(column.field(index))
