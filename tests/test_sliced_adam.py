"""Adam in slices takes the steps of one process, also where one rank has several threads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.learn.adam import FlatAdam
from stream_ctr.learn.sliced_adam import SlicedAdam
from stream_ctr.learn.thread_pool import ThreadPool


@pytest.mark.parametrize("threads", [2, 3])
def test_one_rank_with_threads_steps_as_one_with_none(threads: int) -> None:
    gradients = torch.randn(2, 330, generator=torch.Generator().manual_seed(1))
    vectors = []
    for count in (1, threads):
        torch.manual_seed(0)
        adam = FlatAdam(nn.Linear(32, 10), learning_rate=0.01)
        sliced = SlicedAdam(Ranks.alone(), adam, ThreadPool(count))
        for step in range(3):
            sliced.step(gradients.clone(), [2], step)
        vectors.append(adam.vector.clone())
    assert torch.equal(*vectors)
