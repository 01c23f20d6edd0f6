"""One step on the GPU: a handful of launches a batch, whatever the model.

Everything between the copy of the batch and the verdict is one CUDA graph.

    host             one packed buffer a batch; there are two of them, in pinned memory
    copy stream      host -> device, while the previous step is running
    recorded graph   gather rows -> w, v and the FM's sums -> model forward
                     -> dL/dlogit = p - label -> backward -> is all of it finite?
                     -> Adam over the parameters
                     -> sort the ids, sum the gradients of each row, optimiser in place
                     -> the verdict to the host

Shapes are those of a full batch; the last rows of a short batch are padding of weight zero. All
decisions are made on the device: the number of examples is a number in the batch, and a step that
is not finite runs and changes nothing. The host waits once a batch, for that verdict. Meanwhile the
next batch is copied, if the caller passes it. Sums are taken in a fixed order and nothing is added
atomically, so two runs are equal bit for bit on one kind of card with one release of torch.

On the CPU the same code runs without streams or graphs, and its kernels run in Triton's
interpreter. The tests compare it there with `CpuStep`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.errors import ConfigError
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
from stream_ctr.models import FieldSums

try:
    from stream_ctr.learn import triton_kernels
except ImportError:  # Triton comes with torch's CUDA builds for Linux only
    triton_kernels = None  # type: ignore[assignment]

# Calls of a step before it is recorded, which compile kernels and allocate workspaces.
_WARM_UP_CALLS = 3


class GpuStep:
    """Learns and predicts batches of up to `options.batch_size` examples.

    A step changes `table.rows` and the vectors of `adam`, of which the parameters of `model` are
    views. Raises `ConfigError` when Triton is not installed.
    """

    def __init__(
        self, model: nn.Module, table: Table, adam: FlatAdam, options: StepOptions
    ) -> None:
        if triton_kernels is None:
            raise ConfigError(
                "device cuda: Triton is not installed; "
                "install torch's CUDA build for Linux, or use --device cpu"
            )
        self._model = model
        self._table = table
        self._adam = adam
        self._options = options
        self._parameters = tuple(model.parameters())
        device = table.rows.device
        rows = options.batch_size
        columns = options.columns
        width = table.width
        self._feed = _Feed(options, padding=len(table.rows) - 1, device=device)
        self._index = torch.arange(rows, device=device)
        self._generator = torch.Generator(device) if options.dropout else None
        self._steps = torch.zeros((), device=device)
        self._correction = torch.ones((), device=device)
        self._no_labels = np.zeros(rows, np.uint8)
        self._w = torch.zeros(rows, columns, device=device)
        self._v = torch.zeros(rows, columns, width, device=device)
        self._sums = FieldSums(
            total=torch.zeros(rows, width, device=device), pairs=torch.zeros(rows, device=device)
        )
        self._logits = torch.zeros(rows, device=device)
        self._skip = torch.zeros((), device=device)  # 1.0: the step must change nothing
        # A copy of `_skip` on the host, valid once `_verdict_copied` has happened.
        self._verdict = torch.zeros((), pin_memory=device.type == "cuda")
        self._verdict_copied = getattr(torch, device.type).Event()

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None,
        steps: int,
        following: Batch | None = None,
    ) -> Tensor | None:
        """Learn one batch and return its logits [n] from before the update, on the device.

        `steps` is the number of steps before this one. Returns None, and learns nothing, when a
        logit or a gradient is not finite or the gradient explodes. `following` are the arrays of
        the next call, if they are known: they are copied while this step runs.
        """
        step = self._recorded_step
        self._feed.load((ids, labels, values))
        self._steps.fill_(float(steps))
        self._correction.fill_(self._table.rates.correction(steps))
        if self._generator is not None:
            self._generator.manual_seed(dropout_seed(self._options.seed, steps))
        step()
        logits = self._logits[: len(ids)].clone()
        self._verdict_copied.record()
        if following is not None:
            self._feed.stage(following)
        self._verdict_copied.synchronize()
        return None if self._verdict.item() else logits

    def predict(self, ids: Ids, values: Values | None) -> npt.NDArray[np.float32]:
        """Return the logits [n] without dropout."""
        score = self._recorded_score
        self._feed.load((ids, self._no_labels[: len(ids)], values))
        score()
        return self._logits[: len(ids)].to("cpu", copy=True).numpy()

    # -- what is recorded -------------------------------------------------------------------------

    @cached_property
    def _recorded_step(self) -> Callable[[], None]:
        return self._record(self._step)

    @cached_property
    def _recorded_score(self) -> Callable[[], None]:
        return self._record(self._score)

    def _record(self, call: Callable[[], None]) -> Callable[[], None]:
        """Return a function that replays `call` as a graph; on the CPU, return `call` itself.

        Before it is recorded, `call` runs with a batch of no examples, from which nothing is
        learned.
        """
        if self._index.device.type != "cuda":
            return call
        self._feed.clear()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with _tf32(), torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        # Other threads may load a model meanwhile, so only this thread's errors count.
        with _tf32(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        return graph.replay

    def _forward(self, w: Tensor, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        logits: Tensor = self._model(w, v, sums=self._sums, generator=generator)
        return logits

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Gather the rows of the batch: `w` [B, F] and `v` [B, F, width]; also writes the sums."""
        batch = self._feed.batch
        w = self._w.detach()
        v = self._v.detach()
        triton_kernels.gather(self._table, batch.ids, batch.values, w, v, self._sums)
        return w.requires_grad_(), v.requires_grad_()

    def _score(self) -> None:
        with torch.no_grad():
            self._logits.copy_(self._forward(*self._gathered()))

    def _step(self) -> None:
        batch = self._feed.batch
        n = batch.n
        w, v = self._gathered()
        separate = self._options.dropout and self._options.progressive
        if separate:
            with torch.no_grad():
                self._logits.copy_(self._forward(w, v))
        with torch.enable_grad():
            logits = self._forward(w, v, self._generator)
        if not separate:
            self._logits.copy_(logits.detach())
        padding = self._index >= n
        grad_logit = (torch.sigmoid(logits.detach()) - batch.labels) / n
        grad_logit.masked_fill_(padding, 0.0)
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
        self._judge(n, padding, grad_w, grad_v)
        if self._parameters:
            self._adam.step(self._gradient, self._steps, slice(None), skip=self._skip)
        self._update(batch.ids, grad_w, grad_v, n, self._skip, self._correction)

    def _judge(self, n: Tensor, padding: Tensor, grad_w: Tensor, grad_v: Tensor) -> None:
        """Decide on the device if the step counts, and copy the verdict to the host."""
        norm = sum(torch.linalg.vector_norm(each) for each in (self._gradient, grad_w, grad_v))
        finite = (self._logits.isfinite() | padding).all()
        self._skip.copy_(~(finite & (norm * n <= LARGEST_GRADIENT) & (n > 0)))
        self._verdict.copy_(self._skip, non_blocking=True)

    @cached_property
    def _gradient(self) -> Tensor:
        """Gradient of the parameters [1, P]; a learner that only predicts never needs it."""
        return torch.zeros(1, len(self._adam.vector), device=self._index.device)

    @cached_property
    def _update(self) -> triton_kernels.Update:
        return triton_kernels.Update(
            self._table, examples=self._options.batch_size, fields=self._options.columns
        )


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Let float32 products use TF32: factors with 10 bits of mantissa, sums in float32.

    Tensor cores multiply such factors.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Packed(NamedTuple):
    """A batch in one buffer, so that one copy takes it to the device."""

    ids: Tensor  # int32 [B, F]
    labels: Tensor  # [B]
    numbers: Tensor  # [B, V], the values of the fields that carry one
    n: Tensor  # int32, the number of examples; the other rows are padding
    values: Tensor | None = None  # [B, F] on the device, the values of all fields

    @classmethod
    def views(cls, buffer: Tensor, options: StepOptions) -> _Packed:
        """Return views of a `buffer` of `_buffer_size(options)` numbers of type int32."""
        rows = options.batch_size
        fields = options.columns
        numbers = len(options.value_fields)
        ids, labels, values, n = torch.split(buffer, [rows * fields, rows, rows * numbers, 1])
        return cls(
            ids.view(rows, fields),
            labels.view(torch.float32),
            values.view(torch.float32).view(rows, numbers),
            n.view(()),
        )


def _buffer_size(options: StepOptions) -> int:
    numbers_per_row = options.columns + 1 + len(options.value_fields)
    return options.batch_size * numbers_per_row + 1


class _Slot:
    """A buffer on the host and one on the device, with the batch on its way through them."""

    def __init__(self, options: StepOptions, device: torch.device) -> None:
        size = _buffer_size(options)
        self.host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.device = torch.zeros(size, dtype=torch.int32, device=device)
        self.arrays = _Packed.views(self.host, options)
        backend = getattr(torch, device.type)
        self.copied = backend.Event()  # from `host` to `device`
        self.loaded = backend.Event()  # from `device` into the feed's batch
        self.loaded.record()  # until then, `device` is filled with zeros
        self.batch: Batch | None = None  # staged, and not loaded yet


class _Feed:
    """Copies batches into `batch`, whose memory never moves; the next one may be on its way."""

    def __init__(self, options: StepOptions, *, padding: int, device: torch.device) -> None:
        # Streams and events; those of torch.cpu do nothing.
        self._backend: Any = getattr(torch, device.type)
        self._padding = padding
        self._slots = _Slot(options, device), _Slot(options, device)
        self._stream = self._backend.Stream()
        self._buffer = torch.zeros(_buffer_size(options), dtype=torch.int32, device=device)
        self.batch = _Packed.views(self._buffer, options)
        self._value_fields = torch.tensor(options.value_fields, dtype=torch.int64, device=device)
        if options.value_fields:
            values = torch.ones(options.batch_size, options.columns, device=device)
            self.batch = self.batch._replace(values=values)

    def load(self, batch: Batch) -> None:
        """Copy `batch` into the feed's batch, in the order of the current stream."""
        staged = (
            slot
            for slot in self._slots
            if slot.batch is not None and all(map(_same_memory, slot.batch, batch))
        )
        slot = next(staged, None) or self.stage(batch)
        # A staged batch that was not loaded next may have changed by the time it is.
        for each in self._slots:
            each.batch = None
        slot.copied.wait()
        self._buffer.copy_(slot.device)
        slot.loaded.record()
        if self.batch.values is not None:
            self.batch.values.index_copy_(1, self._value_fields, self.batch.numbers)

    def stage(self, batch: Batch) -> _Slot:
        """Start copying `batch`. Its arrays must not change until it is loaded."""
        slot = next((slot for slot in self._slots if slot.batch is None), self._slots[0])
        slot.batch = batch
        ids, labels, values = batch
        n = len(ids)
        slot.copied.synchronize()
        arrays = slot.arrays
        arrays.ids.numpy()[:n] = ids
        arrays.ids.numpy()[n:] = self._padding
        arrays.labels.numpy()[:n] = labels
        if values is not None and values.size:
            arrays.numbers.numpy()[:n] = values
            arrays.numbers.numpy()[n:] = 1.0
        arrays.n.fill_(n)
        with self._backend.stream(self._stream):
            slot.loaded.wait()
            slot.device.copy_(slot.host, non_blocking=True)
            slot.copied.record()
        return slot

    def clear(self) -> None:
        """Make the feed's batch one of no examples."""
        self._buffer.zero_()


def _same_memory(first: npt.NDArray[Any] | None, second: npt.NDArray[Any] | None) -> bool:
    """Return True if both are the same numbers in memory; equal numbers elsewhere do not count."""
    if first is None or second is None:
        return first is second
    return (
        first.ctypes.data == second.ctypes.data
        and first.shape == second.shape
        and first.strides == second.strides
    )
