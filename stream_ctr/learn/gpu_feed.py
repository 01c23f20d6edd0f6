"""The way of a batch to the GPU: one packed buffer, one copy, while the previous step runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr.learn.step import Batch, StepOptions

_LEAST_SHAPE = 16  # examples


def shapes(batch_size: int) -> list[int]:
    """Return the numbers of rows that batches of up to `batch_size` examples are filled up to.

    A step is recorded for each of them, so there are few.

    >>> shapes(100), shapes(16), shapes(8)
    ([16, 32, 64, 100], [16], [8])
    """
    doubled = []
    rows = _LEAST_SHAPE
    while rows < batch_size:
        doubled.append(rows)
        rows *= 2
    return [*doubled, batch_size]


class Packed(NamedTuple):
    """A batch in one buffer, so that one copy takes it to the device."""

    ids: Tensor  # int32 [B, F]
    labels: Tensor  # [B]
    numbers: Tensor  # [B, V], the values of the fields that carry one
    n: Tensor  # int32, the number of examples; the other rows are padding
    values: Tensor | None = None  # [B, F] on the device, the values of all fields

    @classmethod
    def views(cls, buffer: Tensor, options: StepOptions, rows: int) -> Packed:
        """Return views of the first `packed_size` numbers of a `buffer` of type int32."""
        fields = options.columns
        numbers = len(options.value_fields)
        sizes = [rows * fields, rows, rows * numbers, 1]
        ids, labels, values, n = torch.split(buffer[: packed_size(options, rows)], sizes)
        return cls(
            ids.view(rows, fields),
            labels.view(torch.float32),
            values.view(torch.float32).view(rows, numbers),
            n.view(()),
        )


def packed_size(options: StepOptions, rows: int) -> int:
    """Return the numbers that a batch of `rows` rows takes.

    >>> packed_size(StepOptions(columns=3, batch_size=8, value_fields=(1,)), 8)
    41
    """
    return rows * (options.columns + 1 + len(options.value_fields)) + 1


class Feed:
    """Copies batches into memory that never moves.

    Batches are filled up with examples of the row `padding`, whose values are 1.

        host       pinned memory
        staging    on the device; a stream of its own copies to it, while a step reads the batch
        batch      on the device; the current stream copies to it, between two steps
    """

    def __init__(self, options: StepOptions, *, padding: int, device: torch.device) -> None:
        # Streams and events; those of torch.cpu do nothing.
        self._backend: Any = getattr(torch, device.type)
        self._options = options
        self._padding = padding
        size = packed_size(options, options.batch_size)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._staging = torch.zeros(size, dtype=torch.int32, device=device)
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self._stream = self._backend.Stream()
        if device.type == "cuda":
            # Its memory is not given to others while that stream may still write to it.
            self._staging.record_stream(self._stream)
        self._staged = self._backend.Event()  # from `host` to `staging`
        self._loaded = self._backend.Event()  # from `staging` to the batch
        self._loaded.record()  # until then, `staging` is filled with zeros
        self._value_fields = torch.tensor(options.value_fields, dtype=torch.int64, device=device)
        self._values = (
            torch.ones(options.batch_size, options.columns, device=device)
            if options.value_fields
            else None
        )
        self._ahead: Batch | None = None

    def batch(self, rows: int) -> Packed:
        """Return the memory of a batch of `rows` rows, one of `shapes`."""
        packed = Packed.views(self._buffer, self._options, rows)
        return packed if self._values is None else packed._replace(values=self._values[:rows])

    def load(self, batch: Batch, rows: int) -> None:
        """Copy `batch` to `self.batch(rows)`, in the order of the current stream."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not all(map(_same_memory, ahead, batch)):
            self._copy(batch, rows)

    def load_ahead(self, batch: Batch, rows: int) -> None:
        """Load the batch of the next call of `load`, with the same `rows`.

        Its arrays must not change until then.
        """
        self._copy(batch, rows)
        self._ahead = batch

    def clear(self) -> None:
        """Make the batch of every shape one of no examples."""
        self._ahead = None
        self._buffer.zero_()

    def _copy(self, batch: Batch, rows: int) -> None:
        ids, labels, values = batch
        n = len(ids)
        self._staged.synchronize()  # `host` may still be on its way
        host = Packed.views(self._host, self._options, rows)
        host.ids.numpy()[:n] = ids
        host.ids.numpy()[n:] = self._padding
        host.labels.numpy()[:n] = labels
        if values is not None and values.size:
            host.numbers.numpy()[:n] = values
            host.numbers.numpy()[n:] = 1.0
        host.n.fill_(n)
        size = packed_size(self._options, rows)
        with self._backend.stream(self._stream):
            self._loaded.wait()
            self._staging[:size].copy_(self._host[:size], non_blocking=True)
            self._staged.record()
        self._staged.wait()
        self._buffer[:size].copy_(self._staging[:size])
        self._loaded.record()
        packed = self.batch(rows)
        if packed.values is not None:
            packed.values.index_copy_(1, self._value_fields, packed.numbers)


def _same_memory(first: npt.NDArray[Any] | None, second: npt.NDArray[Any] | None) -> bool:
    """Return True if both are the same numbers in memory; equal numbers elsewhere do not count."""
    if first is None or second is None:
        return first is second
    return (
        first.ctypes.data == second.ctypes.data
        and first.shape == second.shape
        and first.strides == second.strides
    )
