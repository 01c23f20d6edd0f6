"""Decompression of record batches, bounded in the size of its result.

A codec expands a batch as far as it goes: a megabyte of zstd becomes up to 30 GB, of gzip 1 GB, of
lz4 255 MB. No option of kafka-python bounds that. So the decoders here expand a batch of up to
`MAX_BATCH_BYTES` at once and raise `LargeBatch` for a larger one, whose pieces can be read one
after another. They use the libraries that kafka-python uses, whose extras `crc32c,lz4,snappy,zstd`
install them.
"""

from __future__ import annotations

import gzip
import importlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from stream_ctr.connectors.errors import KafkaCodecMissing
from stream_ctr.connectors.kafka.record_batches import (
    GZIP,
    LZ4,
    SNAPPY,
    ZSTD,
    Codecs,
    DamagedBatch,
    LargeBatch,
)

MAX_BATCH_BYTES = 128 << 20  # the most that a batch may have when it is expanded at once


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_LIBRARIES = {
    "crc32c": _library("crc32c"),
    "lz4": _library("lz4.frame"),
    "snappy": _library("snappy"),
    "zstd": _library("zstandard"),
}


def check_codecs() -> None:
    """Raise `KafkaCodecMissing` unless the libraries of all codecs are installed.

    kafka-python finds out only while it reads: it then loses good records and hangs in its next
    poll. So this runs before anything connects.
    """
    missing = ", ".join(name for name, library in _LIBRARIES.items() if library is None)
    if missing:
        raise KafkaCodecMissing(
            f"the Kafka client lacks {missing}: pip install 'kafka-python[crc32c,lz4,snappy,zstd]'"
        )


def _bounded(pieces_of: Callable[[Any], Iterator[bytes]]) -> Callable[[Any], bytes]:
    """Return the decoder that joins these pieces, up to `MAX_BATCH_BYTES`."""

    def expand(payload: Any) -> bytes:
        pieces = []
        size = 0
        for piece in pieces_of(payload):
            pieces.append(piece)
            size += len(piece)
            _check_size(size)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    return expand


def _check_size(size: int) -> None:
    if size > MAX_BATCH_BYTES:
        raise LargeBatch(f"the batch expands to more than {MAX_BATCH_BYTES >> 20} MiB")


def _zstd_pieces(payload: Any) -> Iterator[bytes]:
    decompressor = _LIBRARIES["zstd"].ZstdDecompressor()
    with decompressor.stream_reader(payload, read_across_frames=True) as reader:
        yield from iter(lambda: reader.read(_PIECE_BYTES), b"")


def _gzip_pieces(payload: Any) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=io.BytesIO(payload)) as reader:
        yield from iter(lambda: reader.read(_PIECE_BYTES), b"")


def _lz4_pieces(payload: Any) -> Iterator[bytes]:
    # The library's class for files would copy the rest of the payload for every piece.
    lz4 = _LIBRARIES["lz4"]
    context = lz4.create_decompression_context()
    rest = memoryview(payload)
    ended = False
    while not ended:
        piece, read, ended = lz4.decompress_chunk(context, rest, max_length=_PIECE_BYTES)
        if not piece and not read:
            raise EOFError("the lz4 frame is cut")
        yield piece
        rest = rest[read:]


def _snappy_pieces(payload: Any) -> Iterator[bytes]:
    if payload[: len(_XERIAL_MAGIC)] != _XERIAL_MAGIC:
        yield _snappy_block(payload)
        return
    offset = _XERIAL_HEADER_BYTES
    while offset < len(payload):
        begin = offset + _XERIAL_LENGTH_BYTES
        offset = begin + int.from_bytes(payload[offset:begin])
        yield _snappy_block(payload[begin:offset])


def _snappy_block(block: Any) -> bytes:
    size = _snappy_size(block)
    if size > _SNAPPY_MAX_RATIO * len(block):
        raise DamagedBatch(f"a snappy block of {len(block)} bytes says that it has {size}")
    expanded: bytes = _LIBRARIES["snappy"].decompress(block)
    return expanded


def _snappy_size(block: Any) -> int:
    """Return the size that a block says it expands to.

    Seven bits stand in each byte, the lowest first; the last byte has no eighth bit.

    >>> _snappy_size(bytes([0x80, 0x02, 0xFF]))
    256
    """
    size = 0
    for place, byte in enumerate(block[:_SNAPPY_SIZE_BYTES]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    return size


def _crc32c(payload: memoryview) -> int:
    checksum: int = _LIBRARIES["crc32c"].crc32c(payload)
    return checksum


_PIECE_BYTES = 1 << 18
_SNAPPY_SIZE_BYTES = 5
_SNAPPY_MAX_RATIO = 22  # three bytes stand for 64 at most

# Java's library for snappy begins with this and its version, and puts a length before each block.
_XERIAL_MAGIC = b"\x82SNAPPY\x00"
_XERIAL_HEADER_BYTES = 16
_XERIAL_LENGTH_BYTES = 4

_PIECES = {GZIP: _gzip_pieces, SNAPPY: _snappy_pieces, LZ4: _lz4_pieces, ZSTD: _zstd_pieces}

CODECS = Codecs(
    _crc32c,
    expand={codec: _bounded(pieces_of) for codec, pieces_of in _PIECES.items()},
    pieces=_PIECES,
)
