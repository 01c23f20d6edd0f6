"""A network that serves gathers as the learner does, and refuses weights that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from support.dense import dense_spec, examples, learned

from stream_ctr.learn.served_network import Dense, Part, ServedNetwork, require_weights
from stream_ctr.learn.tensors import Tensors


class Sums:
    """An engine whose dense part is the sum of all that was gathered, in parts of 1,000 rows."""

    def dense(self, parameters: Tensors) -> Dense:
        return lambda w, v: np.asarray(w.sum(axis=1) + v.sum(axis=(1, 2)), np.float32)

    def parts(self, n: int) -> list[Part]:
        return [Part(start, min(start + 1000, n), 1000) for start in range(0, n, 1000)]

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        for task in tasks:
            task()


@pytest.mark.parametrize("model", ["deepfm", "fm_dnn", "lr_dnn"])
def test_rows_are_gathered_and_multiplied_by_their_values(model: str) -> None:
    spec = dense_spec(model)
    weights = learned(spec)[1]
    ids, values = examples(spec, 2500)
    columns = spec.fields + (spec.crosses if model == "lr_dnn" else 0)
    width = spec.embedding_dim * (2 if model == "fm_dnn" else 1)
    rows = weights["table"][ids[:, :columns], : width + 1].astype(np.float64)
    rows[:, 2] *= values
    found = ServedNetwork(spec, weights, Sums()).predict(ids, values)
    assert found == pytest.approx(rows.sum(axis=(1, 2)), abs=1e-5)


def test_fields_without_values_are_taken_as_they_are() -> None:
    spec = dense_spec("fm", value_fields=[])
    weights = learned(spec)[1]
    ids = examples(spec, 7)[0]
    expected = weights["table"][ids[:, :6], :6].sum(axis=(1, 2))
    found = ServedNetwork(spec, weights, Sums()).predict(ids)
    assert found == pytest.approx(expected, abs=1e-5)


def test_values_that_are_missing_are_an_error() -> None:
    spec = dense_spec("fm")
    network = ServedNetwork(spec, learned(spec)[1], Sums())
    with pytest.raises(ValueError, match="the values of 1 fields are missing"):
        network.predict(examples(spec, 3)[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"table": None}, "tensor 'table' is missing"),
        ({"odd": np.zeros(1)}, "tensor 'odd' is not one of this model"),
        ({"table": np.zeros((4, 16), np.float32)}, r"'table' is float32 \(4, 16\), expected"),
        ({"dense.deep.layers.6.bias": np.full(1, np.nan, np.float32)}, "not finite"),
        ({"intercept": np.zeros(2, np.float32)}, "'intercept' is float32"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Any], reason: str) -> None:
    spec = dense_spec("deepfm")
    weights = {**learned(spec)[1], **change}
    with pytest.raises(ValueError, match=reason):
        require_weights(spec, {name: a for name, a in weights.items() if a is not None})
