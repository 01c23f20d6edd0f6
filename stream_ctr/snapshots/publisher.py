"""Where the trainer's results go: files in the state directory, and Kafka topics beside them when the input is Kafka."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from stream_ctr.errors import BrokerError, ConfigError, SnapshotError
from stream_ctr.failpoint import failpoint
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.lease import Lease, epochs
from stream_ctr.snapshots.snapshot import Pointer

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 5.0  # with another process that is publishing; this one's own threads take turns, however long that takes
# Of a dead letter's value on a topic: brokers take messages of up to a megabyte unless told otherwise.
_LARGEST_LETTER = 900_000
_LETTER_BYTES, _MOST_LETTERS_BYTES = (
    500,
    16 << 20,
)  # of one without its value; of all on their way to the broker


class Sink(Protocol):
    """What is asked of a Kafka producer."""

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        time: int | None = None,
    ) -> None: ...

    def flush(self, timeout_seconds: float) -> None: ...


class Publisher:
    """Reports to `DIR/reports.jsonl`, the pointer to the newest snapshot to `DIR/latest.json`; with a `sink` also to their topics.

    Dead letters go to `<topic>.dlq` with a `sink`, else to `DIR/dead_letters.jsonl`. A broker that is away (`unavailable`: the errors by
    which the sink says so) stops nothing: its reports are in the file anyway, the letters go to the file too, and the pointer is announced
    by the end (`flush`) or that is an error. What a full disk does not take is an error at the end. With a `lease`, nothing is written once
    that is lost: `TakenOver`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        lease: Lease | None = None,
        sink: Sink | None = None,
        unavailable: tuple[type[Exception], ...] = (),
        metrics_topic: str = "",
        snapshot_topic: str = "",
        model_name: str = "default",
    ) -> None:
        self._lease = lease
        self._unavailable = unavailable
        self._unwritten: list[str] = []
        self._unannounced: Pointer | None = None
        self._letters: list[
            tuple[dict[str, str], bytes]
        ] = []  # of which it is not known whether the broker has them
        self._letters_bytes = self._letters_kept = 0
        self._directory = directory
        self._turn = threading.Lock()  # to publish, or to remove what is old
        self._sink = sink
        self._metrics_topic, self._snapshot_topic, self._model_name = (
            metrics_topic,
            snapshot_topic,
            model_name,
        )

    @property
    def epoch(self) -> int:
        """Of all that this run writes: above that of whoever wrote here before."""
        return self._lease.epoch if self._lease else 1 + max(epochs(self._directory), default=0)

    def check(self) -> None:
        """Raises `TakenOver` when another process has the state directory now."""
        if self._lease:
            self._lease.check()

    def report(self, report: Mapping[str, object]) -> None:
        self.check()
        line = json.dumps(report, allow_nan=False)
        self._append("reports.jsonl", line)
        if self._sink and self._metrics_topic:
            with self._sending("a report"):
                self._sink.send(self._metrics_topic, line.encode(), key=self._model_name.encode())

    def dead_letter(
        self,
        topic: str,
        partition: int,
        offset: int,
        value: bytes | None,
        reason: str,
        message: str,
        *,
        event: int | None = None,
    ) -> None:
        """The bytes of the record untouched, or a record of its one bad `event` (the index there), and why; what no broker would take is
        cut, and says so."""
        self.check()
        fields = {
            "topic": topic,
            "partition": str(partition),
            "offset": str(offset),
            "reason": reason,
            "message": message,
        }
        if event is not None:
            fields["event"] = str(event)
        if self._sink:
            if value and len(value) > _LARGEST_LETTER:
                value, fields["cut_to"] = value[:_LARGEST_LETTER], str(_LARGEST_LETTER)
            key = f"{topic}-{partition}-{offset}" + (f"-{event}" if event is not None else "")
            headers = [
                (f"__stream_ctr.errors.{name}", text.encode("utf-8", "backslashreplace"))
                for name, text in fields.items()
            ]
            self._letters.append((fields, value or b""))
            self._letters_bytes += _LETTER_BYTES + len(value or b"")
            with self._sending(f"the dead letter of {topic}:{partition} at offset {offset}"):
                self._sink.send(f"{topic}.dlq", value or b"", key=key.encode(), headers=headers)
            if self._letters_bytes > _MOST_LETTERS_BYTES:
                self.deliver_dead_letters()
            return
        self._file(fields, value or b"")

    def deliver_dead_letters(self) -> None:
        """Wait for the broker to have them, or keep them in the file: a record that a snapshot is past is not read again."""
        if self._sink and self._letters:
            with self._sending("dead letters"):
                self._sink.flush(10.0)
            self._letters, self._letters_bytes = [], 0

    def _file(self, fields: Mapping[str, str], value: bytes) -> None:
        self._append(
            "dead_letters.jsonl",
            json.dumps({**fields, "value_base64": base64.b64encode(value).decode()}),
        )

    def publish(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """The snapshot at `path` is the one to load.

        After a rollback its pointer has the epoch of that: to subscribers it would be older otherwise.
        """
        with self._pointing():
            self.check()
            published = self.published()
            follows = published is not None and published["sequence"] < manifest["sequence"]
            epoch = (
                max(manifest["epoch"], published["epoch"])
                if published and follows
                else manifest["epoch"]
            )
            pointer = snapshot.pointer_for(path, manifest, epoch=epoch)
            snapshot.write_pointer(self._directory / "latest.json", pointer)
        self._announce(pointer)

    def roll_back(self, path: Path, manifest: Mapping[str, Any]) -> Pointer:
        """The older snapshot at `path` is the one to load again; its pointer, whose epoch is above all there were."""
        with self._pointing():
            pointer = snapshot.pointer_for(path, manifest, epoch=1 + max(epochs(self._directory)))
            snapshot.write_pointer(self._directory / "latest.json", pointer)
        self._announce(pointer)
        return pointer

    def retain(self, keep: int, protect: Collection[str]) -> None:
        """Remove all but the `keep` newest snapshots, those in `protect`, and what subscribers are pointed to."""
        failpoint("retain.before")
        with self._pointing():  # a rollback must not choose what is going
            self.check()
            published = self.published()
            snapshot.retain(
                self._directory / "snapshots",
                keep,
                {*protect, *([published["snapshot"]] if published else [])},
            )
        failpoint("retain.after")

    def published(self) -> Pointer | None:
        """What `latest.json` points to; None also, with a warning, when it is no pointer."""
        try:
            return snapshot.read_pointer(self._directory / "latest.json")
        except SnapshotError as error:
            _log.warning("what was published is not known: %s", error)
            return None

    def published_manifest(self) -> dict[str, Any] | None:
        """Of the snapshot that `latest.json` points to; None also, with a warning, when it cannot be read."""
        try:
            pointer = self.published()
            return snapshot.load(Path(pointer["path"]), files=())[0] if pointer else None
        except SnapshotError as error:
            _log.warning("what is published cannot be looked at: %s", error)
            return None

    @contextlib.contextmanager
    def _pointing(self) -> Iterator[None]:
        """Alone with `latest.json`: a rollback may come from another process than the run."""
        try:
            lock = (self._directory / "latest.lock").open("a")
        except OSError as error:
            raise SnapshotError(f"cannot publish in {self._directory}: {error.strerror}") from None
        with lock, self._turn:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise SnapshotError(
                            f"another process has been publishing in {self._directory} for long: is it frozen?"
                        ) from None
                    time.sleep(0.02)
            yield

    def _announce(self, pointer: Pointer) -> None:
        if self._sink and self._snapshot_topic:
            failpoint("announce.before")
            self._unannounced = pointer
            with self._sending(f"the pointer to snapshot {pointer['snapshot']}"):
                self._sink.send(
                    self._snapshot_topic,
                    json.dumps(pointer).encode(),
                    key=self._model_name.encode(),
                )
                self._sink.flush(10.0)
                self._unannounced = None
            failpoint("announce.after")

    def flush(self) -> None:
        """Raises `BrokerError` or `ConfigError` when something that was to be announced or written is not where it belongs."""
        if self._sink:
            self.deliver_dead_letters()
            with self._sending("the last reports"):
                self._sink.flush(10.0)
        if self._unannounced:
            self._announce(self._unannounced)
        if self._letters_kept:
            _log.warning(
                "%d dead letters that no broker took are in %s",
                self._letters_kept,
                self._directory / "dead_letters.jsonl",
            )
        if self._unannounced:
            where = f"did not reach topic {self._snapshot_topic!r}; the next run on {self._directory} sends it again"
            raise BrokerError(f"the pointer to snapshot {self._unannounced['snapshot']} {where}")
        if self._unwritten:
            raise ConfigError(
                f"{len(self._unwritten)} times something was not written, the last time {self._unwritten[-1]}"
            )

    def _append(self, name: str, line: str) -> None:
        path, whole = self._directory / name, None
        try:
            with path.open("a+b") as file:
                whole = file.tell()
                if (
                    whole and os.pread(file.fileno(), 1, whole - 1) != b"\n"
                ):  # what a crash left is half a line
                    file.write(b"\n")
                file.write(line.encode() + b"\n")
        except OSError as error:
            if whole is not None:  # half a line would spoil the next one
                with contextlib.suppress(OSError):
                    os.truncate(path, whole)
            self._unwritten.append(f"a line of {path}: {error.strerror}")
            _log.error("could not write %s", self._unwritten[-1])

    @contextlib.contextmanager
    def _sending(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._unavailable as error:
            _log.error("could not send %s: %s", what, error)
            # What failed may be something that was sent before: every letter on its way is kept. Some may then be in both places.
            for fields, value in self._letters:
                self._file(fields, value)
            self._letters_kept += len(self._letters)
            self._letters, self._letters_bytes = [], 0
