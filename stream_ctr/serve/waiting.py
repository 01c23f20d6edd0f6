"""Requests that wait for the model, in the order of their arrival, and no more than a few.

The event loop puts them in, and a thread takes them out:

    put        full -> it is refused at once, so the wait stays short for those that are in
    take       the oldest, and those behind it as long as together they are small
    withdraw   its deadline has passed and it was not taken: its place is free again
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from stream_ctr.serve.answers import Answer

_TOGETHER_BYTES = 1 << 17


@dataclass(eq=False, slots=True)
class Request:
    """A request for predictions, and the function that takes its answer.

    `deadline` and `arrived` are seconds of `time.perf_counter`.
    """

    body: bytes
    is_arrow: bool
    deadline: float
    answer: Callable[[Answer], None]
    arrived: float = field(default_factory=time.perf_counter)


class WaitingRequests:
    """A queue of at most `most` requests, of which up to `together` are taken at once.

    >>> waiting = WaitingRequests(1)
    >>> one, other = (Request(b"{}", False, 0.0, print) for _ in range(2))
    >>> waiting.put(one), waiting.put(other)
    (True, False)
    >>> waiting.take() == [one], len(waiting)
    (True, 0)
    """

    def __init__(self, most: int, *, together: int = 64) -> None:
        self.most = most
        self._together = together
        self._requests: deque[Request] = deque()
        self._changed = threading.Condition()
        self.closed = False
        """Whether `close` was called."""

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def full(self) -> bool:
        """Whether one more request would be refused."""
        return len(self._requests) >= self.most or self.closed

    def put(self, request: Request) -> bool:
        """Add a request, unless the queue is full or closed; return whether it was added."""
        with self._changed:
            if self.full:
                return False
            self._requests.append(request)
            self._changed.notify()
            return True

    def take(self, timeout_seconds: float | None = None) -> list[Request]:
        """Wait for requests, and return those to answer together.

        None are returned when the time is up, and when the queue is empty and closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self.closed, timeout_seconds)
            taken: list[Request] = []
            size = 0
            while self._requests and len(taken) < self._together:
                size += len(self._requests[0].body)
                if taken and size > _TOGETHER_BYTES:
                    break
                taken.append(self._requests.popleft())
            return taken

    def withdraw(self, request: Request) -> bool:
        """Remove a request that was not taken; return whether it was still waiting."""
        with self._changed:
            try:
                self._requests.remove(request)
            except ValueError:
                return False
            return True

    def close(self) -> None:
        """Refuse further requests. Those that wait are still taken."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
