"""A process that torchrun has started, as a command sees it before it imports torch.

`torchrun` starts the same command several times, and exits with 1 if one of them fails. Of the
processes on a machine one shows an error that all have. Its message goes into the error file of
torchrun too, which prints it last, with the exit code.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import time
from collections.abc import Mapping

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""The variable that torchrun sets in the processes that it starts."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun started this process.

    >>> by_torchrun({"RANK": "1"})
    False
    """
    return LAUNCHED in environ


def number(name: str, environ: Mapping[str, str] = os.environ) -> int:
    """Return a number that torchrun gives this process; without torchrun that of a single one.

    >>> number("WORLD_SIZE", {}), number("RANK", {LAUNCHED: "x", "RANK": "3"})
    (1, 3)
    """
    text = environ.get(name) if by_torchrun(environ) else None
    return int(text) if text else int(name.endswith("SIZE"))


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process shows what all processes of its machine would show.

    >>> speaks({}), speaks({LAUNCHED: "x", "RANK": "1", "LOCAL_RANK": "1"})
    (True, False)
    """
    return number("LOCAL_RANK", environ) == 0


def private(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the processes meet on this machine only.

    >>> private({LAUNCHED: "x", "MASTER_ADDR": "10.0.0.1", "GROUP_WORLD_SIZE": "2"})
    False
    """
    address = environ.get("MASTER_ADDR", "localhost")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost" or number("GROUP_WORLD_SIZE", environ) == 1


def threads_of_a_rank(cores: int, environ: Mapping[str, str] = os.environ) -> int:
    """Return the threads of a process that shares the cores of its machine with the others.

    torchrun sets OMP_NUM_THREADS to 1, which is not meant for these.

    >>> threads_of_a_rank(16, {LAUNCHED: "x", "LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"})
    5
    """
    return max(cores // number("LOCAL_WORLD_SIZE", environ), 1)


def record_error(message: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write the error that ends this process where torchrun looks for it."""
    path = environ.get(_ERROR_FILE)
    if not path or not by_torchrun(environ):
        return
    shown = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": shown}, file)
