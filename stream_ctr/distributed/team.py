"""The team: rank 0 leads, and the others do the same with what they have.

Every rank has the same objects under the same numbers. Rank 0 announces the next call, and then
makes it on its own object; the others hear of it and make it on theirs. The methods of such objects
are written for all ranks: what rank 0 alone knows is an argument that is absent elsewhere.

    rank 0                                      the others
    team.make("network", spec=...)       ---->  make one too, under the next number
    team.announce(3, "learn", n=512)     ---->  their object 3: learn(n=512)
    its object 3: learn(n=512, ids=...)         <--- exchange arrays --->
    team.close()                         ---->  `follow` returns

So the trainer's loop, which runs on rank 0 only, does not know of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.failpoint import failpoint

Make = Callable[..., Any]
"""Makes an object of a kind, from the ranks and arguments of plain types."""


class Team:
    """The objects that every rank has. `makers` maps kinds of objects to what makes them.

    >>> team = Team(Ranks.alone(), {"list": lambda ranks, *, items: list(items)})
    >>> team.make("list", items=[1, 2])
    (0, [1, 2])
    >>> team.announce(0, "append")  # nobody hears it
    """

    def __init__(
        self,
        ranks: Ranks,
        makers: Mapping[str, Make],
        *,
        beat_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ranks = ranks
        self._makers = makers
        self._objects: list[Any] = []
        self._beat_seconds = beat_seconds
        self._clock = clock
        self._spoken = clock()

    # -- rank 0 ------------------------------------------------------------------------------------

    def make(self, kind: str, **arguments: Any) -> tuple[int, Any]:
        """Make an object on every rank; return its number and that of this rank."""
        self._say(["make", kind, arguments])
        return self._make(kind, arguments)

    def announce(self, number: int, method: str, *others: int, **arguments: Any) -> None:
        """Have the others call this method. The arguments are of plain types, and few.

        The objects with the numbers `others` are its first arguments.
        """
        self._say(["call", number, method, others, arguments])
        failpoint("ranks.announced")

    def beat(self) -> None:
        """Tell the others, now and then, that rank 0 lives though it has nothing for them to do."""
        if self._clock() - self._spoken >= self._beat_seconds:
            self._say(["beat"])

    def close(self) -> None:
        """Let the others end."""
        self._say(["close"])

    def _say(self, command: list[Any]) -> None:
        self.ranks.broadcast_bytes(msgspec.msgpack.encode(command))
        self._spoken = self._clock()

    # -- the other ranks ---------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what rank 0 announces, until it closes the team."""
        while True:
            kind, *rest = msgspec.msgpack.decode(self.ranks.broadcast_bytes())
            if kind == "close":
                return
            if kind == "make":
                self._make(*rest)
            elif kind == "call":
                failpoint("ranks.call")
                number, method, others, arguments = rest
                objects = (self._objects[other] for other in others)
                getattr(self._objects[number], method)(*objects, **arguments)

    def _make(self, kind: str, arguments: Mapping[str, Any]) -> tuple[int, Any]:
        made = self._makers[kind](self.ranks, **arguments)
        self._objects.append(made)
        return len(self._objects) - 1, made
