"""The server of `support.forks`: loads what a run needs, then forks a process for each command.

It has one argument, the number of its end of a socket. A request is one packet of JSON, `module`,
`arguments` and `environment`, with the file descriptors of standard input, output and error. The
answer is the process's number. The process is no child of the server but of the nearest ancestor
that takes orphans in, because the one between them has ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from click.testing import CliRunner

from stream_ctr import failpoint
from stream_ctr.cli.main import main
from stream_ctr.learn import baseline, river_ftrl
from stream_ctr.logs.simulate import Simulation
from support.compiling import share_compiling
from support.lineage import QUICK

MAX_REQUEST = 1 << 20


def warm_up() -> None:
    """Learn from a short log, which imports and loads everything and leaves no thread behind."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log.jsonl"
        Simulation(300, seed=0).write_jsonl(log)
        options = ["run", "--source", str(log), "--state", f"{directory}/state", *QUICK]
        assert CliRunner().invoke(main, options).exit_code == 0
    logging.getLogger().handlers.clear()  # a process sets its own up
    assert threading.active_count() == 1  # a fork has no other


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answer requests. Return None when there are no more, and in a forked process its request."""
    while True:
        packet, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST, 3)
        if not packet:
            return None
        answer, told = os.pipe()
        between = os.fork()
        if between == 0:
            if (forked := os.fork()) != 0:
                os.write(told, b"%d" % forked)
                os._exit(0)
            os.close(answer)
            os.close(told)
            for standard, descriptor in enumerate(descriptors):
                os.dup2(descriptor, standard)
                os.close(descriptor)
            return dict(json.loads(packet))
        os.waitpid(between, 0)
        for descriptor in (told, *descriptors):
            os.close(descriptor)
        with open(answer, "rb") as numbers:
            connection.send(numbers.read())


def run_baseline(arguments: list[str]) -> NoReturn:
    """Run the program of the baseline to its end, which is that of the process."""
    status = 1
    try:
        sys.argv[1:] = arguments
        river_ftrl.main()
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)


class Forked(subprocess.Popen[Any]):
    """The baseline of a command that was forked: a fork of the command."""

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        pipes = rest[9:15]  # see `support.forks`
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(pipes[0], 0)
            os.dup2(pipes[3], 1)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            run_baseline(args[3:])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def begin(request: dict[str, Any]) -> None:
    """Run what `python -m` and the name of the module run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["module"] == river_ftrl.__name__:
        run_baseline(request["arguments"])
    setattr(baseline, "Popen", Forked)  # noqa: B010 - mypy refuses an assignment
    importlib.reload(failpoint)  # its functions, which others have imported, see what is new
    main(request["arguments"], prog_name="stream-ctr")


if __name__ == "__main__":
    share_compiling()
    warm_up()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.closing(socket.socket(fileno=int(sys.argv[1]))) as requests:
        gc.freeze()
        request = serve(requests)
    if request is not None:
        begin(request)
