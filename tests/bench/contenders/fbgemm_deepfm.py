"""FBGEMM's table-batched embeddings on the CPU with exact rowwise Adagrad, below a PyTorch MLP.

The width of its rows must be a multiple of four floats: [ V x 10 | w | unused ] has twelve. Its CPU
kernels are made for a table for each field; `--shared` has one table for all fields.
"""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401 - registers the operators
import torch
from examples import batches, field_sizes, measured, options, parse
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from network import Head

_ROW_MULTIPLE = 4  # floats


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shared", action="store_true")
    arguments = parse(parser)
    sizes = field_sizes(arguments.data)
    width = -(-(arguments.embedding_dim + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    rows = [sum(sizes)] if arguments.shared else sizes
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(size, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for size in rows],
        feature_table_map=[0] * len(sizes) if arguments.shared else None,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,
    )
    for weight in table.split_embedding_weights():
        torch.nn.init.normal_(weight, std=0.01)
    head = Head(len(sizes), arguments.embedding_dim, arguments.hidden)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    data = batches(arguments.data, arguments.batch, which="ids" if arguments.shared else "local")
    bags = torch.arange(arguments.batch * len(sizes) + 1)  # one value in each bag

    def step() -> None:
        ids, labels = next(data)
        pooled = table(ids.t().reshape(-1).long(), bags)  # values by field, then by example
        loss = head(pooled.view(len(ids), len(sizes), width), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    layout = "one table" if arguments.shared else f"{len(sizes)} tables"
    note = f"torch {torch.__version__}, {layout}, {sum(rows):,} rows in all, {width} floats wide"
    measured(step, arguments, note=note)


if __name__ == "__main__":
    main()
