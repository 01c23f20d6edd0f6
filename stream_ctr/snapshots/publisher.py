"""The publisher: reports, dead letters and the pointer, in the state directory and on Kafka topics.

Files are always written. If the input is Kafka there is a `sink`, and topics get the same. A broker
that does not answer does not stop the run:

    sent                  if the broker does not take it
    -------------------   ---------------------------------------------------------------
    a report              it is in `reports.jsonl` anyway
    a dead letter         it goes to `dead_letters.jsonl`, with all whose delivery is unknown
    a pointer             `flush` sends it again, and raises if that fails too

A pointer goes to the topic only while this run holds the name there (see `snapshot_topic`).
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from stream_ctr import state_files
from stream_ctr.errors import BrokerError, ConfigError, SnapshotError
from stream_ctr.failpoint import failpoint
from stream_ctr.snapshots import lineage, snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.files import naming
from stream_ctr.snapshots.lease import Lease, epochs, next_epoch
from stream_ctr.snapshots.line_file import LineFile
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import (
    Pointer,
    pointer_for,
    read_pointer,
    require_signature,
    write_pointer,
)
from stream_ctr.snapshots.report_log import ReportLog, Rotation
from stream_ctr.snapshots.sent_letters import Position, SentLetters
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.snapshots.snapshot_topic import CopyAhead, Sink, SnapshotTopic

_log = logging.getLogger(__name__)
# How long to wait for another process that is publishing. Threads of this one take turns.
_PATIENCE_SECONDS = 5.0
_FLUSH_SECONDS = 10.0
_LATEST = "latest.json"
_LOCK = "latest.lock"
# Brokers take messages of up to a megabyte by default.
_LARGEST_LETTER_BYTES = 900_000
_LETTER_OVERHEAD_BYTES = 500
_IN_FLIGHT_LETTER_BYTES = 16 << 20


class Publisher:
    """Write reports, dead letters and the pointer into a state directory, and send them to topics.

    The files are `reports.jsonl`, `dead_letters.jsonl` and `latest.json`. With a `sink`, reports go
    to `metrics_topic` too, with `model_name` as their key, and dead letters go to `<topic>.dlq`, or
    to the file if the broker does not take them. With a `snapshot_topic` the pointer goes there
    too. With `signing`, pointers are signed, and only a signed one counts as published. The sink
    raises the errors `unavailable` if it cannot reach the broker. A line that a full disk does not
    take is an error at the end (`flush`). `rotation` says when another file of
    reports begins. Pointers name the `url` from which other machines load snapshots. With a
    `lease`, every method raises `TakenOver` once the lease is lost.
    """

    def __init__(
        self,
        directory: Path,
        *,
        lease: Lease | None = None,
        sink: Sink | None = None,
        unavailable: tuple[type[Exception], ...] = (),
        metrics_topic: str = "",
        snapshot_topic: SnapshotTopic | None = None,
        model_name: str = "default",
        rotation: Rotation | None = None,
        signing: SigningKey | None = None,
        url: str = "",
    ) -> None:
        self._signing = signing
        self._url = url
        self._epoch: int | None = None  # without a lease
        self._directory = directory
        self._lease = lease
        self._sink = sink
        self._unavailable = unavailable
        self._metrics_topic = metrics_topic
        self._snapshot_topic = snapshot_topic
        self._model_name = model_name
        self._pointer_lock = threading.Lock()  # held to publish, or to remove old snapshots
        self._reports = ReportLog(directory, rotation)
        self._dead_letters = LineFile(directory / "dead_letters.jsonl")
        self._unwritten: list[str] = []
        self._unannounced: Pointer | None = None
        self._letters: list[tuple[dict[str, str], bytes]] = []  # their delivery is unknown
        self._letter_bytes = 0
        self._letters_kept = 0
        self._sent_letters = SentLetters(directory)
        self._latest: tuple[int, ...] | None = None  # the file that `_latest_pointer` is from
        self._latest_pointer: Pointer | None = None

    @property
    def epoch(self) -> int:
        """The epoch of this run, above those of all earlier runs in the directory."""
        if self._lease:
            return self._lease.epoch
        if self._epoch is None:
            self._epoch = self._next_epoch()
        return self._epoch

    @property
    def run(self) -> str:
        """The id of this run, see `lineage`."""
        return self._lease.run if self._lease else lineage.run_of(self._directory)

    def _next_epoch(self) -> int:
        return next_epoch(self._directory, epochs(self._directory))

    def check(self) -> None:
        """Raise `TakenOver` if another process has the state directory now."""
        if self._lease:
            self._lease.check()

    # -- reports and dead letters ----------------------------------------------------------------

    def report(self, report: Mapping[str, object]) -> None:
        """Write a report."""
        self.check()
        line = json.dumps(report, allow_nan=False)
        self._append(self._reports, line)
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
        """Keep a malformed record, its bytes unchanged, with the reason.

        A record whose letter was kept before, by this run or one before it, is left as it is.
        `event` is the index of the malformed event in a record of many, and `value` is then a
        record of that event alone. A value that is too large for a broker is cut, and a header says
        so.
        """
        self.check()
        if Position(topic, partition, offset, event) in self._sent_letters:
            return
        fields = {
            "topic": topic,
            "partition": str(partition),
            "offset": str(offset),
            "reason": reason,
            "message": message,
        }
        if event is not None:
            fields["event"] = str(event)
        if self._sink is None:
            self._keep_letter(fields, value or b"")
            return
        if value and len(value) > _LARGEST_LETTER_BYTES:
            value = value[:_LARGEST_LETTER_BYTES]
            fields["cut_to"] = str(_LARGEST_LETTER_BYTES)
        key = f"{topic}-{partition}-{offset}" + (f"-{event}" if event is not None else "")
        headers = [
            (f"__stream_ctr.errors.{name}", text.encode("utf-8", "backslashreplace"))
            for name, text in fields.items()
        ]
        self._letters.append((fields, value or b""))
        self._letter_bytes += _LETTER_OVERHEAD_BYTES + len(value or b"")
        with self._sending(f"the dead letter of {topic}:{partition} at offset {offset}"):
            self._sink.send(f"{topic}.dlq", value or b"", key=key.encode(), headers=headers)
        if self._letter_bytes > _IN_FLIGHT_LETTER_BYTES:
            self.deliver_dead_letters()

    def deliver_dead_letters(self) -> None:
        """Wait until the broker has all dead letters, or keep them in the file.

        A snapshot calls this first: records before its positions are not read again.
        """
        if self._sink and self._letters:
            with self._sending("dead letters"):
                self._sink.flush(_FLUSH_SECONDS)
                self._sent_letters.add(fields for fields, _ in self._letters)
            self._forget_letters()

    def pass_dead_letters(self) -> None:
        """Note that a snapshot is on disk: records before it are not read again."""
        self._sent_letters.begin_file()

    def sync(self) -> None:
        """Wait until reports and dead letters in files are on disk; another thread may call this.

        The run that goes on from a snapshot does not write those before it again.
        """
        for file in (self._reports, self._dead_letters):
            with naming(file.path, "cannot write"):
                file.sync()

    def _keep_letter(self, fields: Mapping[str, str], value: bytes) -> None:
        encoded = base64.b64encode(value).decode()
        self._append(self._dead_letters, json.dumps({**fields, "value_base64": encoded}))

    def _forget_letters(self) -> None:
        self._letters = []
        self._letter_bytes = 0

    # -- the pointer -----------------------------------------------------------------------------

    def require_name(self, *, take_over: bool = False) -> None:
        """Raise `NameHeld` unless this run may publish on the snapshot topic. A start asks first.

        With `take_over`, a copy of the state directory that is ahead is left behind: from here on
        the epochs are above its own.
        """
        if not self._snapshot_topic:
            return
        try:
            self._snapshot_topic.check(self._published_rank())
        except CopyAhead:
            ahead = self._snapshot_topic.holder.pointer
            if not (take_over and self._lease and ahead):
                raise
            self._lease.raise_epoch(ahead.epoch)

    def publish(self, path: Path, manifest: Manifest) -> None:
        """Make the snapshot at `path` the one that subscribers load.

        After a rollback the pointer takes the rollback's epoch; with its own it would rank below.
        Raises `NameHeld`, with `latest.json` as it was, if another run holds the name.
        """
        self.check()
        reachable = self._check_name()
        with self._exclusive():
            self.check()
            epoch = manifest.epoch
            published = self.published()
            if published and published.sequence < manifest.sequence:
                epoch = max(epoch, published.epoch)
            pointer = self._write_pointer(path, manifest, epoch)
        self._announce(pointer, reachable=reachable)

    def roll_back(self, path: Path, manifest: Manifest) -> Pointer:
        """Publish the older snapshot at `path` again, with an epoch above all others.

        Raises `NameHeld` as `publish` does.
        """
        self.require_name()
        with self._exclusive():
            if not self._url and (published := self.published()):
                self._url = published.url
            pointer = self._write_pointer(path, manifest, self._next_epoch(), rollback=True)
        self._announce(pointer)
        return pointer

    def _write_pointer(
        self, path: Path, manifest: Manifest, epoch: int, *, rollback: bool = False
    ) -> Pointer:
        replaces = self._snapshot_topic.replaces if self._snapshot_topic else ()
        sign = self._signing.sign if self._signing else None
        pointer = pointer_for(
            path,
            manifest,
            epoch=epoch,
            replaces=replaces,
            url=self._url,
            rollback=rollback,
            sign=sign,
        )
        write_pointer(self._directory / _LATEST, pointer)
        return pointer

    def retain(self, keep: int, protect: Collection[str]) -> None:
        """Remove all snapshots but the `keep` newest, those in `protect` and the published one."""
        failpoint("retain.before")
        with self._exclusive():  # a rollback must not choose a snapshot that is being removed
            self.check()
            published = self.published()
            kept = {*protect, *([published.snapshot] if published else [])}
            snapshot.retain(self._directory / "snapshots", keep, kept)
        failpoint("retain.after")

    def published(self) -> Pointer | None:
        """Return the pointer in `latest.json`, or None if there is none.

        A damaged pointer is logged and counts as none. Raises `NewerFormat` for one of a newer
        version, which this version must not replace.
        """
        try:
            pointer = read_pointer(self._directory / _LATEST)
            if pointer and self._signing:
                require_signature(pointer, self._signing.verify)
            return pointer
        except NewerFormat:
            raise
        except SnapshotError as error:
            _log.warning("the published snapshot is unknown: %s", error)
            return None

    def last_published(self) -> Pointer | None:
        """Return what `published` returns, without reading `latest.json` again if it is the same.

        A report asks this, and a damaged pointer is then logged once.
        """
        found = _identity(self._directory / _LATEST)
        if found != self._latest:
            self._latest, self._latest_pointer = found, self.published()
        return self._latest_pointer

    def published_manifest(self) -> Manifest | None:
        """Return the manifest of the published snapshot, or None if there is none.

        A snapshot that cannot be read is logged and counts as none. Raises `NewerFormat`.
        """
        try:
            pointer = self.published()
            if pointer is None:
                return None
            path = self._directory / "snapshots" / pointer.snapshot
            return snapshot.load(path, stems=(), manifest_sha256=pointer.manifest_sha256)[0]
        except NewerFormat:
            raise
        except SnapshotError as error:
            _log.warning("the published snapshot cannot be read: %s", error)
            return None

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold `latest.lock`: a rollback may come from another process than the run."""
        try:
            fd = state_files.open_file(self._directory / _LOCK, os.O_WRONLY | os.O_CREAT)
        except OSError as error:
            raise SnapshotError(
                f"cannot publish in {self._directory}: {_LOCK}: {error.strerror}"
            ) from None
        with open(fd, "wb") as lock, self._pointer_lock:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise SnapshotError(
                            f"another process has been publishing in {self._directory} for "
                            f"{_PATIENCE_SECONDS:g} s: is it frozen?"
                        ) from None
                    time.sleep(0.02)
            yield

    def _check_name(self) -> bool:
        """Return whether the broker answers. Raises `NameHeld` if another run holds the name."""
        if self._snapshot_topic:
            try:
                self._snapshot_topic.check(self._own_rank())
            except self._unavailable as error:
                _log.error("could not read the snapshot topic: %s", error)
                return False
        return True

    def _published_rank(self) -> tuple[int, int]:
        published = self.published()
        return published.rank if published else (0, 0)

    def _own_rank(self) -> tuple[int, int]:
        """Return a rank that no pointer to the topic exceeds unless another copy has sent it."""
        return max(self._published_rank(), (self.epoch, 0))

    def _announce(self, pointer: Pointer, *, reachable: bool = True) -> None:
        if not self._snapshot_topic:
            return
        self._unannounced = pointer
        if reachable:
            failpoint("announce.before")
            with self._sending(f"the pointer to snapshot {pointer.snapshot}"):
                self._snapshot_topic.send(pointer, self._own_rank())
                self._unannounced = None
            failpoint("announce.after")

    # -- delivery --------------------------------------------------------------------------------

    def flush(self) -> None:
        """Deliver everything, and report what could not be delivered.

        Raises `BrokerError` if the pointer did not reach its topic, `NameHeld` if another run holds
        the name there, and `ConfigError` if a line did not reach its file.
        """
        if self._sink:
            self.deliver_dead_letters()
            with self._sending("the last reports"):
                self._sink.flush(_FLUSH_SECONDS)
        if self._unannounced:
            self._announce(self._unannounced, reachable=self._check_name())
        if self._letters_kept:
            _log.warning(
                "%d dead letters that no broker took are in %s",
                self._letters_kept,
                self._dead_letters.path,
            )
        if self._unannounced and self._snapshot_topic:
            raise BrokerError(
                f"the pointer to snapshot {self._unannounced.snapshot} did not reach topic "
                f"{self._snapshot_topic.topic!r}; the next run on {self._directory} sends it again"
            )
        if self._unwritten:
            raise ConfigError(
                f"{len(self._unwritten)} times something was not written, the last time "
                f"{self._unwritten[-1]}"
            )

    def _append(self, file: LineFile | ReportLog, line: str) -> None:
        try:
            file.append(line)
        except OSError as error:
            self._unwritten.append(f"a line of {file.path}: {error.strerror}")
            _log.error("could not write %s", self._unwritten[-1])

    @contextlib.contextmanager
    def _sending(self, subject: str) -> Iterator[None]:
        try:
            yield
        except self._unavailable as error:
            _log.error("could not send %s: %s", subject, error)
            # The failure may be that of an earlier send, so every letter in flight is kept.
            # Some may then be in both places.
            for fields, value in self._letters:
                self._keep_letter(fields, value)
            self._letters_kept += len(self._letters)
            self._forget_letters()


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what differs between two files that stood at `path`, or None for none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
