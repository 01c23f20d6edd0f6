"""Runs of `stream-ctr run`, in one process or on ranks by `torchrun`, and their figures."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from support.lineage import last_report, newest

from bench.environments import ROOT, NotRun
from bench.hosts import TwoHosts
from stream_ctr.connectors.embedded import dies_with_parent, free_port

Result = dict[str, Any]
WAIT_SECONDS = 7200.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of a run, and the digests that must be equal for any number of ranks."""

    examples: int
    examples_per_second: float
    weights_sha256: str
    ledger: tuple[int, int]
    profile: Mapping[str, Any] = field(default_factory=dict)

    @property
    def same(self) -> tuple[str, int, int]:
        """What equal runs share."""
        return self.weights_sha256, *self.ledger

    def as_json(self) -> Result:
        return asdict(self)


def figures(state: Path) -> Run:
    """Return the figures of the finished run in a state directory."""
    found = newest(state)
    assert found, f"there is no snapshot in {state}"
    report = last_report(state)
    share = report["examples"] / max(report["events"], 1)
    return Run(
        examples=report["examples"],
        examples_per_second=report["events_per_second"] * share,
        weights_sha256=found.weights_sha256,
        ledger=found.ledger,
        profile=report["profile"],
    )


def command_of(
    ranks: int,
    arguments: Sequence[object],
    *,
    host: int = 0,
    hosts: TwoHosts | None = None,
    port: int = 0,
) -> list[str]:
    """Return the command line of a run; 0 ranks are one process without `torchrun`.

    With `hosts`, it is the command line on host 0 or 1, each of which has one rank.

    >>> command_of(0, ["run"])[1:]
    ['-m', 'stream_ctr', 'run']
    >>> command_of(2, ["run"])[1:]
    ... # doctest: +NORMALIZE_WHITESPACE
    ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'stream_ctr',
     'run']
    """
    program = ["-m", "stream_ctr", *map(str, arguments)]
    if not ranks:
        return [sys.executable, *program]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    if hosts is None:
        return [*launcher, "--standalone", "--nproc-per-node", str(ranks), *program]
    address = ["--master-addr", hosts.near, "--master-port", str(port)]
    place = ["--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "1", *address]
    return [*hosts.commands[host], *launcher, *place, *program]


def run(
    ranks: int,
    state: Path,
    arguments: Sequence[object],
    *,
    hosts: TwoHosts | None = None,
    environment: Mapping[str, str] | None = None,
    status: int = 0,
) -> None:
    """Run to the end. Raises `NotRun` with the last message unless it ends with `status`."""
    options = ["run", "--state", state, *arguments]
    with started(ranks, options, hosts=hosts, environment=environment) as processes:
        for process in in_order_of_their_ends(processes):
            if process.popen.returncode != status:
                ended = f"{described(ranks)} ended with status {process.popen.returncode}"
                raise NotRun(f"{ended}: {process.message()}")


def in_order_of_their_ends(processes: Sequence[Process]) -> Iterator[Process]:
    """Yield each process once it has ended; one that fails would leave the others waiting."""
    running = list(processes)
    while running:
        for process in [each for each in running if each.popen.poll() is not None]:
            running.remove(process)
            yield process
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a run, and the file of what it prints as errors."""

    popen: subprocess.Popen[bytes]
    errors: IO[str]

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        return self.popen.wait(WAIT_SECONDS)

    def message(self) -> str:
        """Return the last line that begins with "error:", else the last line."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        named = [line for line in lines if line.lower().startswith("error:")]
        return (named or lines or ["no message"])[-1]

    def end(self) -> None:
        self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(STOP_SECONDS)
        self.popen.kill()
        self.popen.wait()


@contextlib.contextmanager
def started(
    ranks: int,
    arguments: Sequence[object],
    *,
    hosts: TwoHosts | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[Process]]:
    """Start a run, yield its processes (one on each host), and end them if they still run."""
    port = free_port() if hosts else 0
    with contextlib.ExitStack() as stack:
        processes = []
        for host in range(2 if hosts else 1):
            variables = {**os.environ, **(environment or {})}
            if hosts:
                variables["GLOO_SOCKET_IFNAME"] = hosts.devices[host]
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            popen = subprocess.Popen(
                dies_with_parent(
                    absolute(command_of(ranks, arguments, host=host, hosts=hosts, port=port))
                ),
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            processes.append(Process(popen, errors))
            stack.callback(processes[-1].end)
        yield processes


def absolute(command: Sequence[str]) -> list[str]:
    """Return the command line with the path of its program.

    >>> absolute(["sh", "-c", "true"])[0].endswith("/sh")
    True
    """
    return [shutil.which(command[0]) or command[0], *command[1:]]


@contextlib.contextmanager
def new_state(directory: Path) -> Iterator[Path]:
    """Yield the path of a state directory that is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        yield Path(name) / "state"


def described(ranks: int) -> str:
    """Return how many processes a run has.

    >>> described(0), described(1), described(2)
    ('one process', '1 rank', '2 ranks')
    """
    if not ranks:
        return "one process"
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def require_same(runs: Mapping[str, Run], where: str) -> None:
    """Raise `RuntimeError` with all digests unless the runs end with the same model and ledger."""
    if len({each.same for each in runs.values()}) > 1:
        digests = "; ".join(f"{name}: {each.same}" for name, each in runs.items())
        raise RuntimeError(f"{where}: weights or ledgers differ: {digests}")
