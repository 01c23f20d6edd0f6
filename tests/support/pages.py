"""Read the Markdown pages: fenced blocks, the commands in them, inline commands and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(stream-ctr [^`]+)`")
_LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page, which begins at `line`."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[str]:
    """Return the names of the hand-written pages, relative to the repository."""
    roots = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "deploy/README.md"]
    docs = sorted((ROOT / "docs").glob("*.md"))
    return [
        *roots,
        *(str(path.relative_to(ROOT)) for path in docs),
        "docs/paper/README.md",
        "docs/schemas/README.md",
    ]


def read(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page in these languages, all without any."""
    text = read(page)
    found = (
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _BLOCK.finditer(text)
    )
    return [block for block in found if not languages or block.language in languages]


def commands(block: Block) -> list[str]:
    """Return the commands of a shell block, one a line.

    >>> commands(Block("page", 1, "sh", "make test\\n\\nmake lint\\n"))
    ['make test', 'make lint']
    """
    return [line for line in block.text.splitlines() if line]


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return _BLOCK.sub("", read(page))


def inline_commands(page: str) -> Iterator[str]:
    """Yield the `stream-ctr` commands in the prose of a page."""
    yield from _INLINE.findall(re.sub(r"\s*\n\s*", " ", prose(page)))


def links(page: str) -> Iterator[str]:
    """Yield the targets of the links of a page that do not leave the repository."""
    yield from _LINK.findall(prose(page))


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MkDocs spell them."""
    return {anchor(heading) for heading in _HEADING.findall(path.read_text(encoding="utf-8"))}


def anchor(heading: str) -> str:
    """Return the anchor of a heading.

    >>> anchor("GPU: not measured"), anchor("`stream-ctr run`")
    ('gpu-not-measured', 'stream-ctr-run')
    """
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return plain.replace(" ", "-")
