"""The figures of a run or of a window, as frozen types; a report holds them under these names.

>>> import msgspec
>>> tie = Difference(logloss_difference=0.0, low=None, high=None, count=10, blocks=1)
>>> msgspec.json.encode(tie).decode()
'{"logloss_difference":0.0,"low":null,"high":null,"count":10,"blocks":1}'
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class ModelScore(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The metrics of one model. A figure without meaning, such as the AUC of one class, is None.

    The AUC comes from a histogram and is exact to `auc_error_bound`. `ne` is the logloss over the
    entropy of the set's own click-through rate `ctr`.
    """

    auc: float | None
    auc_error_bound: float | None
    logloss: float | None
    ne: float | None
    pred_over_actual: float | None
    ctr: float | None
    count: Count


class Difference(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The mean logloss of the first model minus that of another, on `count` examples of both.

    `low` and `high` bound a 95 % bootstrap interval over `blocks` blocks. They are None if there
    are too few blocks.
    """

    logloss_difference: float | None
    low: float | None
    high: float | None
    count: Count
    blocks: Count


class Paired(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The difference between the two `models`, the first and the last of the run."""

    models: list[str]
    logloss_difference: float | None
    low: float | None
    high: float | None
    count: Count
    blocks: Count


class Summary(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The metrics of all examples from number `from_example` on.

    `constant_logloss` is that of the best constant prediction, `best_possible_logloss` that of the
    true probabilities, None where they are unknown. `pairs` has the difference of the first model
    from each of the others.
    """

    from_example: Count
    models: dict[str, ModelScore]
    constant_logloss: float | None
    best_possible_logloss: float | None
    paired: Paired
    pairs: dict[str, Difference]


EMPTY = Summary(
    from_example=0,
    models={},
    constant_logloss=None,
    best_possible_logloss=None,
    paired=Paired(models=[], logloss_difference=None, low=None, high=None, count=0, blocks=0),
    pairs={},
)
"""The metrics of no model."""


class WindowSummary(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The metrics of the examples with an event time from `start_ms` to before `end_ms`.

    A `provisional` window may still change. The other fields are those of `Summary`.
    """

    start_ms: int
    end_ms: int
    models: dict[str, ModelScore]
    constant_logloss: float | None
    best_possible_logloss: float | None
    paired: Paired
    pairs: dict[str, Difference]
    provisional: bool


class FieldFigures(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The health of one field, or of one cross product, which has no `missing_rate`.

    `missing_rate` and `unseen_rate` are shares of recent examples: those without the field, and
    those whose table row had never been learned. `psi` is the population stability index of recent
    values against those before, None while there are too few. `distinct` estimates the number of
    values so far, `occupancy` the share of the table's rows that they use, and `collision_rate` the
    share of them that share a row with another value of the field.
    """

    missing_rate: float | None
    unseen_rate: float | None
    distinct: Count
    occupancy: float
    collision_rate: float
    psi: float | None


class TableFigures(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The use of the `rows` that features are hashed to.

    `occupancy` is the share of them that was learned, and `collision_rate` an estimate of the share
    of all values that share a row with another value of any field.
    """

    rows: Count
    occupancy: float
    collision_rate: float


class FieldSummary(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The health of all fields and of the table.

    Recent are `count` sampled examples with an event time from `start_ms` to before `end_ms`.
    """

    start_ms: int
    end_ms: int
    count: Count
    fields: dict[str, FieldFigures]
    table: TableFigures
