"""A page as a list of blocks, rendered as Markdown for a code host or as one HTML file.

The HTML file loads nothing from outside. The text of a block is plain text: both forms show every
character as it is.

>>> columns = [Column("system", number=False), Column("AUC")]
>>> page = [Heading("Scores"), Table("by system", columns, [["FM & co", "0.71"], ["a|b", "0.7"]])]
>>> print(markdown(page))
## Scores
<BLANKLINE>
*by system*
<BLANKLINE>
| system | AUC |
| :-- | --: |
| FM & co | 0.71 |
| a\\|b | 0.7 |
<BLANKLINE>
>>> "<th scope=row>FM &amp; co</th><td>0.71</td>" in html("Scores", page)
True
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 1 is the title of the page."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """A highlighted paragraph that the reader must not overlook."""

    text: str


@dataclass(frozen=True, slots=True)
class Listing:
    """A bulleted list."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """A list of terms, each with its description."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Code:
    """Text in a fixed-width font."""

    text: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    `group` is the heading above neighbouring columns. `quoted` marks numbers from another source.
    """

    title: str
    group: str = ""
    number: bool = True
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Strong:
    """The text of a cell in bold."""

    text: str


Cell = str | Strong


@dataclass(frozen=True, slots=True)
class Table:
    """A table. The first cell of each row is the heading of the row."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture. `whole` is the SVG of the file `name`.

    `panels` are its parts, which the HTML page puts side by side if the window is wide enough.
    """

    name: str
    caption: str
    whole: str
    panels: Sequence[str]


@dataclass(frozen=True, slots=True)
class Details:
    """Blocks that stay folded until the reader opens them."""

    summary: str
    blocks: Sequence[Block] = field(default_factory=list)


Block = Heading | Text | Note | Listing | Facts | Code | Table | Picture | Details


# -- Markdown ------------------------------------------------------------------------------------


def markdown(blocks: Sequence[Block]) -> str:
    """Return the page as Markdown, with links to pictures at figures/NAME.svg."""
    return "\n".join(_MARKDOWN[type(block)](block) for block in blocks)


def _md(text: str) -> str:
    """Return `text` on one line, with a backslash before everything that Markdown interprets."""
    line = re.sub(
        r"[\\`*_\[\]<>|~$]|&(?=[#\w])|^[-+=#](?=[-+=#\s]|$)", r"\\\g<0>", " ".join(text.split())
    )
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", line)


def _md_cell(cell: Cell) -> str:
    return f"**{_md(cell.text)}**" if isinstance(cell, Strong) else _md(cell)


def _md_table(table: Table) -> str:
    heads = [
        _md(f"{column.group}: {column.title}" if column.group else column.title)
        for column in table.columns
    ]
    alignment = ["--:" if column.number else ":--" for column in table.columns]
    cells = [[_md_cell(cell) for cell in row] for row in table.rows]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in [heads, alignment, *cells])
    return f"*{_md(table.caption)}*\n\n{lines}"


def _md_code(code: Code) -> str:
    longest = max([2, *(len(run) for run in re.findall("`+", code.text))])
    fence = "`" * (longest + 1)
    return f"{fence}\n{code.text}\n{fence}\n"


def _md_picture(picture: Picture) -> str:
    caption = _md(picture.caption)
    return f"![{caption}](figures/{picture.name}.svg)\n\n*{caption}*\n"


def _md_details(details: Details) -> str:
    summary = f"<details><summary>{escape(details.summary)}</summary>"
    return f"{summary}\n\n{markdown(details.blocks)}\n</details>\n"


_MARKDOWN: dict[type, Callable[..., str]] = {
    Heading: lambda block: f"{'#' * block.level} {_md(block.text)}\n",
    Text: lambda block: f"{_md(block.text)}\n",
    Note: lambda block: f"> {_md(block.text)}\n",
    Listing: lambda block: "".join(f"- {_md(item)}\n" for item in block.items),
    Facts: lambda block: "".join(f"- **{_md(term)}**: {_md(text)}\n" for term, text in block.rows),
    Code: _md_code,
    Table: _md_table,
    Picture: _md_picture,
    Details: _md_details,
}


# -- HTML ----------------------------------------------------------------------------------------


def html(title: str, blocks: Sequence[Block]) -> str:
    """Return the page as an HTML file.

    The first heading is the title, and the headings of level 2 make the contents. A content
    security policy in the file forbids the browser to load or run anything.
    """
    chapters = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(
        f'<li><a href="#{slug(block.text)}">{escape(block.text)}</a></li>' for block in chapters
    )
    has_title = bool(blocks) and isinstance(blocks[0], Heading) and blocks[0].level == 1
    first = 1 if has_title else 0
    body = [
        _html(blocks[:first]),
        f"<nav aria-label=Contents><ul>{links}</ul></nav>" if links else "",
        _html(blocks[first:]),
    ]
    return _FRAME.format(title=escape(title), style=_STYLE, body="\n".join(body))


def slug(text: str) -> str:
    """Return the name that links to a heading use.

    >>> slug("Figure 7: activation")
    'figure-7-activation'
    """
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def _html(blocks: Iterable[Block]) -> str:
    return "\n".join(_HTML[type(block)](block) for block in blocks)


def _html_heading(heading: Heading) -> str:
    tag = f"h{heading.level}"
    return f'<{tag} id="{slug(heading.text)}">{escape(heading.text)}</{tag}>'


def _html_listing(listing: Listing) -> str:
    items = "".join(f"<li>{escape(item)}</li>" for item in listing.items)
    return f"<ul>{items}</ul>"


def _html_facts(facts: Facts) -> str:
    rows = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts.rows)
    return f"<dl>{rows}</dl>"


def _html_table(table: Table) -> str:
    heads = "".join(
        f"<th scope=col{_class(column)}>{escape(column.title)}</th>" for column in table.columns
    )
    rows = "\n".join(_html_row(table.columns, row) for row in table.rows)
    caption = escape(table.caption)
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{caption}"><table>'
        f"<caption><span>{caption}</span></caption>\n"
        f"<thead>{_html_groups(table.columns)}<tr>{heads}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _html_groups(columns: Sequence[Column]) -> str:
    """Return the row of headings above groups of columns, empty if there are no groups."""
    if not any(column.group for column in columns):
        return ""
    cells = "".join(
        f"<th colspan={len(list(members))}{' scope=colgroup' if name else ''}>{escape(name)}</th>"
        for name, members in groupby(columns, key=lambda column: column.group)
    )
    return f"<tr class=groups>{cells}</tr>"


def _html_row(columns: Sequence[Column], row: Sequence[Cell]) -> str:
    pairs = enumerate(zip(columns, row, strict=True))
    cells = "".join(_html_cell(column, cell, heads=i == 0) for i, (column, cell) in pairs)
    return f"<tr>{cells}</tr>"


def _html_cell(column: Column, cell: Cell, *, heads: bool) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if isinstance(cell, Strong) else escape(cell)
    return f"<th scope=row>{text}</th>" if heads else f"<td{_class(column)}>{text}</td>"


def _class(column: Column) -> str:
    names = [
        name
        for name, applies in (("text", not column.number), ("quoted", column.quoted))
        if applies
    ]
    return f' class="{" ".join(names)}"' if names else ""


def _html_picture(picture: Picture) -> str:
    panels = "\n".join(
        _inline(panel, f"{picture.caption} ({i} of {len(picture.panels)})")
        for i, panel in enumerate(picture.panels, 1)
    )
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f"<figure><div class=panels>\n{panels}</div>\n{caption}</figure>"


def _inline(svg: str, label: str) -> str:
    """Return the SVG without a size of its own, so that it takes the available width."""
    unsized = re.sub(r'^<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg)
    return unsized.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _html_details(details: Details) -> str:
    summary = f"<summary>{escape(details.summary)}</summary>"
    return f"<details>{summary}\n{_html(details.blocks)}\n</details>"


_HTML: dict[type, Callable[..., str]] = {
    Heading: _html_heading,
    Text: lambda block: f"<p>{escape(block.text)}</p>",
    Note: lambda block: f"<p class=note>{escape(block.text)}</p>",
    Listing: _html_listing,
    Facts: _html_facts,
    Code: lambda block: f"<pre><code>{escape(block.text)}</code></pre>",
    Table: _html_table,
    Picture: _html_picture,
    Details: _html_details,
}

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1e21; --soft: #5c636b;
  --line: #d9dde2; --quoted: #f4f5f7; --accent: #b34700; --link: #00578a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --ink: #e4e6e9; --soft: #a2a9b1;
  --line: #373d44; --quoted: #1d2125; --accent: #ff8f45; --link: #6db9ea; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.15; letter-spacing: -0.015em;
  margin: 0 0 1rem; text-wrap: balance; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 0.75rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 0.5rem; }
p, ul, dl { max-width: 46rem; margin: 0.75rem 0; }
ul { padding-left: 1.2rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.1rem; list-style: none;
  margin: 0 0 1.5rem; padding: 0; max-width: none; font-size: 0.9rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.35rem 1.25rem; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; }
.note { border-left: 3px solid var(--accent); padding: 0.1rem 0 0.1rem 0.9rem; }
pre { background: var(--quoted); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.7rem 0.9rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; margin: 1rem 0; position: relative; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link);
  outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.5rem; caption-side: top; }
caption span { display: block; position: sticky; left: 0;
  max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: 0.32rem 0.6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; white-space: normal; max-width: 9rem; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink); }
tr.groups th { border-bottom: 0; max-width: none; text-align: left; color: var(--soft);
  font-weight: 500; padding-bottom: 0; }
th:first-child { text-align: left; padding-left: 0.15rem; position: sticky; left: 0;
  background: var(--ground); }
tbody th { font-weight: 600; }
td.text, thead th.text { text-align: left; }
td.quoted, thead th.quoted { background: var(--quoted); color: var(--soft); font-style: italic; }
td strong { color: var(--accent); }
figure { margin: 1.25rem 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: 1rem 1.5rem; max-width: 68rem; }
.panels svg { width: 100%; height: auto; max-width: 36rem; display: block; }
figcaption { color: var(--soft); font-size: 0.9rem; max-width: 46rem; margin-top: 0.4rem; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--link); font-size: 0.95rem; }
@media (max-width: 50rem) { table { width: max-content; } }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.6rem; } }
@media print {
  :root { color-scheme: light; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb;
    --quoted: #f2f2f2; --accent: #8a3600; --link: #000; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  h2, h2 + p { break-after: avoid; }
  h2 { margin-top: 1.5rem; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: 0.2rem 0.4rem; }
  figure, table, .note { break-inside: avoid; }
  .panels { grid-template-columns: 1fr 1fr; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
}
"""

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
