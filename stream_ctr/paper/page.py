"""A page as a list of blocks, and its two forms: Markdown, for a code host, and HTML, one file that asks for nothing.

The text of a block is plain text. Both forms show it letter by letter, whatever letters they are.

>>> page = [Heading("Scores"), Table("by system", [Column("system", number=False), Column("AUC")], [["FM & co", "0.71"], ["a|b", "0.7"]])]
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
    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """What the reader must not overlook."""

    text: str


@dataclass(frozen=True, slots=True)
class Listing:
    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """Terms, each with what it is here."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Code:
    text: str


@dataclass(frozen=True, slots=True)
class Column:
    """`group` is the heading over neighbouring columns; `quoted`: these numbers are somebody else's."""

    title: str
    group: str = ""
    number: bool = True
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Strong:
    text: str


Cell = str | Strong


@dataclass(frozen=True, slots=True)
class Table:
    """The first cell of each row is its heading."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Picture:
    """`whole` is the SVG of the file `name`; `panels` are its parts, which the HTML puts side by side where there is room."""

    name: str
    caption: str
    whole: str
    panels: Sequence[str]


@dataclass(frozen=True, slots=True)
class Details:
    """Folded away at first."""

    summary: str
    blocks: Sequence[Block] = field(default_factory=list)


Block = Heading | Text | Note | Listing | Facts | Code | Table | Picture | Details


def markdown(blocks: Sequence[Block]) -> str:
    """Pictures are linked as figures/NAME.svg."""
    return "\n".join(_MARKDOWN[type(block)](block) for block in blocks)


def _md(text: str) -> str:
    """What Markdown could take for its own gets a backslash; a line stays a line."""
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
    rows = [
        heads,
        ["--:" if column.number else ":--" for column in table.columns],
        *([_md_cell(cell) for cell in row] for row in table.rows),
    ]
    return f"*{_md(table.caption)}*\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _md_code(code: Code) -> str:
    fence = "`" * (1 + max(2, *(len(run) for run in re.findall("`+", code.text)), 0))
    return f"{fence}\n{code.text}\n{fence}\n"


_MARKDOWN: dict[type, Callable[..., str]] = {
    Heading: lambda block: f"{'#' * block.level} {_md(block.text)}\n",
    Text: lambda block: f"{_md(block.text)}\n",
    Note: lambda block: f"> {_md(block.text)}\n",
    Listing: lambda block: "".join(f"- {_md(item)}\n" for item in block.items),
    Facts: lambda block: "".join(f"- **{_md(term)}**: {_md(says)}\n" for term, says in block.rows),
    Code: _md_code,
    Table: _md_table,
    Picture: lambda block: (
        f"![{_md(block.caption)}](figures/{block.name}.svg)\n\n*{_md(block.caption)}*\n"
    ),
    Details: lambda block: (
        f"<details><summary>{escape(block.summary)}</summary>\n\n{markdown(block.blocks)}\n</details>\n"
    ),
}


def html(title: str, blocks: Sequence[Block]) -> str:
    """The whole file. Its first heading is the title; a policy in it forbids the browser to load or run anything."""
    contents = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(
        f'<li><a href="#{slug(block.text)}">{escape(block.text)}</a></li>' for block in contents
    )
    first = 1 if blocks and isinstance(blocks[0], Heading) and blocks[0].level == 1 else 0
    body = [
        _html(blocks[:first]),
        f"<nav aria-label=Contents><ul>{links}</ul></nav>" if links else "",
        _html(blocks[first:]),
    ]
    return _FRAME.format(title=escape(title), style=_STYLE, body="\n".join(body))


def slug(text: str) -> str:
    """The name that a heading is linked by.

    >>> slug("Figure 7: activation")
    'figure-7-activation'
    """
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def _html(blocks: Iterable[Block]) -> str:
    return "\n".join(_HTML[type(block)](block) for block in blocks)


def _html_table(table: Table) -> str:
    grouped = any(column.group for column in table.columns)
    top = "".join(
        f"<th colspan={len(list(columns))}{' scope=colgroup' if name else ''}>{escape(name)}</th>"
        for name, columns in groupby(table.columns, key=lambda column: column.group)
    )
    heads = "".join(
        f"<th scope=col{_class(column)}>{escape(column.title)}</th>" for column in table.columns
    )
    rows = "\n".join(
        f"<tr>{''.join(_html_cell(*pair, i) for i, pair in enumerate(_pairs(table, row)))}</tr>"
        for row in table.rows
    )
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{escape(table.caption)}"><table>'
        f"<caption><span>{escape(table.caption)}</span></caption>\n"
        f"<thead>{f'<tr class=groups>{top}</tr>' if grouped else ''}<tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _pairs(table: Table, row: Sequence[Cell]) -> Iterable[tuple[Column, Cell]]:
    return zip(table.columns, row, strict=True)


def _html_cell(column: Column, cell: Cell, place: int) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if isinstance(cell, Strong) else escape(cell)
    return f"<th scope=row>{text}</th>" if place == 0 else f"<td{_class(column)}>{text}</td>"


def _class(column: Column) -> str:
    names = [
        name for name, is_so in (("text", not column.number), ("quoted", column.quoted)) if is_so
    ]
    return f' class="{" ".join(names)}"' if names else ""


def _html_picture(picture: Picture) -> str:
    panels = "\n".join(
        _inline(panel, f"{picture.caption} ({i} of {len(picture.panels)})")
        for i, panel in enumerate(picture.panels, 1)
    )
    return f"<figure><div class=panels>\n{panels}</div>\n<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _inline(svg: str, label: str) -> str:
    """It takes the width that there is."""
    sized = re.sub(r'^<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg)
    return sized.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


_HTML: dict[type, Callable[..., str]] = {
    Heading: lambda block: (
        f'<h{block.level} id="{slug(block.text)}">{escape(block.text)}</h{block.level}>'
    ),
    Text: lambda block: f"<p>{escape(block.text)}</p>",
    Note: lambda block: f"<p class=note>{escape(block.text)}</p>",
    Listing: lambda block: (
        "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
    ),
    Facts: lambda block: (
        "<dl>"
        + "".join(f"<dt>{escape(term)}</dt><dd>{escape(says)}</dd>" for term, says in block.rows)
        + "</dl>"
    ),
    Code: lambda block: f"<pre><code>{escape(block.text)}</code></pre>",
    Table: _html_table,
    Picture: _html_picture,
    Details: lambda block: (
        f"<details><summary>{escape(block.summary)}</summary>\n{_html(block.blocks)}\n</details>"
    ),
}

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1e21; --soft: #5c636b; --line: #d9dde2; --quoted: #f4f5f7; --accent: #b34700;
  --link: #00578a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --ink: #e4e6e9; --soft: #a2a9b1; --line: #373d44; --quoted: #1d2125;
  --accent: #ff8f45; --link: #6db9ea; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.15; letter-spacing: -0.015em; margin: 0 0 1rem; text-wrap: balance; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 0.5rem; }
p, ul, dl { max-width: 46rem; margin: 0.75rem 0; }
ul { padding-left: 1.2rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.1rem; list-style: none; margin: 0 0 1.5rem; padding: 0; max-width: none;
  font-size: 0.9rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.35rem 1.25rem; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; }
.note { border-left: 3px solid var(--accent); padding: 0.1rem 0 0.1rem 0.9rem; }
pre { background: var(--quoted); border: 1px solid var(--line); border-radius: 6px; padding: 0.7rem 0.9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; margin: 1rem 0; position: relative; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.9rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.5rem; caption-side: top; }
caption span { display: block; position: sticky; left: 0; max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: 0.32rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; white-space: normal; max-width: 9rem; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink); }
tr.groups th { border-bottom: 0; max-width: none; text-align: left; color: var(--soft); font-weight: 500; padding-bottom: 0; }
th:first-child { text-align: left; padding-left: 0.15rem; position: sticky; left: 0; background: var(--ground); }
tbody th { font-weight: 600; }
td.text, thead th.text { text-align: left; }
td.quoted, thead th.quoted { background: var(--quoted); color: var(--soft); font-style: italic; }
td strong { color: var(--accent); }
figure { margin: 1.25rem 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem 1.5rem; max-width: 68rem; }
.panels svg { width: 100%; height: auto; max-width: 36rem; display: block; }
figcaption { color: var(--soft); font-size: 0.9rem; max-width: 46rem; margin-top: 0.4rem; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--link); font-size: 0.95rem; }
@media (max-width: 50rem) { table { width: max-content; } }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.6rem; } }
@media print {
  :root { color-scheme: light; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --quoted: #f2f2f2; --accent: #8a3600;
    --link: #000; }
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
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
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
