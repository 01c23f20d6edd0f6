"""What is fuzzed: each target reads any bytes, and says what became of them.

A target returns a short text, its outcome. What it must not do fails an assertion, and any other
exception is a failure as well. `TARGETS` has them by name. Their seeds are in `seeds/NAME`; inputs
that failed once are kept there too, so that they are tried in every run.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from click.testing import CliRunner
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import calc_crc32c
from support.avro import EVENT, KnownSchemas
from support.event_records import EVENTS, FIELDS, GOOD, as_values
from support.fuzzing import StrictDecoder
from support.served import write_served

from stream_ctr.cli.main import main
from stream_ctr.connectors.kafka import codecs
from stream_ctr.connectors.kafka.record_batches import (
    FORMAT,
    Columns,
    DamagedBatch,
    StoredBatches,
)
from stream_ctr.connectors.record_schemas import Schema
from stream_ctr.errors import SnapshotError
from stream_ctr.events.decoder import Decoder, Events, Rejections
from stream_ctr.events.features import Hasher, hash_ids
from stream_ctr.events.infer import feature_names, impression_counts
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import seal
from stream_ctr.snapshots.pointer import decode_pointer, encode_pointer, pointer_for
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber

SEEDS = Path(__file__).parent / "seeds"
LONGEST_MESSAGE = 300
LONGEST_SNAPSHOT_MESSAGE = 1000

HASHER = Hasher(FIELDS, table_bits=12)


@dataclass(frozen=True)
class Target:
    """Something that reads bytes. `start` returns what checks an input, in an empty directory."""

    name: str
    start: Callable[[Path], Callable[[bytes], str]]
    more_seeds: Callable[[], Sequence[bytes]] = field(default=tuple)
    tokens: Sequence[bytes] = ()

    def seeds(self) -> list[bytes]:
        """Return the seeds that are kept, and those that are made."""
        kept = [path.read_bytes() for path in sorted((SEEDS / self.name).iterdir())]
        return [*kept, *self.more_seeds()]


# -- records -------------------------------------------------------------------------------------


def checked_decode(decoder: Decoder, data: bytes) -> tuple[Events, str]:
    """Decode a record between two good ones; return the events of all, and the outcome of its own.

    The others are read as if it were not there. What was read can be hashed.
    """
    values = pa.array([GOOD, data, EVENTS[3]], pa.large_binary())
    events, rejections = decoder.decode(values)
    rows = [*(row for kind in events.kinds for row in kind.row.tolist()), *rejections.row.tolist()]
    assert sorted(row for row in rows if row != 1) == [0, 2]
    assert rejections.row.tolist() == [1] * len(rejections)
    for kind in events.kinds:
        hash_ids(kind.impression_id)
        kind.impression_id.validate(full=True)
        for column in getattr(kind, "features", {}).values():
            column.validate(full=True)
        if hasattr(kind, "features"):
            ids, _ = HASHER.rows(kind.features)
            assert len(ids) == len(kind)
    assert_explained(rejections)
    feature_names(values)
    impression_counts(values)
    return events, " ".join(sorted({*rejections.reason})) or "read"


def assert_explained(rejections: Rejections) -> None:
    for reason, message in zip(rejections.reason, rejections.message, strict=True):
        assert reason != "undecodable", message
        assert message.isprintable(), message
        assert len(message) < LONGEST_MESSAGE, message


def arrow(_: Path) -> Callable[[bytes], str]:
    decoder = Decoder(FIELDS)
    return lambda data: checked_decode(decoder, data)[1]


def as_json(_: Path) -> Callable[[bytes], str]:
    """The scanner and the strict parser read any record alike."""
    decoder, strict = Decoder(FIELDS), StrictDecoder(FIELDS)

    def check(data: bytes) -> str:
        _, outcome = checked_decode(decoder, data)
        values = pa.array([data], pa.large_binary())
        assert as_values(decoder.decode(values)) == as_values(strict.decode(values))
        assert len(decoder.plain(values)) == 1
        return outcome

    return check


SCHEMA_END = b"\0\0\0"


class OneSchema:
    """A source that has the same text for every id and fingerprint."""

    name = "the schema of this input"

    def __init__(self, text: str) -> None:
        self._schema = Schema("AVRO", text)

    def by_id(self, id: int) -> Schema:
        return self._schema

    def by_fingerprint(self, fingerprint: int) -> Schema:
        return self._schema


def avro(_: Path) -> Callable[[bytes], str]:
    """A record, or the text of a schema, three zero bytes and a record of this schema."""
    known = Decoder(FIELDS, schemas=KnownSchemas(EVENT))

    def check(data: bytes) -> str:
        schema, end, record = data.partition(SCHEMA_END)
        if not end:
            decoder, record = known, data
        else:
            decoder = Decoder(FIELDS, schemas=OneSchema(schema.decode("utf-8", "replace")))
        _, outcome = checked_decode(decoder, record)
        assert len(decoder.plain(pa.array([record], pa.large_binary()))) == 1
        return outcome

    return check


# -- record batches ------------------------------------------------------------------------------

_HEADER_BYTES = DefaultRecordBatch.HEADER_STRUCT.size
_LENGTH_OFFSET = 8
_FORMAT_OFFSET = 16


def batches(_: Path) -> Callable[[bytes], str]:
    """What a broker stored, as it is or, for every other input, with a correct checksum."""

    def check(data: bytes) -> str:
        if len(data) > _HEADER_BYTES and zlib.crc32(data) % 2:
            data = with_checksum(data)
        columns = Columns(50, full_bytes=1 << 20, most_value_bytes=1 << 16)
        stored = StoredBatches(data, 0, codecs=codecs.CODECS)
        last = count = 0
        try:
            while not stored.exhausted:
                stored.take(columns, 0, 50)
                records = columns.hand_out()
                records.value.validate(full=True)
                assert len(records) or stored.exhausted or stored.position > last
                assert all(last <= offset < stored.position for offset in records.offset.tolist())
                last = stored.position
                count += len(records)
        except DamagedBatch as damage:
            assert stored.position >= last
            return re.sub(r"[\d-]+", "N", str(damage))[:60]
        return "read" if count else "empty"

    return check


def with_checksum(data: bytes) -> bytes:
    """Return one batch of these bytes, with the length and the checksum that they have."""
    batch = bytearray(data)
    length = len(batch) - DefaultRecordBatch.AFTER_LEN_OFFSET
    struct.pack_into(">i", batch, _LENGTH_OFFSET, length)
    batch[_FORMAT_OFFSET] = FORMAT
    checksum = calc_crc32c(memoryview(batch)[DefaultRecordBatch.ATTRIBUTES_OFFSET :])
    struct.pack_into(">I", batch, DefaultRecordBatch.CRC_OFFSET, checksum)
    return bytes(batch)


# -- snapshots -----------------------------------------------------------------------------------

ROWS = [{"app": "maps", "age": 31}, {}]


def refusal(read: Callable[[], object]) -> str:
    """Return how a reader refuses what it reads, or "loaded"."""
    try:
        read()
    except SnapshotError as error:
        message = str(error)
        assert len(message) < LONGEST_SNAPSHOT_MESSAGE, message
        return type(error).__name__
    return "loaded"


_SEAL = re.compile(rb',\s*"sha256":\s*"[0-9a-f]*"\s*\}\s*$')


def sealed(data: bytes) -> bytes:
    """Return a document as it is or, for every other one, with the seal of its bytes."""
    return seal(_SEAL.sub(b"}", data)) if zlib.crc32(data) % 2 else data


def predict(path: Path) -> None:
    assert np.isfinite(Scorer(path, on_invalid="score").predict(ROWS)).all()


def manifests(root: Path) -> Callable[[bytes], str]:
    """The manifest of a snapshot that can be served: it is refused, or serves finite numbers."""
    path = write_served(root / "snapshots")

    def check(data: bytes) -> str:
        (path / "manifest.json").write_bytes(sealed(data))
        return " ".join(
            refusal(read)
            for read in (
                lambda: snapshot.verify(path),
                lambda: snapshot.load(path),
                lambda: snapshot.newest(path.parent),
                lambda: predict(path),
            )
        )

    return check


def made_manifests() -> list[bytes]:
    with tempfile.TemporaryDirectory() as root:
        path = write_served(Path(root) / "snapshots")
        return [(path / "manifest.json").read_bytes()]


def pointers(root: Path) -> Callable[[bytes], str]:
    """The pointer of a state directory: its followers go on, whatever it is."""
    write_served(root / "snapshots")

    def check(data: bytes) -> str:
        data = sealed(data)
        outcome = refusal(lambda: decode_pointer(data))
        (root / "latest.json").write_bytes(data)
        Subscriber(root).next(0.0)  # loads the snapshot, or logs a warning
        return outcome

    return check


def made_pointers() -> list[bytes]:
    with tempfile.TemporaryDirectory() as root:
        path = write_served(Path(root) / "snapshots")
        return [encode_pointer(pointer_for(path, snapshot.verify(path))), b"[" * 100_000]


# -- the command line ----------------------------------------------------------------------------

EXIT_CODES = range(7)
_RUN_NOTHING = ["--source", "missing.jsonl", "--bootstrap-servers", "127.0.0.1:1"]
_NOT_RUN = (b"/", b"..", b"~", b"\0")
# Arguments that follow those of the input, so that a command ends at once and writes little. The
# last of several options of a name counts.
COMMANDS: dict[str, list[str]] = {
    "config": [],
    "init": [],
    "models": [],
    "run": _RUN_NOTHING,
    "score": [],
    "simulate": ["--impressions", "10"],
    "snapshots": [],
}
TOKENS = [
    *(b"\n-X\n", b"\n--state\nstate", b"\n--config\nrun.toml", b"\n--json", b"\n--model\nfm", b"="),
    *(b"learn.batch_size=", b"features.numeric=", b"join.label_window=1h", b"log.jsonl", b"\n--"),
]


def command(root: Path) -> Callable[[bytes], str]:
    """Arguments, one a line, in a directory with a log, a configuration and a state directory.

    A command ends with one of the exit codes that are documented, and never with a traceback.
    """
    write_served(root / "state" / "snapshots")
    (root / "log.jsonl").write_bytes(b"\n".join(EVENTS))
    (root / "run.toml").write_text("[learn]\nbatch_size = 64\n")

    def check(data: bytes) -> str:
        arguments = data.decode("utf-8", "surrogateescape").split("\n")
        # What is outside of the directory stays as it is, and no system passes a zero byte.
        if arguments[0] not in COMMANDS or any(part in data for part in _NOT_RUN):
            return "not run"
        arguments += COMMANDS[arguments[0]]
        before = Path.cwd()
        os.chdir(root)
        try:
            result = CliRunner().invoke(main, arguments)
        finally:
            os.chdir(before)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in EXIT_CODES, result.output
        assert "Traceback" not in result.output, result.output
        return f"{arguments[0]} {result.exit_code} {re.sub('[^a-z ]', '', result.output[:40])}"

    return check


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("arrow", arrow),
        Target("json", as_json),
        Target("avro", avro),
        Target("batches", batches),
        Target("manifests", manifests, made_manifests),
        Target("pointers", pointers, made_pointers),
        Target("command", command, tokens=TOKENS),
    )
}
