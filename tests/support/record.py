"""How the measuring scripts print: a table, a block of a page, and the machine and commit that its figures are of."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What decides how fast products are, the widest first: a model's name may not tell.
_INSTRUCTIONS = {
    "amx_bf16": " (AMX)", "avx512_bf16": " (AVX-512, bfloat16)", "avx512f": " (AVX-512)", "avx2": " (AVX2)"
}  # fmt: skip


def formatted(header: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown."""
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows]
    )


def print_table(header: list[str], rows: list[list[object]]) -> None:
    print(formatted(header, rows), end="\n\n", flush=True)


def fill(text: str, name: str, block: str) -> str:
    """A page whose block of that name holds this. Raises `ValueError` when the page has no such block."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)
    if not count:
        raise ValueError(f"the page has no block <!-- {name} -->")
    return filled


def commit() -> str:
    """With "-dirty" where files differ from it, other than the pages that figures are written to."""
    described, changed = (
        subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        for command in (["describe", "--always"], ["status", "--porcelain", "--", ".", ":!docs"])
    )
    return f"{described}-dirty" if changed else described or "unknown"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    flags = told.get("flags", "").split()
    widest = next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), "")
    processor = f"{os.cpu_count()} x {told.get('model name', '?')}{widest}"
    return f"{processor}, Python {platform.python_version()}, commit {commit()}, {time.strftime('%Y-%m-%d')}"
