"""FuxiCTR's models with dense Adam, trained by its own `train_step`.

`train_step` clips the norm of the gradient at 10. The package has the layers, but the model zoo is
in its repository only. The models are composed here as they are there, from the package's layers
and its `BaseModel`, with its initial values. The zoo has no FM & DNN; here it is the sum of the
zoo's FM and DNN.
"""

from __future__ import annotations

import argparse
from typing import Any

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
    """The zoo's LR, FM, DNN, PNN, WideDeep or DeepFM, or the sum of its FM and its DNN."""

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
        self.embedding_layer = None
        if parts != {"linear"}:
            self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.fm = None
        if "fm" in parts:
            self.fm = FactorizationMachine(feature_map)
        self.lr_layer = None
        if "linear" in parts:
            self.lr_layer = LogisticRegression(feature_map, use_bias="deep" not in parts)
        self.inner_product_layer = None
        if pairs:
            self.inner_product_layer = InnerProductInteraction(fields, output="inner_product")
        self.own_embedding = None
        if "embeddings of its own" in parts:
            self.own_embedding = FeatureEmbedding(feature_map, embedding_dim)
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
            if self.own_embedding is not None:
                embeddings = self.own_embedding(x)
            sides.append(self.mlp(self._signals(embeddings)))
        return {"y_pred": self.output_activation(sum(sides[1:], sides[0]))}

    def _signals(self, embeddings: Any) -> Tensor:
        """Return the input of the MLP: the embeddings, and their inner products if any."""
        flat = embeddings.flatten(start_dim=1)
        if self.inner_product_layer is None:
            return flat
        return torch.cat([flat, self.inner_product_layer(embeddings)], dim=1)


class FuxiCTR:
    """A model of FuxiCTR in training."""

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
    feature_map = FeatureMap("examples", "")
    feature_map.labels = ["label"]
    feature_map.default_emb_dim = embedding_dim
    for i, size in enumerate(sizes):
        feature_map.features[f"f{i}"] = {
            "type": "categorical",
            "source": "",
            "vocab_size": size,
        }
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.set_column_index()
    return feature_map


def main() -> None:
    note = f"FuxiCTR {fuxictr.__version__}, torch {torch.__version__}"
    training.run(parse(training.options(__doc__)), FuxiCTR, which="local", note=note)


if __name__ == "__main__":
    main()
