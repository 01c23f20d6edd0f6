"""TorchRec: DeepFM over an `EmbeddingBagCollection` that is sharded by rows, on ranks over gloo.

There is a table for each field, which fbgemm's CPU kernels are made for. Rows are [ V x 10 | w |
unused ], since their width must be a multiple of four floats. The tables step with exact rowwise
Adagrad in the backward pass, the dense part with Adam below `DistributedDataParallel`, which
`DistributedModelParallel` puts around it. The loop is the usual one: zero, forward, backward, step.
Each rank has its share of each batch in memory, so no example is sent.
"""

from __future__ import annotations

import itertools
from typing import Any

import rank_processes
import torch
import torchrec
from answers import Stopwatch, answer
from examples import field_sizes, full_batches, options
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from network import Head
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan

_ROW_MULTIPLE = 4  # floats
_WARM_UP_STEPS = 3


class DeepFM(nn.Module):
    """The mean logloss of a batch."""

    def __init__(self, tables: Any, fields: int, embedding_dim: int, hidden: list[int]) -> None:
        super().__init__()
        self.tables = tables
        self.head = Head(fields, embedding_dim, hidden)
        self.fields = fields

    def forward(self, values: Any, labels: Tensor) -> Tensor:
        pooled = self.tables(values).values()
        loss: Tensor = self.head(pooled.view(len(labels), self.fields, -1), labels)
        return loss


def main() -> None:
    parser = options(__doc__)
    rank_processes.add_options(parser)
    arguments = parser.parse_args()
    rank = rank_processes.join(arguments)
    torch.manual_seed(0)
    sizes = field_sizes(arguments.data)
    model = sharded(arguments, sizes)
    dense = [
        parameter for name, parameter in model.named_parameters() if not name.startswith("tables.")
    ]
    optimizer = torch.optim.Adam(dense, fused=True)
    batches = itertools.cycle(own_batches(arguments, rank, len(sizes)))

    def step() -> None:
        values, labels = next(batches)
        optimizer.zero_grad()
        loss = model(values, labels)
        loss.backward()
        optimizer.step()

    for _ in range(_WARM_UP_STEPS):
        step()
    if rank:
        follow(step)
        return
    note = f"torchrec {torchrec.__version__}, {sum(sizes):,} rows, fp32"
    answer(lambda: measured(step, arguments), note=note)
    rank_processes.told(0)


def sharded(arguments: Any, sizes: list[int]) -> DistributedModelParallel:
    """Return the model with all tables sharded by rows over the ranks."""
    width = -(-(arguments.embedding_dim + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    configs = [
        torchrec.EmbeddingBagConfig(
            name=f"table{field}",
            embedding_dim=width,
            num_embeddings=size,
            feature_names=[f"field{field}"],
            init_fn=lambda weight: nn.init.normal_(weight, std=0.01),
        )
        for field, size in enumerate(sizes)
    ]
    tables = torchrec.EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    model = DeepFM(tables, len(sizes), arguments.embedding_dim, arguments.hidden)
    optimizer = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": 0.01,
        "eps": 1e-8,
    }
    sharder: Any = EmbeddingBagCollectionSharder(fused_params=optimizer)
    # The planner offers no sharding by rows on a CPU, so the plan names it.
    by_rows = construct_module_sharding_plan(
        tables,
        {config.name: row_wise(compute_kernel="fused") for config in configs},
        sharder=sharder,
        local_size=arguments.ranks,
        world_size=arguments.ranks,
        device_type="cpu",
    )
    plan = ShardingPlan({"tables": by_rows})
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=plan, sharders=[sharder]
    )


def own_batches(arguments: Any, rank: int, fields: int) -> list[tuple[Any, Tensor]]:
    """Return this rank's share of each batch: (one value for each field and example, labels)."""
    share = arguments.batch // arguments.ranks
    own = slice(rank * share, (rank + 1) * share)
    keys = [f"field{field}" for field in range(fields)]
    lengths = torch.ones(share * fields, dtype=torch.int32)
    return [
        (
            torchrec.KeyedJaggedTensor(keys, ids[own].t().reshape(-1).long(), lengths=lengths),
            labels[own],
        )
        for ids, labels in full_batches(arguments.data, arguments.batch, which="local")
    ]


def measured(step: Any, arguments: Any) -> dict[str, float]:
    """Take so many steps on all ranks that they last about --seconds."""
    steps = 2
    while True:
        rank_processes.told(steps)
        stopwatch = Stopwatch()
        for _ in range(steps):
            step()
        if stopwatch.elapsed >= arguments.seconds:
            return {"count": steps * arguments.batch, "steps": steps, **stopwatch.seconds()}
        steps = min(1 + int(1.2 * steps * arguments.seconds / stopwatch.elapsed), 10 * steps)


def follow(step: Any) -> None:
    """Take as many steps as rank 0, until it takes none."""
    while steps := rank_processes.told(0):
        for _ in range(steps):
            step()


if __name__ == "__main__":
    main()
