"""The specification of a learner: everything that a snapshot needs to rebuild it on any device.

>>> import msgspec
>>> spec = LearnerSpec(model="fm", fields=2, table_bits=8)
>>> msgspec.json.decode(msgspec.json.encode(spec), type=LearnerSpec) == spec
True
>>> msgspec.convert({"model": "fm", "fields": 2, "table_bits": 99}, LearnerSpec)
Traceback (most recent call last):
msgspec.ValidationError: Expected `int` <= 31 - at `$.table_bits`
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from stream_ctr.extensions import LONGEST_NAME, NAME

SYSTEMS = ("lr", "fm", "fnn", "ipnn", "opnn", "pnn", "lr_dnn", "fm_dnn", "deepfm")
"""The names of the paper's nine systems."""

ModelName = Annotated[
    str,
    Meta(
        pattern=NAME,
        max_length=LONGEST_NAME,
        description="One of the nine systems, or a model that was registered under this name",
    ),
]

BLEND = "blend"
"""The name of the mixture of the models of a run."""

EXPERTS = ("ftrl", "ftrl_scaled", "ftrl_pairs", "ftrl_pairs_slow")
"""The names of the logistic regressions that learn beside other models."""

TableOptimizer = Literal["online", "adagrad", "adam"]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


class FtrlRates(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The rates of FTRL-Proximal, in the letters of McMahan et al. (2013), Algorithm 1."""

    alpha: Positive = 0.1
    beta: Positive = 1.0
    l1: NotNegative = 0.0
    l2: NotNegative = 1.0


LARGEST_PAIR_BITS = 24


class Pairs(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The columns of LR over fields and pairs of fields, in a table of 2 ** `table_bits` rows.

    A column (i, i) is field i itself, a column (i, j) the pair of the fields i and j (see
    `learn.pairs`). `numbers` has the number of each field in the salts of columns. It is absent if
    these are 0, 1, 2 and so on. A run that began with the weights of another one keeps the numbers
    that fields had there.
    """

    columns: Annotated[
        tuple[tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]], ...],
        Meta(min_length=1, max_length=65536),
    ]
    table_bits: Annotated[int, Meta(ge=4, le=LARGEST_PAIR_BITS)] = 22
    numbers: tuple[Annotated[int, Meta(ge=0, le=65535)], ...] | UnsetType = UNSET


class LearnerSpec(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model, its embedding table and its optimisers.

    `fields` counts the fields of the input, `crosses` its cross products, and `value_fields` are
    the indices of the fields that carry a multiplier. `table_bits` gives a table of
    2 ** table_bits rows. A learning rate or a beta of 0 is the optimiser's own (see
    `table.Rates.per_field`).
    `ftrl` is present for `lr` only, `pairs` for an `lr` that reads pairs of fields too.

    Raises `ValueError` if the pairs are not of these fields.
    """

    model: ModelName = "deepfm"
    fields: Annotated[int, Meta(ge=1)]
    crosses: Annotated[int, Meta(ge=0, le=256)] = 0
    value_fields: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    embedding_dim: Annotated[int, Meta(ge=1, le=512)] = 10
    hidden: Annotated[tuple[Annotated[int, Meta(ge=1, le=16384)], ...], Meta(max_length=64)] = (
        400,
        400,
        400,
    )
    activation: Literal["paper", "relu", "tanh", "sigmoid"] = "paper"
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    table_bits: Annotated[int, Meta(ge=4, le=31)] = 20
    initial_scale: NotNegative = 0.01
    pretrain_examples: Annotated[int, Meta(ge=0)] = 0
    batch_size: Annotated[int, Meta(ge=1)] = 4096
    table_optimizer: TableOptimizer = "online"
    table_learning_rate: NotNegative = 0.0
    table_beta: NotNegative = 0.0
    linear_learning_rate: NotNegative = 0.0
    linear_beta: NotNegative = 0.0
    dense_learning_rate: Positive = 0.001
    dense_weight_decay: NotNegative = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    ftrl: FtrlRates | UnsetType = UNSET
    pairs: Pairs | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.pairs is UNSET:
            return
        if max(max(column) for column in self.pairs.columns) >= self.fields:
            raise ValueError(f"a column of pairs is beyond the {self.fields} fields")
        numbers = self.pairs.numbers
        if numbers is not UNSET and not len(numbers) == len(set(numbers)) == self.fields:
            raise ValueError(f"pairs need {self.fields} distinct numbers of fields")
