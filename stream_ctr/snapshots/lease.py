"""The lease of a state directory: one trainer holds it, and one that lost it writes nothing more.

The file `lock` names its holder, which holds it with flock for as long as it lives. A run with
`take_over` replaces the file. When the former holder, which was frozen or cut off, looks again, the
file at the path is not the one that it holds.

    state of this process   `lock` at the path is    so
    ---------------------   ----------------------   -------------------------------------------
    holder                  the file that it holds   it may write
    taken over              another file             `check` raises `TakenOver`; it writes nothing
    taken over              missing                  the same: the lease was removed

Every lease has an epoch above those of all snapshots, pointers and leases before it. A snapshot
that a former holder began therefore ranks below those that the new one publishes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.snapshots import lineage, snapshot
from stream_ctr.snapshots.contract import LARGEST_EPOCH, NewerFormat
from stream_ctr.snapshots.pointer import read_pointer


class TakenOver(ConfigError):
    """Another process holds the state directory now."""


class Lease:
    """Hold `directory`, which is created if it is missing, until `close`.

    `run` is the id of the run whose directory it is, which is begun if nothing is there (see
    `lineage`). Raises `ConfigError` if another process holds it and `take_over` is false, or if it
    cannot be written, `NewerFormat` if a newer version wrote into it, and `SnapshotError` if the
    run's id is lost.
    """

    def __init__(self, directory: Path, *, take_over: bool = False) -> None:
        self.directory = directory
        self._path = directory / "lock"
        try:
            self._made = [path for path in (directory, *directory.parents) if not path.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            self._found = set(directory.iterdir())
            self._fd = self._acquire(take_over)
            try:
                held = _holder(self._path).get("epoch", 0)
                self.epoch = next_epoch(directory, [held, *epochs(directory)])
                self.run = lineage.run_of(directory)
                self._write_holder(self._fd)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise ConfigError(
                f"cannot write in the state directory {directory}: {error.strerror}"
            ) from None

    def check(self) -> None:
        """Raise `TakenOver` if this process does not hold the directory any more."""
        try:
            found = os.stat(self._path)
        except OSError:
            raise TakenOver(
                f"the lock {self._path} is gone: nothing more is written there"
            ) from None
        held = os.fstat(self._fd)
        if (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            holder = _describe(_holder(self._path))
            raise TakenOver(
                f"{self._path.parent} was taken over by {holder}: nothing more is written there"
            )

    def raise_epoch(self, above: int) -> None:
        """Make the epoch greater than `above`."""
        self.epoch = next_epoch(self.directory, [self.epoch - 1, above])
        self._write_holder(self._fd)

    def abandon(self) -> None:
        """Remove the lock and the directories that were made, if nothing else was written.

        A start that fails then leaves nothing behind.
        """
        if self._path in self._found:
            return
        with contextlib.suppress(OSError, TakenOver):
            self.check()
            own = [self.directory / lineage.RUN_FILE, self._path]  # the lock last
            for entry in set(self.directory.iterdir()) - {*own, *self._found}:
                entry.rmdir()  # fails for a file, and for a directory that is not empty
            for path in own:
                if path not in self._found:
                    path.unlink()
            for path in self._made:
                path.rmdir()

    def close(self) -> None:
        """Release the directory."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _acquire(self, take_over: bool) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                if take_over:
                    return self._replace()
                raise ConfigError(
                    f"the state directory {self._path.parent} is in use by "
                    f"{_describe(_holder(self._path))}; if that process is frozen or gone for "
                    "good, --take-over goes on without it"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)  # the file was replaced between opening and locking

    def _replace(self) -> int:
        fresh = self._path.with_name(f"tmp-lock-{snapshot.OWN}")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        # The holder's epoch moves along: the new lease must be above it.
        os.write(fd, json.dumps(_holder(self._path)).encode())
        os.replace(fresh, self._path)
        return fd

    def _write_holder(self, fd: int) -> None:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "epoch": self.epoch}
        text = json.dumps(holder) + "\n"
        os.pwrite(fd, text.encode(), 0)
        os.ftruncate(fd, len(text))
        os.fsync(fd)


def next_epoch(directory: Path, found: Iterable[int]) -> int:
    """Return an epoch above those that were found in a state directory.

    Raises `SnapshotError` if there is none, which only a forged document can bring about.
    """
    largest = max(found, default=0)
    if largest >= LARGEST_EPOCH:
        raise SnapshotError(
            f"no epoch is left in {directory}: a snapshot, latest.json or the lock there has one "
            f"of {largest}, which no run reaches. Remove what is forged, and start again"
        )
    return 1 + largest


def epochs(directory: Path) -> Iterator[int]:
    """Yield the epoch of every snapshot in a state directory, and of the published pointer.

    A damaged snapshot or pointer has none. Raises `NewerFormat` for one of a newer version.
    """
    root = directory / "snapshots"
    for name in snapshot.snapshot_ids(root):
        try:
            yield snapshot.read_manifest(root / name).epoch
        except NewerFormat:
            raise
        except SnapshotError:
            continue  # no run ever resumed from it
    try:
        if pointer := read_pointer(directory / "latest.json"):
            yield pointer.epoch
    except NewerFormat:
        raise
    except SnapshotError:
        return


def _holder(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text())
        if isinstance(holder, dict) and isinstance(holder.get("epoch"), int):
            return holder
    return {}


def _describe(holder: dict[str, int]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
