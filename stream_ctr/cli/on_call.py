"""A frame of `stream-ctr top`: what a person on call needs first, as high as the terminal allows.

    state, and where the run is seen
    what does not answer or is overdue
    alarms, each since when
    lag, freshness, events/s, pending, dead letters, clicks joined
    snapshots
    models: the rolling window beside the whole run
    the models against the first; counters

The rows from the end are left out until the frame fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from stream_ctr.cli import overview
from stream_ctr.cli.display import (
    STATE_LOOKS,
    comparison_lines,
    counter_words,
    flow,
    plain_signs,
    widest_table,
)
from stream_ctr.cli.overview import Answer, mapping, number

_DASH = "–"
_MOST_REASONS = 3


class OnCall:
    """A frame that draws itself in the space that there is.

    `problem` says why nobody answers now; the answer is then that of `answered_at`. A frame that
    need not fit may be higher than the terminal.
    """

    def __init__(
        self,
        answer: Answer,
        source: str,
        *,
        now: datetime,
        problem: str | None = None,
        answered_at: datetime | None = None,
        fits: bool = True,
    ) -> None:
        self._answer = answer
        self._source = source
        self._now = now
        self._problem = problem
        self._answered_at = answered_at
        self._fits = fits

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.height
        options = options.update(height=None)
        head: list[RenderableType] = [
            *self._state(options.max_width),
            *self._problems(),
            *_alarms(self._answer, self._now),
            Text(),
            _tiles(self._answer, options.max_width),
            *_snapshots(self._answer, self._now),
        ]
        lines = console.render_lines(Group(*head), options, pad=False)
        for body in self._bodies(console, options):
            below = console.render_lines(Group(*body), options, pad=False)
            if not self._fits or len(lines) + len(below) <= height:
                break
        shown = [*lines, *below] if not self._fits else [*lines, *below][:height]
        for line in shown:
            yield from plain_signs(_without_end(line), options)
            yield Segment.line()

    def _bodies(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Sequence[RenderableType]]:
        """Yield what stands below the head, ever shorter."""
        now = self._answer.now
        if not mapping(now, "models"):
            yield []
            return
        full = widest_table(now, console, options)
        table = widest_table(now, console, options, with_served=False)
        compared = list(comparison_lines(now, console, options))
        counts = list(flow(counter_words(now), options.max_width))
        yield [Text(), full, Text(), *compared, Text(), *counts]
        yield [Text(), full, Text(), *compared]
        yield [Text(), table, Text(), *compared]
        yield [Text(), table]
        yield [table]

    def _state(self, width: int) -> Iterator[Text]:
        state = overview.headline(self._answer)
        sign, style = STATE_LOOKS[state.name]
        yield Text.assemble((f"{sign} {state.name}", f"bold {style}"), "  ", state.words)
        pieces = [Text.assemble(("run ", "dim"), (self._answer.run or _DASH)[:8])]
        if self._answer.model:
            pieces.append(Text.assemble(("publishes ", "dim"), self._answer.model))
        if (age := overview.report_age(self._answer, self._now)) is not None:
            pieces.append(Text.assemble(overview.duration(round(age)), (" since report", "dim")))
        pieces.append(Text(self._source, "dim"))
        yield from flow(pieces, width)

    def _problems(self) -> Iterator[Text]:
        if self._problem:
            yield Text(f"✕ {self._problem}", "bold red")
            if self._answered_at:
                age = overview.duration(round((self._now - self._answered_at).total_seconds()))
                yield Text(f"  the figures below are those of {age} ago", "red")
        elif overview.is_overdue(self._answer, self._now):
            age = overview.duration(overview.report_age(self._answer, self._now))
            yield Text(f"▲ the run writes no reports: the newest is {age} old", "bold red")


def _without_end(line: list[Segment]) -> list[Segment]:
    """Return a line without the spaces at its end."""
    line = [*line]
    while line and not line[-1].text.strip():
        line.pop()
    if line:
        line[-1] = line[-1]._replace(text=line[-1].text.rstrip())
    return line


def _alarms(answer: Answer, now: datetime) -> Iterator[Text]:
    for alarm in overview.alarms(answer):
        since = ""
        if alarm.since:
            end = overview.moment(answer.now.get("time")) if answer.ended else now
            seconds = ((end or now) - alarm.since).total_seconds()
            since = f"{overview.duration(max(0, round(seconds)))}  "
        name = alarm.name.replace("_", " ")
        yield Text.assemble((f"▲ {name}  ", "bold red"), (since, "red"), alarm.text)


def _tiles(answer: Answer, width: int) -> Table:
    """Return the key figures, each above its unit, in one row or in two."""
    now = answer.now
    fresh = overview.freshness(now, overview.loaded_snapshot(answer))
    counters = mapping(now, "counters")
    rejected = number(counters.get("rejected"))
    coverage = number(now.get("click_coverage"))
    pending_bytes = number(now.get("pending_bytes"))
    rate = overview.rate(answer)
    tiles = [
        ("lag", _count(now.get("lag")), "records unread", ""),
        ("freshness", overview.duration(fresh.seconds), fresh.words, ""),
        ("events/s", _count(rate), f"{_count(now.get('events'))} read", ""),
        (
            "pending",
            _count(now.get("pending")),
            "impressions" + (f", {overview.bytes_words(pending_bytes)}" if pending_bytes else ""),
            "",
        ),
        ("dead letters", _count(rejected), _reasons(now), "red" if rejected else ""),
        (
            "clicks joined",
            _DASH if coverage is None else f"{coverage:.2%}",
            f"{_count(now.get('clicks_late'))} too late",
            "",
        ),
    ]
    across = len(tiles) if width >= 110 else 3
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(across):
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for first in range(0, len(tiles), across):
        row = tiles[first : first + across]
        table.add_row(
            *(
                Text.assemble((f"{name} ", "dim"), (value, f"bold {style}"), "\n", (about, "dim"))
                for name, value, about, style in row
            )
        )
    return table


def _reasons(now: overview.Report) -> str:
    letters = overview.dead_letters(now)
    if not letters:
        return "malformed records"
    named = [f"{name} {count:,}" for name, count in list(letters.items())[:_MOST_REASONS]]
    return ", ".join([*named, *(["..."] if len(letters) > _MOST_REASONS else [])])


def _snapshots(answer: Answer, now: datetime) -> Iterator[Text]:
    words, is_good = overview.published_words(answer, now)
    yield Text(words, "" if is_good or not answer.now.get("snapshot") else "red")


def _count(value: object) -> str:
    known = number(value)
    return _DASH if known is None else f"{known:,.0f}"
