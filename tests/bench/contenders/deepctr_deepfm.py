"""DeepCTR-Torch's DeepFM with Adam, a table for each field, trained by its own `fit` or by the steps that `fit` takes, unpacked.

`fit` collates its batches an example at a time; the steps alone take slices. The faster of the two is what is measured. Its L2 penalties,
which walk over every row of every table in each step, are off.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import DeepFM
from examples import batches, field_sizes, measured, options, parse


def main() -> None:
    arguments = parse(options(__doc__))
    sizes = field_sizes(arguments.data)
    fields = [
        SparseFeat(f"f{i}", size, embedding_dim=arguments.embedding_dim)
        for i, size in enumerate(sizes)
    ]
    model = DeepFM(
        fields, fields, dnn_hidden_units=tuple(arguments.hidden), l2_reg_linear=0, l2_reg_embedding=0, l2_reg_dnn=0, dnn_dropout=0,
        device="cpu",
    )  # fmt: skip
    model.compile("adam", "binary_crossentropy")
    model.train()
    data = batches(arguments.data, arguments.batch, which="local")
    pairs = [(ids.float(), labels) for ids, labels in (next(data) for _ in range(8))]
    features, clicks = (
        np.concatenate([ids for ids, _ in pairs]),
        np.concatenate([labels for _, labels in pairs]),
    )
    at = 0

    def step() -> None:  # as BaseModel.fit
        nonlocal at
        ids, labels = pairs[at]
        at = (at + 1) % len(pairs)
        predicted = model(ids).squeeze()
        model.optim.zero_grad()
        loss = (
            model.loss_func(predicted, labels, reduction="sum")
            + model.get_regularization_loss()
            + model.aux_loss
        )
        loss.backward()
        model.optim.step()

    def fit(some: slice = slice(None)) -> None:
        columns = {f"f{i}": features[some, i] for i in range(len(sizes))}
        model.fit(
            columns, clicks[some], batch_size=arguments.batch, epochs=1, verbose=0, shuffle=False
        )

    step()
    fit(slice(0, arguments.batch))
    share = _seconds(lambda: [step() for _ in pairs]) / _seconds(fit)
    fast, examples, which = (
        (step, arguments.batch, "the steps of fit") if share <= 1 else (fit, len(clicks), "fit")
    )
    note = f"torch {torch.__version__}, {which} (steps alone take {share:.2f} of the time of fit), no L2 penalties"
    measured(fast, arguments, note=note, count=examples)


def _seconds(call: Callable[[], object]) -> float:
    """The least of three times."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
