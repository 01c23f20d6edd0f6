"""Another machine: processes with a network and mounts of their own, joined by one cable.

They share the kernel and the installed programs with this machine. They reach this machine at
`near` and nothing else, and the directories that are `hidden` are empty there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import relay
from support.patience import started
from support.relay import relayed

_HIDE = """
set -e
while [ "$1" != -- ]; do mount -t tmpfs none "$1"; shift; done
shift
exec "$@"
"""


class NoOtherMachine(Exception):
    """There are no namespaces here; the message is the reason to skip."""


class OtherMachine:
    """A network namespace, as a context manager; `command` runs in it, with mounts of its own."""

    def __init__(self, *hidden: Path) -> None:
        self._hidden = hidden
        self._name = f"sctr-{secrets.token_hex(3)}"
        third = secrets.randbelow(250)
        self.near = f"10.213.{third}.1"
        self.far = f"10.213.{third}.2"
        self.near_device = self._name
        self.far_device = f"{self._name}f"

    def __enter__(self) -> OtherMachine:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise NoOtherMachine("only root on Linux makes network namespaces")
        if missing := [each for each in ("ip", "unshare", "mount") if not shutil.which(each)]:
            raise NoOtherMachine(f"there is no command {missing[0]}")
        near, far = self.near_device, self.far_device
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", near, "type", "veth", "peer", "name", far)
            _ip("link", "set", far, "netns", self._name)
            _ip("addr", "add", f"{self.near}/30", "dev", near)
            _ip("link", "set", near, "up")
            _ip("-n", self._name, "addr", "add", f"{self.far}/30", "dev", far)
            _ip("-n", self._name, "link", "set", far, "up")
            _ip("-n", self._name, "link", "set", "lo", "up")
            self.run("true")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise NoOtherMachine(f"no network namespace here: {error.stderr.strip()}") from None
        return self

    def __exit__(self, *_: object) -> None:
        for arguments in (("netns", "del", self._name), ("link", "del", self.near_device)):
            subprocess.run(["ip", *arguments], capture_output=True, check=False)

    def command(self, *arguments: object) -> list[str]:
        """Return the command line that runs a command on the other machine."""
        unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _HIDE, "sh"]
        hidden = [str(path) for path in self._hidden]
        return [
            *("ip", "netns", "exec", self._name),
            *(*unshare, *hidden, "--"),
            *map(str, arguments),
        ]

    def run(self, *arguments: object) -> str:
        """Run a command there, and return what it prints."""
        command = self.command(*arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """Start a command there."""
        return started(subprocess.Popen(self.command(*arguments), text=True, **options))

    @contextlib.contextmanager
    def tunnel(self, port: int) -> Iterator[None]:
        """Let 127.0.0.1:`port` of the other machine lead to the same address of this one.

        A broker names itself by such an address.
        """
        with relayed(self.near, 0, "127.0.0.1", port) as near_port:
            process = self.start(
                *(sys.executable, relay.__file__, "127.0.0.1", port, self.near, near_port),
                stdout=subprocess.PIPE,
            )
            try:
                assert process.stdout
                assert process.stdout.readline() == f"{port}\n"
                yield
            finally:
                process.kill()
                process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
