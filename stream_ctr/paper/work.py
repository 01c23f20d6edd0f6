"""The loop: what the runs of a plan will take, those that are not done, and what came out of all that are.

An outcome is a file in DIR/runs, named after everything that decides it, and there only when the run has ended. So whatever ends the
process, the next one with the same data goes on after the last run that ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stream_ctr import __version__
from stream_ctr.config import Config
from stream_ctr.errors import DataError
from stream_ctr.learn.table import row_floats
from stream_ctr.models import MODELS
from stream_ctr.paper import dataset
from stream_ctr.paper.dataset import TEST, TRAINING, write_json
from stream_ctr.paper.experiment import Diverged, Setting, seconds_per_example, stream, train
from stream_ctr.paper.intervals import paired
from stream_ctr.paper.plan import PARTS, Plan, Wishes, require_possible
from stream_ctr.paper.words import duration, in_bytes

_USUAL_EPOCHS = 3
_PASS_BYTES = 64  # of an example, for logits, losses and their order
_OUTCOME = re.compile(rf"\.?(?:{'|'.join(MODELS)})-[0-9a-f]{{16}}\.(?:json|npy)(?:\.\d+)?")

_log = logging.getLogger(__name__)


# -- what it takes -------------------------------------------------------------------------------


def expected(config: Config, wishes: Wishes, rows: int, disk: int) -> str:
    """What can be told before `rows` impressions are read, which take `disk` bytes; 0: unknown. Raises `ConfigError` for what cannot be."""
    require_possible(config, wishes)
    optimizer = (
        config.learn.table_optimizer
        if "table_optimizer" in config.learn.model_fields_set
        else "adam"
    )
    held = in_bytes(
        memory(wishes.models, config.model.embedding_dim, optimizer, config.model.table_bits, rows)
    )
    if not rows:
        return f"how many impressions there are to read is unknown; {held} of memory, and {_PASS_BYTES} bytes for each impression"
    return f"at most about {rows:,} impressions to read; {held} of memory" + (
        f", {in_bytes(disk)} of disk" if disk else ""
    )


def estimate(made: Plan, out: Path) -> list[str]:
    """Time, memory and disk, as sentences for who waits; timed on a few batches of each system."""
    runs = made.distinct
    waiting = [setting for key, setting in runs.items() if not _path(out, key).exists()]
    done = len(runs) - len(waiting)
    told = [
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
        + (f", {done} of them done before" if done else "")
    ]
    if waiting:
        each = {
            pair: _timed(made, *pair)
            for pair in dict.fromkeys((setting.system, setting.device) for setting in waiting)
        }
        few, most = (
            _all(made, waiting, each, epochs) for epochs in (_USUAL_EPOCHS, made.wishes.epochs)
        )
        at_most = (
            f" with {_USUAL_EPOCHS} epochs a run, {duration(most)} at most"
            if made.wishes.epochs > _USUAL_EPOCHS
            else ""
        )
        told.append(f"about {duration(few)}{at_most}")
    losses = 4 * made.split.count(TEST) * sum(1 for setting in runs.values() if setting.epochs)
    learner = made.settings.learner
    systems = {setting.system for setting in runs.values()}
    held = memory(
        systems,
        learner["embedding_dim"],
        learner["table_optimizer"],
        learner["table_bits"],
        len(made.data),
    )
    told.append(
        f"{in_bytes(held)} of memory; {in_bytes(len(made.data) * made.data.row_bytes + losses)} of disk"
    )
    return told


def _timed(made: Plan, system: str, device: str) -> float:
    """Seconds an example of an epoch, with that of pre-training."""
    setting = next(
        w.setting for w in made.asked if (w.setting.system, w.setting.device) == (system, device)
    )
    usual = replace(made.settings, system=system, device=device)
    learner = {**made.settings.learner, "precision": setting.learner["precision"]}
    return seconds_per_example(replace(usual, learner=learner), made.data, made.split)


def _all(
    made: Plan, waiting: Sequence[Setting], each: Mapping[tuple[str, str], float], epochs: int
) -> float:
    """Seconds, at least one, to two digits: the third would say nothing."""
    return max(
        1.0, float(f"{sum(_seconds(made, setting, each, epochs) for setting in waiting):.2g}")
    )


def _seconds(
    made: Plan, setting: Setting, each: Mapping[tuple[str, str], float], epochs: int
) -> float:
    """A network of other sizes takes as much more time as it has more weights."""
    examples = (
        round(setting.share * made.split.count(TRAINING)) * min(epochs, setting.epochs)
        if setting.epochs
        else len(made.data)
    )
    usual, here = (
        _weights(made.settings, hidden) for hidden in (made.settings.hidden, setting.hidden)
    )
    return (
        each[setting.system, setting.device]
        * examples
        * (here / usual if MODELS[setting.system].module else 1.0)
    )


def _weights(setting: Setting, hidden: Sequence[int]) -> int:
    widths = (setting.learner["fields"] * setting.learner["embedding_dim"], *hidden)
    return sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def memory(
    systems: Iterable[str], embedding_dim: int, optimizer: str, table_bits: int, rows: int
) -> int:
    """Bytes of the largest table and its optimiser, as much again for the best weights, and what is held of each of `rows` examples."""
    most = max((MODELS[system].embeddings for system in systems), default=1)
    return (
        2 * 4 * row_floats(embedding_dim, embeddings=most, optimizer=optimizer) << table_bits
    ) + _PASS_BYTES * rows


# -- the loop ------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """`out`, which is made if it is not there, for one command at a time. Raises `DataError` when another one has it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{out} is in use by another stream-ctr paper; wait until it has ended, or use another --out"
            ) from None
        yield


def run(made: Plan, out: Path, *, console: Console) -> None:
    """Do what is asked for and not done yet."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    runs = made.distinct
    waiting = {key: setting for key, setting in runs.items() if not _path(out, key).exists()}
    with _progress(console) as progress:
        whole = progress.add_task("all runs", total=len(runs), completed=len(runs) - len(waiting))
        for done, (key, setting) in enumerate(waiting.items(), start=1 + len(runs) - len(waiting)):
            named = _named(setting, made.settings)
            part = progress.add_task(named, total=_examples(made, setting))
            outcome = _run(made, setting, out, key, lambda n, part=part: progress.advance(part, n))  # type: ignore[misc]
            progress.remove_task(part)
            progress.advance(whole)
            _log.info("%s (%d of %d): %s", named, done, len(runs), _told(outcome))


def _run(
    made: Plan, setting: Setting, out: Path, key: str, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Do it and keep its outcome. One that diverged is an outcome too."""
    began = time.perf_counter()
    try:
        if setting.epochs:
            outcome, losses = train(setting, made.data, made.split, advance=advance)
            outcome["losses"] = f"runs/{key}.npy"
            _write_array(out / outcome["losses"], losses.astype(np.float32))
        else:
            outcome = stream(setting, made.data, advance=advance)
    except Diverged as error:
        outcome = {**setting.told(), "failed": str(error)}
    outcome |= {
        "seconds_whole": time.perf_counter() - began,
        "machine": machine(),
        "torch": torch.__version__,
        "version": __version__,
    }
    write_json(_path(out, key), outcome)
    return outcome


def machine() -> dict[str, Any]:
    """Its processor by name, where the system tells, and how many cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(named, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
    }


def _write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        np.save(file, array)
    os.replace(unfinished, path)


def _path(out: Path, key: str) -> Path:
    return out / "runs" / f"{key}.json"


def points(made: Plan, out: Path) -> list[dict[str, Any]]:
    """What came out, of all the plan has: a dictionary for each point whose run is done, `part`, `value` and the outcome."""
    outcomes: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(made.key(wanted.setting) for wanted in made.wanted):
        if _path(out, key).exists():
            outcomes[key] = _outcome(_path(out, key))
    reference = outcomes.get(made.key(replace(made.stream, system="deepfm")), {})
    found = []
    for wanted in made.wanted:
        if (key := made.key(wanted.setting)) in outcomes:
            outcome = dict(outcomes[key])
            blocks = outcome.pop("blocks", None)
            if blocks and "blocks" in reference and wanted.setting.system != "deepfm":
                outcome["paired"] = paired(blocks, reference["blocks"], len(made.data))
            found.append({"part": wanted.part, "value": wanted.value, "run": key, **outcome})
    return found


def _outcome(path: Path) -> dict[str, Any]:
    try:
        outcome: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise DataError(
            f"{path} is damaged; delete it, and the same command does that run again"
        ) from None
    return outcome


def _progress(console: Console) -> Progress:
    """On a terminal; with lines of a log there is none between them."""
    hidden = not console.is_terminal or _log.isEnabledFor(logging.INFO)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=hidden)


def _examples(made: Plan, setting: Setting) -> int:
    """That a run learns at most."""
    if not setting.epochs:
        return len(made.data)
    fits = 2 if MODELS[setting.system].pretraining else 1
    return fits * setting.epochs * round(setting.share * made.split.count(TRAINING))


def _named(setting: Setting, usual: Setting) -> str:
    """With what is not as in Table 2.

    >>> usual = Setting("fm", 0, "paper", 0.5, (400,), 64, 3, 1.0, "cpu", {})
    >>> _named(usual, usual), _named(replace(usual, system="fnn", seed=1, hidden=(100, 100), dropout=0.1), usual)
    ('FM, seed 0', 'FNN, seed 1, 100-100 neurons, dropout 0.1')
    """
    title = MODELS[setting.system].title
    if not setting.epochs:
        return f"{title}, streaming"
    own = {
        "hidden": f"{'-'.join(map(str, setting.hidden))} neurons", "dropout": f"dropout {setting.dropout:g}",
        "activation": setting.activation, "device": f"on the {setting.device.upper()}",
    }  # fmt: skip
    changed = [
        words for name, words in own.items() if getattr(setting, name) != getattr(usual, name)
    ]
    return ", ".join([title, f"seed {setting.seed}", *changed])


def _told(outcome: Mapping[str, Any]) -> str:
    if "failed" in outcome:
        return outcome["failed"]
    return f"AUC {outcome['auc']:.4f}, logloss {outcome['logloss']:.4f} in {outcome['seconds_whole']:.1f} s"


def remove(out: Path) -> None:
    """All that an earlier command has written there, and nothing else. Raises `DataError` when there is something else in its `data`."""
    for name in ("data", "data.unfinished"):
        dataset.remove(out / name)
    for path in _of_ours(out):
        path.unlink()
    for name in ("runs", "figures"):
        with contextlib.suppress(OSError):  # not there, or something of others is
            (out / name).rmdir()


def _of_ours(out: Path) -> list[Path]:
    runs = [path for path in (out / "runs").glob("*") if _OUTCOME.fullmatch(path.name)]
    written = [out / f"report.{kind}" for kind in ("json", "md", "html")] + [
        out / "figures" / f"{part}.svg" for part in PARTS
    ]
    return runs + [path for path in written if path.is_file()]
