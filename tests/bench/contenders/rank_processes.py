"""The ranks of a contender: its process is rank 0, and it starts the same program for the others.

The others run on this machine, or each behind a command of its own, such as one that enters another
network namespace. They end with rank 0. This module needs the standard library and torch only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys

import torch
import torch.distributed as dist

_DIE_WITH_PARENT = 1  # prctl(2)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, default=1)
    add("--threads", type=int, default=1, help="of each rank")
    add("--address", default="127.0.0.1", help="of rank 0")
    add(
        "--hosts",
        type=json.loads,
        default=[],
        help='of each rank, as JSON: [["interface", "what stands before its command line"], ...]',
    )


def join(options: argparse.Namespace) -> int:
    """Start the other ranks if this is the first one, join them all, and return this one's rank."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        os.environ["MASTER_PORT"] = str(_free_port(options.address))
    os.environ.update(_variables(options, rank))
    if rank == 0:
        for other in range(1, options.ranks):
            _start(options, other)
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", rank=rank, world_size=options.ranks)
    return rank


def told(number: int) -> int:
    """Return the number of rank 0 on every rank."""
    given = torch.tensor([number])
    dist.broadcast(given, 0)
    return int(given[0])


def _variables(options: argparse.Namespace, rank: int) -> dict[str, str]:
    interface = options.hosts[rank][0] if options.hosts else "lo"
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(options.ranks),
        "LOCAL_WORLD_SIZE": str(options.ranks),
        "MASTER_ADDR": options.address,
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": str(options.threads),
        "MKL_NUM_THREADS": str(options.threads),
    }


def _start(options: argparse.Namespace, rank: int) -> None:
    before = shlex.split(options.hosts[rank][1]) if options.hosts else []
    subprocess.Popen(
        [*before, sys.executable, *sys.argv],
        env={**os.environ, **_variables(options, rank)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _free_port(address: str) -> int:
    with socket.socket() as found:
        found.bind((address, 0))
        port: int = found.getsockname()[1]
        return port
