"""A model that serves with torch predicts as its learner does, without its locks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support.dense import dense_spec, examples, learned

from stream_ctr.learn.cpu_step import PREDICTED_ROWS
from stream_ctr.learn.dense_part import PARTS
from stream_ctr.learn.served_network import Part, ServedNetwork
from stream_ctr.learn.torch_predictor import TorchEngine, torch_predictor


@pytest.mark.parametrize(
    "options", [{}, {"table_optimizer": "adagrad"}, {"precision": "bf16"}], ids=str
)
@pytest.mark.parametrize("model", PARTS)
def test_every_system_has_the_logits_of_its_learner(model: str, options: dict[str, Any]) -> None:
    spec = dense_spec(model, batch_size=PREDICTED_ROWS, **options)
    learner, weights = learned(spec)
    ids, values = examples(spec, 3 * PREDICTED_ROWS)
    served = torch_predictor(spec, weights)
    all_of_them = served.predict(ids, values)
    # Without a gradient, a layer may multiply by another library.
    bound = 0.02 if "precision" in options else 4e-6
    assert all_of_them == pytest.approx(learner.predict(ids, values), abs=bound)
    few = served.predict(ids[:300], values[:300])
    assert few[:PREDICTED_ROWS].tolist() == all_of_them[:PREDICTED_ROWS].tolist()
    assert few == pytest.approx(all_of_them[:300], abs=bound)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_logit_depends_neither_on_the_threads_nor_on_its_neighbours(threads: int) -> None:
    spec = dense_spec("deepfm", batch_size=512)
    weights = learned(spec)[1]
    ids, values = examples(spec, 1792)
    alone = torch_predictor(spec, weights).predict(ids, values)
    shuffled = np.random.default_rng(0).permutation(1792)
    served = ServedNetwork(spec, weights, TorchEngine(spec, threads=threads))
    found = served.predict(ids[shuffled], values[shuffled])
    assert found.tolist() == alone[shuffled].tolist()


def test_threads_that_predict_together_get_each_their_own_logits() -> None:
    spec = dense_spec("deepfm")
    served = torch_predictor(spec, learned(spec)[1])
    parts = [examples(spec, 9 + 40 * i, seed=i) for i in range(40)]
    alone = [served.predict(*part).tolist() for part in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: served.predict(*part).tolist(), parts))
    assert alone == together


@pytest.mark.parametrize(
    ("batch_size", "online", "n", "expected"),
    [
        (512, True, 257, [Part(0, 256, 256), Part(256, 257, 1)]),
        (512, True, 0, []),
        (48, True, 100, [Part(0, 48, 48), Part(48, 96, 48), Part(96, 100, 4)]),
        (1000, False, 1001, [Part(0, 336, 336), Part(336, 672, 336), Part(672, 1000, 336),
                             Part(1000, 1001, 1)]),
    ],
)  # fmt: skip
def test_parts_are_those_of_a_learner_and_the_last_one_is_shorter(
    batch_size: int, online: bool, n: int, expected: list[Part]
) -> None:
    optimizer = "online" if online else "adam"
    engine = TorchEngine(dense_spec("fm", batch_size=batch_size, table_optimizer=optimizer))
    assert engine.parts(n) == expected


def test_values_that_are_missing_are_an_error_and_no_examples_have_no_logits() -> None:
    spec = dense_spec("fm")
    served = torch_predictor(spec, learned(spec)[1])
    with pytest.raises(ValueError, match="the values of 1 fields are missing"):
        served.predict(examples(spec, 3)[0])
    assert served.predict(*examples(spec, 0)).shape == (0,)
