"""CUDA graphs of the functions of a step.

A graph replays the launches of a function with one launch of its own. On the CPU there are no
graphs, and the functions themselves are called.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

Call = Callable[[], None]

# Calls of the functions before they are recorded, which compile kernels and allocate workspaces.
_WARM_UP_CALLS = 3
# Torch records one graph at a time in a process, whichever learners and threads there are.
_RECORDING = threading.Lock()


class Graphs:
    """Records functions on `device`; the graphs share their memory.

    They must be replayed one after another on one stream, because the memory of one is that of the
    others. `generator` is the one that the functions draw from, if they draw.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self._device = device
        self._generator = generator
        self._pool: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def record(self, *calls: Call) -> tuple[Call, ...]:
        """Return functions that replay `calls`; on the CPU, return `calls`.

        They run a few times first, in their order. A later call may use what an earlier one has
        allocated, if it is still referred to.
        """
        if self._device.type != "cuda":
            return calls
        with _RECORDING, _tf32():
            self._warm_up(calls)
            return tuple(self._recorded(call) for call in calls)

    def _warm_up(self, calls: tuple[Call, ...]) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)

    def _recorded(self, call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        # Other threads may load a model meanwhile, so only this thread's errors count.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            call()
        return graph.replay


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Let float32 products use TF32: factors with 10 bits of mantissa, sums in float32.

    Tensor cores multiply such factors.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
