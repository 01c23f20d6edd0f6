"""The report of `stream-ctr paper`: report.json, report.md with its pictures in figures/, and report.html, which is one file.

`report` turns runs into the dictionary that is report.json; `contents` turns that into a page. `write` does both and writes the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stream_ctr.errors import DataError
from stream_ctr.models import MODELS
from stream_ctr.paper import aggregate, figures, published
from stream_ctr.paper.aggregate import STUDIES, Run
from stream_ctr.paper.contents import contents, title
from stream_ctr.paper.intervals import Floats, verdict
from stream_ctr.paper.page import Block, Picture, html, markdown

Report = dict[str, Any]


def write(
    out: Path, runs: Sequence[Run], *, data: Mapping[str, Any], made: Mapping[str, Any]
) -> Report:
    """The report of these runs, which is also written into `out`. `losses` of a run is the file of its test losses, below `out`."""

    def losses(run: Run) -> Floats:
        path = out / run["losses"]
        try:
            loaded: Floats = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise DataError(
                f"{path} is damaged; delete {path.with_suffix('.json')}, and the same command does that run again"
            ) from None
        return loaded

    told = report(runs, data=data, made=made, losses=losses)
    blocks = contents(told)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(
        json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    (out / "report.md").write_text(markdown(blocks), encoding="utf-8")
    (out / "report.html").write_text(html(title(told), blocks), encoding="utf-8")
    for picture in _pictures(blocks):
        (out / "figures" / f"{picture.name}.svg").write_text(
            figures.on_white(picture.whole), encoding="utf-8"
        )
    return told


def report(
    runs: Sequence[Run],
    *,
    data: Mapping[str, Any],
    made: Mapping[str, Any],
    losses: Callable[[Run], Floats],
) -> Report:
    """What report.json holds. `losses` gives the test losses [n] of a run of Table 2. A number that is not finite becomes None."""
    rows = aggregate.table2(runs, losses)
    told = {
        "format": 1,
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
    return _finite(told)


def _properties(name: str) -> dict[str, bool]:
    system = MODELS[name]
    return {part: getattr(system, part) for part in published.Properties._fields}


def _figure6(times: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Report:
    """Times and, where LR's are known, how many times those they are."""
    ratios = aggregate.relative_times(times)
    return {
        device: {
            name: {**time, "over_lr": ratios.get(device, {}).get(name, {}).get("median")}
            for name, time in of.items()
        }
        for device, of in times.items()
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    for block in blocks:
        if isinstance(block, Picture):
            yield block
