"""Power loss, simulated: what may be on the disk if what was not synced is lost.

A file system keeps what was synced: the contents of a file as they were at its last `fsync`, and
the names in a directory as they were at its last `fsync`. Of everything later any part may be on
the disk, and any part not. `Disk` watches a directory, and at each moment tells what may be left:

    nothing    nothing but what was synced
    names      all names, and of the files the contents that were synced
    contents   the names that were synced, and of the files all contents
    random     of each directory and each file either; a file may be cut, too
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

Loss = Literal["nothing", "names", "contents", "random"]
LOSSES: tuple[Loss, ...] = ("nothing", "names", "contents", "random")
CALLS = ("fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir")


@dataclass(eq=False)
class Node:
    """A file or a directory; `path` is where it is now, None if it was removed."""

    is_folder: bool
    path: Path | None
    contents: bytes = b""  # at the last fsync
    names: dict[str, Node] = field(default_factory=dict)  # at the last fsync


class Disk:
    """Watch what a process does below `root`, which is empty and on the disk.

    `crash` is called with this object before each system call that changes names or syncs.
    """

    def __init__(self, root: Path, crash: Callable[[Disk], None]) -> None:
        self._crash = crash
        self._lock = threading.RLock()
        self._nodes: dict[int, Node] = {}
        self._path = root
        self._root = self._node(root)

    @contextlib.contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Watch as long as the block runs."""
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._watching(name, getattr(os, name)))
            yield
        self._crash(self)

    def left(self, target: Path, loss: Loss, rng: random.Random) -> None:
        """Write what may be left after a power loss now into the directory `target`."""
        self._locate(self._path)
        self._write(self._root, target, loss, rng)

    def _watching(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **keywords: Any) -> Any:
            with self._lock:
                if not self._concerns(args[0], keywords):
                    return call(*args, **keywords)
                self._crash(self)
                removed: int | None = None
                if name in ("unlink", "rmdir"):
                    removed = self._number(args[0], keywords)
                elif name in ("rename", "replace"):
                    removed = self._number(args[1], {"dir_fd": keywords.get("dst_dir_fd")})
                result = call(*args, **keywords)
                if name == "fsync":
                    self._sync(args[0])
                if removed in self._nodes:  # the number may be given again
                    self._nodes.pop(removed).path = None
                return result

        return watch

    def _concerns(self, subject: Any, keywords: dict[str, Any]) -> bool:
        folder = keywords.get("dir_fd", keywords.get("src_dir_fd"))
        if isinstance(subject, int):
            path = os.readlink(f"/proc/self/fd/{subject}")
        elif folder is not None:
            path = os.readlink(f"/proc/self/fd/{folder}")
        else:
            path = os.path.abspath(subject)
        return Path(path).is_relative_to(self._path)

    def _number(self, path: Any, keywords: dict[str, Any]) -> int | None:
        try:
            found = os.stat(path, dir_fd=keywords.get("dir_fd"), follow_symlinks=False)
        except FileNotFoundError:
            return None
        is_last = stat.S_ISDIR(found.st_mode) or found.st_nlink == 1
        return found.st_ino if is_last else None

    def _node(self, path: Path) -> Node:
        found = path.lstat()
        node = self._nodes.setdefault(found.st_ino, Node(stat.S_ISDIR(found.st_mode), path))
        node.path = path
        return node

    def _sync(self, fd: int) -> None:
        node = self._node(Path(os.readlink(f"/proc/self/fd/{fd}")))
        assert node.path
        if node.is_folder:
            node.names = self._listing(node.path)
        else:
            node.contents = node.path.read_bytes()

    def _listing(self, path: Path) -> dict[str, Node]:
        return {entry.name: self._node(path / entry.name) for entry in os.scandir(path)}

    def _locate(self, path: Path) -> None:
        """Give every node its present path."""
        for node in self._nodes.values():
            node.path = None
        self._node(path)
        for folder, folders, names in os.walk(path):
            for name in (*folders, *names):
                self._node(Path(folder) / name)

    def _write(self, node: Node, target: Path, loss: Loss, rng: random.Random) -> None:
        keeps = {"nothing": False, "names": node.is_folder, "contents": not node.is_folder}.get(
            loss, rng.random() < 0.5
        )
        if node.is_folder:
            now = self._listing(node.path) if node.path else {}
            target.mkdir()
            if loss == "random":
                names = _mixed(node.names, now, rng)
            else:
                names = now if keeps else node.names
            for name, below in names.items():
                self._write(below, target / name, loss, rng)
        else:
            data = node.path.read_bytes() if keeps and node.path else node.contents
            if loss == "random" and data != node.contents and rng.random() < 0.5:
                data = data[: rng.randrange(len(data) + 1)]
            target.write_bytes(data)


def _mixed(synced: dict[str, Node], now: dict[str, Node], rng: random.Random) -> dict[str, Node]:
    """Return the names of a directory of which some changes are on the disk."""
    mixed = {}
    for name in sorted({*synced, *now}):
        chosen = rng.choice((synced, now))
        if name in chosen:
            mixed[name] = chosen[name]
    return mixed
