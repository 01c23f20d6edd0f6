"""The files in deploy/, and the tools that check them where they are installed."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from stream_ctr.cli.main import main
from stream_ctr.config import Config, size
from stream_ctr.learn.spec import EXPERTS, LearnerSpec, Pairs
from stream_ctr.learn.table import FLOAT_BYTES
from stream_ctr.learn.table_kernels import row_floats

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

SLOW_DISK = 20_000_000
"""Bytes a second: a disk that is slower than any that should hold a state directory."""


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def instructions(name: str) -> list[str]:
    """Return the arguments of each `name` instruction of the Dockerfile."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


def image_user() -> int:
    """Return the id of the user that the image runs as, and that owns its folders."""
    [uid] = re.findall(r"useradd .*--uid (\d+)", " ".join(instructions("RUN")))
    return int(uid)


def health_check(url: str) -> int:
    """Run the health check of the image with this interpreter, and return its exit code."""
    [line] = instructions("HEALTHCHECK")
    program, *arguments = json.loads(line[line.index("[") :])
    assert program == "python"
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={"HEALTH_URL": url}, capture_output=True).returncode


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the options of a command of `stream-ctr` by name, parsed as the command line does.

    Nothing runs. The name of `--http-token-file` is "http_token_file". Raises `click.UsageError`
    for an option that does not exist.
    """
    name, *options = words
    assert name in main.commands, f"there is no command {name}"
    command: click.Command = main.commands[name]
    values = command.make_context(name, list(options)).params
    return {
        max(option.opts, key=len).lstrip("-").replace("-", "_"): values[str(option.name)]
        for option in command.params
        if option.name in values
    }


def snapshot_bytes() -> int:
    """Return the largest size of a snapshot with the default configuration, but for old weights.

    All memory of the join and all rows of the logistic regressions are counted as full.
    """
    network = LearnerSpec(fields=40)
    table = (1 << network.table_bits) * FLOAT_BYTES * row_floats(network.embedding_dim)
    row_of_ftrl = 2 * 8 + 4  # z, n and the number of the row
    rows = sum(
        1 << (Pairs(columns=((0, 0),)).table_bits if "pairs" in name else network.table_bits)
        for name in EXPERTS
    )
    return table + row_of_ftrl * rows + size(Config().join.max_memory)


def seconds_for_a_snapshot() -> float:
    """Return a time in which a trainer finishes its batch and writes a snapshot to a slow disk."""
    return 1.5 * snapshot_bytes() / SLOW_DISK


def require_tool(name: str, where: str) -> str:
    """Return the path of a program, or skip the test."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name) or (str(beside) if beside.exists() else None)
    if found is None:
        pytest.skip(f"{name} is not installed ({where})")
    return found


def require_module(name: str) -> None:
    """Skip the test unless the module is installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install {name.replace('_', '-')}")


def checked(*command: object) -> str:
    """Run a tool and return its output; the test fails with it if the tool finds something."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output
