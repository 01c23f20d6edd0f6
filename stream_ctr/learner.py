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

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stream_ctr.errors import ConfigError
from stream_ctr.models import MODELS
from stream_ctr.models.layers import Dropout
from stream_ctr.table import Table, columns


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises `ConfigError` when "cuda" is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: no CUDA GPU is available here; use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


# A gradient beyond it is exploding: its square, and the sum of thousands of those, must stay a number in float32.
_LARGEST_GRADIENT = 1e15


class Learner:
    """Batches are padded to `batch_size` with examples of weight zero: with one shape throughout, an example's logit does not depend
    on how many others were scored with it.

    The table's rates are divided by the number of fields: all fields of an example step together, so its logit moves F times as far as
    each row does, and hot rows would overshoot in the first batches of a model with many fields. The dense part has Adam.
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
        seed: int = 0,
    ) -> None:
        self.device = choose_device(device)
        self.fields, self.value_fields = fields, list(value_fields)
        self.batch_size, self.precision, self.seed = batch_size, precision, seed
        self.steps = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: nn.Module = MODELS[model](
                fields=fields, embedding_dim=embedding_dim, hidden=hidden, activation=activation, dropout=dropout
            ).to(self.device)
        self.table = Table(
            bits=table_bits, embedding_dim=embedding_dim, optimizer=table_optimizer,
            learning_rate=table_learning_rate / fields, beta=table_beta,
            linear_learning_rate=linear_learning_rate / fields, linear_beta=linear_beta,
            initial_scale=initial_scale, seed=seed, device=self.device,
        )  # fmt: skip
        self._dense_learning_rate, self._dense_weight_decay = dense_learning_rate, dense_weight_decay
        self._dropouts = [module for module in self.model.modules() if isinstance(module, Dropout) and module.rate > 0]
        self._generator = torch.Generator(self.device)
        for dropout_layer in self._dropouts:
            dropout_layer.generator = self._generator

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over the dense part. Made when first needed: a server never needs it, and torch's imports behind it take a second."""
        return torch.optim.Adam(self.model.parameters(), lr=self._dense_learning_rate, weight_decay=self._dense_weight_decay, fused=True)

    def learn(
        self, ids: npt.NDArray[np.int32], labels: npt.NDArray[np.uint8], values: npt.NDArray[np.float32] | None = None
    ) -> Tensor | None:
        """One step on n <= batch_size examples; their logits [n] from before it (on the device).

        None, and nothing is learned, when the loss or a gradient is not finite or the gradient is exploding.
        """
        n = len(ids)
        padded, multipliers = self._padded(ids, values)
        target = torch.zeros(self.batch_size, dtype=torch.float32)
        target[:n] = torch.from_numpy(labels)
        target = target.to(self.device, non_blocking=True)
        weight = (torch.arange(self.batch_size, device=self.device) < n).float()

        leaf = self.table.gather(padded).requires_grad_()  # [B, F, K + 1]
        if self._dropouts:
            with torch.no_grad():
                progressive = self._forward(leaf, multipliers, training=False)
            self._generator.manual_seed((self.seed << 40) + self.steps)
        logits = self._forward(leaf, multipliers, training=True)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / n
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        gradients = [leaf.grad, *(p.grad for p in self.model.parameters() if p.grad is not None)]
        shown = progressive if self._dropouts else logits.detach()
        if not bool((nn.utils.get_total_norm(gradients) <= _LARGEST_GRADIENT) & loss.isfinite() & shown[:n].isfinite().all()):
            return None
        self.optimizer.step()
        self.table.update(padded, leaf.grad * n)  # of the sum, so that rates do not depend on the size of the batch
        self.steps += 1
        return shown[:n]

    def predict(self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """`ids` [n, F] -> logits [n], without dropout; any n."""
        parts = []
        with torch.no_grad():
            for start in range(0, len(ids), self.batch_size):
                rows = slice(start, start + self.batch_size)
                padded, multipliers = self._padded(ids[rows], None if values is None else values[rows])
                logits = self._forward(self.table.gather(padded), multipliers, training=False)
                parts.append(logits[: len(ids[rows])].cpu().numpy())
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _padded(self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32] | None) -> tuple[Tensor, Tensor | None]:
        padded = torch.zeros(self.batch_size, self.fields, dtype=torch.int32)
        padded[: len(ids)] = torch.from_numpy(ids)
        if not self.value_fields:
            return padded.to(self.device, non_blocking=True), None
        multipliers = torch.ones(self.batch_size, self.fields)
        assert values is not None
        multipliers[: len(ids), self.value_fields] = torch.from_numpy(values)
        return padded.to(self.device, non_blocking=True), multipliers.to(self.device, non_blocking=True)

    def _forward(self, gathered: Tensor, multipliers: Tensor | None, *, training: bool) -> Tensor:
        scaled = gathered if multipliers is None else gathered * multipliers.unsqueeze(2)
        k = self.table.embedding_dim
        self.model.train(training)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits: Tensor = self.model(scaled[..., k], scaled[..., :k])
        return logits.float()

    # -- state ------------------------------------------------------------------------------------------------------------------------

    def weights(self, *, table: Tensor | None = None) -> dict[str, npt.NDArray[np.float32]]:
        """All that serving needs, copied to the host: the table's rows and the dense parameters.

        `table` is a tensor to copy the rows into: memory that is there already takes a tenth of the time of new memory.
        """
        dense = {f"dense.{name}": _host(tensor) for name, tensor in self.model.state_dict().items()}
        rows = _host(self.table.rows) if table is None else table.copy_(self.table.rows).numpy()
        return {"table": rows, **dense}

    def optimizer_state(self) -> dict[str, npt.NDArray[np.generic]]:
        state: dict[str, npt.NDArray[np.generic]] = {"steps": np.array([self.steps])}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}.{key}"] = _host(tensor)
        return state

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

    def load_optimizer_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self.steps = int(state["steps"][0])
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            loaded = {
                key: torch.from_numpy(state[f"{name}.{key}"]) for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in state
            }
            if loaded:
                self.optimizer.state[parameter] = {key: tensor.to(self.device) for key, tensor in loaded.items()}


def shapes(
    model: str, *, fields: int, embedding_dim: int, hidden: Sequence[int], activation: str, dropout: float, table_bits: int, **_: object
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a learner with these options; takes no memory for them."""
    with torch.device("meta"):
        dense = MODELS[model](fields=fields, embedding_dim=embedding_dim, hidden=hidden, activation=activation, dropout=dropout)
    return {"table": (1 << table_bits, columns(embedding_dim)), **{f"dense.{n}": tuple(t.shape) for n, t in dense.state_dict().items()}}


def _host(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().to("cpu", copy=True).contiguous().numpy()
