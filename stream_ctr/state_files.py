"""Files of a state directory, which others may be able to write to, too.

A run writes and removes only what is in its directory itself: it follows no symbolic link there,
opens nothing but regular files, and never waits for the reader of a pipe. Where it replaces a file
(`latest.json`, `run.json`) it makes a new one, whatever stands under the name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_APPENDED_TO = ("reports.jsonl", "dead_letters.jsonl", "dead_letters.sent", "latest.lock")
_FOLDERS = ("snapshots", "deltas", "spill")
_NOT_FOLLOWED = "it is a symbolic link, which a run does not follow in its state directory"
_NOT_REGULAR = "it is not a regular file"


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()


def require_own(directory: Path) -> None:
    """Raise `OSError` if a file or folder that a run changes in place leads out of `directory`."""
    for name in _APPENDED_TO:
        with contextlib.suppress(FileNotFoundError):
            os.close(open_file(directory / name, os.O_WRONLY))
    for name in _FOLDERS:
        with contextlib.suppress(FileNotFoundError), opened_folder(directory / name):
            pass


def open_file(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a regular file with these `flags` of `os.open`, and return its descriptor.

    Raises `OSError` for anything else, a symbolic link among them.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, mode)
    except OSError as error:
        raise _in_words(error, path) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, _NOT_REGULAR, str(path))
    return fd


def create_file(path: Path) -> int:
    """Create a file for writing, in place of what stands at `path`; return its descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, 0o666)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if it is missing. A symbolic link is an `OSError`."""
    make_directories(path)
    with opened_folder(path):
        pass


def make_directories(path: Path) -> list[Path]:
    """Make a directory, and those above it; return those that were missing, `path` first.

    Their names are on disk when this returns: what is written there would be lost with them.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fd = os.open(made.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return missing


@contextlib.contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """Yield the descriptor of a folder. Raises `OSError` for a symbolic link."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _in_words(error, path) from None
    try:
        yield fd
    finally:
        os.close(fd)


def remove_all(folder: Path, prefix: str) -> list[str]:
    """Remove the entries of `folder` whose names begin with `prefix`, and return these names.

    A symbolic link is removed, and not what it leads to. Each entry is renamed first: a process
    that was taken over, and still writes there, gets an error and adds nothing to it. What another
    process removes meanwhile is no error.
    """
    try:
        with opened_folder(folder) as fd:
            names = sorted(name for name in os.listdir(fd) if name.startswith(prefix))
            for name in names:
                doomed = f"{prefix}{secrets.token_hex(8)}"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(name, doomed, src_dir_fd=fd, dst_dir_fd=fd)
                    _remove(doomed, fd)
            return names
    except FileNotFoundError:
        return []


def _remove(name: str, folder_fd: int) -> None:
    if stat.S_ISDIR(os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode):
        shutil.rmtree(name, dir_fd=folder_fd)
    else:
        os.unlink(name, dir_fd=folder_fd)


def _in_words(error: OSError, path: Path) -> OSError:
    """Return the error, with a reason that says so if `path` is a symbolic link."""
    if path.is_symlink():  # ELOOP for a file, ENOTDIR for a folder
        return OSError(errno.ELOOP, _NOT_FOLLOWED, str(path))
    return error
