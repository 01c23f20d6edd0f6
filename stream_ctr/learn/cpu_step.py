"""Steps on the CPU. The threads of a pool share first the parts of a batch, then the updates.

`BatchStep` takes one step a batch, with the table optimisers "adagrad" and "adam":

    per part    gather rows -> w, v -> model forward -> dL/dlogit = p - label -> backward
                -> gradients of w, of v and of the parameters
    meanwhile   sort the ids of the batch
    then        pieces of the parameters: sum the gradients of the parts, Adam, bfloat16 copy
                pieces of the sorted ids: sum the gradients of each row, optimiser in place

`OnlineStep` in `online_step` is the other one. The parts depend on the size of the batch alone. One
thread computes each part, and the parts are summed in their order, so any number of threads gives
the same model, bit for bit. Within a step, only torch's own operations allocate memory in the order
of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.learn import table_kernels
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.step import (
    LARGEST_GRADIENT,
    Batch,
    Ids,
    Labels,
    StepOptions,
    Values,
    dropout_seed,
)
from stream_ctr.learn.table import Table
from stream_ctr.learn.table_kernels import SortedIds
from stream_ctr.learn.thread_pool import Task, ThreadPool

# Matrix products of fewer rows take longer per example, but a few threads should each have a part.
# Every part has gradients of its own, so their number is limited.
_PART_ROWS = 1024
_MIN_PART_ROWS = 256
_USUAL_PARTS = 4
_MAX_PARTS = 16
ROW_MULTIPLE = 16
PREDICTED_ROWS = 256
"""The rows of a part of a prediction, under the online rule."""


def parts_of(batch_size: int) -> list[slice]:
    """Return the parts of a batch as slices of equal size.

    The equal size makes an example's logit independent of its position in the batch. Together the
    parts may have a few rows more than the batch.

    >>> parts_of(512), parts_of(1000)[-1], len(parts_of(4096)), len(parts_of(65536))
    ([slice(0, 256, None), slice(256, 512, None)], slice(672, 1008, None), 4, 16)
    """
    count = max(batch_size // _PART_ROWS, min(batch_size // _MIN_PART_ROWS, _USUAL_PARTS), 1)
    count = min(count, _MAX_PARTS)
    rows = -(-batch_size // (ROW_MULTIPLE * count)) * ROW_MULTIPLE
    return [slice(start, start + rows) for start in range(0, rows * count, rows)]


def predicted_parts(batch_size: int, *, online: bool) -> list[slice]:
    """Return the parts in which up to `batch_size` examples are predicted.

    Under the `online` rule, batches grow, and parts of a prediction have a size of their own.

    >>> predicted_parts(512, online=True) == parts_of(512)
    True
    >>> len(predicted_parts(4096, online=True)), len(predicted_parts(4096, online=False))
    (16, 4)
    """
    if not online:
        return parts_of(batch_size)
    rows = min(PREDICTED_ROWS, -(-batch_size // ROW_MULTIPLE) * ROW_MULTIPLE)
    return [slice(start, start + rows) for start in range(0, batch_size, rows)]


class CpuStep:
    """The buffers of a step on batches of up to `options.batch_size` examples, and predictions.

    `intercept` is (w0, n0), float64 [2]: the constant of the logit, and its sum of squared
    gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        adam: FlatAdam,
        intercept: npt.NDArray[np.float64],
        options: StepOptions,
        *,
        threads: int,
    ) -> None:
        self._model = model
        self._table = table
        self._adam = adam
        self._intercept = intercept
        self._options = options
        self._parts = parts_of(options.batch_size)
        self._predicted_parts = self._parts
        self._pool = ThreadPool(threads)
        # Parts run at the same time, so each draws from a generator of its own.
        self._generators = [torch.Generator() if options.dropout else None for _ in self._parts]
        rows = -(-self._buffered_rows() // PREDICTED_ROWS) * PREDICTED_ROWS
        columns = options.columns
        width = table.width
        self._value_fields = list(options.value_fields)
        self._ids = np.zeros((rows, columns), np.int32)
        self._scale = torch.ones(rows, columns) if self._value_fields else torch.ones(0, 0)
        self._labels = torch.zeros(rows)
        self._w = torch.zeros(rows, columns)
        self._v = torch.zeros(rows, columns, width)
        # Gradients of the loss or, in an online step, of the network's logit.
        self._grad_w = torch.zeros(rows, columns)
        self._grad_v = torch.zeros(rows, columns, width)
        self._logits = torch.zeros(rows)
        self._keys = np.empty(rows * columns, np.int32)
        self._order = np.empty(rows * columns, np.int32)
        self._spare = np.empty((2, rows * columns), np.int32)
        self._gather = table_kernels.gather(width)

    def _buffered_rows(self) -> int:
        """Return the number of rows of the parts of a batch that are here at once."""
        return self._parts[-1].stop

    def _parts_for(self, n: int) -> list[slice]:
        """Return the parts that a batch of `n` examples is learned in, some of them maybe empty."""
        return self._parts

    def _readable_rows(self) -> npt.NDArray[np.float32]:
        """Return the rows that the ids in the buffer are places in."""
        return self._table.rows.numpy()

    def predict(self, ids: Ids, values: Values | None) -> npt.NDArray[np.float32]:
        """Return the logits [n] without dropout."""
        n = len(ids)
        self._load(ids, values)
        parts = [part for part in self._predicted_parts if part.start < n]
        with one_torch_thread():
            self._pool.run([partial(self._score, part) for part in parts])
        return self._logits[:n].numpy() + np.float32(self._intercept[0])

    def _load(self, ids: Ids, values: Values | None) -> None:
        """Copy a batch into the buffers; the rows behind it become padding."""
        n = len(ids)
        self._ids[:n] = ids
        self._ids[n:] = 0
        if values is not None and values.size:
            scale = self._scale.numpy()
            scale[:n, self._value_fields] = values
            scale[n:, self._value_fields] = 1.0

    @cached_property
    def _gradients(self) -> Tensor:
        """Gradients of the parameters [parts, P]; a learner that only predicts never needs them."""
        return torch.zeros(self._most_parts(), len(self._adam.vector))

    def _most_parts(self) -> int:
        """Return the largest number of parts of a batch that are here at once."""
        return len(self._parts)

    # -- tasks ------------------------------------------------------------------------------------

    def _gathered(self, part: slice) -> tuple[Tensor, Tensor]:
        """Gather the rows of a part: `w` [n, F] and `v` [n, F, width], multiplied by the values."""
        w = self._w[part]
        v = self._v[part]
        self._gather(
            self._readable_rows(),
            self._ids[part],
            self._scale[part].numpy(),
            w.numpy(),
            v.numpy(),
        )
        return w.requires_grad_(), v.requires_grad_()

    def _score(self, part: slice) -> None:
        with torch.no_grad():
            self._logits[part] = self._model(*self._gathered(part))

    def _seeded_generator(self, index: int, steps: int) -> torch.Generator | None:
        """Return the generator of a part's dropped units, if any are dropped."""
        generator = self._generators[index]
        if generator is not None:
            generator.manual_seed(dropout_seed(self._options.seed, steps, index))
        return generator

    def _sort(self, n: int) -> None:
        count = n * self._options.columns
        table_kernels.sort_ids(
            self._ids[:n].reshape(-1), self._table.bits, self._sorted(n), self._spare[:, :count]
        )

    def _sorted(self, n: int) -> SortedIds:
        count = n * self._options.columns
        return SortedIds(self._keys[:count], self._order[:count])


class PartsOfBatch:
    """The parts of a batch of `examples` examples that are here, on their way through a step.

    `n` of its examples are in `parts`, of which the first is part `first_part` of the batch.
    """

    def __init__(
        self, n: int, parts: Sequence[slice], *, examples: int | None = None, first_part: int = 0
    ) -> None:
        self.n = n
        self.parts = parts
        self.examples = n if examples is None else examples
        self.first_part = first_part
        self.finite = np.ones(len(parts), np.bool_)


class BatchStep(CpuStep):
    """Takes one step on a batch: of the rows by the table's optimiser, of the rest by Adam.

    A step changes `table.rows` and the vectors of `adam`, of which the parameters of `model` are
    views. Nothing else.
    """

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        adam: FlatAdam,
        intercept: npt.NDArray[np.float64],
        options: StepOptions,
        *,
        threads: int,
    ) -> None:
        super().__init__(model, table, adam, intercept, options, threads=threads)
        self._parameters = tuple(model.parameters())
        self._update = table_kernels.update(
            table.embedding_dim, table.embeddings, table.rates.optimizer
        )

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None,
        steps: int,
        following: Batch | None = None,
    ) -> Tensor | None:
        """Learn one batch and return its logits [n] from before the update.

        `steps` is the number of steps before this one. Returns None, and learns nothing, when a
        logit or a gradient is not finite or the gradient explodes. `following` is used on the GPU
        only.
        """
        n = len(ids)
        self._load(ids, values)
        self._labels[:n] = torch.from_numpy(labels)
        batch = PartsOfBatch(n, [part for part in self._parts_for(n) if part.start < n])
        with one_torch_thread():
            first, *others = (
                partial(self._learn_part, batch, at, steps) for at in range(len(batch.parts))
            )
            self._pool.run([first, partial(self._sort, n), *others])
            if not batch.finite.all():
                return None
            dense = self._dense_updates(self._gradients[: len(batch.parts)], steps)
            self._pool.run([*dense, *self._table_updates(n, steps)])
        return self._logits[:n].clone()

    def _learn_part(self, batch: PartsOfBatch, at: int, steps: int) -> None:
        """Run the forward and backward pass of part `at`.

        Writes the part's rows of the buffers, its gradients [P] and whether it is finite.
        """
        part = batch.parts[at]
        gradients = self._gradients[at]
        w, v = self._gathered(part)
        logits = self._forward(part, w, v, self._seeded_generator(batch.first_part + at, steps))
        grad_logit = (torch.sigmoid(logits.detach()) - self._labels[part]) / batch.examples
        grad_logit[max(batch.n - part.start, 0) :] = 0.0  # padding
        # The gradient is that of a scalar. Torch checks an initial gradient with code whose import,
        # which includes sympy, takes half a second.
        with torch.enable_grad():
            scalar = torch.dot(logits, grad_logit)
        grad_w, grad_v, *grad_parameters = torch.autograd.grad(
            scalar, (w, v, *self._parameters), materialize_grads=True
        )
        if len(scale := self._scale[part]):
            grad_w, grad_v = grad_w * scale, grad_v * scale.unsqueeze(2)
        self._grad_w[part] = grad_w
        self._grad_v[part] = grad_v
        offset = 0
        for gradient in grad_parameters:
            end = offset + gradient.numel()
            gradients[offset:end].view_as(gradient).copy_(gradient)
            offset = end
        norm = (
            torch.linalg.vector_norm(gradients)
            + torch.linalg.vector_norm(grad_w)
            + torch.linalg.vector_norm(grad_v)
        )
        rows = slice(part.start, min(part.stop, batch.n))
        logits_are_finite = bool(self._logits[rows].isfinite().all())
        batch.finite[at] = logits_are_finite and float(norm) * batch.examples <= LARGEST_GRADIENT

    def _forward(
        self, part: slice, w: Tensor, v: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return the logits to learn from, and write the ones to return into the buffer."""
        separate = generator is not None and self._options.progressive
        if separate:
            with torch.no_grad():
                self._logits[part] = self._model(w, v)
        with torch.enable_grad():
            logits: Tensor = self._model(w, v, generator=generator)
        if not separate:
            self._logits[part] = logits.detach()
        return logits

    def _dense_updates(self, gradients: Tensor, steps: int) -> Iterator[Task]:
        pieces = self._adam.pieces(self._pool.threads)
        return (
            partial(self._adam.step, gradients, torch.tensor(float(steps)), piece)
            for piece in pieces
        )

    def _table_updates(self, n: int, steps: int) -> Iterator[Task]:
        count = n * self._options.columns
        edges = np.linspace(0, count, 2 * self._pool.threads + 1).astype(int).tolist()
        return (
            partial(self._update_rows, n, steps, first, last)
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        )

    def _update_rows(self, n: int, steps: int, first: int, last: int) -> None:
        """Update the rows whose run in the sorted ids starts within [first, last)."""
        table = self._table
        self._update(
            table.rows.numpy(),
            self._sorted(n),
            first,
            last,
            self._grad_w.view(-1).numpy(),
            self._grad_v.view(-1, table.width).numpy(),
            table.rates.at_step(steps, examples=n),
        )


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch from splitting an operation among threads: the pool's threads are the threads."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
