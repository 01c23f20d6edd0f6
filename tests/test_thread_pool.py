"""Threads that share tasks: every task runs once, and an error reaches the caller."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
from support.patience import wait_until

from stream_ctr.learn.thread_pool import ThreadPool


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_every_task_runs_exactly_once(threads: int, count: int) -> None:
    ran: list[int] = []
    pool = ThreadPool(threads)
    for _ in range(3):
        ran.clear()
        pool.run([partial(ran.append, index) for index in range(count)])
        assert sorted(ran) == list(range(count))


def test_one_thread_runs_the_tasks_in_order_in_the_callers_thread() -> None:
    ran: list[tuple[int, int]] = []

    def note(index: int) -> None:
        ran.append((index, threading.get_ident()))

    ThreadPool(1).run([partial(note, index) for index in range(5)])
    assert ran == [(i, threading.get_ident()) for i in range(5)]


def test_two_threads_work_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=60)
    ThreadPool(2).run([both.wait, both.wait])  # either alone would wait in vain


def test_the_first_error_is_raised_once_all_tasks_are_done() -> None:
    ran: list[int] = []

    def task(index: int) -> Callable[[], None]:
        def run() -> None:
            ran.append(index)
            if index == 1:
                raise ValueError("task 1")

        return run

    pool = ThreadPool(2)
    with pytest.raises(ValueError, match="task 1"):
        pool.run([task(index) for index in range(6)])
    assert sorted(ran) == list(range(6))
    pool.run([task(0)])  # it goes on after an error
    assert ran[-1] == 0


def test_a_run_that_is_over_keeps_nothing_of_its_tasks() -> None:
    class Held:
        def work(self) -> None: ...

    pool = ThreadPool(3)
    for _ in range(300):  # a thread may wake up late
        held = Held()
        pool.run([held.work] * 3)
        gone = weakref.ref(held)
        del held
        assert gone() is None


def test_several_threads_may_run_tasks_at_once() -> None:
    pool = ThreadPool(4)
    totals: list[int] = []

    def run() -> None:
        for _ in range(50):
            ran: list[int] = []
            pool.run([partial(ran.append, index) for index in range(5)])
            totals.append(sum(ran))

    callers = [threading.Thread(target=run) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert totals == [10] * 200


def test_the_threads_end_with_the_pool() -> None:
    before = set(threading.enumerate())
    pool = ThreadPool(3)
    pool.run([lambda: None] * 6)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del pool
    gc.collect()
    wait_until(lambda: not any(thread.is_alive() for thread in started))
