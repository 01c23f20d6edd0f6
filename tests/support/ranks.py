"""Functions that run on several ranks at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from stream_ctr.distributed.ranks import LAUNCHED, Ranks
from support.compiling import share_compiling

# On Linux ranks are forked from a process that has imported what they need, which takes seconds.
_CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_CONTEXT.set_forkserver_preload(["stream_ctr.cli.assembly", "stream_ctr.learn.sharded_learner"])


def on_ranks(
    size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 60.0
) -> list[Any]:
    """Return what `work(ranks, *arguments)` returns on each of `size` ranks.

    `work` is a function of a module, and its arguments and results can be pickled. The first
    exception of a rank is raised, with the traceback there as a note.
    """
    port = _free_port()
    with ProcessPoolExecutor(size, mp_context=_CONTEXT) as pool:
        tasks = [
            pool.submit(_run, rank, size, port, timeout, work, arguments) for rank in range(size)
        ]
        return [task.result() for task in tasks]


def _run(
    rank: int, size: int, port: int, timeout: float, work: Callable[..., Any], arguments: Any
) -> Any:
    os.environ.update(
        {
            LAUNCHED: "test",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    share_compiling()
    ranks = Ranks.launched(timeout_seconds=timeout)
    try:
        return work(ranks, *arguments)
    except BaseException as error:
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        ranks.leave()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
