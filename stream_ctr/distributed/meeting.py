"""A meeting place for the ranks of one start.

Ranks exchange their addresses through a store. `torchrun` keeps one store for all of its restarts,
in which a rank could find the address of a process that has ended. So the ranks of a start agree on
a name that no earlier start had, and their keys begin with it:

    rank 0      name = random                      waits for all answers        go = the answers
    the others  answer/name/rank = random    or, if the name was an old one, again with the new name

A rank goes on when `go` has its own answer. That of an earlier start has another one.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import msgspec
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_NAME = "stream_ctr/start"
_LOOK_SECONDS = 0.05


def torchrun_store(rank: int, size: int, *, timeout_seconds: float) -> Store | None:
    """Return the meeting place in the store that torchrun keeps.

    Returns None where rank 0 keeps the store, which is new at each start.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return meeting_place(store, rank, size, timeout_seconds=timeout_seconds)


def meeting_place(store: Store, rank: int, size: int, *, timeout_seconds: float) -> Store:
    """Return a part of the `store` that only the ranks of this start know.

    Every rank calls it. Raises `RuntimeError` if a rank does not come in time.

    >>> from torch.distributed import HashStore
    >>> place = meeting_place(HashStore(), 0, 1, timeout_seconds=1.0)
    >>> place.set("address", "localhost")
    """
    if rank == 0:
        name = secrets.token_hex(8)
        _lead(store, name, size, timeout_seconds)
    else:
        name = _follow(store, rank, time.monotonic() + timeout_seconds)
    return PrefixStore(name, store)


def _lead(store: Store, name: str, size: int, timeout_seconds: float) -> None:
    store.set(_NAME, name)
    answers = [_answer(name, rank) for rank in range(1, size)]
    if answers:
        store.wait(answers, timedelta(seconds=timeout_seconds))
    store.set(_go(name), msgspec.json.encode([store.get(key).decode() for key in answers]).decode())


def _follow(store: Store, rank: int, deadline: float) -> str:
    own = secrets.token_hex(8)
    answered: str | None = None
    while time.monotonic() < deadline:
        name = _value(store, _NAME)
        if name is not None and name != answered:
            store.set(_answer(name, rank), own)
            answered = name
        if answered and (go := _value(store, _go(answered))) is not None:
            answers = msgspec.json.decode(go)
            if rank <= len(answers) and answers[rank - 1] == own:
                return answered
        time.sleep(_LOOK_SECONDS)
    raise RuntimeError("rank 0 did not come")


def _value(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _answer(name: str, rank: int) -> str:
    return f"{_NAME}/{name}/{rank}"


def _go(name: str) -> str:
    return f"{_NAME}/{name}/go"
