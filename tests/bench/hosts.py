"""Two hosts on one machine: a network namespace beside that of this process, and links that limit.

    this process      near  ===== veth =====  far      the other namespace
                      tbf: so many bits a second in each direction; netem: so much delay

The kernel counts the bytes of each end. Both hosts share the processors and the disk.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from support.other_machine import NoOtherMachine, OtherMachine

from bench.environments import NotRun

_BURST_SECONDS = 0.001
_LEAST_BURST = 64 << 10  # bytes: a packet of the largest size that the kernel sends at once
_QUEUE = "50ms"


@dataclass(frozen=True, slots=True)
class Link:
    """The limits of a link: `rate` in bits a second and `delay_ms` each way; 0 is none.

    >>> str(Link()), str(Link(1e9)), str(Link(1e10, 0.1))
    ('not limited', '1 Gbit/s', '10 Gbit/s, 0.1 ms')
    """

    rate: float = 0.0
    delay_ms: float = 0.0

    def __str__(self) -> str:
        words = [f"{self.rate / 1e9:g} Gbit/s"] if self.rate else []
        words += [f"{self.delay_ms:g} ms"] if self.delay_ms else []
        return ", ".join(words) or "not limited"

    def commands(self) -> list[str]:
        """Return the arguments of `tc qdisc add dev DEVICE` that make it.

        >>> Link(1e9).commands()
        ['root handle 1: tbf rate 1000000000bit burst 125000b latency 50ms']
        """
        found = []
        if self.rate:
            burst = max(int(self.rate / 8 * _BURST_SECONDS), _LEAST_BURST)
            found.append(
                f"root handle 1: tbf rate {self.rate:.0f}bit burst {burst}b latency {_QUEUE}"
            )
        if self.delay_ms:
            place = "parent 1:1 handle 10:" if self.rate else "root handle 10:"
            found.append(f"{place} netem delay {self.delay_ms}ms limit 100000")
        return found


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """This host at the address `near`, and another one at `far`."""

    machine: OtherMachine

    @property
    def near(self) -> str:
        """The address of this host."""
        return self.machine.near

    @property
    def devices(self) -> tuple[str, str]:
        """The names of the near and of the far end of the link."""
        return self.machine.near_device, self.machine.far_device

    @property
    def commands(self) -> tuple[list[str], list[str]]:
        """What stands before a command line that is to run on the near host, and on the far one."""
        return [], self.machine.command()

    @contextlib.contextmanager
    def limited(self, link: Link) -> Iterator[None]:
        """Give the link these limits.

        Raises `NotRun` if the kernel cannot.
        """
        ends = list(zip(self.devices, self.commands, strict=True))
        try:
            for device, before in ends:
                for command in link.commands():
                    _add([*before, "tc", "qdisc", "add", "dev", device], command)
            yield
        finally:
            for device, before in ends:
                remove = [*before, "tc", "qdisc", "del", "dev", device, "root"]
                subprocess.run(remove, capture_output=True, check=False)

    def bytes_carried(self) -> int:
        """Return the bytes that the link has carried in both directions."""
        shown = _run(["ip", "-json", "-statistics", "link", "show", self.devices[0]])
        counts = json.loads(shown)[0]["stats64"]
        return int(counts["rx"]["bytes"]) + int(counts["tx"]["bytes"])

    def as_option(self) -> str:
        """Return the interface and the command line before a rank's, of both hosts, as JSON."""
        pairs = zip(self.devices, map(shlex.join, self.commands), strict=True)
        return json.dumps([list(pair) for pair in pairs])


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Yield two hosts. Raises `NotRun` where there can be none."""
    with contextlib.ExitStack() as stack:
        try:
            machine = stack.enter_context(OtherMachine())
            _run(["tc", "-V"])
        except (NoOtherMachine, FileNotFoundError) as error:
            raise NotRun(str(error)) from None
        yield TwoHosts(machine)


def _add(before: list[str], command: str) -> None:
    """Give an end of a link a limit. Raises `NotRun` with the kind of the limit if it cannot."""
    try:
        _run([*before, *command.split()])
    except NotRun as error:
        kind = "netem" if "netem" in command else "tbf"
        raise NotRun(f"{kind} is not in this kernel: {str(error).rpartition(': ')[2]}") from None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NotRun(f"{shlex.join(command)}: {lines[0]}")
    return done.stdout
