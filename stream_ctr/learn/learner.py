"""The interface of a learner, and the function that makes one.

A learner is one of the paper's nine systems over hashed ids. `learn` returns the logits from before
the update, so every example is predicted before it is learned from: progressive validation is not
an extra pass but a result of learning.

>>> spec = LearnerSpec(fields=2, embedding_dim=4, hidden=(8,), table_bits=8, batch_size=4)
>>> learner = make_learner(spec, device="cpu")
>>> ids, labels = np.array([[1, 2], [3, 4]], np.int32), np.array([1, 0], np.uint8)
>>> before = learner.predict(ids)
>>> np.allclose(learner.learn(ids, labels), before)
True
>>> np.allclose(learner.predict(ids), before)
False
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stream_ctr.learn.linear_learner import LinearLearner
from stream_ctr.learn.network import columns_of, module_of
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.shard_writer import TableShards
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Batch, Ids, Labels, Values
from stream_ctr.learn.table_kernels import row_floats
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.learn.touched import Touched
from stream_ctr.models.registered import system


class Learner(Protocol):
    """One of the paper's nine systems, made by `make_learner`. It learns from batches."""

    batch_size: int

    @property
    def steps(self) -> int:
        """The number of batches that were learned."""
        ...

    @property
    def restored(self) -> int:
        """The number of calls of `load_weights`, each of which ends what was learned before."""
        ...

    @property
    def touched(self) -> Touched | None:
        """The rows that were learned since they were last taken, after `track_touched`."""
        ...

    @property
    def pretraining(self) -> bool:
        """True while the model is still the one that it starts as."""
        ...

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        """Learn n <= batch_size examples; return their logits [n] from before.

        `ids` int32 [n, F], or [n, F + C] with the ids of cross products, `labels` uint8 [n],
        `values` float32 [n, V]. `following` are the ids, labels and values of the next call, if
        they are known; a GPU copies them meanwhile.

        Returns None, and learns nothing, when a logit or a gradient is not finite or the gradient
        explodes. LR, which learns one example at a time, instead returns NaN for the examples that
        it does not learn.
        """
        ...

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        """Return the logits [n] of any number of examples, without dropout.

        Several threads may call it; they take turns.
        """
        ...

    def weights(self, *, reuse: bool = False) -> State:
        """Return everything that serving needs, copied to the host.

        With `reuse` the copies lie in memory that the next call with `reuse` overwrites, which
        takes a tenth of the time of new memory. A table that several ranks hold is not among them,
        see `shards`.
        """
        ...

    def shards(self) -> TableShards | None:
        """Return the copy of the table that `weights` has made on every rank.

        It is None for a learner that has its table in this process.
        """
        ...

    def optimizer_state(self) -> State:
        """Return everything that learning needs besides the weights."""
        ...

    def load_weights(self, weights: Tensors) -> None:
        """Load `weights`. A learner whose table several ranks hold takes a `StoredTable`, too.

        Raises `ValueError`, with nothing loaded, unless they are the tensors of this model: names,
        shapes and types, and all values finite.
        """
        ...

    def track_touched(self) -> None:
        """Note from now on which rows of the table are learned, for `take_changes`."""
        ...

    def take_changes(self) -> State:
        """Return what serving reads of the touched rows, and everything else that it reads.

        The arrays are those of `served_weights`, copied to the host, with the touched rows: `rows`
        uint32 [n], ascending, and `values`. No row is touched after it. If they do not reach a
        server, `touched.put_back(rows)` has the next call return their newest values. Raises
        `ValueError` before `track_touched`.
        """
        ...

    def track_changes(self) -> None:
        """Note from now on which rows of the table change, for `copy_weights_to`."""
        ...

    def copy_weights_to(self, other: Any) -> None:
        """Make the weights of `other`, a learner of the same model, equal to these.

        `other` changes by this call and by `load_weights` only. After `track_changes`, only those
        rows of the table are copied that have changed since the last call with it.
        """
        ...

    def load_optimizer_state(self, state: Tensors) -> None:
        """Load `state`. Raises `KeyError` or `ValueError` when it is not that of this model."""
        ...


def make_learner(
    spec: LearnerSpec,
    *,
    device: str = "auto",
    threads: int = 0,
    progressive: bool = True,
) -> Learner:
    """Make the learner that `spec` describes. The arguments are those of `NetworkLearner`.

    >>> learner = make_learner(LearnerSpec(model="lr", fields=2, table_bits=8))
    >>> learner.predict(np.array([[1, 2]], np.int32)).tolist()
    [0.0]
    """
    if system(spec.model).module is None:
        return LinearLearner(spec)
    return NetworkLearner(spec, device=device, threads=threads, progressive=progressive)


MakeLearner = Callable[[LearnerSpec], Learner]
"""Makes a learner on the device, and with the threads or ranks, of a run."""


def require_shapes(weights: Tensors, spec: LearnerSpec) -> None:
    """Raise `KeyError` or `ValueError` unless `weights` have the shapes that `spec` describes.

    It takes no memory for a learner: a damaged specification may describe one of any size.

    >>> spec = LearnerSpec(model="fm", fields=2, table_bits=8)
    >>> require_shapes({"table": np.zeros((16, 16)), "dense.bias": np.zeros(())}, spec)
    Traceback (most recent call last):
    ValueError: tensor 'table' has shape (16, 16), expected (256, 16)
    """
    if system(spec.model).module is None:
        return  # LR is checked when it is loaded
    for name, shape in weight_shapes(spec).items():
        if (found := weights[name].shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {found}, expected {shape}")


def weight_shapes(spec: LearnerSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of the network that `spec` describes, by name.

    >>> weight_shapes(LearnerSpec(model="fm", fields=2, table_bits=8))
    {'table': (256, 16), 'dense.bias': (), 'intercept': (2,)}
    """
    floats = row_floats(
        spec.embedding_dim,
        embeddings=system(spec.model).embeddings,
        optimizer=spec.table_optimizer,
    )
    return {
        "table": (1 << spec.table_bits, floats),
        **described_network(spec)[2],
        **({"intercept": (2,)} if spec.table_optimizer == "online" else {}),
    }


def described_network(spec: LearnerSpec) -> tuple[int, int, Mapping[str, tuple[int, ...]]]:
    """Return the columns, the width and the dense shapes of a network (see `NetworkShape`)."""
    with torch.device("meta"):
        dense = module_of(spec).state_dict()
    return (
        columns_of(spec),
        system(spec.model).embeddings * spec.embedding_dim,
        {f"dense.{name}": tuple(tensor.shape) for name, tensor in dense.items()},
    )
