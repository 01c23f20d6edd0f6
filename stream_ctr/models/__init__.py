"""The paper's nine systems: small modules from gathered embeddings to logits.

Tables, optimisers and the steps belong to the learner; a module knows none of them. All modules
share one call:

    model(w, v, sums=None, generator=None) -> logits [B]

    w            [B, F] first-order weights, multiplied by the values of their features
    v            [B, F, K] embeddings, multiplied likewise
    sums         the `FieldSums` of `v`, from a step that computed them while gathering; models
                 with an FM over all of `v` use them instead of summing again
    generator    draws the units that dropout drops; without one nothing is dropped

The same module may run in several threads at once, each with tensors and a generator of its own.

A class may declare `embeddings`, the number of embeddings of K coordinates that each feature has
(`v` is [B, F, embeddings * K]), and `crosses`: behind the F fields the model then takes the
configured cross products. A module with an attribute `pretraining` starts as another model, until
`begin_network`. A `Dense` layer may return bfloat16, which the layers above it must accept.

LR has no module: FTRL-Proximal, which trains it, is a loop over examples (see `learn.ftrl`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from stream_ctr.models.deepfm import DeepFM
from stream_ctr.models.fm import FM
from stream_ctr.models.fnn import FNN
from stream_ctr.models.pnn import IPNN, OPNN, PNN
from stream_ctr.models.products import FieldSums
from stream_ctr.models.wide_deep import FMDNN, LRDNN


@dataclass(frozen=True, slots=True)
class System:
    """One of the nine systems.

    `title` is the paper's name for it, `module` its class (None for LR), `says` a description in a
    few words, and `activation` the paper's choice. The flags are the columns of the paper's
    Table 1; systems that the table leaves out are described in the same terms.
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
        """The number of embeddings of a feature."""
        return getattr(self.module, "embeddings", 1)

    @property
    def crosses(self) -> bool:
        """True if the module takes cross products behind the fields."""
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
    "FieldSums",
    "System",
]
