"""The online rule on the CPU: the rows of a batch step several times, on the whole logit.

FTRL steps after each example, a network needs batches. In a batch of examples e with fields f, rows
(w_f, V_f) and labels y, the network's logit m and its slope J are computed once, and the rows step
in sub-batches of 256, in the order of the examples:

    before      m_e = network(V),  J_ef = dm_e / dV_f,  V' = V
    z_e         = w_0 + sum_f w_f + sum_{f<g} <V_f, V_g> + m_e + sum_f <J_ef, V_f - V'_f>
    g_e         = sigmoid(z_e) - y_e
    w_f         G = sum_e g_e                               n += G^2
                w_f -= (3/C) G / (1 + 3/C + sqrt(n))
    w_0         likewise, with w_0 -= (3/C) G / (1 + sqrt(n))
    V_f         G = sum_e g_e (sum_g V_g - V_f + J_ef)      n += mean(G^2)
                V_f -= (1/F) G / (1 + sqrt(n))
    after       dL/dW = the gradients of the layers' logits, each scaled by g_e;
                one step of Adam at the rate times sqrt(B / 512)

The sums over e are over the examples of a sub-batch that have the row. C is the number of columns
(fields and cross products), F that of fields. A term that a model lacks is left out: IPNN, OPNN,
PNN* and the network of FNN have no first-order weights and no pairs, so there the rows step on the
intercept and the network that is linear in its embeddings; FNN's w steps with J too. FM has no m.

The step of w is FTRL-Proximal with alpha = 3/C, beta = 1, l1 = 0 and l2 = 1 (McMahan et al. 2013,
Algorithm 1): with l1 = 0 its weight is -z / ((beta + sqrt(n)) / alpha + l2), and putting z += g -
sigma w into it gives the increment above. 3/C is a rate at which C columns that step together move
the logit at most three units.

    threads     parts of the batch: gather, network forward, backward with dL/dlogit = 1
    meanwhile   sort the ids, group them by sub-batch and row
    threads     copy the distinct rows
    one thread  step them, sub-batch by sub-batch
    the others  dL/dW of each part, once its examples have their g
    threads     Adam; write the rows back

Nothing is written before every number is known to be finite.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.learn import online_kernels
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.cpu_step import (
    ROW_MULTIPLE,
    CpuStep,
    PartsOfBatch,
    one_torch_thread,
    parts_of,
    predicted_parts,
)
from stream_ctr.learn.online_kernels import Groups, OnlineRates
from stream_ctr.learn.step import (
    LARGEST_GRADIENT,
    SUB_BATCH,
    Batch,
    Ids,
    Labels,
    StepOptions,
    Values,
    dense_rate_scale,
)
from stream_ctr.learn.table import Table
from stream_ctr.learn.thread_pool import Task
from stream_ctr.models.layers import Tape
from stream_ctr.models.terms import Terms

_ROWS_AN_OCTAVE = 8


class OnlineStep(CpuStep):
    """Takes the steps of a batch by the online rule.

    They change `table.rows`, the vectors of `adam`, of which the parameters of `model` are views,
    and `intercept`. Nothing else.
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
        self._predicted_parts = predicted_parts(options.batch_size, online=True)
        self._terms = cast(Terms, model.terms)
        self._plain = torch.zeros(len(self._logits)) if self._options.dropout else None
        kernel = table.embedding_dim, table.embeddings, self._terms
        self._scores = online_kernels.scores(*kernel)
        self._step_rows = online_kernels.step_rows(*kernel)
        rates = table.rates
        self._rates = OnlineRates(
            np.float32(rates.learning_rate),
            np.float32(rates.beta),
            np.float32(rates.linear_learning_rate),
            np.float32(rates.linear_beta),
            np.float64(rates.linear_learning_rate),
        )

    @cached_property
    def _memory(self) -> OnlineMemory:
        """Memory of a step; a learner that only predicts never needs it."""
        table = self._table
        return OnlineMemory(
            len(self._logits), self._options.columns, table.rows.shape[1], table.embedding_dim
        )

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None,
        steps: int,
        following: Batch | None = None,
    ) -> Tensor | None:
        """Learn one batch; return the logits float64 [n] from before the sub-batch of each example.

        `steps` is the number of steps before this one. Returns None, and learns nothing, when a
        logit or a gradient is not finite or the gradient explodes. `following` is used on the GPU
        only.
        """
        n = len(ids)
        self._load(ids, values)
        self._labels[:n] = torch.from_numpy(labels)
        parts = [part for part in self._parts_for(n) if part.start < n]
        batch = OnlineBatch(n, parts, self._intercept.copy())
        with one_torch_thread():
            network, *others = (
                partial(self._run_network, batch, at, steps) for at in range(len(parts))
            )
            self._pool.run([network, partial(self._group, batch), *others])
            if not batch.finite.all():
                return None
            self._pool.run(self._row_tasks(batch, online_kernels.copy_rows))
            dense = [partial(self._layer_gradients, batch, at) for at in range(len(parts))]
            self._pool.run([partial(self._step_sub_batches, batch), *dense])
            if not (batch.finite.all() and batch.stepped):
                return None
            write = self._row_tasks(batch, online_kernels.write_rows)
            self._pool.run([*self._dense_updates(batch, steps), *write])
        self._intercept[:] = batch.intercept
        return self._returned_logits(n)

    def _parts_for(self, n: int) -> list[slice]:
        """Return the parts of a batch of `n` examples, filled up by an eighth at most.

        Batches grow from 16 examples, which should not take the time of thousands. Each number of
        rows costs time once, when its products are prepared, so there should not be hundreds.
        """
        multiple = max((1 << (n - 1).bit_length()) // _ROWS_AN_OCTAVE, ROW_MULTIPLE)
        size = -(-n // multiple) * multiple
        return self._parts if size >= self._options.batch_size else parts_of(size)

    def _returned_logits(self, n: int) -> Tensor:
        logits = self._memory.logits[:n].copy()
        if self._plain is not None and self._options.progressive:
            logits += self._plain[:n].numpy() - self._logits[:n].numpy()
        return torch.from_numpy(logits)

    # -- tasks ------------------------------------------------------------------------------------

    def _run_network(self, batch: OnlineBatch, at: int, steps: int) -> None:
        """Compute the network's logits of part `at` and their slopes, with dL/dlogit = 1."""
        part = batch.parts[at]
        w, v = self._gathered(part)
        if not self._terms.network:
            self._logits[part] = 0.0  # a prediction may have left others
            return
        generator = self._seeded_generator(batch.first_part + at, steps)
        tape = batch.tapes[at]
        if self._plain is not None and self._options.progressive:
            with torch.no_grad():
                self._plain[part] = self._model.deep_logits(w, v)  # type: ignore[operator]
        with torch.enable_grad():
            deep: Tensor = self._model.deep_logits(w, v, generator=generator, tape=tape)  # type: ignore[operator]
            # The sum is a scalar, whose initial gradient torch does not check with code that takes
            # half a second to import.
            total = deep.sum()
        slope_w, slope_v = torch.autograd.grad(total, (w, v), materialize_grads=True)
        self._logits[part] = deep.detach()
        self._grad_v[part] = slope_v
        norm = torch.linalg.vector_norm(slope_v)
        if self._terms.network_w:
            self._grad_w[part] = slope_w
            norm = norm + torch.linalg.vector_norm(slope_w)
        rows = slice(part.start, min(part.stop, batch.n))
        batch.finite[at] = (
            bool(self._logits[rows].isfinite().all()) and float(norm) <= LARGEST_GRADIENT
        )

    def _group(self, batch: OnlineBatch) -> None:
        self._sort(batch.n)
        shape = batch.n, self._options.columns
        batch.groups = online_kernels.group(
            self._sorted(batch.n), shape, SUB_BATCH, self._memory.groups[:, : shape[0] * shape[1]]
        )

    def _row_tasks(self, batch: OnlineBatch, copy: Callable[..., None]) -> Sequence[Task]:
        rows = batch.groups.rows
        edges = np.linspace(0, len(rows), self._pool.threads + 1).astype(int).tolist()
        arguments = self._table.rows.numpy(), rows, self._memory.rows
        return [
            partial(copy, *arguments, first, last)
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        ]

    def _step_sub_batches(self, batch: OnlineBatch) -> None:
        """Step the copied rows, sub-batch by sub-batch."""
        try:
            batch.stepped = self._step_all(batch) and online_kernels.finite(
                self._memory.rows, len(batch.groups.rows)
            )
        finally:
            for known in batch.known:
                known.set()

    def _step_all(self, batch: OnlineBatch) -> bool:
        memory = self._memory
        groups = batch.groups
        scale = self._scale.numpy()
        slopes = self._grad_v.numpy(), self._grad_w.numpy()
        before = self._v.detach().numpy(), self._w.detach().numpy()
        labels = self._labels.numpy()
        for number, start in enumerate(range(batch.first, batch.last, SUB_BATCH)):
            stop = min(start + SUB_BATCH, batch.last)
            self._scores(
                memory.rows, groups.row_of, scale, *before, self._logits.numpy(), *slopes,
                batch.intercept[0], start, stop, memory.logits, memory.sums,
            )  # fmt: skip
            if not online_kernels.gradients(
                memory.logits,
                labels,
                start,
                stop,
                memory.gradient,
                batch.intercept,
                self._rates.intercept_rate,
            ):
                return False
            self._step_rows(
                memory.rows, groups.row_of, scale, *slopes, memory.gradient, memory.sums,
                groups.entries, groups.bounds[number], groups.bounds[number + 1], self._rates,
            )  # fmt: skip
            for part, known in zip(batch.parts, batch.known, strict=True):
                if part.stop <= stop:
                    known.set()
        return True

    def _layer_gradients(self, batch: OnlineBatch, at: int) -> None:
        """Compute the gradients of the layers on part `at`, once its examples have theirs."""
        if not self._terms.network:
            return
        gradients = self._gradients[at]
        part = batch.parts[at]
        batch.known[at].wait()
        rows = slice(0, min(part.stop, batch.n) - part.start)
        grad_logit = torch.from_numpy(self._memory.gradient[part.start :][rows]) / batch.examples
        views = self._layer_views[at]
        with torch.no_grad():
            for layer, weight, bias in batch.tapes[at].gradients(rows, grad_logit):
                views[layer][0].copy_(weight)
                views[layer][1].copy_(bias)
        norm = float(torch.linalg.vector_norm(gradients)) * batch.examples
        batch.finite[at] = batch.finite[at] and norm <= LARGEST_GRADIENT

    @cached_property
    def _layer_views(self) -> list[dict[nn.Module, tuple[Tensor, Tensor]]]:
        """The views of each part's gradients, by layer: of its weight and of its bias.

        Gradients of parameters that no layer on a tape has stay 0.
        """
        modules = dict(self._model.named_modules())
        parts = (self._adam.views(gradients) for gradients in self._gradients)
        return [
            {
                module: (views[f"{name}.weight"], views[f"{name}.bias"])
                for name, module in modules.items()
                if f"{name}.weight" in views
            }
            for views in parts
        ]

    def _dense_updates(self, batch: OnlineBatch, steps: int) -> Sequence[Task]:
        if not self._terms.network:
            return []
        return [
            partial(
                self._adam.step,
                self._gradients[: len(batch.parts)],
                torch.tensor(float(steps)),
                piece,
                rate_scale=dense_rate_scale(batch.n),
            )
            for piece in self._adam.pieces(self._pool.threads)
        ]


class OnlineBatch(PartsOfBatch):
    """The parts of a batch that are here, and the examples that are stepped here.

    These are all of `n`, or the ones from `first` to before `last` where others step the rest.
    """

    def __init__(
        self,
        n: int,
        parts: Sequence[slice],
        intercept: npt.NDArray[np.float64],
        *,
        examples: int | None = None,
        first_part: int = 0,
        stepped: range | None = None,
    ) -> None:
        super().__init__(n, parts, examples=examples, first_part=first_part)
        self.intercept = intercept
        """The (w0, n0) that the step changes, a copy."""
        self.first, self.last = (stepped.start, stepped.stop) if stepped is not None else (0, n)
        self.tapes = [Tape() for _ in parts]
        self.known = [threading.Event() for _ in parts]
        """Whether dL/dlogit of each part is known."""
        self.stepped = False
        self.groups: Groups


class OnlineMemory:
    """Memory that every step uses again."""

    def __init__(self, examples: int, columns: int, floats: int, embedding_dim: int) -> None:
        entries = examples * columns
        self.rows = np.empty((entries, floats), np.float32)
        self.groups = np.empty((3, entries), np.int32)
        self.sums = np.empty((examples, embedding_dim), np.float32)
        self.logits = np.empty(examples)
        self.gradient = np.empty(examples, np.float32)
