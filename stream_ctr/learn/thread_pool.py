"""ThreadPool: threads that share the tasks of a step, each taking the next one when it is done with its last.

Torch's own threads split every single operation and wait for each other after each: on processors that a broker, a baseline or a reader
uses too, each of these waits may last as long as the scheduler lets the other run. Here a lane that is held up takes fewer tasks. What
a task computes does not depend on who runs it, so results are the same for any number of lanes.

>>> pool = ThreadPool(2)
>>> squares = [0] * 5
>>> pool.run([lambda i=i: squares.__setitem__(i, i * i) for i in range(5)])
>>> squares
[0, 1, 4, 9, 16]
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch

Task = Callable[[], object]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of glibc's malloc.h


def set_up_process() -> None:
    """For a process whose main work is to learn: no threads of torch's own, and freed memory is kept, where the allocator is glibc's.

    A step frees tens of megabytes that the next one takes again; what went back to the system in between returns in thousands of faults.
    """
    torch.set_num_threads(1)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(
            _MMAP_THRESHOLD, 1 << 25
        )  # beyond it a block is the system's again when it is freed: copies for snapshots


class ThreadPool:
    """`threads` lanes, the caller's thread being one of them. The others end with this object."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._calls: list[queue.SimpleQueue[_Step | None]] = []
        weakref.finalize(self, _end, self._calls)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run all tasks, begun in this order, and return when all are done. Raises the first exception that one of them raised."""
        step = _Step(tasks)
        for calls in self._others(len(tasks) - 1):
            calls.put(step)
        step.work()
        step.done.wait()
        if step.errors:
            raise step.errors[0]

    def _others(self, wanted: int) -> list[queue.SimpleQueue[_Step | None]]:
        """ThreadPool besides the caller's, begun when there is first something for them to do."""
        while len(self._calls) < min(wanted, self.threads - 1):
            self._calls.append(queue.SimpleQueue())
            threading.Thread(
                target=_lane, args=(self._calls[-1],), name="lane", daemon=True
            ).start()
        return self._calls[: max(wanted, 0)]


class _Step:
    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._next: Iterator[int] = itertools.count()
        self._left = len(tasks)
        self._lock = threading.Lock()
        self.done = threading.Event()
        self.errors: list[BaseException] = []
        if not tasks:
            self.done.set()

    def work(self) -> None:
        while (index := next(self._next)) < len(self._tasks):
            try:
                self._tasks[index]()
            except BaseException as error:  # noqa: BLE001 - raised again by `run`
                self.errors.append(error)
            with self._lock:
                self._left -= 1
                if not self._left:
                    self.done.set()


def _lane(calls: queue.SimpleQueue[_Step | None]) -> None:
    torch.set_num_threads(1)  # of this thread's operations
    while (step := calls.get()) is not None:
        step.work()
        del step  # its tasks hold a batch, and this may be a long wait


def _end(calls: Sequence[queue.SimpleQueue[_Step | None]]) -> None:
    for call in calls:
        call.put(None)
