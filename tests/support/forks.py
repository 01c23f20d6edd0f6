"""Commands of stream-ctr in processes of their own that start in a fraction of a second.

A process that starts by itself spends seconds of processor time before it reads anything: it
imports modules and loads compiled code. `start` forks one from a server that has all of that. It is
a process like any other: it can be killed, stopped and waited for, and has a failpoint of its own.
Elsewhere than on Linux a command starts by itself.

`Process` is `subprocess.Popen` for `python -m stream_ctr` and for the program of the baseline.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SET_CHILD_SUBREAPER = 36  # prctl(2): orphans among the descendants become children
_ONE_AT_A_TIME = threading.Lock()


def start(
    *arguments: object, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start `stream-ctr` with these arguments; `options` are those of `subprocess.Popen`."""
    command = [sys.executable, "-m", "stream_ctr", *map(str, arguments)]
    return Process(command, env=env, **options)


def run(
    *arguments: object, env: Mapping[str, str] | None = None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `stream-ctr` with these arguments to its end, and return what it wrote."""
    pipe = subprocess.PIPE
    with start(*arguments, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


class _Forked(subprocess.Popen[Any]):
    """A process that the server forks."""

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        # What the method that this replaces is given from Python 3.11 on.
        _, _, _, _, _, environment, _, _, _, *pipes = rest[:15]
        read, _, _, write, _, write_errors = pipes
        standard = [
            number if pipe == -1 else pipe
            for number, pipe in enumerate((read, write, write_errors))
        ]
        request = {
            "module": args[2],
            "arguments": args[3:],
            "environment": dict(environment or os.environ),
        }
        with _ONE_AT_A_TIME:
            connection = _server()
            take_orphans_in(True)
            try:
                socket.send_fds(connection, [json.dumps(request).encode()], standard)
                self.pid = int(connection.recv(100))
            finally:
                take_orphans_in(False)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


Process = _Forked if sys.platform == "linux" else subprocess.Popen


def take_orphans_in(yes: bool) -> None:
    assert ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) == 0


@functools.cache
def _server() -> socket.socket:
    """Return the connection to the server, which ends with this process."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen(
        [sys.executable, "-m", "support.fork_server", str(its.fileno())],
        cwd=Path(__file__).parents[1],
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    its.close()
    return ours
