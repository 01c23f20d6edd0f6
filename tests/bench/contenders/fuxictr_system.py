"""FuxiCTR's systems with dense Adam, by its own `train_step`, which clips the gradient's norm at 10.

The package has the layers; the zoo of models that is made of them is in its repository only. They are put together here as there, from
the package's layers and its `BaseModel`, with its initial values. Of FM & DNN, which its zoo has not, the two sides are its FM's and its
DNN's.
"""

from __future__ import annotations

import argparse

import fuxictr
import numpy as np
import numpy.typing as npt
import torch
import training
from examples import parse
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import (
    FactorizationMachine,
    FeatureEmbedding,
    InnerProductInteraction,
    LogisticRegression,
    MLP_Block,
)
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

PARTS = {
    "lr": {"linear"},
    "fm": {"fm"},
    "fnn": {"deep"},
    "ipnn": {"inner products", "deep"},
    "lr_dnn": {"linear", "deep"},
    "fm_dnn": {"fm", "embeddings of its own", "deep"},
    "deepfm": {"fm", "deep"},
}
Batch = dict[str, Tensor]


class Composed(BaseModel):  # type: ignore[misc]
    """Its zoo's LR, FM, DNN, PNN, WideDeep or DeepFM, or its FM beside its DNN."""

    def __init__(
        self,
        parts: set[str],
        feature_map: FeatureMap,
        embedding_dim: int,
        hidden: list[int],
        dropout: float,
    ) -> None:
        super().__init__(feature_map, gpu=-1, verbose=0, model_root="", metrics=["AUC"])
        fields = feature_map.num_fields
        pairs = fields * (fields - 1) // 2 if "inner products" in parts else 0
        self.embedding_layer = (
            FeatureEmbedding(feature_map, embedding_dim) if parts != {"linear"} else None
        )
        self.fm = FactorizationMachine(feature_map) if "fm" in parts else None
        self.lr_layer = (
            LogisticRegression(feature_map, use_bias="deep" not in parts)
            if "linear" in parts
            else None
        )
        self.inner_product_layer = (
            InnerProductInteraction(fields, output="inner_product") if pairs else None
        )
        self.own_embedding = (
            FeatureEmbedding(feature_map, embedding_dim)
            if "embeddings of its own" in parts
            else None
        )
        self.mlp = None
        if "deep" in parts:
            inputs = fields * embedding_dim + pairs
            self.mlp = MLP_Block(
                input_dim=inputs,
                output_dim=1,
                hidden_units=hidden,
                hidden_activations="ReLU",
                dropout_rates=dropout,
            )
        self.compile("adam", "binary_crossentropy", 0.001)
        self.reset_parameters()

    def forward(self, inputs: Batch) -> dict[str, Tensor]:
        x = self.get_inputs(inputs)
        embeddings = self.embedding_layer(x) if self.embedding_layer is not None else None
        sides = []
        if self.fm is not None:
            sides.append(self.fm(x, embeddings))
        if self.lr_layer is not None:
            sides.append(self.lr_layer(x))
        if self.mlp is not None:
            sides.append(
                self.mlp(
                    self._signals(
                        embeddings if self.own_embedding is None else self.own_embedding(x)
                    )
                )
            )
        return {"y_pred": self.output_activation(sum(sides[1:], sides[0]))}

    def _signals(self, embeddings: Tensor) -> Tensor:
        flat = embeddings.flatten(start_dim=1)
        return (
            flat
            if self.inner_product_layer is None
            else torch.cat([flat, self.inner_product_layer(embeddings)], dim=1)
        )


class FuxiCTR:
    def __init__(self, arguments: argparse.Namespace, sizes: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        parts = PARTS[arguments.system]
        self.model = Composed(
            parts,
            features(sizes, arguments.embedding_dim),
            arguments.embedding_dim,
            arguments.hidden,
            arguments.dropout,
        )
        self.model._max_gradient_norm = 10.0  # the default of `fit`
        self.model.train()

    def batch(self, ids: npt.NDArray[np.int32], labels: npt.NDArray[np.uint8]) -> Batch:
        columns = torch.from_numpy(np.ascontiguousarray(ids.T.astype(np.int64)))
        return {
            **{f"f{i}": column for i, column in enumerate(columns)},
            "label": torch.from_numpy(labels.astype(np.float32)),
        }

    def learn(self, batch: Batch) -> object:
        return self.model.train_step(batch).item()  # as its `train_epoch`

    def predict(self, batch: Batch) -> training.Probabilities:
        self.model.eval()
        with torch.no_grad():
            p: Tensor = self.model(batch)["y_pred"]
        self.model.train()
        return p.numpy().reshape(-1).astype(np.float64)

    def keep(self) -> None: ...

    def follow(self) -> bool:
        return False


def features(sizes: list[int], embedding_dim: int) -> FeatureMap:
    made = FeatureMap("examples", "")
    made.labels, made.default_emb_dim = ["label"], embedding_dim
    made.features.update(
        (f"f{i}", {"type": "categorical", "source": "", "vocab_size": size})
        for i, size in enumerate(sizes)
    )
    made.num_fields = made.get_num_fields()
    made.set_column_index()
    return made


def main() -> None:
    note = f"FuxiCTR {fuxictr.__version__}, torch {torch.__version__}"
    training.run(parse(training.options(__doc__)), FuxiCTR, which="local", note=note)


if __name__ == "__main__":
    main()
