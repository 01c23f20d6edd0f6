"""The parts that both steps share: the arrays of a batch, the options, and the seeds of dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int32]
Labels: TypeAlias = npt.NDArray[np.uint8]
Values: TypeAlias = npt.NDArray[np.float32]
Batch: TypeAlias = tuple[Ids, Labels, Values | None]

# A gradient with a larger norm is exploding. Its square, and the sum of thousands of such squares,
# must stay finite in float32.
LARGEST_GRADIENT = 1e15

# Of the online rule: the examples of a sub-batch, the smallest batch, and the examples after which
# batches grow by that number.
SUB_BATCH = 256
SMALLEST_BATCH = 16
_EXAMPLES_A_STEP_UP = 512
_USUAL_BATCH = 512


def batch_size_after(examples: int, largest: int) -> int:
    """Return the size of the batch that follows `examples` examples, under the online rule.

    A model that has seen little learns more from many small steps. It has seen 32 batches of any
    size before that size, so what the small ones cost does not grow with the stream.

    >>> [batch_size_after(examples, 4096) for examples in (0, 3000, 100_000, 1_000_000)]
    [16, 80, 3120, 4096]
    """
    grown = SMALLEST_BATCH * (examples // _EXAMPLES_A_STEP_UP)
    return min(max(grown, SMALLEST_BATCH), largest)


def dense_rate_scale(examples: int) -> float:
    """Return the factor of Adam's rate in a step on `examples` examples, under the online rule.

    The noise of a mean gradient falls with the square root of the number of its examples.

    >>> dense_rate_scale(512), dense_rate_scale(2048)
    (1.0, 2.0)
    """
    return math.sqrt(examples / _USUAL_BATCH)


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The options of a step.

    `columns` is the number of ids of an example: its fields and, where the model takes them, its
    cross products. `value_fields` are the indices of the fields that carry a multiplier. With
    `dropout` the step draws dropped units, seeded by `seed` and the number of the step. Then
    `progressive` adds a forward pass without dropout, whose logits the step returns.
    """

    columns: int
    batch_size: int
    value_fields: tuple[int, ...] = ()
    seed: int = 0
    dropout: bool = False
    progressive: bool = True


def dropout_seed(*numbers: int) -> int:
    """Return a 64-bit seed: equal for equal `numbers`, and distinct in practice for others.

    >>> dropout_seed(1, 2) == dropout_seed(1, 2), dropout_seed(1, 2) == dropout_seed(2, 1)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
