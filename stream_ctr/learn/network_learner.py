"""The learner of the eight systems that are modules.

>>> from stream_ctr.learn.spec import LearnerSpec
>>> spec = LearnerSpec(fields=2, embedding_dim=4, hidden=(8,), table_bits=8, batch_size=4)
>>> learner = NetworkLearner(spec, device="cpu")
>>> learner.learn(np.array([[1, 2], [3, 4]], np.int32), np.array([1, 0], np.uint8)).shape
torch.Size([2])
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.learn import table_kernels
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.changes import Changes
from stream_ctr.learn.cpu_step import BatchStep, one_torch_thread
from stream_ctr.learn.device import choose_device
from stream_ctr.learn.online_step import OnlineStep
from stream_ctr.learn.served_weights import INTERCEPT, ROWS, VALUES
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Batch, Ids, Labels, StepOptions, Values
from stream_ctr.learn.table import Rates, Table
from stream_ctr.learn.tensors import State, Tensors, require_names, require_tensor
from stream_ctr.learn.thread_pool import ThreadPool
from stream_ctr.learn.touched import Touched, require_touched
from stream_ctr.models import MODELS, registered
from stream_ctr.models.layers import Dropout

if TYPE_CHECKING:
    from stream_ctr.learn.gpu_step import GpuStep

_DENSE = "dense."
_ALIGNED = 8  # numbers of bfloat16 in 16 bytes


class NetworkLearner:
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
        self.device = choose_device(device)
        self.columns = columns_of(spec)
        self.fields = spec.fields
        self.value_fields = list(spec.value_fields)
        self.batch_size = spec.batch_size
        self.steps = 0
        self.restored = 0
        self.touched: Touched | None = None
        self._first_step = 0  # the steps before the present optimisers started
        self._examples = 0
        self._pretrain_examples = spec.pretrain_examples
        self.model = new_module(spec).to(self.device)
        self.table = _table_of(spec, self.columns, self.device)
        self.online = spec.table_optimizer == "online"
        self.intercept = np.zeros(2)
        """The constant of the logit, w0, and its sum of squared gradients, n0."""
        self.adam = FlatAdam(
            self.model,
            learning_rate=spec.dense_learning_rate,
            low=spec.precision == "bf16",
            align=_ALIGNED if self.device.type == "cuda" else 1,
        )
        self._weight_decay = spec.dense_weight_decay
        self._lock = threading.Lock()  # a step has one set of buffers
        self._host_rows: Tensor | None = None
        self._changes: Changes | None = None
        self._equal_since = 0  # by the changes of the learner that was copied to this one
        self._options = StepOptions(
            columns=self.columns,
            batch_size=spec.batch_size,
            value_fields=spec.value_fields,
            seed=spec.seed,
            progressive=progressive,
        )
        self._threads = threads or os.cpu_count() or 1
        self._copying = ThreadPool(self._threads)
        self._make_step = self._step_maker(self._threads)
        self._step = self._prepared_step()
        if self.pretraining and not self._pretrain_examples:
            self.end_pretraining()

    @property
    def pretraining(self) -> bool:
        return getattr(self.model, "pretraining", False)

    @property
    def _drops_units(self) -> bool:
        return not self.pretraining and any(
            isinstance(layer, Dropout) and layer.rate > 0 for layer in self.model.modules()
        )

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
        # An idle network would decay to nothing.
        self.adam.weight_decay = 0.0 if self.pretraining else self._weight_decay
        return self._make_step(replace(self._options, dropout=self._drops_units))

    def end_pretraining(self) -> None:
        """Start the model on the weights learned so far, with new optimisers."""
        self.model.begin_network()  # type: ignore[operator]
        self.table.reset_optimizer()
        self.adam.reset()
        self.intercept[1] = 0.0
        self._first_step = self.steps
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
                self.steps += 1
                self._examples += len(ids)
                if self.pretraining and self._examples >= self._pretrain_examples:
                    self.end_pretraining()
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

    def _require_values(self, values: Values | None) -> None:
        if self.value_fields and values is None:
            raise ValueError(f"the values of {len(self.value_fields)} fields are missing")

    # -- state ------------------------------------------------------------------------------------

    def weights(self, *, reuse: bool = False) -> State:
        """Return the table's rows and the dense parameters."""
        return {
            "table": self._reused_rows() if reuse else _host(self.table.rows),
            **({"intercept": self.intercept.copy()} if self.online else {}),
            **{
                f"{_DENSE}{name}": _host(tensor) for name, tensor in self.model.state_dict().items()
            },
        }

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
        return {
            "steps": np.array([self.steps, self._first_step, self._examples]),
            **self.adam.state_dict(),
        }

    def load_weights(self, weights: Tensors) -> None:
        dense = {f"{_DENSE}{name}": tensor for name, tensor in self.model.state_dict().items()}
        expected = {"table": self.table.rows, **dense}
        require_names(weights, [*expected, *(["intercept"] if self.online else [])])
        for name, tensor in expected.items():
            require_tensor(name, weights[name], np.float32, tuple(tensor.shape))
        if self.online:
            require_tensor("intercept", weights["intercept"], np.float64, self.intercept.shape)
        with self._lock:
            pretraining = self.pretraining
            self.restored += 1
            self._equal_since = 0
            if self._changes:
                self._changes.mark_all()
            self.table.rows.copy_(torch.from_numpy(weights["table"]))
            self.model.load_state_dict(
                {name.removeprefix(_DENSE): torch.from_numpy(weights[name]) for name in dense}
            )
            self.adam.refresh()
            if self.online:
                self.intercept[:] = weights["intercept"]
            if self.pretraining != pretraining:
                self._step = self._prepared_step()

    def track_touched(self) -> None:
        self.touched = Touched(len(self.table.rows))
        self.take_changes()  # compile now rather than while learning waits for the first ones

    def take_changes(self) -> State:
        with self._lock:
            rows = require_touched(self.touched).take()
            dense = {
                f"{_DENSE}{name}": _host(tensor) for name, tensor in self.model.state_dict().items()
            }
            constant = {INTERCEPT: self.intercept[:1].astype(np.float32)} if self.online else {}
            return {ROWS: rows, VALUES: self._values_of(rows), **dense, **constant}

    def _values_of(self, rows: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
        """Return V and w of these rows [n, width + 1], on the host."""
        floats = self.table.width + 1
        if self.device.type != "cpu":
            places = torch.from_numpy(rows.astype(np.int64)).to(self.device)
            return _host(self.table.rows[:, :floats].index_select(0, places))
        values = np.empty((len(rows), floats), np.float32)
        copy, table = table_kernels.copy_rows(floats), self.table.rows.numpy()
        edges = np.linspace(0, len(rows), self._threads + 1).astype(int).tolist()
        self._copying.run(
            [partial(copy, table, rows, first, last, values) for first, last in pairwise(edges)]
        )
        return values

    def track_changes(self) -> None:
        if self.device.type == "cpu":
            self._changes = Changes(len(self.table.rows))

    def copy_weights_to(self, other: NetworkLearner) -> None:
        with self._lock, other._lock:
            if self._changes:
                rows, copied = self.table.rows.numpy(), other.table.rows.numpy()
                other._equal_since = self._changes.copy(rows, copied, since=other._equal_since)
            else:
                other.table.rows.copy_(self.table.rows)
            pretraining = other.pretraining
            with one_torch_thread():
                other.model.load_state_dict(self.model.state_dict())
                other.adam.refresh()
            other.intercept[:] = self.intercept
            if other.pretraining != pretraining:
                other._step = other._prepared_step()

    def load_optimizer_state(self, state: Tensors) -> None:
        steps, first_step, examples = state["steps"].tolist()
        self.adam.load_state_dict(state)
        self.steps = steps
        self._first_step = first_step
        self._examples = examples


def module_of(spec: LearnerSpec) -> nn.Module:
    """Return a new module of the model that `spec` names, which must not be "lr"."""
    system = registered.system(spec.model)
    assert system.module is not None
    return system.module(
        fields=spec.fields,
        embedding_dim=spec.embedding_dim,
        hidden=spec.hidden,
        activation=system.activation if spec.activation == "paper" else spec.activation,
        dropout=spec.dropout,
    )


def new_module(spec: LearnerSpec) -> nn.Module:
    """Return `module_of` with parameters that depend on the seed alone.

    Raises `ConfigError` for a module of another package that a learner cannot train.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        module = module_of(spec)
        if spec.model not in MODELS:
            registered.check(
                spec.model,
                module,
                columns=columns_of(spec),
                embedding_dim=spec.embedding_dim,
                embeddings=registered.system(spec.model).embeddings,
            )
    return module


def columns_of(spec: LearnerSpec) -> int:
    """Return the number of ids of an example that the model reads: fields and cross products."""
    return spec.fields + (spec.crosses if registered.system(spec.model).crosses else 0)


def _table_of(spec: LearnerSpec, columns: int, device: torch.device) -> Table:
    rates = Rates.per_field(
        spec.table_optimizer,
        fields=spec.fields,
        columns=columns,
        learning_rate=spec.table_learning_rate,
        beta=spec.table_beta,
        linear_learning_rate=spec.linear_learning_rate,
        linear_beta=spec.linear_beta,
    )
    return Table(
        bits=spec.table_bits,
        embedding_dim=spec.embedding_dim,
        embeddings=registered.system(spec.model).embeddings,
        rates=rates,
        initial_scale=spec.initial_scale,
        seed=spec.seed,
        device=device,
    )


def _host(tensor: Tensor) -> npt.NDArray[np.float32]:
    """Return a copy on the host."""
    return tensor.detach().to("cpu", copy=True).contiguous().numpy()
