"""A pool of threads that share the tasks of a step.

A thread takes the next task when it has finished its last one. Torch's own threads instead split
every single operation and wait for each other after each: on processors that a broker, a baseline
or a reader uses too, each of these waits may last as long as the scheduler lets the other process
run. Here a thread that is held up takes fewer tasks. The result of a task does not depend on the
thread that runs it, so results are the same for any number of threads.

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

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_TRIM_BYTES = 1 << 30
# A larger block, such as a copy for a snapshot, goes back to the system when it is freed.
_MMAP_BYTES = 1 << 25


def set_up_process() -> None:
    """Prepare a process whose main work is learning.

    Torch gets no threads of its own. Where the allocator is glibc's, it keeps freed memory: a step
    frees tens of megabytes that the next one takes again, and memory that went back to the system
    in between returns in thousands of page faults.
    """
    torch.set_num_threads(1)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


class ThreadPool:
    """`threads` threads, of which the caller's is one. The others end with this object.

    Several threads may call `run`; they share the others.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._queues: list[queue.SimpleQueue[_Run | None]] = []
        weakref.finalize(self, _stop, self._queues)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run all tasks, started in this order, and return when all are done.

        Raises the first exception that a task raised, after the other tasks are done.
        """
        run = _Run(tasks)
        for waiting in self._helpers(len(tasks) - 1):
            waiting.put(run)
        run.work()
        run.done.wait()
        run.tasks = ()  # a thread that wakes up late must not keep what they hold
        if run.errors:
            raise run.errors[0]

    def _helpers(self, wanted: int) -> list[queue.SimpleQueue[_Run | None]]:
        """Return the queues of up to `wanted` threads besides the caller's; start missing ones."""
        with self._lock:
            while len(self._queues) < min(wanted, self.threads - 1):
                self._queues.append(queue.SimpleQueue())
                threading.Thread(
                    target=_serve, args=(self._queues[-1],), name="learner", daemon=True
                ).start()
        return self._queues[: max(wanted, 0)]


class _Run:
    """The tasks of one call of `run`."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self._next: Iterator[int] = itertools.count()
        self._unfinished = len(tasks)
        self._lock = threading.Lock()
        self.done = threading.Event()
        self.errors: list[BaseException] = []
        if not tasks:
            self.done.set()

    def work(self) -> None:
        """Run tasks until none is left to start."""
        while (index := next(self._next)) < len(self.tasks):
            try:
                self.tasks[index]()
            except BaseException as error:  # noqa: BLE001 - raised again by `ThreadPool.run`
                self.errors.append(error)
            with self._lock:
                self._unfinished -= 1
                if not self._unfinished:
                    self.done.set()


def _serve(runs: queue.SimpleQueue[_Run | None]) -> None:
    torch.set_num_threads(1)  # for the operations of this thread
    while (run := runs.get()) is not None:
        run.work()
        del run  # its tasks hold a batch, and the next run may be far away


def _stop(queues: Sequence[queue.SimpleQueue[_Run | None]]) -> None:
    for waiting in queues:
        waiting.put(None)
