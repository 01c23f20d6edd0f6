"""The runs that the tables and figures need, each with its setting.

A setting is the paper's where the configuration sets nothing. Two figures that need the same run
share it: a run is known by a key made of everything that decides its outcome.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from stream_ctr.config import Config, Section
from stream_ctr.errors import ConfigError, DataError
from stream_ctr.learn.device import choose_device, choose_precision
from stream_ctr.learn.step import Labels
from stream_ctr.models import MODELS
from stream_ctr.paper import published
from stream_ctr.paper.dataset import TEST, TRAINING, VALIDATION, Dataset, Split
from stream_ctr.paper.experiment import Setting

PARTS = ("table2", "figure6", *published.VALUES, "streaming")
DEEP = tuple(name for name, system in MODELS.items() if system.high_order)
QUICK_IMPRESSIONS = 20_000
_OUTCOME_VERSION = 2  # changes when the meaning of a setting changes, so that runs are repeated
_MIN_EXAMPLES = 200
_MIN_STEPS_PER_EPOCH = 40
_MIN_BATCH = 32
_MAX_BATCH = 1024
_SHORT_LOG = 20_000
_SHORT_LOG_BATCH = 128
_STREAM_BATCH = 512
_UNTIL_STOPPED = 1 << 62  # examples of pre-training; the validation part ends it
_RATES = (
    "table_learning_rate",
    "table_beta",
    "linear_learning_rate",
    "linear_beta",
    "dense_learning_rate",
    "dense_weight_decay",
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line.

    `dropout` is the share dropped in all runs but the stream's; None means the configuration's
    value, or else the paper's.
    """

    seeds: int = 3
    study_seeds: int = 1
    study_rows: int = 1_000_000
    dropout: float | None = None
    epochs: int = 10
    split: str = "random"
    device: str = "auto"
    quick: bool = False
    models: tuple[str, ...] = tuple(MODELS)
    only: frozenset[str] = frozenset(PARTS)

    @classmethod
    def create(cls, *, quick: bool, **options: Any) -> Options:
        """Return the options, with fewer seeds and epochs if `quick` is set.

        >>> quick = Options.create(quick=True, seeds=3, study_seeds=3, epochs=10)
        >>> quick.seeds, quick.study_seeds, quick.epochs
        (2, 1, 3)
        """
        if quick:
            options["seeds"] = min(options["seeds"], 2)
            options["study_seeds"] = 1
            options["epochs"] = min(options["epochs"], 3)
        return cls(quick=quick, **options)


class PlannedPoint(NamedTuple):
    """A point of a table or figure, and the setting of its run. Points may share a run."""

    part: str
    value: str
    setting: Setting


def require_possible(config: Config, options: Options) -> None:
    """Raise `ConfigError` for options that fail with any data.

    They are a device that does not exist, networks without layers, and parts without a run.
    """
    choose_device(options.device)
    if not _configured(config.model, "hidden", published.HIDDEN):
        raise ConfigError(
            "model.hidden has no layer; the paper's networks need at least one, "
            "such as model.hidden=400,400,400"
        )
    if options.only <= published.VALUES.keys() and not set(options.models) & set(DEEP):
        raise ConfigError(
            f"nothing to do: Figures 7 to 11 are about networks, so give --model one of "
            f"{', '.join(DEEP)}"
        )


# -- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of a complete report on one dataset.

    `paper_setting` follows the paper, `stream_setting` the configuration; `precision` is the
    configured one.
    """

    data: Dataset
    split: Split
    options: Options
    paper_setting: Setting
    stream_setting: Setting
    precision: str

    @property
    def points(self) -> list[PlannedPoint]:
        """All points of the report."""
        return [*_table2(self), *_figure6(self), *_streaming(self), *_studies(self)]

    @property
    def requested(self) -> list[PlannedPoint]:
        """The points of the parts and systems that the command names.

        Figure 6 shows the times of the runs of Table 2.
        """
        only = self.options.only
        parts = only | {"table2"} if "figure6" in only else only
        models = self.options.models
        return [
            point for point in self.points if point.part in parts and point.setting.system in models
        ]

    @property
    def runs(self) -> dict[str, Setting]:
        """The runs behind the requested points, by key."""
        return {self.key(point.setting): point.setting for point in self.requested}

    def key(self, setting: Setting) -> str:
        """Return the name of a run: its system and a hash of all that decides its outcome."""
        decides = {
            "version": _OUTCOME_VERSION,
            "data": self.data.metadata["identity"],
            "split": self.options.split,
            **asdict(setting),
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return f"{setting.system}-{digest[:16]}"


def make_plan(data: Dataset, config: Config, options: Options) -> Plan:
    """Return the plan for a dataset.

    Raises `DataError` if the dataset is too short, or a part lacks clicks or non-clicks.
    """
    split = Split.of(len(data), options.split)
    require_enough(data, split)
    return Plan(
        data=data,
        split=split,
        options=options,
        paper_setting=make_paper_setting(data, split, config, options),
        stream_setting=make_stream_setting(data, config, options),
        precision=config.learn.precision,
    )


def require_enough(data: Dataset, split: Split) -> None:
    """Raise `DataError` if nothing could be learned or tested on these parts."""
    if len(data) < _MIN_EXAMPLES:
        raise DataError(
            f"{len(data):,} impressions are too few to train, validate and test on; "
            f"at least {_MIN_EXAMPLES} are needed"
        )
    if not 0 < np.count_nonzero(data.labels) < len(data):
        raise DataError(
            f"{_only_label(data.labels)} among the {len(data):,} impressions of the log: "
            "nothing can be learned. A log of events must hold clicks as well as impressions, and "
            "impressions without a click too; a click counts within join.label_window of its "
            "impression"
        )
    for part, name in ((TRAINING, "training"), (VALIDATION, "validation"), (TEST, "test")):
        labels = data.labels[split.part == part]
        if not 0 < int(labels.sum()) < len(labels):
            raise DataError(
                f"{_only_label(labels)} among the {len(labels):,} impressions of the {name} part: "
                "AUC needs both clicks and non-clicks. Use a longer log or another --split"
            )


def _only_label(labels: Labels) -> str:
    return "nothing but clicks" if labels.any() else "no click"


# -- settings ------------------------------------------------------------------------------------


def make_paper_setting(data: Dataset, split: Split, config: Config, options: Options) -> Setting:
    """Return the setting of section 3.1, "Parameter Settings", where nothing else is configured.

    FNN's FM trains until its validation logloss stops improving, or not at all if
    model.pretrain_examples is 0.
    """
    model = config.model
    learn = config.learn
    dropout = options.dropout
    if dropout is None:
        dropout = _configured(model, "dropout", published.DROPOUT)
    pretrains = _configured(model, "pretrain_examples", _UNTIL_STOPPED) != 0
    return Setting(
        system="deepfm",
        seed=learn.seed,
        activation="paper",
        dropout=dropout,
        hidden=tuple(_configured(model, "hidden", published.HIDDEN)),
        batch_size=_configured(learn, "batch_size", batch_size(split.count(TRAINING))),
        epochs=options.epochs,
        share=1.0,
        device=choose_device(options.device).type,
        learner={
            **_shared_options(data, config, options),
            **_optimizer(config),
            "progressive": False,
            "pretrain_examples": _UNTIL_STOPPED if pretrains else 0,
        },
    )


def _optimizer(config: Config) -> dict[str, Any]:
    """Return the table optimizer and the rates. The paper's is Adam, with one rate for all."""
    learn = config.learn
    optimizer = _configured(learn, "table_optimizer", "adam")
    rates = {name: getattr(learn, name) for name in _RATES}
    if optimizer == "adam":
        rates = {name: rate for name, rate in rates.items() if not name.endswith("beta")}
        for name in ("table_learning_rate", "linear_learning_rate"):
            rates[name] = rates[name] or learn.dense_learning_rate
    return {**rates, "table_optimizer": optimizer}


def batch_size(examples: int) -> int:
    """Return 1,024, or a smaller power of two that gives an epoch at least 40 steps.

    >>> batch_size(10**6), batch_size(5832), batch_size(100)
    (1024, 128, 32)
    """
    largest = max(1, examples // _MIN_STEPS_PER_EPOCH)
    return min(_MAX_BATCH, max(_MIN_BATCH, 1 << (largest.bit_length() - 1)))


def make_stream_setting(data: Dataset, config: Config, options: Options) -> Setting:
    """Return the configured setting, which is made for a stream.

    A short log gets smaller batches, and FNN is an FM for at most a tenth of the log.
    """
    model = config.model
    learn = config.learn
    short = len(data) < _SHORT_LOG
    return Setting(
        system="deepfm",
        seed=learn.seed,
        activation=model.activation,
        dropout=model.dropout,
        hidden=model.hidden,
        batch_size=_configured(learn, "batch_size", _SHORT_LOG_BATCH if short else _STREAM_BATCH),
        epochs=0,
        share=1.0,
        device=choose_device(options.device).type,
        learner={
            **_shared_options(data, config, options),
            **{name: getattr(learn, name) for name in _RATES},
            # One step a batch, as in the paper, with rates for a stream.
            "table_optimizer": _configured(learn, "table_optimizer", "adagrad"),
            "pretrain_examples": min(model.pretrain_examples, len(data) // 10),
        },
    )


def _shared_options(data: Dataset, config: Config, options: Options) -> dict[str, Any]:
    hashed = data.metadata["hashed"]
    return {
        "fields": hashed["fields"],
        "crosses": hashed["crosses"],
        "value_fields": hashed["value_fields"],
        "embedding_dim": config.model.embedding_dim,
        "table_bits": config.model.table_bits,
        "initial_scale": config.model.initial_scale,
        "precision": choose_precision(config.learn.precision, choose_device(options.device)),
        "threads": config.learn.threads,
        "ftrl": config.ftrl.model_dump(exclude={"enabled"}),
    }


def _configured(section: Section, name: str, otherwise: Any) -> Any:
    """Return the value that the configuration sets, or `otherwise` instead of its default."""
    return getattr(section, name) if name in section.model_fields_set else otherwise


# -- points --------------------------------------------------------------------------------------


def _table2(plan: Plan) -> Iterator[PlannedPoint]:
    first = plan.paper_setting.seed
    for seed in range(first, first + plan.options.seeds):
        for system in MODELS:
            yield PlannedPoint("table2", "", replace(plan.paper_setting, system=system, seed=seed))


def _figure6(plan: Plan) -> Iterator[PlannedPoint]:
    """Yield a CPU run for each system that Table 2 runs on a GPU. LR always runs on the CPU."""
    setting = plan.paper_setting
    if setting.device == "cpu":
        return
    precision = choose_precision(plan.precision, choose_device("cpu"))
    learner = {**setting.learner, "precision": precision}
    for system in MODELS:
        if system != "lr":
            on_cpu = replace(setting, system=system, device="cpu", learner=learner)
            yield PlannedPoint("figure6", "", on_cpu)


def _streaming(plan: Plan) -> Iterator[PlannedPoint]:
    for system in MODELS:
        yield PlannedPoint("streaming", "", replace(plan.stream_setting, system=system))


def _studies(plan: Plan) -> Iterator[PlannedPoint]:
    usual = plan.paper_setting
    options = plan.options
    share = min(1.0, options.study_rows / plan.split.count(TRAINING))
    for seed in range(usual.seed, usual.seed + options.study_seeds):
        for part, values in studies(usual.hidden, quick=options.quick).items():
            for value, changes in values.items():
                for system in DEEP:
                    setting = replace(usual, system=system, seed=seed, share=share, **changes)
                    yield PlannedPoint(part, value, _named_as_default(setting))


def _named_as_default(setting: Setting) -> Setting:
    """Name the paper's own activation "paper", so that its run has the key of Table 2's."""
    own = MODELS[setting.system].activation
    return replace(setting, activation="paper") if setting.activation == own else setting


Changes = dict[str, dict[str, Any]]  # value -> fields of a setting that it changes

_QUICK_VALUES = {
    "figure8": ("1.0", "0.5"),
    "figure9": ("100", "400"),
    "figure10": ("1", "3"),
    "figure11": ("constant", "diamond"),
}


def studies(hidden: Sequence[int], *, quick: bool = False) -> dict[str, Changes]:
    """Return part -> value -> changes of the setting, for Figures 7 to 11.

    `hidden` is the setting of all other runs. With `quick` there are fewer values.

    >>> studies((400, 400, 400))["figure11"]["diamond"]
    {'hidden': (300, 600, 300)}
    >>> studies((400, 400, 400))["figure8"]["0.9"]
    {'dropout': 0.1}
    """
    width = hidden[len(hidden) // 2]
    layers = len(hidden)
    every: dict[str, Changes] = {
        "figure7": {name: {"activation": name} for name in ("relu", "tanh")},
        "figure8": {
            f"{kept:.1f}": {"dropout": round(1 - kept, 1)}
            for kept in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
        },
        "figure9": {
            str(neurons): {"hidden": (neurons,) * layers} for neurons in (100, 200, 400, 800)
        },
        "figure10": {str(number): {"hidden": (width,) * number} for number in (1, 3, 5, 7)},
        "figure11": {shape: {"hidden": sizes} for shape, sizes in shapes(width, layers).items()},
    }
    if not quick:
        return every
    return {
        part: {value: values[value] for value in values if value in _QUICK_VALUES.get(part, values)}
        for part, values in every.items()
    }


def shapes(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the paper's four network shapes with the same number of neurons.

    The paper's example is three layers with a mean of 200 neurons.

    >>> for name, sizes in shapes(200, 3).items():
    ...     print(name, sizes)
    constant (200, 200, 200)
    increasing (100, 200, 300)
    diamond (150, 300, 150)
    decreasing (300, 200, 100)
    """
    rising = np.linspace(0.5, 1.5, layers) if layers > 1 else np.ones(1)
    peak = 1 - np.abs(np.linspace(-1, 1, layers)) / 2 if layers > 1 else np.ones(1)
    peak = peak * layers / peak.sum()
    relative_sizes = {
        "constant": np.ones(layers),
        "increasing": rising,
        "diamond": peak,
        "decreasing": rising[::-1],
    }
    return {
        name: tuple(int(round(width * size)) for size in sizes.tolist())
        for name, sizes in relative_sizes.items()
    }
