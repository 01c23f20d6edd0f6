"""Ours: DeepFM through `learn.sharded_learner` on several ranks; ids in memory of rank 0.

A repetition is a number of steps that takes about --seconds. Rank 0 cuts each batch into parts for
the ranks, as `torchrun ... -m stream_ctr run` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import rank_processes
from answers import Stopwatch, answer
from examples import field_sizes, full_batches, options

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.learn.device import choose_device, choose_precision
from stream_ctr.learn.sharded_learner import NETWORK_MAKER, make_sharded_learner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.thread_pool import set_up_process

_WARM_UP_STEPS = 3


def main() -> None:
    parser = options(__doc__)
    rank_processes.add_options(parser)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--table-bits", type=int, default=0)
    parser.add_argument("--optimizer", choices=["online", "adagrad", "adam"], default="online")
    parser.add_argument("--steps", type=int, default=0, help="of a repetition, in place of seconds")
    arguments = parser.parse_args()
    set_up_process()
    rank = rank_processes.join(arguments)
    ranks = Ranks(rank, arguments.ranks)
    team = Team(ranks, {"network": NETWORK_MAKER})
    if rank:
        team.follow()
        return
    spec = spec_of(arguments)
    learner = make_sharded_learner(team, spec, threads=arguments.threads, progressive=False)
    batches = itertools.cycle(
        (ids.numpy(), labels.numpy().astype(np.uint8))
        for ids, labels in full_batches(arguments.data, arguments.batch)
    )
    for _ in range(_WARM_UP_STEPS):
        learner.learn(*next(batches))
    note = f"{spec.precision}, 2^{spec.table_bits} rows"
    answer(lambda: measured(lambda: learner.learn(*next(batches)), arguments), note=note)
    team.close()


def spec_of(arguments: Any) -> LearnerSpec:
    sizes = field_sizes(arguments.data)
    return LearnerSpec(
        model="deepfm",
        fields=len(sizes),
        embedding_dim=arguments.embedding_dim,
        hidden=tuple(arguments.hidden),
        table_bits=arguments.table_bits or (sum(sizes) - 1).bit_length(),
        batch_size=arguments.batch,
        table_optimizer=arguments.optimizer,
        precision=choose_precision(arguments.precision, choose_device("cpu")),
    )


def measured(step: Callable[[], object], arguments: Any) -> dict[str, float]:
    """Take steps and return their examples and seconds."""
    stopwatch = Stopwatch()
    taken = 0
    while taken < arguments.steps or (
        not arguments.steps and stopwatch.elapsed < arguments.seconds
    ):
        step()
        taken += 1
    return {"count": taken * arguments.batch, "steps": taken, **stopwatch.seconds()}


if __name__ == "__main__":
    main()
