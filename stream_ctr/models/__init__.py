"""The paper's systems as small modules from gathered embeddings to logits. Tables and optimisers are the learner's.

A model is an `nn.Module` whose `forward(w, v)` takes the first-order weights `w` [B, F] and the embeddings `v` [B, F, K] of a batch - each
already multiplied by its feature's value - and returns logits [B].
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from stream_ctr.models.deepfm import DeepFM

MODELS: dict[str, Callable[..., nn.Module]] = {"deepfm": DeepFM}

__all__ = ["MODELS", "DeepFM"]
