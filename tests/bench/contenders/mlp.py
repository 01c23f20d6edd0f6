"""The dense part of DeepFM alone in plain PyTorch, on inputs in memory: forward, backward, Adam."""

from __future__ import annotations

import itertools

import torch
from examples import measured, options, parse
from network import mlp
from torch import nn

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", choices=list(TYPES), required=True)
    parser.add_argument("--fields", type=int, default=39)
    arguments = parse(parser)
    placed = {"device": arguments.device, "dtype": TYPES[arguments.precision]}
    inputs = arguments.fields * arguments.embedding_dim
    network = mlp(inputs, arguments.hidden).to(**placed)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    labels = torch.randint(2, (arguments.batch,), device=arguments.device).to(**placed)
    # Like the output of a gather: new memory for each batch, and a gradient with respect to it.
    batches = itertools.cycle([torch.randn(arguments.batch, inputs, **placed) for _ in range(4)])

    def step() -> None:
        leaf = next(batches).detach().requires_grad_()
        loss = nn.functional.binary_cross_entropy_with_logits(network(leaf).squeeze(1), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    measured(step, arguments, note=f"torch {torch.__version__}, {arguments.precision} throughout")


if __name__ == "__main__":
    main()
