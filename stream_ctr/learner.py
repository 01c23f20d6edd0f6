"""The learner: any model of the zoo over the embedding table, one step per batch.

`learn` returns the logits from before the update, so every example is predicted before it is learned from: progressive validation is
not an extra pass but what learning yields.

>>> learner = Learner("deepfm", fields=2, embedding_dim=4, hidden=[8], table_bits=8, batch_size=4, device="cpu")
>>> ids, labels = np.array([[1, 2], [3, 4]], np.int32), np.array([1, 0], np.uint8)
>>> before = learner.predict(ids)
>>> bool(np.array_equal(learner.learn(ids, labels).numpy(), before)), bool(np.array_equal(learner.predict(ids), before))
(True, False)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.adam import FlatAdam
from stream_ctr.cpu_step import Batch, CpuStep
from stream_ctr.errors import ConfigError
from stream_ctr.gpu_step import GpuStep
from stream_ctr.models import MODELS
from stream_ctr.table import Rates, Table, columns

_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86 and Arm


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises `ConfigError` when "cuda" is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: no CUDA GPU is available here; use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(name: str, device: torch.device) -> str:
    """ "auto" is "bf16" where products of bfloat16 take half the time of those of float32, and "fp32" elsewhere.

    >>> choose_precision("fp32", torch.device("cpu"))
    'fp32'
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch do not tell
    return "bf16" if any(able.get(name) for name in _BFLOAT16) else "fp32"


class Learner:
    """A batch is filled up to a fixed number of rows: with the same shapes throughout, an example's logit does not depend on how many
    others were scored with it, nor on the number of threads.

    The table's rates are divided by the number of fields: all fields of an example step together, so its logit moves F times as far as
    each row does, and hot rows would overshoot in the first batches of a model with many fields. The dense part has Adam. With
    `precision` "bf16" its products are of bfloat16 copies, while weights, sums and steps stay float32.
    """

    def __init__(
        self,
        model: str = "deepfm",
        *,
        fields: int,
        value_fields: Sequence[int] = (),
        embedding_dim: int = 10,
        hidden: Sequence[int] = (400, 400, 400),
        activation: str = "relu",
        dropout: float = 0.0,
        table_bits: int = 20,
        initial_scale: float = 0.01,
        batch_size: int = 512,
        table_optimizer: str = "adagrad",
        table_learning_rate: float = 1.0,
        table_beta: float = 3.0,
        linear_learning_rate: float = 2.0,
        linear_beta: float = 1.0,
        dense_learning_rate: float = 0.001,
        dense_weight_decay: float = 0.0,
        precision: str = "fp32",
        device: str = "auto",
        threads: int = 0,
        seed: int = 0,
    ) -> None:
        self.device = choose_device(device)
        self.fields, self.value_fields, self.batch_size = fields, list(value_fields), batch_size
        self.steps = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: nn.Module = MODELS[model](
                fields=fields, embedding_dim=embedding_dim, hidden=hidden, activation=activation, dropout=dropout
            ).to(self.device)
        rates = Rates(table_optimizer, table_learning_rate / fields, table_beta, linear_learning_rate / fields, linear_beta)
        self.table = Table(
            bits=table_bits, embedding_dim=embedding_dim, rates=rates, initial_scale=initial_scale, seed=seed, device=self.device
        )
        self.adam = FlatAdam(self.model, learning_rate=dense_learning_rate, weight_decay=dense_weight_decay, low=precision == "bf16")
        self._turn = threading.Lock()  # a step has one set of buffers
        step = partial(CpuStep, threads=threads or os.cpu_count() or 1) if self.device.type == "cpu" else GpuStep
        self._step = step(
            self.model, self.table, self.adam, fields=fields, value_fields=value_fields, batch_size=batch_size,
            seed=seed, dropout=dropout > 0,
        )  # fmt: skip

    def learn(
        self,
        ids: npt.NDArray[np.int32],
        labels: npt.NDArray[np.uint8],
        values: npt.NDArray[np.float32] | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        """One step on n <= batch_size examples; their logits [n] from before it (on the device).

        None, and nothing is learned, when a logit or a gradient is not finite or the gradient is exploding. `following` are the ids, labels
        and values of the next call, if they are known: a GPU has them on their way meanwhile.
        """
        self._require_values(values)
        with self._turn:
            logits = self._step.learn(ids, labels, values, self.steps, following)
        if logits is not None:
            self.steps += 1
        return logits

    def predict(self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """`ids` [n, F] -> logits [n], without dropout; any n. Threads take turns."""
        self._require_values(values)
        parts = []
        for start in range(0, len(ids), self.batch_size):
            rows = slice(start, start + self.batch_size)
            with self._turn:
                parts.append(self._step.predict(ids[rows], None if values is None else values[rows]))
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _require_values(self, values: npt.NDArray[np.float32] | None) -> None:
        if self.value_fields and values is None:
            raise ValueError(f"the values of {len(self.value_fields)} fields are missing")

    # -- state ------------------------------------------------------------------------------------------------------------------------

    def weights(self, *, table: Tensor | None = None) -> dict[str, npt.NDArray[np.float32]]:
        """All that serving needs, copied to the host: the table's rows and the dense parameters.

        `table` is a tensor to copy the rows into: memory that is there already takes a tenth of the time of new memory.
        """
        dense = {f"dense.{name}": _host(tensor) for name, tensor in self.model.state_dict().items()}
        rows = _host(self.table.rows) if table is None else table.copy_(self.table.rows).numpy()
        return {"table": rows, **dense}

    def optimizer_state(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"steps": np.array([self.steps]), **self.adam.state_dict()}

    def load_weights(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Raises `ValueError`, with nothing loaded, unless these are the tensors of this model: names, shapes, types, all finite."""
        wanted = {"table": self.table.rows, **{f"dense.{name}": tensor for name, tensor in self.model.state_dict().items()}}
        if odd := sorted(weights.keys() ^ wanted.keys()):
            raise ValueError(f"tensor {odd[0]!r} is {'missing' if odd[0] in wanted else 'not one of this model'}")
        for name, tensor in wanted.items():
            found = weights[name]
            if found.shape != tuple(tensor.shape) or found.dtype != np.float32:
                raise ValueError(f"tensor {name!r} is {found.dtype} {found.shape}, expected float32 {tuple(tensor.shape)}")
            if not np.isfinite(found).all():
                raise ValueError(f"tensor {name!r} holds values that are not finite")
        self.table.rows.copy_(torch.from_numpy(weights["table"]))
        self.model.load_state_dict({name.removeprefix("dense."): torch.from_numpy(weights[name]) for name in wanted if name != "table"})
        self.adam.refresh()

    def load_optimizer_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Raises `KeyError` or `ValueError` when it is not of this model."""
        self.adam.load_state_dict(state)
        self.steps = int(state["steps"][0])


def shapes(
    model: str, *, fields: int, embedding_dim: int, hidden: Sequence[int], activation: str, dropout: float, table_bits: int, **_: object
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a learner with these options; takes no memory for them."""
    with torch.device("meta"):
        dense = MODELS[model](fields=fields, embedding_dim=embedding_dim, hidden=hidden, activation=activation, dropout=dropout)
    return {"table": (1 << table_bits, columns(embedding_dim)), **{f"dense.{n}": tuple(t.shape) for n, t in dense.state_dict().items()}}


def _host(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().to("cpu", copy=True).contiguous().numpy()
