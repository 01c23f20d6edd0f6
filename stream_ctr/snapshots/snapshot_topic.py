"""The snapshot topic: one run holds a name, and all readers agree which, by the topic's order.

The value of a name is the pointer to the newest published snapshot. Kafka keeps the order of a
key's records, and has no operation that compares and sets. So each run reads the topic to its end
before it sends a pointer, and again after it. `Holder` is what the records say:

    the name is      next record                                  so
    --------------   ------------------------------------------   ----------------------------------
    free             a pointer of any run                         its run holds the name
    held by A        a pointer of A                               A goes on holding it
    held by A        of B, which lists A in `replaces`            B holds it, and A never again
    held by A        of B, any other                              passed over, and B never holds it
    held by A        a null (withdrawn)                           the name is free
    any              one that cannot be decoded                   it is passed over
    any              one without the signature that is required   it is passed over

A run on the topic acts on it:

    the name is                          when the run starts, and before and after each pointer
    ----------------------------------   -------------------------------------------------------
    free, or held by this run            it goes on
    held by the run that it may replace  it goes on; its next pointer replaces that run
    held by another run                  `NameHeld`, and nothing is sent
    held by a run that replaced it       `NameHeld`, and nothing is sent
    held by this run, with a pointer     `CopyAhead`: a copy of the state directory has published
      above those of its directory
    of a newer version                   `NewerFormat`

A run that finds out after it has sent a pointer sends the holder's again before it ends: when the
topic is compacted it keeps the last record of a name, which must be the holder's. If it is killed
in between, the holder's next pointer makes it good, because `replaces` also lists runs that were
passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from msgspec.structs import replace

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.messages import one_line
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.pointer import (
    Pointer,
    decode_pointer,
    encode_pointer,
    require_signature,
    signed,
)
from stream_ctr.snapshots.signing import SigningKey

_log = logging.getLogger(__name__)
_FLUSH_SECONDS = 10.0
Record = tuple[str, bytes | None]
"""Key and value. A null value withdraws the key."""


class NameHeld(ConfigError):
    """Another run holds the name under which this one publishes."""


class CopyAhead(NameHeld):
    """The run has published snapshots that its state directory does not know."""


class Sink(Protocol):
    """A Kafka producer."""

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


class Reader(Protocol):
    """A consumer of the snapshot topic."""

    def read_to_end(self) -> Iterable[Record]:
        """Return the records since the last call, up to the end that the topic has now."""
        ...


class Holder:
    """The run that holds a name, as the records of the name say one after another."""

    def __init__(self) -> None:
        self.pointer: Pointer | None = None
        """The newest pointer of the run that holds the name, or None if the name is free."""
        self._passed_over: dict[str, None] = {}

    @property
    def run(self) -> str | None:
        """The run that holds the name, or None if the name is free."""
        return self.pointer.run if self.pointer else None

    def take(self, pointer: Pointer) -> bool:
        """Take the next pointer, and return whether its run holds the name after it."""
        held = self.pointer
        if held and held.run == pointer.run:
            if pointer.rank >= held.rank:
                self.pointer = pointer
            return True
        if held and (held.run not in pointer.replaces or pointer.run in held.replaces):
            self._passed_over[pointer.run] = None
            return False
        self.pointer = pointer
        return True

    def withdraw(self) -> None:
        """Take the null value, which frees the name."""
        self.pointer = None
        self._passed_over.clear()

    def never_again(self) -> tuple[str, ...]:
        """Return the runs that may not hold the name any more: replaced, or passed over."""
        replaced = self.pointer.replaces if self.pointer else ()
        return tuple(dict.fromkeys([*replaced, *self._passed_over]))


class SnapshotTopic:
    """The pointers of a name on the snapshot topic, for a run that publishes under it.

    With `replace_run`, the run may replace the run of that id. With `signing`, it signs its
    pointers, and passes over those that its key did not sign, which anyone could have written. The
    errors of `sink` and `reader` when no broker answers are theirs.
    """

    def __init__(
        self,
        topic: str,
        *,
        sink: Sink,
        reader: Reader,
        name: str,
        run: str,
        replace_run: str | None = None,
        signing: SigningKey | None = None,
    ) -> None:
        self._signing = signing
        self.topic = topic
        self.holder = Holder()
        self.replaces: tuple[str, ...] = ()
        """The runs that the next pointer replaces, see `Pointer.replaces`."""
        self._sink = sink
        self._reader = reader
        self._name = name
        self._run = run
        self._replace_run = replace_run
        self._newer: NewerFormat | None = None

    def check(self, rank: tuple[int, int]) -> None:
        """Read the topic to its end, and raise `NameHeld` unless this run may publish.

        `rank` is that of the newest pointer that its state directory knows. Raises `NewerFormat` if
        a newer version holds the name.
        """
        self._read()
        if self._newer:
            raise self._newer
        held = self.holder.pointer
        if held is None:
            return
        if held.run == self._run:
            if held.rank > rank:
                raise self._copy_ahead(held)
            self.replaces = self.holder.never_again()
        elif held.run == self._replace_run and self._run not in self.holder.never_again():
            self.replaces = (*self.holder.never_again(), held.run)
        else:
            raise self._name_held(held)

    def send(self, pointer: Pointer, rank: tuple[int, int]) -> None:
        """Send a pointer of this run, and raise `NameHeld` if it came too late.

        `check` must have returned before.
        """
        sign = self._signing.sign if self._signing else None
        self._send(signed(replace(pointer, replaces=self.replaces), sign))
        try:
            self.check(rank)
        except NameHeld:
            if self.holder.pointer:
                self._send(self.holder.pointer)
            raise

    def _send(self, pointer: Pointer) -> None:
        self._sink.send(self.topic, encode_pointer(pointer), key=self._name.encode())
        self._sink.flush(_FLUSH_SECONDS)

    def _read(self) -> None:
        for key, value in self._reader.read_to_end():
            if key != self._name:
                continue
            if value is None:
                self._newer = None
                self.holder.withdraw()
                continue
            try:
                pointer = decode_pointer(value, f"the pointer of {self._where}")
                if self._signing:
                    require_signature(pointer, self._signing.verify)
            except NewerFormat as error:
                self._newer = error
            except SnapshotError as error:
                _log.warning("passed over: %s", error)
            else:
                if self.holder.take(pointer):
                    self._newer = None

    @property
    def _where(self) -> str:
        return f"model {one_line(self._name, 80)!r} on topic {self.topic!r}"

    def _name_held(self, held: Pointer) -> NameHeld:
        other = f"run {held.run}, whose newest snapshot is {_described(held)}"
        another_name = "publish under another name with -X snapshots.model_name=NAME"
        if self._run in self.holder.never_again():
            return NameHeld(
                f"this run, {self._run}, is not {self._where} any more: that is {other}. Its "
                f"snapshots stay where they are. To go on, {another_name}, or begin a new state "
                f"directory whose run replaces that one: --replace-run {held.run}"
            )
        return NameHeld(
            f"{self._where} is {other}; this is run {self._run}. Either {another_name}, or "
            f"replace that run, which then ends: --replace-run {held.run}"
        )

    def _copy_ahead(self, held: Pointer) -> CopyAhead:
        return CopyAhead(
            f"run {self._run} has published snapshot {_described(held)} as {self._where}, from "
            f"{held.path}, and this state directory does not know it: it is an older copy. If the "
            "other copy is gone for good, --take-over goes on from this one"
        )


def _described(pointer: Pointer) -> str:
    moment = datetime.fromtimestamp(pointer.created_ms / 1000, UTC)
    return f"{pointer.snapshot} of {moment:%Y-%m-%dT%H:%M:%SZ}"
