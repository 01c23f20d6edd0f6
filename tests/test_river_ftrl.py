"""River behind arrays: its state, and fields that carry a value."""

from __future__ import annotations

import numpy as np
from river import linear_model, optim

from stream_ctr.learn.river_ftrl import RiverFTRL


def test_the_state_is_plain_arrays_and_restores_each_of_them() -> None:
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.5, (400, 4)).astype(np.int32) % 50
    labels = (rng.random(400) < 0.2 + 0.6 * (ids[:, 0] == 1)).astype(np.uint8)
    model = RiverFTRL(alpha=0.1)
    model.learn(ids, np.empty((400, 0), np.float32), labels)
    copy = RiverFTRL(alpha=0.1)
    copy.load_state_dict(model.state_dict())
    state = model.state_dict()
    assert len(state["keys"]) == len(np.unique(ids))
    for name, array in state.items():
        assert np.array_equal(array, copy.state_dict()[name]), name


def test_a_value_scales_its_feature() -> None:
    ids = np.array([[1, 2]] * 3, np.int32)
    labels = np.array([1, 1, 0], np.uint8)
    model = RiverFTRL(value_fields=(1,))
    reference = linear_model.LogisticRegression(optimizer=optim.FTRLProximal())
    expected = []
    for label in labels.tolist():
        expected.append(reference.predict_proba_one({1: 1.0, 2: 2.5})[True])
        reference.learn_one({1: 1.0, 2: 2.5}, label)
    assert model.learn(ids, np.full((3, 1), 2.5, np.float32), labels).tolist() == expected
