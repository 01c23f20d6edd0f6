"""Runs on several ranks: started by `torchrun`, or forked, which takes a fraction of the time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stream_ctr.distributed.ranks import LAUNCHED
from support import forks
from support.patience import PATIENCE_SECONDS, started


class RankRun:
    """`stream-ctr` with these arguments on `size` ranks of this machine, each forked.

    The ranks find each other through the variables that torchrun sets. What they write goes into
    `directory`. `apart` are further arguments of single ranks.
    """

    def __init__(
        self,
        directory: Path,
        size: int,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        apart: Mapping[int, list[str]] | None = None,
    ) -> None:
        directory.mkdir(exist_ok=True)
        port = str(free_port())
        self.output, self.errors = (
            [directory / f"rank-{rank}-of-{size}.{kind}.log" for rank in range(size)]
            for kind in ("output", "errors")
        )
        self.processes: list[subprocess.Popen[Any]] = []
        for rank in range(size):
            with self.output[rank].open("wb") as output, self.errors[rank].open("wb") as errors:
                process = forks.start(
                    *arguments,
                    *(apart or {}).get(rank, ()),
                    env={**os.environ, **launched_as(rank, size, port), **(env or {})},
                    stdout=output,
                    stderr=errors,
                )
            self.processes.append(started(process))

    def wait(self) -> list[int]:
        """Return the exit codes of all ranks."""
        return [process.wait(PATIENCE_SECONDS) for process in self.processes]

    def said(self, rank: int) -> str:
        """Return what a rank has written to standard error so far."""
        return self.errors[rank].read_text()


def launched_as(rank: int, size: int, port: str, *, hosts: int = 1) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank, with so many ranks on each host."""
    local = size // hosts
    return {
        LAUNCHED: "test",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_RANK": str(rank // local),
        "GROUP_WORLD_SIZE": str(hosts),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }


def run_on_ranks(
    directory: Path, size: int, *arguments: object, env: Mapping[str, str] | None = None
) -> RankRun:
    """Run `stream-ctr` on forked ranks to the end, which must be good."""
    run = RankRun(directory, size, *arguments, env=env)
    codes = run.wait()
    assert codes == [0] * size, [run.said(rank) for rank in range(size)]
    return run


def torchrun(
    size: int,
    *arguments: object,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    **others: Any,
) -> subprocess.Popen[str]:
    """Start `torchrun -m stream_ctr` with these arguments."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    command += [*options, "-m", "stream_ctr", *map(str, arguments)]
    return started(
        subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **others,
        )
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
