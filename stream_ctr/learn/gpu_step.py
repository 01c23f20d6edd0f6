"""One step on the GPU: two launches a batch, whatever the model.

Everything between the copy of the batch and the verdict is one CUDA graph, and what the verdict
lets happen is another.

    host             one packed buffer in pinned memory
    copy stream      host -> device, while the previous step is running
    first graph      gather rows -> w, v and the FM's sums -> model forward
                     -> dL/dlogit = p - label -> backward -> is all of it finite?
                     -> logits and verdict to pinned memory
                     meanwhile, on another stream: sort the ids
    second graph     Adam over the parameters; sum the gradients of each row, optimiser in place

`GpuBatchStep` is that step; `gpu_online_step` has the one of the online rule.

A batch is filled up with padding of weight zero, to one of a few shapes; each shape has graphs of
its own. All decisions are made on the device: the number of examples is a number in the batch, the
number of steps is counted there, and a step that is not finite runs and changes nothing. The host
waits once a batch, for the verdict, while the device runs the second graph. So it has the time of
that graph to bring the next batch, and the device need not wait. Sums are taken in a fixed order
and nothing is added atomically, so two runs are equal bit for bit on one kind of card with one
release of torch.

On the CPU the same code runs without streams or graphs, and its kernels run in Triton's
interpreter. The tests compare it there with the steps of the CPU.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.errors import ConfigError
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.gpu_feed import Feed, Packed, shapes
from stream_ctr.learn.graphs import Call, Graphs
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
from stream_ctr.learn.table_kernels import BETA1, BETA2
from stream_ctr.models import FieldSums

try:
    from stream_ctr.learn import triton_kernels
except ImportError:  # Triton comes with torch's CUDA builds for Linux only
    triton_kernels = None  # type: ignore[assignment]


class GpuStep(ABC):
    """Learns and predicts batches of up to `options.batch_size` examples.

    A step changes `table.rows`, the vectors of `adam`, of which the parameters of `model` are
    views, and `intercept` (w0, n0), float64 [2]: the constant of the logit, and its sum of squared
    gradients. Raises `ConfigError` when Triton is not installed.
    """

    logit_type = torch.float32

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        adam: FlatAdam,
        intercept: npt.NDArray[np.float64],
        options: StepOptions,
    ) -> None:
        if triton_kernels is None:
            raise ConfigError(
                "device cuda: Triton is not installed; "
                "install torch's CUDA build for Linux, or use --device cpu"
            )
        self._model = model
        self._table = table
        self._adam = adam
        self._intercept = intercept
        self._options = options
        self._shapes = shapes(options.batch_size)
        device = self._device = table.rows.device
        self._backend: Any = getattr(torch, device.type)
        rows = options.batch_size
        columns = options.columns
        width = table.width
        with self._on_device():
            self._feed = Feed(options, padding=len(table.rows) - 1, device=device)
            self._generator = torch.Generator(device) if options.dropout else None
            self._graphs = Graphs(device, self._generator)
            self._sorting = self._backend.Stream()
            self._verdict_copied = self._backend.Event()
        self._recorded: dict[int, tuple[Call, ...]] = {}
        self._no_labels = np.zeros(rows, np.uint8)
        self._index = torch.arange(rows, device=device)
        self._w = torch.zeros(rows, columns, device=device)
        self._v = torch.zeros(rows, columns, width, device=device)
        self._sums = FieldSums(
            total=torch.zeros(rows, width, device=device), pairs=torch.zeros(rows, device=device)
        )
        self._steps = torch.zeros((), device=device)
        self._known_steps = 0  # the number in `_steps`
        self._skip = torch.zeros((), device=device)  # 1.0: the step must change nothing
        # The copies on the host are valid once `_verdict_copied` has happened.
        self._logits = torch.zeros(rows, dtype=self.logit_type, device=device)
        self._host_logits = self._pinned(self._logits)
        self._verdict = self._pinned(self._skip)

    def _pinned(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=like.dtype, pin_memory=self._device.type == "cuda")

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make the step's card the current one, of which a process has one for each thread."""
        if self._device.type == "cuda":
            return torch.cuda.device(self._device)
        return contextlib.nullcontext()

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None,
        steps: int,
        following: Batch | None = None,
    ) -> Tensor | None:
        """Learn one batch and return its logits [n] from before the update, on the host.

        `steps` is the number of steps before this one. Returns None, and learns nothing, when a
        logit or a gradient is not finite or the gradient explodes. `following` are the arrays of
        the next call, if they are known: they are copied while this step runs.
        """
        with self._on_device():
            rows = self._shape(len(ids))
            judge, change = self._recorded_step(rows)
            self._feed.load((ids, labels, values), rows)
            self._begin(steps)
            judge()
            self._verdict_copied.record()
            change()
            if following is not None:
                self._feed.load_ahead(following, self._shape(len(following[0])))
            self._verdict_copied.synchronize()
        if self._verdict.item():
            return None
        self._known_steps += 1
        return self._host_logits[: len(ids)].clone()

    def predict(self, ids: Ids, values: Values | None) -> npt.NDArray[np.float32]:
        """Return the logits [n] without dropout."""
        with self._on_device():
            score = self._recorded_score
            labels = self._no_labels[: len(ids)]
            self._feed.load((ids, labels, values), self._options.batch_size)
            score()
            logits = self._scores[: len(ids)].to("cpu", copy=True).numpy()
        return logits + np.float32(self._intercept[0])

    def _shape(self, n: int) -> int:
        return next(rows for rows in self._shapes if rows >= n)

    def _begin(self, steps: int) -> None:
        """Bring to the device what was changed on the host since the last step."""
        if steps != self._known_steps:
            self._steps.fill_(float(steps))
            self._known_steps = steps
        if self._generator is not None:
            self._generator.manual_seed(dropout_seed(self._options.seed, steps))

    # -- what is recorded -------------------------------------------------------------------------

    def _recorded_step(self, rows: int) -> tuple[Call, ...]:
        """Return what runs to the verdict on a batch of `rows` rows, and what follows it.

        Both run with a batch of no examples before they are recorded. Nothing is learned from it.
        """
        if rows not in self._recorded:
            self._feed.clear()
            calls = partial(self._judge, rows), partial(self._change, rows)
            self._recorded[rows] = self._graphs.record(*calls)
        return self._recorded[rows]

    @cached_property
    def _recorded_score(self) -> Call:
        self._feed.clear()
        (score,) = self._graphs.record(self._score)
        return score

    @cached_property
    def _scores(self) -> Tensor:
        return torch.zeros(self._options.batch_size, device=self._device)

    def _score(self) -> None:
        rows = self._options.batch_size
        w, v = self._gathered(rows)
        with torch.no_grad():
            self._scores.copy_(self._model(w, v, sums=self._sums_of(rows)))

    def _gathered(self, rows: int) -> tuple[Tensor, Tensor]:
        """Gather the rows of the batch: `w` [B, F] and `v` [B, F, width]; also writes the sums."""
        batch = self._feed.batch(rows)
        w = self._w[:rows].detach()
        v = self._v[:rows].detach()
        triton_kernels.gather(self._table, batch.ids, batch.values, w, v, self._sums_of(rows))
        return w.requires_grad_(), v.requires_grad_()

    def _sums_of(self, rows: int) -> FieldSums:
        return FieldSums(self._sums.total[:rows], self._sums.pairs[:rows])

    @abstractmethod
    def _judge(self, rows: int) -> None:
        """Compute logits, gradients and the verdict on the batch of `rows` rows.

        It changes nothing that outlives the step, and ends with `_tell`.
        """

    @abstractmethod
    def _change(self, rows: int) -> None:
        """Take the step that was judged, unless `_skip` is 1."""

    def _sort_ids(self, sort: Call) -> None:
        """Run `sort` on a stream of its own; `_await_sorted_ids` waits for it."""
        self._sorting.wait_stream(self._backend.current_stream())
        with self._backend.stream(self._sorting):
            sort()

    def _await_sorted_ids(self) -> None:
        self._backend.current_stream().wait_stream(self._sorting)

    def _tell(self, batch: Packed, norm: Tensor, rows: int) -> None:
        """Decide on the device if the step counts; copy the verdict and the logits to the host.

        `norm` is that of the gradients of the summed loss.
        """
        padding = self._index[:rows] >= batch.n
        logits = self._logits[:rows]
        finite = (logits.isfinite() | padding).all()
        self._skip.copy_(~(finite & (norm <= LARGEST_GRADIENT) & (batch.n > 0)))
        self._host_logits[:rows].copy_(logits, non_blocking=True)
        self._verdict.copy_(self._skip, non_blocking=True)

    @cached_property
    def _gradient(self) -> Tensor:
        """Gradient of the parameters [1, P]; a learner that only predicts never needs it."""
        return torch.zeros(1, len(self._adam.vector), device=self._device)


class _Gradients(NamedTuple):
    """Gradients of the mean loss, from the verdict to the update."""

    w: Tensor
    v: Tensor
    correction: Tensor


class GpuBatchStep(GpuStep):
    """Takes one step on a batch: of the rows by the table's optimiser, of the rest by Adam."""

    _gradients: _Gradients

    @cached_property
    def _parameters(self) -> tuple[Tensor, ...]:
        return tuple(self._model.parameters())

    @cached_property
    def _update(self) -> triton_kernels.Update:
        return triton_kernels.Update(
            self._table, examples=self._options.batch_size, fields=self._options.columns
        )

    def _judge(self, rows: int) -> None:
        batch = self._feed.batch(rows)
        n = batch.n
        self._sort_ids(partial(self._update.sort, batch.ids))
        w, v = self._gathered(rows)
        logits = self._forward(w, v, rows)
        grad_logit = (torch.sigmoid(logits.detach()) - batch.labels) / n
        grad_logit.masked_fill_(self._index[:rows] >= n, 0.0)  # padding
        grad_w, grad_v, *grad_parameters = torch.autograd.grad(
            logits, (w, v, *self._parameters), grad_logit, materialize_grads=True
        )
        if batch.values is not None:
            grad_w, grad_v = grad_w * batch.values, grad_v * batch.values.unsqueeze(2)
        grad_w = grad_w.contiguous()
        grad_v = grad_v.contiguous()
        views = self._adam.views(self._gradient[0]).values()
        for view, gradient in zip(views, grad_parameters, strict=True):
            view.copy_(gradient)
        self._gradients = _Gradients(grad_w, grad_v, self._correction())
        norms = [torch.linalg.vector_norm(each) for each in (self._gradient, grad_w, grad_v)]
        self._tell(batch, torch.stack(norms).sum() * n, rows)
        self._await_sorted_ids()

    def _forward(self, w: Tensor, v: Tensor, rows: int) -> Tensor:
        """Return the logits to learn from, and write the ones to return into the buffer."""
        sums = self._sums_of(rows)
        separate = self._options.dropout and self._options.progressive
        if separate:
            with torch.no_grad():
                self._logits[:rows].copy_(self._model(w, v, sums=sums))
        with torch.enable_grad():
            logits: Tensor = self._model(w, v, sums=sums, generator=self._generator)
        if not separate:
            self._logits[:rows].copy_(logits.detach())
        return logits

    def _correction(self) -> Tensor:
        """Return the factor of the table's rates (see `Rates.correction`)."""
        if self._table.rates.optimizer != "adam":
            return torch.ones((), device=self._device)
        # Torch raises a number to the power of a tensor by a copy from the host, which a graph
        # must not have.
        steps = self._steps.double() + 1.0
        first, second = (-torch.expm1(steps * float(np.log(beta))) for beta in (BETA1, BETA2))
        return (second.sqrt() / first).float()

    def _change(self, rows: int) -> None:
        if self._parameters:
            self._adam.step(self._gradient, self._steps, slice(None), skip=self._skip)
        grad_w, grad_v, correction = self._gradients
        self._update(grad_w, grad_v, self._feed.batch(rows).n, self._skip, correction)
