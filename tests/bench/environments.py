"""Where a contender runs: the package's own environment, or one of the peer's own, made when it is first needed.

Peers do not share an environment: what one pins, another forbids. They are no dependencies of the package, not even optional ones.
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
    """A contender cannot run here; the message is the reason that the table gives."""


@dataclass(frozen=True, slots=True)
class Own:
    """The environment that this program runs in."""

    def python(self) -> Path:
        return Path(sys.executable)

    @property
    def variables(self) -> Mapping[str, str]:
        return {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}


@dataclass(frozen=True, slots=True)
class Peer:
    """A virtual environment in `cache` with these requirements."""

    name: str
    requirements: tuple[str, ...]
    cache: Path
    offline: bool = False

    def python(self) -> Path:
        """Its interpreter. Raises `NotRun` when the environment is not there and cannot be made."""
        home = self.cache / self.name
        stamp, wanted = home / "requirements.txt", "\n".join(self.requirements)
        python = home / "bin" / "python"
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        if self.offline:
            raise NotRun(
                f"{' '.join(self.requirements)} is not installed in {self.cache}, and --offline installs nothing"
            )
        _succeed([sys.executable, "-m", "venv", "--clear", str(home)])
        _succeed([str(python), "-m", "pip", "install", "--quiet", *self.requirements])
        stamp.write_text(wanted)
        return python

    @property
    def variables(self) -> Mapping[str, str]:
        return {"PYTHONPATH": ""}


def _succeed(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            or done.stderr.splitlines()
            or ["no message"]
        )
        raise NotRun(f"{' '.join(command[1:])} ended with status {done.returncode}: {errors[-1]}")
