"""The terms of a model's logit, for a step that computes some of them itself."""

from __future__ import annotations

from typing import NamedTuple


class Terms(NamedTuple):
    """The terms that a model adds to its logit.

    `linear` is the sum of the first-order weights, `pairs` the sum of the products of pairs of
    embeddings (the first K coordinates of `v`), and `network` a network over the embeddings. With
    `network_w` the network reads the first-order weights too.
    """

    linear: bool = False
    pairs: bool = False
    network: bool = True
    network_w: bool = False
