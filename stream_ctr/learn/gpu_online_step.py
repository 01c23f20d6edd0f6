"""The online rule on the GPU; `online_step` has its formulas, and `gpu_step` the way of a step.

    first graph      gather rows -> network forward -> backward with dL/dlogit = 1
                     -> copy the distinct rows -> step the copies, sub-batch by sub-batch
                     -> dL/dW of the layers -> is all of it finite?
                     -> logits and verdict to pinned memory
                     meanwhile, on another stream: sort the ids, group them by sub-batch and row
    second graph     Adam over the parameters; write the rows and the intercept back

A sub-batch takes two launches: one for the logits of its examples, one for the steps of its rows.
Sums are those of the CPU's rule in another order, which is fixed too.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stream_ctr.learn.gpu_step import GpuStep
from stream_ctr.learn.step import Batch, Ids, Labels, StepOptions, Values, dense_rate_scale
from stream_ctr.learn.table import Table
from stream_ctr.models.layers import Tape
from stream_ctr.models.terms import Terms

try:
    from stream_ctr.learn import triton_online
except ImportError:  # Triton comes with torch's CUDA builds for Linux only
    triton_online = None  # type: ignore[assignment]


class GpuOnlineStep(GpuStep):
    """Takes the steps of a batch by the online rule."""

    logit_type = torch.float64

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None,
        steps: int,
        following: Batch | None = None,
    ) -> Tensor | None:
        """Learn one batch; return the logits float64 [n] from before the sub-batch of each example.

        The arguments and None are those of `GpuStep.learn`.
        """
        logits = super().learn(ids, labels, values, steps, following)
        if logits is not None:
            self._memory.known_intercept[:] = self._memory.host_intercept.numpy()
            self._intercept[:] = self._memory.known_intercept
        return logits

    def _begin(self, steps: int) -> None:
        super()._begin(steps)
        memory = self._memory
        if not np.array_equal(memory.known_intercept, self._intercept):
            memory.intercept.copy_(torch.from_numpy(self._intercept))
            memory.known_intercept[:] = self._intercept

    @cached_property
    def _memory(self) -> _Memory:
        """Memory of a step; a learner that only predicts never needs it."""
        return _Memory(self._table, self._terms, self._options)

    @property
    def _terms(self) -> Terms:
        terms: Terms = self._model.terms  # type: ignore[assignment]
        return terms

    @cached_property
    def _layer_views(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """The gradients of each layer's weight and bias, views of `_gradient`."""
        views = self._adam.views(self._gradient[0])
        return {
            module: (views[f"{name}.weight"], views[f"{name}.bias"])
            for name, module in self._model.named_modules()
            if f"{name}.weight" in views
        }

    # -- what is recorded -------------------------------------------------------------------------

    def _judge(self, rows: int) -> None:
        memory = self._memory
        batch = self._feed.batch(rows)
        entries = batch.ids.numel()
        self._sort_ids(partial(memory.rows.sort, batch.ids))
        w, v = self._gathered(rows)
        tape = Tape()
        network = self._network(w, v, tape)
        logits, gradient = self._logits[:rows], memory.gradient[:rows]
        online = triton_online.OnlineBatch(
            n=batch.n,
            labels=batch.labels,
            values=batch.values,
            w=w.detach(),
            v=v.detach(),
            deep=network.deep,
            slope_w=network.slope_w,
            slope_v=network.slope_v,
            logits=logits,
            gradient=gradient,
        )
        self._await_sorted_ids()
        memory.rows.compact(entries)
        memory.stepped_intercept.copy_(memory.intercept)
        memory.rows.step(online, memory.stepped_intercept)
        memory.host_intercept.copy_(memory.stepped_intercept, non_blocking=True)
        self._write_layer_gradients(tape, gradient / batch.n)
        norms = (
            torch.linalg.vector_norm(self._gradient) * batch.n,
            torch.linalg.vector_norm(network.slope_w),
            torch.linalg.vector_norm(network.slope_v),
        )
        broken = memory.rows.broken(entries)
        if network.plain is not None:
            logits += network.plain - network.deep
        self._tell(batch, torch.stack(norms).max().masked_fill(broken, torch.inf), rows)

    def _network(self, w: Tensor, v: Tensor, tape: Tape) -> _Network:
        """Run the network forward, and backward with dL/dlogit = 1."""
        if not self._terms.network:
            return _Network(torch.zeros_like(w[:, 0]), torch.zeros_like(w), torch.zeros_like(v))
        run = self._model.deep_logits
        plain: Tensor | None = None
        if self._options.dropout and self._options.progressive:
            with torch.no_grad():
                plain = run(w, v)  # type: ignore[operator]
        with torch.enable_grad():
            deep: Tensor = run(w, v, generator=self._generator, tape=tape)  # type: ignore[operator]
        slope_w, slope_v = torch.autograd.grad(
            deep, (w, v), torch.ones_like(deep), materialize_grads=True
        )
        return _Network(deep.detach(), slope_w.contiguous(), slope_v.contiguous(), plain)

    def _write_layer_gradients(self, tape: Tape, grad_logit: Tensor) -> None:
        with torch.no_grad():
            for layer, weight, bias in tape.gradients(slice(None), grad_logit):
                weight_view, bias_view = self._layer_views[layer]
                weight_view.copy_(weight)
                bias_view.copy_(bias)

    def _change(self, rows: int) -> None:
        memory = self._memory
        batch = self._feed.batch(rows)
        if self._terms.network:
            rate_scale = batch.n.sqrt() * dense_rate_scale(1)
            self._adam.step(
                self._gradient, self._steps, slice(None), rate_scale=rate_scale, skip=self._skip
            )
        memory.rows.write_back(batch.ids.numel(), self._skip)
        memory.intercept.copy_(
            torch.where(self._skip != 0.0, memory.intercept, memory.stepped_intercept)
        )


class _Network(NamedTuple):
    """The network's logits [B] and their slopes; `plain` are those without dropout, if asked."""

    deep: Tensor
    slope_w: Tensor
    slope_v: Tensor
    plain: Tensor | None = None


class _Memory:
    """Memory that every step uses again."""

    def __init__(self, table: Table, terms: Terms, options: StepOptions) -> None:
        device = table.rows.device
        examples = options.batch_size
        self.rows = triton_online.OnlineRows(
            table, terms, examples=examples, fields=options.columns
        )
        self.gradient = torch.zeros(examples, device=device)
        """p - y of the examples [B]."""
        self.intercept = torch.zeros(2, dtype=torch.float64, device=device)
        self.known_intercept = np.zeros(2)
        """The numbers in `intercept`, as far as the host knows."""
        self.stepped_intercept = torch.zeros_like(self.intercept)
        """The intercept of the step that is being judged."""
        self.host_intercept = torch.zeros(2, dtype=torch.float64, pin_memory=device.type == "cuda")
