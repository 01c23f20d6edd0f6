"""A step on the GPU: a handful of launches a batch, whatever the model, because all between copy and verdict is one CUDA graph.

    host             one packed buffer a batch, of two in pinned memory
    copy stream      host -> device, while the step before is at work
    then, recorded   gather rows -> w, v and FM's sums -> the model forward -> dL/dlogit = p - label -> backward -> is all of it finite?
                     -> Adam over the parameters -> sort the ids, sum each row's gradients, optimiser in place -> the verdict to the host

Shapes are those of a full batch; of a short one the last rows are padding of weight zero. All that decides is on the device: how many
examples there are is a number in the batch, and a step that is not finite is taken and changes nothing. The host waits once a batch, for
that verdict, and meanwhile has the next batch on its way, if it is told of it. Sums are taken in a fixed order and nothing is added
atomically: two runs are equal bit for bit, on one kind of card with one release of torch.

On the CPU the same code runs without streams or graphs, its kernels in Triton's interpreter: so the tests compare it with `CpuStep`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.errors import ConfigError
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.cpu_step import LARGEST_GRADIENT, Batch, Ids, Labels, Values, draw_seed
from stream_ctr.learn.table import Table
from stream_ctr.models.layers import dropout_from, gathered_with

try:
    from stream_ctr.learn import triton_kernels
except ImportError:  # Triton comes with torch's CUDA builds for Linux, and with no other
    triton_kernels = None  # type: ignore[assignment]


class GpuStep:
    """Learns and predicts batches of up to `batch_size` examples; what it changes is `table.rows` and `adam`, that is, `model`.

    Raises `ConfigError` where there is no Triton.
    """

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        adam: FlatAdam,
        *,
        fields: int,
        value_fields: Sequence[int],
        batch_size: int,
        seed: int,
        dropout: bool,
        progressive: bool,
    ) -> None:
        if triton_kernels is None:
            raise ConfigError(
                "device cuda: Triton is not installed; install torch's CUDA build for Linux, or use --device cpu"
            )
        self._model, self._table, self._adam, self._seed = model, table, adam, seed
        self._parameters = tuple(model.parameters())
        device, width = table.rows.device, table.width
        self._feed = _Feed(
            batch_size, fields, value_fields, padding=len(table.rows) - 1, device=device
        )
        self._place = torch.arange(batch_size, device=device)
        self._generator = torch.Generator(device) if dropout else None
        self._twice = dropout and progressive
        self._steps, self._correction = (
            torch.zeros((), device=device),
            torch.ones((), device=device),
        )
        self._no_labels = np.zeros(batch_size, np.uint8)
        self._w, self._v = (
            torch.zeros(batch_size, fields, device=device),
            torch.zeros(batch_size, fields, width, device=device),
        )
        self._total, self._pairs = (
            torch.zeros(batch_size, width, device=device),
            torch.zeros(batch_size, device=device),
        )
        self._logits = torch.zeros(batch_size, device=device)
        self._skip = torch.zeros((), device=device)  # 1.0: it must not be learned
        self._verdict = torch.zeros(
            (), pin_memory=device.type == "cuda"
        )  # the same on the host, from `_judged` on
        self._judged = getattr(torch, device.type).Event()

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None,
        steps: int,
        following: Batch | None = None,
    ) -> Tensor | None:
        """One step; the logits [n] from before it, on the device. None, and nothing is learned, when one of them or a gradient is not
        finite, or the gradient explodes.

        `following` are the arrays of the next call, if they are known: they are copied while this step is at work.
        """
        step = self._recorded_step
        self._feed.load((ids, labels, values))
        self._steps.fill_(float(steps))
        self._correction.fill_(self._table.rates.correction(steps))
        if self._generator is not None:
            self._generator.manual_seed(draw_seed(self._seed, steps))
        step()
        logits = self._logits[: len(ids)].clone()
        self._judged.record()
        if following is not None:
            self._feed.stage(following)
        self._judged.synchronize()
        return None if self._verdict.item() else logits

    def predict(self, ids: Ids, values: Values | None) -> npt.NDArray[np.float32]:
        """Logits [n] without dropout."""
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
        """What `call` does as a graph, to be replayed; on the CPU `call` itself.

        Before it is recorded it is called, which compiles kernels and allocates workspaces, with a batch of no examples, from which
        nothing is learned.
        """
        if self._place.device.type != "cuda":
            return call
        self._feed.clear()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with _tf32(), torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        with (
            _tf32(),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):  # others may load a model
            call()
        return graph.replay

    def _forward(self, w: Tensor, v: Tensor) -> Tensor:
        with gathered_with(v, self._total, self._pairs):
            logits: Tensor = self._model(w, v)
        return logits

    def _gathered(self) -> tuple[Tensor, Tensor]:
        batch = self._feed.batch
        w, v = self._w.detach(), self._v.detach()
        triton_kernels.gather(self._table, batch.ids, batch.values, w, v, self._total, self._pairs)
        return w.requires_grad_(), v.requires_grad_()

    def _score(self) -> None:
        with torch.no_grad():
            self._logits.copy_(self._forward(*self._gathered()))

    def _step(self) -> None:
        batch, n = self._feed.batch, self._feed.batch.n
        w, v = self._gathered()
        if self._twice:
            with torch.no_grad():
                self._logits.copy_(self._forward(w, v))  # what it predicts, with nothing dropped
        with torch.enable_grad(), dropout_from(self._generator):
            logits = self._forward(w, v)
        if not self._twice:
            self._logits.copy_(logits.detach())
        padding = self._place >= n
        slope = ((torch.sigmoid(logits.detach()) - batch.labels) / n).masked_fill_(padding, 0.0)
        gw, gv, *rest = torch.autograd.grad(
            logits, (w, v, *self._parameters), slope, materialize_grads=True
        )
        if batch.values is not None:
            gw, gv = gw * batch.values, gv * batch.values.unsqueeze(2)
        gw, gv = gw.contiguous(), gv.contiguous()
        for gradient, found in zip(self._adam.views(self._gradient[0]).values(), rest, strict=True):
            gradient.copy_(found)
        size = sum(torch.linalg.vector_norm(gradient) for gradient in (self._gradient, gw, gv))
        finite = (self._logits.isfinite() | padding).all()
        self._skip.copy_(~(finite & (size * n <= LARGEST_GRADIENT) & (n > 0)))
        self._verdict.copy_(self._skip, non_blocking=True)
        if self._parameters:
            self._adam.step(self._gradient, self._steps, slice(None), skip=self._skip)
        self._update(batch.ids, gw, gv, n, self._skip, self._correction)

    @cached_property
    def _gradient(self) -> Tensor:
        """[1, P]; a server never needs it."""
        return torch.zeros(1, len(self._adam.vector), device=self._place.device)

    @cached_property
    def _update(self) -> triton_kernels.Update:
        return triton_kernels.Update(
            self._table, examples=len(self._place), fields=self._w.shape[1]
        )


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 take their factors with 10 bits of mantissa, which the tensor cores have, and sum in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Packed(NamedTuple):
    """A batch in one buffer: one copy brings it to the device."""

    ids: Tensor  # int32 [B, F]
    labels: Tensor  # [B]
    numbers: Tensor  # [B, V]
    n: Tensor  # int32, how many examples there are; the rest is padding
    values: Tensor | None = None  # [B, F], on the device: one of each field

    @classmethod
    def of(cls, buffer: Tensor, rows: int, fields: int, numbers: int) -> _Packed:
        ids, labels, values, n = torch.split(buffer, [rows * fields, rows, rows * numbers, 1])
        return cls(
            ids.view(rows, fields),
            labels.view(torch.float32),
            values.view(torch.float32).view(rows, numbers),
            n.view(()),
        )


class _Slot:
    def __init__(self, size: int, shape: tuple[int, int, int], device: torch.device) -> None:
        self.host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.device = torch.zeros(size, dtype=torch.int32, device=device)
        self.arrays = _Packed.of(self.host, *shape)
        on = getattr(torch, device.type)
        self.copied, self.taken = on.Event(), on.Event()  # from `host`, and from `device`
        self.taken.record()  # before that, `device` is filled with zeros
        self.batch: Batch | None = None  # that is on its way and not taken


class _Feed:
    """Brings batches to `batch`, which stays in one place; the next one can be on its way meanwhile."""

    def __init__(
        self,
        rows: int,
        fields: int,
        value_fields: Sequence[int],
        *,
        padding: int,
        device: torch.device,
    ) -> None:
        shape = rows, fields, len(value_fields)
        size = rows * (fields + 1 + len(value_fields)) + 1
        self._on: Any = getattr(
            torch, device.type
        )  # streams and events; those of torch.cpu do nothing
        self._padding = padding
        self._slots = _Slot(size, shape, device), _Slot(size, shape, device)
        self._stream = self._on.Stream()
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self.batch = _Packed.of(self._buffer, *shape)
        self._value_fields = torch.tensor(value_fields, dtype=torch.int64, device=device)
        if value_fields:
            self.batch = self.batch._replace(values=torch.ones(rows, fields, device=device))

    def load(self, batch: Batch) -> None:
        """Into `batch`, in the order of the current stream."""
        staged = (
            slot
            for slot in self._slots
            if slot.batch is not None and all(map(_same, slot.batch, batch))
        )
        slot = next(staged, None) or self.stage(batch)
        for other in self._slots:  # what was to follow and did not may have changed when it comes
            other.batch = None
        slot.copied.wait()
        self._buffer.copy_(slot.device)
        slot.taken.record()
        if self.batch.values is not None:
            self.batch.values.index_copy_(1, self._value_fields, self.batch.numbers)

    def stage(self, batch: Batch) -> _Slot:
        """Have it on its way. Its arrays must stay as they are until it is loaded."""
        slot = next((slot for slot in self._slots if slot.batch is None), self._slots[0])
        slot.batch = batch
        ids, labels, values = batch
        n, arrays = len(ids), slot.arrays
        slot.copied.synchronize()
        arrays.ids.numpy()[:n], arrays.ids.numpy()[n:] = ids, self._padding
        arrays.labels.numpy()[:n] = labels
        if values is not None and values.size:
            arrays.numbers.numpy()[:n], arrays.numbers.numpy()[n:] = values, 1.0
        arrays.n.fill_(n)
        with self._on.stream(self._stream):
            slot.taken.wait()
            slot.device.copy_(slot.host, non_blocking=True)
            slot.copied.record()
        return slot

    def clear(self) -> None:
        """Have a batch of no examples."""
        self._buffer.zero_()


def _same(one: npt.NDArray[Any] | None, other: npt.NDArray[Any] | None) -> bool:
    """Whether both are the same numbers in memory, not equal ones."""
    if one is None or other is None:
        return one is other
    return (
        one.ctypes.data == other.ctypes.data
        and one.shape == other.shape
        and one.strides == other.strides
    )
