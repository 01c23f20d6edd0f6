"""Compiling by numba in several processes of tests that share one cache.

In a fresh checkout each of them would compile the same functions, which takes minutes altogether,
and of two that write the index of one function at once, one would lose what it wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher

_held: set[int] = set()
_locks: list[int] = []  # the file whose bytes are the locks of functions


def share_compiling() -> None:
    """Let a function be compiled by one process at a time; the next one finds it in the cache.

    Nor does a tracer, that of coverage, follow the compiler, which it makes twice as slow.
    """
    compile_function = Dispatcher.compile

    def compiled(dispatcher: Any, signature: Any) -> Any:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            with _alone(dispatcher):
                return compile_function(dispatcher, signature)
        finally:
            sys.settrace(trace)

    setattr(Dispatcher, "compile", compiled)  # noqa: B010 - mypy refuses an assignment


@contextlib.contextmanager
def _alone(dispatcher: Any) -> Iterator[None]:
    """Keep other processes from compiling the function.

    Functions that it calls are compiled meanwhile, so that the order of the locks is that of calls,
    which has no circle.
    """
    function = dispatcher.py_func
    name = f"{function.__module__}.{function.__qualname__}"
    lock = zlib.crc32(name.encode())
    # Two threads of a process would wait for each other if one could hold the lock of a function,
    # the other that of the compiler.
    with global_compiler_lock:
        if lock in _held or dispatcher.stats.cache_path is None:
            yield
            return
        _held.add(lock)
        fcntl.lockf(_file(), fcntl.LOCK_EX, 1, lock)
        try:
            yield
        finally:
            fcntl.lockf(_file(), fcntl.LOCK_UN, 1, lock)
            _held.remove(lock)


def _file() -> int:
    if not _locks:
        path = Path(tempfile.gettempdir()) / f"stream-ctr-compiling-{os.getuid()}"
        _locks.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return _locks[0]
