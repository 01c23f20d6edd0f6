"""Graphs of a step. Here torch's graphs are false: what is tested is who records when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stream_ctr.learn.graphs import Graphs


def test_on_the_cpu_the_functions_themselves_are_called() -> None:
    def first() -> None: ...
    def second() -> None: ...

    assert Graphs(torch.device("cpu")).record(first, second) == (first, second)


class FalseCuda:
    """Records like torch: once at a time in a process, or it fails."""

    def __init__(self) -> None:
        self.recording = threading.Lock()

    @contextmanager
    def graph(self, graph: Any, *, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        if not self.recording.acquire(blocking=False):
            raise RuntimeError("another graph is being recorded")
        time.sleep(0.01)
        yield
        self.recording.release()


@pytest.fixture
def false_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    false = FalseCuda()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": false.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("false_cuda")
def test_threads_that_record_at_the_same_time_take_turns() -> None:
    failures: list[BaseException] = []

    def record() -> None:
        try:
            Graphs(torch.device("cuda")).record(lambda: None, lambda: None)
        except RuntimeError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.usefixtures("false_cuda")
def test_functions_run_in_their_order_before_each_is_recorded_with_tf32() -> None:
    calls: list[str] = []
    precisions: list[str] = []

    def first() -> None:
        calls.append("first")
        precisions.append(torch.get_float32_matmul_precision())

    before = torch.get_float32_matmul_precision()
    Graphs(torch.device("cuda")).record(first, lambda: calls.append("second"))
    assert calls == ["first", "second"] * 4
    assert set(precisions) == {"high"}
    assert torch.get_float32_matmul_precision() == before
