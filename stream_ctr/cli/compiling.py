"""The compilation of the loops, which a first start on a machine waits for, is announced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

from stream_ctr.cli import voice


@contextmanager
def announcing_compilation(
    say: Callable[[str], None] = voice.say,
    *,
    every_seconds: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Say once that the loops are compiled, if they are, and now and then how many are done.

    numba compiles a loop when it is first called, and keeps it in a cache on disk. So this happens
    at the first start on a machine, and after an update.
    """

    class Listener(event.Listener):  # type: ignore[misc]
        """Counts what is compiled and is not in the cache."""

        def __init__(self) -> None:
            self.compiled = 0
            self.began: float | None = None
            self.said = 0.0

        def on_start(self, event: Any) -> None:
            if self.began is None:
                self.began = self.said = clock()
                say("note: compiling the loops for this machine, once; it takes about 20 s")

        def on_end(self, event: Any) -> None:
            self.compiled += 1
            now = clock()
            if self.began is not None and now - self.said >= every_seconds:
                self.said = now
                say(f"note: {self.compiled} loops compiled in {now - self.began:.0f} s")

    listener = Listener()
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
