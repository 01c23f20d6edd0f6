"""Places that hold snapshots and deltas: a directory of this machine, or a URL.

    place                             reads   writes   needs
    -------------------------------   -----   ------   ---------------------------
    DIR, file:///DIR                  yes     yes
    http://, https://                 yes             `stream-ctr[remote]`
    s3://, s3a://                     yes     yes      `stream-ctr[remote]`, s3fs
    gs://, gcs://                     yes     yes      `stream-ctr[remote]`, gcsfs
    az://, abfs://, abfss://          yes     yes      `stream-ctr[remote]`, adlfs
    sftp://, hdfs://                  yes     yes      paramiko; pyarrow with Hadoop
    memory://                         yes     yes      one process alone sees it

URLs are opened with fsspec, because one interface covers all of these, object stores keep their own
configuration of keys and addresses with it (`FSSPEC_S3_ENDPOINT_URL`), and torch needs it anyway.
It is imported when the first URL is opened: a server that reads a directory needs no fsspec.

A place may be slow, or not answer at all. Each wait for it ends: a connection is made within 10
seconds, the next bytes come within 15, and a transfer of less than a kilobyte a second is given
up. Other stores have the limits of their packages. A read never returns more than was asked for.

Names in a place have the form `snapshots/NAME/FILE`. Nothing here is trusted: what is read is
compared with digests by those who read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from stream_ctr import state_files
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.messages import nearest, one_line
from stream_ctr.snapshots import files
from stream_ctr.snapshots.files import Missing

PIECE_BYTES = 1 << 20
_BLOCK_BYTES = 8 << 20  # of a store that is read in ranges
_CONNECT_SECONDS = 10.0
_SILENT_SECONDS = 15.0
_PATIENCE_SECONDS = 30.0  # for a small file, and before a transfer may be called slow
_SLOWEST_BYTES_PER_SECOND = 1024
_TRIES = 3
_RETRY_SECONDS = 0.5

_WEB = ("http", "https")
# The package that opens the scheme, beside fsspec.
_SCHEMES = {
    **dict.fromkeys(_WEB, "aiohttp"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "sftp": "paramiko",
    "hdfs": "pyarrow",
    "memory": "fsspec",
}
# No proxy may answer with an old pointer, and a size is that of the file.
_HEADERS = {"Cache-Control": "no-cache", "Accept-Encoding": "identity"}
_WITH_FOLDERS = ("sftp", "hdfs", "memory")
_LOCAL = "file"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Unreachable(SnapshotError):
    """A place did not answer, or refused to."""


class Transfer(NamedTuple):
    """A file that is read from `start` on. `size` is that of all of it, None if unknown."""

    start: int
    size: int | None
    pieces: Iterator[bytes]


class Place(Protocol):
    """A place that holds files by their names.

    Its methods raise `SnapshotError` that names the file: `Missing` if it is not there,
    `Unreachable` if the place does not answer, and `ConfigError` to write where one can only read.
    """

    @property
    def url(self) -> str:
        """The address for messages, without passwords."""
        ...

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return the contents of a file, which is an error if it has more than `most_bytes`."""
        ...

    def transfer(self, name: str, start: int = 0) -> AbstractContextManager[Transfer]:
        """Read a file of any size in pieces, from byte `start` on if the place can do that."""
        ...

    def write(self, name: str, data: bytes | Path) -> None:
        """Write a file, with these bytes or those of a local file, in place of an earlier one."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything in it. A missing one is no error."""
        ...

    def exists(self, name: str) -> bool:
        """Return whether there is a file or a folder with this name."""
        ...

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none if there is no such folder."""
        ...


def is_url(text: str | os.PathLike[str]) -> bool:
    """Return whether a text is a URL and not a path.

    >>> is_url("https://models.example/run"), is_url("state"), is_url(Path("a://b"))
    (True, False, False)
    """
    return isinstance(text, str) and bool(_URL.match(text))


def open_place(url: str | os.PathLike[str], *, writing: bool = False) -> Place:
    """Return the place with this URL or path.

    Raises `ConfigError` if the scheme is not in the table above, if a package that it needs is not
    installed, or, with `writing`, if one can only read there.

    >>> open_place("file:///srv/run").url
    '/srv/run'
    >>> open_place("ftp://host/run")
    Traceback (most recent call last):
    stream_ctr.errors.ConfigError: there is no place ftp://host/run: its scheme is one of file, \
http, https, s3, s3a, gs, gcs, az, abfs, abfss, sftp, hdfs, memory; did you mean 'sftp'?
    >>> open_place("http://host/run", writing=True)
    Traceback (most recent call last):
    stream_ctr.errors.ConfigError: http://host/run can only be read: write to the directory that \
the web server serves, or to an object store
    """
    directory = local_directory(url)
    if directory is not None:
        return LocalPlace(directory)
    address = str(url)
    scheme = address.partition("://")[0].lower()
    known = (_LOCAL, *_SCHEMES)
    if scheme not in _SCHEMES or "::" in address:
        raise ConfigError(
            f"there is no place {shown(address)}: its scheme is one of {', '.join(known)}"
            f"{nearest(scheme, known)}"
        )
    if writing and scheme in _WEB:
        raise ConfigError(
            f"{shown(address)} can only be read: write to the directory that the web server "
            "serves, or to an object store"
        )
    return RemotePlace(address)


def local_directory(source: str | os.PathLike[str]) -> Path | None:
    """Return the directory that a path or a file URL names, None for another URL.

    Raises `ConfigError` for a file URL that names none.

    >>> local_directory("file:///srv/a%20b"), local_directory("s3://bucket/run")
    (PosixPath('/srv/a b'), None)
    """
    if not is_url(source):
        return Path(source)
    parts = urlsplit(str(source))
    if parts.scheme.lower() != _LOCAL:
        return None
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigError(f"{one_line(source)} is not of the form file:///absolute/path")
    return Path(unquote(parts.path))


def shown(url: str) -> str:
    """Return the URL for a message: without a password, and without what follows a '?'.

    >>> shown("https://me:secret@models.example/run?key=1")
    'https://...@models.example/run?...'
    >>> shown("s3://bucket/run")
    's3://bucket/run'
    """
    scheme, _, rest = url.partition("://")
    rest, asked, _ = rest.partition("?")
    host, slash, path = rest.partition("/")
    _, at, host = host.rpartition("@")
    return one_line(
        f"{scheme}://{'...@' if at else ''}{host}{slash}{path}{'?...' if asked else ''}"
    )


def _checked(name: str) -> str:
    for part in name.split("/"):
        files.plain_name(part, "file")
    return name


class LocalPlace:
    """A directory of this machine, or of a file system that is mounted here."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def url(self) -> str:
        """The path of the directory."""
        return str(self._directory)

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return the contents of a file, as `Place.read` does."""
        return files.read_document(self._path(name), most_bytes)

    @contextlib.contextmanager
    def transfer(self, name: str, start: int = 0) -> Iterator[Transfer]:
        """Read a file in pieces, as `Place.transfer` does."""
        path = self._path(name)
        with files.opened(path) as fd, os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            size = os.fstat(fd).st_size
            yield Transfer(file.seek(min(start, size)), size, _pieces(file, path))

    def write(self, name: str, data: bytes | Path) -> None:
        """Write a file in one step: a reader sees the old one or the new one.

        A local file is linked where that can be done: it must never be changed.
        """
        path = self._path(name)
        temporary = path.with_name(f"{files.TEMPORARY}{path.name}")
        with files.naming(path, "cannot write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, Path):
                temporary.unlink(missing_ok=True)
                files.link(data, temporary)
            else:
                files.write_durably(temporary, data)
            os.replace(temporary, path)
            temporary.unlink(missing_ok=True)  # it stays where both are names of one file
            files.sync_directory(path.parent)

    def remove(self, name: str) -> None:
        """Remove a file or a folder, as `Place.remove` does."""
        path = self._path(name)
        with files.naming(path, "cannot remove"):
            files.remove(path)

    def exists(self, name: str) -> bool:
        """Return whether there is a file or a folder with this name."""
        path = self._path(name)
        with files.naming(path, "cannot read"):
            return path.exists()

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, without those of unfinished files."""
        path = self._path(folder)
        with contextlib.suppress(Missing), files.naming(path, "cannot list"):
            return sorted(name for name in os.listdir(path) if not _unfinished(name))
        return []

    def _path(self, name: str) -> Path:
        return self._directory / _checked(name)


def _unfinished(name: str) -> bool:
    return name.startswith(files.TEMPORARY)


class RemotePlace:
    """A place that fsspec opens. Raises `ConfigError` as `open_place` does."""

    def __init__(self, url: str) -> None:
        self._base = urlsplit(url)
        self._scheme = self._base.scheme.lower()
        self._web = self._scheme in _WEB
        self.url = shown(url)
        """The address for messages, without passwords."""
        self._secrets = [part for part in (self._base.query, _userinfo(self._base.netloc)) if part]
        self._files, self._root = _open_file_system(url, self._scheme, self.url)

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return the contents of a file, as `Place.read` does.

        It has half a minute, and a second for each megabyte that it may have.
        """
        seconds = _PATIENCE_SECONDS + most_bytes / 1e6
        deadline = time.monotonic() + seconds
        data = io.BytesIO()
        with self.transfer(name) as transfer:
            if transfer.size is not None and transfer.size > most_bytes:
                raise self._too_large(name, f"{transfer.size:,} bytes", most_bytes)
            for piece in transfer.pieces:
                data.write(piece)
                if data.tell() > most_bytes:
                    raise self._too_large(name, "more", most_bytes)
                if time.monotonic() > deadline:
                    raise Unreachable(
                        f"cannot read {self._shown(name)}: {data.tell():,} bytes came in "
                        f"{seconds:.0f} s"
                    )
        return data.getvalue()

    @contextlib.contextmanager
    def transfer(self, name: str, start: int = 0) -> Iterator[Transfer]:
        """Read a file in pieces, as `Place.transfer` does.

        A web server that ignores ranges sends the file from its beginning.
        """
        with self._naming(name, "read"):
            if self._web:
                file = self._stream(name, start)
            else:
                file = self._files.open(self._path(name), "rb", block_size=_BLOCK_BYTES)
        try:
            with self._naming(name, "read"):
                begun, size = _extent(file.r, start) if self._web else _skip(file, start)
            yield Transfer(begun, size, self._received(name, file))
        finally:
            with contextlib.suppress(Exception):  # what was read is not touched by it
                file.close()

    def write(self, name: str, data: bytes | Path) -> None:
        """Write a file. Object stores show it when all of it is there."""
        self._require_writable()
        with self._naming(name, "write"):
            path = self._path(name)
            if self._scheme in _WITH_FOLDERS:
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(data, Path):
                self._files.put_file(str(data), path)
            else:
                self._files.pipe_file(path, data)

    def remove(self, name: str) -> None:
        """Remove a file or a folder, as `Place.remove` does."""
        self._require_writable()
        with contextlib.suppress(Missing), self._naming(name, "remove"):
            self._files.rm(self._path(name), recursive=True)

    def exists(self, name: str) -> bool:
        """Return whether there is a file or a folder with this name."""
        with contextlib.suppress(Missing):
            if self._web:
                with self.transfer(name):
                    return True
            with self._naming(name, "read"):
                self._files.info(self._path(name))
                return True
        return False

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder. A web server does not list them: `ConfigError`."""
        self._require_writable()
        with contextlib.suppress(Missing), self._naming(folder, "list"):
            found = self._files.ls(self._path(folder), detail=False)
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)
        return []

    def _require_writable(self) -> None:
        if self._web:
            raise ConfigError(f"{self.url} can only be read")

    def _stream(self, name: str, start: int) -> Any:
        """Open one request for all that follows `start`. `block_size=0` reads it as it comes."""
        headers = {**self._files.kwargs.get("headers", {}), **_HEADERS}
        if start:
            headers["Range"] = f"bytes={start}-"
        return self._files.open(self._path(name), "rb", block_size=0, size=1, headers=headers)

    def _received(self, name: str, file: Any) -> Iterator[bytes]:
        began = time.monotonic()
        received = 0
        while True:
            with self._naming(name, "read"):
                piece = file.read(PIECE_BYTES)
            if not piece:
                return
            received += len(piece)
            yield piece
            seconds = time.monotonic() - began
            if seconds > _PATIENCE_SECONDS and received < _SLOWEST_BYTES_PER_SECOND * seconds:
                raise Unreachable(
                    f"cannot read {self._shown(name)}: {received:,} bytes came in {seconds:.0f} s"
                )

    def _path(self, name: str) -> str:
        if not self._web:
            return f"{self._root.rstrip('/')}/{_checked(name)}"
        base = self._base
        path = f"{base.path.rstrip('/')}/{_checked(name)}"
        return urlunsplit((base.scheme, base.netloc, path, base.query, ""))

    def _shown(self, name: str) -> str:
        return f"{self.url.partition('?')[0].rstrip('/')}/{one_line(name)}"

    def _too_large(self, name: str, size: str, most_bytes: int) -> SnapshotError:
        return SnapshotError(
            f"{self._shown(name)} has {size}, and the largest of its kind has {most_bytes:,}"
        )

    @contextlib.contextmanager
    def _naming(self, name: str, what: str) -> Iterator[None]:
        """Turn what a store raises into a `SnapshotError` that names the file."""
        try:
            yield
        except SnapshotError:
            raise
        except FileNotFoundError:
            raise Missing(f"cannot {what} {self._shown(name)}: it is not there") from None
        except Exception as error:  # noqa: BLE001 - each store has errors of its own
            reason = _reason(error)
            for secret in self._secrets:
                reason = reason.replace(secret, "...")
            raise Unreachable(f"cannot {what} {self._shown(name)}: {reason}") from None


def _userinfo(netloc: str) -> str:
    return netloc.rpartition("@")[0]


def _open_file_system(url: str, scheme: str, name: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it. It keeps no listing for later."""
    for package in ("fsspec", _SCHEMES[scheme]):
        if importlib.util.find_spec(package) is None:
            more = "" if package in ("fsspec", "aiohttp") else f" {package}"
            raise ConfigError(
                f"{name} needs {package}, which is not installed here: "
                f"pip install 'stream-ctr[remote]'{more}"
            )
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in _WEB:
        import aiohttp

        options["timeout"] = aiohttp.ClientTimeout(
            total=None,
            connect=_CONNECT_SECONDS,
            sock_connect=_CONNECT_SECONDS,
            sock_read=_SILENT_SECONDS,
        )
    try:
        file_system, root = url_to_fs(url, **options)
    except Exception as error:  # noqa: BLE001 - each store has errors of its own
        raise ConfigError(f"{name} cannot be opened: {_reason(error)}") from None
    return file_system, str(root)


def _extent(response: Any, start: int) -> tuple[int, int | None]:
    """Return where the body of a web server's answer begins, and the size of the whole file."""
    begun = start if start and response.status == 206 else 0
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    length = response.headers.get("Content-Length", "")
    return begun, begun + int(length) if length.isdecimal() and not encoded else None


def _skip(file: Any, start: int) -> tuple[int, int | None]:
    size = getattr(file, "size", None)
    begun = start if size is None else min(start, size)
    file.seek(begun)
    return begun, size


def _reason(error: Exception) -> str:
    """Describe the error of a library in a few words."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP status {status}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = one_line(error, 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _pieces(file: io.FileIO, path: Path) -> Iterator[bytes]:
    while True:
        with files.naming(path, "cannot read"):
            piece = file.read(PIECE_BYTES)
        if not piece:
            return
        yield piece


def download(
    place: Place,
    name: str,
    target: Path,
    *,
    size: int,
    sha256: str,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Write the file `name` of a place to `target`, if it has this size and digest.

    A transfer that breaks off is continued, also with what an earlier call has left at `target`.
    The size is compared before anything is written, and the digest when all of it is there; its
    bytes are on disk when this returns. Raises `SnapshotError`, also once `stopped` returns true;
    what is at `target` then is the beginning of the file or nothing.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            _continue(place, name, target, size, stopped)
            break
        except Unreachable:
            if not tries_left or stopped():
                raise
            time.sleep(_RETRY_SECONDS)
    with files.naming(target, "cannot read"), target.open("rb+") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    if found != sha256:
        target.unlink()
        raise SnapshotError(
            f"{place.url}: {name} has SHA-256 {found}, the manifest says {sha256}: "
            "it was changed, or the transfer damaged it"
        )


def _continue(
    place: Place, name: str, target: Path, size: int, stopped: Callable[[], bool]
) -> None:
    """Append to `target` what it lacks of the file. Raises `Unreachable` if less came."""
    if _size(target) > size:
        target.unlink()
    have = _size(target)
    if have == size and target.exists():
        return
    with place.transfer(name, have) as transfer:
        if transfer.size is not None and transfer.size != size:
            raise SnapshotError(
                f"{place.url}: {name} has {transfer.size:,} bytes, the manifest says {size:,}"
            )
        with files.naming(target, "cannot write"):
            fd = state_files.open_file(target, os.O_WRONLY | os.O_CREAT)
            with open(fd, "wb") as file:  # opened by its descriptor, it is not emptied
                file.truncate(transfer.start)
                file.seek(transfer.start)
                _copy(transfer, file, f"{place.url}: {name}", size, stopped)
    if (have := _size(target)) < size:
        raise Unreachable(f"{place.url}: {name} ended after {have:,} of {size:,} bytes")


def _copy(
    transfer: Transfer, file: IO[bytes], name: str, size: int, stopped: Callable[[], bool]
) -> None:
    have = transfer.start
    for piece in transfer.pieces:
        if stopped():
            raise SnapshotError(f"the transfer of {name} was stopped")
        if have + len(piece) > size:
            raise SnapshotError(f"{name} has more than {size:,} bytes, which the manifest says")
        file.write(piece)
        have += len(piece)


def _size(path: Path) -> int:
    try:
        return path.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def require_space(folder: Path, needed: int) -> None:
    """Raise `SnapshotError` unless so many bytes are free where `folder` is."""
    with files.naming(folder, "cannot write to"):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise SnapshotError(
            f"{folder} has {files.mebibytes(free)} free, and {files.mebibytes(needed)} are needed: "
            "make room, or name another directory"
        )
