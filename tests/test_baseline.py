"""River in its own process: River's predictions, in order, and a state that resumes exactly."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from river import linear_model, optim

from stream_ctr.learn import baseline
from stream_ctr.learn.baseline import BaselineFailed, BaselineProcess, Marker

Array = npt.NDArray[Any]


def stream(n: int = 400, *, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return ids, values of no field, and labels that depend on the ids."""
    rng = np.random.default_rng(seed)
    ids = rng.zipf(1.5, (n, 4)).astype(np.int32) % 50
    labels = (rng.random(n) < 0.2 + 0.6 * (ids[:, 0] == 1)).astype(np.uint8)
    return ids, np.empty((n, 0), np.float32), labels


def by_hand(ids: Array, labels: Array) -> list[float]:
    """Return River's probabilities from before each update."""
    model = linear_model.LogisticRegression(optimizer=optim.FTRLProximal(alpha=0.1, l1=0.01))
    probabilities = []
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        x = dict.fromkeys(row, 1.0)
        probabilities.append(model.predict_proba_one(x)[True])
        model.learn_one(x, label)
    return probabilities


def collect(process: BaselineProcess) -> Array:
    parts = []
    while process.outstanding:
        answer = process.take(wait=True)
        assert isinstance(answer, np.ndarray)
        parts.append(answer)
    return np.concatenate(parts)


@pytest.fixture(scope="module", autouse=True)
def _started_by_itself() -> Iterator[None]:
    """Start the program as a run does; other tests fork it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "Popen", subprocess.Popen)
        yield


@pytest.fixture
def process() -> Iterator[BaselineProcess]:
    started = BaselineProcess(alpha=0.1, l1=0.01)
    yield started
    started.close()


def test_probabilities_are_rivers_own_from_before_each_update(process: BaselineProcess) -> None:
    ids, values, labels = stream()
    for rows in np.array_split(np.arange(400), 7):
        process.submit(ids[rows], values[rows], labels[rows])
    process.submit(ids[:0], values[:0], labels[:0])  # a batch without sampled examples
    assert collect(process).tolist() == by_hand(ids, labels)


@pytest.mark.slow
def test_a_marker_returns_the_state_at_its_place_in_the_sequence(process: BaselineProcess) -> None:
    ids, values, labels = stream()
    process.submit(ids[:200], values[:200], labels[:200])
    process.mark()
    process.submit(ids[200:], values[200:], labels[200:])
    first, marker, second = (process.take(wait=True) for _ in range(3))
    assert isinstance(first, np.ndarray)
    assert isinstance(marker, Marker)
    assert isinstance(second, np.ndarray)
    resumed = BaselineProcess(alpha=0.1, l1=0.01)
    try:
        resumed.load_state_dict(marker.state)
        resumed.submit(ids[200:], values[200:], labels[200:])
        assert collect(resumed).tolist() == second.tolist()  # bit for bit
    finally:
        resumed.close()
    assert [*first, *second] == by_hand(ids, labels)


def test_submitting_never_waits_for_the_process() -> None:
    process = BaselineProcess()
    try:
        os.kill(process._process.pid, signal.SIGSTOP)
        ids, values, labels = stream(4000)
        # 400,000 events, far more than a pipe holds. A stopped process never reads them.
        for _ in range(100):
            process.submit(ids, values, labels)
        assert process.take(wait=False) is None
        assert process.waiting_bytes > 100 * ids.nbytes
        assert not process.full
    finally:
        os.kill(process._process.pid, signal.SIGCONT)
        process._process.kill()
        process.close()


def test_the_process_is_full_beyond_a_fixed_number_of_bytes(
    process: BaselineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_ctr.learn.baseline._MAX_WAITING_BYTES", 5_000)
    ids, values, labels = stream()
    process.submit(ids[:100], values[:100], labels[:100])
    assert not process.full
    process.submit(ids, values, labels)
    assert process.full
    collect(process)
    assert process.waiting_bytes == 0
    assert not process.full


def test_a_process_that_was_stopped_is_woken(
    process: BaselineProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(baseline, "_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(baseline, "_WAITS_BEFORE_FAILING", 10_000)
    ids, values, labels = stream()
    os.kill(process._process.pid, signal.SIGSTOP)
    process.submit(ids, values, labels)
    assert collect(process).tolist() == by_hand(ids, labels)
    assert f"the baseline's process {process._process.pid} has not answered" in caplog.text


def test_a_process_that_does_not_answer_is_killed_and_is_an_error(
    process: BaselineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(baseline, "_WAITS_BEFORE_WAKING", 10_000)
    monkeypatch.setattr(baseline, "_WAITS_BEFORE_FAILING", 10)
    os.kill(process._process.pid, signal.SIGSTOP)
    process.submit(*stream(10))
    with pytest.raises(BaselineFailed, match=r"has not answered for 0\.1 s and was killed"):
        process.take(wait=True)
    assert process._process.wait() == -signal.SIGKILL


def test_a_stopped_process_ends_when_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "_EXIT_SECONDS", 60)
    process = BaselineProcess()
    process.submit(*stream(10))
    process.take(wait=True)
    os.kill(process._process.pid, signal.SIGSTOP)
    process.close()
    assert process._process.returncode == 0


def test_a_process_that_dies_is_an_error(process: BaselineProcess) -> None:
    process._process.kill()
    process.submit(*stream(10))
    with pytest.raises(BaselineFailed, match="ended"):
        process.take(wait=True)
