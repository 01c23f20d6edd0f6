"""The parts that both steps share: the arrays of a batch, the options, and the seeds of dropout."""

from __future__ import annotations

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
