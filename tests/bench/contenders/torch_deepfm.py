"""Plain PyTorch: an `nn.Embedding` with rows [ V x K | w ] and an MLP.

Each has an optimiser of `torch.optim`.
"""

from __future__ import annotations

import torch
from examples import batches, field_sizes, measured, options, parse
from network import Head
from torch import nn

SPARSE = {"sparse-adam": torch.optim.SparseAdam, "sparse-adagrad": torch.optim.Adagrad}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--optimizer", choices=["dense-adam", *SPARSE], required=True)
    arguments = parse(parser)
    sizes = field_sizes(arguments.data)
    sparse = arguments.optimizer in SPARSE
    table = nn.Embedding(
        sum(sizes), arguments.embedding_dim + 1, sparse=sparse, device=arguments.device
    )
    nn.init.normal_(table.weight, std=0.01)
    head = Head(len(sizes), arguments.embedding_dim, arguments.hidden).to(arguments.device)
    head_optimizer = torch.optim.Adam(head.parameters(), fused=True)
    if sparse:
        table_optimizer = SPARSE[arguments.optimizer](table.parameters(), lr=0.01)
    else:
        table_optimizer = torch.optim.Adam(table.parameters(), fused=True)
    data = batches(arguments.data, arguments.batch, device=arguments.device)

    def step() -> None:
        ids, labels = next(data)
        loss = head(table(ids), labels)
        head_optimizer.zero_grad()
        table_optimizer.zero_grad()
        loss.backward()
        head_optimizer.step()
        table_optimizer.step()

    note = f"torch {torch.__version__}, {sum(sizes):,} rows" + ("" if sparse else ", fused")
    measured(step, arguments, note=note)


if __name__ == "__main__":
    main()
