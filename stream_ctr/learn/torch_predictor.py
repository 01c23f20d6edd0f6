"""A model that serves with torch: the learner itself, which predicts and does not learn."""

from __future__ import annotations

import numpy as np

from stream_ctr.learn.learner import Learner, make_learner, require_shapes
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import Tensors

_LARGEST_BATCH = 1 << 20


def torch_predictor(spec: LearnerSpec, weights: Tensors, *, device: str = "cpu") -> Learner:
    """Return the network that `spec` describes, with `weights`, on the device.

    Raises `ValueError` or `RuntimeError` if the weights do not fit, before any memory is taken for
    the model.
    """
    _require_bounds(weights, spec)
    learner = make_learner(spec, device=device, serving=True)
    learner.load_weights(weights)
    if device != "cpu":
        # A GPU's first prediction compiles and records, and no request should wait for that.
        values = np.zeros((1, len(spec.value_fields)), np.float32)
        learner.predict(np.zeros((1, spec.fields + spec.crosses), np.int32), values)
    return learner


def _require_bounds(weights: Tensors, spec: LearnerSpec) -> None:
    """Raise `ValueError` for a specification that its weights contradict, or that is too large."""
    if spec.batch_size > _LARGEST_BATCH:
        raise ValueError(f"a batch of {spec.batch_size}")
    try:
        require_shapes(weights, spec)
    except KeyError as missing:
        raise ValueError(f"tensor {missing} is missing") from None
