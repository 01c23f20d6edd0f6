"""Prepare docstrings for the API pages: Griffe calls `DoctestBlocks` for each object it reads.

Docstrings are plain text with backticks. Markdown would take a `>>>` example for a quotation, so
each one becomes a fenced code block.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?m)^( *)>>> .*(?:\n(?!\s*$).*)*")


def fence_examples(text: str) -> str:
    r"""Return `text` with each doctest example in a fenced code block.

    >>> fence_examples("Double.\n\n>>> 1 + 1\n2")
    'Double.\n\n```pycon\n>>> 1 + 1\n2\n```'
    """
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class DoctestBlocks(griffe.Extension):
    """Fence the examples in every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fence_examples(obj.docstring.value)
