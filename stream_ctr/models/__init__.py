"""The paper's nine systems. All but one are small modules from gathered embeddings to logits; tables and optimisers are the learner's.

A module's `forward(w, v)` takes the first-order weights `w` [B, F] and the embeddings `v` [B, F, K] of a batch - each already multiplied by
its feature's value - and returns logits [B]. What a class may say of itself: `embeddings`, how many of K coordinates each feature has
(`v` is [B, F, embeddings * K]); `crosses`, that behind the F fields it wants those of the configured cross products; `pretraining`, that it
begins as another model, until `begin_network`. Layers above a `Dense` must take what it gives, which may be bfloat16.

LR is no module: FTRL-Proximal, which trains it, is a loop over examples (see `lr`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from stream_ctr.models.deepfm import DeepFM
from stream_ctr.models.fm import FM
from stream_ctr.models.fnn import FNN
from stream_ctr.models.pnn import IPNN, OPNN, PNN
from stream_ctr.models.wide_deep import FMDNN, LRDNN


@dataclass(frozen=True, slots=True)
class System:
    """One of the nine: `title` is the paper's name of it, `module` None for LR, `activation` the paper's choice.

    The rest is the paper's Table 1, where it has a line for it.
    """

    title: str
    module: Callable[..., nn.Module] | None
    says: str
    activation: str = "relu"
    pretraining: bool = False
    high_order: bool = True
    low_order: bool = True
    engineering: bool = False

    @property
    def embeddings(self) -> int:
        return getattr(self.module, "embeddings", 1)

    @property
    def crosses(self) -> bool:
        return getattr(self.module, "crosses", False)


MODELS: Mapping[str, System] = {
    "lr": System("LR", None, "logistic regression, by FTRL-Proximal", high_order=False),
    "fm": System("FM", FM, "factorization machine", high_order=False),
    "fnn": System(
        "FNN",
        FNN,
        "network over embeddings that an FM was trained to",
        pretraining=True,
        low_order=False,
    ),
    "ipnn": System(
        "IPNN",
        IPNN,
        "network over embeddings and their inner products",
        activation="tanh",
        low_order=False,
    ),
    "opnn": System(
        "OPNN", OPNN, "network over embeddings and their outer product", low_order=False
    ),
    "pnn": System("PNN*", PNN, "network over embeddings and both products", low_order=False),
    "lr_dnn": System(
        "LR & DNN",
        LRDNN,
        "Wide & Deep: a linear part, with crosses if any, beside a network",
        engineering=True,
    ),
    "fm_dnn": System("FM & DNN", FMDNN, "an FM beside a network, each with embeddings of its own"),
    "deepfm": System("DeepFM", DeepFM, "an FM and a network over the same embeddings"),
}

__all__ = [
    "FM",
    "FMDNN",
    "FNN",
    "IPNN",
    "LRDNN",
    "MODELS",
    "OPNN",
    "PNN",
    "DeepFM",
    "System",
]
