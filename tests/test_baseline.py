"""River in its own process: the same predictions as River called by hand, and a state that resumes exactly."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from river import linear_model, optim

from stream_ctr.learn.baseline import BaselineFailed, BaselineProcess, Marker
from stream_ctr.learn.river_ftrl import RiverFTRL

NONE = np.empty((0, 0), np.float32)


def stream(n: int = 400, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.zipf(1.5, (n, 4)).astype(np.int32) % 50
    return (
        ids,
        np.empty((n, 0), np.float32),
        (rng.random(n) < 0.2 + 0.6 * (ids[:, 0] == 1)).astype(np.uint8),
    )


def by_hand(ids: np.ndarray, labels: np.ndarray) -> list[float]:
    model = linear_model.LogisticRegression(optimizer=optim.FTRLProximal(alpha=0.1, l1=0.01))
    out = []
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        x = dict.fromkeys(row, 1.0)
        out.append(model.predict_proba_one(x)[True])
        model.learn_one(x, label)
    return out


def collect(process: BaselineProcess) -> np.ndarray:
    parts = []
    while process.outstanding:
        answer = process.take(wait=True)
        assert isinstance(answer, np.ndarray)
        parts.append(answer)
    return np.concatenate(parts)


@pytest.fixture
def process():
    started = BaselineProcess(alpha=0.1, l1=0.01)
    yield started
    started.close()


def test_probabilities_are_rivers_own_from_before_each_update(process):
    ids, values, labels = stream()
    for rows in np.array_split(np.arange(400), 7):
        process.submit(ids[rows], values[rows], labels[rows])
    process.submit(ids[:0], values[:0], labels[:0])  # a batch of which nothing was chosen
    assert collect(process).tolist() == by_hand(ids, labels)


@pytest.mark.slow
def test_a_marker_returns_the_state_at_its_place_in_the_sequence(process):
    ids, values, labels = stream()
    process.submit(ids[:200], values[:200], labels[:200])
    process.mark()
    process.submit(ids[200:], values[200:], labels[200:])
    first, marker, second = (process.take(wait=True) for _ in range(3))
    assert isinstance(marker, Marker)
    resumed = BaselineProcess(alpha=0.1, l1=0.01)
    try:
        resumed.load_state_dict(marker.state)
        resumed.submit(ids[200:], values[200:], labels[200:])
        assert collect(resumed).tolist() == second.tolist()  # bit for bit
    finally:
        resumed.close()
    assert [*first, *second] == by_hand(ids, labels)


def test_the_state_is_plain_arrays_and_restores_every_one_of_them():
    ids, values, labels = stream()
    model = RiverFTRL(alpha=0.1)
    model.learn(ids, values, labels)
    copy = RiverFTRL(alpha=0.1)
    copy.load_state_dict(model.state_dict())
    for name, array in model.state_dict().items():
        assert np.array_equal(array, copy.state_dict()[name]), name


def test_a_value_field_scales_its_feature():
    ids = np.array([[1, 2]] * 3, np.int32)
    labels = np.array([1, 1, 0], np.uint8)
    model = RiverFTRL(value_fields=(1,))
    reference = linear_model.LogisticRegression(optimizer=optim.FTRLProximal())
    expected = []
    for label in labels.tolist():
        expected.append(reference.predict_proba_one({1: 1.0, 2: 2.5})[True])
        reference.learn_one({1: 1.0, 2: 2.5}, label)
    assert model.learn(ids, np.full((3, 1), 2.5, np.float32), labels).tolist() == expected


def test_submitting_never_waits_for_the_process():
    process = BaselineProcess()
    try:
        os.kill(process._process.pid, signal.SIGSTOP)
        ids, values, labels = stream(4000)
        for _ in range(100):
            process.submit(
                ids, values, labels
            )  # 400,000 events, far more than a pipe holds; stopped, it never reads them
        assert process.take(wait=False) is None
        assert process.waiting_bytes > 100 * ids.nbytes
        assert not process.full
    finally:
        os.kill(process._process.pid, signal.SIGCONT)
        process._process.kill()
        process.close()


def test_a_process_that_dies_is_an_error_not_a_silence(process):
    process._process.kill()
    ids, values, labels = stream(10)
    process.submit(ids, values, labels)
    with pytest.raises(BaselineFailed, match="ended"):
        process.take(wait=True)
