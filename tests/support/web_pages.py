"""Read an HTML page back, to check what a browser would make of it."""

from __future__ import annotations

import html.parser

SPECIAL = '<script>alert(1)</script> & "quotes" | pipe ` tick *star* ![x](http://x.invalid/y.png)'
"""Text that HTML or Markdown would interpret unless it is escaped."""


class Tags(html.parser.HTMLParser):
    """All tags of a page with their attributes, and all its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
