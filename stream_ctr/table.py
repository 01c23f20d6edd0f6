"""The embedding table: one row of 4-byte floats per feature bucket, [ V x K | w | state | padding to 64 bytes ], on the device.

Weights, first-order weight and optimiser state of a feature lie side by side, so a gather brings them together (in one cache line, for
K up to 13) and the update touches them while they are hot. The gradient never becomes table-sized, nor a tensor of torch's autograd: the
ids of a batch are sorted, the gradients of each distinct row summed in batch order (which is why two runs are equal bit for bit), and
the optimiser reads and writes those rows alone.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stream_ctr.errors import ConfigError

_LINE = 16  # floats in 64 bytes


def columns(embedding_dim: int) -> int:
    """Floats in a row."""
    return -(-(embedding_dim + 1 + 2) // _LINE) * _LINE


@dataclass(frozen=True, slots=True)
class Rates:
    """How the rows step, in float32 as the compiled loops want it.

    "adagrad" steps by rate / (beta + sqrt(n)) times the gradient, n being the sum of the squared gradients up to this one (the
    per-coordinate rate of McMahan et al. 2013, section 3.1): one n for the K coordinates of V, of their mean square, and one for w.
    beta keeps a feature's first steps short, which plain Adagrad makes as long as any. "sgd" steps by the rate.
    """

    optimizer: str = "adagrad"
    learning_rate: float = 0.05
    beta: float = 3.0
    linear_learning_rate: float = 0.1
    linear_beta: float = 1.0

    @property
    def adagrad(self) -> bool:
        return self.optimizer == "adagrad"

    def floats(self) -> tuple[np.float32, np.float32, np.float32, np.float32]:
        return np.float32(self.learning_rate), np.float32(self.beta), np.float32(self.linear_learning_rate), np.float32(self.linear_beta)


class Table:
    """2 ** `bits` rows, with normally distributed embeddings of `initial_scale` to begin with and all else zero.

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
        embedding_dim *= embeddings
        self.bits, self.embedding_dim, self.rates = bits, embedding_dim, rates
        width = columns(embedding_dim)
        try:
            rows = _zeros(1 << bits, width)
            rows[:, :embedding_dim].normal_(0.0, initial_scale, generator=torch.Generator().manual_seed(seed))
            self.rows = rows.to(device)
        except (OSError, RuntimeError):
            raise ConfigError(f"no memory for a table of 2^{bits} rows of {4 * width} bytes; lower model.table_bits") from None
    def forget(self) -> None:
        """Everything but the weights: the optimiser begins anew."""
        self.rows[:, self.embedding_dim + 1 :] = 0.0


def _zeros(rows: int, width: int) -> Tensor:
    """In large pages where the system has them: rows lie anywhere, and there are far more small pages than a processor keeps in mind."""
    memory = mmap.mmap(-1, 4 * rows * width, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets small pages
    with contextlib.suppress(AttributeError, OSError):  # not everywhere
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, width)
