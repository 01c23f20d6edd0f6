"""A model that serves with torch: its dense part on a CPU, or the learner itself on a GPU.

On a CPU, a prediction is computed in the parts that a learner predicts in, and by the same module.
Full parts have one shape, so a logit depends neither on the examples beside it nor on the number of
threads. The last part is shorter where few rows are left, which may change the last bits of a
logit: one row takes a fourth of the time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from stream_ctr.errors import ConfigError
from stream_ctr.learn.adam import FlatParameters
from stream_ctr.learn.cpu_step import one_torch_thread, predicted_parts
from stream_ctr.learn.dense_part import DENSE
from stream_ctr.learn.device import choose_device
from stream_ctr.learn.learner import Learner, make_learner, weight_shapes
from stream_ctr.learn.network import new_module
from stream_ctr.learn.predictor import Predictor
from stream_ctr.learn.served_network import Dense, Part, ServedNetwork, require_network
from stream_ctr.learn.served_weights import INTERCEPT, served_weights
from stream_ctr.learn.shared_rows import Floats
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Ids, Values
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.learn.thread_pool import ThreadPool

_LARGEST_BATCH = 1 << 20


def torch_predictor(spec: LearnerSpec, weights: Tensors, *, device: str = "cpu") -> Predictor:
    """Return the network that `spec` describes, with `weights`, on the device.

    Raises `ValueError` or `RuntimeError` if the weights do not fit, before any memory is taken for
    the model.
    """
    if spec.batch_size > _LARGEST_BATCH:
        raise ValueError(f"a batch of {spec.batch_size}")
    require_network(weight_shapes(spec), weights)
    if choose_device(device).type == "cpu":
        return ServedNetwork(spec, weights, TorchEngine(spec))
    return ServedLearner(spec, weights, device=device)


class TorchEngine:
    """Computes the dense part of the model that `spec` describes, a part in one thread.

    `threads` share the parts; 0 is one for each processor.
    """

    def __init__(self, spec: LearnerSpec, *, threads: int = 0) -> None:
        self._model = new_module(spec)
        self._low = spec.precision == "bf16"
        self._batch_size = spec.batch_size
        self._parts = predicted_parts(spec.batch_size, online=spec.table_optimizer == "online")
        self._pool = ThreadPool(threads or os.cpu_count() or 1)

    def dense(self, parameters: Tensors) -> Dense:
        """Return the dense part with these parameters."""
        return _TorchDense(copy.deepcopy(self._model), parameters, low=self._low)

    def parts(self, n: int) -> Sequence[Part]:
        """Return the parts of batches of the learner's size.

        >>> engine = TorchEngine(LearnerSpec(fields=2, batch_size=512))
        >>> engine.parts(800)[1:]  # doctest: +NORMALIZE_WHITESPACE
        [Part(start=256, stop=512, rows=256), Part(start=512, stop=768, rows=256),
         Part(start=768, stop=800, rows=32)]
        """
        found = []
        for start in range(0, n, self._batch_size):
            end = min(start + self._batch_size, n)
            cut = (slice(start + part.start, start + part.stop) for part in self._parts)
            found += [_part(part, end) for part in cut if part.start < end]
        return found

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Run the tasks in the threads."""
        with one_torch_thread():
            self._pool.run(tasks)


def _part(part: slice, end: int) -> Part:
    """Return a part of the examples before `end`; its padding is what the next power of 2 needs."""
    stop = min(part.stop, end)
    rows = 1 << (stop - part.start - 1).bit_length()
    return Part(part.start, stop, min(rows, part.stop - part.start))


class _TorchDense:
    """A model with these parameters, and the constant of the logit."""

    def __init__(self, model: nn.Module, parameters: Tensors, *, low: bool) -> None:
        self._model = model
        flat = FlatParameters(model, low=low)
        model.load_state_dict(
            {
                name.removeprefix(DENSE): torch.from_numpy(array)
                for name, array in parameters.items()
                if name.startswith(DENSE)
            }
        )
        flat.refresh()
        self._constant = np.float32(parameters[INTERCEPT][0] if INTERCEPT in parameters else 0.0)

    def __call__(self, w: Floats, v: Floats) -> Floats:
        with torch.inference_mode():
            logits: Floats = self._model(torch.from_numpy(w), torch.from_numpy(v)).numpy()
        return logits + self._constant


class ServedLearner:
    """The learner, which predicts on a GPU and does not learn.

    It cannot be updated: a server on a GPU follows snapshots.
    """

    def __init__(self, spec: LearnerSpec, weights: Tensors, *, device: str) -> None:
        self._spec = spec
        self._learner: Learner = make_learner(spec, device=device)
        self._learner.load_weights(weights)
        # The first prediction compiles and records, and no request should wait for that.
        values = np.zeros((1, len(spec.value_fields)), np.float32)
        self.predict(np.zeros((1, spec.fields + spec.crosses), np.int32), values)

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V]."""
        return self._learner.predict(ids, values)

    def updated(self, changes: Tensors) -> Predictor:
        """Raise `ConfigError`."""
        raise ConfigError(
            "a model on a GPU does not follow deltas: serve on the CPU (--device cpu), or follow "
            "snapshots only"
        )

    def absorb(self) -> bool:
        """Return True: nothing is apart from the table."""
        return True

    def served(self) -> State:
        """Return the served weights, copied (see `served_weights`)."""
        return served_weights(self._spec, self._learner.weights())
