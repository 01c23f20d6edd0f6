"""Which runs a table or a figure wants, what they will take, and the loop that does those which are not done.

An outcome is a file in DIR/runs, named after everything that decides it, and there only when the run has ended. So whatever ends the
process, the next one with the same data goes on after the last run that ended; and what two figures want is done once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stream_ctr import __version__
from stream_ctr.config import Config, Section
from stream_ctr.errors import DataError
from stream_ctr.learner import choose_device, choose_precision
from stream_ctr.models import MODELS
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, Dataset, Split, write_json
from stream_ctr.paper.experiment import Diverged, Setting, paired, seconds_per_example, stream, train
from stream_ctr.table import columns

_log = logging.getLogger(__name__)

PARTS = ("table2", "figure6", "figure7", "figure8", "figure9", "figure10", "figure11", "streaming")
DEEP = tuple(name for name, system in MODELS.items() if name not in ("lr", "fm"))
_OUTCOMES = 2  # of a run; another number when what a setting means has changed
_LEAST_STEPS, _LEAST_BATCH, _BATCH = 40, 32, 1024
_STREAM_BATCH, _SHORT = 128, 20_000
_LEAST_EXAMPLES = 200
_USUAL_EPOCHS = 3
QUICK_IMPRESSIONS = 20_000
_RATES = ("table_learning_rate", "table_beta", "linear_learning_rate", "linear_beta", "dense_learning_rate", "dense_weight_decay")
_NEVER = 1 << 62  # examples


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked for on the command line."""

    seeds: int = 3
    study_seeds: int = 1
    study_rows: int = 1_000_000
    dropout: float | None = None
    """The share dropped, but in the stream; None: that of the configuration, else the paper's."""
    epochs: int = 10
    split: str = "random"
    device: str = "auto"
    quick: bool = False
    models: tuple[str, ...] = tuple(MODELS)
    only: frozenset[str] = frozenset(PARTS)

    @classmethod
    def of(cls, *, quick: bool, **wishes: Any) -> Wishes:
        """With `quick`, of everything only as much as shows that it is there."""
        few = {"seeds": min(wishes["seeds"], 2), "study_seeds": 1, "epochs": min(wishes["epochs"], 3)} if quick else {}
        return cls(quick=quick, **{**wishes, **few})


class Wanted(NamedTuple):
    """A run, for one point of a table or figure. A run may be wanted more than once."""

    part: str
    value: str
    setting: Setting


# -- which runs ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is wanted of one set of data. `settings` are those of the paper; `stream` and `precision` those of the configuration."""

    data: Dataset
    split: Split
    wishes: Wishes
    settings: Setting
    stream: Setting
    precision: str
    wanted: list[Wanted] = field(default_factory=list)

    @property
    def distinct(self) -> dict[str, Setting]:
        """The runs by their keys."""
        return {self.key(wanted.setting): wanted.setting for wanted in self.wanted}

    def key(self, setting: Setting) -> str:
        decides = {"version": _OUTCOMES, "data": self.data.about["identity"], "split": self.wishes.split, **asdict(setting)}
        return f"{setting.system}-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]}"


def plan(data: Dataset, config: Config, wishes: Wishes) -> Plan:
    """Raises `DataError` when the data are too few, or their test part says nothing."""
    split = Split.of(len(data), wishes.split)
    require_enough(data, split)
    made = Plan(
        data, split, wishes, paper_setting(data, split, config, wishes), stream_setting(data, config, wishes), config.learn.precision
    )
    made.wanted.extend(wanted for wanted in _wanted(made) if wanted.part in wishes.only and wanted.setting.system in wishes.models)
    return made


def require_enough(data: Dataset, split: Split) -> None:
    if len(data) < _LEAST_EXAMPLES:
        raise DataError(f"{len(data):,} impressions are too few to train, validate and test on; at least {_LEAST_EXAMPLES} are needed")
    for part, name in ((TRAINING, "training"), (VALIDATION, "validation"), (TEST, "test")):
        labels = data.labels[split.part == part]
        if not 0 < int(labels.sum()) < len(labels):
            what = "no click" if not labels.any() else "nothing but clicks"
            raise DataError(
                f"{what} among the {len(labels):,} impressions of the {name} part: there is no AUC without both. Give a longer log"
            )


def paper_setting(data: Dataset, split: Split, config: Config, wishes: Wishes) -> Setting:
    """Section 3.1, "Parameter Settings", of what the configuration does not set. FNN's FM is trained until it is at its best, or, where
    model.pretrain_examples is 0, not at all."""
    model, learn = config.model, config.learn
    optimizer = _given(learn, "table_optimizer", "adam")
    rates = {name: getattr(learn, name) for name in _RATES}
    if optimizer == "adam":  # one for all parameters
        own = {name: rates[name] or learn.dense_learning_rate for name in ("table_learning_rate", "linear_learning_rate")}
        rates = {**{name: value for name, value in rates.items() if not name.endswith("beta")}, **own}
    return Setting(
        system="deepfm",
        seed=learn.seed,
        activation="paper",
        dropout=_given(model, "dropout", 0.5) if wishes.dropout is None else wishes.dropout,
        hidden=tuple(_given(model, "hidden", (400, 400, 400))),
        batch_size=_given(learn, "batch_size", batch_size(split.count(TRAINING))),
        epochs=wishes.epochs,
        share=1.0,
        device=choose_device(wishes.device).type,
        learner={
            **_common(data, config, wishes),
            **rates,
            "table_optimizer": optimizer,
            "progressive": False,
            "pretrain_examples": 0 if _given(model, "pretrain_examples", _NEVER) == 0 else _NEVER,
        },
    )


def batch_size(examples: int) -> int:
    """1,024, or less by powers of two until an epoch has at least 40 steps.

    >>> batch_size(10**6), batch_size(5832), batch_size(100)
    (1024, 128, 32)
    """
    return min(_BATCH, max(_LEAST_BATCH, 1 << (max(1, examples // _LEAST_STEPS).bit_length() - 1)))


def stream_setting(data: Dataset, config: Config, wishes: Wishes) -> Setting:
    """The configuration's, made for a stream; of a short log the batches are smaller, and FNN is an FM for a tenth of it at most."""
    model, learn = config.model, config.learn
    short = len(data) < _SHORT
    names = ("table_optimizer", *_RATES)
    pretrain = min(model.pretrain_examples, len(data) // 10)
    return Setting(
        system="deepfm",
        seed=learn.seed,
        activation=model.activation,
        dropout=model.dropout,
        hidden=model.hidden,
        batch_size=_given(learn, "batch_size", _STREAM_BATCH if short else learn.batch_size),
        epochs=0,
        share=1.0,
        device=choose_device(wishes.device).type,
        learner={**_common(data, config, wishes), **{name: getattr(learn, name) for name in names}, "pretrain_examples": pretrain},
    )


def _common(data: Dataset, config: Config, wishes: Wishes) -> dict[str, Any]:
    return {
        **{name: data.about["hashed"][name] for name in ("fields", "crosses", "value_fields")},
        **{name: getattr(config.model, name) for name in ("embedding_dim", "table_bits", "initial_scale")},
        "precision": choose_precision(config.learn.precision, choose_device(wishes.device)),
        "threads": config.learn.threads,
        "ftrl": config.ftrl.model_dump(exclude={"enabled"}),
    }


def _given(section: Section, name: str, otherwise: Any) -> Any:
    """What the configuration sets, or something else than its default."""
    return getattr(section, name) if name in section.model_fields_set else otherwise


def _wanted(made: Plan) -> Iterator[Wanted]:
    first = made.settings.seed
    seeds = range(first, first + made.wishes.seeds)
    for seed in seeds:
        for system in MODELS:
            yield Wanted("table2", "", replace(made.settings, system=system, seed=seed))
    if made.settings.device != "cpu":  # whose times Table 2 has; LR is always on the CPU
        for system in MODELS:
            if system != "lr":
                learner = {**made.settings.learner, "precision": choose_precision(made.precision, choose_device("cpu"))}
                yield Wanted("figure6", "", replace(made.settings, system=system, seed=first, device="cpu", learner=learner))
    for system in MODELS:
        yield Wanted("streaming", "", replace(made.stream, system=system))
    share = min(1.0, made.wishes.study_rows / made.split.count(TRAINING))
    for seed in range(first, first + made.wishes.study_seeds):
        for part, values in studies(made.settings.hidden, quick=made.wishes.quick).items():
            for value, changed in values.items():
                for system in DEEP:
                    setting = replace(made.settings, system=system, seed=seed, share=share, **changed)
                    yield Wanted(part, value, _as_the_paper(setting))


def _as_the_paper(setting: Setting) -> Setting:
    """An activation that is the paper's own is called that, so that a run is known for the same."""
    own = MODELS[setting.system].activation
    return replace(setting, activation="paper") if setting.activation == own else setting


Changes = dict[str, dict[str, Any]]


def studies(hidden: Sequence[int], *, quick: bool = False) -> dict[str, Changes]:
    """Figures 7 to 11: part -> value -> what is changed. `hidden` is the setting that all else has.

    >>> studies((400, 400, 400))["figure11"]["diamond"], studies((400, 400, 400))["figure8"]["0.9"]
    ({'hidden': (300, 600, 300)}, {'dropout': 0.1})
    """
    width, layers = hidden[len(hidden) // 2], len(hidden)
    whole: dict[str, Changes] = {
        "figure7": {name: {"activation": name} for name in ("relu", "tanh")},
        "figure8": {f"{kept:.1f}": {"dropout": round(1 - kept, 1)} for kept in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)},
        "figure9": {str(neurons): {"hidden": (neurons,) * layers} for neurons in (100, 200, 400, 800)},
        "figure10": {str(number): {"hidden": (width,) * number} for number in (1, 3, 5, 7)},
        "figure11": {shape: {"hidden": sizes} for shape, sizes in shapes(width, layers).items()},
    }
    few = {"figure8": ("1.0", "0.5"), "figure9": ("100", "400"), "figure10": ("1", "3"), "figure11": ("constant", "diamond")}
    return {part: {v: change for v, change in values.items() if not quick or v in few.get(part, values)} for part, values in whole.items()}


def shapes(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The paper's four, of the same number of neurons; its example is 3 layers of 200.

    >>> shapes(200, 3)
    {'constant': (200, 200, 200), 'increasing': (100, 200, 300), 'diamond': (150, 300, 150), 'decreasing': (300, 200, 100)}
    """
    rising = np.linspace(0.5, 1.5, layers) if layers > 1 else np.ones(1)
    peak = 1 - np.abs(np.linspace(-1, 1, layers)) / 2 if layers > 1 else np.ones(1)
    peak = peak * layers / peak.sum()
    sizes = {"constant": np.ones(layers), "increasing": rising, "diamond": peak, "decreasing": rising[::-1]}
    return {name: tuple(int(round(width * share)) for share in of.tolist()) for name, of in sizes.items()}


# -- what it takes ------------------------------------------------------------------------------------------------------------------


def estimate(made: Plan, out: Path) -> list[str]:
    """Time, memory and disk, as sentences for who waits; timed on a few batches of each system."""
    waiting = [setting for key, setting in made.distinct.items() if _outcome_of(out, key) is None]
    done = len(made.distinct) - len(waiting)
    told = [f"{len(made.distinct)} runs" + (f", {done} of them done before" if done else "")]
    if waiting:
        each = {system: _timed(made, system) for system in dict.fromkeys(setting.system for setting in waiting)}
        few, most = (sum(_seconds(made, setting, each, epochs) for setting in waiting) for epochs in (_USUAL_EPOCHS, made.wishes.epochs))
        at_most = f" with {_USUAL_EPOCHS} epochs a run, {_duration(most)} at most" if made.wishes.epochs > _USUAL_EPOCHS else ""
        told.append(f"about {_duration(few)}{at_most}")
    losses = 4 * made.split.count(TEST) * sum(1 for setting in made.distinct.values() if setting.epochs)
    disk = len(made.data) * made.data.row_bytes + losses
    told.append(f"{in_bytes(memory(made))} of memory for the largest table and its best weights; {in_bytes(disk)} of disk")
    return told


def _timed(made: Plan, system: str) -> float:
    """Seconds an example of an epoch, twice for a system that is pre-trained."""
    seconds = seconds_per_example(replace(made.settings, system=system), made.data, made.split)
    return seconds * (2 if MODELS[system].pretraining else 1)


def _seconds(made: Plan, setting: Setting, each: Mapping[str, float], epochs: int) -> float:
    """A network of other sizes takes as much more time as it has more weights."""
    examples = round(setting.share * made.split.count(TRAINING)) * min(epochs, setting.epochs) if setting.epochs else len(made.data)
    usual, here = (_weights(made.settings, hidden) for hidden in (made.settings.hidden, setting.hidden))
    return each[setting.system] * examples * (here / usual if MODELS[setting.system].module else 1.0)


def _weights(setting: Setting, hidden: Sequence[int]) -> int:
    widths = (setting.learner["fields"] * setting.learner["embedding_dim"], *hidden)
    return sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def memory(made: Plan) -> int:
    """Bytes of the largest table, of its optimiser and of the copy of the best epoch's weights."""
    learner = made.settings.learner
    most = max((MODELS[setting.system].embeddings for setting in made.distinct.values()), default=1)
    return 2 * 4 * columns(learner["embedding_dim"], embeddings=most, optimizer=learner["table_optimizer"]) << learner["table_bits"]


def in_bytes(count: float) -> str:
    """
    >>> in_bytes(7_930_000_000), in_bytes(1_245_600)
    ('7.9 GB', '1.2 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    """
    >>> _duration(42.4), _duration(400), _duration(8000)
    ('42 s', '7 min', '2 h 13 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# -- the loop -----------------------------------------------------------------------------------------------------------------------


def run(made: Plan, out: Path, *, console: Console) -> list[dict[str, Any]]:
    """Every outcome that is wanted, a dictionary for each point: `part`, `value` and the outcome. What is not done yet is done now."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    outcomes = {key: outcome for key in made.distinct if (outcome := _outcome_of(out, key)) is not None}
    with _progress(console) as progress:
        whole = progress.add_task("all runs", total=len(made.distinct), completed=len(outcomes))
        for key, setting in made.distinct.items():
            if key in outcomes:
                continue
            part = progress.add_task(_named(setting), total=_examples(made, setting))
            outcomes[key] = _run(made, setting, out, key, lambda n, part=part: progress.advance(part, n))  # type: ignore[misc]
            progress.remove_task(part)
            progress.advance(whole)
            _log.info("%s (%d of %d): %s", _named(setting), len(outcomes), len(made.distinct), _told(outcomes[key]))
    return _points(made, outcomes)


def _run(made: Plan, setting: Setting, out: Path, key: str, advance: Callable[[int], None]) -> dict[str, Any]:
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
    outcome |= {"seconds_whole": time.perf_counter() - began, "machine": machine(), "torch": torch.__version__, "version": __version__}
    write_json(_path(out, key), outcome)
    return outcome


def machine() -> dict[str, Any]:
    """Its processor by name, where the system tells, and how many cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"processor": next(named, platform.processor() or platform.machine()), "cores": os.cpu_count()}


def _write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        np.save(file, array)
    os.replace(unfinished, path)


def _path(out: Path, key: str) -> Path:
    return out / "runs" / f"{key}.json"


def _outcome_of(out: Path, key: str) -> dict[str, Any] | None:
    path = _path(out, key)
    return json.loads(path.read_text()) if path.exists() else None


def _points(made: Plan, outcomes: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    reference = next((outcomes[made.key(w.setting)] for w in made.wanted if w.part == "streaming" and w.setting.system == "deepfm"), {})
    points = []
    for wanted in made.wanted:
        outcome = dict(outcomes[made.key(wanted.setting)])
        blocks = outcome.pop("blocks", None)
        if blocks and "blocks" in reference and wanted.setting.system != "deepfm":
            outcome["paired"] = paired(blocks, reference["blocks"], len(made.data))
        points.append({"part": wanted.part, "value": wanted.value, "run": made.key(wanted.setting), **outcome})
    return points


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


def _named(setting: Setting) -> str:
    """
    >>> _named(Setting("fm", 1, "paper", 0.5, (400,), 64, 3, 1.0, "cpu", {}))
    'FM, seed 1'
    """
    return f"{MODELS[setting.system].title}, {f'seed {setting.seed}' if setting.epochs else 'streaming'}"


def _told(outcome: Mapping[str, Any]) -> str:
    if "failed" in outcome:
        return outcome["failed"]
    return f"AUC {outcome['auc']:.4f}, logloss {outcome['logloss']:.4f} in {outcome['seconds_whole']:.1f} s"


def remove(out: Path) -> None:
    """All that an earlier command has written there, and nothing else."""
    for name in ("data", "data.unfinished", "runs"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("report.json", "report.md", "report.html"):
        (out / name).unlink(missing_ok=True)
