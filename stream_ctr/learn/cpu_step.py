"""A step on the CPU: the batch in parts that lanes take, each part's forward and backward pass on one lane, then the updates likewise.

    per part    gather rows -> w, v -> the model forward -> dL/dlogit = p - label -> backward -> gradients of w, v and of the parameters
    meanwhile   sort the batch's ids
    then        pieces of the parameters: sum the parts' gradients, Adam, bfloat16 copy
                pieces of the sorted ids: sum each row's gradients, optimiser in place

The parts depend on the size of the batch alone, each is computed by one thread and they are summed in their order: so the model is the
same, bit for bit, for any number of lanes. Nothing the size of a batch is allocated in a step but what torch needs within the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.learn import table_kernels
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.table import Table
from stream_ctr.learn.thread_pool import Task, ThreadPool
from stream_ctr.models.layers import dropout_from

Ids: TypeAlias = npt.NDArray[np.int32]
Labels: TypeAlias = npt.NDArray[np.uint8]
Values: TypeAlias = npt.NDArray[np.float32]
Batch: TypeAlias = tuple[Ids, Labels, Values | None]
# Of a part: products of fewer rows take longer, by the example, but there should be some for each of a few lanes. Each part has gradients.
_ROWS, _LEAST_ROWS = 1024, 256
_PARTS, _MOST_PARTS = 4, 16
# A gradient beyond it is exploding: its square, and the sum of thousands of those, must stay a number in float32.
LARGEST_GRADIENT = 1e15


def parts_of(batch_size: int) -> list[slice]:
    """The parts of a batch, all of one size, so that what an example's logit is does not depend on where in the batch it stands; together
    they may have a few rows more.

    >>> parts_of(512), parts_of(1000)[-1], len(parts_of(4096)), len(parts_of(65536))
    ([slice(0, 256, None), slice(256, 512, None)], slice(672, 1008, None), 4, 16)
    """
    count = min(max(batch_size // _ROWS, min(batch_size // _LEAST_ROWS, _PARTS), 1), _MOST_PARTS)
    rows = -(-batch_size // (16 * count)) * 16
    return [slice(start, start + rows) for start in range(0, rows * count, rows)]


class CpuStep:
    """Learns and predicts batches of up to `batch_size` examples; what it changes is `table.rows` and `adam`, that is, `model`."""

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        adam: FlatAdam,
        *,
        fields: int,
        value_fields: Sequence[int],
        batch_size: int,
        threads: int,
        seed: int,
        dropout: bool,
        progressive: bool,
    ) -> None:
        self._model, self._table, self._adam, self._seed = model, table, adam, seed
        self._parameters = tuple(model.parameters())
        self._value_fields = list(value_fields)
        self._parts = parts_of(batch_size)
        self._pool = ThreadPool(threads)
        self._progressive = progressive
        self._generators = [torch.Generator() if dropout else None for _ in self._parts]
        rows, width = self._parts[-1].stop, table.width
        self._ids = np.zeros((rows, fields), np.int32)
        self._scale = torch.ones(rows, fields) if value_fields else torch.ones(0, 0)
        self._labels = torch.zeros(rows)
        self._w, self._v = torch.zeros(rows, fields), torch.zeros(rows, fields, width)
        self._gw, self._gv = torch.zeros(rows, fields), torch.zeros(rows, fields, width)
        self._logits = torch.zeros(rows)
        places = rows * fields
        self._keys, self._order, self._spare = (
            np.empty(places, np.int32),
            np.empty(places, np.int32),
            np.empty((2, places), np.int32),
        )
        self._gather = table_kernels.gather(width)
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
        """One step; the logits [n] from before it. None, and nothing is learned, when one of them or a gradient is not finite, or the
        gradient explodes. What is `following` is of use on the GPU only."""
        n = len(ids)
        self._take(ids, values)
        self._labels[:n] = torch.from_numpy(labels)
        parts = [part for part in self._parts if part.start < n]
        gradients = self._gradients
        fine = np.zeros(len(parts), np.bool_)
        with _one_thread_each():
            work = [
                partial(self._part, index, part, n, steps, gradients[index], fine)
                for index, part in enumerate(parts)
            ]
            self._pool.run([*work[:1], partial(self._sort, n), *work[1:]])
            if not fine.all():
                return None
            self._pool.run(
                [
                    *self._dense_updates(gradients[: len(parts)], steps),
                    *self._table_updates(n, steps),
                ]
            )
        return self._logits[:n].clone()

    def predict(self, ids: Ids, values: Values | None) -> npt.NDArray[np.float32]:
        """Logits [n] without dropout."""
        n = len(ids)
        self._take(ids, values)
        with _one_thread_each():
            self._pool.run([partial(self._score, part) for part in self._parts if part.start < n])
        return self._logits[:n].numpy().copy()

    def _take(self, ids: Ids, values: Values | None) -> None:
        n = len(ids)
        self._ids[:n], self._ids[n:] = ids, 0
        if values is not None and values.size:
            scale = self._scale.numpy()
            scale[:n, self._value_fields], scale[n:, self._value_fields] = values, 1.0

    @cached_property
    def _gradients(self) -> Tensor:
        """[parts, P]; a server never needs it."""
        return torch.zeros(len(self._parts), len(self._adam.vector))

    # -- tasks ------------------------------------------------------------------------------------

    def _gathered(self, part: slice) -> tuple[Tensor, Tensor]:
        w, v = self._w[part], self._v[part]
        self._gather(
            self._table.rows.numpy(),
            self._ids[part],
            self._scale[part].numpy(),
            w.numpy(),
            v.numpy(),
        )
        return w.requires_grad_(), v.requires_grad_()

    def _score(self, part: slice) -> None:
        with torch.no_grad():
            self._logits[part] = self._model(*self._gathered(part))

    def _part(
        self,
        index: int,
        part: slice,
        n: int,
        steps: int,
        gradients: Tensor,
        fine: npt.NDArray[np.bool_],
    ) -> None:
        """Forward and backward of one part, into its rows of the buffers and its `gradients` [P]."""
        w, v = self._gathered(part)
        generator = self._generators[index]
        twice = generator is not None and self._progressive
        if twice:
            with torch.no_grad():
                self._logits[part] = self._model(w, v)  # what it predicts, with nothing dropped
        if generator is not None:
            generator.manual_seed(draw_seed(self._seed, steps, index))
        with torch.enable_grad(), dropout_from(generator):
            logits = self._model(w, v)
        if not twice:
            self._logits[part] = logits.detach()
        slope = (torch.sigmoid(logits.detach()) - self._labels[part]) / n
        slope[max(n - part.start, 0) :] = 0.0  # of the rows that are padding
        # Of a scalar: a gradient to begin with would be checked by code of torch's whose import, sympy and all, takes half a second.
        with torch.enable_grad():
            sloped = torch.dot(logits, slope)
        gw, gv, *rest = torch.autograd.grad(
            sloped, (w, v, *self._parameters), materialize_grads=True
        )
        if len(scale := self._scale[part]):
            gw, gv = gw * scale, gv * scale.unsqueeze(2)
        self._gw[part], self._gv[part] = gw, gv
        at = 0
        for gradient in rest:
            gradients[at : at + gradient.numel()].view_as(gradient).copy_(gradient)
            at += gradient.numel()
        finite = bool(self._logits[part.start : min(part.stop, n)].isfinite().all())
        size = (
            torch.linalg.vector_norm(gradients)
            + torch.linalg.vector_norm(gw)
            + torch.linalg.vector_norm(gv)
        )
        fine[index] = finite and float(size) * n <= LARGEST_GRADIENT

    def _sort(self, n: int) -> None:
        places = n * self._ids.shape[1]
        spare = self._spare[:, :places]
        table_kernels.sort_ids(
            self._ids[:n].reshape(-1),
            self._table.bits,
            self._keys[:places],
            self._order[:places],
            spare,
        )

    def _dense_updates(self, gradients: Tensor, steps: int) -> Iterator[Task]:
        pieces = self._adam.pieces(self._pool.threads)
        return (
            partial(self._adam.step, gradients, torch.tensor(float(steps)), piece)
            for piece in pieces
        )

    def _table_updates(self, n: int, steps: int) -> Iterator[Task]:
        edges = (
            np.linspace(0, n * self._ids.shape[1], 2 * self._pool.threads + 1).astype(int).tolist()
        )
        return (
            partial(self._update_rows, n, steps, first, last)
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        )

    def _update_rows(self, n: int, steps: int, first: int, last: int) -> None:
        places, table = n * self._ids.shape[1], self._table
        gw, gv = self._gw.view(-1).numpy(), self._gv.view(-1, table.width).numpy()
        self._update(
            table.rows.numpy(), self._keys[:places], self._order[:places], first, last, gw, gv, np.float32(table.rates.times(n)),
            *table.rates.floats(steps),
        )  # fmt: skip


def draw_seed(*numbers: int) -> int:
    """Of what is drawn in a step: the same for the same numbers, and unlike for any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """ThreadPool are the threads: torch splits no operation among more."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
