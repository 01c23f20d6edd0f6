"""The embedding table: one row of 4-byte floats per feature bucket, on the device.

    [ V: embeddings x K | w | state | padding to 64 bytes ]

    state     adagrad  n of each embedding, n of w
              adam     m of V and w, v of V and w
              sgd      nothing

Weights, first-order weight and optimiser state of a feature lie side by side, so a gather brings them together (in one cache line, for one
embedding of K up to 13 with Adagrad) and the update touches them while they are hot. The gradient never becomes table-sized, nor a tensor
of torch's autograd: the ids of a batch are sorted, the gradients of each distinct row summed in batch order (which is why two runs are
equal bit for bit), and the optimiser reads and writes those rows alone.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stream_ctr.errors import ConfigError
from stream_ctr.learn.table_kernels import BETA1, BETA2, EPSILON, LINE, used

# Learning rates of V and w where none are given.
_OWN_RATES = {"adagrad": (1.0, 2.0), "sgd": (1.0, 2.0), "adam": (0.001, 0.001)}


def columns(embedding_dim: int, *, embeddings: int = 1, optimizer: str = "adagrad") -> int:
    """Floats in a row.

    >>> columns(10), columns(10, embeddings=2), columns(10, optimizer="adam")
    (16, 32, 48)
    """
    return -(-used(embedding_dim, embeddings, optimizer) // LINE) * LINE


@dataclass(frozen=True, slots=True)
class Rates:
    """How the rows of a batch step.

    "adagrad" steps by rate / (beta + sqrt(n)) times the gradient, n being the sum of the squared gradients up to this one (the
    per-coordinate rate of McMahan et al. 2013, section 3.1): one n for the K coordinates of an embedding, of their mean square, and one for
    w. beta keeps a feature's first steps short, which plain Adagrad makes as long as any. "sgd" steps by the rate. The gradient of both is
    that of the batch's summed loss: a row's step does not depend on how many examples without it were in the batch.

    "adam" is lazy Adam, `torch.optim.SparseAdam`: moments for each coordinate, which change in the batches that have the row, and are
    corrected by the number of all batches. Its gradient is that of the mean loss, as in torch and for the dense part, since its epsilon,
    which is `beta` here, was made for that.
    """

    optimizer: str = "adagrad"
    learning_rate: float = 0.05
    beta: float = 3.0
    linear_learning_rate: float = 0.1
    linear_beta: float = 1.0

    @classmethod
    def of(
        cls, optimizer: str, *, fields: int, columns: int = 0, learning_rate: float, beta: float, linear_learning_rate: float,
        linear_beta: float,
    ) -> Rates:  # fmt: skip
        """A rate of 0 is the optimiser's own. With Adagrad and SGD they are divided by the number of fields; that of w by the number of
        `columns`, where the w of cross products are summed too.

        >>> Rates.of("adagrad", fields=4, learning_rate=0.0, beta=3.0, linear_learning_rate=1.0, linear_beta=1.0)
        Rates(optimizer='adagrad', learning_rate=0.25, beta=3.0, linear_learning_rate=0.25, linear_beta=1.0)
        >>> Rates.of("adam", fields=4, learning_rate=0.0, beta=3.0, linear_learning_rate=0.01, linear_beta=1.0)
        Rates(optimizer='adam', learning_rate=0.001, beta=1e-08, linear_learning_rate=0.01, linear_beta=1e-08)
        """
        own, linear_own = _OWN_RATES[optimizer]
        rate, linear_rate = learning_rate or own, linear_learning_rate or linear_own
        if optimizer == "adam":
            return cls(optimizer, rate, EPSILON, linear_rate, EPSILON)
        return cls(optimizer, rate / fields, beta, linear_rate / (columns or fields), linear_beta)

    def correction(self, steps: int) -> float:
        """What the rates are multiplied by in the step after `steps` others: with Adam, what corrects its moments, which began with 0
        (Kingma and Ba 2015, the end of section 2).

        >>> Rates("adam").correction(0), Rates("adagrad").correction(0)
        (0.316..., 1.0)
        """
        return (
            math.sqrt(1.0 - BETA2 ** (steps + 1)) / (1.0 - BETA1 ** (steps + 1))
            if self.optimizer == "adam"
            else 1.0
        )

    def times(self, examples: int) -> int:
        """By what to multiply the gradient of a batch's mean loss."""
        return 1 if self.optimizer == "adam" else examples

    def floats(self, steps: int = 0) -> tuple[np.float32, np.float32, np.float32, np.float32]:
        """Those of the step after `steps` others, in float32 as the compiled loops want them."""
        correction = self.correction(steps)
        rate, linear_rate = self.learning_rate * correction, self.linear_learning_rate * correction
        return (
            np.float32(rate),
            np.float32(self.beta),
            np.float32(linear_rate),
            np.float32(self.linear_beta),
        )


class Table:
    """2 ** `bits` rows, each of `embeddings` of `embedding_dim` coordinates. They are normally distributed with `initial_scale` to begin
    with, all else is zero.

    Raises `ConfigError` when there is no memory for them.
    """

    def __init__(
        self,
        *,
        bits: int,
        embedding_dim: int,
        embeddings: int = 1,
        rates: Rates = Rates(),  # noqa: B008 - frozen
        initial_scale: float = 0.01,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.bits, self.embedding_dim, self.embeddings, self.rates = (
            bits,
            embedding_dim,
            embeddings,
            rates,
        )
        floats = columns(embedding_dim, embeddings=embeddings, optimizer=rates.optimizer)
        try:
            rows = _zeros(1 << bits, floats)
            rows[:, : self.width].normal_(
                0.0, initial_scale, generator=torch.Generator().manual_seed(seed)
            )
            self.rows = rows.to(device)
        except (OSError, RuntimeError):
            raise ConfigError(
                f"no memory for a table of 2^{bits} rows of {4 * floats} bytes; lower model.table_bits"
            ) from None

    @property
    def width(self) -> int:
        """Coordinates of all embeddings of a row; its first-order weight is behind them."""
        return self.embeddings * self.embedding_dim

    def forget(self) -> None:
        """Everything but the weights: the optimiser begins anew."""
        self.rows[:, self.width + 1 :] = 0.0


def _zeros(rows: int, width: int) -> Tensor:
    """In large pages where the system has them: rows lie anywhere, and there are far more small pages than a processor keeps in mind."""
    memory = mmap.mmap(
        -1, 4 * rows * width, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared memory gets small pages
    with contextlib.suppress(AttributeError, OSError):  # not everywhere
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, width)
