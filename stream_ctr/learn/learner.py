"""The learner: any of the paper's systems over the hashed ids, one step per batch.

`learn` returns the logits from before the update, so every example is predicted before it is learned from: progressive validation is
not an extra pass but what learning yields.

>>> spec = LearnerSpec(fields=2, embedding_dim=4, hidden=(8,), table_bits=8, batch_size=4)
>>> learner = make_learner(spec, device="cpu")
>>> ids, labels = np.array([[1, 2], [3, 4]], np.int32), np.array([1, 0], np.uint8)
>>> before = learner.predict(ids)
>>> bool(np.array_equal(learner.learn(ids, labels).numpy(), before)), bool(np.array_equal(learner.predict(ids), before))
(True, False)
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from msgspec import structs
from torch import Tensor, nn

from stream_ctr.errors import ConfigError
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.cpu_step import Batch, CpuStep, Ids, Labels, Values
from stream_ctr.learn.ftrl import FTRL
from stream_ctr.learn.gpu_step import GpuStep
from stream_ctr.learn.spec import FtrlRates, LearnerSpec
from stream_ctr.learn.table import Rates, Table, columns
from stream_ctr.models import MODELS
from stream_ctr.models.layers import Dropout

_log = logging.getLogger(__name__)
State = dict[str, npt.NDArray[Any]]
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86 and Arm


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises `ConfigError` when "cuda" is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: no CUDA GPU is available here; use --device cpu or auto")
    return torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )


def choose_precision(name: str, device: torch.device) -> str:
    """ "auto" is "bf16" where products of bfloat16 take half the time of those of float32, and "fp32" elsewhere.

    >>> choose_precision("fp32", torch.device("cpu"))
    'fp32'
    """
    able = _has_bfloat16(device)
    if name == "bf16" and not able:
        _log.warning(
            "learn.precision = bf16: there are no such products in this processor, so they take many times as long as those of fp32"
        )
    return ("bf16" if able else "fp32") if name == "auto" else name


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: Mapping[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older releases of torch do not tell
    return any(able.get(name) for name in _BFLOAT16)


class Learner(Protocol):
    """What learns from batches. One of the paper's nine systems, made by `make_learner`."""

    batch_size: int
    steps: int
    """How many batches were learned."""

    @property
    def pretraining(self) -> bool:
        """Whether it is still the model that it begins as."""
        ...

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        """One step on n <= batch_size examples; their logits [n] from before it (on the device).

        `ids` int32 [n, F], or [n, F + C] with those of cross products, `labels` uint8 [n], `values` float32 [n, V]. None, and nothing is
        learned, when a logit or a gradient is not finite or the gradient is exploding; LR, which learns an example at a time, has NaN for
        those that it does not learn instead. `following` are the ids, labels and values of the
        next call, if they are known: a GPU has them on their way meanwhile.
        """
        ...

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        """`ids` -> logits [n], without dropout; any n. Threads take turns."""
        ...

    def weights(self, *, reuse: bool = False) -> State:
        """All that serving needs, copied to the host; with `reuse` into memory that the next such call uses again, which takes a tenth of
        the time of new memory."""
        ...

    def optimizer_state(self) -> State:
        """What learning needs besides."""
        ...

    def load_weights(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Raises `ValueError`, with nothing loaded, unless these are the tensors of this model: names, shapes, types, all finite."""
        ...

    def load_optimizer_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Raises `KeyError` or `ValueError` when it is not of this model."""
        ...


def make_learner(
    spec: LearnerSpec,
    *,
    device: str = "auto",
    threads: int = 0,
    progressive: bool = True,
    serving: bool = False,
) -> Learner:
    """Make the learner that `spec` describes.

    With `serving`, a learner that loads weights and predicts: LR then takes no more memory than its
    weights do. The other arguments are those of `NetworkLearner`.

    >>> learner = make_learner(LearnerSpec(model="lr", fields=2, table_bits=8))
    >>> learner.predict(np.array([[1, 2]], np.int32)).tolist()
    [0.0]
    """
    if MODELS[spec.model].module is None:
        return (ServedLinear if serving else LinearLearner)(spec)
    return NetworkLearner(spec, device=device, threads=threads, progressive=progressive)


class NetworkLearner:
    """A module of the zoo over the embedding table; parameters step with Adam, rows with the table's optimiser.

    A batch is filled up to a fixed number of rows: with the same shapes throughout, an example's logit does not depend on how many
    others were scored with it, nor on the number of threads.

    With Adagrad and SGD the table's rates are divided by the number of fields: all fields of an example step together, so its logit moves
    F times as far as each row does, and hot rows would overshoot in the first batches of a model with many fields. The rate of first-order
    weights is divided by F + C where those of C cross products are summed too. Adam's are taken as they are, like the dense part's. A rate
    of 0 is the optimiser's own. With `precision` "bf16" products are of bfloat16 copies, while weights, sums and steps stay float32.

    A model that begins as another one is that for `pretrain_examples`, then it and its optimisers begin anew on the weights; the dense
    part's decay begins with it. Without `progressive` the logits that `learn` returns are those of the step itself, in which dropout
    dropped something: a pass less, for who does not measure by them.
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
        system = MODELS[spec.model]
        self.columns = spec.fields + (spec.crosses if system.crosses else 0)
        self.fields = spec.fields
        self.value_fields = list(spec.value_fields)
        self.batch_size = spec.batch_size
        self.steps = 0
        self._begun = 0  # steps before the present optimisers began
        self._pretrain_steps = -(-spec.pretrain_examples // spec.batch_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.model = _module(spec).to(self.device)
        self.table = Table(
            bits=spec.table_bits,
            embedding_dim=spec.embedding_dim,
            embeddings=system.embeddings,
            rates=_table_rates(spec, self.columns),
            initial_scale=spec.initial_scale,
            seed=spec.seed,
            device=self.device,
        )
        self.adam = FlatAdam(
            self.model, learning_rate=spec.dense_learning_rate, low=spec.precision == "bf16"
        )
        self._weight_decay = spec.dense_weight_decay
        self._turn = threading.Lock()  # a step has one set of buffers
        self._copy: Tensor | None = None
        step = (
            partial(CpuStep, threads=threads or os.cpu_count() or 1)
            if self.device.type == "cpu"
            else GpuStep
        )
        self._make_step = partial(
            step,
            self.model,
            self.table,
            self.adam,
            fields=self.columns,
            value_fields=self.value_fields,
            batch_size=spec.batch_size,
            seed=spec.seed,
            progressive=progressive,
        )
        self._step = self._prepared_step()
        if self.pretraining and not self._pretrain_steps:
            self.end_pretraining()

    @property
    def pretraining(self) -> bool:
        return getattr(self.model, "pretraining", False)

    @property
    def _drops(self) -> bool:
        return not self.pretraining and any(
            isinstance(layer, Dropout) and layer.rate > 0 for layer in self.model.modules()
        )

    def _prepared_step(self) -> CpuStep | GpuStep:
        """Of the model that it is now; made anew when that changes, since what a step does was recorded."""
        self.adam.weight_decay = (
            0.0 if self.pretraining else self._weight_decay
        )  # else a network that rests would decay to nothing
        return self._make_step(dropout=self._drops)

    def end_pretraining(self) -> None:
        """Its weights are what the model begins with; the optimisers begin anew."""
        self.model.begin_network()  # type: ignore[operator]
        self.table.forget()
        self.adam.forget()
        self._begun = self.steps
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
        with self._turn:
            logits = self._step.learn(
                ids[:, : self.columns], labels, values, self.steps - self._begun, following
            )
            if logits is not None:
                self.steps += 1
                if self.pretraining and self.steps >= self._pretrain_steps:
                    self.end_pretraining()
        return logits

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        self._require_values(values)
        ids = ids[:, : self.columns]
        parts = []
        for start in range(0, len(ids), self.batch_size):
            stop = start + self.batch_size
            with self._turn:
                parts.append(
                    self._step.predict(
                        ids[start:stop], None if values is None else values[start:stop]
                    )
                )
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _require_values(self, values: Values | None) -> None:
        if self.value_fields and values is None:
            raise ValueError(f"the values of {len(self.value_fields)} fields are missing")

    # -- state ------------------------------------------------------------------------------------

    def weights(self, *, reuse: bool = False) -> State:
        """The table's rows and the dense parameters."""
        if reuse and self._copy is None:
            self._copy = torch.empty_like(self.table.rows, device="cpu")
        rows = (
            self._copy.copy_(self.table.rows).numpy()
            if reuse and self._copy is not None
            else _host(self.table.rows)
        )
        return {
            "table": rows,
            **{f"dense.{name}": _host(tensor) for name, tensor in self.model.state_dict().items()},
        }

    def optimizer_state(self) -> State:
        return {"steps": np.array([self.steps, self._begun]), **self.adam.state_dict()}

    def load_weights(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        wanted = {
            "table": self.table.rows,
            **{f"dense.{name}": tensor for name, tensor in self.model.state_dict().items()},
        }
        _require_names(weights, wanted)
        for name, tensor in wanted.items():
            _require_numbers(name, weights[name], np.float32, tuple(tensor.shape))
        with self._turn:
            pretraining = self.pretraining
            self.table.rows.copy_(torch.from_numpy(weights["table"]))
            self.model.load_state_dict(
                {
                    name.removeprefix("dense."): torch.from_numpy(weights[name])
                    for name in wanted
                    if name != "table"
                }
            )
            self.adam.refresh()
            if self.pretraining != pretraining:
                self._step = self._prepared_step()

    def load_optimizer_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        steps, begun = state["steps"].tolist()
        self.adam.load_state_dict(state)
        self.steps, self._begun = steps, begun


class LinearLearner:
    """LR: FTRL-Proximal, which learns an example at a time; batches are only how they come. On the CPU, whatever the others are on."""

    pretraining = False

    def __init__(self, spec: LearnerSpec) -> None:
        self.fields = spec.fields
        self.batch_size = spec.batch_size
        self.steps = 0
        self._bits = spec.table_bits
        self._turn = threading.Lock()  # while an example is learned, its rows are marked
        self._ftrl = _ftrl(spec, spec.table_bits)

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        """An example whose logit is not finite is not learned, the others are."""
        with self._turn:
            logits = self._ftrl.learn(self._of_fields(ids), labels, values)
            self.steps += 1
        return torch.from_numpy(logits)

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        with self._turn:
            return self._ftrl.predict(self._of_fields(ids), values)

    def _of_fields(self, ids: Ids) -> Ids:
        return np.ascontiguousarray(ids[:, : self.fields])

    def weights(self, *, reuse: bool = False) -> State:
        """The pairs (z, n), which are weights and optimiser in one."""
        with self._turn:
            return self._ftrl.state_dict(reuse=reuse)

    def optimizer_state(self) -> State:
        return {"steps": np.array([self.steps])}

    def load_weights(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        _require_linear(weights, self._bits)
        with self._turn:
            self._ftrl.load_state_dict(weights)

    def load_optimizer_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self.steps = int(state["steps"][0])


class ServedLinear(LinearLearner):
    """LR that was learned elsewhere. Its table holds the rows that were learned side by side, and one for all others: how many rows there
    might be, which nothing but a manifest says, costs no memory."""

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(structs.replace(spec, table_bits=0))
        self._bits = spec.table_bits
        self._rows = np.empty(0, np.int32)
        self._make = partial(_ftrl, spec)

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        raise TypeError("it was made for serving, and does not learn")

    def load_weights(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        _require_linear(weights, self._bits)
        count = len(weights["rows"])
        ftrl = self._make(count.bit_length())
        ftrl.load_state_dict({**weights, "rows": np.arange(count)})
        with self._turn:
            self._rows, self._ftrl = weights["rows"].astype(np.int32), ftrl

    def weights(self, *, reuse: bool = False) -> State:
        with self._turn:
            state = self._ftrl.state_dict(reuse=reuse)
            return {**state, "rows": self._rows[state["rows"]]}

    def _of_fields(self, ids: Ids) -> Ids:
        """Where they lie among the rows; behind them where they are none."""
        ids, count = ids[:, : self.fields], len(self._rows)
        places = np.searchsorted(self._rows, ids)
        if count:
            places[self._rows[np.minimum(places, count - 1)] != ids] = count
        return places.astype(np.int32)


def _require_linear(weights: Mapping[str, npt.NDArray[np.generic]], bits: int) -> None:
    """Raises `ValueError` unless they are those of LR over 2 ** `bits` rows."""
    _require_names(weights, {"rows", "pairs", "intercept"})
    rows = cast("npt.NDArray[np.int32]", weights["rows"])
    _require_numbers("rows", rows, np.int32, (rows.size,))
    for name, shape in (("pairs", (len(rows), 2)), ("intercept", (2,))):
        _require_numbers(name, weights[name], np.float64, shape)
        if (weights[name][..., 1] < 0).any():  # type: ignore[operator]
            raise ValueError(f"tensor {name!r} holds a negative sum of squares")
    if len(rows) and not (rows.min() >= 0 and rows.max() < 1 << bits):
        raise ValueError(f"tensor 'rows' has rows that a table of 2^{bits} rows has not")
    if (rows[1:] <= rows[:-1]).any():
        raise ValueError("tensor 'rows' does not ascend")


def require_shapes(weights: Mapping[str, npt.NDArray[np.generic]], spec: LearnerSpec) -> None:
    """Raise `KeyError` or `ValueError` unless `weights` have the shapes that `spec` describes.

    It takes no memory for a learner: a damaged specification may describe one of any size.
    """
    system = MODELS[spec.model]
    if system.module is None:
        return  # served, LR takes the memory of its weights
    with torch.device("meta"):
        dense = _module(spec).state_dict()
    row = columns(spec.embedding_dim, embeddings=system.embeddings, optimizer=spec.table_optimizer)
    wanted = {
        "table": (1 << spec.table_bits, row),
        **{f"dense.{name}": tuple(tensor.shape) for name, tensor in dense.items()},
    }
    for name, shape in wanted.items():
        if (found := weights[name].shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {found}, expected {shape}")


def _module(spec: LearnerSpec) -> nn.Module:
    system = MODELS[spec.model]
    assert system.module is not None
    return system.module(
        fields=spec.fields,
        embedding_dim=spec.embedding_dim,
        hidden=spec.hidden,
        activation=system.activation if spec.activation == "paper" else spec.activation,
        dropout=spec.dropout,
    )


def _table_rates(spec: LearnerSpec, columns: int) -> Rates:
    return Rates.of(
        spec.table_optimizer,
        fields=spec.fields,
        columns=columns,
        learning_rate=spec.table_learning_rate,
        beta=spec.table_beta,
        linear_learning_rate=spec.linear_learning_rate,
        linear_beta=spec.linear_beta,
    )


def _ftrl(spec: LearnerSpec, table_bits: int) -> FTRL:
    rates = spec.ftrl or FtrlRates()
    return FTRL(
        table_bits=table_bits,
        value_fields=spec.value_fields,
        alpha=rates.alpha,
        beta=rates.beta,
        l1=rates.l1,
        l2=rates.l2,
    )


def _require_names(weights: Collection[str], wanted: Collection[str]) -> None:
    if odd := sorted({*weights} ^ {*wanted}):
        raise ValueError(
            f"tensor {odd[0]!r} is {'missing' if odd[0] in wanted else 'not one of this model'}"
        )


def _require_numbers(
    name: str, found: npt.NDArray[np.generic], dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> None:
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"tensor {name!r} is {found.dtype} {found.shape}, expected {np.dtype(dtype)} {shape}"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"tensor {name!r} holds values that are not finite")


def _host(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().to("cpu", copy=True).contiguous().numpy()
