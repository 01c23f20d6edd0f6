"""The embedding table: one row of 4-byte floats per feature bucket, on the device.

    [ V: embeddings x K | w | state | padding to 64 bytes ]

    state     online, adagrad  n of each embedding, n of w
              adam             m of V and w, v of V and w

The weights, the first-order weight and the optimiser's state of a feature lie side by side. A
gather therefore reads them together (in one cache line, for one embedding of K up to 13 with
Adagrad), and the update touches them while they are in the cache. The gradient never becomes as
large as the table, nor a tensor of torch's autograd. Instead the ids of a batch are sorted, the
gradients of each distinct row are summed in batch order, so that two runs are equal bit for bit,
and the optimiser reads and writes those rows alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from stream_ctr.errors import ConfigError
from stream_ctr.learn.large_arrays import zeros
from stream_ctr.learn.table_kernels import BETA1, BETA2, EPSILON, StepRates, row_floats

FLOAT_BYTES = 4
_DRAWN_AT_ONCE = 1 << 16  # rows

# The optimisers' own rates: of V its rate and beta, of w its rate and beta.
_OWN_RATES = {
    "online": (1.0, 1.0, 3.0, 1.0),
    "adagrad": (1.0, 3.0, 2.0, 1.0),
    "adam": (0.001, EPSILON, 0.001, EPSILON),
}


@dataclass(frozen=True, slots=True)
class Rates:
    """The optimiser of the rows and its rates.

    "online" steps the rows several times in a batch (see `online_kernels`), by the formula of
    "adagrad". Its w is exactly FTRL-Proximal (McMahan et al. 2013, Algorithm 1) with l1 = 0 and
    l2 = 1, for gradients that come one at a time: the closed form of its weight is the weight
    before, less alpha / (beta + alpha l2 + sqrt(n)) times the gradient.

    "adagrad" steps by rate / (beta + sqrt(n)) times the gradient, where n is the sum of the squared
    gradients up to this one (the per-coordinate rate of McMahan et al. 2013, section 3.1). The K
    coordinates of an embedding share one n, of their mean square, and w has another. beta keeps the
    first steps of a feature short, which plain Adagrad makes as long as any. The gradient is that
    of the batch's summed loss: the step of a row does not depend on how many examples without it
    are in the batch.

    "adam" is lazy Adam, `torch.optim.SparseAdam`: each coordinate has moments, which change in the
    batches that contain the row and are corrected by the number of all batches. It uses the
    gradient of the mean loss, as torch and the dense part do, because its epsilon, here `beta`, was
    chosen for that.
    """

    optimizer: str = "adagrad"
    learning_rate: float = 0.05
    beta: float = 3.0
    linear_learning_rate: float = 0.1
    linear_beta: float = 1.0

    @classmethod
    def per_field(
        cls,
        optimizer: str,
        *,
        fields: int,
        columns: int = 0,
        learning_rate: float,
        beta: float,
        linear_learning_rate: float,
        linear_beta: float,
    ) -> Rates:
        """Return the rates for a model of `fields` fields.

        A rate or beta of 0 is the optimiser's own. With "online" and "adagrad" the rates are
        divided by the number of fields; the rate of w is divided by the number of `columns`, where
        the w of cross products are summed too. With "online", l2 = 1 adds that rate to the beta of
        w.

        >>> given = {"learning_rate": 0.0, "beta": 0.0, "linear_beta": 0.0}
        >>> Rates.per_field("adagrad", fields=4, linear_learning_rate=1.0, **given)
        ... # doctest: +NORMALIZE_WHITESPACE
        Rates(optimizer='adagrad', learning_rate=0.25, beta=3.0, linear_learning_rate=0.25,
              linear_beta=1.0)
        >>> Rates.per_field("online", fields=4, linear_learning_rate=0.0, **given)
        ... # doctest: +NORMALIZE_WHITESPACE
        Rates(optimizer='online', learning_rate=0.25, beta=1.0, linear_learning_rate=0.75,
              linear_beta=1.75)
        """
        own, own_beta, linear_own, linear_own_beta = _OWN_RATES[optimizer]
        rate = learning_rate or own
        linear_rate = linear_learning_rate or linear_own
        if optimizer == "adam":
            return cls(optimizer, rate, own_beta, linear_rate, linear_own_beta)
        linear_rate /= columns or fields
        linear_beta = linear_beta or linear_own_beta
        if optimizer == "online":
            linear_beta += linear_rate
        return cls(optimizer, rate / fields, beta or own_beta, linear_rate, linear_beta)

    def correction(self, steps: int) -> float:
        """Return the factor of the rates in the step after `steps` others.

        With Adam it corrects the moments, which start at 0 (Kingma and Ba 2015, the end of
        section 2). With the other optimisers it is 1.

        >>> Rates("adam").correction(0), Rates("adagrad").correction(0)
        (0.316..., 1.0)
        """
        if self.optimizer != "adam":
            return 1.0
        return math.sqrt(1.0 - BETA2 ** (steps + 1)) / (1.0 - BETA1 ** (steps + 1))

    def gradient_scale(self, examples: int) -> int:
        """Return the factor of the gradient of the mean loss of a batch of `examples` examples.

        >>> Rates("adam").gradient_scale(512), Rates("adagrad").gradient_scale(512)
        (1, 512)
        """
        return 1 if self.optimizer == "adam" else examples

    def at_step(self, steps: int, *, examples: int) -> StepRates:
        """Return the rates of the step after `steps` others on a batch of `examples` examples."""
        correction = self.correction(steps)
        return StepRates(
            np.float32(self.gradient_scale(examples)),
            np.float32(self.learning_rate * correction),
            np.float32(self.beta),
            np.float32(self.linear_learning_rate * correction),
            np.float32(self.linear_beta),
        )


class Table:
    """2 ** `bits` rows, each with `embeddings` embeddings of `embedding_dim` coordinates.

    The coordinates start normally distributed with standard deviation `initial_scale`; everything
    else starts at zero. Raises `ConfigError` when there is no memory for the rows.

    With a `part`, only these rows are here. They start as they do in a whole table.

    >>> Table(bits=4, embedding_dim=10).rows.shape
    torch.Size([16, 16])
    >>> Table(bits=4, embedding_dim=10, part=range(8, 12)).rows.shape
    torch.Size([4, 16])
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
        part: range | None = None,
    ) -> None:
        self.bits = bits
        self.first_row = part.start if part is not None else 0
        self.embedding_dim = embedding_dim
        self.embeddings = embeddings
        self.rates = rates
        floats = row_floats(embedding_dim, embeddings=embeddings, optimizer=rates.optimizer)
        try:
            rows = _zeros(1 << bits if part is None else len(part), floats)
            if initial_scale and len(rows):
                generator = torch.Generator().manual_seed(seed)
                _draw(rows[:, : self.width], self.first_row, initial_scale, generator)
            self.rows = rows.to(device)
        except (MemoryError, RuntimeError):
            raise ConfigError(
                f"no memory for a table of 2^{bits} rows of {FLOAT_BYTES * floats} bytes; "
                "lower model.table_bits"
            ) from None

    @property
    def width(self) -> int:
        """The number of coordinates of all embeddings of a row; the first-order weight follows."""
        return self.embeddings * self.embedding_dim

    def reset_optimizer(self) -> None:
        """Clear the optimiser's state and keep the weights."""
        self.rows[:, self.width + 1 :] = 0.0


def _zeros(rows: int, floats: int) -> torch.Tensor:
    return torch.from_numpy(zeros(rows, floats)) if rows else torch.zeros(0, floats)


def _draw(rows: torch.Tensor, first: int, scale: float, generator: torch.Generator) -> None:
    """Fill `rows` [n, width] with what a whole table has from row `first` on."""
    if not first and len(rows) > 1:
        rows.normal_(0.0, scale, generator=generator)
        return
    # Torch draws other numbers where the memory is contiguous, as that of a single row is.
    spare = torch.empty(min(first + len(rows), _DRAWN_AT_ONCE), rows.shape[1], 2)[..., 0]
    for start in range(0, first + len(rows), len(spare)):
        drawn = spare[: first + len(rows) - start].normal_(0.0, scale, generator=generator)
        wanted = drawn[max(first - start, 0) :]
        at = max(start - first, 0)
        rows[at : at + len(wanted)] = wanted
