"""The learner of the eight systems that are modules.

>>> from stream_ctr.learn.spec import LearnerSpec
>>> spec = LearnerSpec(fields=2, embedding_dim=4, hidden=(8,), table_bits=8, batch_size=4)
>>> learner = NetworkLearner(spec, device="cpu")
>>> learner.learn(np.array([[1, 2], [3, 4]], np.int32), np.array([1, 0], np.uint8)).shape
torch.Size([2])
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr.learn.changes import Changes
from stream_ctr.learn.cpu_step import BatchStep
from stream_ctr.learn.device import choose_device
from stream_ctr.learn.network import TABLE, Network, copied_values, new_table, on_host
from stream_ctr.learn.online_step import OnlineStep
from stream_ctr.learn.served_weights import ROWS, VALUES
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Batch, Ids, Labels, StepOptions, Values
from stream_ctr.learn.table import Table
from stream_ctr.learn.tensors import State, Tensors, require_tensor
from stream_ctr.learn.thread_pool import ThreadPool
from stream_ctr.learn.touched import Touched, require_touched

if TYPE_CHECKING:
    from stream_ctr.learn.gpu_step import GpuStep


class NetworkLearner(Network):
    """One of the modules over the embedding table.

    With the table optimiser "online" it learns by the online rule (see `online_step`). With
    "adagrad" and "adam", rows and parameters take one step a batch. Parameters are updated by Adam.
    Predictions are made in parts of a fixed number of rows: with the same shapes throughout, an
    example's logit depends neither on how many others are scored with it nor on the number of
    threads.

    With "online" and "adagrad" the table's rates are divided by the number of fields. All fields of
    an example step together, so its logit moves F times as far as each row does, and hot rows would
    overshoot in the first batches of a model with many fields. The rate of first-order weights is
    divided by F + C where the weights of C cross products are summed too. Adam's rates are used
    unchanged, as for the dense part. A rate of 0 is the optimiser's own. With the precision "bf16"
    products use bfloat16 copies, while weights, sums and steps stay float32.

    A model that starts as another one learns as that for `pretrain_examples`. Then it and its
    optimisers start anew on the weights, and the weight decay of the dense part starts.

    `threads` is the number of threads on a CPU; 0 is one for each processor. Without `progressive`,
    `learn` returns the logits of the step itself, in which dropout dropped units. This saves a
    forward pass for callers that do not evaluate these logits.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        *,
        device: str = "auto",
        threads: int = 0,
        progressive: bool = True,
    ) -> None:
        chosen = choose_device(device)
        super().__init__(
            spec, new_table(spec, Table, device=chosen), device=chosen, progressive=progressive
        )
        self._host_rows: Tensor | None = None
        self._threads = threads or os.cpu_count() or 1
        self._copying = ThreadPool(self._threads)
        self._make_step = self._step_maker(self._threads)
        self._begin()

    def _step_maker(
        self, threads: int
    ) -> Callable[[StepOptions], BatchStep | OnlineStep | GpuStep]:
        if self.device.type == "cpu":
            step = OnlineStep if self.online else BatchStep
            return partial(step, self.model, self.table, self.adam, self.intercept, threads=threads)
        # Triton takes a quarter of a second to import, and a run on the CPU does without it.
        from stream_ctr.learn.gpu_online_step import GpuOnlineStep
        from stream_ctr.learn.gpu_step import GpuBatchStep

        gpu_step = GpuOnlineStep if self.online else GpuBatchStep
        return partial(gpu_step, self.model, self.table, self.adam, self.intercept)

    def _prepared_step(self) -> BatchStep | OnlineStep | GpuStep:
        """Return a step of the model in its present phase.

        It is made anew when the phase changes, because a GPU's step is recorded.
        """
        return self._make_step(self._phase_options())

    def _renew_step(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the graphs of the old step may still run
        self._step = self._prepared_step()

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        self._require_values(values)
        if following is not None:
            following = following[0][:, : self.columns], *following[1:]
        with self._lock:
            if self._changes:
                self._changes.mark(ids[:, : self.columns])
            logits = self._step.learn(
                ids[:, : self.columns], labels, values, self.steps - self._first_step, following
            )
            if logits is not None:
                if self.touched is not None:  # a GPU takes the step meanwhile
                    self.touched.mark(ids[:, : self.columns])
                self._count(len(ids))
        return logits

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        self._require_values(values)
        ids = ids[:, : self.columns]
        parts = []
        for start in range(0, len(ids), self.batch_size):
            rows = slice(start, start + self.batch_size)
            part_values = None if values is None else values[rows]
            with self._lock:
                parts.append(self._step.predict(ids[rows], part_values))
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    # -- state ------------------------------------------------------------------------------------

    def weights(self, *, reuse: bool = False) -> State:
        """Return the table's rows and the dense parameters."""
        rows = self._reused_rows() if reuse else on_host(self.table.rows)
        return {TABLE: rows, **self._other_weights()}

    def _reused_rows(self) -> npt.NDArray[np.float32]:
        if self._host_rows is None:
            # A card copies to pinned memory several times as fast.
            self._host_rows = torch.empty_like(
                self.table.rows, device="cpu", pin_memory=self.device.type == "cuda"
            )
        return self._host_rows.copy_(self.table.rows).numpy()

    def shards(self) -> None:
        return None

    def optimizer_state(self) -> State:
        return {**self._counters(), **self.adam.state_dict()}

    def load_weights(self, weights: Tensors) -> None:
        self._require_others(weights)
        require_tensor(TABLE, weights[TABLE], np.float32, tuple(self.table.rows.shape))
        with self._lock:
            self._note_restored()
            self.table.rows.copy_(torch.from_numpy(weights[TABLE]))
            self._set_others(weights)

    def track_touched(self) -> None:
        self.touched = Touched(len(self.table.rows))
        self.take_changes()  # compile now rather than while learning waits for the first ones

    def take_changes(self) -> State:
        with self._lock:
            rows = require_touched(self.touched).take()
            return {ROWS: rows, VALUES: self._values_of(rows), **self._served_parameters()}

    def _values_of(self, rows: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
        """Return V and w of these rows [n, width + 1], on the host."""
        if self.device.type == "cpu":
            return copied_values(self.table, rows, self._copying)
        places = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        return on_host(self.table.rows[:, : self.table.width + 1].index_select(0, places))

    def track_changes(self) -> None:
        if self.device.type == "cpu":
            self._changes = Changes(len(self.table.rows))

    def copy_weights_to(self, other: NetworkLearner) -> None:
        with self._lock, other._lock:
            self._copy_to(other)

    def load_optimizer_state(self, state: Tensors) -> None:
        steps = state["steps"]
        self.adam.load_state_dict(state)
        self._set_counters(steps)
