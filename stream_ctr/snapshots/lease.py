"""The lease of a state directory: one trainer at a time, and none that lost it can write there again.

The file `lock` is held with flock for as long as the process lives, and says who holds it. `take_over` puts a new file in its place: the
old holder, frozen or on a host that is gone, finds when it wakes that the file is not the one it holds, and writes nothing more. Every
lease has an epoch above that of all snapshots, pointers and leases before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.snapshots import snapshot


class TakenOver(ConfigError):
    """The state directory is another process's now."""


class Lease:
    """Holds `directory`, which is made if it is not there, until closed.

    Raises `ConfigError` when another process holds it and `take_over` is not set, or when it cannot be written.
    """

    def __init__(self, directory: Path, *, take_over: bool = False) -> None:
        self.directory = directory
        self._path = directory / "lock"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._fd = self._held_by_us(take_over)
            self.epoch = 1 + max([_holder(self._path).get("epoch", 0), *epochs(directory)])
            self._sign(self._fd)
        except OSError as error:
            raise ConfigError(
                f"cannot write in the state directory {directory}: {error.strerror}"
            ) from None

    def check(self) -> None:
        """Raises `TakenOver` when this lease is not the directory's any more."""
        try:
            found = os.stat(self._path)
        except OSError:
            raise TakenOver(
                f"the lock {self._path} is gone: nothing more is written there"
            ) from None
        ours = os.fstat(self._fd)
        if (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
            raise TakenOver(
                f"{self._path.parent} was taken over by {_describe(_holder(self._path))}: nothing more is written there"
            )

    def close(self) -> None:
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

    def _held_by_us(self, take_over: bool) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                if take_over:
                    return self._replaced()
                holder = _describe(_holder(self._path))
                hint = "if that is frozen or gone for good, --take-over goes on without it"
                raise ConfigError(
                    f"the state directory {self._path.parent} is in use by {holder}; {hint}"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)  # replaced between opening and locking

    def _replaced(self) -> int:
        fresh = self._path.with_name(f"tmp-lock-{snapshot.OWN}")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, json.dumps(_holder(self._path)).encode())  # its epoch is the one to be above
        os.replace(fresh, self._path)
        return fd

    def _sign(self, fd: int) -> None:
        text = (
            json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "epoch": self.epoch})
            + "\n"
        )
        os.pwrite(fd, text.encode(), 0)
        os.ftruncate(fd, len(text))
        os.fsync(fd)


def epochs(directory: Path) -> Iterator[int]:
    """Of every snapshot in a state directory, and of what is published."""
    for name in snapshot.snapshot_ids(directory / "snapshots"):
        with contextlib.suppress(
            SnapshotError, KeyError
        ):  # one that is broken was never resumed from
            yield int(snapshot.load(directory / "snapshots" / name, files=())[0]["epoch"])
    with contextlib.suppress(SnapshotError):
        if pointer := snapshot.read_pointer(directory / "latest.json"):
            yield pointer["epoch"]


def _holder(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text())
        if isinstance(holder, dict) and isinstance(holder.get("epoch"), int):
            return holder
    return {}


def _describe(holder: dict[str, int]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
