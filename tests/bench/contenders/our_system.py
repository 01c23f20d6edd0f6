"""Ours: one of the nine models through `stream_ctr.learn.learner`.

LR learns by exact FTRL. The others learn with Adam, which is lazy on the rows of the table.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import training
from examples import parse

from stream_ctr.learn.device import choose_device, choose_precision
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import State
from stream_ctr.learn.thread_pool import set_up_process

_ENDLESS = 1 << 40  # `follow` ends the pretraining
Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]


class Ours:
    """A model of ours in training."""

    def __init__(self, arguments: argparse.Namespace, sizes: list[int], seed: int) -> None:
        bits = arguments.table_bits or (sum(sizes) - 1).bit_length()
        precision: Any = choose_precision(arguments.precision, choose_device(arguments.device))
        options: dict[str, Any] = {}
        if arguments.initial_scale is not None:
            options["initial_scale"] = arguments.initial_scale
        spec = LearnerSpec(
            model=arguments.system,
            fields=len(sizes),
            embedding_dim=arguments.embedding_dim,
            hidden=tuple(arguments.hidden),
            activation="relu",
            dropout=arguments.dropout,
            table_bits=bits,
            batch_size=arguments.batch,
            table_optimizer=arguments.table_optimizer,
            dense_learning_rate=0.001,
            pretrain_examples=_ENDLESS,
            precision=precision,
            seed=seed,
            **options,
        )
        self.learner = make_learner(
            spec,
            device=arguments.device,
            threads=1 if arguments.epochs else os.cpu_count() or 1,
            progressive=False,
        )
        self._kept: State | None = None

    def batch(self, ids: npt.NDArray[np.int32], labels: npt.NDArray[np.uint8]) -> Batch:
        return ids, labels

    def learn(self, batch: Batch) -> object:
        return self.learner.learn(*batch)

    def predict(self, batch: Batch) -> training.Probabilities:
        return 1 / (1 + np.exp(-self.learner.predict(batch[0]).astype(np.float64)))

    def keep(self) -> None:
        if self.learner.pretraining:
            self._kept = self.learner.weights(reuse=True)

    def follow(self) -> bool:
        learner = self.learner
        if not isinstance(learner, NetworkLearner) or not learner.pretraining:
            return False
        if self._kept is not None:
            learner.load_weights(self._kept)
        learner.end_pretraining()
        return True


def main() -> None:
    parser = training.options(__doc__)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--table-bits", type=int, default=0, help="default: enough for the fields' rows"
    )
    parser.add_argument("--table-optimizer", default="adam")
    parser.add_argument("--initial-scale", type=float)
    arguments = parse(parser)
    set_up_process()  # as `stream-ctr run` does
    precision = choose_precision(arguments.precision, choose_device(arguments.device))
    note = f"{precision}, lazy {arguments.table_optimizer.capitalize()} on rows"
    if arguments.system == "lr":
        note = "exact FTRL"
    training.run(arguments, Ours, which="ids", note=note)


if __name__ == "__main__":
    main()
