"""DeepCTR-Torch's DeepFM with Adam and a table for each field.

It is trained by its own `fit`, or by the steps of `fit` called directly, whichever is faster. `fit`
collates its batches one example at a time; the steps alone take slices. Its L2 penalties are off:
they read every row of every table in each step.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import DeepFM
from examples import batches, field_sizes, measured, options, parse

_BATCHES = 8


def main() -> None:
    arguments = parse(options(__doc__))
    sizes = field_sizes(arguments.data)
    fields = [
        SparseFeat(f"f{i}", size, embedding_dim=arguments.embedding_dim)
        for i, size in enumerate(sizes)
    ]
    model = DeepFM(
        fields,
        fields,
        dnn_hidden_units=tuple(arguments.hidden),
        l2_reg_linear=0,
        l2_reg_embedding=0,
        l2_reg_dnn=0,
        dnn_dropout=0,
        device="cpu",
    )
    model.compile("adam", "binary_crossentropy")
    model.train()
    data = batches(arguments.data, arguments.batch, which="local")
    pairs = [(ids.float(), labels) for ids, labels in (next(data) for _ in range(_BATCHES))]
    features = np.concatenate([ids for ids, _ in pairs])
    clicks = np.concatenate([labels for _, labels in pairs])
    endless = itertools.cycle(pairs)

    def step() -> None:  # as BaseModel.fit
        ids, labels = next(endless)
        predicted = model(ids).squeeze()
        model.optim.zero_grad()
        loss = (
            model.loss_func(predicted, labels, reduction="sum")
            + model.get_regularization_loss()
            + model.aux_loss
        )
        loss.backward()
        model.optim.step()

    def fit(rows: slice = slice(None)) -> None:
        columns = {f"f{i}": features[rows, i] for i in range(len(sizes))}
        options = {"batch_size": arguments.batch, "epochs": 1, "verbose": 0, "shuffle": False}
        model.fit(columns, clicks[rows], **options)

    step()
    fit(slice(0, arguments.batch))

    def steps() -> None:
        for _ in pairs:
            step()

    share = _seconds(steps) / _seconds(fit)
    if share <= 1:
        fastest, examples, name = step, arguments.batch, "the steps of fit"
    else:
        fastest, examples, name = fit, len(clicks), "fit"
    note = (
        f"torch {torch.__version__}, {name} "
        f"(steps alone take {share:.2f} of the time of fit), no L2 penalties"
    )
    measured(fastest, arguments, note=note, count=examples)


def _seconds(call: Callable[[], object]) -> float:
    """Return the shortest of three durations."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
