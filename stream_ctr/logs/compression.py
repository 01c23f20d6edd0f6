"""Compressed files: gzip, Zstandard, bzip2, LZ4 and xz, told by their first bytes."""

from __future__ import annotations

import io
import lzma
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

_MAGIC: Mapping[bytes, str] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xfd7zXZ\x00": "xz",
}
_LONGEST_MAGIC = max(map(len, _MAGIC))
# The old format of LZMA has no magic, and any bytes may begin it.
_SUFFIXES: Mapping[str, str] = {".lzma": "xz"}


def decompressed(file: pa.OSFile, path: Path) -> pa.NativeFile:
    """Return the decompressed bytes of `file`, which is open at its beginning.

    Reading raises `OSError` where the file is damaged.
    """
    found = codec(path)
    if found == "xz":
        return pa.PythonFile(_XzStream(file), mode="r")
    return pa.CompressedInputStream(file, found) if found else file


def codec(path: Path) -> str | None:
    """Return the name of the codec that compressed the file at `path`, or None."""
    with path.open("rb") as file:
        first = file.read(_LONGEST_MAGIC)
    for magic, name in _MAGIC.items():
        if first.startswith(magic):
            return name
    return _SUFFIXES.get(path.suffix.lower())


def stem(name: str) -> str:
    """Return the name of a file without the suffix of its compression.

    >>> stem("day.csv.gz"), stem("day.csv")
    ('day.csv', 'day.csv')
    """
    suffix = Path(name).suffix.lower()
    known = {".gz", ".zst", ".bz2", ".lz4", ".xz", *_SUFFIXES}
    return name.removesuffix(name[-len(suffix) :]) if suffix in known else name


class _XzStream(io.RawIOBase):
    """The decompressed bytes of an xz file. `OSError` is its only error."""

    def __init__(self, file: pa.OSFile) -> None:
        self._file = lzma.LZMAFile(file)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except (lzma.LZMAError, EOFError) as error:
            raise OSError(f"xz: {error}") from None
