"""The Python environments of contenders: that of the package, or a peer's own.

A peer's environment is created when it is first needed. Peers do not share one, because their
pinned versions conflict. Peers are not dependencies of the package, not even optional ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


class NotRun(Exception):
    """A contender cannot run here. The table shows the message as the reason."""


@dataclass(frozen=True, slots=True)
class Own:
    """The environment of this process, with the code of a checkout."""

    checkout: Path = ROOT

    @property
    def directory(self) -> Path:
        """The working directory of its programs; `python -m` in it imports this checkout."""
        return self.checkout

    @property
    def programs(self) -> Path:
        return self.checkout / "tests" / "bench" / "contenders"

    def python(self) -> Path:
        return Path(sys.executable)

    @property
    def variables(self) -> Mapping[str, str]:
        return {"PYTHONPATH": os.pathsep.join((str(self.checkout), str(self.checkout / "tests")))}


@dataclass(frozen=True, slots=True)
class Installed:
    """The virtual environment in the directory that `variable` names."""

    variable: str

    @property
    def directory(self) -> None:
        """Its programs run in the working directory of this process."""
        return None

    def python(self) -> Path:
        """Return its interpreter. Raises `NotRun` if there is none."""
        home = os.environ.get(self.variable)
        if not home:
            raise NotRun(f"{self.variable} names no virtual environment")
        python = Path(home) / "bin" / "python"
        if not python.exists():
            raise NotRun(f"{self.variable}: there is no {python}")
        return python

    @property
    def variables(self) -> Mapping[str, str]:
        return {"PYTHONPATH": ""}


@dataclass(frozen=True, slots=True)
class Peer:
    """A virtual environment in `cache` with these requirements.

    Nothing is installed when it is `offline`.
    """

    name: str
    requirements: tuple[str, ...]
    cache: Path
    offline: bool = False

    @property
    def directory(self) -> None:
        """Its programs run in the working directory of this process."""
        return None

    def python(self) -> Path:
        """Return its interpreter, and create the environment if it is missing or outdated.

        Raises `NotRun` when that fails.
        """
        home = self.cache / self.name
        stamp = home / "requirements.txt"
        wanted = "\n".join(self.requirements)
        python = home / "bin" / "python"
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        if self.offline:
            raise NotRun(
                f"{' '.join(self.requirements)} is not installed in {self.cache}, "
                "and --offline installs nothing"
            )
        _run([sys.executable, "-m", "venv", "--clear", str(home)])
        _run([str(python), "-m", "pip", "install", "--quiet", *self.requirements])
        stamp.write_text(wanted)
        return python

    @property
    def variables(self) -> Mapping[str, str]:
        return {"PYTHONPATH": ""}


Environment = Own | Installed | Peer


def _run(command: list[str]) -> None:
    """Run a command. Raises `NotRun` with its last error when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise NotRun(f"{' '.join(command[1:])} ended with status {done.returncode}: {errors[-1]}")
