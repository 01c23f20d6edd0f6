"""Draw the report's pictures as the text of SVG files.

Matplotlib draws them, because it writes the same bytes for the same data and needs no browser. It
is optional (`pip install 'stream-ctr[paper]'`), and this is the only file that imports it.

Letters are outlines, so that a picture looks the same on every machine. Everything that is neither
data nor background has the colour `currentColor`: the text around a picture decides whether it is
dark or light. `on_white` makes a picture that stands alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stream_ctr.errors import ConfigError

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ConfigError(
        "stream-ctr paper draws figures with matplotlib: pip install 'stream-ctr[paper]'"
    ) from error

Scores = Mapping[str, float | None]  # "auc", "auc_std", "logloss", "logloss_std"
Study = Mapping[str, Mapping[str, Scores]]  # value -> system -> scores
Ratios = Mapping[str, Mapping[str, float]]  # system -> "median", "least", "most"

METRICS = {"auc": "AUC, higher is better", "logloss": "logloss, lower is better"}
AXES = {
    "figure7": "activation",
    "figure8": "dropout (share of neurons kept)",
    "figure9": "neurons in each layer",
    "figure10": "hidden layers",
    "figure11": "shape of the network",
}
# The values of these figures have no order, so no line connects them.
_NOMINAL = {"figure7", "figure11"}
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}

# Okabe and Ito's colours, which colour-blind readers can tell apart. Some are shifted so that they
# stand out on white and on black.
_LOOKS = {
    "FNN": ("#0072b2", "o"),
    "IPNN": ("#b8860b", "s"),
    "OPNN": ("#009e73", "^"),
    "PNN*": ("#c26a9a", "v"),
    "LR & DNN": ("#56b4e9", "D"),
    "FM & DNN": ("#808080", "P"),
    "DeepFM": ("#d55e00", "*"),
}
_ACCENT = _LOOKS["DeepFM"][0]
_PLAIN = "#1f83c6"
_GREY = "#808080"
_INK = "#0a0b0c"  # becomes currentColor
_PANEL_INCHES = (4.9, 3.9)


class _Margins(NamedTuple):
    """Inches around the axes of a panel, for names, numbers and titles."""

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


# -- Figure 6 ------------------------------------------------------------------------------------


def relative_time(training: Mapping[str, Ratios], per_epoch: Mapping[str, Ratios]) -> str:
    """Return Figure 6: each system's training time over LR's, with a panel per device.

    `training` and `per_epoch` map a device to the ratios of its systems. A bar ends at the median
    of the whole training and its whisker spans the least to the most. A hollow diamond is one
    epoch. The axis is logarithmic.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "figure6"}):
        figure, panels = _panels(len(training), _NAMES_LEFT._replace(bottom=0.62))
        for axes, device in zip(panels, training, strict=True):
            _draw_bars(axes, training[device], per_epoch[device])
            axes.set_title(f"{_DEVICES.get(device, device)}: training time, LR = 1", pad=10)
        return _svg(figure, "figure6-" + "-".join(training))


def _draw_bars(axes: Axes, training: Ratios, per_epoch: Ratios) -> None:
    systems = list(training)[::-1]
    median, least, most = (
        np.array([training[system][part] for system in systems])
        for part in ("median", "least", "most")
    )
    epoch = [per_epoch[system]["median"] for system in systems]
    axes.set_xscale("log")
    axes.barh(systems, median - 1, left=1, height=0.62, color=[_bar_colour(s) for s in systems])
    axes.errorbar(
        median,
        systems,
        xerr=(median - least, most - median),
        fmt="none",
        ecolor=_INK,
        elinewidth=1,
        capsize=2.5,
    )
    (diamonds,) = axes.plot(epoch, systems, "D", color="none", markeredgecolor=_INK, markersize=5)
    for row, (right, of_epoch, ratio) in enumerate(zip(most, epoch, median, strict=True)):
        _label_bar(axes, row, max(right, of_epoch), f"{_times(ratio)} | {_times(of_epoch)}")
    axes.set_xlim(min(1, *least, *epoch) / 1.3, max(1, *most, *epoch) * 6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.axvline(1, color=_INK, linewidth=0.9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    entries = {"until the best check": Patch(color=_PLAIN), "one epoch": diamonds}
    axes.legend(
        entries.values(),
        entries,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.07),
        ncols=2,
        columnspacing=1.2,
    )


def _bar_colour(system: str) -> str:
    return _ACCENT if system == "DeepFM" else _PLAIN


def _label_bar(axes: Axes, row: int, right: float, text: str) -> None:
    axes.annotate(
        text, (max(right, 1.0), row), (5, 0), textcoords="offset points", va="center", fontsize=9
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


# -- Table 2 -------------------------------------------------------------------------------------


def differences(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return a picture of each system's test logloss minus DeepFM's, with its interval.

    `found[system]` has `logloss_difference`, `low` and `high`.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "table2"}):
        figure, (axes,) = _panels(1, _NAMES_LEFT._replace(bottom=0.5, top=0.1), (5.6, 3.3))
        systems = list(found)[::-1]
        for row, system in enumerate(systems):
            _draw_interval(axes, row, found[system])
        axes.axvline(0, color=_ACCENT, linewidth=1.4)
        axes.set_yticks(range(len(systems)), systems)
        axes.set_ylim(-0.6, len(systems) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.4g}" if x else "0"))
        axes.grid(axis="x")
        axes.set_xlabel(
            "better  \N{LEFTWARDS ARROW}  test logloss minus DeepFM's  \N{RIGHTWARDS ARROW}  worse"
        )
        return _svg(figure, "table2")


def _draw_interval(axes: Axes, row: int, difference: Mapping[str, float | None]) -> None:
    middle, low, high = (difference[part] for part in ("logloss_difference", "low", "high"))
    if middle is None:
        return
    excludes_zero = low is not None and high is not None and (low > 0 or high < 0)
    colour = _PLAIN if excludes_zero else _GREY
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot(
        middle,
        row,
        "o",
        color=colour if excludes_zero else "none",
        markeredgecolor=colour,
        markersize=7,
        markeredgewidth=1.6,
    )


# -- Figures 7 to 11 -----------------------------------------------------------------------------


def study(name: str, values: Study, metrics: Sequence[str] = ("auc", "logloss")) -> str:
    """Return one of Figures 7 to 11, with a panel per metric.

    Whiskers are one standard deviation over seeds.

    >>> relu, tanh = ({"FNN": {"auc": auc, "auc_std": None}} for auc in (0.71, 0.70))
    >>> picture = study("figure7", {"relu": relu, "tanh": tanh}, ["auc"])
    >>> picture.startswith("<svg "), "currentColor" in picture
    (True, True)
    """
    nominal = name in _NOMINAL
    draw = _draw_dots if nominal else _draw_lines
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, panels = _panels(len(metrics), _NAMES_LEFT if nominal else _NAMES_RIGHT)
        for axes, metric in zip(panels, metrics, strict=True):
            draw(axes, values, metric)
            axes.set_title(METRICS[metric], pad=10)
            if not nominal:
                axes.set_xlabel(AXES[name])
        suffix = f"-{metrics[0]}" if len(metrics) == 1 else ""
        return _svg(figure, name + suffix)


def _draw_lines(axes: Axes, values: Study, metric: str) -> None:
    """Draw a line per system, with its name at the end; values stand at equal distances."""
    ends: list[tuple[str, float, float]] = []
    for system in _systems(values, metric):
        points = [
            (i, *_mean_and_spread(scores, system, metric))
            for i, scores in enumerate(values.values())
            if _score(scores, system, metric) is not None
        ]
        places, means, spread = zip(*points, strict=True)
        colour, marker = _LOOKS[system]
        emphasised = system == "DeepFM"
        axes.errorbar(
            places,
            means,
            spread if any(spread) else None,
            color=colour,
            elinewidth=0.8,
            marker=marker,
            markersize=10 if emphasised else 5,
            linewidth=2.4 if emphasised else 1.3,
            zorder=3 if emphasised else 2,
        )
        ends.append((system, places[-1], means[-1]))
    axes.set_xticks(range(len(values)), list(values))
    axes.set_xlim(-0.25, len(values) - 1 + 0.25)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
    axes.grid(axis="y")
    _name_ends(axes, ends)


def _name_ends(axes: Axes, ends: Iterable[tuple[str, float, float]]) -> None:
    """Write names to the right of the axes, each with a thin line to the end it names.

    Names that would overlap are moved apart.
    """
    ends = sorted(ends, key=lambda end: end[2])
    low, high = axes.get_ylim()
    places = spread_out([(y - low) / (high - low) for _, _, y in ends], gap=0.062)
    for (system, x, y), place in zip(ends, places, strict=True):
        colour = _LOOKS[system][0]
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
        axes.annotate(
            system,
            (x, y),
            (1.05, place),
            xycoords="data",
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=9,
            weight="bold" if system == "DeepFM" else "normal",
            annotation_clip=False,
            arrowprops=arrow,
        )
    axes.set_ylim(low, high)


def spread_out(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Return places in [0, 1] near the wanted ones, each at least `gap` above the one before.

    Both sequences ascend.

    >>> [round(place, 3) for place in spread_out([0.5, 0.5, 0.98, 0.99], gap=0.1)]
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


def _draw_dots(axes: Axes, values: Study, metric: str) -> None:
    """Draw a row per system with a dot per value."""
    systems = _systems(values, metric)[::-1]
    for row, system in enumerate(systems):
        found = list(_scores_of(values, system, metric))
        ends = [min(found), max(found)]
        axes.plot(ends, [row, row], color=_INK, alpha=0.25, linewidth=1.2, zorder=1)
    looks = zip(_LOOKS.values(), values.items(), _shifts(len(values)), strict=False)
    for (colour, marker), (value, scores), shift in looks:
        points = [
            (row + shift, *_mean_and_spread(scores, system, metric))
            for row, system in enumerate(systems)
            if _score(scores, system, metric) is not None
        ]
        rows, means, spread = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(
            means,
            rows,
            xerr=spread if any(spread) else None,
            fmt=marker,
            color=colour,
            label=value,
            markersize=6.5,
            elinewidth=1,
        )
    axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(-0.6, len(systems) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.4g}"))
    axes.grid()
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.09),
        ncols=len(values),
        handletextpad=0.1,
        columnspacing=1.2,
    )


def _shifts(count: int) -> list[float]:
    """Return the offset of each value within its row, so that whiskers do not overlap."""
    return [0.17 * ((count - 1) / 2 - i) for i in range(count)]


def _systems(values: Study, metric: str) -> list[str]:
    """Return the systems that have such a score at any value, in the paper's order."""
    return [system for system in _LOOKS if list(_scores_of(values, system, metric))]


def _scores_of(values: Study, system: str, metric: str) -> Iterator[float]:
    for scores in values.values():
        score = _score(scores, system, metric)
        if score is not None:
            yield score


def _score(scores: Mapping[str, Scores], system: str, name: str) -> float | None:
    return scores.get(system, {}).get(name)


def _mean_and_spread(scores: Mapping[str, Scores], system: str, metric: str) -> tuple[float, float]:
    """Return the mean and standard deviation of a score that exists."""
    mean = _score(scores, system, metric) or 0.0
    return mean, _score(scores, system, f"{metric}_std") or 0.0


# -- SVG -----------------------------------------------------------------------------------------


def on_white(picture: str) -> str:
    """Return the picture as an SVG file with dark ink on a white background."""
    begin, rest = picture.split(">", 1)
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n{begin} color="#1c1e21">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{rest}'
    )


def _panels(
    count: int, margins: _Margins, size: tuple[float, float] = _PANEL_INCHES
) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes of equal size side by side.

    Matplotlib's layout engine would draw everything twice.
    """
    width, height = size
    figure = Figure(figsize=(width * count, height))
    inner_width = width - margins.left - margins.right
    inner_height = height - margins.top - margins.bottom
    axes = []
    for i in range(count):
        left = (i * width + margins.left) / (width * count)
        bottom = margins.bottom / height
        place = (left, bottom, inner_width / (width * count), inner_height / height)
        axes.append(figure.add_axes(place))
    return figure, axes


_NO_METADATA: dict[str, Any] = {"Creator": None, "Date": None, "Format": None, "Type": None}
_NUMBER = re.compile(r"-?\d+\.\d+")


def _svg(figure: Figure, name: str) -> str:
    """Return the text of a picture, fit to stand in a page with others.

    Its ids start with `name`, so that they are unique in the page, and it has no style sheet that
    would apply to the rest of the page.
    """
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
    text = re.sub(r' d="[^"]*"', _short_path, text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n"


def _short_path(path: re.Match[str]) -> str:
    return " " + _NUMBER.sub(_rounded, " ".join(path[0].split()))


def _rounded(number: re.Match[str]) -> str:
    """Return the number rounded to a hundredth of a point, which halves the file invisibly."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
