"""DeepCTR-Torch's models with dense Adam, trained by the steps of its `fit` on slices of the data.

`fit` itself collates one example at a time, which is slower. The L2 penalties are off. Initial
values and all other options are the library's defaults.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch
import training
from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import PNN, WDL, DeepFM
from deepctr_torch.models.basemodel import BaseModel
from examples import parse
from torch import Tensor

SYSTEMS = {
    "lr": lambda fields, hidden, common: WDL(
        fields, [], dnn_hidden_units=(), **common, l2_reg_linear=0
    ),
    "fm": lambda fields, hidden, common: DeepFM(
        fields, fields, dnn_hidden_units=(), **common, l2_reg_linear=0
    ),
    "fnn": lambda fields, hidden, common: PNN(fields, hidden, use_inner=False, **common),
    "ipnn": lambda fields, hidden, common: PNN(fields, hidden, **common),
    "opnn": lambda fields, hidden, common: PNN(
        fields, hidden, use_inner=False, use_outter=True, **common
    ),
    "pnn": lambda fields, hidden, common: PNN(fields, hidden, use_outter=True, **common),
    "lr_dnn": lambda fields, hidden, common: WDL(fields, fields, hidden, **common, l2_reg_linear=0),
    "deepfm": lambda fields, hidden, common: DeepFM(
        fields, fields, dnn_hidden_units=hidden, **common, l2_reg_linear=0
    ),
}
Batch = tuple[Tensor, Tensor]


class DeepCTR:
    """A model of DeepCTR-Torch in training."""

    def __init__(self, arguments: argparse.Namespace, sizes: list[int], seed: int) -> None:
        fields = [
            SparseFeat(f"f{i}", size, embedding_dim=arguments.embedding_dim)
            for i, size in enumerate(sizes)
        ]
        common = {
            "l2_reg_embedding": 0,
            "l2_reg_dnn": 0,
            "dnn_dropout": arguments.dropout,
            "seed": seed,
            "device": "cpu",
        }
        self.model: BaseModel = SYSTEMS[arguments.system](fields, tuple(arguments.hidden), common)
        self.model.compile("adam", "binary_crossentropy")  # the rate is 0.001
        self.model.train()

    def batch(self, ids: npt.NDArray[np.int32], labels: npt.NDArray[np.uint8]) -> Batch:
        return torch.from_numpy(ids).float(), torch.from_numpy(labels).float()

    def learn(self, batch: Batch) -> object:
        model = self.model
        x, y = batch
        predicted = model(x).squeeze(-1)
        model.optim.zero_grad()
        loss = (
            model.loss_func(predicted, y, reduction="sum")
            + model.get_regularization_loss()
            + model.aux_loss
        )
        loss.backward()
        model.optim.step()
        return loss.item()

    def predict(self, batch: Batch) -> training.Probabilities:
        self.model.eval()
        with torch.no_grad():
            p: Tensor = self.model(batch[0])
        self.model.train()
        return p.numpy().reshape(-1).astype(np.float64)

    def keep(self) -> None: ...

    def follow(self) -> bool:
        return False


def main() -> None:
    note = f"DeepCTR-Torch {version('deepctr-torch')}, torch {torch.__version__}"
    training.run(parse(training.options(__doc__)), DeepCTR, which="local", note=note)


if __name__ == "__main__":
    main()
