"""The embedding table: one row of 4-byte floats per feature bucket, [ V x K | w | state | padding to 64 bytes ], on the device.

Weights, first-order weight and optimiser state of a feature lie side by side, so a gather brings them together (in one cache line, for
K up to 13) and the update touches them while they are hot. The gradient never becomes table-sized: the ids of a batch are sorted, the
gradients of each distinct row summed in batch order (which is why two runs are equal bit for bit), and the optimiser reads and writes
those rows alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stream_ctr.errors import ConfigError

_LINE = 16  # floats in 64 bytes


def columns(embedding_dim: int) -> int:
    """Floats in a row."""
    return -(-(embedding_dim + 1 + 2) // _LINE) * _LINE


class Table:
    """2 ** `bits` rows that begin with the embedding V, `embedding_dim` wide, and the first-order weight w; these are what is gathered.

    optimizer "adagrad" steps by rate / (beta + sqrt(n)) times the gradient, n being the sum of the squared gradients up to this one
    (the per-coordinate rate of McMahan et al. 2013, section 3.1): one n for the K coordinates of V, of their mean square, and one for w.
    beta keeps a feature's first steps short, which plain Adagrad makes as long as any. "sgd" steps by the rate.
    """

    def __init__(
        self,
        *,
        bits: int,
        embedding_dim: int,
        optimizer: str = "adagrad",
        learning_rate: float = 0.05,
        beta: float = 3.0,
        linear_learning_rate: float = 0.1,
        linear_beta: float = 1.0,
        initial_scale: float = 0.01,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.embedding_dim = embedding_dim
        self.optimizer = optimizer
        self.learning_rate, self.beta = learning_rate, beta
        self.linear_learning_rate, self.linear_beta = linear_learning_rate, linear_beta
        width = columns(embedding_dim)
        try:
            self.rows = torch.zeros(1 << bits, width, dtype=torch.float32)
        except RuntimeError:
            raise ConfigError(f"no memory for a table of 2^{bits} rows of {4 * width} bytes; lower model.table_bits") from None
        self.rows[:, :embedding_dim].normal_(0.0, initial_scale, generator=torch.Generator().manual_seed(seed))
        self.rows = self.rows.to(device)

    def gather(self, ids: Tensor) -> Tensor:
        """`ids` [B, F] -> [B, F, K + 1]."""
        rows = self.rows.index_select(0, ids.reshape(-1))
        return rows[:, : self.embedding_dim + 1].reshape(*ids.shape, self.embedding_dim + 1)

    def update(self, ids: Tensor, gradient: Tensor) -> None:
        """One optimiser step in place; `gradient` [B, F, K + 1] of the batch's summed loss by what `gather(ids)` returned."""
        ordered, order = torch.sort(ids.reshape(-1), stable=True)
        touched, counts = torch.unique_consecutive(ordered, return_counts=True)
        summed = torch.segment_reduce(gradient.reshape(len(order), -1).index_select(0, order), "sum", lengths=counts, unsafe=True)
        rows = self.rows.index_select(0, touched)  # [U, width]
        k = self.embedding_dim
        if self.optimizer == "adagrad":
            rows[:, k + 1] += summed[:, :k].square().mean(dim=1)
            rows[:, k + 2] += summed[:, k].square()
            summed[:, :k] /= self.beta + rows[:, k + 1 : k + 2].sqrt()
            summed[:, k] /= self.linear_beta + rows[:, k + 2].sqrt()
        rows[:, :k] -= self.learning_rate * summed[:, :k]
        rows[:, k] -= self.linear_learning_rate * summed[:, k]
        self.rows.index_copy_(0, touched.long(), rows)
