"""The learner of a run on several ranks, as rank 0 sees it.

Its calls are those of any learner. Each announces itself to the other ranks, which make it on their
part of the network, and then makes it here. The model is the same, bit for bit, as that of
`NetworkLearner`, for any number of ranks.

>>> from stream_ctr.distributed.ranks import Ranks
>>> team = Team(Ranks.alone(), {"network": NETWORK_MAKER})
>>> spec = LearnerSpec(fields=2, embedding_dim=4, hidden=(8,), table_bits=8, batch_size=4)
>>> learner = make_sharded_learner(team, spec)
>>> learner.learn(np.array([[1, 2], [3, 4]], np.int32), np.array([1, 0], np.uint8)).shape
torch.Size([2])
"""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor

from stream_ctr.distributed.team import Team
from stream_ctr.learn.bit_kernels import Rows
from stream_ctr.learn.learner import Learner
from stream_ctr.learn.linear_learner import LinearLearner
from stream_ctr.learn.network import TABLE
from stream_ctr.learn.shard_files import StoredTable
from stream_ctr.learn.shard_writer import SharedCopy
from stream_ctr.learn.sharded_network import ShardedNetwork, network_maker
from stream_ctr.learn.sharded_step import Given
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.step import Batch, Ids, Labels, Values
from stream_ctr.learn.tensors import State, Tensors
from stream_ctr.learn.touched import Touched, require_touched
from stream_ctr.models.registered import system

NETWORK_MAKER = network_maker
"""The maker of the kind "network" of a `Team` whose rank 0 makes sharded learners."""


class ShardedLearner:
    """A network of which every rank of `team` has a part; the team has the maker `NETWORK_MAKER`.

    The other arguments are those of `NetworkLearner`; `threads` are those of each rank.
    """

    def __init__(
        self, team: Team, spec: LearnerSpec, *, threads: int = 0, progressive: bool = True
    ) -> None:
        self._team = team
        self._lock = threading.Lock()
        number, network = team.make(
            "network", spec=msgspec.to_builtins(spec), threads=threads, progressive=progressive
        )
        self.number: int = number
        self.network: ShardedNetwork = network
        self._shards = SharedCopy(team, number, network, network.writer, network.shape)
        self.batch_size = spec.batch_size
        self.touched: ShardedTouched | None = None

    @property
    def steps(self) -> int:
        return self.network.steps

    @property
    def restored(self) -> int:
        return self.network.restored

    @property
    def pretraining(self) -> bool:
        return self.network.pretraining

    def _announce(self, method: str, *others: int, **arguments: Any) -> None:
        self._team.announce(self.number, method, *others, **arguments)

    def learn(
        self,
        ids: Ids,
        labels: Labels,
        values: Values | None = None,
        *,
        following: Batch | None = None,
    ) -> Tensor | None:
        given = self._given(ids, labels, values)
        with self._lock:
            self._announce("learn", n=len(ids))
            return self.network.learn(len(ids), given)

    def predict(self, ids: Ids, values: Values | None = None) -> npt.NDArray[np.floating]:
        given = self._given(ids, None, values)
        with self._lock:
            self._announce("predict", n=len(ids))
            return self.network.predict(len(ids), given)

    def _given(self, ids: Ids, labels: Labels | None, values: Values | None) -> Given:
        self.network._require_values(values)
        return Given(ids[:, : self.network.columns], labels, values)

    # -- state -------------------------------------------------------------------------------------

    def weights(self, *, reuse: bool = False) -> State:
        """Return the weights besides the table, which every rank copies its rows of."""
        with self._lock:
            self._announce("copy_rows", reuse=reuse)
            self.network.copy_rows(reuse=reuse)
            return self.network.other_weights()

    def whole_weights(self) -> State:
        """Return all weights, with the whole table in the memory of rank 0."""
        with self._lock:
            self._announce("gather_table")
            return {TABLE: self.network.gather_table(), **self.network.other_weights()}

    def optimizer_state(self) -> State:
        with self._lock:
            self._announce("optimizer_state")
            return self.network.optimizer_state()

    def shards(self) -> SharedCopy:
        """Return the copy of the table that `weights` made on every rank last."""
        return self._shards

    def load_weights(self, weights: Tensors) -> None:
        self.network.require_weights(weights)
        table: Any = weights[TABLE]
        with self._lock:
            if isinstance(table, StoredTable):
                place: dict[str, Any] = {
                    "folder": str(table.folder),
                    "stem": table.stem,
                    "files": {**table.files},
                }
                self._announce("load_stored", **place)
                self.network.load_stored(weights, **place)
            else:
                self._announce("load_weights")
                self.network.load_weights(weights)

    def load_optimizer_state(self, state: Tensors) -> None:
        self.network.require_optimizer_state(state)
        with self._lock:
            self._announce("load_optimizer_state")
            self.network.load_optimizer_state(state)

    # -- what changed ------------------------------------------------------------------------------

    def track_touched(self) -> None:
        with self._lock:
            self._announce("track_touched")
            self.network.track_touched()
        self.touched = ShardedTouched(self)

    def take_changes(self) -> State:
        require_touched(self.touched)
        with self._lock:
            self._announce("take_changes")
            return self.network.take_changes()

    def track_changes(self) -> None:
        with self._lock:
            self._announce("track_changes")
            self.network.track_changes()

    def copy_weights_to(self, other: ShardedLearner) -> None:
        with self._lock, other._lock:
            self._announce("copy_weights_to", other.number)
            self.network.copy_weights_to(other.network)


class ShardedTouched(Touched):
    """The rows of all ranks that learning has touched, as rank 0 sees them."""

    def __init__(self, learner: ShardedLearner) -> None:
        self._learner = learner

    def __len__(self) -> int:
        with self._learner._lock:
            self._learner._announce("count_touched")
            return self._learner.network.count_touched()

    def mark(self, ids: npt.NDArray[np.int32]) -> None:
        """Add the rows `ids` int32 [n, F], which lie in the table."""
        self.put_back(np.unique(ids).astype(np.uint32))

    def take(self) -> Rows:
        """Return the touched rows, ascending, as uint32 [n]; after it none is touched."""
        with self._learner._lock:
            self._learner._announce("take_touched")
            return self._learner.network.take_touched()

    def put_back(self, rows: Rows) -> None:
        """Add `rows` uint32 [n], ascending, which were taken and did not reach a server."""
        with self._learner._lock:
            self._learner._announce("put_back")
            self._learner.network.put_back(rows)


def make_sharded_learner(
    team: Team, spec: LearnerSpec, *, threads: int = 0, progressive: bool = True
) -> Learner:
    """Make the learner that `spec` describes; LR, which is small, stays whole on rank 0."""
    if system(spec.model).module is None:
        return LinearLearner(spec)
    return ShardedLearner(team, spec, threads=threads, progressive=progressive)
