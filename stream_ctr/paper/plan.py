"""Which runs a table or a figure wants, each with its setting: the paper's, of what the configuration does not set.

What two figures want is one run, known by a key, which is made of everything that decides its outcome.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
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
_OUTCOMES = 2  # of a run; another number when what a setting means has changed
_LEAST_STEPS, _LEAST_BATCH, _BATCH = 40, 32, 1024
_STREAM_BATCH, _SHORT = 128, 20_000
_LEAST_EXAMPLES = 200
QUICK_IMPRESSIONS = 20_000
_RATES = (
    "table_learning_rate",
    "table_beta",
    "linear_learning_rate",
    "linear_beta",
    "dense_learning_rate",
    "dense_weight_decay",
)
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
        few = (
            {"seeds": min(wishes["seeds"], 2), "study_seeds": 1, "epochs": min(wishes["epochs"], 3)}
            if quick
            else {}
        )
        return cls(quick=quick, **{**wishes, **few})


class Wanted(NamedTuple):
    """A run, for one point of a table or figure. A run may be wanted more than once."""

    part: str
    value: str
    setting: Setting


def require_possible(config: Config, wishes: Wishes) -> None:
    """Raises `ConfigError` for what no data can help: a device that is not there, networks without layers, nothing to do."""
    choose_device(wishes.device)
    if not _given(config.model, "hidden", published.HIDDEN):
        raise ConfigError(
            "model.hidden has no layer; the paper's networks need at least one, such as model.hidden=400,400,400"
        )
    if wishes.only <= published.VALUES.keys() and not set(wishes.models) & set(DEEP):
        raise ConfigError(
            f"nothing to do: Figures 7 to 11 are of networks, so give --model one of {', '.join(DEEP)}"
        )


# -- which runs ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the report can have of one set of data. `settings` are those of the paper; `stream` and `precision` those of the
    configuration."""

    data: Dataset
    split: Split
    wishes: Wishes
    settings: Setting
    stream: Setting
    precision: str
    wanted: list[Wanted] = field(default_factory=list)

    @property
    def asked(self) -> list[Wanted]:
        """Those that the command is to do: of the parts and systems it names. Figure 6 shows the times of Table 2's runs."""
        parts = self.wishes.only | ({"table2"} if "figure6" in self.wishes.only else set())
        return [
            wanted
            for wanted in self.wanted
            if wanted.part in parts and wanted.setting.system in self.wishes.models
        ]

    @property
    def distinct(self) -> dict[str, Setting]:
        """The runs that are asked for, by their keys."""
        return {self.key(wanted.setting): wanted.setting for wanted in self.asked}

    def key(self, setting: Setting) -> str:
        decides = {
            "version": _OUTCOMES,
            "data": self.data.about["identity"],
            "split": self.wishes.split,
            **asdict(setting),
        }
        return f"{setting.system}-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]}"


def plan(data: Dataset, config: Config, wishes: Wishes) -> Plan:
    """Raises `DataError` when the data are too few, or their test part says nothing."""
    split = Split.of(len(data), wishes.split)
    require_enough(data, split)
    made = Plan(
        data,
        split,
        wishes,
        paper_setting(data, split, config, wishes),
        stream_setting(data, config, wishes),
        config.learn.precision,
    )
    made.wanted.extend(_wanted(made))
    return made


def require_enough(data: Dataset, split: Split) -> None:
    if len(data) < _LEAST_EXAMPLES:
        raise DataError(
            f"{len(data):,} impressions are too few to train, validate and test on; at least {_LEAST_EXAMPLES} are needed"
        )
    if not 0 < np.count_nonzero(data.labels) < len(data):
        raise DataError(
            f"{_of_one_kind(data.labels)} among the {len(data):,} impressions of the log: nothing can be learned. A log of events must "
            "hold clicks as well as impressions, and those without a click too; a click counts within join.label_window of its impression"
        )
    for part, name in ((TRAINING, "training"), (VALIDATION, "validation"), (TEST, "test")):
        labels = data.labels[split.part == part]
        if not 0 < int(labels.sum()) < len(labels):
            raise DataError(
                f"{_of_one_kind(labels)} among the {len(labels):,} impressions of the {name} part: there is no AUC without both. "
                "Give a longer log or another --split"
            )


def _of_one_kind(labels: Labels) -> str:
    return "nothing but clicks" if labels.any() else "no click"


def paper_setting(data: Dataset, split: Split, config: Config, wishes: Wishes) -> Setting:
    """Section 3.1, "Parameter Settings", of what the configuration does not set. FNN's FM is trained until it is at its best, or, where
    model.pretrain_examples is 0, not at all."""
    model, learn = config.model, config.learn
    optimizer = _given(learn, "table_optimizer", "adam")
    rates = {name: getattr(learn, name) for name in _RATES}
    if optimizer == "adam":  # one for all parameters
        own = {
            name: rates[name] or learn.dense_learning_rate
            for name in ("table_learning_rate", "linear_learning_rate")
        }
        rates = {
            **{name: value for name, value in rates.items() if not name.endswith("beta")},
            **own,
        }
    return Setting(
        system="deepfm",
        seed=learn.seed,
        activation="paper",
        dropout=_given(model, "dropout", published.DROPOUT)
        if wishes.dropout is None
        else wishes.dropout,
        hidden=tuple(_given(model, "hidden", published.HIDDEN)),
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
        learner={
            **_common(data, config, wishes),
            **{name: getattr(learn, name) for name in names},
            "pretrain_examples": pretrain,
        },
    )


def _common(data: Dataset, config: Config, wishes: Wishes) -> dict[str, Any]:
    return {
        **{name: data.about["hashed"][name] for name in ("fields", "crosses", "value_fields")},
        **{
            name: getattr(config.model, name)
            for name in ("embedding_dim", "table_bits", "initial_scale")
        },
        "precision": choose_precision(config.learn.precision, choose_device(wishes.device)),
        "threads": config.learn.threads,
        "ftrl": config.ftrl.model_dump(exclude={"enabled"}),
    }


def _given(section: Section, name: str, otherwise: Any) -> Any:
    """What the configuration sets, or something else than its default."""
    return getattr(section, name) if name in section.model_fields_set else otherwise


def _wanted(made: Plan) -> Iterator[Wanted]:
    first = made.settings.seed
    for seed in range(first, first + made.wishes.seeds):
        for system in MODELS:
            yield Wanted("table2", "", replace(made.settings, system=system, seed=seed))
    if made.settings.device != "cpu":  # whose times Table 2 has; LR is always on the CPU
        for system in MODELS:
            if system != "lr":
                learner = {
                    **made.settings.learner,
                    "precision": choose_precision(made.precision, choose_device("cpu")),
                }
                yield Wanted(
                    "figure6",
                    "",
                    replace(
                        made.settings, system=system, seed=first, device="cpu", learner=learner
                    ),
                )
    for system in MODELS:
        yield Wanted("streaming", "", replace(made.stream, system=system))
    share = min(1.0, made.wishes.study_rows / made.split.count(TRAINING))
    for seed in range(first, first + made.wishes.study_seeds):
        for part, values in studies(made.settings.hidden, quick=made.wishes.quick).items():
            for value, changed in values.items():
                for system in DEEP:
                    setting = replace(
                        made.settings, system=system, seed=seed, share=share, **changed
                    )
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
    few = {
        "figure8": ("1.0", "0.5"),
        "figure9": ("100", "400"),
        "figure10": ("1", "3"),
        "figure11": ("constant", "diamond"),
    }
    return {
        part: {v: change for v, change in values.items() if not quick or v in few.get(part, values)}
        for part, values in whole.items()
    }


def shapes(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The paper's four, of the same number of neurons; its example is 3 layers of 200.

    >>> shapes(200, 3)
    {'constant': (200, 200, 200), 'increasing': (100, 200, 300), 'diamond': (150, 300, 150), 'decreasing': (300, 200, 100)}
    """
    rising = np.linspace(0.5, 1.5, layers) if layers > 1 else np.ones(1)
    peak = 1 - np.abs(np.linspace(-1, 1, layers)) / 2 if layers > 1 else np.ones(1)
    peak = peak * layers / peak.sum()
    sizes = {
        "constant": np.ones(layers),
        "increasing": rising,
        "diamond": peak,
        "decreasing": rising[::-1],
    }
    return {
        name: tuple(int(round(width * share)) for share in of.tolist())
        for name, of in sizes.items()
    }
