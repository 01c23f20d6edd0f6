"""A small finished run with three snapshots and some dead letters, for tests of commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import pointer_for, write_pointer
from support.commands import succeed

TINY = [
    part
    for pair in (
        "model.hidden=8",
        "model.embedding_dim=4",
        "model.table_bits=10",
        "learn.batch_size=64",
        "learn.threads=1",
        "join.label_window=60s",
        "schedule.snapshot_examples=500",
        "snapshots.keep=10",
        "input.max_bad_share=1",
    )
    for part in ("-X", pair)
]
IMPRESSIONS = 1500
# Malformed records: not text, steering a terminal, turning the writing direction, in two lines,
# and longer than anyone reads.
MALFORMED = [
    b"\xff\x00junk",
    b"\x1b]0;owned\x07\x1b[2Jboo",
    '{"kind": "\u202eimpression"}'.encode(),
    b'{\n"kind": "impression"}',
    b'["' + b"x" * 5000 + b'"]',
]


def write_log(folder: Path) -> Path:
    """Write a log of impressions and clicks."""
    path = folder / "sim.jsonl"
    Simulation(IMPRESSIONS, seed=3).write_jsonl(path)
    return path


def finished_run(log: Path, state: Path) -> Path:
    """Run on the log and on malformed records behind it; return the state directory."""
    malformed = log.with_name("bad.jsonl")
    lines = [value + b"\n" for value in MALFORMED if b"\n" not in value]
    malformed.write_bytes(log.read_bytes() + b"".join(lines))
    succeed("run", "--source", malformed, "--state", state, *TINY)
    return state


def copy_run(state: Path, copy: Path) -> Path:
    """Copy a state directory, and let the pointer name the copy."""
    shutil.copytree(state, copy)
    newest = snapshot.newest(copy / "snapshots")
    assert newest
    write_pointer(copy / "latest.json", pointer_for(newest, snapshot.verify(newest)))
    return copy


def json_lines(*arguments: object) -> list[dict[str, Any]]:
    """Run a command with --json, and parse the lines that it prints."""
    return [json.loads(line) for line in succeed(*arguments, "--json").stdout.splitlines()]
