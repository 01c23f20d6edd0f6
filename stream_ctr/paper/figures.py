"""The report's pictures, as text of SVG files. Matplotlib draws them: it writes the same bytes for the same data, and needs no browser.

Letters are outlines, so a picture looks the same wherever it is opened. What is neither data nor ground has the colour `currentColor`,
so the text around a picture decides whether it is dark or light; `on_white` is for where there is none.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

Study = Mapping[
    str, Mapping[str, Mapping[str, float | None]]
]  # value -> system -> {"auc", "auc_std", "logloss", "logloss_std"}

METRICS = {"auc": "AUC, higher is better", "logloss": "logloss, lower is better"}
AXES = {
    "figure7": "activation",
    "figure8": "dropout: share of neurons kept",
    "figure9": "neurons in each layer",
    "figure10": "hidden layers",
    "figure11": "shape of the network",
}
_NOMINAL = {
    "figure7",
    "figure11",
}  # their values have no order: a line from one to the next would mean nothing

# Okabe and Ito's colours, which the colour-blind tell apart, where need be shifted until white and black both carry them.
_LOOKS = {
    "FNN": ("#0072b2", "o"),
    "IPNN": ("#b8860b", "s"),
    "OPNN": ("#009e73", "^"),
    "PNN*": ("#c26a9a", "v"),
    "LR & DNN": ("#56b4e9", "D"),
    "FM & DNN": ("#808080", "P"),
    "DeepFM": ("#d55e00", "*"),
}
_ACCENT, _PLAIN, _GREY = _LOOKS["DeepFM"][0], "#1f83c6", "#808080"
_INK = "#0a0b0c"  # becomes currentColor
_SIZE = 4.9, 3.9  # inches, of a panel


class _Margins(NamedTuple):
    """Inches around the axes of a panel: room for names, numbers and titles."""

    left: float
    right: float
    bottom: float
    top: float


_NAMES_LEFT = _Margins(0.85, 0.3, 0.62, 0.4)
_NAMES_RIGHT = _Margins(0.62, 0.95, 0.55, 0.4)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with Matplotlib
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def study(name: str, values: Study, metrics: Sequence[str] = ("auc", "logloss")) -> str:
    """One of Figures 7 to 11, a panel for each of `metrics`; whiskers are one standard deviation over seeds.

    >>> found = {"relu": {"FNN": {"auc": 0.71, "auc_std": None}}, "tanh": {"FNN": {"auc": 0.70, "auc_std": None}}}
    >>> picture = study("figure7", found, ["auc"])
    >>> picture == study("figure7", found, ["auc"]), picture.startswith("<svg "), "currentColor" in picture
    (True, True, True)
    """
    draw = _dots if name in _NOMINAL else _lines
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, panels = _panels(len(metrics), _NAMES_LEFT if name in _NOMINAL else _NAMES_RIGHT)
        for axes, metric in zip(panels, metrics, strict=True):
            draw(axes, values, metric)
            axes.set_title(METRICS[metric], pad=10)
            if name not in _NOMINAL:
                axes.set_xlabel(AXES[name])
        return _svg(figure, name + "".join(f"-{metric}" for metric in metrics if len(metrics) == 1))


Ratios = Mapping[
    str, Mapping[str, Mapping[str, float]]
]  # device -> system -> {"median", "least", "most"}


def relative_time(whole: Ratios, per_epoch: Ratios) -> str:
    """Figure 6: each system's training time over LR's, on an axis of powers of ten, a panel a device. A bar goes to the median of the
    whole training, its whisker from the least to the most; a hollow diamond is an epoch."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "figure6"}):
        figure, panels = _panels(len(whole), _NAMES_LEFT._replace(bottom=0.62))
        for axes, device in zip(panels, whole, strict=True):
            _bars(axes, whole[device], per_epoch[device])
            axes.set_title(
                {"cpu": "CPU", "cuda": "GPU"}.get(device, device) + ": training time, LR = 1",
                pad=10,
            )
        return _svg(figure, "figure6-" + "-".join(whole))


def _bars(
    axes: Axes,
    whole: Mapping[str, Mapping[str, float]],
    per_epoch: Mapping[str, Mapping[str, float]],
) -> None:
    systems = list(whole)[::-1]
    middle, least, most = (
        np.array([whole[system][part] for system in systems])
        for part in ("median", "least", "most")
    )
    epoch = [per_epoch[system]["median"] for system in systems]
    axes.set_xscale("log")
    axes.barh(
        systems, middle - 1, left=1, height=0.62, color=[_colour(system) for system in systems]
    )
    axes.errorbar(
        middle,
        systems,
        xerr=(middle - least, most - middle),
        fmt="none",
        ecolor=_INK,
        elinewidth=1,
        capsize=2.5,
    )
    (diamonds,) = axes.plot(epoch, systems, "D", color="none", markeredgecolor=_INK, markersize=5)
    _end_labels(
        axes,
        [
            (max(*ends), f"{_times(ratio)} | {_times(ends[1])}")
            for *ends, ratio in zip(most, epoch, middle, strict=True)
        ],
    )
    axes.set_xlim(min(1, *least, *epoch) / 1.3, max(1, *most, *epoch) * 6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,g}"))
    axes.axvline(1, color=_INK, linewidth=0.9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    named = {"until the best check": Patch(color=_PLAIN), "an epoch": diamonds}
    axes.legend(
        named.values(),
        named,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.07),
        ncols=2,
        columnspacing=1.2,
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def differences(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """Each system's test logloss less DeepFM's with its interval: `found[system]` has `logloss_difference`, `low` and `high`."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "table2"}):
        figure, (axes,) = _panels(1, _NAMES_LEFT._replace(bottom=0.5, top=0.1), (5.6, 3.3))
        systems = list(found)[::-1]
        for row, system in enumerate(systems):
            middle, low, high = (
                found[system][part] for part in ("logloss_difference", "low", "high")
            )
            if middle is None:
                continue
            apart = low is not None and high is not None and (low > 0 or high < 0)
            colour = _PLAIN if apart else _GREY
            if low is not None and high is not None:
                axes.plot(
                    [low, high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt"
                )
            axes.plot(
                middle,
                row,
                "o",
                color=colour if apart else "none",
                markeredgecolor=colour,
                markersize=7,
                markeredgewidth=1.6,
            )
        axes.axvline(0, color=_ACCENT, linewidth=1.4)
        axes.set_yticks(range(len(systems)), systems)
        axes.set_ylim(-0.6, len(systems) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:+.4g}" if at else "0"))
        axes.grid(axis="x")
        axes.set_xlabel(
            "better  \N{LEFTWARDS ARROW}  test logloss less DeepFM's  \N{RIGHTWARDS ARROW}  worse"
        )
        return _svg(figure, "table2")


def on_white(picture: str) -> str:
    """The same picture as a file of its own: dark on a white ground, which dark pages bear too."""
    begin, rest = picture.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{begin} color="#1c1e21">\n<rect width="100%" height="100%" fill="#ffffff"/>{rest}'


def _panels(
    count: int, margins: _Margins, size: tuple[float, float] = _SIZE
) -> tuple[Figure, list[Axes]]:
    """Axes of equal size, side by side. (A layout by Matplotlib's engine draws everything twice.)"""
    width, height = size
    figure = Figure(figsize=(width * count, height))
    wide, high = width - margins.left - margins.right, height - margins.top - margins.bottom
    places = [
        ((i * width + margins.left) / (width * count), margins.bottom / height)
        for i in range(count)
    ]
    return figure, [
        figure.add_axes((x, y, wide / (width * count), high / height)) for x, y in places
    ]


def _colour(system: str) -> str:
    return _ACCENT if system == "DeepFM" else _PLAIN


def _lines(axes: Axes, values: Study, metric: str) -> None:
    """A line a system, named at its end; values in the order given, at equal distances."""
    ends: list[tuple[str, float, float]] = []
    for system in _systems(values, metric):
        points = [
            (i, *_point(of, system, metric))
            for i, of in enumerate(values.values())
            if _score(of, system, metric) is not None
        ]
        at, means, spread = zip(*points, strict=True)
        colour, marker = _LOOKS[system]
        first = system == "DeepFM"
        axes.errorbar(at, means, spread if any(spread) else None, color=colour, elinewidth=0.8, marker=marker,
                      markersize=10 if first else 5, linewidth=2.4 if first else 1.3, zorder=3 if first else 2)  # fmt: skip
        ends.append((system, at[-1], means[-1]))
    axes.set_xticks(range(len(values)), list(values))
    axes.set_xlim(-0.25, len(values) - 1 + 0.25)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:.4g}"))
    axes.grid(axis="y")
    _name_ends(axes, ends)


def _name_ends(axes: Axes, ends: Iterable[tuple[str, float, float]]) -> None:
    """Names right of the axes, moved apart where they would meet, each with a thin line to the end it names."""
    ends = sorted(ends, key=lambda end: end[2])
    low, high = axes.get_ylim()
    places = apart([(y - low) / (high - low) for _, _, y in ends], gap=0.062)
    for (system, x, y), place in zip(ends, places, strict=True):
        colour = _LOOKS[system][0]
        axes.annotate(system, (x, y), (1.05, place), xycoords="data", textcoords="axes fraction", va="center", color=colour, fontsize=9,
                      weight="bold" if system == "DeepFM" else "normal", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5})  # fmt: skip
    axes.set_ylim(low, high)


def apart(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Ascending places in [0, 1] near the wanted ones, which ascend too, each at least `gap` above the one before.

    >>> [round(place, 3) for place in apart([0.5, 0.5, 0.98, 0.99], gap=0.1)]
    [0.5, 0.6, 0.9, 1.0]
    """
    placed = list(wanted)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed:
        placed[-1] = min(placed[-1], 1.0)
    for i in range(len(placed) - 2, -1, -1):
        placed[i] = min(placed[i], placed[i + 1] - gap)
    return placed


def _dots(axes: Axes, values: Study, metric: str) -> None:
    """A row a system, a dot a value."""
    systems = _systems(values, metric)[::-1]
    for row, system in enumerate(systems):
        found = [
            score for of in values.values() if (score := _score(of, system, metric)) is not None
        ]
        axes.plot(
            [min(found), max(found)], [row, row], color=_INK, alpha=0.25, linewidth=1.2, zorder=1
        )
    for (colour, marker), (value, of), shift in zip(
        _LOOKS.values(), values.items(), _shifts(len(values)), strict=False
    ):
        points = [
            (row + shift, *_point(of, system, metric))
            for row, system in enumerate(systems)
            if _score(of, system, metric) is not None
        ]
        rows, means, spread = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(means, rows, xerr=spread if any(spread) else None, fmt=marker, color=colour, label=value,
                      markersize=6.5, elinewidth=1)  # fmt: skip
    axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(-0.6, len(systems) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:.4g}"))
    axes.grid()
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.09),
        ncols=len(values),
        handletextpad=0.1,
        columnspacing=1.2,
    )


def _shifts(count: int) -> list[float]:
    """Where within its row each value stands, so that whiskers do not cover one another."""
    return [0.17 * ((count - 1) / 2 - i) for i in range(count)]


def _systems(values: Study, metric: str) -> list[str]:
    """Those with such a score anywhere, in the paper's order."""
    present = {
        system for of in values.values() for system in of if of[system].get(metric) is not None
    }
    return [system for system in _LOOKS if system in present]


def _score(of: Mapping[str, Mapping[str, float | None]], system: str, part: str) -> float | None:
    return of.get(system, {}).get(part)


def _point(
    of: Mapping[str, Mapping[str, float | None]], system: str, metric: str
) -> tuple[float, float]:
    """Mean and spread of a score that is there."""
    return _score(of, system, metric) or 0.0, _score(of, system, f"{metric}_std") or 0.0


def _end_labels(axes: Axes, labels: Sequence[tuple[float, str]]) -> None:
    for row, (at, text) in enumerate(labels):
        axes.annotate(
            text, (max(at, 1.0), row), (5, 0), textcoords="offset points", va="center", fontsize=9
        )


_NO_METADATA: dict[str, Any] = {"Creator": None, "Date": None, "Format": None, "Type": None}


def _svg(figure: Figure, name: str) -> str:
    """The picture's text: ids are its own, so that several fit into one page, and nothing in it speaks to the page around it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    text = file.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text).replace("DejaVuSans", "")
    text = text.replace("<svg ", '<svg stroke-linejoin="round" ', 1)
    text = text.replace(_INK, "currentColor")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to a group
    text = re.sub(
        r' d="[^"]*"', lambda path: " " + _NUMBER.sub(_rounded, " ".join(path[0].split())), text
    )
    return "\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n"


_NUMBER = re.compile(r"-?\d+\.\d+")


def _rounded(number: re.Match[str]) -> str:
    """To a hundredth of a point, which nobody sees and halves the file."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
