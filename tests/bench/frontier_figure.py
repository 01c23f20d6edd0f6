"""The figure of `frontier`: logloss against events/s, a panel for each log, as an SVG file.

Matplotlib writes the same bytes for the same figures.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from bench.frontier_page import DEFAULTS, ONE_STEP, Case, Group, groups

_COLUMNS = 3
_PANEL_INCHES = (4.2, 3.3)
_LEGEND_INCHES = 1.1
_LINEAR_TO = 0.002  # the vertical axis is linear up to here, and logarithmic beyond
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "frontier",
    "font.family": "DejaVu Sans",  # comes with Matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
_NO_METADATA: dict[str, Any] = {"Creator": None, "Date": None, "Format": None, "Type": None}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_OURS = "#d55e00"
_BEFORE = "#808080"
_LOOKS: Mapping[str, tuple[str, str]] = {
    "DeepFM alone": ("#cc79a7", "v"),
    "FM alone": ("#e69f00", "^"),
    "exact FTRL alone": ("#0072b2", "s"),
    "River FTRL": ("#56b4e9", "D"),
    "Vowpal Wabbit": ("#009e73", "X"),
    "Vowpal Wabbit -q ::": ("#009e73", "P"),
    "Vowpal Wabbit --ftrl -q ::": ("#009e73", "*"),
}


def figure(cases: Sequence[Case]) -> str:
    """Return the text of an SVG file.

    The horizontal axis is events/s, logarithmic; the vertical one is the logloss of the whole run
    above exact FTRL's on the same examples, lower is better; it is linear around 0 only.
    """
    found = groups(cases)
    columns = min(_COLUMNS, len(found))
    lines = -(-len(found) // columns)
    width, height = _PANEL_INCHES
    total = height * lines + _LEGEND_INCHES
    below = _LEGEND_INCHES / total
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(rect=(0, below, 1, 1 - below))
        drawn = Figure(figsize=(width * columns, total), layout=layout)
        handles: dict[str, Any] = {}
        for place, group in enumerate(found, 1):
            axes = drawn.add_subplot(lines, columns, place)
            _draw(axes, group)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        drawn.legend(
            handles.values(), handles, loc="lower center", ncols=columns, bbox_to_anchor=(0.5, 0)
        )
        file = io.StringIO()
        drawn.savefig(file, format="svg", facecolor="white", metadata=_NO_METADATA)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _draw(axes: Axes, group: Group) -> None:
    axes.axhline(0, color="#0072b2", linewidth=0.8)
    _line(axes, group, _batches(group), _OURS, "o-", "ours, batch 64 to 4,096")
    before = {name: name.rsplit(", ", 1)[1] for name in group.contenders if ONE_STEP in name}
    _line(axes, group, before, _BEFORE, "o--", f"{ONE_STEP}, 512 and 4,096")
    for name, (colour, marker) in _LOOKS.items():
        point = _point(group, name)
        if point:
            axes.plot(*point, marker, color=colour, markersize=8, label=name)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=_LINEAR_TO)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g}" if y else "0"))
    axes.margins(x=0.1, y=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g} k"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    axes.grid()
    axes.set_title(group.log)
    axes.set_xlabel("events/s")
    axes.set_ylabel("logloss above exact FTRL's")


def _batches(group: Group) -> dict[str, str]:
    """Return the contenders of our batch sizes and their sizes, the defaults among them, sorted."""
    sizes = {
        name: int(name.removeprefix("batch ").replace(",", ""))
        for name in group.contenders
        if name.startswith("batch ")
    }
    sizes[DEFAULTS] = group.cases[0]["default_batch"]
    return {name: f"{size:,}" for name, size in sorted(sizes.items(), key=lambda each: each[1])}


def _line(
    axes: Axes, group: Group, names: Mapping[str, str], colour: str, style: str, label: str
) -> None:
    """Draw a line through contenders, each with its text."""
    points = {text: _point(group, name) for name, text in names.items()}
    known = {text: point for text, point in points.items() if point}
    if not known:
        return
    x, y = zip(*known.values(), strict=True)
    axes.plot(x, y, style, color=colour, markersize=6, label=label)
    for text, point in known.items():
        axes.annotate(text, point, (3, 4), textcoords="offset points", color=colour, fontsize=8)


def _point(group: Group, contender: str) -> tuple[float, float] | None:
    """Return (events/s, logloss above exact FTRL's) of a contender, or None."""
    speed = group.speed(contender)
    above = group.above_ftrl(contender, "whole")
    return (speed, above[0]) if speed is not None and above is not None else None
