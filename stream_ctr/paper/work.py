"""Do the runs of a plan, estimate what they take, and collect their outcomes.

An outcome is a file in OUT/runs. Its name is the key of the run, and it appears when the run has
ended. Whatever ends the process, the next one with the same data continues after the last finished
run.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stream_ctr import __version__
from stream_ctr.config import Config
from stream_ctr.errors import DataError
from stream_ctr.learn.table_kernels import row_floats
from stream_ctr.models import MODELS
from stream_ctr.paper import dataset
from stream_ctr.paper.dataset import TEST, TRAINING, write_json
from stream_ctr.paper.experiment import Diverged, Setting, seconds_per_example, stream, train
from stream_ctr.paper.intervals import paired_block_difference
from stream_ctr.paper.plan import PARTS, Options, Plan, require_possible
from stream_ctr.paper.words import byte_size, duration

_USUAL_EPOCHS = 3
_EXAMPLE_BYTES = 64  # held in memory per example, for logits, losses and their order
_FLOAT32_BYTES = 4
_OUTCOME = re.compile(rf"\.?(?:{'|'.join(MODELS)})-[0-9a-f]{{16}}\.(?:json|npy)(?:\.\d+)?")
_SecondsBySystem = Mapping[tuple[str, str], float]  # (system, device) -> seconds per example

_log = logging.getLogger(__name__)


# -- estimates -----------------------------------------------------------------------------------


def requirements(config: Config, options: Options, rows: int, disk: int) -> str:
    """Return a sentence on what `rows` impressions take, known before they are read.

    `rows` and the bytes of `disk` are 0 where they are unknown. Raises `ConfigError` for options
    that fail with any data.
    """
    require_possible(config, options)
    adam = "table_optimizer" not in config.learn.model_fields_set
    optimizer = "adam" if adam else config.learn.table_optimizer
    model = config.model
    memory = byte_size(
        memory_bytes(options.models, model.embedding_dim, optimizer, model.table_bits, rows)
    )
    if not rows:
        return (
            f"the number of impressions to read is unknown; {memory} of memory, and "
            f"{_EXAMPLE_BYTES} bytes for each impression"
        )
    on_disk = f", {byte_size(disk)} of disk" if disk else ""
    return f"at most about {rows:,} impressions to read; {memory} of memory{on_disk}"


def estimate(plan: Plan, out: Path) -> list[str]:
    """Return sentences on the runs, their time, and the memory and disk they take.

    The time is measured on a few batches of each system.
    """
    runs = plan.runs
    todo = [setting for key, setting in runs.items() if not _path(out, key).exists()]
    done = len(runs) - len(todo)
    noun = "run" if len(runs) == 1 else "runs"
    sentences = [f"{len(runs)} {noun}" + (f", {done} of them done before" if done else "")]
    if todo:
        sentences.append(_estimated_time(plan, todo))
    losses = _FLOAT32_BYTES * plan.split.count(TEST) * sum(bool(s.epochs) for s in runs.values())
    learner = plan.paper_setting.learner
    memory = memory_bytes(
        {setting.system for setting in runs.values()},
        learner["embedding_dim"],
        learner["table_optimizer"],
        learner["table_bits"],
        len(plan.data),
    )
    disk = len(plan.data) * plan.data.row_bytes + losses
    return [*sentences, f"{byte_size(memory)} of memory; {byte_size(disk)} of disk"]


def _estimated_time(plan: Plan, todo: Sequence[Setting]) -> str:
    pairs = dict.fromkeys((setting.system, setting.device) for setting in todo)
    seconds = {pair: _seconds_per_example(plan, *pair) for pair in pairs}
    usual = duration(_total_seconds(plan, todo, seconds, _USUAL_EPOCHS))
    if plan.options.epochs <= _USUAL_EPOCHS:
        return f"about {usual}"
    most = duration(_total_seconds(plan, todo, seconds, plan.options.epochs))
    return f"about {usual} with {_USUAL_EPOCHS} epochs a run, {most} at most"


def _seconds_per_example(plan: Plan, system: str, device: str) -> float:
    """Return the time of an example in an epoch, and in pre-training if there is any."""
    precision = next(
        point.setting.learner["precision"]
        for point in plan.requested
        if (point.setting.system, point.setting.device) == (system, device)
    )
    usual = plan.paper_setting
    learner = {**usual.learner, "precision": precision}
    setting = replace(usual, system=system, device=device, learner=learner)
    return seconds_per_example(setting, plan.data, plan.split)


def _total_seconds(
    plan: Plan, settings: Sequence[Setting], seconds: _SecondsBySystem, epochs: int
) -> float:
    """Return the time of all runs, at least one second, rounded to two digits."""
    total = sum(_run_seconds(plan, setting, seconds, epochs) for setting in settings)
    return max(1.0, float(f"{total:.2g}"))


def _run_seconds(plan: Plan, setting: Setting, seconds: _SecondsBySystem, epochs: int) -> float:
    """Return the time of a run; that of a network is proportional to its number of weights."""
    examples = len(plan.data)
    if setting.epochs:
        examples = round(setting.share * plan.split.count(TRAINING)) * min(epochs, setting.epochs)
    usual = plan.paper_setting
    larger = _weights(usual, setting.hidden) / _weights(usual, usual.hidden)
    is_network = MODELS[setting.system].module
    return seconds[setting.system, setting.device] * examples * (larger if is_network else 1.0)


def _weights(setting: Setting, hidden: Sequence[int]) -> int:
    inputs = setting.learner["fields"] * setting.learner["embedding_dim"]
    widths = (inputs, *hidden)
    return sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def memory_bytes(
    systems: Iterable[str], embedding_dim: int, optimizer: str, table_bits: int, rows: int
) -> int:
    """Return the bytes of the largest table with its optimizer, its best copy, and the examples."""
    embeddings = max((MODELS[system].embeddings for system in systems), default=1)
    floats = row_floats(embedding_dim, embeddings=embeddings, optimizer=optimizer)
    tables = 2 * _FLOAT32_BYTES * floats << table_bits
    return tables + _EXAMPLE_BYTES * rows


# -- runs ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out`, which is created if it does not exist.

    Raises `DataError` if another command holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{out} is in use by another stream-ctr paper; wait until it has ended, "
                "or use another --out"
            ) from None
        yield


def run(plan: Plan, out: Path, *, console: Console) -> None:
    """Do the requested runs that have no outcome in `out` yet."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    runs = plan.runs
    todo = {key: setting for key, setting in runs.items() if not _path(out, key).exists()}
    done = len(runs) - len(todo)
    with _progress(console) as progress:
        all_runs = progress.add_task("all runs", total=len(runs), completed=done)
        for place, (key, setting) in enumerate(todo.items(), start=done + 1):
            name = _run_name(setting, plan.paper_setting)
            task = progress.add_task(name, total=_max_examples(plan, setting))
            outcome = _run(plan, setting, out, key, partial(progress.advance, task))
            progress.remove_task(task)
            progress.advance(all_runs)
            _log.info("%s (%d of %d): %s", name, place, len(runs), _summary(outcome))


def _run(
    plan: Plan, setting: Setting, out: Path, key: str, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Do a run and write its outcome. A run that diverged has an outcome too."""
    started = time.perf_counter()
    try:
        if setting.epochs:
            outcome, losses = train(setting, plan.data, plan.split, advance=advance)
            outcome["losses"] = f"runs/{key}.npy"
            _write_array(out / outcome["losses"], losses.astype(np.float32))
        else:
            outcome = stream(setting, plan.data, advance=advance)
    except Diverged as error:
        outcome = {**setting.summary(), "failed": str(error)}
    outcome |= {
        "seconds_whole": time.perf_counter() - started,
        "machine": machine(),
        "torch": torch.__version__,
        "version": __version__,
    }
    write_json(_path(out, key), outcome)
    return outcome


def machine() -> dict[str, Any]:
    """Return the name of the processor, if the system knows it, and the number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(names, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
    }


def _write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        np.save(file, array)
    os.replace(unfinished, path)


def _path(out: Path, key: str) -> Path:
    return out / "runs" / f"{key}.json"


def _progress(console: Console) -> Progress:
    """Return a progress bar, hidden without a terminal and while log lines appear there."""
    hidden = not console.is_terminal or _log.isEnabledFor(logging.INFO)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=hidden)


def _max_examples(plan: Plan, setting: Setting) -> int:
    """Return the largest number of examples that a run learns."""
    if not setting.epochs:
        return len(plan.data)
    trainings = 2 if MODELS[setting.system].pretraining else 1
    return trainings * setting.epochs * round(setting.share * plan.split.count(TRAINING))


def _run_name(setting: Setting, usual: Setting) -> str:
    """Return the name of a run, with what differs from Table 2.

    >>> usual = Setting("fm", 0, "paper", 0.5, (400,), 64, 3, 1.0, "cpu", {})
    >>> _run_name(usual, usual)
    'FM, seed 0'
    >>> _run_name(replace(usual, system="fnn", seed=1, hidden=(100, 100), dropout=0.1), usual)
    'FNN, seed 1, 100-100 neurons, dropout 0.1'
    """
    title = MODELS[setting.system].title
    if not setting.epochs:
        return f"{title}, streaming"
    texts = {
        "hidden": f"{'-'.join(map(str, setting.hidden))} neurons",
        "dropout": f"dropout {setting.dropout:g}",
        "activation": setting.activation,
        "device": f"on the {setting.device.upper()}",
    }
    changed = [
        text for name, text in texts.items() if getattr(setting, name) != getattr(usual, name)
    ]
    return ", ".join([title, f"seed {setting.seed}", *changed])


def _summary(outcome: Mapping[str, Any]) -> str:
    if "failed" in outcome:
        return outcome["failed"]
    scores = f"AUC {outcome['auc']:.4f}, logloss {outcome['logloss']:.4f}"
    return f"{scores} in {outcome['seconds_whole']:.1f} s"


# -- outcomes ------------------------------------------------------------------------------------


def results(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Return a dictionary for each point of the plan whose run is done.

    It has `part`, `value`, the key `run` and the outcome. A streaming run also has `paired`, its
    difference from DeepFM's. Raises `DataError` if an outcome is damaged.
    """
    keyed = [(plan.key(point.setting), point) for point in plan.points]
    outcomes = {
        key: _load_outcome(_path(out, key))
        for key in dict.fromkeys(key for key, _ in keyed)
        if _path(out, key).exists()
    }
    reference = outcomes.get(plan.key(replace(plan.stream_setting, system="deepfm")), {})
    found = []
    for key, point in keyed:
        if key in outcomes:
            outcome = dict(outcomes[key])
            blocks = outcome.pop("blocks", None)
            if blocks and "blocks" in reference and point.setting.system != "deepfm":
                outcome["paired"] = paired_block_difference(
                    blocks, reference["blocks"], len(plan.data)
                )
            found.append({"part": point.part, "value": point.value, "run": key, **outcome})
    return found


def _load_outcome(path: Path) -> dict[str, Any]:
    try:
        outcome: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise DataError(
            f"{path} is damaged; delete it, and the same command does that run again"
        ) from None
    return outcome


def remove(out: Path) -> None:
    """Delete what an earlier command has written into `out`, and nothing else.

    Raises `DataError`, and deletes nothing, if OUT/data holds other files.
    """
    for name in ("data", "data.unfinished"):
        dataset.remove(out / name)
    for path in _own_files(out):
        path.unlink()
    for name in ("runs", "figures"):
        with contextlib.suppress(OSError):  # it does not exist, or holds other files
            (out / name).rmdir()


def _own_files(out: Path) -> list[Path]:
    runs = [path for path in (out / "runs").glob("*") if _OUTCOME.fullmatch(path.name)]
    reports = [out / f"report.{kind}" for kind in ("json", "md", "html")]
    pictures = [out / "figures" / f"{part}.svg" for part in PARTS]
    return runs + [path for path in [*reports, *pictures] if path.is_file()]
