"""A network and what learns it, apart from its steps: module, table, Adam, intercept and phase.

`NetworkLearner` has all of it in one process. In a `ShardedNetwork`, which has a part of the table,
every rank has the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.learn import table_kernels
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.changes import Changes
from stream_ctr.learn.cpu_step import one_torch_thread
from stream_ctr.learn.dense_part import DENSE
from stream_ctr.learn.served_weights import INTERCEPT
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import StepOptions, Values
from stream_ctr.learn.table import Rates, Table
from stream_ctr.learn.tensors import State, Tensors, require_names, require_tensor
from stream_ctr.learn.thread_pool import ThreadPool
from stream_ctr.learn.touched import Touched
from stream_ctr.models import MODELS, registered
from stream_ctr.models.layers import Dropout

TABLE = "table"
_ALIGNED = 8  # numbers of bfloat16 in 16 bytes
AnyTable = TypeVar("AnyTable", bound=Table)


class Network:
    """The module that `spec` describes, over `table`, with its optimisers.

    A subclass has a step, which `_renew_step` makes.
    """

    def __init__(
        self, spec: LearnerSpec, table: Table, *, device: torch.device, progressive: bool
    ) -> None:
        self.device = device
        self.columns = columns_of(spec)
        self.fields = spec.fields
        self.value_fields = list(spec.value_fields)
        self.batch_size = spec.batch_size
        self.steps = 0
        self.restored = 0
        self.touched: Touched | None = None
        self.model = new_module(spec).to(device)
        self.table = table
        self.online = spec.table_optimizer == "online"
        self.intercept = np.zeros(2)
        """The constant of the logit, w0, and its sum of squared gradients, n0."""
        self.adam = FlatAdam(
            self.model,
            learning_rate=spec.dense_learning_rate,
            low=spec.precision == "bf16",
            align=_ALIGNED if device.type == "cuda" else 1,
        )
        self._first_step = 0  # the steps before the present optimisers started
        self._examples = 0
        self._pretrain_examples = spec.pretrain_examples
        self._weight_decay = spec.dense_weight_decay
        self._lock = threading.Lock()  # a step has one set of buffers
        self._changes: Changes | None = None
        self._equal_since = 0  # by the changes of the network that was copied to this one
        self._options = StepOptions(
            columns=self.columns,
            batch_size=spec.batch_size,
            value_fields=spec.value_fields,
            seed=spec.seed,
            progressive=progressive,
        )

    # -- phases ------------------------------------------------------------------------------------

    @property
    def pretraining(self) -> bool:
        return getattr(self.model, "pretraining", False)

    @property
    def _drops_units(self) -> bool:
        return not self.pretraining and any(
            isinstance(layer, Dropout) and layer.rate > 0 for layer in self.model.modules()
        )

    def _begin(self) -> None:
        """Make the first step; a model without pre-training examples begins at once."""
        self._renew_step()
        if self.pretraining and not self._pretrain_examples:
            self.end_pretraining()

    def _renew_step(self) -> None:
        """Make the step of the present phase."""
        raise NotImplementedError

    def _phase_options(self) -> StepOptions:
        """Return the options of a step in the present phase, and set the weight decay of it."""
        # An idle network would decay to nothing.
        self.adam.weight_decay = 0.0 if self.pretraining else self._weight_decay
        return replace(self._options, dropout=self._drops_units)

    def end_pretraining(self) -> None:
        """Start the model on the weights learned so far, with new optimisers."""
        self.model.begin_network()  # type: ignore[operator]
        self.table.reset_optimizer()
        self.adam.reset()
        self.intercept[1] = 0.0
        self._first_step = self.steps
        self._renew_step()

    def _count(self, examples: int) -> None:
        """Count a step on so many examples; the last one of pre-training ends it."""
        self.steps += 1
        self._examples += examples
        if self.pretraining and self._examples >= self._pretrain_examples:
            self.end_pretraining()

    def _require_values(self, values: Values | None) -> None:
        if self.value_fields and values is None:
            raise ValueError(f"the values of {len(self.value_fields)} fields are missing")

    # -- state -------------------------------------------------------------------------------------

    def _dense_tensors(self) -> dict[str, Tensor]:
        return {f"{DENSE}{name}": tensor for name, tensor in self.model.state_dict().items()}

    def _other_weights(self) -> State:
        """Return the weights besides the table, copied to the host."""
        return {
            **({INTERCEPT: self.intercept.copy()} if self.online else {}),
            **{name: on_host(tensor) for name, tensor in self._dense_tensors().items()},
        }

    def _served_parameters(self) -> State:
        """Return what serving reads besides the table, copied to the host."""
        constant = {INTERCEPT: self.intercept[:1].astype(np.float32)} if self.online else {}
        return {name: on_host(tensor) for name, tensor in self._dense_tensors().items()} | constant

    def _require_others(self, weights: Tensors) -> None:
        """Raise `ValueError` unless these are the weights of this model, apart from the table's."""
        others = [*self._dense_tensors(), *([INTERCEPT] if self.online else [])]
        require_names(weights, [TABLE, *others])
        for name, tensor in self._dense_tensors().items():
            require_tensor(name, weights[name], np.float32, tuple(tensor.shape))
        if self.online:
            require_tensor(INTERCEPT, weights[INTERCEPT], np.float64, self.intercept.shape)

    def _note_restored(self) -> None:
        """Note that all weights change."""
        self.restored += 1
        self._equal_since = 0
        if self._changes:
            self._changes.mark_all()

    def _set_others(self, weights: Tensors) -> None:
        """Set the weights besides the table."""
        pretraining = self.pretraining
        self.model.load_state_dict(
            {
                name.removeprefix(DENSE): torch.from_numpy(weights[name])
                for name in self._dense_tensors()
            }
        )
        self.adam.refresh()
        if self.online:
            self.intercept[:] = weights[INTERCEPT]
        if self.pretraining != pretraining:
            self._renew_step()

    def _counters(self) -> State:
        return {"steps": np.array([self.steps, self._first_step, self._examples])}

    def _set_counters(self, steps: npt.NDArray[np.generic]) -> None:
        self.steps, self._first_step, self._examples = steps.tolist()

    def _copy_to(self, other: Network) -> None:
        """Make the weights of another network of the same model equal to these."""
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
            other._renew_step()


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


def new_table(spec: LearnerSpec, make: Callable[..., AnyTable], **where: Any) -> AnyTable:
    """Return the table that `spec` describes, from `make`, which gets the arguments `where` too."""
    rates = Rates.per_field(
        spec.table_optimizer,
        fields=spec.fields,
        columns=columns_of(spec),
        learning_rate=spec.table_learning_rate,
        beta=spec.table_beta,
        linear_learning_rate=spec.linear_learning_rate,
        linear_beta=spec.linear_beta,
    )
    return make(
        bits=spec.table_bits,
        embedding_dim=spec.embedding_dim,
        embeddings=registered.system(spec.model).embeddings,
        rates=rates,
        initial_scale=spec.initial_scale,
        seed=spec.seed,
        **where,
    )


def on_host(tensor: Tensor) -> npt.NDArray[np.float32]:
    """Return a copy on the host."""
    return tensor.detach().to("cpu", copy=True).contiguous().numpy()


def copied_values(
    table: Table, places: npt.NDArray[np.uint32], pool: ThreadPool
) -> npt.NDArray[np.float32]:
    """Return V and w [n, width + 1] of the rows at these places of a table on the CPU."""
    floats = table.width + 1
    values = np.empty((len(places), floats), np.float32)
    copy, rows = table_kernels.copy_rows(floats), table.rows.numpy()
    edges = np.linspace(0, len(places), pool.threads + 1).astype(int).tolist()
    pool.run([partial(copy, rows, places, first, end, values) for first, end in pairwise(edges)])
    return values
