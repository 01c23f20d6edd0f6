"""Where the trainer's results go: files in the state directory, and Kafka topics beside them when the input is Kafka."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from stream_ctr import snapshot
from stream_ctr.errors import BrokerError, ConfigError, SnapshotError
from stream_ctr.failpoint import failpoint
from stream_ctr.lease import Lease, epochs
from stream_ctr.snapshot import Pointer

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 5.0  # with another process that is publishing
# Of a dead letter's value on a topic: brokers take messages of up to a megabyte unless told otherwise.
_LARGEST_LETTER = 900_000


class Sink(Protocol):
    """What is asked of a Kafka producer."""

    def send(
        self, topic: str, value: bytes, *, key: bytes | None = None, headers: Sequence[tuple[str, bytes]] = (), time: int | None = None
    ) -> None: ...

    def flush(self, timeout_seconds: float) -> None: ...


class Outlet:
    """Reports to `DIR/reports.jsonl`, the pointer to the newest snapshot to `DIR/latest.json`; with a `sink` also to their topics.

    Dead letters go to `<topic>.dlq` with a `sink`, else to `DIR/dead_letters.jsonl`. What cannot be written now - a full disk, a broker
    that is away (`unavailable`: the errors by which the sink says so) - is logged and counted while learning goes on, and an error at
    the end (`flush`). With a `lease`, nothing is written once that is lost: `TakenOver`.
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
        self._undelivered: list[str] = []
        self._letters_on_their_way = False
        self._directory = directory
        self._sink = sink
        self._metrics_topic, self._snapshot_topic, self._model_name = metrics_topic, snapshot_topic, model_name

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

    def dead_letter(self, topic: str, partition: int, offset: int, value: bytes | None, reason: str, message: str) -> None:
        """The original bytes untouched, and why; what no broker would take is cut, and says so."""
        self.check()
        fields = {"topic": topic, "partition": str(partition), "offset": str(offset), "reason": reason, "message": message}
        if self._sink:
            if value and len(value) > _LARGEST_LETTER:
                value, fields["cut_to"] = value[:_LARGEST_LETTER], str(_LARGEST_LETTER)
            headers = [(f"__stream_ctr.errors.{name}", text.encode("utf-8", "backslashreplace")) for name, text in fields.items()]
            with self._sending(f"the dead letter of {topic}:{partition} at offset {offset}"):
                self._sink.send(f"{topic}.dlq", value or b"", key=f"{topic}-{partition}-{offset}".encode(), headers=headers)
            self._letters_on_their_way = True
            return
        self._append("dead_letters.jsonl", json.dumps({**fields, "value_base64": base64.b64encode(value or b"").decode()}))

    def deliver_dead_letters(self) -> None:
        """Wait for the broker to have them: a record that a snapshot is past is not read again."""
        if self._sink and self._letters_on_their_way:
            with self._sending("dead letters"):
                self._sink.flush(10.0)
            self._letters_on_their_way = False

    def publish(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """The snapshot at `path` is the one to load.

        After a rollback its pointer has the epoch of that: to subscribers it would be older otherwise.
        """
        with self._pointing():
            self.check()
            published = self.published()
            follows = published is not None and published["sequence"] < manifest["sequence"]
            epoch = max(manifest["epoch"], published["epoch"]) if published and follows else manifest["epoch"]
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
        with lock:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise SnapshotError(f"another process has been publishing in {self._directory} for long: is it frozen?") from None
                    time.sleep(0.02)
            yield

    def _announce(self, pointer: Pointer) -> None:
        if self._sink and self._snapshot_topic:
            failpoint("announce.before")
            with self._sending(f"the pointer to snapshot {pointer['snapshot']}"):
                self._sink.send(self._snapshot_topic, json.dumps(pointer).encode(), key=self._model_name.encode())
                self._sink.flush(10.0)
            failpoint("announce.after")

    def flush(self) -> None:
        """Raises `BrokerError` or `ConfigError` when something that was to be sent or written is not where it belongs."""
        if self._sink:
            with self._sending("the last reports"):
                self._sink.flush(10.0)
        for failures, error in ((self._undelivered, BrokerError), (self._unwritten, ConfigError)):
            if failures:
                raise error(f"{len(failures)} times something was not delivered, the last time {failures[-1]}")

    def _append(self, name: str, line: str) -> None:
        try:
            with (self._directory / name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._unwritten.append(f"a line of {self._directory / name}: {error.strerror}")
            _log.error("could not write %s", self._unwritten[-1])

    @contextlib.contextmanager
    def _sending(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._unavailable as error:
            self._undelivered.append(f"{what}: {error}")
            _log.error("could not send %s", self._undelivered[-1])
