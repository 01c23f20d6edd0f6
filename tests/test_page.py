"""Tests of `stream_ctr.paper.page`: blocks as Markdown and as HTML."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt  # comes with rich
from support.web_pages import SPECIAL, Tags

from stream_ctr.paper.page import (
    Block,
    Code,
    Column,
    Details,
    Facts,
    Heading,
    Listing,
    Note,
    Picture,
    Strong,
    Table,
    Text,
    html,
    markdown,
)

_TABLE = Table(SPECIAL, [Column(SPECIAL, SPECIAL), Column("b", "c")], [[SPECIAL, Strong(SPECIAL)]])
EVERY_BLOCK: list[Block] = [
    Heading(SPECIAL, 1),
    Heading(SPECIAL),
    Text(SPECIAL),
    Note(SPECIAL),
    Listing([SPECIAL]),
    Facts([(SPECIAL, SPECIAL)]),
    Code(SPECIAL),
    Details(SPECIAL, [_TABLE]),
    Picture("x", SPECIAL, "<svg></svg>", ["<svg></svg>"]),
]


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_every_block_shows_its_text_as_it_is(form: str) -> None:
    is_html = form == "html"
    rendered = MarkdownIt("commonmark").enable("table").render(markdown(EVERY_BLOCK))
    page = Tags(html(SPECIAL, EVERY_BLOCK) if is_html else rendered)
    assert page.text.count(SPECIAL) >= (14 if is_html else 13)
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert pictures == ([] if is_html else ["figures/x.svg"])
    assert not {"script", "iframe"} & {tag for tag, _ in page.tags}
    cells = [tag for tag, _ in page.tags if tag in ("th", "td")]
    assert len(cells) == (6 if is_html else 4)


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "+ a",
        "1. a",
        "12) a",
        "# a",
        "=== a",
        "---",
        "> a",
        "a  b",
        "~~a~~",
        "a_b_c",
        "&amp; a",
        "$a$",
    ],
)
def test_markdown_does_not_interpret_a_line_of_text(text: str) -> None:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = Tags(parser.render(markdown([Text(text)])))
    assert [tag for tag, _ in page.tags] == ["p"]
    assert page.text.split() == text.split()


def test_a_code_fence_is_longer_than_the_ticks_within() -> None:
    assert markdown([Code("echo ````")]) == "`````\necho ````\n`````\n"
