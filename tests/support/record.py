"""Output of the measuring scripts: tables, blocks of a page, the machine and the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Processor flags that decide the speed of matrix products, the fastest first. The name of a
# processor often does not show them.
_INSTRUCTIONS = {
    "amx_bf16": " (AMX)",
    "avx512_bf16": " (AVX-512, bfloat16)",
    "avx512f": " (AVX-512)",
    "avx2": " (AVX2)",
}


def formatted(header: list[str], rows: list[list[object]]) -> str:
    """Return a table in Markdown.

    >>> print(formatted(["case", "seconds"], [["one", 1.5]]))
    | case | seconds |
    | --- | --- |
    | one | 1.5 |
    """
    lines: list[list[object]] = [[*header], ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def print_table(header: list[str], rows: list[list[object]]) -> None:
    print(formatted(header, rows), end="\n\n", flush=True)


def fill(text: str, name: str, block: str) -> str:
    """Return the page with this content in the block of that name.

    Raises `ValueError` when the page has no such block.

    >>> fill("<!-- speed -->\\nold\\n<!-- /speed -->", "speed", "new")
    '<!-- speed -->\\nnew\\n<!-- /speed -->'
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)
    if not count:
        raise ValueError(f"the page has no block <!-- {name} -->")
    return filled


def commit() -> str:
    """Return the commit, with "-dirty" if files other than the pages in docs differ from it."""
    described = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--", ".", ":!docs")
    return f"{described}-dirty" if changed else described or "unknown"


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def machine() -> str:
    """Return the processors, the Python version, the commit and the date. Linux only."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = (line.partition(":") for line in lines)
    values = {name.strip(): value.strip() for name, _, value in pairs}
    flags = values.get("flags", "").split()
    widest = next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), "")
    processor = f"{os.cpu_count()} x {values.get('model name', '?')}{widest}"
    date = time.strftime("%Y-%m-%d")
    return f"{processor}, Python {platform.python_version()}, commit {commit()}, {date}"
