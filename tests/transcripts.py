"""Run the commands whose output the pages show, and write their output into the pages.

    python tests/transcripts.py             all of them, some minutes on an idle machine
    python tests/transcripts.py demo        one of them

A page shows an output between `<!-- NAME -->` and `<!-- /NAME -->`. `tests/test_docs.py` runs the
same commands with fewer impressions and compares the words.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.record import ROOT, fill, machine


@dataclass(frozen=True, slots=True)
class Transcript:
    """The commands of one shown output.

    Lines that match `left_out` are not shown; lines that match `varies` depend on the machine.
    """

    page: str
    commands: tuple[str, ...]
    left_out: str = r"\Z."
    varies: str = r"\Z."

    def lines(self, output: str) -> list[str]:
        """Return the lines of an output that are shown."""
        found = (line.rstrip() for line in output.strip("\n").splitlines())
        return [
            line for line in found if not (re.match(self.left_out, line) or re.match(_VARIES, line))
        ]


_VARIES = r"report: |note: compiling |note: \d+ loops compiled|(\d{4}-\S+ \S+ )?WARNING "
_SUMMARY_TABLES = r"  \S|\s+whole run"
_SIMULATE = "stream-ctr simulate --impressions {} --seed 1 --out {}"
TRANSCRIPTS = {
    "demo": Transcript(
        "README.md",
        ("stream-ctr demo",),
        left_out=rf"replayed |final: |state: |{_SUMMARY_TABLES}",
    ),
    "several": Transcript(
        "docs/models.md",
        (
            _SIMULATE.format(100_000, "events.jsonl"),
            "stream-ctr run --source events.jsonl --state three"
            " --model deepfm --model fm --model ipnn",
        ),
    ),
    "begin": Transcript(
        "docs/operations.md",
        (
            _SIMULATE.format(20_000, "events.jsonl"),
            "stream-ctr run --source events.jsonl --state first",
            "stream-ctr run --source events.jsonl --from first --state second"
            " --model deepfm --model fm -X model.table_bits=21",
        ),
        left_out=rf"final: |note: |\d{{4}}-|{_SUMMARY_TABLES}",
    ),
    "profile": Transcript(
        "docs/operations.md",
        (
            _SIMULATE.format(300_000, "events.jsonl"),
            "stream-ctr run --source events.jsonl --state profiled --profile"
            " --config configs/demo.toml -X baseline.sample_rate=0.0625",
        ),
        left_out=rf"final: |{_SUMMARY_TABLES}",
        varies=".* is the bound",
    ),
}


def run(command: str, folder: Path) -> str:
    """Run a `stream-ctr` command in `folder` and return what it prints."""
    arguments = [sys.executable, "-m", "stream_ctr", *command.split()[1:]]
    done = subprocess.run(
        arguments,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command} exited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def block(transcript: Transcript, described: str) -> str:
    """Return the block of a page: the commands with their output, and the machine."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "configs").symlink_to(ROOT / "configs")
        for command in transcript.commands:
            lines += [f"$ {command}", *transcript.lines(run(command, Path(folder)))]
    return "\n".join(["```text", *lines, "```", "", f"{described}: `make transcripts`"])


def main(names: Sequence[str]) -> None:
    """Renew the outputs with these names, all without any."""
    described = machine()
    for name in names or TRANSCRIPTS:
        page = ROOT / TRANSCRIPTS[name].page
        page.write_text(fill(page.read_text(), name, block(TRANSCRIPTS[name], described)))


if __name__ == "__main__":
    main(sys.argv[1:])
