"""Memory for tables: zeros that take memory only where they are written."""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np
import numpy.typing as npt

_FLOAT_BYTES = 4
_OWN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# A system refuses more than it has, unless nothing is reserved. Not every system has this.
_UNRESERVED = getattr(mmap, "MAP_NORESERVE", 0)


def zeros(*shape: int, sparse: bool = False) -> npt.NDArray[np.float32]:
    """Return float32 zeros of this shape, at the start of a page.

    They lie in large pages where the system has them: rows are read at random, and a processor
    caches the addresses of few small pages. If few of the rows will be written, small pages take
    less memory: `sparse`. Raises `MemoryError` if there is no memory.

    >>> zeros(4, 16).shape
    (4, 16)
    """
    # Shared memory would get small pages.
    flags = _OWN | _UNRESERVED if sparse else _OWN
    try:
        memory = mmap.mmap(-1, _FLOAT_BYTES * math.prod(shape), flags=flags)
    except (OSError, OverflowError) as reason:
        raise MemoryError(f"no memory for {math.prod(shape):,} numbers of float32") from reason
    with contextlib.suppress(AttributeError, OSError):  # not every system has large pages
        memory.madvise(mmap.MADV_NOHUGEPAGE if sparse else mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)
