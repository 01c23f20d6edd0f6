"""The report of `stream-ctr paper`: report.json, report.md, report.html and figures/.

`build_report` turns runs into the dictionary that report.json holds, and `contents` turns that into
a page. report.md links the pictures in figures/; report.html is a single file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stream_ctr.errors import DataError
from stream_ctr.models import MODELS
from stream_ctr.paper import aggregate, figures, published
from stream_ctr.paper.aggregate import STUDIES, Run
from stream_ctr.paper.contents import contents, title
from stream_ctr.paper.intervals import Floats, verdict
from stream_ctr.paper.page import Picture, html, markdown

Report = dict[str, Any]
_FORMAT = 1


def write(
    out: Path, runs: Sequence[Run], *, data: Mapping[str, Any], made: Mapping[str, Any]
) -> Report:
    """Write the report of these runs into `out` and return the content of report.json.

    `data` and `made` describe the data and the command; see `facts`. `losses` of a run is the file
    of its test losses, relative to `out`. Raises `DataError` if such a file is damaged.
    """

    def losses(run: Run) -> Floats:
        return _load_losses(out / run["losses"])

    report = build_report(runs, data=data, made=made, losses=losses)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(f"{text}\n", encoding="utf-8")
    _write_pages(out, report)
    return report


def render(out: Path | str) -> None:
    """Write report.md, report.html and figures/ again, from the report.json in `out`."""
    path = Path(out) / "report.json"
    _write_pages(Path(out), json.loads(path.read_text(encoding="utf-8")))


def _write_pages(out: Path, report: Report) -> None:
    blocks = contents(report)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(markdown(blocks), encoding="utf-8")
    (out / "report.html").write_text(html(title(report), blocks), encoding="utf-8")
    for block in blocks:
        if isinstance(block, Picture):
            picture = figures.on_white(block.whole)
            (out / "figures" / f"{block.name}.svg").write_text(picture, encoding="utf-8")


def _load_losses(path: Path) -> Floats:
    try:
        losses: Floats = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise DataError(
            f"{path} is damaged; delete {path.with_suffix('.json')}, "
            "and the same command does that run again"
        ) from None
    return losses


def build_report(
    runs: Sequence[Run],
    *,
    data: Mapping[str, Any],
    made: Mapping[str, Any],
    losses: Callable[[Run], Floats],
) -> Report:
    """Return the content of report.json.

    `losses` returns the test losses [n] of a run of Table 2. Numbers that are not finite become
    None.
    """
    rows = aggregate.table2(runs, losses)
    report = {
        "format": _FORMAT,
        "made": {name: value for name, value in made.items() if name != "settings"},
        "machines": aggregate.machines(runs),
        "data": dict(data),
        "settings": dict(made["settings"]),
        "table1": {system.title: _properties(name) for name, system in MODELS.items()},
        "table2": rows,
        "order": aggregate.order(rows),
        "against_deepfm": {
            name: verdict(row["minus_deepfm"]) for name, row in rows.items() if name != "DeepFM"
        },
        "against_lr": {
            name: verdict(row["minus_lr"]) for name, row in rows.items() if name != "LR"
        },
        "figure6": _figure6(aggregate.times(runs)),
        **{part: aggregate.study(runs, part) for part in STUDIES},
        "streaming": aggregate.streaming(runs),
        "failed": aggregate.failures(runs),
        "missing": aggregate.missing(runs),
    }
    return _finite(report)


def _properties(name: str) -> dict[str, bool]:
    system = MODELS[name]
    return {part: getattr(system, part) for part in published.Properties._fields}


def _figure6(times: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Report:
    """Return the times, each with its multiple of LR's where LR's is known."""
    ratios = aggregate.relative_times(times)
    return {
        device: {
            name: {**time, "over_lr": ratios.get(device, {}).get(name, {}).get("median")}
            for name, time in by_system.items()
        }
        for device, by_system in times.items()
    }


def _finite(value: Any) -> Any:
    """Return `value` as plain JSON types, with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
