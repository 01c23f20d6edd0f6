"""The lease of a state directory: one trainer holds it, and one that lost it writes nothing more.

The file `lock` names its holder, by a token of its own too, which holds it with flock for as long
as it lives. A run with `take_over` replaces the file, and then waits until the former holder has
let go, for a limited time: it may be frozen.

    `lock` at the path   this process is   so
    ------------------   ---------------   --------------------------------------------------
    has its token        the holder        it may write
    has another one      taken over        `check` raises `TakenOver`; it writes nothing more
    cannot be read       taken over        the same: the lease was removed, or its disk is gone

The token counts, and not the flock: a network file system gives the lock of a client that it does
not hear to another one, and tells neither.

Every lease has an epoch above those of all snapshots, pointers and leases before it. A snapshot
that a former holder began therefore ranks below those that the new one publishes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stream_ctr import state_files
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.messages import one_line
from stream_ctr.snapshots import lineage, snapshot
from stream_ctr.snapshots.contract import LARGEST_EPOCH, NewerFormat
from stream_ctr.snapshots.pointer import read_pointer

_log = logging.getLogger(__name__)
# How long a take-over waits for the former holder, which looks at the lock between two batches.
_LEAVE_SECONDS = 10.0
_LARGEST_LOCK_BYTES = 4096


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
        self._token = secrets.token_hex(8)
        self.epoch = 0
        try:
            self._made = state_files.make_directories(directory)
            self._found = set(directory.iterdir())
            self._fd = self._acquire(take_over)
            try:
                self.check()  # a third process may have taken over meanwhile
                state_files.require_own(directory)
                self.epoch = next_epoch(directory, [self.epoch, *epochs(directory)])
                self.run = lineage.run_of(directory)
                self._write_holder(self._fd)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            path = Path(str(error.filename))
            name = f"{path}: " if path.parent == directory else ""
            raise ConfigError(
                f"cannot write in the state directory {directory}: {name}{error.strerror}"
            ) from None

    def check(self) -> None:
        """Raise `TakenOver` if this process does not hold the directory any more."""
        try:
            holder = _holder(self._path)
        except OSError as error:
            raise TakenOver(
                f"the lock {self._path} cannot be read ({error.strerror}): "
                "nothing more is written there"
            ) from None
        if holder.get("token") != self._token:
            raise TakenOver(
                f"{self._path.parent} was taken over by {_describe(holder)}: "
                "nothing more is written there"
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
        """Return the descriptor of the lock file, with the token of this lease in it."""
        while True:
            fd = state_files.open_file(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _flock(fd):
                if take_over:
                    return self._replace(fd)
                holder = _describe(_read_holder(fd))
                os.close(fd)
                raise ConfigError(
                    f"the state directory {self._path.parent} is in use by {holder}; if that "
                    "process is frozen or gone for good, --take-over goes on without it"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path, follow_symlinks=False), os.fstat(fd)):
                    self._succeed(_read_holder(fd), fd)
                    return fd
            os.close(fd)  # the file was replaced between opening and locking

    def _replace(self, former_fd: int) -> int:
        """Replace the lock file, and wait until the former holder lets go of `former_fd`."""
        former = _read_holder(former_fd)
        fresh = self._path.with_name(f"tmp-lock-{self._token}")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        _flock(fd)
        self._succeed(former, fd)
        os.replace(fresh, self._path)
        _log.warning("waiting for %s to end", _describe(former))
        deadline = time.monotonic() + _LEAVE_SECONDS
        while not _flock(former_fd):
            if time.monotonic() > deadline:
                _log.warning(
                    "%s has not ended within %g s, and may be frozen: going on without it",
                    _describe(former),
                    _LEAVE_SECONDS,
                )
                break
            time.sleep(0.05)
        os.close(former_fd)
        return fd

    def _succeed(self, former: dict[str, Any], fd: int) -> None:
        """Write this holder into the lock, with the epoch of the former one, for now."""
        self.epoch = _epoch(former)
        self._write_holder(fd)

    def _write_holder(self, fd: int) -> None:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "epoch": self.epoch,
            "token": self._token,
        }
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
    """Yield the epochs of all snapshots in a state directory, of the lock and of the pointer.

    The run that holds the lock may have written deltas of its epoch, and no snapshot yet. A damaged
    snapshot or pointer has none. Raises `NewerFormat` for one of a newer version.
    """
    root = directory / "snapshots"
    for name in snapshot.snapshot_ids(root):
        try:
            yield snapshot.read_manifest(root / name).epoch
        except NewerFormat:
            raise
        except SnapshotError:
            continue  # no run ever resumed from it
    with contextlib.suppress(OSError):
        yield _epoch(_holder(directory / "lock"))
    try:
        if pointer := read_pointer(directory / "latest.json"):
            yield pointer.epoch
    except NewerFormat:
        raise
    except SnapshotError:
        return


def _flock(fd: int) -> bool:
    """Lock an open file, and return whether this process holds it now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> dict[str, Any]:
    """Return what the lock file says of its holder; nothing if it is damaged."""
    fd = state_files.open_file(path, os.O_RDONLY)
    try:
        return _read_holder(fd)
    finally:
        os.close(fd)


def _read_holder(fd: int) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        holder = json.loads(os.pread(fd, _LARGEST_LOCK_BYTES, 0))
        if isinstance(holder, dict):
            return holder
    return {}


def _epoch(holder: dict[str, Any]) -> int:
    """Return the epoch of a holder, 0 if it has none."""
    epoch = holder.get("epoch")
    return epoch if isinstance(epoch, int) and 0 < epoch <= LARGEST_EPOCH else 0


def _describe(holder: dict[str, Any]) -> str:
    pid, host = holder.get("pid", "unknown"), holder.get("host", "an unknown host")
    return f"process {one_line(pid, 20)} on {one_line(host, 100)}"
