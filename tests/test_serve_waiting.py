"""Waiting requests are taken in order, a few together, and no more wait than may."""

from __future__ import annotations

import threading
import time

from support.patience import PATIENCE_SECONDS

from stream_ctr.serve.waiting import Request, WaitingRequests


def request(size: int = 10) -> Request:
    return Request(b"x" * size, False, 0.0, print)


def test_requests_are_taken_in_the_order_of_their_arrival() -> None:
    waiting = WaitingRequests(1000)
    requests = [request() for _ in range(100)]
    assert all(waiting.put(each) for each in requests)
    taken = [waiting.take(), waiting.take()]
    assert [len(each) for each in taken] == [64, 36]
    assert sum(taken, []) == requests


def test_a_large_request_is_taken_alone() -> None:
    waiting = WaitingRequests(10)
    requests = [request(), request(1 << 20), request()]
    for each in requests:
        waiting.put(each)
    assert [waiting.take() for _ in range(3)] == [[each] for each in requests]


def test_a_request_that_is_withdrawn_is_not_taken_and_leaves_its_place() -> None:
    waiting = WaitingRequests(1)
    one, other = request(), request()
    assert waiting.put(one)
    assert not waiting.put(other)
    assert waiting.withdraw(one)
    assert not waiting.withdraw(one)
    assert waiting.put(other)
    assert waiting.take() == [other]
    assert not waiting.withdraw(other)


def test_take_waits_for_a_request_or_for_the_end() -> None:
    waiting = WaitingRequests(1)
    assert waiting.take(0.0) == []
    later = request()
    timer = threading.Timer(0.02, waiting.put, [later])
    timer.start()
    assert waiting.take(PATIENCE_SECONDS) == [later]
    closing = threading.Timer(0.02, waiting.close)
    closing.start()
    began = time.monotonic()
    assert waiting.take(PATIENCE_SECONDS) == []
    assert time.monotonic() - began < PATIENCE_SECONDS
    assert not waiting.put(request())


def test_requests_that_wait_at_the_end_are_still_taken() -> None:
    waiting = WaitingRequests(2)
    last = request()
    waiting.put(last)
    waiting.close()
    assert waiting.full
    assert waiting.take() == [last]
    assert waiting.take() == []
